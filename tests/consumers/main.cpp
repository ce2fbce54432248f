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
#include <iostream>
#include <runtime_bridge.hpp>

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
  std::cout << *result << '\n';
  return *result == 42 ? 0 : 1;
}
