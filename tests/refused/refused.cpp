// SPDX-License-Identifier: Apache-2.0
//
// Compiled once for each CASE. The words that the compiler must say are in CMakeLists.txt.

#include <chrono>
#include <coroutine>
#include <memory>
#include <mutex>
#include <runtime_bridge/hosted.hpp>
#include <utility>

#include "../asio.hpp"

using asio::deferred;
using runtime_bridge::RuntimeBridge;

asio::awaitable<int> task() { co_return 1; }
asio::awaitable<int, asio::thread_pool::executor_type> task_of_a_pool() { co_return 1; }

/// As Boost.Asio's.
namespace other_asio {
template <class T, class Executor = asio::any_io_executor>
class awaitable {
 public:
  using value_type = T;
  using executor_type = Executor;
  bool valid() const noexcept { return true; }
  bool await_ready() const noexcept { return false; }
  template <class U>
  void await_suspend(std::coroutine_handle<U>) {}
  T await_resume() { return T(); }
};
}  // namespace other_asio

int main() {
  const RuntimeBridge bridge;
  [[maybe_unused]] int n = 0;
  [[maybe_unused]] asio::steady_timer timer(bridge.get_executor());
  [[maybe_unused]] auto awaitable = task();
#if CASE == 0
  (void)bridge.block_on(std::move(awaitable));
  (void)bridge.block_on(task);
  (void)bridge.block_on([&] { return n; });
  (void)bridge.block_on(timer.async_wait(deferred));
#elif CASE == 1
  (void)bridge.block_on([&]() -> int& { return n; });
#elif CASE == 2
  (void)bridge.block_on(awaitable);
#elif CASE == 3
  (void)bridge.block_on(1);
#elif CASE == 4
  (void)bridge.block_on([](int m) { return m; });
#elif CASE == 5
  (void)bridge.block_on(task_of_a_pool());
#elif CASE == 6
  (void)bridge.call([](int) {}, "a text");
#elif CASE == 7
  (void)bridge.block_on([] { return std::mutex(); });
#elif CASE == 8
  (void)bridge.block_on(other_asio::awaitable<int>());
#elif CASE == 9
  (void)bridge.block_on([] { return other_asio::awaitable<int>(); });
#elif CASE == 10
  (void)bridge.block_on_for([](auto m) { return m; }, std::chrono::seconds(1));
#elif CASE == 11
  (void)bridge.submit([](auto m) { return m; });
#elif CASE == 12
  const auto movable = [p = std::make_unique<int>(1)] { return *p; };
  (void)bridge.submit(movable);
#elif CASE == 13
  auto result = bridge.block_on([] { return std::make_unique<int>(1); });
  (void)unwrap(result);
#elif CASE == 14
  bridge.submit([] { return 1; }, [](runtime_bridge::Result<std::unique_ptr<int>>) {});
#elif CASE == 17
  const runtime_bridge::Hosted<std::mutex> hosted(bridge, 1);
#elif CASE == 15
  const runtime_bridge::Hosted<std::mutex> hosted(bridge);
  (void)hosted.call([](int& m) { return m; });
#elif CASE == 16
  const runtime_bridge::Hosted<std::mutex> hosted(bridge);
  (void)hosted.call_for(std::chrono::seconds(1), runtime_bridge::named(
                                                     "mutex", [](auto& m) -> auto& { return m; }));
#else
#error "no such case"
#endif
}
