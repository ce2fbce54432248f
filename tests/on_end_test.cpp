// SPDX-License-Identifier: Apache-2.0
//
// submit with a function for the end: it is called once, whatever ends the task.

#include <array>
#include <atomic>
#include <latch>
#include <memory>
#include <optional>
#include <semaphore>
#include <stdexcept>
#include <string>

#include "support.hpp"

using runtime_bridge::CallEnd;
using runtime_bridge::named;
using runtime_bridge::Shutdown;
using runtime_bridge::SourceLocation;
using runtime_bridge::WhenFull;

namespace {

/// What a function for the end was told. The main thread waits for it.
template <class T>
class End {
 public:
  auto function() {
    return [this](Result<T> result) {
      on_ = std::this_thread::get_id();
      result_.emplace(std::move(result));
      ++times_;
      told_.count_down();
    };
  }
  Result<T>& result() {
    told_.wait();
    return *result_;
  }
  std::thread::id on() {
    told_.wait();
    return on_;
  }
  int times() const { return times_; }

 private:
  std::latch told_{1};
  std::atomic<int> times_{0};
  std::thread::id on_{};
  std::optional<Result<T>> result_{};
};

}  // namespace

TEST_CASE("on_end: the result of every kind of Task, on the worker") {
  const RuntimeBridge bridge;
  End<int> value, coroutine, named_task;
  End<void> nothing, operation;
  End<std::unique_ptr<int>> moved;
  asio::steady_timer timer(bridge.get_executor(), 0s);
  bridge.submit([] { return 1; }, value.function());
  bridge.submit(
      []() -> awaitable<int> {
        co_await asio::post(use_awaitable);
        co_return 2;
      },
      coroutine.function());
  bridge.submit(named("a name", [] { return 3; }), named_task.function());
  bridge.submit([] {}, nothing.function());
  bridge.submit([&] { return timer.async_wait(asio::deferred); }, operation.function());
  bridge.submit([] { return std::make_unique<int>(4); }, moved.function());
  CHECK(value.result() == 1);
  CHECK(coroutine.result() == 2);
  CHECK(named_task.result() == 3);
  CHECK(nothing.result().has_value());
  CHECK(operation.result().has_value());
  CHECK(*moved.result().value() == 4);
  CHECK(value.on() == worker_of(bridge));
  CHECK(coroutine.on() == worker_of(bridge));
  CHECK(bridge.in_flight() == 0);
}

TEST_CASE("on_end: an exception of the task") {
  const RuntimeBridge bridge;
  End<int> end;
  bridge.submit([]() -> int { throw std::runtime_error("failed"); }, end.function());
  CHECK(end.result().error() == BridgeError::ResponseLost);
  CHECK(what(end.result().error().cause()) == "failed");
}

TEST_CASE("on_end: the task is gone before, and the function is destroyed on the worker") {
  const RuntimeBridge bridge;
  const auto worker = worker_of(bridge);
  for (int round = 0; round < 1'000; ++round) {  // the worker may end the task while this thread is still in submit
    bool task_gone = false;
    std::optional<bool> was_gone;
    std::thread::id destroyed_on;
    NotesItsEnd notes(destroyed_on);
    bridge.submit([flag = std::unique_ptr<SetsFlag>(new SetsFlag{task_gone})]() -> awaitable<void> { co_return; },
                  [&, n = std::move(notes)](const Result<void>&) { was_gone = task_gone; });
    unwrap(bridge.block_on([] {}));
    REQUIRE(was_gone == true);
    REQUIRE(destroyed_on == worker);
  }
}

TEST_CASE("on_end: a call that is refused, on the thread that submits") {
  RuntimeBridge bridge;
  bridge.shutdown(Shutdown::drain);
  End<void> after_shutdown, moved_from;
  bool task_gone = false;
  std::optional<bool> was_gone;
  bridge.submit([] {}, after_shutdown.function());
  CHECK(after_shutdown.times() == 1);
  CHECK(after_shutdown.on() == std::this_thread::get_id());
  CHECK(outcome(after_shutdown.result()) == worker_dead);
  bridge.submit([flag = std::shared_ptr<SetsFlag>(new SetsFlag{task_gone})] {},
                [&](const Result<void>&) { was_gone = task_gone; });
  CHECK(was_gone == true);
  const RuntimeBridge other = std::move(bridge);
  bridge.submit([] {}, moved_from.function());  // NOLINT(bugprone-use-after-move)
  CHECK(moved_from.times() == 1);
  CHECK(outcome(moved_from.result()) == worker_dead);
  bridge.submit([] {}, [](const Result<void>&) { throw std::runtime_error("nobody hears it"); });
}

