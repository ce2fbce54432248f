// SPDX-License-Identifier: Apache-2.0
//
// The eight tests of the Rust crate that this library follows.

#include <atomic>
#include <barrier>
#include <stdexcept>

#include "support.hpp"

namespace {

awaitable<int> add(int a, int b) { co_return a + b; }

awaitable<void> count_up(std::atomic<int>& counter) {
  ++counter;
  co_return;
}

awaitable<void> spawn_eight(std::atomic<int>& counter) {
  const auto executor = co_await asio::this_coro::executor;
  int ended = 0;
  for (int i = 0; i < 8; ++i) {
    auto inner = count_up(counter);
    asio::co_spawn(executor, std::move(inner), [&ended](std::exception_ptr) { ++ended; });
  }
  while (ended < 8) co_await asio::post(use_awaitable);
}

}  // namespace

TEST_CASE("seed: a value from a plain thread") {
  RuntimeBridge bridge;
  int value = 0;
  std::thread([&] { value = *bridge.block_on(add(1, 2)); }).join();
  CHECK(value == 3);
}

TEST_CASE("seed: a value from a thread that drives another single-threaded runtime") {
  RuntimeBridge bridge;
  asio::io_context other;
  std::string value;
  asio::post(other, [&] {
    auto task = []() -> awaitable<std::string> { co_return "ok"; };
    value = *bridge.block_on(task);
  });
  other.run();
  CHECK(value == "ok");
}

TEST_CASE("seed: a value from a thread of a multi-threaded runtime") {
  RuntimeBridge bridge;
  asio::thread_pool pool(2);
  std::atomic<int> sum{0};
  for (int i = 0; i < 4; ++i) asio::post(pool, [&] { sum += *bridge.block_on(add(40, 2)); });
  pool.join();
  CHECK(sum == 4 * 42);
}

TEST_CASE("seed: five calls in a row on one bridge") {
  RuntimeBridge bridge;
  for (int i = 0; i < 5; ++i) CHECK(bridge.block_on(add(i, i)) == i * 2);
}

TEST_CASE("seed: dropping the bridge ends the worker") {
  {
    RuntimeBridge bridge;
    await_workers(1);
    CHECK(bridge.block_on(add(0, 1)) == 1);
  }
  await_workers(0);
}

TEST_CASE("seed: four callers that each wait 250 ms end in under half of the serial time", "[timing]") {
  constexpr int callers = 4;
  RuntimeBridge bridge;
  std::barrier all(callers);
  const auto start = std::chrono::steady_clock::now();
  {
    std::vector<jthread> threads;
    for (int i = 0; i < callers; ++i) {
      threads.emplace_back([&] {
        all.arrive_and_wait();
        unwrap(bridge.block_on(sleep_for(250ms)));
      });
    }
  }
  CHECK(std::chrono::steady_clock::now() - start < callers * 250ms / 2);
}

TEST_CASE("seed: a task that throws gives ResponseLost and the next call works") {
  RuntimeBridge bridge;
  const auto result = bridge.block_on([]() -> awaitable<void> {
    throw std::runtime_error("simulated failure");
    co_return;
  });
  REQUIRE_FALSE(result.has_value());
  CHECK(result.error() == BridgeError::ResponseLost);
  CHECK(bridge.block_on(add(3, 4)) == 7);
}

TEST_CASE("seed: a task that spawns eight inner tasks and awaits them all") {
  RuntimeBridge bridge;
  std::atomic<int> counter{0};
  unwrap(bridge.block_on(spawn_eight(counter)));
  CHECK(counter == 8);
}
