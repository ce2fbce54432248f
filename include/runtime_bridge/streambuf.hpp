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
#include <climits>
#include <concepts>
#include <cstddef>
#include <cstring>
#include <exception>
#include <functional>
#include <istream>
#include <optional>
#include <ostream>
#include <stdexcept>
#include <streambuf>
#include <system_error>
#include <type_traits>
#include <utility>
#include <vector>

namespace runtime_bridge {
inline namespace RUNTIME_BRIDGE_FLAVOUR {
namespace stream_detail {

#ifdef RUNTIME_BRIDGE_USE_BOOST_ASIO
namespace net = boost::asio;
using AsioError = boost::system::system_error;
#else
namespace net = asio;
using AsioError = std::system_error;
#endif

/// What both kinds of stream have: a function of a piece of memory, and a buffer.
template <class Function, class Piece>
class Buffer : public std::streambuf {
 public:
  // The limit is that of `pbump`.
  Buffer(const RuntimeBridge& bridge, Function&& function, auto timeout, std::size_t size, SourceLocation where)
      : room_(std::clamp<std::size_t>(size, 1, INT_MAX)),
        bridge_(bridge.share()),
        function_(std::move(function)),
        timeout_(timeout),
        where_(where) {}

  std::optional<BridgeError> error{};  // what `call` has thrown

 protected:
  /// Calls the function, and returns the number of bytes that it gives: all if it returns void.
  std::size_t call(Piece piece, std::size_t least) {
    error.reset();
    try {
      static_assert(std::invocable<Function&, Piece>,
                    "runtime_bridge: a stream's function takes an asio::mutable_buffer to read, or an "
                    "asio::const_buffer to write");
      const auto task = [&] { return std::invoke(function_, piece); };
      auto result = bridge_.block_on_for(task, timeout_, {}, where_);
      if (!result.has_value()) error = result.error();
      std::size_t size = piece.size();
      if constexpr (std::is_void_v<typename decltype(result)::value_type>) {
        static_assert(std::is_same_v<Piece, net::const_buffer>, "runtime_bridge: a read gives the number of bytes");
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

  std::vector<char> room_;

 private:
  RuntimeBridge bridge_;
  Function function_;
  std::chrono::duration<long double, std::nano> timeout_;  // holds any duration without overflow
  SourceLocation where_;
};

template <class Read>
class ReadBuffer final : public Buffer<Read, net::mutable_buffer> {
 public:
  using Buffer<Read, net::mutable_buffer>::Buffer;

 private:
  using Traits = std::char_traits<char>;

  std::size_t read(char* to, std::size_t size) {
    try {
      return this->call({to, size}, 0);
    } catch (const AsioError& e) {
      if (e.code() != net::error::eof) throw;
      this->error.reset();
      return 0;
    }
  }

  /// These bytes come next.
  void show(std::vector<char>& bytes, std::size_t size) { this->setg(bytes.data(), bytes.data(), bytes.data() + size); }

  /// `unget` would go back to bytes that are not the last ones any more.
  void forget() { this->setg(nullptr, nullptr, nullptr); }

  int underflow() override {
    forget();
    std::vector<char>().swap(unread_);
    show(this->room_, read(this->room_.data(), this->room_.size()));
    return this->gptr() == this->egptr() ? Traits::eof() : Traits::to_int_type(*this->gptr());
  }

  /// What does not fit into the buffer goes to its destination without a copy.
  std::streamsize xsgetn(char* to, std::streamsize count) override {
    std::streamsize got = 0;
    try {
      while (got < count) {
        std::streamsize size = std::min<std::streamsize>(this->egptr() - this->gptr(), count - got);
        if (size != 0) {
          std::memcpy(to + got, this->gptr(), static_cast<std::size_t>(size));
          this->setg(this->eback(), this->gptr() + size, this->egptr());
        } else if (count - got < std::ssize(this->room_)) {
          if (underflow() == Traits::eof()) break;
        } else {
          forget();
          size = static_cast<std::streamsize>(read(to + got, static_cast<std::size_t>(count - got)));
          if (size == 0) break;
        }
        got += size;
      }
    } catch (...) {
      // std::istream will count nothing, so these bytes come again.
      unread_.assign(to, to + got);
      show(unread_, unread_.size());
      throw;
    }
    return got;
  }

  std::vector<char> unread_;  // what a failed xsgetn had read
};

template <class Write>
class WriteBuffer final : public Buffer<Write, net::const_buffer> {
 public:
  using Buffer<Write, net::const_buffer>::Buffer;
  ~WriteBuffer() override {
    try {
      sync();
    } catch (...) {
    }
  }

 private:
  using Traits = std::char_traits<char>;

  /// Whatever this throws, it throws again from then on: how much was written is not known.
  void send(const char* bytes, std::size_t size) {
    if (broken_) std::rethrow_exception(broken_);
    try {
      while (size != 0) {
        const std::size_t written = this->call({bytes, size}, 1);
        bytes += written;
        size -= written;
      }
    } catch (...) {
      broken_ = std::current_exception();
      this->setp(nullptr, nullptr);  // so that every write comes here
      throw;
    }
  }

  int sync() override {
    send(this->pbase(), static_cast<std::size_t>(this->pptr() - this->pbase()));
    this->setp(this->room_.data(), this->room_.data() + this->room_.size());
    return 0;
  }

  int overflow(int c) override {
    sync();
    return Traits::eq_int_type(c, Traits::eof()) ? Traits::not_eof(c) : this->sputc(Traits::to_char_type(c));
  }

  /// What does not fit into the buffer is written from its place without a copy.
  std::streamsize xsputn(const char* from, std::streamsize count) override {
    if (count < std::ssize(this->room_)) return std::streambuf::xsputn(from, count);
    sync();
    send(from, static_cast<std::size_t>(count));
    return count;
  }

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
      : Base(nullptr), buffer_(bridge, std::move(function), timeout, buffer_size, where) {
    this->rdbuf(&buffer_);
  }

  /// Why the last call of the function failed; empty if it did not.
  [[nodiscard]] const std::optional<BridgeError>& error() const noexcept { return buffer_.error; }

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
}  // namespace runtime_bridge

#endif  // RUNTIME_BRIDGE_STREAMBUF_HPP
