// SPDX-License-Identifier: Apache-2.0
//
// poll_every: a stop that the waiting thread asks for.

#include <atomic>
#include <memory>
#include <optional>
#include <semaphore>
#include <stdexcept>
#include <string>

#include "support.hpp"

using runtime_bridge::poll_every;
using runtime_bridge::Shutdown;
using runtime_bridge::Stop;

namespace {

constexpr auto never = [] { return false; };

/// True from the given question on. Notes who asks, and how often.
struct Questions {
  bool ask() {
    on = std::this_thread::get_id();
    return ++asked >= yes_at;
  }

  int yes_at = 1;
  std::atomic<int> asked{0};
  std::thread::id on{};
};

}  // namespace

TEST_CASE("poll_every: the waiting thread asks, at once and then at each interval") {
  const RuntimeBridge bridge;
  Questions questions{4};
  std::atomic<bool> started{false};
  bool cancelled = false;
  const auto task = [&]() -> awaitable<void> {
    started = true;
    try {
      auto parked = park();
      co_await std::move(parked);
    } catch (const AsioError& e) {
      cancelled = e.code() == asio::error::operation_aborted;
      throw;
    }
  };
  const auto begin = std::chrono::steady_clock::now();
  // On a busy machine the task may start late.
  const auto asks = [&] { return questions.ask() && started; };
  const auto result = bridge.block_on(task, poll_every(2ms, asks));
  CHECK(result.error() == BridgeError::Cancelled);
  CHECK(code_of<AsioError>(result.error().cause()) == asio::error::operation_aborted);
  CHECK(cancelled);
  CHECK(questions.asked >= 4);
  CHECK(questions.asked <= 1 + (std::chrono::steady_clock::now() - begin) / 2ms);
  CHECK(questions.on == std::this_thread::get_id());
  CHECK(std::chrono::steady_clock::now() - begin >= 6ms);
}

TEST_CASE("poll_every: one that is true before the call does not start the task") {
  const RuntimeBridge bridge;
  bool ran = false;
  Questions questions{1};
  CHECK(outcome(bridge.block_on([&] { ran = true; }, poll_every(24h, [&] { return questions.ask(); }))) ==
        cancelled_unrun);
  CHECK_FALSE(ran);
  CHECK(questions.asked == 1);
  CHECK(bridge.stats().admitted == 0);
  CHECK(bridge.stats().cancelled == 1);
}

TEST_CASE("poll_every: a task that ends before is not affected") {
  const RuntimeBridge bridge;
  CHECK(bridge.block_on([] { return 1; }, poll_every(1h, never)) == 1);
  CHECK(bridge.block_on_for([] { return 1; }, 1h, poll_every(1h, never)) == 1);
  CHECK(bridge.block_on_until([] { return 1; }, std::chrono::system_clock::now() + 1h, poll_every(1h, never)) == 1);
  // An interval that is longer than the clock can tell.
  CHECK(bridge.block_on([] { return 1; }, poll_every((std::chrono::hours::max)(), never)) == 1);
}

TEST_CASE("poll_every: a task that returns a value although it was cancelled keeps it, and nobody asks again") {
  const RuntimeBridge bridge;
  std::atomic<bool> started{false};
  std::atomic<int> answers{0};
  const auto task = [&]() -> awaitable<int> {
    co_await asio::this_coro::throw_if_cancelled(false);
    started = true;
    try {
      auto parked = park();
      co_await std::move(parked);
    } catch (const AsioError&) {
    }
    co_return 7;
  };
  CHECK(bridge.block_on(task, poll_every(1ms, [&] { return started && ++answers != 0; })) == 7);
  CHECK(answers == 1);
}

TEST_CASE("poll_every: with a deadline, whichever comes first") {
  const RuntimeBridge bridge;
  CHECK(outcome(bridge.block_on_for(park, 5ms, poll_every(1ms, never))) == BridgeError::TimedOut);
  CHECK(outcome(bridge.block_on_for(park, 5ms, poll_every(24h, never))) == BridgeError::TimedOut);
  Questions questions{2};
  CHECK(outcome(bridge.block_on_for(park, 24h, poll_every(1ms, [&] { return questions.ask(); }))) ==
        BridgeError::Cancelled);
}

TEST_CASE("poll_every: an exception cancels the task, and leaves when that is over") {
  const RuntimeBridge bridge;
  bool over = false;
  std::atomic<bool> started{false};
  const auto task = [&]() -> awaitable<void> {
    const SetsFlag at_end{over};
    started = true;
    auto parked = park();
    co_await std::move(parked);
  };
  const auto interrupted = [&]() -> bool {
    if (started) throw std::runtime_error("interrupted");
    return false;
  };
  CHECK_THROWS_WITH((void)bridge.block_on(task, poll_every(1ms, interrupted)), "interrupted");
  CHECK(over);
  CHECK(bridge.in_flight() == 0);
  CHECK(bridge.calls().empty());
  CHECK(bridge.stats().cancelled == 1);
  CHECK(bridge.block_on([] { return 1; }) == 1);
}

TEST_CASE("poll_every: an exception before the call") {
  const RuntimeBridge bridge;
  bool ran = false;
  const auto interrupted = []() -> bool { throw std::runtime_error("interrupted"); };
  CHECK_THROWS_WITH((void)bridge.block_on([&] { ran = true; }, poll_every(1ms, interrupted)), "interrupted");
  CHECK_FALSE(ran);
  CHECK(bridge.stats().admitted == 0);
}

