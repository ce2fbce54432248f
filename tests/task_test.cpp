// SPDX-License-Identifier: Apache-2.0
//
// The four kinds of Task, the types of their results, and where they run.

#include <cstdint>
#include <functional>
#include <memory>
#include <tuple>

#include "support.hpp"

namespace {

using IoExecutor = asio::io_context::executor_type;

awaitable<int> twice(int n) {
  co_await asio::post(use_awaitable);
  co_return 2 * n;
}

asio::awaitable<int, IoExecutor> twice_io(int n) {
  co_await asio::post(asio::use_awaitable_t<IoExecutor>{});
  co_return 2 * n;
}

struct MoveOnly {
  explicit MoveOnly(int n) : p(std::make_unique<int>(n)) {}  // no default constructor
  std::unique_ptr<int> p;
};

struct NotAssignable {
  explicit NotAssignable(int v) : n(v) {}
  NotAssignable(NotAssignable&&) = default;
  NotAssignable& operator=(NotAssignable&&) = delete;
  const int n;
};

struct alignas(128) OverAligned {
  explicit OverAligned(int v) : n(v) {}
  int n;
};

template <class T, class... Args>
awaitable<T> make(Args... args) {
  co_await asio::post(use_awaitable);
  co_return T(args...);
}

bool aligned(const OverAligned& o) { return reinterpret_cast<std::uintptr_t>(&o) % alignof(OverAligned) == 0; }

int plain_function() { return 11; }

}  // namespace

TEST_CASE("task: an awaitable for any_io_executor") {
  RuntimeBridge bridge;
  CHECK(bridge.block_on(twice(21)) == 42);
  auto named = twice(4);
  const auto result = bridge.block_on(std::move(named));
  CHECK(result == 8);
}

TEST_CASE("task: an awaitable for io_context::executor_type") {
  RuntimeBridge bridge;
  CHECK(bridge.block_on(twice_io(21)) == 42);
  CHECK(bridge.block_on([] { return twice_io(2); }) == 4);
}

TEST_CASE("task: a callable that returns an awaitable is called on the worker") {
  RuntimeBridge bridge;
  const auto worker = worker_of(bridge);
  std::thread::id called;
  const auto task = [&called] {
    called = std::this_thread::get_id();
    return twice(3);
  };
  CHECK(bridge.block_on(task) == 6);
  CHECK(called == worker);
  CHECK(called != std::this_thread::get_id());
}

TEST_CASE("task: a lambda coroutine may use its captures, even as a temporary") {
  RuntimeBridge bridge;
  const std::string word = "borrowed from the caller's stack";
  const auto result = bridge.block_on([&word, own = std::string(100, 'x')]() -> awaitable<std::string> {
    co_await asio::post(use_awaitable);
    co_return word + own;
  });
  CHECK(result == word + std::string(100, 'x'));
}

TEST_CASE("task: plain callables run on the worker") {
  RuntimeBridge bridge;
  CHECK(bridge.block_on(plain_function) == 11);
  CHECK(bridge.block_on(&plain_function) == 11);
  CHECK(bridge.block_on(std::function<int()>(plain_function)) == 11);

  std::unique_ptr<asio::steady_timer> timer;
  unwrap(bridge.block_on([&] { timer = std::make_unique<asio::steady_timer>(bridge.get_executor()); }));
  REQUIRE(timer);
  unwrap(bridge.block_on([&] { timer.reset(); }));

  struct OnlyAsRvalue {
    int operator()() && { return 5; }
  };
  CHECK(bridge.block_on(OnlyAsRvalue{}) == 5);
}

TEST_CASE("task: an Asio operation that takes its completion token") {
  RuntimeBridge bridge;
  asio::steady_timer timer(bridge.get_executor(), 1ms);
  CHECK(bridge.block_on(timer.async_wait(asio::deferred)).has_value());

  auto named = timer.async_wait(asio::deferred);
  CHECK(bridge.block_on(named).has_value());
}

TEST_CASE("task: results of every movable type") {
  RuntimeBridge bridge;
  CHECK(bridge.block_on(make<void>()).has_value());
  CHECK(*bridge.block_on(make<MoveOnly>(7)).value().p == 7);
  CHECK(bridge.block_on(make<NotAssignable>(8)).value().n == 8);
  CHECK(*bridge.block_on([] { return MoveOnly(9); }).value().p == 9);
  CHECK(bridge.block_on([] { return NotAssignable(10); }).value().n == 10);
  CHECK(bridge.block_on([]() -> const std::string { return "const"; }) == "const");
  CHECK(bridge.block_on([] { return std::tuple(1, 2); }) == std::tuple(1, 2));

  const auto over_aligned = bridge.block_on([] { return OverAligned(4); });
  CHECK(over_aligned->n == 4);
  CHECK(aligned(*over_aligned));

  // A backend's own result inside the call's, as every backend has it.
  const auto nested = bridge.block_on([] { return error_result<int>(BridgeError::TimedOut); });
  REQUIRE(nested.has_value());
  CHECK(nested->error() == BridgeError::TimedOut);
}

#ifndef SANITIZED
// Asio allocates coroutine frames with the default alignment, so UBSan reports every frame that such a value passes
// through. The result is aligned all the same.
TEST_CASE("task: an awaitable's over-aligned result") {
  RuntimeBridge bridge;
  const auto result = bridge.block_on(make<OverAligned>(6));
  CHECK(result->n == 6);
  CHECK(aligned(*result));
}
#endif

TEST_CASE("task: calls from different threads run concurrently") {
  RuntimeBridge bridge;
  // The first task ends only after the second has run.
  bool second_has_run = false;
  jthread caller([&] { unwrap(bridge.block_on(run_until(second_has_run))); });
  await_state([&] { return bridge.in_flight() == 1; });
  unwrap(bridge.block_on([&] { second_has_run = true; }));
  caller.join();
  CHECK(bridge.in_flight() == 0);
}

TEST_CASE("task: an awaitable that was moved from before is an error of its call only") {
  const RuntimeBridge bridge;
  auto task = seven();
  CHECK(bridge.block_on(std::move(task)) == 7);
  const auto again = bridge.block_on(std::move(task));  // NOLINT(bugprone-use-after-move)
  REQUIRE_FALSE(again.has_value());
  CHECK(again.error() == BridgeError::ResponseLost);
  CHECK_THROWS_AS(std::rethrow_exception(again.error().cause()), std::invalid_argument);
  CHECK(bridge.block_on(seven) == 7);
}
