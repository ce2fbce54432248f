// SPDX-License-Identifier: Apache-2.0
//
// For streambuf.hpp: the buffer of an ostream.

#ifndef RUNTIME_BRIDGE_DETAIL_WRITE_BUFFER_HPP
#define RUNTIME_BRIDGE_DETAIL_WRITE_BUFFER_HPP

#include <streambuf>
#include <vector>

#include "stream_call.hpp"

namespace runtime_bridge {
inline namespace v0_2 {
inline namespace RUNTIME_BRIDGE_FLAVOUR {
namespace stream_detail {

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
    return traits_type::eq_int_type(c, traits_type::eof()) ? traits_type::not_eof(c)
                                                           : sputc(traits_type::to_char_type(c));
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

}  // namespace stream_detail

}  // namespace RUNTIME_BRIDGE_FLAVOUR
}  // namespace v0_2
}  // namespace runtime_bridge

#endif  // RUNTIME_BRIDGE_DETAIL_WRITE_BUFFER_HPP
