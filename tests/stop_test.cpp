// SPDX-License-Identifier: Apache-2.0
//
// Stop tokens: every blocking call takes one.

#include <atomic>
#include <latch>
#include <memory>
#include <optional>
#include <semaphore>
#include <stdexcept>

#include "support.hpp"

TEST_CASE("stop: the cancellation is emitted on the worker") {
  const RuntimeBridge bridge;
  const auto worker = worker_of(bridge);
  std::thread::id emitted_on;
  const auto initiate = [&](auto handler) {
    auto slot = asio::get_associated_cancellation_slot(handler);
    slot.assign([&, h = std::make_shared<decltype(handler)>(std::move(handler))](asio::cancellation_type) {
      emitted_on = std::this_thread::get_id();
      asio::post(std::move(*h));
    });
  };
  auto task = bridge.submit([&]() -> awaitable<int> {
    co_await asio::this_coro::throw_if_cancelled(false);
    co_await asio::async_initiate<decltype(use_awaitable), void()>(initiate, use_awaitable);
    co_return 1;
  });
  await_calls(bridge, 1);
  task.request_stop();
  CHECK(task.join() == 1);
  CHECK(emitted_on == worker);
}

TEST_CASE("stop: a task that ends before its cancellation arrives") {
  const RuntimeBridge bridge;
  std::latch started(1);
  std::binary_semaphore may_end(0);
  auto task = bridge.submit([&] {
    started.count_down();
    may_end.acquire();
  });
  started.wait();
  task.request_stop();
  task.detach();
  task = {};  // now only the cancellation refers to the call
  may_end.release();
  CHECK(bridge.block_on([] {}));
}

// Asio reuses the memory of a completed task for the next one.
TEST_CASE("stop: one that arrives after its task ended does not reach the next task") {
  const RuntimeBridge bridge;
  JoinHandle<void> first, next;
  unwrap(bridge.block_on([&] {
    first = bridge.submit([] { return asio::post(use_awaitable); });
    asio::post(bridge.get_executor(), [&] {  // runs while the first waits for its post
      next = bridge.submit(park());
      first.request_stop();
    });
  }));
  CHECK(first.join());
  unwrap(bridge.block_on([] {}));  // queued behind the stop
  CHECK_FALSE(next.done());
}

#ifdef HAS_STOP_TOKEN

TEST_CASE("stop: the task is cancelled and waited for, and its exception is the cause") {
  RuntimeBridge bridge;
  stop_source source;
  Result<void> result;
  jthread caller([&] { result = bridge.block_on(park(), source.get_token()); });
  await_calls(bridge, 1);
  source.request_stop();
  caller.join();
  REQUIRE_FALSE(result.has_value());
  CHECK(result.error() == BridgeError::Cancelled);
  CHECK(code_of<AsioError>(result.error().cause()) == asio::error::operation_aborted);
  CHECK(bridge.in_flight() == 0);
}

TEST_CASE("stop: one that was requested before the call does not start the task") {
  RuntimeBridge bridge;
  stop_source source;
  source.request_stop();
  bool ran = false;
  const auto task = [&ran] { ran = true; };
  for (const auto& result :
       {bridge.block_on(task, source.get_token()), bridge.block_on_for(task, 1h, source.get_token()),
        bridge.block_on_until(task, std::chrono::system_clock::now() + 1h, source.get_token())}) {
    REQUIRE_FALSE(result.has_value());
    CHECK(result.error() == BridgeError::Cancelled);
    CHECK_FALSE(result.error().cause());
  }
  CHECK_FALSE(ran);
}

TEST_CASE("stop: may be requested by the task itself") {
  RuntimeBridge bridge;
  stop_source source;
  const auto task = [&]() -> awaitable<int> {
    source.request_stop();
    co_await park();
    co_return 1;
  };
  CHECK(outcome(bridge.block_on(task, source.get_token())) == BridgeError::Cancelled);

  stop_source other;
  CHECK(bridge.block_on([&] { return other.request_stop(); }, other.get_token()) == true);
}

TEST_CASE("stop: does not affect a task that has its value, or other calls") {
  RuntimeBridge bridge;
  stop_source source;
  Outcome neighbour;
  std::atomic<bool> may_end{false};
  jthread other([&] { neighbour = outcome(bridge.block_on(run_until(may_end), stop_source().get_token())); });
  await_calls(bridge, 1);
  const auto value = [&]() -> awaitable<int> {
    source.request_stop();
    co_return 4;
  };
  CHECK(bridge.block_on(value, source.get_token()) == 4);
  may_end = true;
  other.join();
  CHECK(neighbour == succeeded);
}

