// SPDX-License-Identifier: Apache-2.0
//
// One file of the program uses standalone Asio, another one Boost.Asio.

#include <asio/awaitable.hpp>
#include <iostream>
#include <runtime_bridge.hpp>

runtime_bridge::Result<int> on_boost(int number);

namespace {

asio::awaitable<int> doubled(int number) { co_return 2 * number; }

}  // namespace

int main() {
  const runtime_bridge::RuntimeBridge bridge;
  const auto result =
      bridge.block_on([] { return on_boost(unwrap(runtime_bridge::RuntimeBridge().block_on(doubled(4)))); });
  std::cout << result.value().value() << '\n';
  return *result == 9 ? 0 : 1;
}