TEST_CASE("on_end: overloaded, or waiting for its turn") {
  Options options;
  options.max_in_flight = 1;
  const RuntimeBridge waits(options);
  options.when_full = WhenFull::refuse;
  const RuntimeBridge refuses(options);
  for (const RuntimeBridge* bridge : {&waits, &refuses}) {
    End<void> first, second;
    std::binary_semaphore may_end(0);
    bridge->submit([&] { may_end.acquire(); }, first.function());
    bridge->submit([] {}, second.function());
    CHECK(second.times() == (bridge == &waits ? 0 : 1));
    may_end.release();
    CHECK(outcome(first.result()) == succeeded);
    CHECK((bridge == &waits ? outcome(second.result()) == succeeded
                            : outcome(second.result()) == BridgeError::Overloaded));
    CHECK(second.times() == 1);
  }
}

TEST_CASE("on_end: what it throws goes to on_stray_exception") {
  std::atomic<int> strays{0};
  Options options;
  options.on_stray_exception = [&](const std::exception_ptr& e) { strays += what(e) == "stray"; };
  RuntimeBridge bridge(options);
  const auto throws = [](const Result<void>&) { throw std::runtime_error("stray"); };
  bridge.submit([] {}, throws);
  bridge.submit(park(), throws);
  unwrap(bridge.block_on([] {}));
  CHECK(strays == 1);
  bridge.shutdown(Shutdown::cancel);
  CHECK(strays == 2);
  bridge.submit([] {}, throws);
  CHECK(strays == 3);
}

TEST_CASE("on_end: no unjoined error, and one end of the call") {
  std::atomic<int> unjoined{0};
  std::atomic<int> ends{0};
  Options options;
  options.on_unjoined_error = [&](const BridgeError&) { ++unjoined; };
  options.on_call_end = [&](const CallEnd& end) { ends += end.error == BridgeError::ResponseLost; };
  const RuntimeBridge bridge(options);
  int ends_before = 0;
  bridge.submit([] { throw std::runtime_error("no"); }, [&](const Result<void>&) { ends_before = ends; });
  unwrap(bridge.block_on([] {}));
  CHECK(ends_before == 1);
  CHECK(unjoined == 0);
  CHECK(bridge.stats().response_lost == 1);
}

TEST_CASE("on_end: the place of the call") {
  const RuntimeBridge bridge;
  const auto here = SourceLocation::current();
  bridge.submit(park(), [](const Result<void>&) {});
  bridge.submit(
      park(), [](const Result<void>&) {}, here);
  bridge.submit(park(), here).detach();
  const auto calls = bridge.calls();
  REQUIRE(calls.size() == 3);
  CHECK(calls[0].where.line() == here.line() + 1);
  CHECK(calls[1].where.line() == here.line());
  CHECK(calls[2].where.line() == here.line());
  CHECK(calls[0].caller == std::thread::id());
}

TEST_CASE("on_end: shutdown and the destructor wait for it") {
  for (const bool destroys : {false, true}) {
    End<void> end;
    auto bridge = std::make_unique<RuntimeBridge>();
    const auto worker = worker_of(*bridge);
    std::latch started(1);
    std::binary_semaphore may_end(0);
    bridge->submit([] {},
                   [&, tell = end.function()](Result<void> result) mutable {
                     started.count_down();
                     may_end.acquire();
                     tell(std::move(result));
                   });
    started.wait();
    CHECK(bridge->in_flight() == 1);
    jthread opener([&] { may_end.release(); });
    if (destroys) {
      bridge.reset();
    } else {
      CHECK(bridge->shutdown(Shutdown::drain));
    }
    CHECK(end.times() == 1);
    CHECK(end.on() == worker);
    CHECK(outcome(end.result()) == succeeded);
  }
}

