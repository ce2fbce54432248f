// SPDX-License-Identifier: Apache-2.0
//
// runtime_bridge::istream and ostream: standard streams over asynchronous reads and writes, for synchronous code that
// takes a std::istream or a std::ostream.

#ifndef RUNTIME_BRIDGE_STREAMBUF_HPP
#define RUNTIME_BRIDGE_STREAMBUF_HPP

#include "../runtime_bridge.hpp"

#ifdef RUNTIME_BRIDGE_USE_BOOST_ASIO
#include <boost/asio/buffer.hpp>
#include <boost/asio/error.hpp>
#else
#include <asio/buffer.hpp>
#include <asio/error.hpp>
#endif

#include <algorithm>
#include <chrono>
#include <concepts>
#include <cstddef>
#include <exception>
#include <functional>
#include <istream>
#include <optional>
#include <ostream>
#include <stdexcept>
#include <streambuf>
#include <string>
#include <system_error>
#include <type_traits>
#include <utility>
#include <vector>

namespace runtime_bridge {
inline namespace v0_2 {
inline namespace RUNTIME_BRIDGE_FLAVOUR {
namespace stream_detail {

#ifdef RUNTIME_BRIDGE_USE_BOOST_ASIO
namespace net = boost::asio;
using AsioError = boost::system::system_error;
#else
namespace net = asio;
using AsioError = std::system_error;
#endif

using Traits = std::char_traits<char>;

/// A stream's function, and how it is called. What a call throws is in `error`, too.
template <class Function, class Piece>
struct Caller {
  /// Returns the number of bytes that the function gives: all, if it returns void.
  std::size_t operator()(Piece piece, std::size_t least = 0) {
    static_assert(std::invocable<Function&, Piece>,
                  "runtime_bridge: a stream reads by a function of asio::mutable_buffer, and writes by one of "
                  "asio::const_buffer");
    const auto task = [&] { return std::invoke(function, piece); };
    error.reset();
    try {
      auto result = bridge.block_on_for(task, timeout, {}, where);
      using Value = typename decltype(result)::value_type;
      constexpr bool writes_all = std::is_void_v<Value> && std::is_same_v<Piece, net::const_buffer>;
      static_assert(std::convertible_to<Value, std::size_t> || writes_all,
                    "runtime_bridge: a stream's function returns the number of bytes; one that writes may return void");
      if (!result.has_value()) error = result.error();
      std::size_t size = piece.size();
      if constexpr (writes_all) {
        unwrap(result);
      } else {
        size = static_cast<std::size_t>(unwrap(std::move(result)));
      }
      if (size < least) throw std::length_error("runtime_bridge: the write of a stream has written nothing");
      if (size > piece.size()) throw std::length_error("runtime_bridge: more bytes than there is room for");
      return size;
    } catch (...) {
      if (!error) error.emplace(BridgeError::ResponseLost, std::current_exception());
      throw;
    }
  }

  RuntimeBridge bridge;
  Function function;
  std::chrono::duration<long double, std::nano> timeout;  // holds any duration without overflow
  SourceLocation where;
  std::optional<BridgeError> error{};
};

template <class Read>
class ReadBuffer final : public std::streambuf {
 public:
  using Call = Caller<Read, net::mutable_buffer>;

  ReadBuffer(Call the_call, std::size_t size) : call(std::move(the_call)), room_(size) {}

  Call call;

 private:
  std::size_t read(char* to, std::streamsize size) {
    setg(nullptr, nullptr, nullptr);  // `unget` must not find bytes that are older than the last ones
    try {
      return call({to, static_cast<std::size_t>(size)});
    } catch (const AsioError& e) {
      if (e.code() != net::error::eof) throw;
      call.error.reset();
      return 0;
    }
  }

  /// These bytes come next.
  void show(std::vector<char>& bytes, std::size_t size) { setg(bytes.data(), bytes.data(), bytes.data() + size); }

  int underflow() override {
    std::vector<char>().swap(unread_);
    show(room_, read(room_.data(), std::ssize(room_)));
    return gptr() == egptr() ? Traits::eof() : Traits::to_int_type(*gptr());
  }

  std::streamsize xsgetn(char* to, std::streamsize count) override {
    std::streamsize got = 0;
    try {
      while (got < count) {
        std::streamsize size = std::min<std::streamsize>(egptr() - gptr(), count - got);
        if (size != 0) {
          Traits::copy(to + got, gptr(), static_cast<std::size_t>(size));
          setg(eback(), gptr() + size, egptr());
        } else if (count - got < std::ssize(room_)) {
          if (underflow() == Traits::eof()) break;
        } else {
          size = static_cast<std::streamsize>(read(to + got, count - got));
          if (size == 0) break;
        }
        got += size;
      }
    } catch (...) {
      // std::istream::read counts nothing now, so these bytes come again. (Without memory for them it is
      // std::bad_alloc.)
      unread_.assign(to, to + got);
      show(unread_, unread_.size());
      throw;
    }
    return got;
  }

  std::vector<char> room_;
  std::vector<char> unread_;  // what a failed xsgetn had read
};

template <class Write>
class WriteBuffer final : public std::streambuf {
 public:
  using Call = Caller<Write, net::const_buffer>;

  WriteBuffer(Call the_call, std::size_t size) : call(std::move(the_call)), room_(size) {}
  ~WriteBuffer() override {
    try {
      sync();
    } catch (...) {
    }
  }

  Call call;

 private:
  /// After an error it throws the same error again, and writes nothing.
  void send(const char* bytes, std::streamsize count) {
    if (broken_) std::rethrow_exception(broken_);
    try {
      for (auto size = static_cast<std::size_t>(count); size != 0;) {
        const std::size_t written = call({bytes, size}, 1);
        bytes += written;
        size -= written;
      }
    } catch (...) {
      broken_ = std::current_exception();
      setp(nullptr, nullptr);  // all output must come here
      throw;
    }
  }

  int sync() override {
    send(pbase(), pptr() - pbase());
    setp(room_.data(), room_.data() + room_.size());
    return 0;
  }

  int overflow(int c) override {
    sync();
    return Traits::eq_int_type(c, Traits::eof()) ? Traits::not_eof(c) : sputc(Traits::to_char_type(c));
  }

  std::streamsize xsputn(const char* from, std::streamsize count) override {
    if (count < std::ssize(room_)) return std::streambuf::xsputn(from, count);
    sync();
    send(from, count);
    return count;
  }

  std::vector<char> room_;
  std::exception_ptr broken_;
};

/// A stream with its buffer.
template <class Base, class Buffer>
class Stream : public Base {
 public:
  template <class Function, class Rep = std::chrono::hours::rep, class Period = std::chrono::hours::period>
  Stream(const RuntimeBridge& bridge, Function function,
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

}  // namespace stream_detail

/// A `std::istream` over an asynchronous read: `runtime_bridge::istream in(bridge, read, timeout, buffer_size)`.
///
/// `read(asio::mutable_buffer)` makes a Task that gives the number of bytes read, such as
/// `[&](auto buffer) { return socket.async_read_some(buffer, asio::deferred); }`. Zero is the end, and so is
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
class istream : public stream_detail::Stream<std::istream, stream_detail::ReadBuffer<Read>> {
  using istream::Stream::Stream;
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
class ostream : public stream_detail::Stream<std::ostream, stream_detail::WriteBuffer<Write>> {
  using ostream::Stream::Stream;
};
template <class Write, class... Rest>
ostream(const RuntimeBridge&, Write, Rest...) -> ostream<Write>;

}  // namespace RUNTIME_BRIDGE_FLAVOUR
}  // namespace v0_2
}  // namespace runtime_bridge

#endif  // RUNTIME_BRIDGE_STREAMBUF_HPP
