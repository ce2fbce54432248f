// SPDX-License-Identifier: Apache-2.0
//
// submit and JoinHandle.

#include <array>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <latch>
#include <memory>
#include <optional>
#include <semaphore>
#include <stdexcept>

#include "support.hpp"

using runtime_bridge::Shutdown;

namespace {

awaitable<std::unique_ptr<int>> boxed(int n) { co_return std::make_unique<int>(n); }

/// A task of some size and alignment. It counts its instances, and its copies throw if that is asked for.
template <std::size_t size, std::size_t alignment = 1>
class Sized {
 public:
  Sized(std::atomic<int>& instances, bool throws) : instances_(&instances), throws_(throws) { ++*instances_; }
  Sized(const Sized& other) : instances_(other.instances_), throws_(other.throws_) {
    if (throws_) throw std::runtime_error("cannot be copied");
    ++*instances_;
  }
  Sized& operator=(const Sized&) = delete;
  ~Sized() { --*instances_; }

  bool operator()() const { return reinterpret_cast<std::uintptr_t>(this) % alignof(Sized) == 0; }

 private:
  std::atomic<int>* instances_;
  bool throws_;
  alignas(alignment) std::array<std::byte, size> data_;
};

}  // namespace

TEST_CASE("submit: returns at once, and join returns the value") {
  RuntimeBridge bridge;
  std::atomic<bool> may_end{false};
  auto handle = bridge.submit([&may_end]() -> awaitable<int> {
    co_await run_until(may_end);
    co_return 3;
  });
  CHECK(handle.joinable());
  CHECK_FALSE(handle.done());
  CHECK_FALSE(handle.wait_for(1ms));
  CHECK(bridge.in_flight() == 1);
  may_end = true;
  CHECK(handle.wait_for(std::chrono::hours::max()));
  CHECK(handle.done());
  CHECK(handle.join() == 3);
  CHECK_FALSE(handle.joinable());
  CHECK(handle.done());
  CHECK(handle.wait_for(0s));
  CHECK_THROWS_AS(handle.join(), std::system_error);
  handle = bridge.submit([] { return 4; });
  CHECK(handle.joinable());
  CHECK(handle.join() == 4);
}

TEST_CASE("submit: every kind of Task, owned") {
  RuntimeBridge bridge;
  CHECK(bridge.submit(seven()).join() == 7);
  CHECK(**bridge.submit(boxed(4)).join() == 4);
  CHECK(bridge.submit([text = std::string(100, 'x')] { return text.size(); }).join() == 100u);
  CHECK(bridge.submit([] {}).join().has_value());
  const auto named = [n = 5] { return n; };
  CHECK(bridge.submit(named).join() == 5);
  auto owns = [p = std::make_unique<int>(6)]() -> awaitable<int> {
    co_await asio::post(use_awaitable);
    co_return *p;
  };
  auto owner = bridge.submit(std::move(owns));
  CHECK(owner.join() == 6);
  asio::steady_timer timer(bridge.get_executor(), 1ms);
  CHECK(bridge.submit(timer.async_wait(asio::deferred)).join().has_value());
}

TEST_CASE("submit: what the task owns is destroyed on the worker before the task is done") {
  RuntimeBridge bridge;
  const auto worker = worker_of(bridge);
  for (int round = 0; round < 200; ++round) {
    std::thread::id coroutine, plain;
    auto first = bridge.submit([n = NotesItsEnd(coroutine)] { return seven(); });
    auto second = bridge.submit([n = NotesItsEnd(plain)] {});
    CHECK(first.join() == 7);
    CHECK(second.join().has_value());
    REQUIRE(coroutine == worker);
    REQUIRE(plain == worker);
  }
}

// Race: a second stop uses the call while it ends. It must not be the one that destroys the task.
TEST_CASE("submit: a stop that races with the end of a task does not destroy it elsewhere", "[race]") {
  const RuntimeBridge bridge;
  const auto worker = worker_of(bridge);
  for (int round = 0; round < 5'000; ++round) {
    std::thread::id coroutine;
    auto handle = bridge.submit([n = NotesItsEnd(coroutine)] { return seven(); });
    handle.request_stop();
    while (!handle.done()) handle.request_stop();
    REQUIRE(coroutine == worker);
  }
}

// Small tasks are stored in the call, others on the heap.
TEMPLATE_TEST_CASE("submit: a task of any size and alignment is destroyed once", "", (Sized<1>), (Sized<48>),
                   (Sized<49>), (Sized<4096>), (Sized<1, 16>), (Sized<1, 32>), (Sized<1, 64>), (Sized<256, 64>)) {
  RuntimeBridge bridge;
  std::atomic<int> instances{0};
  const TestType task(instances, false);
  CHECK(bridge.submit(task).join() == true);
  await_state([&] { return instances == 1; });

  const TestType throwing(instances, true);
  CHECK_THROWS_WITH(bridge.submit(throwing), "cannot be copied");
  CHECK(bridge.in_flight() == 0);
  CHECK(instances == 2);
}

