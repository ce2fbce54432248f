// SPDX-License-Identifier: Apache-2.0
//
// shutdown(drain | cancel, limit).

#include <atomic>
#include <functional>
#include <latch>
#include <semaphore>

#include "shapes.hpp"
#include "support.hpp"

using runtime_bridge::Shutdown;

TEST_CASE("shutdown: drain waits for the calls in flight and admits no more") {
  RuntimeBridge bridge;
  std::atomic<bool> may_end{false};
  Outcome in_flight, late;
  jthread caller([&] { in_flight = outcome(bridge.block_on(run_until(may_end))); });
  await_calls(bridge, 1);
  std::atomic<bool> ended{false};
  bool complete = false;
  jthread shutter([&] {
    complete = bridge.shutdown(Shutdown::drain);
    ended = true;
  });
  await_state([&] { return (late = outcome(bridge.block_on([] {}))) == worker_dead; });
  CHECK_FALSE(ended);
  may_end = true;
  shutter.join();
  caller.join();
  CHECK(complete);
  CHECK(in_flight == succeeded);
  CHECK(bridge.in_flight() == 0);
  await_workers(0);
  CHECK(bridge.shutdown(Shutdown::drain));
  CHECK(bridge.shutdown(Shutdown::cancel, 0s));
}

#ifdef HAS_STOP_TOKEN
TEST_CASE("shutdown: deadlines and stops work while it drains") {
  RuntimeBridge bridge;
  stop_source source;
  Outcome timed, stopped;
  jthread first([&] { timed = outcome(bridge.block_on_for(park(), 30ms)); });
  jthread second([&] { stopped = outcome(bridge.block_on(park(), source.get_token())); });
  await_state([&] { return bridge.in_flight() == 2; });
  jthread stopper([&] {
    await_state([&] { return !bridge.block_on([] {}).has_value(); });
    source.request_stop();
  });
  CHECK(bridge.shutdown(Shutdown::drain));
  first.join();
  second.join();
  CHECK(timed == BridgeError::TimedOut);
  CHECK(stopped == BridgeError::Cancelled);
}
#endif

TEST_CASE("shutdown: cancel cancels running and queued calls, and waits") {
  RuntimeBridge bridge;
  std::vector<Outcome> results(4);
  std::vector<jthread> callers;
  for (auto& result : results) callers.emplace_back([&] { result = outcome(bridge.block_on(park())); });
  await_calls(bridge, 4);
  std::binary_semaphore busy(0);
  asio::post(bridge.get_executor(), [&] { busy.acquire(); });
  bool ran = false;
  auto queued = bridge.submit([&ran] { ran = true; });
  jthread release([&] {
    await_closed(bridge);
    busy.release();
  });
  CHECK(bridge.shutdown(Shutdown::cancel));
  callers.clear();
  for (const auto& result : results) CHECK(result == BridgeError::Cancelled);
  // It was queued before the cancellation, so it may have run before it or not.
  CHECK(queued.join().has_value() == ran);
}

TEST_CASE("shutdown: one task's cancellation may end all others") {
  RuntimeBridge bridge;
  AllForOne operations;
  std::vector<JoinHandle<int>> tasks;
  for (int i = 0; i < 3; ++i) {
    tasks.push_back(bridge.submit([&]() -> awaitable<int> {
      co_await asio::this_coro::throw_if_cancelled(false);
      co_await operations.wait();
      co_return 1;
    }));
  }
  await_calls(bridge, 3);
  CHECK(bridge.shutdown(Shutdown::cancel));
  for (auto& task : tasks) CHECK(task.join() == 1);
}

TEST_CASE("shutdown: a task that is cancelled and returns a value keeps it") {
  RuntimeBridge bridge;
  auto handle = bridge.submit(park_and_return(8));
  await_calls(bridge, 1);
  CHECK(bridge.shutdown(Shutdown::cancel));
  CHECK(handle.join() == 8);
}

