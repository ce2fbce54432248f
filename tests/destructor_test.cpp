// SPDX-License-Identifier: Apache-2.0
//
// A bridge ends by its destructor, on or off its worker, or because its context is stopped.

#include <atomic>
#include <functional>
#include <latch>
#include <memory>
#include <optional>
#include <semaphore>

#include "support.hpp"

TEST_CASE("destructor: suspended tasks are cancelled and end on the worker, and their callers get ResponseLost") {
  std::optional<RuntimeBridge> bridge(std::in_place);
  const auto worker = worker_of(*bridge);
  std::thread::id ended;
  ErrorCode told;
  const auto task = [&]() -> awaitable<void> {
    const NotesItsEnd local(ended);
    try {
      co_await park();
    } catch (const AsioError& e) {
      told = e.code();
      throw;
    }
  };
  Outcome result;
  jthread caller([&, call = &*bridge] { result = outcome(call->block_on(task)); });
  await_calls(*bridge, 1);
  bridge.reset();
  caller.join();
  CHECK(result == response_lost);
  CHECK(ended == worker);
  CHECK(told == asio::error::operation_aborted);
}

TEST_CASE("destructor: tasks that ignore cancellation are destroyed on the worker, without an exception") {
  std::optional<RuntimeBridge> bridge(std::in_place);
  const auto worker = worker_of(*bridge);
  std::thread::id ended;
  bool resumed = false;
  auto task = bridge->submit([&]() -> awaitable<void> {
    const NotesItsEnd local(ended);
    co_await asio::this_coro::reset_cancellation_state(asio::disable_cancellation());
    try {
      co_await park();
    } catch (...) {
      resumed = true;
    }
    resumed = true;
  });
  await_calls(*bridge, 1);
  bridge.reset();
  CHECK(outcome(task.join()) == response_lost);
  CHECK(ended == worker);
  CHECK_FALSE(resumed);
}

TEST_CASE("destructor: a task that never waits is cancelled too") {
  std::optional<RuntimeBridge> bridge(std::in_place);
  Outcome result;
  jthread caller([&, call = &*bridge] { result = outcome(call->block_on(run_in_circles())); });
  await_calls(*bridge, 1);
  bridge.reset();
  caller.join();
  CHECK(result == response_lost);
}

TEST_CASE("destructor: a task that never waits and ignores cancellation is waited for, and others are destroyed") {
  std::optional<RuntimeBridge> bridge(std::in_place);
  std::atomic<bool> may_end{false};
  auto task = bridge->submit([&]() -> awaitable<void> {
    co_await asio::this_coro::reset_cancellation_state(asio::disable_cancellation());
    co_await run_until(may_end);
  });
  auto parked = bridge->submit(park_stubbornly());
  await_calls(*bridge, 2);
  jthread destroyer([&] { bridge.reset(); });
  CHECK(outcome(parked.join()) == response_lost);
  CHECK_FALSE(task.done());
  may_end = true;
  CHECK(outcome(task.join()) == response_lost);
}

TEST_CASE("destructor: calls that were admitted and not started are answered, and their tasks do not run") {
  constexpr int calls = 32;
  std::optional<RuntimeBridge> bridge(std::in_place);
  std::binary_semaphore release(0);
  asio::post(bridge->get_executor(), [&] { release.acquire(); });
  std::atomic<int> ran{0};
  std::vector<Outcome> results(calls);
  std::vector<jthread> callers;
  for (auto& result : results) {
    callers.emplace_back([&, call = &*bridge] { result = outcome(call->block_on([&] { ++ran; })); });
  }
  await_state([&] { return bridge->in_flight() == calls; });
  bridge->get_executor().context().stop();
  release.release();
  bridge.reset();
  callers.clear();
  CHECK(results == std::vector<Outcome>(calls, response_lost));
  CHECK(ran == 0);
}

TEST_CASE("destructor: coroutines spawned on the executor are destroyed on the worker") {
  std::thread::id parked_ended, queued_ended;
  std::thread::id worker;
  {
    RuntimeBridge bridge;
    worker = worker_of(bridge);
    const auto raw = [](std::thread::id& where) -> awaitable<void> {
      const NotesItsEnd local(where);
      co_await park();
    };
    const auto circles = [](std::thread::id& where) -> awaitable<void> {
      const NotesItsEnd local(where);
      co_await run_in_circles();
    };
    asio::co_spawn(bridge.get_executor(), raw(parked_ended), asio::detached);
    asio::co_spawn(bridge.get_executor(), circles(queued_ended), asio::detached);
    CHECK(bridge.block_on([] { return 1; }) == 1);
  }
  CHECK(parked_ended == worker);
  CHECK(queued_ended != std::thread::id());
}

