// SPDX-License-Identifier: Apache-2.0
//
// Calls that would wait for themselves are refused. No others are.

#include <atomic>
#include <barrier>
#include <memory>
#include <semaphore>

#include "support.hpp"

TEST_CASE("deadlock: a call on the bridge's own worker") {
  RuntimeBridge bridge;
  Outcome from_plain, from_coroutine;
  bool ran = false;
  unwrap(bridge.block_on([&] { from_plain = outcome(bridge.block_on([&] { ran = true; })); }));
  const auto coroutine = [&]() -> awaitable<void> {
    co_await asio::post(use_awaitable);
    from_coroutine = outcome(bridge.block_on(park()));
  };
  unwrap(bridge.block_on(coroutine));
  CHECK_FALSE(ran);
  CHECK(from_plain == would_deadlock);
  CHECK(from_coroutine == would_deadlock);
  CHECK(bridge.in_flight() == 0);
}

TEST_CASE("deadlock: the hook for stray exceptions runs on the worker too") {
  std::unique_ptr<RuntimeBridge> bridge;
  Outcome inner;
  std::atomic<bool> called{false};
  Options options;
  options.on_stray_exception = [&](std::exception_ptr) {
    inner = outcome(bridge->block_on([] {}));
    called = true;
  };
  bridge = std::make_unique<RuntimeBridge>(options);
  asio::post(bridge->get_executor(), [] { throw 1; });
  await_state([&] { return called.load(); });
  CHECK(inner == would_deadlock);
}

TEST_CASE("deadlock: a ring of two and a ring of three") {
  const RuntimeBridge a, b, c;
  Outcome two, three;
  unwrap(a.block_on([&] {
    unwrap(b.block_on([&] {
      two = outcome(a.block_on([] {}));
      unwrap(c.block_on([&] { three = outcome(a.block_on([] {})); }));
    }));
  }));
  CHECK(two == would_deadlock);
  CHECK(three == would_deadlock);
  CHECK(a.block_on([] { return 1; }) == 1);
}

TEST_CASE("deadlock: a ring through a task that is suspended") {
  // A waits for a suspended task of B. Meanwhile another task of B calls A.
  RuntimeBridge a, b;
  bool may_end = false;
  jthread caller([&] { unwrap(a.block_on([&] { unwrap(b.block_on(run_until(may_end))); })); });
  await_state([&] { return b.in_flight() == 1; });
  Outcome ring;
  unwrap(b.block_on([&] {
    ring = outcome(a.block_on([] {}));
    may_end = true;
  }));
  CHECK(ring == would_deadlock);
}

TEST_CASE("deadlock: chains that share a bridge are not a ring") {
  RuntimeBridge a, b, c, d;
  constexpr int rounds = 500;
  std::barrier both(2);
  std::atomic<int> values{0};
  const auto chain = [&](RuntimeBridge& first) {
    for (int i = 0; i < rounds; ++i) {
      both.arrive_and_wait();
      const auto through = first.block_on([&] { return *c.block_on([&] { return *d.block_on([] { return 1; }); }); });
      if (through.has_value()) values += *through;
    }
  };
  {
    jthread one([&] { chain(a); });
    jthread two([&] { chain(b); });
  }
  CHECK(values == 2 * rounds);
}

// Race: B has answered A's worker, which has not woken yet. If the wait record were still there, a call from B to A
// would be a false alarm.
TEST_CASE("deadlock: a wait that has just ended causes no false alarm") {
  RuntimeBridge a, b;
  for (int round = 0; round < 2'000; ++round) {
    std::atomic<bool> done{false};
    Outcome from_b;
    unwrap(a.block_on([&] {
      unwrap(b.block_on([&] {
        asio::post(b.get_executor(), [&] {
          from_b = outcome(a.block_on([] {}));
          done = true;
        });
      }));
    }));
    await_state([&] { return done.load(); });
    REQUIRE(from_b == succeeded);
  }
}

TEST_CASE("deadlock: a refused call leaves no wait record") {
  RuntimeBridge a, dead;
  dead.get_executor().context().stop();
  await_state([&] { return !dead.block_on([] {}).has_value(); });
  Outcome on_dead, on_own;
  unwrap(a.block_on([&] {
    on_dead = outcome(dead.block_on([] {}));
    on_own = outcome(a.block_on([] {}));
  }));
  CHECK(on_dead == worker_dead);
  CHECK(on_own == would_deadlock);
  RuntimeBridge b;
  CHECK(b.block_on([&] { return *a.block_on([] { return 2; }); }) == 2);
}

TEST_CASE("deadlock: a bridge may be destroyed while its worker waits for the destroying one") {
  auto a = std::make_unique<RuntimeBridge>();
  RuntimeBridge b;
  Outcome inner, outer;
  jthread caller([&, bridge = a.get()] {
    outer = outcome(bridge->block_on([&] {
      inner = outcome(b.block_on([&] { a.reset(); }));
      return 1;
    }));
  });
  caller.join();
  CHECK(inner == succeeded);
  CHECK(outer == succeeded);
  CHECK(b.block_on([] { return 3; }) == 3);
}

// If A's wait record pointed to the destroyed bridge, the next call on A would follow it.
TEST_CASE("deadlock: a bridge that a task shut down and destroyed leaves no wait record") {
  RuntimeBridge a, c;
  unwrap(a.block_on([] {
    const auto gone = std::make_unique<RuntimeBridge>();
    (void)gone->shutdown(runtime_bridge::Shutdown::drain);
  }));
  std::binary_semaphore go_on(0);
  auto busy = a.submit([&] { go_on.acquire(); });
  Outcome through;
  jthread caller([&] { through = outcome(c.block_on([&] { return *a.block_on([] { return 5; }); })); });
  await_state([&] { return a.in_flight() == 2; });
  go_on.release();
  caller.join();
  CHECK(through == succeeded);
}

TEST_CASE("deadlock: rings are looked up while the waits change", "[race]") {
  const RuntimeBridge a;
  const RuntimeBridge b;
  const RuntimeBridge c;
  const RuntimeBridge d;
  auto calls = a.submit([&] {
    for (int i = 0; i < 1000; ++i) unwrap(b.block_on([] {}));
  });
  const auto look_at = [](JoinHandle<void>& task) {
    return [&task] {
      while (!task.wait_for(0s)) continue;
    };
  };
  auto looks = c.submit(look_at(calls));
  CHECK(d.block_on(look_at(looks)).has_value());
  CHECK(calls.join().has_value());
}
