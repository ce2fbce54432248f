// SPDX-License-Identifier: Apache-2.0
//
// The lock for coroutines of the examples (support/async_mutex.hpp).

#include "support/async_mutex.hpp"

#include <algorithm>
#include <array>
#include <future>
#include <vector>

#include "support.hpp"

using runtime_bridge::Shutdown;

namespace {

/// Counts the coroutines that are between `enter` and `leave`.
class Room {
 public:
  void enter() { most_ = std::max(most_, ++inside_); }
  void leave() { --inside_; }
  int most() const { return most_; }

 private:
  int inside_ = 0;
  int most_ = 0;
};

awaitable<void> take(AsyncMutex& mutex) { const auto guard = co_await mutex.lock(); }

/// Does not let go until it is cancelled, or destroyed if it is stubborn.
awaitable<void> hold(AsyncMutex& mutex, bool stubborn = false) {
  if (stubborn) co_await asio::this_coro::reset_cancellation_state(asio::disable_cancellation());
  const auto guard = co_await mutex.lock();
  asio::steady_timer timer(co_await asio::this_coro::executor, 24h);
  co_await timer.async_wait(use_awaitable);
}

/// Holds the lock until it is told to let go.
class Holder {
 public:
  Holder(const RuntimeBridge& bridge, AsyncMutex& mutex) : call_(bridge.submit([&] { return hold(mutex); })) {
    await_calls(bridge, 1);
  }

  void let_go() { call_ = {}; }

 private:
  JoinHandle<void> call_;
};

/// A task that waits for the lock, and gives its number once it has it.
auto waits(AsyncMutex& mutex, std::vector<int>& order, int number) {
  return [&mutex, &order, number]() -> awaitable<void> {
    const auto guard = co_await mutex.lock();
    order.push_back(number);
    co_await asio::post(use_awaitable);
  };
}

}  // namespace

TEST_CASE("async mutex: one caller at a time", "[race]") {
  RuntimeBridge bridge;
  AsyncMutex mutex(bridge.get_executor());
  constexpr int rounds = 200;
  Room room;
  int total = 0;
  const auto task = [&]() -> awaitable<void> {
    const auto guard = co_await mutex.lock();
    room.enter();
    const int before = total;
    co_await asio::post(use_awaitable);
    total = before + 1;
    room.leave();
  };
  std::array<std::future<bool>, 8> callers;
  for (auto& caller : callers) {
    caller = std::async(std::launch::async, [&] {
      bool all = true;
      for (int i = 0; i < rounds; ++i) all = bridge.block_on(task).has_value() && all;
      return all;
    });
  }
  for (auto& caller : callers) CHECK(caller.get());
  CHECK(room.most() == 1);
  CHECK(total == 8 * rounds);
}

TEST_CASE("async mutex: coroutines get it in the order of their arrival") {
  RuntimeBridge bridge;
  AsyncMutex mutex(bridge.get_executor());
  std::vector<int> order;
  Holder holder(bridge, mutex);
  std::vector<JoinHandle<void>> waiting;
  for (int i = 0; i < 5; ++i) waiting.push_back(bridge.submit(waits(mutex, order, i)));
  await_calls(bridge, 6);
  CHECK(order.empty());
  holder.let_go();
  for (auto& call : waiting) CHECK(outcome(call.join()) == succeeded);
  CHECK(order == std::vector{0, 1, 2, 3, 4});
}

TEST_CASE("async mutex: who comes later does not overtake those that wait") {
  RuntimeBridge bridge;
  AsyncMutex mutex(bridge.get_executor());
  std::vector<int> order;
  const auto task = [&]() -> awaitable<void> {
    for (int i = 0; i < 3; ++i) {
      const auto guard = co_await mutex.lock();
      order.push_back(0);
      if (i == 0) {  // the other one waits from here on
        auto waiting = asio::co_spawn(co_await asio::this_coro::executor, waits(mutex, order, 1), asio::use_future);
        co_await asio::post(use_awaitable);
      }
    }
  };
  unwrap(bridge.block_on(task));
  CHECK(order == std::vector{0, 1, 0, 0});
}

TEST_CASE("async mutex: a deadline ends the wait, and the lock still works") {
  RuntimeBridge bridge;
  AsyncMutex mutex(bridge.get_executor());
  std::vector<int> order;
  Holder holder(bridge, mutex);
  std::vector<JoinHandle<void>> waiting;
  const auto add = [&](int number) {
    waiting.push_back(bridge.submit(waits(mutex, order, number)));
    await_calls(bridge, waiting.size() + 1);
  };
  const auto task = [&] { return take(mutex); };
  SECTION("nobody else waits") { CHECK(bridge.block_on_for(task, 20ms).error() == BridgeError::TimedOut); }
  SECTION("between others that wait") {
    add(1);
    JoinHandle<void> cancelled = bridge.submit(task);
    await_calls(bridge, 3);
    waiting.push_back(bridge.submit(waits(mutex, order, 2)));
    await_calls(bridge, 4);
    cancelled.request_stop();
    CHECK(outcome(cancelled.join()) == BridgeError::Cancelled);
    CHECK(bridge.block_on_for(task, 20ms).error() == BridgeError::TimedOut);
    add(3);
  }
  holder.let_go();
  for (auto& call : waiting) CHECK(outcome(call.join()) == succeeded);
  CHECK(order == (waiting.empty() ? std::vector<int>() : std::vector{1, 2, 3}));
  CHECK(outcome(bridge.block_on_for(task, 60s)) == succeeded);
}

