// SPDX-License-Identifier: Apache-2.0
//
// Deadlines: block_on_for and block_on_until.

#include <atomic>
#include <limits>
#include <stdexcept>

#include "support.hpp"

namespace {

using std::chrono::steady_clock;
using std::chrono::system_clock;

/// Parks, and records that it was started and that it is gone.
awaitable<void> park_and_record(bool& started, bool& gone) {
  started = true;
  const SetsFlag local{gone};
  co_await park();
}

/// Parks until it is cancelled, and records that.
awaitable<void> park_until_cancelled(bool& was_cancelled) {
  try {
    co_await park();
  } catch (const AsioError&) {
    was_cancelled = true;
  }
}

awaitable<int> value_although_cancelled(bool& was_cancelled) {
  co_await park_until_cancelled(was_cancelled);
  co_return 9;
}

awaitable<int> own_failure_when_cancelled(bool& was_cancelled) {
  co_await park_until_cancelled(was_cancelled);
  if (was_cancelled) throw std::runtime_error("rolled back");
  co_return 0;
}

template <class Self, class Duration>
struct TestClock {
  using duration = Duration;
  using rep = typename duration::rep;
  using period = typename duration::period;
  using time_point = std::chrono::time_point<Self, duration>;
  static constexpr bool is_steady = false;
};

/// A clock that its test sets.
struct SettableClock : TestClock<SettableClock, std::chrono::milliseconds> {
  static inline std::atomic<rep> milliseconds{0};
  static time_point now() { return time_point(duration(milliseconds.load())); }
};

/// A clock that fails when it is read for the n-th time.
struct BrokenClock : TestClock<BrokenClock, std::chrono::nanoseconds> {
  static inline std::atomic<int> looks_left{0};
  static time_point now() {
    if (--looks_left <= 0) throw std::runtime_error("no clock");
    return time_point(0s);
  }
};

/// Repeats the call with longer and longer timeouts, until its task was started in time.
template <class Call>
auto with_time_enough(Call call, const bool& started) {
  std::chrono::milliseconds timeout = 5ms;
  auto result = call(timeout);
  while (!started) result = call(timeout *= 2);
  return result;
}

}  // namespace

TEST_CASE("deadline: a task that ends in time") {
  for (const auto spin_limit : {100us, 0us}) {
    RuntimeBridge bridge(Options{.spin_limit = spin_limit});
    CHECK(bridge.block_on_for(seven(), 1h) == 7);
    CHECK(bridge.block_on_until([] { return seven(); }, steady_clock::now() + 1h) == 7);
    CHECK(bridge.block_on_until([] { return 3; }, system_clock::now() + 1h) == 3);
  }
}

TEST_CASE("deadline: the task is cancelled and waited for, and its exception is the cause") {
  RuntimeBridge bridge;
  bool started = false;
  bool gone = false;
  const auto task = [&] { return park_and_record(started, gone); };
  const auto call = [&](std::chrono::milliseconds timeout) {
    const auto start = steady_clock::now();
    const auto result = bridge.block_on_for(task, timeout);
    CHECK(steady_clock::now() - start >= timeout);
    return result;
  };
  const auto result = with_time_enough(call, started);
  CHECK(gone);
  REQUIRE_FALSE(result.has_value());
  CHECK(result.error() == BridgeError::TimedOut);
  CHECK(code_of<AsioError>(result.error().cause()) == asio::error::operation_aborted);
  CHECK(bridge.in_flight() == 0);
  CHECK(bridge.block_on(seven()) == 7);

  bool cancelled = false;
  const auto call_own = [&](std::chrono::milliseconds timeout) {
    return bridge.block_on_until(own_failure_when_cancelled(cancelled), system_clock::now() + timeout);
  };
  const auto own = with_time_enough(call_own, cancelled);
  REQUIRE_FALSE(own.has_value());
  CHECK(own.error() == BridgeError::TimedOut);
  CHECK(what(own.error().cause()) == "rolled back");
}

TEST_CASE("deadline: a task that is cancelled and returns a value keeps it") {
  RuntimeBridge bridge;
  bool cancelled = false;
  const auto call = [&](std::chrono::milliseconds timeout) {
    return bridge.block_on_for(value_although_cancelled(cancelled), timeout);
  };
  CHECK(with_time_enough(call, cancelled) == 9);
}