TEST_CASE("submit: a task that throws, and a bridge that is gone") {
  std::optional<RuntimeBridge> bridge(std::in_place);
  auto failed = bridge->submit([]() -> int { throw std::runtime_error("no"); });
  auto parked = bridge->submit(park());
  auto finished = bridge->submit(seven());
  CHECK(finished.wait_for(1h));
  bridge->get_executor().context().stop();
  CHECK(parked.wait_for(1h));
  auto refused = bridge->submit([] { return 1; });
  bridge.reset();

  // The handles outlive the bridge.
  CHECK(outcome(failed.join()) == threw("no"));
  CHECK(outcome(parked.join()) == response_lost);
  CHECK(finished.join() == 7);
  CHECK(refused.done());
  CHECK(outcome(refused.join()) == worker_dead);

  RuntimeBridge moved;
  const RuntimeBridge heir = std::move(moved);
  auto of_moved = moved.submit([] { return 1; });  // NOLINT(bugprone-use-after-move)
  of_moved.request_stop();
  CHECK(outcome(of_moved.join()) == worker_dead);
}

TEST_CASE("submit: a handle without a task") {
  JoinHandle<int> handle;
  handle.request_stop();
  handle.detach();
  CHECK_FALSE(handle.joinable());
  CHECK(handle.done());
  CHECK(handle.wait_for(1h));
  CHECK_THROWS_AS(handle.join(), std::system_error);
}

TEST_CASE("submit: a worker that gave up waiting may be gone when the task ends") {
  const RuntimeBridge bridge;
  auto parked = bridge.submit(park);
  CHECK(RuntimeBridge().block_on([&] { return parked.wait_for(1ms); }) == false);
  parked.request_stop();
  CHECK_FALSE(parked.join().has_value());
}

TEST_CASE("submit: request_stop cancels the task, and has no effect once it is over") {
  RuntimeBridge bridge;
  auto parked = bridge.submit(park());
  parked.request_stop();
  const auto stopped = parked.join();
  REQUIRE_FALSE(stopped.has_value());
  CHECK(stopped.error() == BridgeError::Cancelled);

  auto failed = bridge.submit([]() -> int { throw std::runtime_error("before the stop"); });
  CHECK(failed.wait_for(1h));
  failed.request_stop();
  CHECK(outcome(failed.join()) == threw("before the stop"));
}

// Race: one thread joins while another requests a stop.
TEST_CASE("submit: a stop races with join", "[race]") {
  RuntimeBridge bridge;
  for (int round = 0; round < 1'000; ++round) {
    auto handle = bridge.submit(park());
    jthread stopper([&handle] {
      while (!handle.done()) handle.request_stop();
    });
    REQUIRE(handle.join().error() == BridgeError::Cancelled);
  }
}

TEST_CASE("submit: a task that is stopped before it was started does not run") {
  RuntimeBridge bridge;
  std::binary_semaphore go_on(0);
  asio::post(bridge.get_executor(), [&] { go_on.acquire(); });
  bool ran = false;
  auto plain = bridge.submit([&ran] { ran = true; });
  auto coroutine = bridge.submit(seven());
  plain.request_stop();
  coroutine.request_stop();
  go_on.release();
  CHECK(plain.join().error() == BridgeError::Cancelled);
  CHECK(coroutine.join().error() == BridgeError::Cancelled);
  CHECK_FALSE(ran);
}

TEST_CASE("submit: the handle's destructor stops and joins") {
  RuntimeBridge bridge;
  bool gone = false;
  const auto task = [&gone]() -> awaitable<void> {
    const SetsFlag local{gone};
    co_await park();
  };
  {
    const auto handle = bridge.submit(task);
    await_calls(bridge, 1);
  }
  CHECK(gone);

  gone = false;
  auto handle = bridge.submit(task);
  await_calls(bridge, 1);
  handle = bridge.submit([] {});  // assignment does the same
  CHECK(gone);
  CHECK(handle.join().has_value());
}

TEST_CASE("submit: on the worker everything works except join") {
  RuntimeBridge bridge;
  Outcome joined;
  bool done = true;
  bool waited = true;
  JoinHandle<int> survivor;
  unwrap(bridge.block_on([&] {
    auto handle = bridge.submit(seven());
    done = handle.done();
    waited = handle.wait_for(std::chrono::hours::max());
    joined = outcome(handle.join());
    survivor = std::move(handle);  // the refused join has kept the task

    const auto dropped = bridge.submit(park());  // its destructor cannot wait either
  }));
  CHECK_FALSE(done);
  CHECK_FALSE(waited);
  CHECK(joined == would_deadlock);
  CHECK(survivor.join() == 7);
  await_state([&] { return bridge.in_flight() == 0; });

  Outcome of_done;
  auto finished = bridge.submit(seven());
  CHECK(finished.wait_for(1h));
  unwrap(bridge.block_on([&] { of_done = outcome(finished.join()); }));
  CHECK(of_done == succeeded);
}

