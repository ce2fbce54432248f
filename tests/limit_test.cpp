// SPDX-License-Identifier: Apache-2.0
//
// Options::max_in_flight and WhenFull.

#include <array>
#include <atomic>
#include <cstddef>
#include <latch>
#include <mutex>
#include <semaphore>
#include <vector>

#include "support.hpp"

using runtime_bridge::Shutdown;
using runtime_bridge::State;
using runtime_bridge::WhenFull;

namespace {

Options limited(std::size_t max_in_flight, WhenFull when_full = WhenFull::wait) {
  Options options;
  options.max_in_flight = max_in_flight;
  options.when_full = when_full;
  return options;
}

void await_waiting(const RuntimeBridge& bridge, std::size_t number) {
  await_state([&] { return count_calls(bridge, State::waiting) == number; });
}

/// A task that runs until it is told to end, and takes the only turn of its bridge.
class Occupant {
 public:
  explicit Occupant(const RuntimeBridge& bridge) : handle_(bridge.submit([this] { return run_until(may_end_); })) {
    await_state([&] { return bridge.in_flight() == 1; });
  }
  void leave() { may_end_ = true; }

 private:
  std::atomic<bool> may_end_{false};
  JoinHandle<void> handle_;
};

}  // namespace

TEST_CASE("limit: no more tasks run than max_in_flight, in the order of their arrival") {
  RuntimeBridge bridge(limited(2));
  std::vector<int> started;
  int running = 0;
  int most = 0;
  std::vector<JoinHandle<void>> handles;
  for (int i = 0; i < 50; ++i) {
    handles.push_back(bridge.submit([&, i]() -> awaitable<void> {
      started.push_back(i);
      most = std::max(most, ++running);
      for (int hop = 0; hop < i % 4; ++hop) co_await asio::post(use_awaitable);
      --running;
    }));
    CHECK(bridge.in_flight() <= 2);
  }
  for (auto& handle : handles) CHECK(handle.join());
  std::vector<int> order(50);
  for (int i = 0; i < 50; ++i) order[static_cast<std::size_t>(i)] = i;
  CHECK(started == order);
  CHECK(most == 2);
  CHECK(bridge.stats().most_in_flight <= 50);
}

TEST_CASE("limit: a caller waits for its turn, and is seen waiting") {
  RuntimeBridge bridge(limited(1));
  Occupant occupant(bridge);
  Result<int> result;
  jthread caller([&] { result = bridge.block_on([] { return 3; }); });
  await_waiting(bridge, 1);
  CHECK(bridge.in_flight() == 1);
  CHECK(bridge.calls().size() == 2);
  occupant.leave();
  caller.join();
  CHECK(result == 3);
}

TEST_CASE("limit: a deadline ends the wait for a turn") {
  RuntimeBridge bridge(limited(1));
  const Occupant occupant(bridge);
  bool ran = false;
  auto task = [&, end = std::make_shared<int>()] { ran = true; };
  CHECK(outcome(bridge.block_on_for(std::move(task), 5ms)) == Outcome{true, BridgeError::TimedOut});
  CHECK_FALSE(ran);
  CHECK(bridge.calls().size() == 1);
}

#ifdef HAS_STOP_TOKEN
TEST_CASE("limit: a stop ends the wait for a turn") {
  RuntimeBridge bridge(limited(1));
  const Occupant occupant(bridge);
  stop_source source;
  Result<void> result;
  jthread caller([&] { result = bridge.block_on([] {}, source.get_token()); });
  await_waiting(bridge, 1);
  source.request_stop();
  caller.join();
  CHECK(outcome(result) == cancelled_unrun);
}
#endif

TEST_CASE("limit: a submitted call waits for its turn, and can be stopped meanwhile") {
  RuntimeBridge bridge(limited(1));
  Occupant occupant(bridge);
  std::array<std::thread::id, 3> destroyed_on;
  std::array<JoinHandle<int>, 3> handles;
  for (std::size_t i = 0; i < 3; ++i)
    handles[i] = bridge.submit([note = NotesItsEnd(destroyed_on[i]), i] { return static_cast<int>(i); });
  await_waiting(bridge, 3);
  handles[1].request_stop();  // out of the middle of the row
  CHECK(outcome(handles[1].join()) == cancelled_unrun);
  await_waiting(bridge, 2);
  occupant.leave();
  CHECK(handles[0].join() == 0);
  CHECK(handles[2].join() == 2);
  const auto worker = worker_of(bridge);
  for (const auto id : destroyed_on) CHECK(id == worker);
}

