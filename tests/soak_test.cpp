// SPDX-License-Identifier: Apache-2.0
//
// The same calls for a long time: memory, threads and descriptors must not grow.
//
//   RUNTIME_BRIDGE_SOAK_SECONDS=S  for S seconds instead of two

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <memory>

#include "support.hpp"

namespace {

using Clock = std::chrono::steady_clock;

std::size_t resident_pages() {
  std::size_t size = 0;
  std::size_t resident = 0;
  std::ifstream("/proc/self/statm") >> size >> resident;
  return resident;
}

/// Makes every kind of call once. Returns the number of wrong outcomes.
int all_kinds_of_calls(const RuntimeBridge& bridge) {
  int wrong = 0;
  const auto expect = [&](bool right) { wrong += right ? 0 : 1; };
  expect(bridge.block_on([] { return 7; }) == 7);
  expect(bridge.block_on([]() -> awaitable<std::string> {
    co_await asio::post(use_awaitable);
    co_return std::string(100, 'x');
  }) == std::string(100, 'x'));
  expect(outcome(bridge.block_on([]() -> awaitable<void> {
           co_await asio::post(use_awaitable);
           throw std::runtime_error("no");
         })) == threw("no"));
  expect(bridge.block_on_for(park, 200us).error() == BridgeError::TimedOut);
#ifdef HAS_STOP_TOKEN
  stop_source stop;
  const auto stops_itself = [&]() -> awaitable<void> {
    stop.request_stop();
    co_await park();
  };
  expect(bridge.block_on(stops_itself, stop.get_token()).error() == BridgeError::Cancelled);
#endif
  auto submitted = bridge.submit(park);
  submitted.request_stop();
  expect(submitted.join().error() == BridgeError::Cancelled);
  bridge.submit([]() -> awaitable<void> { co_await asio::post(use_awaitable); }).detach();
  expect(bridge.block_on([&] { return bridge.block_on([] {}).error().kind(); }) == BridgeError::WouldDeadlock);
  return wrong;
}

}  // namespace

TEST_CASE("soak: memory, threads and descriptors do not grow", "[race][slow]") {
  const char* const seconds = std::getenv("RUNTIME_BRIDGE_SOAK_SECONDS");
  const auto length = std::chrono::seconds(seconds ? std::strtoll(seconds, nullptr, 10) : 2);
  const auto begin = Clock::now();
  std::atomic<int> wrong{0};
  std::atomic<std::int64_t> rounds{0};
  std::size_t pages_early = 0;
  std::size_t pages_late = 0;
  std::size_t most_threads = 0;
  std::size_t most_descriptors = 0;
  const std::size_t descriptors = descriptors_of_this_process();
  {
    const RuntimeBridge lasting;
    std::vector<jthread> threads;
    for (int i = 0; i < 3; ++i) {
      threads.emplace_back([&](const stop_token& stop) {
        while (!stop.stop_requested()) {
          wrong += all_kinds_of_calls(lasting);
          ++rounds;
        }
      });
    }
    // And one that makes bridges and destroys them with a call in flight.
    threads.emplace_back([&](const stop_token& stop) {
      while (!stop.stop_requested()) {
        auto bridge = std::make_unique<RuntimeBridge>();
        wrong += all_kinds_of_calls(*bridge);
        auto parked = bridge->submit(park);
        bridge.reset();
        wrong += outcome(parked.join()) == response_lost ? 0 : 1;
      }
    });
    // The peak of memory in the second fifth of the time, after warming up, and in the last.
    while (Clock::now() - begin < length) {
      const auto part = (Clock::now() - begin) * 5 / length;
      if (part == 1) pages_early = std::max(pages_early, resident_pages());
      if (part == 4) pages_late = std::max(pages_late, resident_pages());
      most_threads = std::max(most_threads, entries("/proc/self/task"));
      most_descriptors = std::max(most_descriptors, descriptors_of_this_process());
      std::this_thread::sleep_for(10ms);
    }
  }
  CHECK(wrong == 0);
  // Callers, two workers and this thread; a joined thread of each may still be listed.
  CHECK(most_threads <= 9);
  CHECK(most_descriptors <= descriptors + 7);  // three for each of two bridges, and one for the listing
  await_workers(0);
  CHECK(descriptors_of_this_process() == descriptors);
#ifndef SANITIZED  // the sanitizers keep freed memory for a while
  CHECK(pages_late <= pages_early + pages_early / 20 + 64);
#endif
  std::printf("%lld rounds of all kinds of calls, %zu pages early, %zu late, at most %zu threads\n",
              static_cast<long long>(rounds), pages_early, pages_late, most_threads);
}