TEST_CASE("destructor: may run on the worker, in a task") {
  for (int round = 0; round < 50; ++round) {
    auto bridge = std::make_shared<RuntimeBridge>();
    Outcome result;
    jthread caller([&result, owner = std::move(bridge)]() mutable {
      RuntimeBridge& same = *owner;
      // The task drops the last reference and goes on.
      const auto task = [&owner]() -> awaitable<int> {
        co_await asio::post(use_awaitable);
        owner.reset();
        co_return 5;
      };
      result = outcome(same.block_on(task));
    });
    caller.join();
    REQUIRE(result == succeeded);
  }
  await_workers(0);
}

TEST_CASE("destructor: may run on the worker, in a task that waits afterwards") {
  auto owner = std::make_unique<RuntimeBridge>();
  const auto task = [&owner]() -> awaitable<int> {
    owner.reset();
    co_await park();
    co_return 5;
  };
  CHECK(outcome(owner->block_on(task)) == response_lost);
}

TEST_CASE("destructor: may run on the worker, in a raw handler") {
  auto owner = std::make_unique<RuntimeBridge>();
  std::latch done(1);
  // The worker posts it, since another thread could still be in asio::post when the context is destroyed.
  unwrap(owner->block_on([&] {
    asio::post(owner->get_executor(), [&] {
      owner.reset();
      done.count_down();
    });
  }));
  done.wait();
  await_workers(0);
}

TEST_CASE("destructor: waits for a task that waits on another executor") {
  std::optional<RuntimeBridge> bridge(std::in_place);
  Foreign foreign;
  Outcome result;
  jthread caller([&, call = &*bridge] { result = outcome(call->block_on(foreign.visit(3))); });
  auto parked = bridge->submit(park_stubbornly());
  await_calls(*bridge, 2);
  std::atomic<bool> gone{false};
  jthread destroyer([&] {
    bridge.reset();
    gone = true;
  });
  CHECK(outcome(parked.join()) == response_lost);  // it was destroyed
  std::this_thread::sleep_for(250ms);              // longer than a stop waits for an unknown thread
  CHECK_FALSE(gone);
  foreign.go_on();
  destroyer.join();
  caller.join();
  CHECK(result == response_lost);  // its I/O might have been cut off
}

TEST_CASE("destructor: a task that comes back from another executor and runs on is destroyed") {
  std::optional<RuntimeBridge> bridge(std::in_place);
  Foreign foreign;
  std::thread::id ended;
  const auto worker = worker_of(*bridge);
  const auto task = [&]() -> awaitable<int> {
    const NotesItsEnd local(ended);
    auto visit = foreign.visit(1);
    const int value = co_await std::move(visit);
    co_await run_in_circles();
    co_return value;
  };
  Outcome result;
  jthread caller([&, call = &*bridge] { result = outcome(call->block_on(task)); });
  await_calls(*bridge, 1);
  jthread destroyer([&] { bridge.reset(); });
  foreign.go_on();
  destroyer.join();
  caller.join();
  CHECK(result == response_lost);
  CHECK(ended == worker);
}

TEST_CASE("destructor: a task that survived a stop request and ends because the worker stops is ResponseLost") {
  std::optional<RuntimeBridge> bridge(std::in_place);
  Foreign foreign;
  std::atomic<bool> cancelled{false};
  auto task = bridge->submit([&]() -> awaitable<void> {
    try {
      co_await park();
    } catch (const AsioError&) {
    }
    co_await asio::this_coro::reset_cancellation_state(asio::enable_total_cancellation());
    cancelled = true;
    auto visit = foreign.visit(1);
    (void)co_await std::move(visit);
    co_await park();
  });
  await_calls(*bridge, 1);
  task.request_stop();
  await_state([&] { return cancelled.load(); });
  auto parked = bridge->submit(park_stubbornly());
  await_calls(*bridge, 2);
  jthread destroyer([&] { bridge.reset(); });
  CHECK(outcome(parked.join()) == response_lost);  // it was destroyed
  foreign.go_on();
  CHECK(outcome(task.join()) == response_lost);
}

TEST_CASE("destructor: a task that is ready to run does not see a destroyed timer as expired") {
  std::optional<RuntimeBridge> bridge(std::in_place);
  bool expired = false;
  std::binary_semaphore busy(0), go_on(0);
  auto task = bridge->submit([&]() -> awaitable<void> {
    co_await asio::post(use_awaitable);  // queued behind the handler below
    asio::steady_timer timer(co_await asio::this_coro::executor, 1h);
    co_await timer.async_wait(use_awaitable);
    expired = true;
  });
  asio::post(bridge->get_executor(), [&] {
    busy.release();
    go_on.acquire();
  });
  busy.acquire();
  bridge->get_executor().context().stop();
  go_on.release();
  bridge.reset();
  CHECK(outcome(task.join()) == response_lost);
  CHECK_FALSE(expired);
}