TEST_CASE("shutdown: cancel reaches all calls, even if a cancellation handler throws") {
  std::atomic<int> strays{0};
  Options options;
  options.on_stray_exception = [&](const std::exception_ptr&) { ++strays; };
  RuntimeBridge bridge(options);
  asio::steady_timer timer(bridge.get_executor(), 24h);
  auto throws = bridge.submit([&timer]() -> awaitable<void> {
    auto slot = (co_await asio::this_coro::cancellation_state).slot();
    slot.assign([](asio::cancellation_type) { throw 1; });
    // With another slot, so that the handler above stays in its own.
    co_await timer.async_wait(asio::bind_cancellation_slot(asio::cancellation_slot(), use_awaitable));
  });
  auto parked = bridge.submit([&timer]() -> awaitable<void> {
    try {
      co_await park();
    } catch (...) {
      timer.cancel();
      throw;
    }
  });
  await_calls(bridge, 2);
  CHECK(bridge.shutdown(Shutdown::cancel));
  CHECK(outcome(parked.join()) == BridgeError::Cancelled);
  CHECK(strays == 1);
  (void)throws.join();
}

TEST_CASE("shutdown: stops the worker at the limit and returns false") {
  for (const auto how : {Shutdown::drain, Shutdown::cancel}) {
    RuntimeBridge bridge;
    auto parked = bridge.submit(park_stubbornly());
    await_calls(bridge, 1);
    CHECK_FALSE(bridge.shutdown(how, 10ms));
    CHECK(parked.done());
    CHECK(bridge.in_flight() == 0);
    CHECK(outcome(parked.join()) == response_lost);
    CHECK_FALSE(bridge.shutdown(Shutdown::drain));  // this bridge was cut off once
  }
}

TEST_CASE("shutdown: past the limit it still waits for tasks on other executors") {
  RuntimeBridge bridge;
  Foreign foreign;
  auto visitor = bridge.submit(foreign.visit(6));
  auto parked = bridge.submit(park_stubbornly());
  await_calls(bridge, 2);
  std::atomic<bool> ended{false};
  bool complete = true;
  jthread shutter([&] {
    complete = bridge.shutdown(Shutdown::drain, 1ms);
    ended = true;
  });
  CHECK(parked.wait_for(1h));  // the hard stop has happened
  CHECK_FALSE(ended);
  foreign.go_on();
  shutter.join();
  CHECK_FALSE(complete);
  CHECK(outcome(visitor.join()) == response_lost);
}

TEST_CASE("shutdown: waits for tasks on other executors even if the worker destroys the bridge") {
  auto bridge = std::make_unique<RuntimeBridge>();
  Foreign foreign;
  auto visitor = bridge->submit(foreign.visit(6));
  await_calls(*bridge, 1);
  std::binary_semaphore may_destroy(0);
  auto destroyer = bridge->submit([&] {
    may_destroy.acquire();
    bridge.reset();
  });
  std::atomic<bool> ended{false};
  bool complete = true;
  jthread shutter([&, shut = bridge.get()] {
    complete = shut->shutdown(Shutdown::drain, 200ms);
    ended = true;
  });
  await_closed(*bridge);
  may_destroy.release();
  std::this_thread::sleep_for(300ms);
  CHECK_FALSE(ended);
  foreign.go_on();
  shutter.join();
  CHECK_FALSE(complete);
  CHECK(outcome(visitor.join()) == response_lost);
}

TEST_CASE("shutdown: returns after the worker's thread_locals have been destroyed") {
  enum class By { destructor, worker, one_thread, two_threads };
  for (const By by : {By::destructor, By::worker, By::one_thread, By::two_threads}) {
    static std::atomic<bool> gone;
    gone = false;
    struct Slow {
      ~Slow() {
        std::this_thread::sleep_for(20ms);
        gone = true;
      }
    };
    RuntimeBridge bridge;
    unwrap(bridge.block_on([&] {
      thread_local const Slow slow;
      if (by == By::worker) bridge.shutdown(Shutdown::drain);
    }));
    std::atomic<int> early{0};
    const auto shut_down = [&] {
      bridge.shutdown(Shutdown::drain);
      if (!gone) ++early;
    };
    if (by == By::two_threads) {
      const jthread other(shut_down);
      shut_down();
    } else if (by == By::one_thread) {
      shut_down();
    }
    bridge = RuntimeBridge();
    CHECK(gone);
    CHECK(early == 0);
  }
}

