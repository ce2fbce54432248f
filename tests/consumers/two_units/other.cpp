// SPDX-License-Identifier: Apache-2.0

#include "other.hpp"

#include <asio/awaitable.hpp>

namespace {

asio::awaitable<int> seven() { co_return 7; }

}  // namespace

namespace other {

const std::error_category& category() {
  return runtime_bridge::make_error_code(runtime_bridge::BridgeError::WorkerDead).category();
}

bool asio_aligns() { return ::asio_aligns; }

runtime_bridge::RuntimeBridge make_bridge() { return runtime_bridge::RuntimeBridge::with_thread_name("other"); }

runtime_bridge::Result<int> call(const runtime_bridge::RuntimeBridge& bridge) { return bridge.block_on(seven()); }

}  // namespace other