TEST_CASE("destructor: a task that alternates between the worker and a pool ends") {
  asio::thread_pool pool(1);
  std::optional<RuntimeBridge> bridge(std::in_place);
  std::latch under_way(1);
  auto task = bridge->submit([&]() -> awaitable<void> {
    co_await asio::post(pool, use_awaitable);
    under_way.count_down();
    for (;;) co_await asio::post(pool, use_awaitable);
  });
  under_way.wait();
  bridge.reset();
  CHECK(outcome(task.join()) == response_lost);
  pool.join();
}

TEST_CASE("destructor: waits for a thread that is delayed while it posts a task back") {
  // In the second round something else is left on the context, which Asio cannot tell from that thread.
  for (const bool leftover : {false, true}) {
    std::thread foreign;
    std::latch answered(1);
    std::atomic<bool> let_go{false};
    const auto from_elsewhere = [&](auto handler) {
      foreign = std::thread([&, h = std::move(handler)]() mutable {
        const auto work = asio::prefer(asio::get_associated_executor(h), asio::execution::outstanding_work.tracked);
        asio::post(work, std::move(h));
        answered.wait();
        std::this_thread::sleep_for(20ms);  // longer than it takes to end a worker
        let_go = true;
      });
    };
    std::optional<RuntimeBridge> bridge(std::in_place);
    if (leftover) asio::co_spawn(bridge->get_executor(), park(), asio::detached);
    const Result<void> result = bridge->block_on([&]() -> awaitable<void> {
      co_await asio::async_initiate<decltype(use_awaitable), void()>(from_elsewhere, use_awaitable);
    });
    answered.count_down();
    bridge.reset();
    CHECK(let_go);
    CHECK(result.has_value());
    foreign.join();
  }
}

// Race: another thread destroys what a coroutine waits for. Asio then posts the coroutine back to be destroyed here,
// while the worker runs others or is being stopped.
TEST_CASE("destructor: a coroutine that another thread destroys") {
  for (int round = 0; round < 100; ++round) {
    std::optional<RuntimeBridge> bridge(std::in_place);
    std::optional<asio::io_context> elsewhere(std::in_place);
    auto handle = bridge->submit([&]() -> awaitable<void> { co_await asio::post(*elsewhere, use_awaitable); });
    await_calls(*bridge, 1);
    std::latch ready(1);
    {
      const jthread other([&](const stop_token& stop) {
        ready.count_down();
        if (round % 2) return bridge.reset();
        while (!stop.stop_requested()) (void)bridge->block_on([] { return asio::post(use_awaitable); });
      });
      ready.wait();
      elsewhere.reset();
      REQUIRE(outcome(handle.join()) == response_lost);
    }
    if (bridge) REQUIRE(bridge->in_flight() == 0);
  }
}

TEST_CASE("destructor: a task with a stop request that another thread destroys is ResponseLost") {
  const RuntimeBridge bridge;
  std::optional<asio::io_context> elsewhere(std::in_place);
  auto task = bridge.submit([&]() -> awaitable<void> {
    co_await asio::this_coro::reset_cancellation_state(asio::disable_cancellation());
    co_await asio::post(*elsewhere, use_awaitable);
  });
  await_calls(bridge, 1);
  task.request_stop();
  unwrap(bridge.block_on([] {}));  // queued behind the stop request
  elsewhere.reset();
  CHECK(outcome(task.join()) == response_lost);
}

// Race: pool threads post tasks back to the context while the worker destroys what waits on it.
TEST_CASE("destructor: races with completions on other threads", "[race]") {
  asio::thread_pool pool(2);
  for (int round = 0; round < 300; ++round) {
    constexpr int calls = 4;
    std::optional<RuntimeBridge> bridge(std::in_place);
    std::latch started(calls);
    std::vector<Outcome> results(calls);
    std::vector<jthread> callers;
    for (auto& result : results) {
      callers.emplace_back([&, call = &*bridge] {
        const auto task = [&]() -> awaitable<void> {
          started.count_down();
          for (int hop = 0; hop < 100; ++hop) co_await asio::post(pool, use_awaitable);
        };
        result = outcome(call->block_on(task));
      });
    }
    started.wait();
    bridge.reset();
    callers.clear();
    for (const auto& result : results) REQUIRE((result == succeeded || result == response_lost));
  }
  pool.join();
}

