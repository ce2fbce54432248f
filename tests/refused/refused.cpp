// SPDX-License-Identifier: Apache-2.0
//
// Compiled once for each CASE. The words that the compiler must say are in CMakeLists.txt.

#include <asio/steady_timer.hpp>
#include <asio/thread_pool.hpp>
#include <asio/version.hpp>
#include <mutex>
#include <runtime_bridge.hpp>
#include <utility>
#if ASIO_VERSION < 102400
#include <asio/experimental/deferred.hpp>
using asio::experimental::deferred;
#else
#include <asio/deferred.hpp>
using asio::deferred;
#endif

using runtime_bridge::RuntimeBridge;

asio::awaitable<int> task() { co_return 1; }
asio::awaitable<int, asio::thread_pool::executor_type> task_of_a_pool() { co_return 1; }

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
  (void)bridge.block_on([&] { return timer.async_wait(deferred); });
#elif CASE == 7
  (void)bridge.block_on([] { return std::mutex(); });
#else
#error "no such case"
#endif
}
