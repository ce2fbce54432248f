// SPDX-License-Identifier: Apache-2.0
//
// Tasks that move to another executor and end there. They are brought back to the worker first.

#include <atomic>
#include <memory>
#include <stdexcept>

#include "support.hpp"

namespace {

using Plain = asio::io_context::executor_type;

template <class Executor>
awaitable<int, Executor> ends_on(asio::any_io_executor other, std::thread::id& went_on, NotesItsEnd) {
  co_await asio::post(asio::bind_executor(other, asio::use_awaitable_t<Executor>()));
  went_on = std::this_thread::get_id();
  co_return 4;
}

template <class Executor>
awaitable<void, Executor> throws_on(asio::any_io_executor other, NotesItsEnd) {
  co_await asio::dispatch(asio::bind_executor(other, asio::use_awaitable_t<Executor>()));
  throw std::out_of_range("elsewhere");
}

}  // namespace

TEMPLATE_TEST_CASE("hop: a task that ends on a pool is brought back before its frame is destroyed", "",
                   asio::any_io_executor, Plain) {
  asio::thread_pool pool(1);
  const RuntimeBridge bridge;
  const auto worker = worker_of(bridge);
  std::thread::id went_on, destroyed, destroyed_by_throwing;
  CHECK(bridge.block_on([&] { return ends_on<TestType>(pool.get_executor(), went_on, NotesItsEnd(destroyed)); }) == 4);
  CHECK(went_on != worker);
  CHECK(destroyed == worker);
  const auto failed =
      bridge.block_on([&] { return throws_on<TestType>(pool.get_executor(), NotesItsEnd(destroyed_by_throwing)); });
  CHECK(outcome(failed) == threw("elsewhere"));
  CHECK(destroyed_by_throwing == worker);
  CHECK(bridge.in_flight() == 0);
}

TEST_CASE("hop: the callable of a submitted task that ends on a pool is destroyed on the worker") {
  asio::thread_pool pool(1);
  const RuntimeBridge bridge;
  const auto worker = worker_of(bridge);
  std::thread::id went_on, destroyed, captured;
  auto task = bridge.submit([&, note = NotesItsEnd(captured)] {
    return ends_on<asio::any_io_executor>(pool.get_executor(), went_on, NotesItsEnd(destroyed));
  });
  CHECK(task.join() == 4);
  CHECK(destroyed == worker);
  CHECK(captured == worker);
}

TEST_CASE("hop: a task that ends on the worker of another bridge, or on a strand of its own worker") {
  const RuntimeBridge bridge, other;
  const auto worker = worker_of(bridge);
  std::thread::id went_on, destroyed;
  CHECK(bridge.block_on([&] {
    return ends_on<asio::any_io_executor>(other.get_executor(), went_on, NotesItsEnd(destroyed));
  }) == 4);
  CHECK(went_on == worker_of(other));
  CHECK(destroyed == worker);
  CHECK(bridge.block_on([&] {
    return ends_on<asio::any_io_executor>(asio::make_strand(bridge.get_executor()), went_on, NotesItsEnd(destroyed));
  }) == 4);
  CHECK(went_on == worker);
  CHECK(destroyed == worker);
}

TEST_CASE("hop: the worker touches nothing of a task after its caller returned") {
  asio::thread_pool pool(2);
  const RuntimeBridge bridge;
  for (int i = 0; i < 500; ++i) {
    auto local = std::make_unique<int>(i);
    const auto task = [&]() -> awaitable<int> {
      co_await asio::post(asio::bind_executor(pool.get_executor(), use_awaitable));
      co_return *local;
    };
    REQUIRE(bridge.block_on(task) == i);
    local.reset();
  }
}

// Race, for TSan: a cancellation reaches a task that is ending on a pool.
TEST_CASE("hop: a deadline races with a task that ends on a pool", "[race]") {
  asio::thread_pool pool(2);
  const RuntimeBridge bridge;
  std::atomic<int> wrong{0};
  const auto task = [&]() -> awaitable<int> {
    co_await asio::post(asio::bind_executor(pool.get_executor(), use_awaitable));
    for (int i = 0; i < 20'000; ++i) asm volatile("");
    co_return 1;
  };
  {
    std::vector<jthread> callers;
    for (int t = 0; t < 3; ++t) {
      callers.emplace_back([&] {
        for (int i = 0; i < 500; ++i) {
          const auto result = bridge.block_on_for(task, 90us);
          if (!result.has_value() && result.error() != BridgeError::TimedOut) ++wrong;
        }
      });
    }
  }
  CHECK(wrong == 0);
}

// Race, for ASan and TSan: the thread that brings a task back is still in asio::post when the bridge is destroyed.
TEST_CASE("hop: a bridge may be destroyed as soon as a task has come back") {
  asio::thread_pool pool(1);
  for (int i = 0; i < 300; ++i) {
    const RuntimeBridge bridge;
    const auto task = [&]() -> awaitable<int> {
      co_await asio::post(asio::bind_executor(pool.get_executor(), use_awaitable));
      co_return 1;
    };
    REQUIRE(bridge.block_on(task) == 1);
  }
}
