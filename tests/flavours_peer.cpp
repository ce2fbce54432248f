// SPDX-License-Identifier: Apache-2.0
//
// Compiled once for each flavour. PEER is the prefix of its functions.

#include "asio.hpp"
#include "flavours.hpp"

#define JOINED(a, b) a##_##b
#define NAMED(peer, name) JOINED(peer, name)

using runtime_bridge::Result;
using runtime_bridge::RuntimeBridge;

namespace {

class Bridge final : public Peer {
 public:
  std::variant<int, runtime_bridge::BridgeError> call(const std::function<int()>& function) const override {
    const auto task = [&]() -> asio::awaitable<int> {
      co_await asio::post(asio::use_awaitable);
      co_return function();
    };
    const Result<int> result = bridge_.block_on(task);
    if (!result.has_value()) return result.error();
    return *result;
  }

 private:
  RuntimeBridge bridge_;
};

}  // namespace

std::unique_ptr<Peer> NAMED(PEER, peer)() { return std::make_unique<Bridge>(); }

/// Passes an error on.
Result<int> NAMED(PEER, increment)(const Result<int>& number) {
  if (!number.has_value()) return number;
  return RuntimeBridge().block_on([&] { return *number + 1; });
}
