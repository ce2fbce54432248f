// SPDX-License-Identifier: Apache-2.0

#define RUNTIME_BRIDGE_USE_BOOST_ASIO
#include <boost/asio/awaitable.hpp>
#include <runtime_bridge.hpp>
#include <runtime_bridge/hosted.hpp>

namespace {

boost::asio::awaitable<int> incremented(int number) { co_return number + 1; }

}  // namespace

runtime_bridge::Result<int> on_boost(int number) {
  const runtime_bridge::RuntimeBridge bridge;
  const runtime_bridge::Hosted<int> hosted(bridge, number);
  return hosted.call([](int n) { return incremented(n); });
}
