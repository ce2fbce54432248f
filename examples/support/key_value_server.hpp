// SPDX-License-Identifier: Apache-2.0
//
// A key-value server for quickstart, and its protocol. It stands for the service that you already have.

#ifndef RUNTIME_BRIDGE_EXAMPLES_KEY_VALUE_SERVER_HPP
#define RUNTIME_BRIDGE_EXAMPLES_KEY_VALUE_SERVER_HPP

#include <arpa/inet.h>

#include <array>
#include <asio/awaitable.hpp>
#include <asio/buffer.hpp>
#include <asio/co_spawn.hpp>
#include <asio/detached.hpp>
#include <asio/io_context.hpp>
#include <asio/ip/tcp.hpp>
#include <asio/read.hpp>
#include <asio/use_awaitable.hpp>
#include <asio/write.hpp>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <map>
#include <stdexcept>
#include <string>
#include <string_view>
#include <thread>
#include <utility>

namespace kv {

// The protocol. A message is three 32-bit numbers in network order (kind, length of the key, length of the value), then
// the key, then the value. Each request gets one message as its reply, on the same connection.

using asio::ip::tcp;

enum class Kind : std::uint32_t { put = 1, get, done, not_found, refused };

inline constexpr std::size_t max_key = 4096;
inline constexpr std::size_t max_value = std::size_t{64} * 1024 * 1024;

struct Message {
  Kind kind;
  std::string key, value;
};

struct ProtocolError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// Both sides call this before they send and when they receive: a length must fit into 32 bits, and a length that the
// peer merely claims must not make us allocate too much.
inline void check_lengths(std::size_t key, std::size_t value) {
  const auto check = [](const std::string& what, std::size_t length, std::size_t limit) {
    if (length <= limit) return;
    throw ProtocolError(what + " of " + std::to_string(length) + " bytes exceeds the limit of " +
                        std::to_string(limit));
  };
  check("a key", key, max_key);
  check("a value", value, max_value);
}

inline asio::awaitable<void> send(tcp::socket& socket, Kind kind, std::string_view key, std::string_view value) {
  check_lengths(key.size(), value.size());
  const std::array<std::uint32_t, 3> head{htonl(static_cast<std::uint32_t>(kind)),
                                          htonl(static_cast<std::uint32_t>(key.size())),
                                          htonl(static_cast<std::uint32_t>(value.size()))};
  const std::array<asio::const_buffer, 3> message{asio::buffer(head), asio::buffer(key), asio::buffer(value)};
  co_await asio::async_write(socket, message, asio::use_awaitable);
}

inline asio::awaitable<Message> receive(tcp::socket& socket) {
  std::array<std::uint32_t, 3> head{};
  co_await asio::async_read(socket, asio::buffer(head), asio::use_awaitable);
  check_lengths(ntohl(head[1]), ntohl(head[2]));
  Message message{Kind{ntohl(head[0])}, std::string(ntohl(head[1]), '\0'), std::string(ntohl(head[2]), '\0')};
  const std::array<asio::mutable_buffer, 2> body{asio::buffer(message.key), asio::buffer(message.value)};
  co_await asio::async_read(socket, body, asio::use_awaitable);
  co_return message;
}

/// Runs in this process, on its own thread and context, and is reached through a socket.
class Server {
 public:
  /// Like many servers, it closes a connection after some number of requests.
  explicit Server(int requests_per_connection = std::numeric_limits<int>::max())
      : requests_per_connection_(requests_per_connection) {
    tcp::acceptor acceptor(context_, {asio::ip::address_v4::loopback(), 0});
    endpoint_ = acceptor.local_endpoint();
    asio::co_spawn(context_, accept(std::move(acceptor)), asio::detached);
    thread_ = std::thread([this] { context_.run(); });
  }
  ~Server() {
    context_.stop();
    thread_.join();
  }

  [[nodiscard]] tcp::endpoint endpoint() const { return endpoint_; }

 private:
  // The coroutine owns the acceptor. If accepting fails, the acceptor closes, so clients get an error and do not wait.
  asio::awaitable<void> accept(tcp::acceptor acceptor) {
    for (;;) {
      tcp::socket peer = co_await acceptor.async_accept(asio::use_awaitable);
      asio::co_spawn(context_, serve(std::move(peer)), asio::detached);
    }
  }

  // Throws when the peer disconnects. Returns after a refusal, because the rest of the stream cannot be parsed.
  asio::awaitable<void> serve(tcp::socket peer) {
    peer.set_option(tcp::no_delay(true));
    Message reply{};
    for (int i = 0; i < requests_per_connection_ && reply.kind != Kind::refused; ++i) {
      try {
        Message request = co_await receive(peer);
        reply = answer(request);
      } catch (const ProtocolError& e) {
        reply = {Kind::refused, {}, e.what()};
      }
      co_await send(peer, reply.kind, reply.key, reply.value);
    }
  }

  // The reply needs a copy of the value: another connection may replace the stored one while the reply is sent.
  Message answer(Message& request) {
    if (request.kind == Kind::put) {
      values_[std::move(request.key)] = std::move(request.value);
      return {Kind::done, {}, {}};
    }
    if (request.kind != Kind::get) throw ProtocolError("an unknown kind of request");
    const auto found = values_.find(request.key);
    if (found == values_.end()) return {Kind::not_found, {}, {}};
    return {Kind::done, {}, found->second};
  }

  const int requests_per_connection_;
  std::map<std::string, std::string> values_;
  asio::io_context context_{1};
  tcp::endpoint endpoint_;
  std::thread thread_;
};

}  // namespace kv

#endif  // RUNTIME_BRIDGE_EXAMPLES_KEY_VALUE_SERVER_HPP
