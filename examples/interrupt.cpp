// SPDX-License-Identifier: Apache-2.0
//
// Ctrl-C while a call waits. A signal handler may do almost nothing, and the worker blocks all signals. So the handler
// sets a flag, and the thread that waits for the call asks for it with `poll_every`.

#include <runtime_bridge.hpp>
#include <runtime_bridge/hosted.hpp>

#include <array>
#include <asio/any_io_executor.hpp>
#include <asio/awaitable.hpp>
#include <asio/buffer.hpp>
#include <asio/io_context.hpp>
#include <asio/ip/address_v4.hpp>
#include <asio/ip/tcp.hpp>
#include <asio/use_awaitable.hpp>
#include <chrono>
#include <csignal>
#include <cstddef>
#include <exception>
#include <iostream>
#include <string>
#include <string_view>

namespace {

using asio::ip::tcp;
using runtime_bridge::BridgeError;

/// Asks a server, and returns the first bytes of its answer.
asio::awaitable<std::string> ask(tcp::socket& socket, tcp::endpoint server) {
  co_await socket.async_connect(server, asio::use_awaitable);
  std::array<char, 512> bytes{};
  const std::size_t size = co_await socket.async_read_some(asio::buffer(bytes), asio::use_awaitable);
  co_return std::string(bytes.data(), size);
}

volatile std::sig_atomic_t interrupted = 0;
extern "C" void note_interrupt(int) { interrupted = 1; }

runtime_bridge::Result<std::string> ask_until_interrupted(const runtime_bridge::Hosted<tcp::socket>& socket,
                                                          const tcp::endpoint& server) {
  using std::chrono::milliseconds;
  return socket.call([&](tcp::socket& s) { return ask(s, server); },
                     runtime_bridge::poll_every(milliseconds(50), [] { return interrupted != 0; }));
}

int run() {
  struct sigaction action {};
  action.sa_handler = note_interrupt;
  sigaction(SIGINT, &action, nullptr);

  // A server that takes connections and never answers.
  asio::io_context context;
  const tcp::acceptor silent(context, tcp::endpoint(asio::ip::address_v4::loopback(), 0));

  const runtime_bridge::RuntimeBridge bridge;
  const runtime_bridge::Hosted<tcp::socket> socket(bridge);
  std::cout << "waiting for an answer that does not come; press Ctrl-C" << std::endl;
  const auto answer = ask_until_interrupted(socket, silent.local_endpoint());
  if (!answer && answer.error() == BridgeError::Cancelled) {
    std::cout << "interrupted: " << answer.error().message() << '\n';
    return 128 + SIGINT;  // as shells report it
  }
  std::cout << runtime_bridge::unwrap(answer) << '\n';
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  try {
    if (argc > 1) {
      const bool help = std::string_view(argv[1]) == "--help";
      if (!help) std::cerr << "interrupt: unknown option " << argv[1] << '\n';
      (help ? std::cout : std::cerr) << "usage: interrupt\nWaits until you press Ctrl-C.\n";
      return help ? 0 : 2;
    }
    return run();
  } catch (const std::exception& e) {
    std::cerr << "interrupt: " << e.what() << '\n';
    return 1;
  }
}
