// SPDX-License-Identifier: Apache-2.0
//
// One file of the program uses standalone Asio, another one Boost.Asio.

#include <asio/awaitable.hpp>
#include <iostream>
#include <runtime_bridge.hpp>
#include <runtime_bridge/hosted.hpp>

runtime_bridge::Result<int> on_boost(int number);

namespace {

asio::awaitable<int> doubled(int number) { co_return 2 * number; }

}  // namespace

int main() {
  const runtime_bridge::RuntimeBridge bridge;
  const runtime_bridge::Hosted<int> hosted(bridge, 4);  // of another type than the other file's Hosted<int>
  const int eight = unwrap(hosted.call([](int n) { return doubled(n); }));
  const auto result = bridge.block_on([&] { return on_boost(eight); });
  std::cout << result.value().value() << '\n';
  return *result == 9 ? 0 : 1;
}