TEST_CASE("on_end: a hard stop, whatever the task does") {
  const auto ignores = []() -> awaitable<void> {
    co_await asio::this_coro::reset_cancellation_state(asio::disable_cancellation());
    auto parked = park();
    co_await std::move(parked);
  };
  std::array<End<void>, 4> ends;
  Options options;
  options.max_in_flight = 2;
  auto bridge = std::make_unique<RuntimeBridge>(options);
  const auto worker = worker_of(*bridge);
  bridge->submit(ignores, ends[0].function());
  bridge->submit(park(), ends[1].function());
  bridge->submit(park(), ends[2].function());  // waits for its turn
  await_state([&] { return bridge->in_flight() == 2; });
  bridge->submit([] {}, ends[3].function());
  bridge.reset();
  for (auto& end : ends) {
    CHECK(end.times() == 1);
    CHECK(outcome(end.result()) == response_lost);
    CHECK(end.on() == worker);
  }
}

TEST_CASE("on_end: it may submit, shut the bridge down and destroy it") {
  auto bridge = std::make_unique<RuntimeBridge>();
  std::latch destroyed(1);
  End<int> last;
  bridge->submit([] {},
                 [&](const Result<void>&) {
                   bridge->submit([] { return 1; },
                                  [&, tell = last.function()](Result<int> result) mutable {
                                    bridge->shutdown(Shutdown::drain);
                                    bridge.reset();
                                    tell(std::move(result));
                                    destroyed.count_down();
                                  });
                 });
  destroyed.wait();
  CHECK(last.result() == 1);
  CHECK(bridge == nullptr);
}

TEST_CASE("on_end: calls in it are refused on the same bridge") {
  const RuntimeBridge bridge;
  std::optional<Outcome> nested;
  bridge.submit([] {}, [&](const Result<void>&) { nested = outcome(bridge.block_on([] {})); });
  unwrap(bridge.block_on([] {}));
  CHECK(nested == would_deadlock);
}

TEST_CASE("on_end: in a forked child a call is refused, and the parent's do not end", "[child]") {
  std::atomic<int> strays{0};
  Options options;
  options.on_stray_exception = [&](const std::exception_ptr&) { ++strays; };
  const RuntimeBridge bridge(options);
  std::atomic<int> ends{0};
  std::binary_semaphore may_end(0);
  bridge.submit([&] { may_end.acquire(); }, [&](const Result<void>&) { ++ends; });
  CHECK(in_child_process([&] {
          std::optional<Outcome> refused;
          bridge.submit([] {}, [&](const Result<void>& result) { refused = outcome(result); });
          if (refused != worker_dead) return 1;
          bridge.submit([] {}, [](const Result<void>&) { throw std::runtime_error("no hook is called here"); });
          return ends == 0 && strays == 0 ? 0 : 2;
        }) == 0);
  may_end.release();
  unwrap(bridge.block_on([] {}));
  CHECK(ends == 1);
}

// Race: the end of the task, a shutdown, the limit and refusals.
TEST_CASE("on_end: once, when the end races with everything", "[race]") {
  int refused = 0;
  int ended = 0;
  for (int round = 0; round < 1'000; ++round) {
    Options options;
    if (round % 2 == 0) options.max_in_flight = 2;
    if (round % 4 == 0) options.when_full = WhenFull::refuse;
    auto bridge = std::make_unique<RuntimeBridge>(options);
    std::array<std::atomic<int>, 8> told{};
    std::atomic<int> refusals{0};
    std::latch go(3);
    const auto submit = [&](std::size_t first) {
      const auto own = bridge->share();
      const auto self = std::this_thread::get_id();
      go.arrive_and_wait();
      for (std::size_t i = first; i < first + 4; ++i) {
        own.submit(
            [i]() -> awaitable<void> {
              for (std::size_t hop = 0; hop < i; ++hop) co_await asio::post(use_awaitable);
            },
            [&, i, self](const Result<void>&) {
              ++told.at(i);
              refusals += std::this_thread::get_id() == self;
            });
      }
    };
    {
      jthread one([&] { submit(0); });
      jthread two([&] { submit(4); });
      go.arrive_and_wait();
      if (round % 3 == 0) bridge->shutdown(Shutdown::cancel);
      if (round % 3 == 1) bridge.reset();
    }
    bridge.reset();
    for (const auto& times : told) CHECK(times == 1);
    refused += refusals;
    ended += 8 - refusals;
  }
  CHECK(refused > 0);
  CHECK(ended > 0);
}
