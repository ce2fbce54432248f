// SPDX-License-Identifier: Apache-2.0
//
// A module that uses bridges of other modules and lends its own: see modules_test.cpp. It is compiled several times;
// MODULE is the prefix of its functions.

#include <chrono>
#include <memory>

#include "asio.hpp"

#define JOINED(a, b) a##_##b
#define NAMED(module, name) JOINED(module, name)
#define EXPORTED(name) extern "C" [[gnu::visibility("default")]] int NAMED(MODULE, name)

using runtime_bridge::Result;
using runtime_bridge::RuntimeBridge;

namespace {

int value_or_kind(const Result<int>& result) { return result ? *result : -static_cast<int>(result.error().kind()); }

// Not a lambda: g++ 12 emits a lambda in an extern "C" function twice.
asio::awaitable<int> take_a_moment() {
  asio::steady_timer timer(co_await asio::this_coro::executor, std::chrono::milliseconds(1));
  co_await timer.async_wait(asio::use_awaitable);
  co_return 6;
}

asio::awaitable<int> park() {
  asio::steady_timer timer(co_await asio::this_coro::executor, std::chrono::hours(24));
  co_await timer.async_wait(asio::use_awaitable);
  co_return 0;
}

asio::awaitable<int> awaits_a_child() {
  co_return co_await asio::co_spawn(co_await asio::this_coro::executor, park(), asio::use_awaitable);
}

std::unique_ptr<RuntimeBridge> own;

}  // namespace

// They return a value, or the negative kind of an error.

EXPORTED(call)(const RuntimeBridge* bridge) {
  return value_or_kind(bridge->block_on([] { return 5; }));
}
EXPORTED(run)(const RuntimeBridge* bridge) { return value_or_kind(bridge->block_on(take_a_moment)); }
EXPORTED(join)(const RuntimeBridge* bridge) { return value_or_kind(bridge->submit(take_a_moment).join()); }
EXPORTED(wait)(const RuntimeBridge* bridge) {
  return value_or_kind(bridge->block_on_for(awaits_a_child, std::chrono::milliseconds(20)));
}
EXPORTED(park)(const RuntimeBridge* bridge) { return value_or_kind(bridge->block_on(awaits_a_child)); }
EXPORTED(shut)(const RuntimeBridge* bridge) { return bridge->shutdown(runtime_bridge::Shutdown::drain) ? 1 : 0; }

/// Calls one bridge from a task of the other.
EXPORTED(call_through)(const RuntimeBridge* first, const RuntimeBridge* second) {
  return value_or_kind(first->block_on([&] { return value_or_kind(second->block_on([] { return 5; })); }));
}

EXPORTED(make)(const RuntimeBridge** bridge) {
  own = std::make_unique<RuntimeBridge>();
  *bridge = own.get();
  return 0;
}
EXPORTED(destroy)() {
  own.reset();
  return 0;
}
EXPORTED(destroy_other)(RuntimeBridge* bridge) {
  delete bridge;
  return 0;
}
