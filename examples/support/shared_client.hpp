// SPDX-License-Identifier: Apache-2.0
//
// Shared by the synchronous backends: an asynchronous client together with the bridge that it runs on.

#ifndef RUNTIME_BRIDGE_EXAMPLES_SHARED_CLIENT_HPP
#define RUNTIME_BRIDGE_EXAMPLES_SHARED_CLIENT_HPP

#include <runtime_bridge.hpp>

#include <chrono>
#include <memory>
#include <type_traits>
#include <utility>

#include "support/asio.hpp"
#include "support/backends.hpp"

/// Turns what a task returns or throws into an outcome. `describe` is called while the exception is handled; it
/// rethrows what it does not know, and the bridge then reports that.
template <class T>
asio::awaitable<Outcome<T>> outcome_of(asio::awaitable<T> task, BackendError (*describe)()) {
  try {
    if constexpr (std::is_void_v<T>) {
      co_await std::move(task);
      co_return Outcome<T>();
    } else {
      co_return co_await std::move(task);
    }
  } catch (...) {
    co_return Failure(describe());
  }
}

// [readme]
/// Copies are cheap: they share one bridge, whose worker starts with the first call, and one client. `Client` has a
/// function close(), which ends its connections. If it needs tasks in the background, it has a function use(bridge),
/// and submits them to this bridge. `describe` is as in `outcome_of`.
template <class Client, BackendError (*describe)()>
class SharedClient {
  struct Shared {
    template <class Make>
    explicit Shared(Make make) : client(make(bridge.get_executor())) {
      if constexpr (requires { client.use(bridge); }) client.use(bridge);
    }
    Shared(const Shared&) = delete;
    Shared& operator=(const Shared&) = delete;
    // A task may own the last copy. This then runs on the worker, where block_on is refused and close() may be called.
    ~Shared() {
      const auto closed = bridge.block_on([&] { client.close(); });
      if (!closed && closed.error() == runtime_bridge::BridgeError::WouldDeadlock) client.close();
      // Wait for the tasks in the background. If the bridge were stopped under them, they could use what is destroyed.
      bridge.shutdown(runtime_bridge::Shutdown::drain, std::chrono::seconds(10));
    }
    runtime_bridge::RuntimeBridge bridge{{.start = runtime_bridge::Start::lazy}};
    Client client;  // declared last: its connections must be destroyed before the bridge
  };

 public:
  /// `make(executor)` returns the client.
  template <class Make>
  SharedClient(Make make, std::chrono::milliseconds timeout)
      : shared_(std::make_shared<Shared>(std::move(make))), timeout_(timeout) {}

  /// Runs `function(client)`, which returns an awaitable, on the worker. It has ended when this returns, so it may
  /// refer to the caller's locals.
  template <class Function>
  auto call(Function function) const {
    const auto task = [&] { return outcome_of(function(shared_->client), describe); };
    return flatten(shared_->bridge.block_on_for(task, timeout_));
  }
  // [/readme]

  /// Starts `function(client)` and does not wait. The task must own its data.
  template <class Function>
  auto submit(Function function) const {
    return shared_->bridge.submit(
        [shared = shared_, function = std::move(function)] { return outcome_of(function(shared->client), describe); });
  }
  [[nodiscard]] const runtime_bridge::RuntimeBridge& bridge() const { return shared_->bridge; }
  [[nodiscard]] std::chrono::milliseconds timeout() const { return timeout_; }

  /// For the calls of this copy.
  void set_timeout(std::chrono::milliseconds timeout) { timeout_ = timeout; }

 private:
  std::shared_ptr<Shared> shared_;
  std::chrono::milliseconds timeout_;
};

#endif  // RUNTIME_BRIDGE_EXAMPLES_SHARED_CLIENT_HPP
