// SPDX-License-Identifier: Apache-2.0
//
// An HTTP/1.1 server in this process, on a real socket, that misbehaves on request.

#ifndef RUNTIME_BRIDGE_TESTS_HTTP_SERVER_HPP
#define RUNTIME_BRIDGE_TESTS_HTTP_SERVER_HPP

#include <algorithm>
#include <asio/buffer.hpp>
#include <asio/co_spawn.hpp>
#include <asio/detached.hpp>
#include <asio/io_context.hpp>
#include <asio/ip/tcp.hpp>
#include <asio/read.hpp>
#include <asio/read_until.hpp>
#include <asio/write.hpp>
#include <atomic>
#include <cctype>
#include <functional>
#include <map>
#include <sstream>
#include <string>
#include <string_view>
#include <thread>
#include <utility>

#include "support.hpp"

/// A request and its connection.
class Exchange {
 public:
  explicit Exchange(asio::ip::tcp::socket peer) : socket(std::move(peer)) {}

  asio::ip::tcp::socket socket;
  std::string method, target;
  std::map<std::string, std::string> headers;  // by name in lower case

  std::size_t length() { return headers.contains("content-length") ? std::stoul(headers["content-length"]) : 0; }

  /// Tells the client to send the body, if it waits for that.
  awaitable<void> invite() {
    if (headers.contains("expect")) co_await write("HTTP/1.1 100 Continue\r\n\r\n");
  }

  /// The whole body.
  awaitable<std::string> body() {
    co_await invite();
    if (buffer_.size() < length()) {
      const std::size_t missing = length() - buffer_.size();
      co_await asio::async_read(socket, asio::dynamic_buffer(buffer_), asio::transfer_exactly(missing), use_awaitable);
    }
    std::string whole = buffer_.substr(0, length());
    buffer_.erase(0, length());
    co_return whole;
  }

  /// The next piece of the body.
  awaitable<std::string> some() {
    std::string piece = std::exchange(buffer_, {});
    if (!piece.empty()) co_return piece;
    piece.resize(65536);
    piece.resize(co_await socket.async_read_some(asio::buffer(piece), use_awaitable));
    co_return piece;
  }

  awaitable<void> write(std::string text) { co_await asio::async_write(socket, asio::buffer(text), use_awaitable); }

  awaitable<void> answer(int status, std::string content = {}, std::string further_headers = {}) {
    // Not within the co_await: g++ 12 destroys some temporaries of its operand twice.
    std::string text = "HTTP/1.1 " + std::to_string(status) + " Word\r\nContent-Length: ";
    text += std::to_string(content.size()) + "\r\n" + further_headers + "\r\n";
    if (method != "HEAD") text += content;
    co_await write(std::move(text));
  }

  /// Waits until the client hangs up.
  awaitable<void> silence() {
    char ignored = 0;
    for (;;) co_await socket.async_read_some(asio::buffer(&ignored, 1), use_awaitable);
  }

  /// Reads the next request's head.
  awaitable<void> next() {
    const std::size_t size =
        co_await asio::async_read_until(socket, asio::dynamic_buffer(buffer_), "\r\n\r\n", use_awaitable);
    std::istringstream head(buffer_.substr(0, size));
    buffer_.erase(0, size);
    headers.clear();
    std::string line;
    head >> method >> target;
    std::getline(head, line);
    while (std::getline(head, line) && line != "\r") {
      const std::size_t colon = line.find(':');
      std::string name = line.substr(0, colon);
      std::transform(name.begin(), name.end(), name.begin(), [](unsigned char c) { return std::tolower(c); });
      const std::size_t begin = line.find_first_not_of(' ', colon + 1);
      headers[name] = line.substr(begin, line.find_last_not_of("\r ") + 1 - begin);
    }
  }

 private:
  std::string buffer_;
};

class HttpServer {
 public:
  /// Answers one request. The server hangs up if it returns false or throws.
  using Handler = std::function<awaitable<bool>(Exchange&)>;

  explicit HttpServer(Handler handler) : handler_(std::move(handler)) {
    asio::ip::tcp::acceptor acceptor(context_, {asio::ip::address_v4::loopback(), 0});
    port_ = acceptor.local_endpoint().port();
    asio::co_spawn(context_, accept(std::move(acceptor)), asio::detached);
    thread_ = std::thread([this] { context_.run(); });
  }
  HttpServer(const HttpServer&) = delete;
  HttpServer& operator=(const HttpServer&) = delete;
  ~HttpServer() {
    context_.stop();
    thread_.join();
  }

  [[nodiscard]] std::string host() const { return "127.0.0.1:" + std::to_string(port_); }
  [[nodiscard]] std::string url(const std::string& target = "/") const { return "http://" + host() + target; }

  std::atomic<int> connections{0}, open{0}, most_open{0}, requests{0};

 private:
  awaitable<void> accept(asio::ip::tcp::acceptor acceptor) {
    for (;;) {
      asio::ip::tcp::socket peer = co_await acceptor.async_accept(use_awaitable);
      ++connections;
      most_open = std::max<int>(most_open, ++open);
      asio::co_spawn(context_, serve(std::move(peer)), asio::detached);
    }
  }

  awaitable<void> serve(asio::ip::tcp::socket peer) {
    {
      Exchange exchange(std::move(peer));
      try {
        do {
          co_await exchange.next();
          ++requests;
        } while (co_await handler_(exchange));
      } catch (const std::exception&) {
        // the client has hung up
      }
    }
    --open;
  }

  Handler handler_;
  asio::io_context context_{1};
  unsigned short port_ = 0;
  std::thread thread_;
};

#endif  // RUNTIME_BRIDGE_TESTS_HTTP_SERVER_HPP
