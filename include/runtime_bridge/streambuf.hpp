// SPDX-License-Identifier: Apache-2.0
//
// runtime_bridge::istream and ostream: standard streams over asynchronous reads and writes, for synchronous code that
// takes a std::istream or a std::ostream.

#ifndef RUNTIME_BRIDGE_STREAMBUF_HPP
#define RUNTIME_BRIDGE_STREAMBUF_HPP

#include <istream>
#include <ostream>

#include "detail/read_buffer.hpp"
#include "detail/write_buffer.hpp"

namespace runtime_bridge {
inline namespace v0_2 {
inline namespace RUNTIME_BRIDGE_FLAVOUR {

/// What `istream` and `ostream` have in common: a stream with its buffer.
template <class Base, class Buffer>
class StreamBase : public Base {
 public:
  /// A stream that calls `function` with the given deadline for each call; by default there is none.
  template <class Function, class Rep = std::chrono::hours::rep, class Period = std::chrono::hours::period>
  StreamBase(const RuntimeBridge& bridge, Function function,
             std::chrono::duration<Rep, Period> timeout = (std::chrono::hours::max)(),
             std::size_t buffer_size = 64 * std::size_t{1024}, SourceLocation where = SourceLocation::current())
      : Base(nullptr),
        buffer_({bridge.share(), std::move(function), timeout, where}, std::max<std::size_t>(buffer_size, 1)) {
    this->rdbuf(&buffer_);
  }

  /// Why the last call of the function failed; empty if it did not.
  [[nodiscard]] const std::optional<BridgeError>& error() const noexcept { return buffer_.call.error; }

 private:
  Buffer buffer_;
};

/// A `std::istream` over an asynchronous read: `runtime_bridge::istream in(bridge, read, timeout, buffer_size)`.
///
/// `read(asio::mutable_buffer)` makes a Task that gives the number of bytes read, such as
/// `[&](auto buffer) { return socket.async_read_some(buffer, asio::use_awaitable); }`. Zero is the end, and so is
/// `asio::error::eof`. (Not `asio::async_read`: at the end, its error hides the last bytes.) The stream keeps `read`,
/// calls it on the worker whenever its buffer is empty, and waits, by default without a limit. What a
/// `std::istream::read` wants beyond the buffer's size goes straight to its destination.
///
/// *Errors.* What `unwrap` would throw sets badbit, and is thrown if `exceptions()` has badbit; `error()` tells it.
/// (An `istreambuf_iterator` always throws it.) No byte is lost: after `clear()` the stream reads on, and bytes that a
/// failed `std::istream::read` had read come again. It cannot seek: `tellg` returns -1, and `seekg` sets failbit.
///
/// Use it in one thread at a time, and not on the worker. The bridge may be destroyed before it.
template <class Read>
class istream : public StreamBase<std::istream, stream_detail::ReadBuffer<Read>> {
  using istream::StreamBase::StreamBase;
};
template <class Read, class... Rest>
istream(const RuntimeBridge&, Read, Rest...) -> istream<Read>;

/// A `std::ostream` over an asynchronous write, like `istream`.
///
/// `write(asio::const_buffer)` makes a Task that writes all of it and returns void, or returns how many bytes it has
/// written; then it is called again for the rest. It is called when the buffer is full, by `flush()`, and by the
/// destructor, which cannot tell errors: call `flush()` before, and check the stream. In a child made by `fork` it
/// writes nothing.
///
/// *Errors.* As with `istream`, but for good: it is not known how much a failed `write` has written, so it is not
/// called again. Every later output and flush fails with the same error, even after `clear()`.
template <class Write>
class ostream : public StreamBase<std::ostream, stream_detail::WriteBuffer<Write>> {
  using ostream::StreamBase::StreamBase;
};
template <class Write, class... Rest>
ostream(const RuntimeBridge&, Write, Rest...) -> ostream<Write>;

}  // namespace RUNTIME_BRIDGE_FLAVOUR
}  // namespace v0_2
}  // namespace runtime_bridge

#endif  // RUNTIME_BRIDGE_STREAMBUF_HPP
