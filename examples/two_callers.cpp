// SPDX-License-Identifier: Apache-2.0
//
// Two callers on one connection: how one of them comes to wait for ever, how a report tells, and the remedy.

#include <runtime_bridge.hpp>
#include <runtime_bridge/hosted.hpp>

#include <array>
#include <asio/any_io_executor.hpp>
#include <asio/awaitable.hpp>
#include <asio/buffer.hpp>
#include <asio/error_code.hpp>
#include <asio/io_context.hpp>
#include <asio/local/connect_pair.hpp>
#include <asio/local/stream_protocol.hpp>
#include <asio/read.hpp>
#include <asio/use_awaitable.hpp>
#include <asio/write.hpp>
#include <chrono>
#include <cstddef>
#include <exception>
#include <future>
#include <iostream>
#include <string>
#include <string_view>
#include <thread>
#include <utility>

#include "support/async_mutex.hpp"

namespace {

using runtime_bridge::CallInfo;
using runtime_bridge::Hosted;
using runtime_bridge::RuntimeBridge;
using runtime_bridge::SourceLocation;
using Socket = asio::local::stream_protocol::socket;

/// A question and its answer are a line each.
class Connection {
 public:
  explicit Connection(Socket& socket) : socket_(socket) {}

  asio::awaitable<std::string> ask(std::string question) {
    question += '\n';
    co_await asio::async_write(socket_, asio::buffer(question), asio::use_awaitable);
    while (input_.find('\n') == std::string::npos) {
      std::array<char, 512> bytes{};
      const std::size_t size = co_await socket_.async_read_some(asio::buffer(bytes), asio::use_awaitable);
      input_.append(bytes.data(), size);  // perhaps with the answer that another caller still waits for
    }
    std::string answer = input_.substr(0, input_.find('\n'));
    input_.erase(0, answer.size() + 1);
    co_return answer;
  }

 private:
  Socket& socket_;
  std::string input_;
};

// [remedy]
/// The same for any number of callers: from the question to the answer, the connection belongs to one of them.
class SharedConnection {
 public:
  explicit SharedConnection(Socket& socket) : connection_(socket), mutex_(socket.get_executor()) {}

  asio::awaitable<std::string> ask(std::string question) {
    const auto guard = co_await mutex_.lock();
    co_return co_await connection_.ask(std::move(question));
  }

 private:
  Connection connection_;
  AsyncMutex mutex_;
};
// [/remedy]

/// Answers each line with the same line, `together` of them at a time, like a server that is busy. Ends when the client
/// closes the connection.
class Server {
 public:
  explicit Server(int together) : together_(together) {}
  Server(const Server&) = delete;
  Server& operator=(const Server&) = delete;
  ~Server() {
    if (thread_.joinable()) thread_.join();
  }

  /// For one client.
  void accept(Socket& client) {
    asio::local::connect_pair(client, socket_);
    thread_ = std::thread([this] { run(); });
  }

  /// Waits until the first question has arrived.
  void await_question() { question_.get_future().get(); }

 private:
  void run() {
    std::string lines;
    int number = 0;
    std::array<char, 1> byte{};
    asio::error_code closed;
    while (asio::read(socket_, asio::buffer(byte), closed) == 1) {
      lines += byte[0];
      if (byte[0] != '\n') continue;
      if (++number == 1) question_.set_value();
      if (number % together_ != 0) continue;
      asio::write(socket_, asio::buffer(lines), closed);
      lines.clear();
    }
  }

  const int together_;
  asio::io_context context_;  // never run: this thread may block
  Socket socket_{context_};
  std::promise<void> question_;
  std::thread thread_;
};

/// A client and its socket.
template <class Client>
struct Connected {
  Connected(const asio::any_io_executor& executor, Server& server) : socket(executor), client(socket) {
    server.accept(socket);
  }

  Socket socket;
  Client client;
};

/// A wrapper passes on where it was called, so that reports name its caller's line instead of this one.
template <class Client>
std::string ask(const Hosted<Connected<Client>>& connected, const std::string& question,
                SourceLocation where = SourceLocation::current()) {
  const auto task = [&](Connected<Client>& c) { return c.client.ask(question); };
  const auto answer =
      connected.call_for(std::chrono::milliseconds(300), runtime_bridge::named("ask " + question, task), {}, where);
  return answer ? *answer : answer.error().message();
}

/// Two threads ask at the same time, the second one when the server has the question of the first.
template <class Client>
void ask_two(int together) {
  runtime_bridge::Options options;
  options.slow_after = std::chrono::milliseconds(200);
  options.on_slow_call = [](const CallInfo&) { RuntimeBridge::report(std::cout); };
  const RuntimeBridge bridge(options);
  Server server(together);
  // Its socket is closed on the worker, which may be using it. That also ends the server.
  const Hosted<Connected<Client>> connected(bridge, server);
  auto first = std::async(std::launch::async, [&] { return ask(connected, "one"); });
  server.await_question();
  const std::string second = ask(connected, "two");
  std::cout << "the answers: " << first.get() << "; " << second << '\n';
}

}  // namespace

int main(int argc, char** argv) {
  try {
    if (argc > 1) {
      const bool help = std::string_view(argv[1]) == "--help";
      if (!help) std::cerr << "two_callers: unknown option " << argv[1] << '\n';
      (help ? std::cout : std::cerr) << "usage: two_callers\nShows why callers of one connection need a lock.\n";
      return help ? 0 : 2;
    }
    std::cout << "without a lock:\n";
    ask_two<Connection>(2);
    std::cout << "with a lock:\n";
    ask_two<SharedConnection>(1);
    return 0;
  } catch (const std::exception& e) {
    std::cerr << "two_callers: " << e.what() << '\n';
    return 1;
  }
}