TEST_CASE("async mutex: a coroutine that is cancelled between getting the lock and going on gives it back") {
  RuntimeBridge bridge;
  AsyncMutex mutex(bridge.get_executor());
  const auto task = [&]() -> awaitable<bool> {
    const auto executor = co_await asio::this_coro::executor;
    asio::cancellation_signal signal;
    bool went_on = false;
    const auto use = [&]() -> awaitable<void> {
      const auto guard = co_await mutex.lock();
      co_await asio::post(use_awaitable);
      went_on = true;
    };
    {
      const auto guard = co_await mutex.lock();
      asio::co_spawn(executor, use, asio::bind_cancellation_slot(signal.slot(), asio::detached));
      auto until_it_waits = hops(4);
      co_await std::move(until_it_waits);
    }
    signal.emit(asio::cancellation_type::terminal);
    const auto guard = co_await mutex.lock();
    co_return went_on;
  };
  CHECK_FALSE(unwrap(bridge.block_on_for(task, 60s)));
}

TEST_CASE("async mutex: an exception unlocks it") {
  RuntimeBridge bridge;
  AsyncMutex mutex(bridge.get_executor());
  const auto failing = [&]() -> awaitable<void> {
    const auto guard = co_await mutex.lock();
    co_await asio::post(use_awaitable);
    throw std::runtime_error("lost the connection");
  };
  CHECK(outcome(bridge.block_on(failing)) == threw("lost the connection"));
  CHECK(outcome(bridge.block_on_for([&] { return take(mutex); }, 60s)) == succeeded);
}

TEST_CASE("async mutex: a guard that was moved from does not unlock") {
  RuntimeBridge bridge;
  AsyncMutex mutex(bridge.get_executor());
  const auto task = [&]() -> awaitable<bool> {
    std::optional<AsyncMutex::Guard> first(co_await mutex.lock());
    const AsyncMutex::Guard second(std::move(*first));
    first.reset();
    const auto use = [&] { return take(mutex); };
    auto waiting = asio::co_spawn(co_await asio::this_coro::executor, use, asio::use_future);
    auto pause = hops(4);
    co_await std::move(pause);
    co_return waiting.wait_for(0s) == std::future_status::ready;
  };
  CHECK_FALSE(unwrap(bridge.block_on(task)));
  CHECK(outcome(bridge.block_on_for([&] { return take(mutex); }, 60s)) == succeeded);
}

TEST_CASE("async mutex: a bridge is stopped with a holder and coroutines that wait") {
  for (const bool stubborn : {false, true}) {
    INFO(stubborn);
    RuntimeBridge bridge;
    AsyncMutex first(bridge.get_executor()), second(bridge.get_executor());
    const auto hold_both = [&]() -> awaitable<void> {
      if (stubborn) co_await asio::this_coro::reset_cancellation_state(asio::disable_cancellation());
      const auto guard = co_await first.lock();
      auto inner = hold(second, stubborn);
      co_await std::move(inner);
    };
    const auto hold_second = [&] { return hold(second, stubborn); };
    std::vector<JoinHandle<void>> calls;
    for (int i = 0; i < 3; ++i) {
      calls.push_back(bridge.submit(hold_both));
      calls.push_back(bridge.submit(hold_second));
    }
    await_calls(bridge, calls.size());
    bridge.shutdown(Shutdown::drain, 0s);  // stops it as the destructor does
    for (auto& call : calls) CHECK(outcome(call.join()) == response_lost);
  }
}

TEST_CASE("async mutex: coroutines that are destroyed while they wait for a second lock let go of the first") {
  RuntimeBridge bridge;
  AsyncMutex first(bridge.get_executor()), second(bridge.get_executor());
  const auto lock = [](AsyncMutex& outer, AsyncMutex& inner) -> awaitable<void> {
    co_await asio::this_coro::reset_cancellation_state(asio::disable_cancellation());
    const auto guard = co_await outer.lock();
    co_await asio::post(use_awaitable);
    const auto both = co_await inner.lock();
  };
  // Each pair waits for the other's lock, and the rest for one of them: nothing but channels is left to destroy.
  // On the worker, so that none starts, and gets both, before all are submitted.
  std::vector<JoinHandle<void>> tasks;
  unwrap(bridge.block_on([&] {
    for (int i = 0; i < 3; ++i) {
      tasks.push_back(bridge.submit([&] { return lock(first, second); }));
      tasks.push_back(bridge.submit([&] { return lock(second, first); }));
    }
  }));
  await_calls(bridge, tasks.size());
  bridge.shutdown(Shutdown::drain, 0s);
  for (auto& task : tasks) CHECK(outcome(task.join()) == response_lost);
}

TEST_CASE("async mutex: shutdown cancels the holder and those that wait") {
  RuntimeBridge bridge;
  AsyncMutex mutex(bridge.get_executor());
  std::vector<JoinHandle<void>> calls;
  for (int i = 0; i < 3; ++i) calls.push_back(bridge.submit([&] { return hold(mutex); }));
  await_calls(bridge, calls.size());
  bridge.shutdown(Shutdown::cancel);
  for (auto& call : calls) CHECK(outcome(call.join()) == BridgeError::Cancelled);
}
