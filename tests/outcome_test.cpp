// SPDX-License-Identifier: Apache-2.0
//
// What a call returns: the rows of the outcome table.

#include <cstdlib>
#include <latch>
#include <memory>
#include <new>
#include <optional>
#include <stdexcept>

#include "support.hpp"

namespace {

// The number of the next allocation of this thread that fails; 0: none.
thread_local int allocations_until_failure = 0;

void count_allocation() {
  if (allocations_until_failure > 0 && --allocations_until_failure == 0) throw std::bad_alloc();
}

}  // namespace

// Not inlined, or g++ sees only one half of a pair and warns of a mismatch.
[[gnu::noinline]] void* operator new(std::size_t size) {
  count_allocation();
  if (void* p = std::malloc(size)) return p;
  throw std::bad_alloc();
}
[[gnu::noinline]] void* operator new(std::size_t size, const std::nothrow_t&) noexcept { return std::malloc(size); }
[[gnu::noinline]] void operator delete(void* p) noexcept { std::free(p); }
[[gnu::noinline]] void operator delete(void* p, std::size_t) noexcept { std::free(p); }

// Asio allocates coroutine frames with this.
extern "C" void* aligned_alloc(std::size_t alignment, std::size_t size) noexcept {
  void* p = nullptr;
  try {
    count_allocation();
  } catch (const std::bad_alloc&) {
    return nullptr;
  }
  return posix_memalign(&p, alignment, size) == 0 ? p : nullptr;
}

namespace {

awaitable<int> yield_then_throw(std::string text) {
  co_await asio::post(use_awaitable);
  throw std::runtime_error(text);
}

/// A result whose n-th move throws.
struct ThrowsWhenMoved {
  explicit ThrowsWhenMoved(int n) : moves_left(n) {}
  ThrowsWhenMoved(ThrowsWhenMoved&& other) : moves_left(other.moves_left - 1) {
    if (moves_left == 0) throw std::runtime_error("moved once too often");
  }
  int moves_left;
};

awaitable<ThrowsWhenMoved> throws_when_moved(int n) {
  ThrowsWhenMoved result(n);
  co_return std::move(result);
}

awaitable<int> record_run(bool& ran, std::shared_ptr<int>) {
  ran = true;
  co_return 0;
}

/// Checks that a call is refused with this kind, and that its task is destroyed without being run.
template <class Bridge>
void check_refused(Bridge& bridge, BridgeError::Kind kind) {
  bool ran = false;
  const auto argument = std::make_shared<int>(0);
  {
    const auto result = bridge.block_on(record_run(ran, argument));
    REQUIRE_FALSE(result.has_value());
    CHECK(result.error() == kind);
    CHECK_FALSE(result.error().cause());
  }
  CHECK_FALSE(ran);
  CHECK(argument.use_count() == 1);

  auto task = record_run(ran, argument);
  CHECK(bridge.block_on(std::move(task)).error() == kind);  // NOLINT(bugprone-use-after-move)
  CHECK_FALSE(ran);
  CHECK(argument.use_count() == 1);  // although `task` is still in scope

  CHECK(bridge.block_on([&] { ran = true; }).error() == kind);
  CHECK_FALSE(ran);
}

}  // namespace

TEST_CASE("outcome: a task that throws is ResponseLost with that exception, and no other call is affected") {
  RuntimeBridge bridge;
  std::atomic<bool> neighbour_may_end{false};
  Outcome neighbour;
  jthread other([&] { neighbour = outcome(bridge.block_on(run_until(neighbour_may_end))); });
  await_state([&] { return bridge.in_flight() == 1; });

  const auto result = bridge.block_on(yield_then_throw("disk full"));
  REQUIRE_FALSE(result.has_value());
  CHECK(result.error().kind() == BridgeError::ResponseLost);
  CHECK_THROWS_AS(std::rethrow_exception(result.error().cause()), std::runtime_error);
  CHECK(what(result.error().cause()) == "disk full");

  CHECK(bridge.block_on(seven()) == 7);
  neighbour_may_end = true;
  other.join();
  CHECK(neighbour == succeeded);
}

TEST_CASE("outcome: an exception that is not a std::exception") {
  RuntimeBridge bridge;
  const auto result = bridge.block_on([]() -> awaitable<void> {
    throw 42;
    co_return;
  });
  REQUIRE_FALSE(result.has_value());
  CHECK(result.error() == BridgeError::ResponseLost);
  CHECK_THROWS_AS(std::rethrow_exception(result.error().cause()), int);
  CHECK(bridge.block_on(seven()) == 7);
}

TEST_CASE("outcome: an exception of the callable itself") {
  RuntimeBridge bridge;
  const auto coroutine = bridge.block_on([]() -> awaitable<int> {
    if (true) throw std::logic_error("before the coroutine");
    return seven();
  });
  REQUIRE_FALSE(coroutine.has_value());
  CHECK(coroutine.error() == BridgeError::ResponseLost);
  CHECK(what(coroutine.error().cause()) == "before the coroutine");

  const auto plain = bridge.block_on([]() -> int { throw std::logic_error("plain"); });
  REQUIRE_FALSE(plain.has_value());
  CHECK(plain.error() == BridgeError::ResponseLost);
  CHECK(what(plain.error().cause()) == "plain");
  CHECK(bridge.block_on(seven()) == 7);
}