TEST_CASE("shutdown: I/O objects may be destroyed afterwards, and used without effect") {
  RuntimeBridge bridge;
  auto timer = std::make_unique<asio::steady_timer>(bridge.get_executor(), 24h);
  timer->async_wait([](const ErrorCode&) {});
  unwrap(bridge.block_on([] {}));
  CHECK(bridge.shutdown(Shutdown::drain));  // a raw wait is not a call, and is not waited for
  timer->cancel();
  asio::post(bridge.get_executor(), [] { std::terminate(); });
  timer.reset();
}

TEST_CASE("shutdown: a lazy bridge that was never called, and one that was moved from") {
  RuntimeBridge bridge(lazy());
  CHECK(bridge.shutdown(Shutdown::drain));
  CHECK(outcome(bridge.block_on([] {})) == worker_dead);
  RuntimeBridge moved;
  const RuntimeBridge heir = std::move(moved);
  CHECK(moved.shutdown(Shutdown::cancel));  // NOLINT(bugprone-use-after-move)
}

TEST_CASE("shutdown: on the worker it does not wait, and the worker ends after the last call") {
  for (const auto how : {Shutdown::drain, Shutdown::cancel}) {
    RuntimeBridge bridge;
    bool complete = true;
    bool between = false;
    Outcome nested;
    auto neighbour = bridge.submit(hops(20));
    const auto task = [&]() -> awaitable<int> {
      complete = bridge.shutdown(how);
      asio::post(bridge.get_executor(), [&] { between = true; });
      complete = bridge.shutdown(how) || complete;
      nested = outcome(bridge.submit([] {}).join());
      co_return 5;
    };
    CHECK(bridge.block_on(task) == 5);
    CHECK_FALSE(complete);
    CHECK(nested == worker_dead);
    const auto result = neighbour.join();
    if (how == Shutdown::drain) CHECK(result == 20);
    CHECK(bridge.shutdown(Shutdown::drain));
    CHECK(between);
  }
}

TEST_CASE("shutdown: on the worker, with a zero limit, and without calls") {
  RuntimeBridge bridge;
  auto parked = bridge.submit(park_stubbornly());
  await_calls(bridge, 1);
  asio::post(bridge.get_executor(), [&] { bridge.shutdown(Shutdown::drain, 0s); });
  CHECK(outcome(parked.join()) == response_lost);

  RuntimeBridge idle;
  std::atomic<int> complete{-1};
  asio::post(idle.get_executor(), [&] { complete = idle.shutdown(Shutdown::drain); });
  await_state([&] { return complete != -1; });
  CHECK(complete == 1);
  CHECK(idle.shutdown(Shutdown::drain));
}

TEST_CASE("shutdown: from the worker of a bridge that this one's worker waits for") {
  RuntimeBridge a = RuntimeBridge::with_thread_name("A"), b = RuntimeBridge::with_thread_name("B");
  bool complete = true;
  CHECK(a.block_on([&] { return *b.block_on([&] { return (complete = a.shutdown(Shutdown::drain)), 4; }); }) == 4);
  CHECK_FALSE(complete);
  CHECK(a.shutdown(Shutdown::drain));
  CHECK(b.block_on([&] { return b.in_flight(); }) == 1u);
}

TEST_CASE("shutdown: a task that shuts another bridge down waits for it") {
  RuntimeBridge a, b;
  CHECK(a.block_on([&] { return b.shutdown(Shutdown::drain); }) == true);
  CHECK(outcome(b.block_on([] {})) == worker_dead);
}

