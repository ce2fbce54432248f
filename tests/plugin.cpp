// SPDX-License-Identifier: Apache-2.0
//
// A library with bridges that a program loads and closes while it runs.

#include <chrono>

#include "asio.hpp"

#define EXPORTED extern "C" [[gnu::visibility("default")]]

using runtime_bridge::RuntimeBridge;

namespace {

RuntimeBridge& lasting_bridge() {
  static RuntimeBridge bridge;
  return bridge;
}

asio::awaitable<void> park() {
  asio::steady_timer timer(co_await asio::this_coro::executor, std::chrono::hours(24));
  co_await timer.async_wait(asio::use_awaitable);
}

}  // namespace

/// Runs on a bridge of its own.
EXPORTED int increment(int value) {
  return runtime_bridge::unwrap(RuntimeBridge().block_on([&] { return value + 1; }));
}

/// Runs on the static bridge. Returns how often it was called since the library was loaded, or -1 without a worker.
EXPORTED int count() {
  static int calls = 0;
  return lasting_bridge().block_on([] { return ++calls; }).value_or(-1);
}

/// Leaves a call in flight on the static bridge.
EXPORTED void leave_a_call() { lasting_bridge().submit(park()).detach(); }