// Race: tasks complete while the bridge is destroyed.
TEST_CASE("destructor: races with completion", "[race]") {
  for (int round = 0; round < 500; ++round) {
    constexpr int calls = 3;
    std::optional<RuntimeBridge> bridge(std::in_place);
    std::latch started(calls);
    std::vector<Outcome> results(calls);
    std::vector<jthread> callers;
    for (int i = 0; i < calls; ++i) {
      callers.emplace_back([&, i, call = &*bridge] {
        const auto task = [&, i]() -> awaitable<void> {
          started.count_down();
          for (int hop = 0; hop < i * 3; ++hop) co_await asio::post(use_awaitable);
        };
        results[static_cast<std::size_t>(i)] = outcome(call->block_on(task));
      });
    }
    started.wait();
    bridge.reset();
    callers.clear();
    for (const auto& result : results) REQUIRE((result == succeeded || result == response_lost));
  }
}

// Race: admission, stray exceptions and context().stop(). Every caller gets an answer.
TEST_CASE("context().stop(): races with admission and stray exceptions", "[race]") {
  for (int round = 0; round < 500; ++round) {
    RuntimeBridge bridge;
    std::atomic<int> unexpected{0};
    std::atomic<int> calls{0};
    {
      std::vector<jthread> callers;
      for (int i = 0; i < 3; ++i) {
        callers.emplace_back([&, i] {
          for (;;) {
            const Outcome result = i ? outcome(bridge.block_on([] { return asio::post(use_awaitable); }))
                                     : outcome(bridge.block_on([] { return 1; }));
            ++calls;
            if (result == worker_dead) return;
            if (result != succeeded && result != response_lost) ++unexpected;
          }
        });
      }
      await_state([&] { return calls >= round % 20; });
      asio::post(bridge.get_executor(), [] { throw 1; });
      bridge.get_executor().context().stop();
    }
    REQUIRE(unexpected == 0);
    REQUIRE(bridge.in_flight() == 0);
  }
}

TEST_CASE("context().stop(): repeated, with stray exceptions, while the worker waits for a task") {
  const RuntimeBridge bridge;
  Foreign foreign;
  auto task = bridge.submit(foreign.visit(1));
  await_calls(bridge, 1);
  int times = 0;
  const std::function<void()> again = [&] {
    if (++times == 10) {
      foreign.go_on();
    } else {
      asio::post(bridge.get_executor(), again);
    }
    bridge.get_executor().context().stop();
    throw 1;
  };
  asio::post(bridge.get_executor(), again);
  const Outcome result = outcome(task.join());
  CHECK((result == succeeded || result == response_lost));  // it may have come back in time
  CHECK(times == 10);
}

TEST_CASE("context().stop(): I/O objects may be destroyed afterwards") {
  RuntimeBridge bridge;
  asio::steady_timer timer(bridge.get_executor(), 24h);
  Outcome result;
  jthread caller([&] { result = outcome(bridge.block_on(timer.async_wait(asio::deferred))); });
  await_calls(bridge, 1);
  bridge.get_executor().context().stop();
  caller.join();
  CHECK(result == response_lost);
}

TEST_CASE("destructor: gives back all threads and descriptors") {
  const auto descriptors = descriptors_of_this_process();
  for (int i = 0; i < 20; ++i) {
    RuntimeBridge bridge;
    unwrap(bridge.block_on([]() -> awaitable<void> { co_await asio::post(use_awaitable); }));
  }
  await_workers(0);
  CHECK(descriptors_of_this_process() == descriptors);
}

namespace {

awaitable<void> wait_until_and_on(std::chrono::steady_clock::time_point first) {
  asio::steady_timer timer(co_await asio::this_coro::executor, first);
  co_await timer.async_wait(asio::use_awaitable);
  timer.expires_after(std::chrono::hours(1));
  co_await timer.async_wait(asio::use_awaitable);
}

}  // namespace

// Found by the model in tests/model: the task became ready after the loop had run all ready tasks. It went on after the
// services were shut down, where an hour's wait ended at once.
TEST_CASE("destructor: a timer that expires while the worker stops does not resume its task") {
  std::optional<RuntimeBridge> bridge(std::in_place);
  const auto due = std::chrono::steady_clock::now() + std::chrono::milliseconds(20);
  auto waiting = bridge->submit(wait_until_and_on(due));
  await_calls(*bridge, 1);
  // The reactor does not see the timer before the context has been stopped.
  auto& context = bridge->get_executor().context();
  std::binary_semaphore started(0);
  auto busy = bridge->submit([&] {
    started.release();
    await_state([&] { return context.stopped() && std::chrono::steady_clock::now() > due; });
  });
  started.acquire();
  bridge.reset();
  CHECK(busy.join());
  CHECK(outcome(waiting.join()) == response_lost);
}