TEST_CASE("stop: cancels a nested operation that accepts total cancellation") {
  RuntimeBridge bridge;
  stop_source source;
  const auto task = [&]() -> awaitable<void> {
    co_await asio::this_coro::reset_cancellation_state(asio::enable_total_cancellation());
    co_await park();
  };
  Outcome result;
  jthread caller([&] { result = outcome(bridge.block_on(task, source.get_token())); });
  await_calls(bridge, 1);
  source.request_stop();
  caller.join();
  CHECK(result == BridgeError::Cancelled);
}

// Race: the stop is requested while the call is refused, and must not be sent to the worker.
TEST_CASE("stop: races with a refusal", "[race]") {
  const RuntimeBridge bridge;
  auto parked = bridge.submit(park());
  await_calls(bridge, 1);
  const jthread drain([&] { bridge.shutdown(runtime_bridge::Shutdown::drain); });
  await_closed(bridge);
  std::optional<stop_source> source(std::in_place);
  std::atomic<int> asked_for{0}, at{0};
  constexpr int rounds = 2'000;
  const jthread stopper([&] {
    for (int round = 1; round <= rounds; ++round) {
      await_state([&] { return at >= round; });
      source->request_stop();
      asked_for = round;
    }
  });
  int wrong = 0;
  for (int round = 1; round <= rounds; ++round) {
    source.emplace();
    at = round;
    const Outcome result = outcome(bridge.block_on([] {}, source->get_token()));
    if (result != worker_dead && result != cancelled_unrun) ++wrong;
    await_state([&] { return asked_for == round; });
  }
  CHECK(wrong == 0);
  parked.request_stop();
}

TEST_CASE("stop: touches nothing of the call after the call returned") {
  RuntimeBridge bridge;
  stop_source source;
  for (int i = 0; i < 100; ++i) CHECK(bridge.block_on(hops(1), source.get_token()) == 1);
  source.request_stop();
  CHECK(bridge.block_on(hops(1)) == 1);
}

// Race, for ASan and TSan: another thread requests a stop while the call is admitted, runs and completes. The task
// borrows the caller's stack, so a late cancellation would touch it after the call.
TEST_CASE("stop: races with admission and completion", "[race]") {
  RuntimeBridge bridge;
  stop_source source;
  std::binary_semaphore go(0), went(0);
  std::atomic<bool> done{false};
  jthread stopper([&] {
    for (int round = 0;; ++round) {
      go.acquire();
      if (done) return;
      for (int spin = 0; spin < round % 64 * 16; ++spin) std::atomic_signal_fence(std::memory_order_seq_cst);
      source.request_stop();
      went.release();
    }
  });
  int values = 0;
  int stops = 0;
  int round = 0;
  for (; round < 5'000 || values == 0 || stops == 0; ++round) {
    source = stop_source();
    int local = 0;
    const auto task = [&]() -> awaitable<int> {
      for (int hop = 0; hop < round % 64; ++hop) co_await asio::post(use_awaitable);
      co_return ++local;
    };
    const auto token = source.get_token();
    go.release();
    const auto result = bridge.block_on(task, token);
    went.acquire();
    if (result.has_value()) {
      ++values;
    } else if (result.error() == BridgeError::Cancelled) {
      ++stops;
    }
  }
  done = true;
  go.release();
  CHECK(values + stops == round);
  CHECK(bridge.in_flight() == 0);
}

// Race: a stop, a deadline and the end of the context reach the same call.
TEST_CASE("stop: races with a deadline and context().stop()", "[race]") {
  for (int round = 0; round < 300; ++round) {
    RuntimeBridge bridge;
    stop_source source;
    std::latch go(3);
    Outcome result;
    {
      jthread caller([&] {
        go.arrive_and_wait();
        result = outcome(bridge.block_on_for(park(), 50us, source.get_token()));
      });
      jthread stopper([&] {
        go.arrive_and_wait();
        source.request_stop();
      });
      go.arrive_and_wait();
      bridge.get_executor().context().stop();
    }
    REQUIRE(result.error);
    REQUIRE(bridge.in_flight() == 0);
  }
}

#endif  // HAS_STOP_TOKEN
