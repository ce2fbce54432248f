// SPDX-License-Identifier: Apache-2.0
//
// Spinning before sleeping: when and for how long. It changes nothing but speed.

#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <future>
#include <optional>
#include <string>
#include <thread>
#include <vector>

#include "support.hpp"

using runtime_bridge::Shutdown;
using runtime_bridge::detail::Backoff;

namespace {

std::atomic<bool> yields_at_once{false};
thread_local std::atomic<int> yields{0};

}  // namespace

/// Replaces the C library's, to count the calls.
extern "C" int sched_yield() noexcept {
  ++yields;
  return yields_at_once ? 0 : static_cast<int>(syscall(SYS_sched_yield));
}

namespace {

RuntimeBridge spinning_for(std::chrono::microseconds limit) { return RuntimeBridge(Options{.spin_limit = limit}); }

/// A thread that waits for a task, which the destructor ends.
class Caller {
 public:
  explicit Caller(const RuntimeBridge& bridge) : timer_(bridge.get_executor(), 24h) {
    std::promise<Watch> begun;
    thread_ = std::thread([&] {
      const Watch self;
      yields_ = &::yields;
      const auto task = [&]() -> awaitable<void> {
        begun.set_value(self);
        co_await timer_.async_wait(use_awaitable);
      };
      (void)bridge.block_on(task);
    });
    watch_ = begun.get_future().get();
  }
  Caller(const Caller&) = delete;
  Caller& operator=(const Caller&) = delete;
  ~Caller() {
    asio::post(timer_.get_executor(), [this] { timer_.cancel(); });
    thread_.join();
  }

  const Watch& watch() const { return watch_; }
  int yields() const { return *yields_; }

 private:
  std::atomic<int>* yields_ = nullptr;
  Watch watch_;
  asio::steady_timer timer_;
  std::thread thread_;
};

// A spinning thread uses this much CPU time sooner or later. A sleeping one does not.
constexpr auto some = 5ms;

void await_spinning(const Watch& thread) {
  const auto before = thread.cpu();
  await_state([&] { return thread.cpu() - before > some; });
}
void await_sleep(const Watch& thread) {
  await_state([&] { return thread.sleeps(); });
}

const bool one_core = std::thread::hardware_concurrency() == 1;

}  // namespace

TEST_CASE("spin: each failure doubles the skipped attempts, and a success resets them") {
  Backoff backoff;
  int tries = 0;
  for (int i = 0; i < 1000; ++i) {
    if (!backoff.should_try()) continue;
    ++tries;
    backoff.record(false);
  }
  CHECK(tries == 10);  // it skips 1, 3, 7, ... 255 attempts, and then 255 each time
  while (!backoff.should_try()) {
  }
  backoff.record(true);
  CHECK(backoff.should_try());
  backoff.record(true);
  CHECK(backoff.should_try());
}

TEST_CASE("spin: a caller spins as long as the limit allows", "[timing]") {
  if (one_core) return;
  const RuntimeBridge long_one = spinning_for(1h);
  await_spinning(Caller(long_one).watch());
  const RuntimeBridge short_one = spinning_for(20us);
  await_sleep(Caller(short_one).watch());
}

TEST_CASE("spin: a limit of zero or less means no spinning", "[timing]") {
  for (const auto limit : {0us, std::chrono::microseconds::min()}) {
    const RuntimeBridge bridge = spinning_for(limit);
    const Caller caller(bridge);
    await_sleep(caller.watch());
    CHECK(caller.watch().cpu() < some);
  }
}

TEST_CASE("spin: with another call in flight a caller soon sleeps", "[timing]") {
  const RuntimeBridge bridge = spinning_for(1h);
  const auto other = bridge.submit(park());
  await_sleep(Caller(bridge).watch());
}

TEST_CASE("spin: a caller stops spinning when another call comes", "[timing]") {
  const RuntimeBridge bridge = spinning_for(1h);
  const Caller caller(bridge);
  if (!one_core) await_spinning(caller.watch());
  const auto other = bridge.submit(park());
  await_sleep(caller.watch());
}

TEST_CASE("spin: with another call in flight a caller yields before it sleeps, up to 64 times", "[timing]") {
  if (one_core) return;
  const RuntimeBridge bridge;
  const auto other = bridge.submit(park());
  yields_at_once = true;  // or a caller may see that another thread computes
  {
    const Caller caller(bridge);
    await_sleep(caller.watch());
    CHECK(caller.yields() >= 1);
    CHECK(caller.yields() <= 64);
  }
  yields_at_once = false;
}

