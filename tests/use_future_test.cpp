// SPDX-License-Identifier: Apache-2.0
//
// What docs/migrating.md says about `co_spawn(context, task, use_future).get()`, with the Asio in use. A wait counts as
// endless if it takes 100 ms.

#include <atomic>
#include <chrono>
#include <future>
#include <stdexcept>

#include "support.hpp"

namespace {

/// A context and its thread, as users write them.
class Naive {
 public:
  Naive() : thread_([this] { context.run(); }) {}
  ~Naive() {
    context.stop();
    thread_.join();
  }

  asio::io_context context;

 private:
  asio::executor_work_guard<asio::io_context::executor_type> work_{context.get_executor()};
  std::thread thread_;
};

bool hangs(std::future<int>& future) { return future.wait_for(100ms) == std::future_status::timeout; }

}  // namespace

TEST_CASE("use_future: hangs when the context was stopped before the call") {
  Naive naive;
  naive.context.stop();
  auto future = asio::co_spawn(naive.context, seven(), asio::use_future);
  CHECK(hangs(future));
}

TEST_CASE("use_future: hangs when it is called from a task on the worker") {
  Naive naive;
  std::promise<bool> hung;
  asio::post(naive.context, [&] {
    auto future = asio::co_spawn(naive.context, seven(), asio::use_future);
    hung.set_value(hangs(future));
  });
  CHECK(hung.get_future().get());
}

#ifndef SANITIZED
TEST_CASE("use_future: hangs in a forked child", "[child]") {
  Naive naive;
  CHECK(in_child_process([&] {
          alarm(2);  // the post may hang, too, on a lock that was held during the fork
          auto future = asio::co_spawn(naive.context, seven(), asio::use_future);
          return hangs(future) ? 0 : 1;
        }) != 1);
}

TEST_CASE("use_future: one stray exception in any handler ends the program", "[child]") {
  CHECK(in_child_process([] {
          std::set_terminate([] { _exit(66); });
          Naive naive;
          asio::post(naive.context, [] { throw std::runtime_error("stray"); });
          auto future = asio::co_spawn(naive.context, seven(), asio::use_future);
          future.wait_for(10s);
          return 0;
        }) == 66);
}
#endif

/// Its destructor waits until the caller has returned. If get() waited for the destructor, the test would hang.
struct Capture {
  explicit Capture(std::shared_future<void> back) : caller_is_back(std::move(back)) {}
  Capture(Capture&&) = default;
  ~Capture() {
    if (caller_is_back.valid()) caller_is_back.wait();
  }
  std::shared_future<void> caller_is_back;
};

TEST_CASE("use_future: the captures of the callable outlive get()") {
  for (int round = 0; round < 20; ++round) {
    Naive naive;
    std::promise<void> caller_is_back;
    auto task = [capture = Capture(caller_is_back.get_future().share())]() { return seven(); };
    const int value = asio::co_spawn(naive.context, std::move(task), asio::use_future).get();
    CHECK(value == 7);
    caller_is_back.set_value();
  }
}

TEST_CASE("use_future: the task runs on after a timeout") {
  Naive naive;
  std::atomic<bool> ran_on{false};
  std::promise<void> caller_has_left;
  auto left = caller_has_left.get_future();
  const auto task = [&]() -> awaitable<int> {
    while (left.wait_for(0s) != std::future_status::ready) co_await asio::post(use_awaitable);
    ran_on = true;
    co_return 7;
  };
  {
    auto future = asio::co_spawn(naive.context, task, asio::use_future);
    CHECK(future.wait_for(1ms) == std::future_status::timeout);
  }
  caller_has_left.set_value();
  await_state([&] { return ran_on.load(); });
}
