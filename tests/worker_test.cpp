// SPDX-License-Identifier: Apache-2.0
//
// The worker: how it starts, its name, and what it survives.

#include <pthread.h>
#include <sys/resource.h>

#include <array>
#include <atomic>
#include <latch>
#include <mutex>
#include <set>
#include <stdexcept>

#include "support.hpp"

namespace {

std::string name_of_this_thread() {
  std::array<char, 16> name{};
  pthread_getname_np(pthread_self(), name.data(), name.size());
  return name.data();
}

}  // namespace

TEST_CASE("worker: a call that has returned is not in flight", "[race]") {
  const RuntimeBridge bridge;
  for (int i = 0; i < 20'000; ++i) {
    unwrap(bridge.block_on([] {}));
    REQUIRE(bridge.in_flight() == 0);
  }
}

TEST_CASE("worker: has the given name, truncated to the system's limit") {
  CHECK(RuntimeBridge().block_on(name_of_this_thread) == "runtime-bridge");
  CHECK(RuntimeBridge::with_thread_name("pg-pool").block_on(name_of_this_thread) == "pg-pool");
  CHECK(RuntimeBridge::with_thread_name("a-name-of-more-than-15-bytes").block_on(name_of_this_thread) ==
        "a-name-of-more-");
  CHECK(RuntimeBridge::with_thread_name("").block_on([] { return 1; }) == 1);
}

TEST_CASE("worker: one thread runs everything") {
  RuntimeBridge bridge;
  const auto id = worker_of(bridge);
  std::thread::id raw;
  const auto hop = [&]() -> awaitable<std::thread::id> {
    asio::post(bridge.get_executor(), [&raw] { raw = std::this_thread::get_id(); });
    co_await asio::post(use_awaitable);
    co_return std::this_thread::get_id();
  };
  CHECK(bridge.block_on(hop) == id);
  CHECK(raw == id);
}

TEST_CASE("worker: an exception of a raw handler goes to the hook, and the loop goes on") {
  std::mutex mutex;
  std::vector<std::string> strays;
  Options options;
  options.on_stray_exception = [&](std::exception_ptr stray) {
    const std::lock_guard lock(mutex);
    strays.push_back(what(stray));
    throw std::runtime_error("the hook's own, which is dropped");
  };
  RuntimeBridge bridge(options);
  const auto worker = worker_of(bridge);

  Outcome neighbour;
  std::atomic<bool> may_end{false};
  jthread other([&] { neighbour = outcome(bridge.block_on(run_until(may_end))); });
  await_state([&] { return bridge.in_flight() == 1; });

  asio::post(bridge.get_executor(), [] { throw std::runtime_error("first"); });
  asio::post(bridge.get_executor(), [] { throw 2; });
  CHECK(worker_of(bridge) == worker);
  may_end = true;
  other.join();
  CHECK(neighbour == succeeded);
  const std::lock_guard lock(mutex);
  CHECK(strays == std::vector<std::string>{"first", "not a std::exception"});
}

TEST_CASE("worker: a stray exception without a hook") {
  RuntimeBridge bridge;
  asio::post(bridge.get_executor(), [] { throw std::runtime_error("nobody asked"); });
  CHECK(bridge.block_on([] { return 1; }) == 1);
}

TEST_CASE("worker: in_flight counts the calls that have not ended") {
  RuntimeBridge bridge;
  CHECK(bridge.in_flight() == 0);
  CHECK(bridge.block_on([&] { return bridge.in_flight(); }) == 1u);
  std::atomic<bool> may_end{false};
  {
    std::vector<jthread> callers;
    for (int i = 0; i < 3; ++i) {
      callers.emplace_back([&] { unwrap(bridge.block_on(run_until(may_end))); });
    }
    await_state([&] { return bridge.in_flight() == 3; });
    may_end = true;
  }
  CHECK(bridge.in_flight() == 0);
}

TEST_CASE("start: an eager constructor starts the thread and opens the reactor") {
  const auto descriptors = descriptors_of_this_process();
  {
    RuntimeBridge bridge;
    await_workers(1);
    const auto taken = descriptors_of_this_process();
    CHECK(taken > descriptors);
    asio::steady_timer timer(bridge.get_executor(), 1ms);
    CHECK(bridge.block_on(timer.async_wait(asio::deferred)).has_value());
    CHECK(descriptors_of_this_process() == taken);  // the first timer opens none
  }
  await_workers(0);
  CHECK(descriptors_of_this_process() == descriptors);
}

TEST_CASE("start: without descriptors the constructor fails") {
  std::error_code thrown;
  std::error_code created;
  {
    const Limit limit(RLIMIT_NOFILE, 0);
    try {
      const RuntimeBridge bridge;
    } catch (const std::system_error& e) {
      thrown = e.code();
    }
    const auto result = RuntimeBridge::create();
    if (!result.has_value()) created = result.error();
  }
  CHECK(thrown == std::errc::too_many_files_open);
  CHECK(created == std::errc::too_many_files_open);
  CHECK(RuntimeBridge::create()->block_on([] { return 1; }) == 1);
}