// For a condition that fails while the machine is busy with something else.
template <class Condition>
bool sooner_or_later(Condition condition) {
  const auto end = std::chrono::steady_clock::now() + 20s;
  while (!condition()) {
    if (std::chrono::steady_clock::now() > end) return false;
  }
  return true;
}

void pin(pthread_t thread, unsigned processor) {
  cpu_set_t set;
  CPU_ZERO(&set);
  CPU_SET(processor, &set);
  pthread_setaffinity_np(thread, sizeof(set), &set);
}

TEST_CASE("spin: callers stop yielding if other threads keep every core busy", "[timing]") {
  if (one_core) return;
  std::vector<jthread> busy;
  for (unsigned i = 0; i < std::thread::hardware_concurrency(); ++i) {
    busy.emplace_back([](const stop_token& stop) {
      while (!stop.stop_requested()) {
      }
    });
    pin(busy.back().native_handle(), i);
  }
  const auto twenty_hops = []() -> awaitable<void> {
    for (int i = 0; i < 20; ++i) co_await asio::post(use_awaitable);
  };
  const auto seldom_slow = [&] {
    pin(pthread_self(), 0);
    const RuntimeBridge bridge;
    unwrap(bridge.block_on([] { pin(pthread_self(), 1); }));
    int calls = 0;
    int slow = 0;  // as if preempted, which may happen to a spinning thread, but not in every call
    for (const auto end = std::chrono::steady_clock::now() + 200ms; std::chrono::steady_clock::now() < end; ++calls) {
      const auto begin = std::chrono::steady_clock::now();
      unwrap(bridge.block_on(twenty_hops));
      if (std::chrono::steady_clock::now() - begin > 1ms) ++slow;
    }
    return slow < calls / 4;
  };
  CHECK(sooner_or_later([&] { return std::async(std::launch::async, seldom_slow).get(); }));
}

TEST_CASE("spin: quick calls work after many slow ones") {
  const RuntimeBridge bridge;
  for (int i = 0; i < 20; ++i) REQUIRE(bridge.block_on(sleep_for(1ms)));
  for (int i = 0; i < 5000; ++i) REQUIRE(bridge.block_on([&] { return i; }) == i);
}

TEST_CASE("spin: an idle bridge uses no CPU time", "[timing]") {
  const RuntimeBridge bridge;
  for (int i = 0; i < 1000; ++i) REQUIRE(bridge.block_on([&] { return i; }) == i);
  std::this_thread::sleep_for(20ms);  // many times the limit
  const auto before = cpu_time(CLOCK_PROCESS_CPUTIME_ID);
  std::this_thread::sleep_for(200ms);
  CHECK(cpu_time(CLOCK_PROCESS_CPUTIME_ID) - before < 5ms);
}

namespace {

/// Makes calls until the worker keeps itself awake.
Watch wake(const RuntimeBridge& bridge) {
  const Watch worker = *bridge.block_on([] { return Watch(); });
  const auto stays_awake = [&] {
    const auto before = worker.cpu();
    await_state([&] { return worker.cpu() - before > some || worker.sleeps(); });
    return worker.cpu() - before > some;
  };
  // On a busy machine the first calls may not be enough.
  do {
    for (int i = 0; i < 300; ++i) REQUIRE(bridge.block_on([] {}));
  } while (!one_core && !stays_awake());
  return worker;
}

}  // namespace

TEST_CASE("spin: a worker that stays awake serves everything else", "[timing]") {
  const RuntimeBridge bridge = spinning_for(std::chrono::microseconds::max());
  wake(bridge);
  std::promise<void> posted;
  asio::post(bridge.get_executor(), [&] { posted.set_value(); });
  posted.get_future().wait();
  CHECK(bridge.block_on(sleep_for(1ms)));
  CHECK(bridge.submit([] { return 7; }).join() == 7);
}

TEST_CASE("spin: a worker that stays awake sleeps in the end", "[timing]") {
  const RuntimeBridge bridge = spinning_for(100ms);
  await_sleep(wake(bridge));
}

TEST_CASE("spin: a worker that stays awake does not delay the end", "[timing]") {
  int i = 0;
  const auto end = [&i] {
    std::optional<RuntimeBridge> bridge(spinning_for(std::chrono::microseconds::max()));
    wake(*bridge);
    const auto begin = std::chrono::steady_clock::now();
    if (i % 3 == 1) CHECK(bridge->shutdown(Shutdown::drain));
    if (i % 3 == 2) CHECK(bridge->shutdown(Shutdown::cancel));
    ++i;
    bridge.reset();
    return std::chrono::steady_clock::now() - begin;
  };
  CHECK(quickest(end, 9) < 200ms);  // how long a stop waits for foreign threads
}
