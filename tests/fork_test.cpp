// SPDX-License-Identifier: Apache-2.0
//
// A forked child has the bridge's memory but not its worker: no call hangs there, no destructor joins a thread that is
// not there.

#include <atomic>
#include <memory>

#include "support.hpp"

TEST_CASE("fork: every call in the child is WorkerDead, and destroying the bridge does nothing") {
  auto bridge = std::make_unique<RuntimeBridge>();
  CHECK(bridge->block_on([] { return 1; }) == 1);
  CHECK(in_child_process([&] {
          const auto result = bridge->block_on([] { return 2; });
          if (result.has_value() || result.error() != BridgeError::WorkerDead) return 1;
          if (result.error().message() != "runtime_bridge: the worker lives in the parent process") return 2;
          if (bridge->in_flight() != 0) return 3;
          bridge.reset();
          return 0;
        }) == 0);
  CHECK(bridge->block_on([] { return 3; }) == 3);
}

TEST_CASE("fork: a lazy bridge that was not started belongs to its maker too") {
  RuntimeBridge bridge(lazy());
  CHECK(in_child_process([&] {
          const auto result = bridge.block_on([] { return 2; });
          return !result.has_value() && result.error() == BridgeError::WorkerDead ? 0 : 1;
        }) == 0);
  CHECK(bridge.block_on([] { return 3; }) == 3);
}

TEST_CASE("fork: of a task on the worker") {
  auto bridge = std::make_unique<RuntimeBridge>();
  const auto code = bridge->block_on([&] {
    return in_child_process([&] {
      if (bridge->block_on([] {}).error() != BridgeError::WorkerDead) return 1;
      bridge.reset();
      return 0;
    });
  });
  CHECK(code == 0);
  CHECK(bridge->block_on([] { return 3; }) == 3);
}

TEST_CASE("fork: a handle in the child waits for nothing") {
  RuntimeBridge bridge;
  auto parked = bridge.submit(park());
  await_calls(bridge, 1);
  CHECK(in_child_process([&] {
          if (!parked.done() || !parked.wait_for(1h)) return 1;
          parked.request_stop();
          return parked.join().error() == BridgeError::WorkerDead ? 0 : 2;
        }) == 0);
  CHECK_FALSE(parked.done());
}

TEST_CASE("fork: the child of a child") {
  RuntimeBridge bridge;
  CHECK(in_child_process([&] {
          return in_child_process([&] { return bridge.block_on([] {}).error() == BridgeError::WorkerDead ? 0 : 1; });
        }) == 0);
}

#ifndef SANITIZED  // whose runtimes do not survive a fork of a busy process
TEST_CASE("fork: the child may make bridges of its own") {
  RuntimeBridge bridge;
  CHECK(in_child_process([&] {
          RuntimeBridge a, b;
          bridge = RuntimeBridge();
          return a.block_on([&] { return *b.block_on([&] { return *bridge.block_on([] { return 0; }); }); }).value();
        }) == 0);
}

// The forks hit the parent's threads inside calls, posts and ring checks, with whatever locks they hold.
TEST_CASE("fork: again and again under load") {
  RuntimeBridge bridge, other;
  std::atomic<bool> stop{false};
  std::atomic<int> wrong{0};
  std::vector<std::jthread> callers;
  for (int i = 0; i < 4; ++i) {
    callers.emplace_back([&] {
      while (!stop) {
        if (bridge.block_on([&] { return *other.block_on([] { return 1; }); }) != 1) ++wrong;
      }
    });
  }
  for (int i = 0; i < 100; ++i) {
    REQUIRE(in_child_process([&] {
              if (bridge.block_on([] {}).error() != BridgeError::WorkerDead) return 1;
              RuntimeBridge own, second;
              if (own.block_on([&] { return *second.block_on([] { return 7; }); }) != 7) return 2;
              bridge = std::move(own);
              return bridge.block_on([] { return 0; }).value();
            }) == 0);
  }
  stop = true;
  callers.clear();
  CHECK(wrong == 0);
}
#endif
