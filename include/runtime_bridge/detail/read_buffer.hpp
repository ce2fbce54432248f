// SPDX-License-Identifier: Apache-2.0
//
// For streambuf.hpp: the buffer of an istream.

#ifndef RUNTIME_BRIDGE_DETAIL_READ_BUFFER_HPP
#define RUNTIME_BRIDGE_DETAIL_READ_BUFFER_HPP

#include <streambuf>
#include <vector>

#include "stream_call.hpp"

namespace runtime_bridge {
inline namespace v0_2 {
inline namespace RUNTIME_BRIDGE_FLAVOUR {
namespace stream_detail {

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
    return gptr() == egptr() ? traits_type::eof() : traits_type::to_int_type(*gptr());
  }

  std::streamsize xsgetn(char* to, std::streamsize count) override {
    std::streamsize got = 0;
    try {
      while (got < count) {
        std::streamsize size = std::min<std::streamsize>(egptr() - gptr(), count - got);
        if (size != 0) {
          traits_type::copy(to + got, gptr(), static_cast<std::size_t>(size));
          setg(eback(), gptr() + size, egptr());
        } else if (count - got < std::ssize(room_)) {
          if (underflow() == traits_type::eof()) break;
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

}  // namespace stream_detail

}  // namespace RUNTIME_BRIDGE_FLAVOUR
}  // namespace v0_2
}  // namespace runtime_bridge

#endif  // RUNTIME_BRIDGE_DETAIL_READ_BUFFER_HPP