TEST_CASE("submit: rings through handles") {
  RuntimeBridge a, b;
  Outcome of_b, of_a;
  std::atomic<bool> a_waits{false};
  auto on_b = b.submit([&]() -> awaitable<void> {
    co_await run_until(a_waits);
    // A's worker waits for this task, through its handle.
    for (;;) {
      of_b = outcome(a.block_on([] {}));
      if (of_b == would_deadlock) co_return;
    }
  });
  unwrap(a.block_on([&] {
    a_waits = true;
    of_a = outcome(on_b.join());
  }));
  CHECK(of_a == succeeded);
  CHECK(of_b == would_deadlock);
  // A wait that timed out leaves no wait record.
  unwrap(a.block_on([&] {
    auto parked = b.submit(park());
    (void)parked.wait_for(1ms);
    parked.detach();
  }));
  CHECK(b.block_on([&] { return *a.block_on([] { return 2; }); }) == 2);
}

TEST_CASE("submit: ten thousand at once", "[slow]") {
  RuntimeBridge bridge;
  std::vector<JoinHandle<int>> handles;
  handles.reserve(10'000);
  for (int i = 0; i < 10'000; ++i) {
    handles.push_back(bridge.submit([i]() -> awaitable<int> {
      co_await asio::post(use_awaitable);
      co_return i;
    }));
  }
  long sum = 0;
  for (auto& handle : handles) sum += *handle.join();
  CHECK(sum == 10'000L * 9'999 / 2);
  CHECK(bridge.in_flight() == 0);
}

// Race: a handle is destroyed or requests a stop while its task completes.
TEST_CASE("submit: destruction of a handle races with completion", "[race]") {
  RuntimeBridge bridge;
  const auto alive = std::make_shared<int>(0);
  for (int round = 0; round < 5'000; ++round) {
    auto handle = bridge.submit([alive, round]() -> awaitable<void> {
      for (int hop = 0; hop < round % 4; ++hop) co_await asio::post(use_awaitable);
    });
    if (round % 3 == 0) handle.request_stop();
    if (round % 7 == 0) handle.detach();
  }
  await_state([&] { return bridge.in_flight() == 0; });
  unwrap(bridge.block_on([] {}));
  CHECK(alive.use_count() == 1);
}

// Found by the stress test: the handle's stop was posted in the memory of a call that had never been sent.
TEST_CASE("submit: a refused call is over and its task destroyed") {
  const RuntimeBridge bridge(lazy());  // without a worker, so handlers stay in the queue
  REQUIRE(bridge.shutdown(Shutdown::drain));
  auto owned = std::make_shared<int>(0);
  const std::weak_ptr<int> watch = owned;
  auto handle = bridge.submit([o = std::move(owned)] {});
  CHECK(watch.expired());
  handle.request_stop();
  auto& context = bridge.get_executor().context();
  context.restart();
  CHECK(context.poll() == 0);
  CHECK(handle.join().error() == BridgeError::WorkerDead);
}

// Race, for TSan: other threads use a handle while it is detached.
TEST_CASE("submit: detach runs concurrently with request_stop and done") {
  const RuntimeBridge bridge;
  for (int round = 0; round < 300; ++round) {
    auto handle = bridge.submit([]() -> awaitable<void> { co_await asio::post(use_awaitable); });
    std::latch go(3);
    {
      jthread stopper([&] {
        go.arrive_and_wait();
        handle.request_stop();
      });
      jthread asker([&] {
        go.arrive_and_wait();
        (void)handle.done();
      });
      go.arrive_and_wait();
      handle.detach();
    }
    REQUIRE(handle.done());
    REQUIRE_FALSE(handle.joinable());
    REQUIRE_THROWS_AS(handle.join(), std::system_error);
  }
}

TEST_CASE("submit: a detached task is not stopped by its handle") {
  const RuntimeBridge bridge;
  std::atomic<bool> may_end{false};
  std::atomic<int> ended{0};
  {
    auto handle = bridge.submit([&]() -> awaitable<void> {
      co_await run_until(may_end);
      ++ended;
    });
    handle.detach();
    CHECK_FALSE(handle.joinable());
    CHECK(handle.done());
    handle.request_stop();
  }
  CHECK(bridge.in_flight() == 1);
  may_end = true;
  await_state([&] { return bridge.in_flight() == 0; });
  CHECK(ended == 1);
}
