// SPDX-License-Identifier: Apache-2.0
//
// For streambuf.hpp: how a stream calls the function that reads or writes.

#ifndef RUNTIME_BRIDGE_DETAIL_STREAM_CALL_HPP
#define RUNTIME_BRIDGE_DETAIL_STREAM_CALL_HPP

#include "../../runtime_bridge.hpp"

#ifdef RUNTIME_BRIDGE_USE_BOOST_ASIO
#include <boost/asio/buffer.hpp>
#include <boost/asio/error.hpp>
#else
#include <asio/buffer.hpp>
#include <asio/error.hpp>
#endif

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

}  // namespace stream_detail

}  // namespace RUNTIME_BRIDGE_FLAVOUR
}  // namespace v0_2
}  // namespace runtime_bridge

#endif  // RUNTIME_BRIDGE_DETAIL_STREAM_CALL_HPP
