// SPDX-License-Identifier: Apache-2.0
//
// A call is over when it returns: after the caller woke, nothing of the call is used or destroyed on the worker.

#include <atomic>
#include <memory>
#include <mutex>
#include <semaphore>
#include <stdexcept>

#include "support.hpp"

namespace {

/// Records what was destroyed, by which thread, and whether the caller had already returned.
class Log {
 public:
  void caller_is_back() {
    const std::lock_guard lock(mutex_);
    back_ = true;
  }
  void destroyed(const std::string& name) {
    const std::lock_guard lock(mutex_);
    entries_ += name + (back_ ? " late" : "") + (std::this_thread::get_id() == caller_ ? " by caller; " : "; ");
  }
  std::string entries() {
    const std::lock_guard lock(mutex_);
    return entries_;
  }

 private:
  const std::thread::id caller_ = std::this_thread::get_id();
  std::mutex mutex_;
  bool back_ = false;
  std::string entries_;
};

class Probe {
 public:
  Probe(std::shared_ptr<Log> log, std::string name) : log_(std::move(log)), name_(std::move(name)) {}
  Probe(Probe&&) = default;
  ~Probe() {
    if (log_) log_->destroyed(name_);
  }

 private:
  std::shared_ptr<Log> log_;
  std::string name_;
};

enum class End { value, exception, stopped };

awaitable<int> probed(Probe, std::shared_ptr<Log> log, End end, std::binary_semaphore* parked, bool hop) {
  const Probe local(log, "local");
  if (hop) co_await asio::post(use_awaitable);
  if (end == End::exception) throw std::runtime_error("end");
  if (end == End::stopped) {
    parked->release();
    co_await park();
  }
  co_return 1;
}

/// Makes one call that ends in this way, and returns the log after the worker has ended.
template <class MakeTask>
std::string log_of_call(End end, MakeTask make_task) {
  auto log = std::make_shared<Log>();
  std::binary_semaphore parked(0);
  jthread stopper;
  {
    RuntimeBridge bridge;
    if (end == End::stopped) {
      stopper = jthread([&] {
        parked.acquire();
        bridge.get_executor().context().stop();
      });
    }
    {
      (void)bridge.block_on(make_task(log, &parked));
      log->caller_is_back();
    }
  }
  return log->entries();
}

}  // namespace

TEST_CASE("lifetime: locals and parameters are destroyed before the caller returns, captures with its callable") {
  for (const auto end : {End::value, End::exception, End::stopped}) {
    for (const bool hop : {false, true}) {
      CAPTURE(static_cast<int>(end), hop);
      for (int round = 0; round < 20; ++round) {
        const std::string history = log_of_call(end, [&](auto log, auto* parked) {
          return [capture = Probe(log, "capture"), log, end, parked, hop] {
            return probed(Probe(log, "parameter"), log, end, parked, hop);
          };
        });
        // The temporary callable is destroyed by the caller, at the end of its full expression.
        REQUIRE(history == "local; parameter; capture by caller; ");
      }
    }
  }
}

TEST_CASE("lifetime: an awaitable made by the caller") {
  for (const auto end : {End::value, End::exception, End::stopped}) {
    for (const bool hop : {false, true}) {
      const std::string history = log_of_call(
          end, [&](auto log, auto* parked) { return probed(Probe(log, "parameter"), log, end, parked, hop); });
      CHECK(history == "local; parameter; ");
    }
  }
}

TEST_CASE("lifetime: the captures of a lambda coroutine live as long as its coroutine") {
  for (const auto end : {End::value, End::exception, End::stopped}) {
    const std::string history = log_of_call(end, [&](auto log, auto* parked) {
      return [capture = Probe(log, "capture"), log, end, parked]() -> awaitable<int> {
        auto inner = probed(Probe(log, "parameter"), log, end, parked, true);
        co_return co_await std::move(inner);
      };
    });
    CHECK(history == "local; parameter; capture by caller; ");
  }
}

TEST_CASE("lifetime: a plain callable") {
  const std::string history = log_of_call(End::value, [](auto log, auto*) {
    return [capture = Probe(log, "capture"), log] { const Probe local(log, "local"); };
  });
  CHECK(history == "local; capture by caller; ");
}

TEST_CASE("lifetime: only the task's exception outlives the task") {
  RuntimeBridge bridge;
  const auto in_exception = std::make_shared<int>(1);
  struct Failure {
    std::shared_ptr<int> held;
  };
  {
    const auto result = bridge.block_on([&]() -> awaitable<void> {
      throw Failure{in_exception};
      co_return;
    });
    CHECK(in_exception.use_count() == 2);
    CHECK_THROWS_AS(unwrap(result), Failure);
  }
  CHECK(in_exception.use_count() == 1);
}

// Race, for ASan and TSan: the caller returns and its stack frame is destroyed while the worker still ends the call.
TEST_CASE("lifetime: tasks borrow the caller's stack, ten thousand times", "[race]") {
  RuntimeBridge bridge;
  const auto borrow_in_a_frame_that_dies = [&bridge](int round) {
    int local = round;
    const auto task = [&local]() -> awaitable<int> {
      if (local % 2) co_await asio::post(use_awaitable);
      if (local % 3 == 0) throw std::runtime_error("third");
      co_return ++local;
    };
    const auto result = bridge.block_on(task);
    return result.has_value() ? *result - 1 : local;
  };
  for (int round = 0; round < 10'000; ++round) REQUIRE(borrow_in_a_frame_that_dies(round) == round);
  CHECK(bridge.in_flight() == 0);
}
