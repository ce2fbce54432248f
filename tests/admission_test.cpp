// SPDX-License-Identifier: Apache-2.0
//
// Calls that have been admitted and are not sent yet. Nothing public holds a call up there, so these tests take the
// lock of the wait graph: a worker that calls another bridge looks for rings under it, between the two steps.

#include <atomic>
#include <mutex>
#include <semaphore>

#include "support.hpp"

using runtime_bridge::Shutdown;

namespace {

// The only place in the tests that names this lock.
std::mutex& wait_mutex = runtime_bridge::detail::WaitNode::mutex;

/// A worker that calls the bridge, and is held up after its call was admitted and before it is sent.
class HeldUpCall {
 public:
  explicit HeldUpCall(const RuntimeBridge& bridge)
      : call_(caller_.submit([&bridge] { return outcome(bridge.block_on([] { return 1; })); })) {
    await_state([&] { return bridge.in_flight() == 1; });
  }

  ~HeldUpCall() {
    if (lock_) lock_.unlock();
  }

  /// Lets the call go on, and returns how it ended.
  Outcome go_on() {
    lock_.unlock();
    return call_.join().value_or(Outcome());
  }

 private:
  RuntimeBridge caller_;
  std::unique_lock<std::mutex> lock_{wait_mutex};
  JoinHandle<Outcome> call_;
};

}  // namespace

TEST_CASE("admission: shutdown(cancel) reaches a call that is sent after it") {
  for (const bool stopped : {false, true}) {
    RuntimeBridge bridge;
    HeldUpCall caller(bridge);
    asio::steady_timer timer(bridge.get_executor(), 24h);
    auto parked = bridge.submit(timer.async_wait(asio::deferred));
    jthread shutter([&] { bridge.shutdown(Shutdown::cancel); });
    CHECK(parked.wait_for(1h));  // all calls have been cancelled
    if (stopped) bridge.get_executor().context().stop();
    CHECK(caller.go_on() == (stopped ? response_lost : cancelled_unrun));
  }
}

TEST_CASE("admission: context().stop() waits for a thread that was admitted and is about to post") {
  RuntimeBridge bridge;
  const Watch worker = *bridge.block_on([] { return Watch(); });
  HeldUpCall caller(bridge);
  std::atomic<bool> goes_on{false};
  asio::post(bridge.get_executor(), [&] {
    asio::post(bridge.get_executor(), [&] { goes_on = true; });
    bridge.get_executor().context().stop();
  });
  await_closed(bridge);
  await_state([&] { return worker.sleeps(); });
  CHECK_FALSE(goes_on);
  CHECK(caller.go_on() == response_lost);
}

TEST_CASE("admission: a wait for a task that has just ended leaves no wait record") {
  RuntimeBridge a, b;
  std::binary_semaphore may_end(0);
  auto task = b.submit([&] { may_end.acquire(); });
  const Watch worker = *a.block_on([] { return Watch(); });
  std::unique_lock lock(wait_mutex);
  std::atomic<bool> about_to{false};
  auto waiting = a.submit([&] {
    about_to = true;
    return outcome(task.join());
  });
  await_state([&] { return about_to && worker.sleeps(); });  // it waits for the lock, since the task is not over
  may_end.release();
  await_state([&] { return task.done(); });
  lock.unlock();
  CHECK(waiting.join() == succeeded);
  CHECK(b.block_on([&] { return outcome(a.block_on([] {})); }) == succeeded);
}