TEST_CASE("shutdown: in a forked child it does nothing", "[child]") {
  RuntimeBridge bridge;
  CHECK(in_child_process([&] { return bridge.shutdown(Shutdown::cancel) ? 0 : 1; }) == 0);
  CHECK(bridge.block_on([] { return 1; }) == 1);
}

TEST_CASE("shutdown: a second shutdown does not cut the end of the worker short") {
  const RuntimeBridge bridge;
  const auto foreign = asio::make_work_guard(bridge.get_executor());  // as if a thread were posting a task back
  int times = 0;
  const std::function<void()> shut_down = [&] {
    bridge.shutdown(Shutdown::drain);
    if (++times < 3) asio::post(bridge.get_executor(), shut_down);
  };
  const auto begin = std::chrono::steady_clock::now();
  asio::post(bridge.get_executor(), shut_down);
  CHECK(bridge.shutdown(Shutdown::drain));
  CHECK(times == 3);
  CHECK(std::chrono::steady_clock::now() - begin >= 200ms);
}

// Race: calls are admitted while two threads shut the bridge down in different ways.
TEST_CASE("shutdown: races with admission and with another shutdown", "[race]") {
  for (int round = 0; round < 1'000; ++round) {
    RuntimeBridge bridge;
    std::latch go(4);
    std::atomic<int> wrong{0};
    {
      std::vector<jthread> threads;
      for (int i = 0; i < 2; ++i) {
        threads.emplace_back([&] {
          go.arrive_and_wait();
          for (;;) {
            const Outcome result = outcome(bridge.block_on([] { return hops(2); }));
            if (result == worker_dead) return;
            if (result != succeeded && result != BridgeError::Cancelled && result != response_lost) ++wrong;
          }
        });
      }
      threads.emplace_back([&] {
        go.arrive_and_wait();
        if (!bridge.shutdown(Shutdown::drain) && round % 2) ++wrong;
      });
      go.arrive_and_wait();
      const bool complete = round % 2 ? bridge.shutdown(Shutdown::cancel) : bridge.shutdown(Shutdown::cancel, 0s);
      if (round % 2 && !complete) ++wrong;
    }
    REQUIRE(wrong == 0);
    REQUIRE(bridge.in_flight() == 0);
  }
}

// Race: an admitted call starts the worker first, so it may be sent after the cancellation.
TEST_CASE("shutdown: cancel races with the admission of the first call", "[race]") {
  for (int round = 0; round < 300; ++round) {
    RuntimeBridge bridge(lazy());
    Outcome first;
    jthread caller([&] { first = outcome(bridge.block_on(park())); });
    await_state([&] { return bridge.in_flight() == 1; });
    CHECK(bridge.shutdown(Shutdown::cancel));
    caller.join();
    REQUIRE((first == worker_dead || first == BridgeError::Cancelled));
  }
}

#ifdef HAS_STOP_TOKEN
// Race: shutdown(cancel) runs while tasks complete, are stopped and time out.
TEST_CASE("shutdown: cancel races with completion, stops and deadlines", "[race]") {
  for (int round = 0; round < 300; ++round) {
    RuntimeBridge bridge;
    stop_source source;
    std::latch go(4);
    std::vector<Outcome> results(3);
    {
      std::vector<jthread> threads;
      threads.emplace_back([&] {
        go.arrive_and_wait();
        results[0] = outcome(bridge.block_on([&] { return hops(round % 10); }));
      });
      threads.emplace_back([&] {
        go.arrive_and_wait();
        results[1] = outcome(bridge.block_on_for(park(), 30us));
      });
      threads.emplace_back([&] {
        go.arrive_and_wait();
        results[2] = outcome(bridge.block_on(park(), source.get_token()));
      });
      go.arrive_and_wait();
      source.request_stop();
      CHECK(bridge.shutdown(Shutdown::cancel));
    }
    REQUIRE(results[1].error);
    REQUIRE(results[2].error);
    REQUIRE(bridge.in_flight() == 0);
  }
}
#endif
