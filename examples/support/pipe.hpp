// SPDX-License-Identifier: Apache-2.0
//
// Hands bytes from one coroutine to another. With it, a transfer that calls a curl::Source or a curl::Sink can be the
// other end of a stream, which reads or writes when its user wants to.

#ifndef RUNTIME_BRIDGE_EXAMPLES_PIPE_HPP
#define RUNTIME_BRIDGE_EXAMPLES_PIPE_HPP

#include <asio/any_io_executor.hpp>
#include <asio/awaitable.hpp>
#include <asio/error.hpp>
#include <asio/steady_timer.hpp>
#include <cstddef>
#include <exception>
#include <span>
#include <string_view>
#include <system_error>
#include <utility>

#include "curl.hpp"

/// It keeps no bytes: `write` returns when all of them have been read, so the faster side waits for the other one. Use
/// it on the executor's thread only, one read and one write at a time.
class Pipe {
 public:
  explicit Pipe(const asio::any_io_executor& executor) : wake_(executor, asio::steady_timer::time_point::max()) {}

  /// Waits until there are bytes, and returns how many it has copied. 0 means that the pipe was closed; if that was
  /// with an error, throws the error.
  asio::awaitable<std::size_t> read(std::span<char> room) {
    while (bytes_.empty() && !closed_) co_await curl::detail::wait_until_woken(wake_);
    if (bytes_.empty() && error_) std::rethrow_exception(error_);
    const std::size_t size = bytes_.copy(room.data(), room.size());
    bytes_.remove_prefix(size);
    used_ = used_ || size != 0;
    wake_.cancel();
    co_return size;
  }

  /// Throws if the pipe is closed before everything was read.
  asio::awaitable<void> write(std::string_view bytes) {
    const Withdraws end{bytes_};
    bytes_ = bytes;
    wake_.cancel();
    while (!bytes_.empty() && !closed_) co_await curl::detail::wait_until_woken(wake_);
    if (bytes_.empty()) co_return;
    if (error_) std::rethrow_exception(error_);
    throw std::system_error(asio::error::broken_pipe);
  }

  void close(std::exception_ptr error = nullptr) noexcept {
    if (!std::exchange(closed_, true)) error_ = std::move(error);
    wake_.cancel();
  }

  /// Whether something was read. It cannot be read again.
  [[nodiscard]] bool used() const noexcept { return used_; }

 private:
  /// The bytes of a write that is cancelled are about to be destroyed.
  struct Withdraws {
    std::string_view& bytes;
    ~Withdraws() { bytes = {}; }
  };

  asio::steady_timer wake_;
  std::string_view bytes_;  // what is left of the current write
  std::exception_ptr error_;
  bool closed_ = false;
  bool used_ = false;
};

#endif  // RUNTIME_BRIDGE_EXAMPLES_PIPE_HPP