TEST_CASE("outcome: an exception of the result's move constructor, wherever it is moved") {
  RuntimeBridge bridge;
  int failures = 0;
  int n = 1;
  for (;; ++n) {
    const auto result = bridge.block_on([n] { return throws_when_moved(n); });
    CHECK(bridge.block_on(seven()) == 7);
    if (result.has_value()) break;
    ++failures;
    CHECK(result.error() == BridgeError::ResponseLost);
    CHECK(what(result.error().cause()) == "moved once too often");
    REQUIRE(n < 50);
  }
  CHECK(failures >= 2);  // at least on the worker and on the caller
}

TEST_CASE("outcome: the context is stopped while tasks run") {
  RuntimeBridge bridge;
  std::vector<Outcome> outcomes(3);
  std::vector<jthread> callers;
  std::latch parked(3);
  for (auto& slot : outcomes) {
    callers.emplace_back([&] {
      const auto task = [&parked] {
        parked.count_down();
        return park();
      };
      slot = outcome(bridge.block_on(task));
    });
  }
  parked.wait();
  bridge.get_executor().context().stop();
  callers.clear();
  CHECK(outcomes == std::vector<Outcome>(3, response_lost));
  CHECK(bridge.in_flight() == 0);
  check_refused(bridge, BridgeError::WorkerDead);
}

TEST_CASE("outcome: a task that is destroyed is ResponseLost, and no other call is affected") {
  RuntimeBridge bridge;
  std::optional<asio::io_context> elsewhere(std::in_place);
  auto handle = bridge.submit([&]() -> awaitable<void> { co_await asio::post(*elsewhere, use_awaitable); });
  await_calls(bridge, 1);
  elsewhere.reset();
  CHECK(outcome(handle.join()) == response_lost);
  CHECK(bridge.block_on(seven()) == 7);
}

TEST_CASE("outcome: a bridge that was moved from") {
  RuntimeBridge bridge;
  const RuntimeBridge heir = std::move(bridge);
  check_refused(bridge, BridgeError::WorkerDead);  // NOLINT(bugprone-use-after-move)
  CHECK(bridge.in_flight() == 0);
  CHECK(heir.block_on(seven()) == 7);

  bridge = RuntimeBridge();
  CHECK(bridge.block_on(seven()) == 7);
  CHECK(worker_of(bridge) != worker_of(heir));
}

TEST_CASE("outcome: assigning to a bridge ends the worker it had") {
  RuntimeBridge bridge;
  unwrap(bridge.block_on([] {}));  // now the worker has its name
  bridge = RuntimeBridge();
  unwrap(bridge.block_on([] {}));
  await_workers(1);
  auto& same = bridge;
  bridge = std::move(same);
  CHECK(bridge.block_on(seven()) == 7);
}

TEST_CASE("outcome: no memory before admission is std::bad_alloc, and nothing is left behind") {
  RuntimeBridge bridge;
  for (int n = 1;; ++n) {
    bool ran = false;
    bool threw = false;
    allocations_until_failure = n;
    try {
      (void)bridge.block_on([&ran] { ran = true; });
    } catch (const std::bad_alloc&) {
      threw = true;
    }
    const bool failed = allocations_until_failure == 0;
    allocations_until_failure = 0;
    CHECK(threw == failed);
    CHECK(ran != threw);
    CHECK(bridge.in_flight() == 0);
    CHECK(bridge.block_on(seven()) == 7);
    if (!failed) {
      CHECK(n <= 3);  // two for a std::promise: the post uses memory of the call
      break;
    }
    REQUIRE(n < 50);
  }
}

TEST_CASE("outcome: no memory to start a task on the worker is ResponseLost with std::bad_alloc") {
  RuntimeBridge bridge;
  asio::post(bridge.get_executor(), [] { allocations_until_failure = 1; });
  const auto result = bridge.block_on([] { return seven(); });
  REQUIRE_FALSE(result.has_value());
  CHECK(result.error() == BridgeError::ResponseLost);
  CHECK_THROWS_AS(std::rethrow_exception(result.error().cause()), std::bad_alloc);
  CHECK(bridge.in_flight() == 0);
  CHECK(bridge.block_on([] { return seven(); }) == 7);
}

TEST_CASE("outcome: requesting a stop needs no memory") {
  RuntimeBridge bridge;
  auto parked = bridge.submit(park());
  auto other = bridge.submit(park());
  await_calls(bridge, 2);
  allocations_until_failure = 1;
  parked.request_stop();
  bridge.shutdown(runtime_bridge::Shutdown::cancel);
  const bool allocated = allocations_until_failure != 1;
  allocations_until_failure = 0;
  CHECK_FALSE(allocated);
  CHECK(parked.join().error() == BridgeError::Cancelled);
  CHECK(other.join().error() == BridgeError::Cancelled);
}

TEST_CASE("outcome: a task that ends on another thread retries its way back if it has no memory") {
  const RuntimeBridge bridge;
  std::thread other;
  std::binary_semaphore suspended(0);
  bool failed = false;
  const auto resume_there = [&](auto handler) {
    asio::post(bridge.get_executor(), [&] { suspended.release(); });  // then the worker has suspended the task
    other = std::thread([&, h = std::move(handler)]() mutable {
      suspended.acquire();
      allocations_until_failure = 1;  // this thread has no memory cached by Asio
      std::move(h)();
      failed = allocations_until_failure == 0;
    });
  };
  const auto task = [&]() -> awaitable<int> {
    co_await asio::async_initiate<decltype(use_awaitable), void()>(resume_there, use_awaitable);
    co_return 3;
  };
  CHECK(bridge.block_on(task) == 3);
  other.join();
  CHECK(failed);
}
