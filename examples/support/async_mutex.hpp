// SPDX-License-Identifier: Apache-2.0
//
// A lock for coroutines: who holds it may suspend, and the others wait without blocking the thread.
//
//   AsyncMutex mutex(bridge.get_executor());
//
//   asio::awaitable<std::string> ask(std::string_view question) {
//     const auto guard = co_await mutex.lock();  // unlocks when it is destroyed
//     co_await send(question);
//     co_return co_await receive();
//   }

#ifndef RUNTIME_BRIDGE_EXAMPLES_ASYNC_MUTEX_HPP
#define RUNTIME_BRIDGE_EXAMPLES_ASYNC_MUTEX_HPP

#include <utility>

#include "support/asio.hpp"

#ifdef RUNTIME_BRIDGE_USE_BOOST_ASIO
#include <boost/asio/any_io_executor.hpp>
#include <boost/asio/experimental/channel.hpp>
#include <boost/asio/use_awaitable.hpp>
#else
#include <asio/any_io_executor.hpp>
#include <asio/experimental/channel.hpp>
#include <asio/use_awaitable.hpp>
#endif

/// A lock for the coroutines of one thread, such as a bridge's worker. They get it in the order of their arrival.
///
/// All of it is for that thread, the guards' destructors included. It is an I/O object: destroy it before the bridge,
/// and when nobody holds it. A coroutine that is cancelled while it waits never gets the lock.
class AsyncMutex {
 public:
  class [[nodiscard]] Guard {
   public:
    explicit Guard(AsyncMutex& mutex) : mutex_(&mutex) {}
    Guard(Guard&& other) noexcept : mutex_(std::exchange(other.mutex_, nullptr)) {}
    Guard& operator=(Guard&&) = delete;
    ~Guard() {
      if (mutex_) mutex_->holder_.try_receive([](const auto&...) {});  // the first coroutine that waits to send goes on
    }

   private:
    AsyncMutex* mutex_;
  };

  explicit AsyncMutex(const asio::any_io_executor& executor) : holder_(executor, 1) {}

  asio::awaitable<Guard> lock() {
    if (!holder_.try_send()) co_await holder_.async_send(asio::use_awaitable);
    co_return Guard(*this);
  }

 private:
  // Full while somebody holds the lock. The others wait to send, not to receive: a channel forgets a sender that is
  // cancelled or destroyed, but may crash after a receiver was destroyed, and breaks when one is cancelled (Asio 1.22).
  asio::experimental::channel<void()> holder_;
};

#endif  // RUNTIME_BRIDGE_EXAMPLES_ASYNC_MUTEX_HPP
