// SPDX-License-Identifier: Apache-2.0
//
// The smallest program: the first one of the README.

#include <runtime_bridge.hpp>

#include <iostream>

asio::awaitable<std::string> hello() { co_return "hello from a coroutine"; }

int main() {
  runtime_bridge::RuntimeBridge bridge;  // owns a thread that runs an asio::io_context
  std::cout << unwrap(bridge.block_on(hello())) << '\n';
}
