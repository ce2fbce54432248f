// SPDX-License-Identifier: Apache-2.0
//
// The program of every consumer.

#ifdef RUNTIME_BRIDGE_USE_BOOST_ASIO
#include <boost/asio/steady_timer.hpp>
namespace asio = boost::asio;
#else
#include <asio/steady_timer.hpp>
#endif

#include <chrono>
#include <cstddef>
#include <cstdio>
#include <iostream>
#include <optional>
#include <runtime_bridge.hpp>
#include <runtime_bridge/hosted.hpp>
#include <runtime_bridge/range.hpp>
#include <runtime_bridge/streambuf.hpp>

asio::awaitable<int> answer() {
  asio::steady_timer timer(co_await asio::this_coro::executor, std::chrono::milliseconds(1));
  co_await timer.async_wait(asio::use_awaitable);
  co_return 42;
}

int main() {
  const runtime_bridge::RuntimeBridge bridge;
  const auto result = bridge.block_on(answer());
  if (!result) {
    std::cerr << result.error().message() << '\n';
    return 1;
  }
  // The optional headers are there, too.
  const runtime_bridge::Hosted<asio::steady_timer> timer(bridge);
  int left = 3;
  const auto next = [&left]() -> asio::awaitable<std::optional<int>> {
    co_return left == 0 ? std::nullopt : std::optional(left--);
  };
  int sum = 0;
  for (const int item : runtime_bridge::range(bridge, next)) sum += item;
  runtime_bridge::istream input(bridge, [](auto) { return std::size_t{0}; });
  if (!timer.call([](asio::steady_timer& t) { return t.cancel(); }) || sum != 6 || input.get() != EOF) return 1;
  std::cout << *result << '\n';
  return *result == 42 ? 0 : 1;
}