TEST_CASE("start: without descriptors a lazy bridge has an executor, and who uses it fails") {
  const RuntimeBridge bridge(lazy());
  bool thrown = false;
  {
    const Limit limit(RLIMIT_NOFILE, 0);
    const auto executor = bridge.get_executor();
    try {
      const asio::steady_timer timer(executor);
    } catch (const AsioError&) {
      thrown = true;
    }
  }
  CHECK(thrown);
  asio::steady_timer timer(bridge.get_executor(), 0s);
  CHECK(bridge.block_on(timer.async_wait(asio::deferred)));
}

TEST_CASE("start: without a thread the constructor fails", "[child][limit]") {
  // In a child process, since Catch2 may need memory under the limit.
  CHECK(in_child_process([] {
          RuntimeBridge late(lazy());
          std::optional<NoMoreThreads> limit(std::in_place);
          const auto created = RuntimeBridge::create();
          if (created.has_value() || created.error() != std::errc::resource_unavailable_try_again) return 1;
          const auto refused = late.block_on([] { return 1; });
          if (refused.has_value() || refused.error() != BridgeError::WorkerDead) return 2;
          if (code_of(refused.error().cause()) != std::errc::resource_unavailable_try_again) return 3;
          if (late.in_flight() != 0) return 4;

          limit.reset();
          return late.block_on([] { return 0; }).value();
        }) == 0);
}

TEST_CASE("start: the first call starts a lazy worker") {
  const auto descriptors = descriptors_of_this_process();
  RuntimeBridge bridge(lazy());
  await_workers(0);
  CHECK(descriptors_of_this_process() == descriptors);
  CHECK(bridge.block_on([] { return 5; }) == 5);
  await_workers(1);
}

TEST_CASE("start: a lazy bridge that is never called starts no worker") {
  bool ran = false;
  {
    RuntimeBridge bridge(lazy());
    asio::post(bridge.get_executor(), [&ran] { ran = true; });
  }
  CHECK_FALSE(ran);
  await_workers(0);
}

TEST_CASE("start: handlers posted to a lazy bridge run before its first call") {
  RuntimeBridge bridge(lazy());
  bool ran = false;
  asio::post(bridge.get_executor(), [&ran] { ran = true; });
  CHECK(bridge.block_on([&ran] { return ran; }) == true);
}

TEST_CASE("start: a lazy start that fails is WorkerDead with the cause, and the next call tries again") {
  RuntimeBridge bridge(lazy());
  Result<int> refused = 0, submitted = 0;
  {
    const Limit limit(RLIMIT_NOFILE, 0);
    refused = bridge.block_on([] { return 1; });
    submitted = bridge.submit([] { return 1; }).join();
  }
  REQUIRE_FALSE(refused.has_value());
  CHECK(refused.error() == BridgeError::WorkerDead);
  CHECK(code_of(refused.error().cause()) == std::errc::too_many_files_open);
  CHECK(outcome(submitted) == outcome(refused));
  CHECK(bridge.in_flight() == 0);
  CHECK(bridge.block_on([] { return 2; }) == 2);
}

TEST_CASE("start: 64 concurrent first calls start one thread", "[race]") {
  for (int round = 0; round < 20; ++round) {
    RuntimeBridge bridge(lazy());
    std::latch go(64);
    std::mutex mutex;
    std::set<std::thread::id> workers;
    {
      std::vector<jthread> callers;
      for (int i = 0; i < 64; ++i) {
        callers.emplace_back([&] {
          go.arrive_and_wait();
          const auto id = worker_of(bridge);
          const std::lock_guard lock(mutex);
          workers.insert(id);
        });
      }
    }
    REQUIRE(workers.size() == 1);
  }
}

TEST_CASE("start: a lazy bridge that could not start may be destroyed") {
  const RuntimeBridge bridge(lazy());
  const Limit limit(RLIMIT_NOFILE, 0);
  CHECK_FALSE(bridge.block_on([] {}).has_value());
}

// Race: the first call starts the worker while another thread stops its context or shuts the bridge down.
TEST_CASE("start: the first call races with context().stop() and shutdown", "[race]") {
  for (int round = 0; round < 1'000; ++round) {
    RuntimeBridge bridge(lazy());
    std::latch go(2);
    Outcome first;
    jthread caller([&] {
      go.arrive_and_wait();
      first = outcome(bridge.block_on([] { return 1; }));
    });
    go.arrive_and_wait();
    if (round % 2) {
      (void)bridge.shutdown(runtime_bridge::Shutdown::drain);
    } else {
      bridge.get_executor().context().stop();
    }
    caller.join();
    REQUIRE((first == succeeded || first == worker_dead || first == response_lost));
  }
}