TEST_CASE("limit: refuse answers at once") {
  RuntimeBridge bridge(limited(1, WhenFull::refuse));
  Occupant occupant(bridge);
  bool ran = false;
  const auto refused = bridge.block_on([&] { ran = true; });
  CHECK(outcome(refused) == Outcome{true, BridgeError::Overloaded});
  CHECK(refused.error().message() == "runtime_bridge: too many calls are in flight");
  CHECK(make_error_code(BridgeError::Overloaded) == std::errc::resource_unavailable_try_again);
  auto handle = bridge.submit([&] { ran = true; });
  CHECK(handle.done());
  CHECK(outcome(handle.join()) == Outcome{true, BridgeError::Overloaded});
  CHECK_FALSE(ran);
  CHECK(bridge.stats().overloaded == 2);
  CHECK(bridge.stats().most_in_flight == 1);
  occupant.leave();
  await_state([&] { return bridge.in_flight() == 0; });
  CHECK(bridge.block_on([] { return 1; }) == 1);
  (void)bridge.shutdown(Shutdown::drain);
  CHECK(outcome(bridge.block_on([] {})) == worker_dead);
}

TEST_CASE("limit: none may run") {
  CHECK_THROWS_AS(RuntimeBridge(limited(0)), std::system_error);
  const auto bridge = RuntimeBridge::create(limited(0));
  REQUIRE_FALSE(bridge.has_value());
  CHECK(bridge.error() == std::errc::invalid_argument);
}

TEST_CASE("limit: a drain lets those that wait have their turn") {
  RuntimeBridge bridge(limited(1));
  Occupant occupant(bridge);
  auto waiting = bridge.submit([] { return 4; });
  await_waiting(bridge, 1);
  jthread closer([&] { (void)bridge.shutdown(Shutdown::drain); });
  await_closed(bridge);
  occupant.leave();
  CHECK(waiting.join() == 4);
}

TEST_CASE("limit: shutdown(cancel) cancels those that wait") {
  RuntimeBridge bridge(limited(1));
  const Occupant occupant(bridge);
  auto waiting = bridge.submit([] { return 4; });
  await_waiting(bridge, 1);
  CHECK(bridge.shutdown(Shutdown::cancel));
  CHECK(outcome(waiting.join()) == cancelled_unrun);
}

TEST_CASE("limit: those that wait are lost when the bridge is stopped") {
  std::array<JoinHandle<int>, 2> waiting;
  std::thread::id destroyed_on;
  std::thread::id worker;
  {
    RuntimeBridge bridge(limited(1));
    worker = worker_of(bridge);
    bridge.submit(park()).detach();
    waiting[0] = bridge.submit([note = NotesItsEnd(destroyed_on)] { return 1; });
    waiting[1] = bridge.submit([] { return 2; });
    await_waiting(bridge, 2);
  }
  for (auto& handle : waiting) CHECK(outcome(handle.join()) == response_lost);
  CHECK(destroyed_on == worker);
}

TEST_CASE("limit: a ring is found while a call waits for its turn") {
  RuntimeBridge a(limited(1));
  RuntimeBridge b(limited(1));
  Result<Outcome> ring;
  // The task of a holds its only turn and waits for b, whose task calls a: that call would wait for that turn.
  ring = a.block_on([&] { return unwrap(b.block_on([&] { return outcome(a.block_on([] {})); })); });
  REQUIRE(ring);
  CHECK(*ring == would_deadlock);
  CHECK(a.block_on([] { return 1; }) == 1);
}