TEST_CASE("poll_every: the predicate may be moved only, and is kept by the Stop") {
  const RuntimeBridge bridge;
  const Stop stop = poll_every(1ms, [n = std::make_unique<int>(0)] { return ++*n == 3; });
  CHECK(outcome(bridge.block_on(park, stop)) == BridgeError::Cancelled);
  CHECK(outcome(bridge.block_on(park, Stop(poll_every(1ms, [n = 0]() mutable { return ++n == 3; })))) ==
        BridgeError::Cancelled);
  CHECK(bridge.block_on([] { return 1; }, Stop()) == 1);
  CHECK(bridge.block_on([] { return 1; }, {}) == 1);
}

TEST_CASE("poll_every: an interval of zero or less is refused") {
  CHECK_THROWS_AS((void)poll_every(0ms, never), std::system_error);
  CHECK_THROWS_AS((void)poll_every(-1h, never), std::system_error);
  CHECK_THROWS_AS((void)poll_every(std::chrono::duration<double>(std::numeric_limits<double>::quiet_NaN()), never),
                  std::system_error);
  try {
    (void)poll_every(0ms, never);
  } catch (const std::system_error& e) {
    CHECK(e.code() == std::errc::invalid_argument);
  }
}

TEST_CASE("poll_every: the predicate may make calls, of other bridges too") {
  const RuntimeBridge bridge;
  const RuntimeBridge other;
  int asked = 0;
  const auto asks = [&] { return unwrap(bridge.block_on([&] { return ++asked; })) == 3 && other.block_on([] {}); };
  CHECK(outcome(bridge.block_on(park, poll_every(1ms, asks))) == BridgeError::Cancelled);
}

TEST_CASE("poll_every: on a worker that waits, calls of the predicate are refused") {
  const RuntimeBridge outer;
  const RuntimeBridge inner;
  std::optional<Outcome> nested;
  const auto asks = [&] {
    if (inner.in_flight() == 0) return false;
    nested = outcome(inner.block_on([] {}));
    return true;
  };
  const auto task = [&] { return outcome(inner.block_on(park, poll_every(1ms, asks))); };
  CHECK(unwrap(outer.block_on(task)) == BridgeError::Cancelled);
  CHECK(nested == would_deadlock);
}

TEST_CASE("poll_every: while a call waits for its turn") {
  Options options;
  options.max_in_flight = 1;
  const RuntimeBridge bridge(options);
  auto first = bridge.submit(park());
  await_state([&] { return bridge.in_flight() == 1; });
  Questions questions{3};
  bool ran = false;
  CHECK(outcome(bridge.block_on([&] { ran = true; }, poll_every(1ms, [&] { return questions.ask(); }))) ==
        cancelled_unrun);
  CHECK_FALSE(ran);
}

TEST_CASE("poll_every: beside reports of slow calls") {
  Options options;
  std::atomic<int> slow{0};
  options.slow_after = 1ms;
  options.on_slow_call = [&](const runtime_bridge::CallInfo&) { ++slow; };
  const RuntimeBridge bridge(options);
  CHECK(outcome(bridge.block_on(park, poll_every(1ms, [&] { return slow >= 3; }))) == BridgeError::Cancelled);
  Questions questions{20};
  CHECK(outcome(bridge.block_on(park, poll_every(1ms, [&] { return questions.ask(); }))) == BridgeError::Cancelled);
  CHECK(questions.asked == 20);
}

TEST_CASE("poll_every: a bridge that is gone") {
  RuntimeBridge bridge;
  bridge.shutdown(Shutdown::drain);
  CHECK(outcome(bridge.block_on(park, poll_every(1ms, never))) == worker_dead);
}

// Race: the answer, an exception or a shutdown reaches a call that ends.
TEST_CASE("poll_every: races with the end of the task and of the bridge", "[race]") {
  int values = 0;
  int cancelled = 0;
  int lost = 0;
  int thrown = 0;
  for (int round = 0; round < 1'000; ++round) {
    std::optional<RuntimeBridge> bridge(std::in_place);
    std::binary_semaphore go(0);
    jthread stopper([&] {
      go.acquire();
      if (round % 4 == 0) bridge->shutdown(Shutdown::cancel, round % 8 == 0 ? 0s : 24h);
    });
    int asked = 0;
    const auto asks = [&] {
      if (++asked == 2) go.release();
      if (asked < 3 + round % 3) return false;
      if (round % 5 == 0) throw std::runtime_error("interrupted");
      return true;
    };
    const auto task = [&]() -> awaitable<void> {
      asio::steady_timer timer(co_await asio::this_coro::executor, std::chrono::microseconds(round % 50 * 10));
      co_await timer.async_wait(use_awaitable);
    };
    try {
      const auto result = bridge->block_on(task, poll_every(std::chrono::microseconds(100), asks));
      values += result.has_value();
      cancelled += !result && result.error() == BridgeError::Cancelled;
      lost += !result && result.error() == BridgeError::ResponseLost;
    } catch (const std::runtime_error&) {
      ++thrown;
    }
    if (asked < 2) go.release();
  }
  CHECK(values + cancelled + lost + thrown == 1'000);
  CHECK(values > 0);
}