TEST_CASE("deadline: a task that ignores cancellation is waited for") {
  RuntimeBridge bridge;
  bool ignores = false;
  bool may_end = false;
  std::atomic<bool> returned{false};
  Result<int> result = 0;
  const auto stubborn = [&]() -> awaitable<int> {
    co_await asio::this_coro::reset_cancellation_state(asio::disable_cancellation());
    ignores = true;
    co_await run_until(may_end);
    co_return 5;
  };
  SettableClock::milliseconds = 0;
  jthread caller([&] {
    result = bridge.block_on_until(stubborn, SettableClock::time_point(1h));
    returned = true;
  });
  await_state([&] { return bridge.block_on([&] { return ignores; }) == true; });
  SettableClock::milliseconds = std::chrono::milliseconds(2h).count();
  std::this_thread::sleep_for(1500ms);  // the caller reads that clock once a second
  CHECK_FALSE(returned);
  unwrap(bridge.block_on([&] { may_end = true; }));
  caller.join();
  CHECK(result == 5);
}

TEST_CASE("deadline: a deadline that has already passed does not start the task") {
  RuntimeBridge bridge;
  bool ran = false;
  const auto task = [&ran] { ran = true; };
  const auto check = [&](const Result<void>& result) {
    REQUIRE_FALSE(result.has_value());
    CHECK(result.error() == BridgeError::TimedOut);
    CHECK_FALSE(result.error().cause());
  };
  check(bridge.block_on_for(task, 0s));
  check(bridge.block_on_for(task, -1ns));
  check(bridge.block_on_for(task, std::chrono::hours::min()));
  check(bridge.block_on_for(task, std::chrono::duration<double>(-std::numeric_limits<double>::infinity())));
  check(bridge.block_on_for(task, std::chrono::duration<double>(std::numeric_limits<double>::quiet_NaN())));
  check(bridge.block_on_until(task, steady_clock::now()));
  check(bridge.block_on_until(task, steady_clock::time_point::min()));
  check(bridge.block_on_until(task, system_clock::time_point::min()));
  check(bridge.block_on_until(task, std::chrono::time_point<system_clock, std::chrono::hours>::min()));
  CHECK_FALSE(ran);
  CHECK(bridge.in_flight() == 0);
}

TEST_CASE("deadline: one beyond the range of the clock means none") {
  RuntimeBridge bridge;
  CHECK(bridge.block_on_for(seven(), std::chrono::hours::max()) == 7);
  CHECK(bridge.block_on_for(seven(), std::chrono::nanoseconds::max()) == 7);
  CHECK(bridge.block_on_for(seven(), std::chrono::duration<double>(std::numeric_limits<double>::infinity())) == 7);
  CHECK(bridge.block_on_for(seven(), std::chrono::duration<float, std::ratio<31'556'952>>(1e30F)) == 7);
  CHECK(bridge.block_on_until(seven(), steady_clock::time_point::max()) == 7);
  CHECK(bridge.block_on_until(seven(), system_clock::time_point::max()) == 7);
  CHECK(bridge.block_on_until(seven(), std::chrono::time_point<system_clock, std::chrono::hours>::max()) == 7);
  CHECK(bridge.block_on_until(seven(), std::chrono::time_point<system_clock, std::chrono::hours>::max() - 1h) == 7);
}

TEST_CASE("deadline: a clock that is set forward") {
  RuntimeBridge bridge;
  SettableClock::milliseconds = 0;
  Outcome result;
  jthread caller([&] { result = outcome(bridge.block_on_until(park(), SettableClock::time_point(1h))); });
  await_calls(bridge, 1);
  SettableClock::milliseconds = std::chrono::milliseconds(2h).count();
  caller.join();
  CHECK(result == BridgeError::TimedOut);
  CHECK(result.cause);
}

// Race: the deadline passes while the task completes.
TEST_CASE("deadline: races with completion", "[race]") {
  RuntimeBridge bridge;
  int values = 0;
  int timeouts = 0;
  for (int round = 0; round < 5'000; ++round) {
    int local = 0;
    const auto task = [&]() -> awaitable<int> {
      for (int hop = 0; hop < round % 16; ++hop) co_await asio::post(use_awaitable);
      co_return ++local;
    };
    const auto result = bridge.block_on_for(task, std::chrono::microseconds(round % 50 + 1));
    if (result.has_value()) {
      ++values;
    } else if (result.error() == BridgeError::TimedOut) {
      ++timeouts;
    }
  }
  CHECK(values + timeouts == 5'000);
  CHECK(bridge.in_flight() == 0);
}

TEST_CASE("deadline: an exception of the clock leaves after the task is gone") {
  const RuntimeBridge bridge;
  for (int n = 1; n <= 3; ++n) {
    bool started = false;
    bool gone = false;
    const auto task = [&] { return park_and_record(started, gone); };
    BrokenClock::looks_left = n;
    CHECK_THROWS_WITH(bridge.block_on_until(task, BrokenClock::time_point(10s)), "no clock");
    CHECK(gone == started);
    CHECK(bridge.in_flight() == 0);
    if (n == 1) CHECK_FALSE(started);  // the clock is first read before the call
  }
}