TEST_CASE("limit: nested calls on another bridge go on") {
  RuntimeBridge outer(limited(2));
  RuntimeBridge inner(limited(1));
  std::atomic<int> sum{0};
  {
    std::vector<jthread> callers;
    callers.reserve(4);
    for (int i = 0; i < 4; ++i) {
      callers.emplace_back([&] {
        for (int n = 0; n < 50; ++n) sum += unwrap(outer.block_on([&] { return unwrap(inner.block_on(seven)); }));
      });
    }
  }
  CHECK(sum == 4 * 50 * 7);
}

TEST_CASE("limit: many short calls in a row use no more stack", "[slow]") {
  RuntimeBridge bridge(limited(1));
  Occupant occupant(bridge);
  std::vector<JoinHandle<void>> handles;
  int ran = 0;
  for (int i = 0; i < 100'000; ++i) handles.push_back(bridge.submit([&] { ++ran; }));
  occupant.leave();
  for (auto& handle : handles) (void)handle.join();
  CHECK(ran == 100'000);
}

TEST_CASE("limit: a task that throws, and one that is cancelled, give up their turn") {
  RuntimeBridge bridge(limited(1));
  for (int i = 0; i < 20; ++i) {
    CHECK(outcome(bridge.block_on([]() -> awaitable<void> {
            co_await asio::post(use_awaitable);
            throw std::runtime_error("boo");
          })) == threw("boo"));
    CHECK(outcome(bridge.block_on_for(park(), 1ms)) == BridgeError::TimedOut);
  }
  CHECK(bridge.in_flight() == 0);
  CHECK(bridge.block_on(seven) == 7);
}

TEST_CASE("limit: ends, deadlines and stops race for turns, and none is lost", "[race]") {
  for (const WhenFull when_full : {WhenFull::wait, WhenFull::refuse}) {
    RuntimeBridge bridge(limited(2, when_full));
    std::atomic<int> running{0};
    std::atomic<bool> too_many{false};
    std::atomic<int> odd{0};
    {
      std::vector<jthread> callers;
      callers.reserve(6);
      for (int i = 0; i < 6; ++i) {
        callers.emplace_back([&, i] {
          for (int n = 0; n < 300; ++n) {
            const auto task = [&]() -> awaitable<void> {
              struct Counted {
                std::atomic<int>& count;
                ~Counted() { --count; }
              };
              if (++running > 2) too_many = true;
              const Counted counted{running};
              co_await sleep_for(std::chrono::milliseconds(n % 2));
            };
            switch ((n + i) % 3) {
              case 0: {
                if (const auto result = bridge.block_on_for(task, std::chrono::microseconds(200 * (n % 5)));
                    !result && result.error() != BridgeError::TimedOut && result.error() != BridgeError::Overloaded)
                  ++odd;
                break;
              }
              case 1: {
                auto handle = bridge.submit([task] { return task(); });
                handle.request_stop();
                if (const auto result = handle.join();
                    !result && result.error() != BridgeError::Cancelled && result.error() != BridgeError::Overloaded)
                  ++odd;
                break;
              }
              default: {
                if (const auto result = bridge.block_on(task); !result && result.error() != BridgeError::Overloaded)
                  ++odd;
              }
            }
          }
        });
      }
    }
    CHECK_FALSE(too_many);
    CHECK(odd == 0);
    CHECK(bridge.in_flight() == 0);
    CHECK(bridge.calls().empty());
    CHECK(bridge.block_on(seven) == 7);
  }
}

TEST_CASE("limit: shutdown races those that wait", "[race]") {
  for (int round = 0; round < 1'000; ++round) {
    std::vector<JoinHandle<int>> handles;
    RuntimeBridge bridge(limited(1));
    for (int i = 0; i < 8; ++i) handles.push_back(bridge.submit(seven));
    const auto how = round % 2 == 0 ? Shutdown::cancel : Shutdown::drain;
    const bool all = bridge.shutdown(how, std::chrono::microseconds(round % 3 == 0 ? 0 : 100 * (round % 50)));
    for (auto& handle : handles) {
      const auto result = handle.join();
      if (result) continue;
      CHECK((result.error() == BridgeError::Cancelled || (!all && result.error() == BridgeError::ResponseLost)));
    }
  }
}
