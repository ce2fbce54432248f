// SPDX-License-Identifier: Apache-2.0
//
// share, and the bridge of the whole process.

#include <array>
#include <latch>
#include <memory>
#include <optional>
#include <utility>

#include "support.hpp"

using runtime_bridge::Shutdown;

namespace {

/// Its destructor runs at the end of the process, and uses the bridge.
struct AtExit {
  ~AtExit() {
    if (!armed) return;
    if (RuntimeBridge::shared().block_on([] { return 1; }) != 1) std::abort();
    RuntimeBridge::shared().shutdown(Shutdown::drain);  // valgrind would see its thread
  }
  bool armed = false;
} at_exit;

}  // namespace

// First, so that no other test has made it.
TEST_CASE("shared: made once, with the first call, by whichever thread comes first") {
  std::array<RuntimeBridge*, 8> seen{};
  std::latch go(8);
  {
    std::array<jthread, 8> threads;
    for (std::size_t i = 0; i < threads.size(); ++i) {
      threads.at(i) = jthread([&, i] {
        go.arrive_and_wait();
        seen.at(i) = &RuntimeBridge::shared();
      });
    }
  }
  for (const RuntimeBridge* bridge : seen) CHECK(bridge == &RuntimeBridge::shared());
  const auto is_shared = [](const ThreadStatus& thread) { return thread.name == "shared-bridge"; };
  CHECK(count_threads(is_shared) == 0);
  CHECK(RuntimeBridge::shared().block_on([] { return 1; }) == 1);
  CHECK(count_threads(is_shared) == 1);
  at_exit.armed = true;
}

#ifndef SANITIZED  // ThreadSanitizer ends a forked child that starts a thread
TEST_CASE("shared: a new one in a forked child", "[child]") {
  RuntimeBridge& parents = RuntimeBridge::shared();
  CHECK(parents.block_on([] { return 1; }) == 1);
  CHECK(in_child_process([&] {
          RuntimeBridge& own = RuntimeBridge::shared();
          if (&own == &parents) return 1;
          if (&own != &RuntimeBridge::shared()) return 2;
          if (own.block_on([] { return 2; }) != 2) return 3;
          return outcome(parents.block_on([] { return 2; })) == worker_dead ? 0 : 4;
        }) == 0);
  CHECK(&parents == &RuntimeBridge::shared());
  CHECK(parents.block_on([] { return 3; }) == 3);
}
#endif

TEST_CASE("share: the same worker, which it does not stop") {
  const RuntimeBridge bridge;
  {
    const RuntimeBridge other = bridge.share();
    CHECK(worker_of(other) == worker_of(bridge));
    CHECK(other.get_executor() == bridge.get_executor());
  }
  CHECK(bridge.block_on([] { return 1; }) == 1);
}

TEST_CASE("share: after the original has gone, calls are refused and the executor remains") {
  std::optional<RuntimeBridge> bridge(std::in_place);
  const RuntimeBridge other = bridge->share();
  const RuntimeBridge third = other.share();
  std::optional<asio::steady_timer> timer(std::in_place, bridge->get_executor(), 24h);
  bridge.reset();
  CHECK(outcome(other.block_on([] {})) == worker_dead);
  CHECK(outcome(third.block_on([] {})) == worker_dead);
  CHECK(other.shutdown(Shutdown::drain));
  CHECK(other.in_flight() == 0);
  timer.reset();
}

TEST_CASE("share: it may be moved and assigned, and shuts down the worker if that is asked for") {
  RuntimeBridge bridge;
  RuntimeBridge other;
  const auto first_worker = worker_of(bridge);
  RuntimeBridge shared = bridge.share();
  shared = other.share();
  CHECK(worker_of(shared) == worker_of(other));
  CHECK(worker_of(bridge) == first_worker);
  shared = std::move(other);  // owns the worker now
  CHECK(shared.block_on([] { return 1; }) == 1);
  RuntimeBridge moved = bridge.share();
  const RuntimeBridge again = std::move(moved);
  CHECK(outcome(moved.share().block_on([] {})) == worker_dead);  // NOLINT(bugprone-use-after-move)
  CHECK(again.shutdown(Shutdown::drain));
  CHECK(outcome(bridge.block_on([] {})) == worker_dead);
}

TEST_CASE("share: a stop of the original ends the calls of all") {
  std::optional<RuntimeBridge> bridge(std::in_place);
  const RuntimeBridge other = bridge->share();
  auto handle = other.submit(park());
  await_calls(*bridge, 1);
  bridge.reset();
  CHECK(outcome(handle.join()) == response_lost);
}

TEST_CASE("share: in a forked child", "[child]") {
  const RuntimeBridge bridge;
  auto other = std::make_unique<RuntimeBridge>(bridge.share());
  CHECK(in_child_process([&] {
          if (outcome(other->block_on([] {})) != worker_dead) return 1;
          other.reset();
          return 0;
        }) == 0);
  CHECK(other->block_on([] { return 1; }) == 1);
}
