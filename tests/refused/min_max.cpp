// SPDX-License-Identifier: Apache-2.0
//
// The macros of a header that somebody includes first, as <windows.h> is. The standard library and Asio must have been
// there before, since they do not mind them either way.

#ifdef RUNTIME_BRIDGE_USE_BOOST_ASIO
#include <boost/asio.hpp>
#include <boost/asio/detail/signal_set_service.hpp>
#include <boost/asio/experimental/channel.hpp>
#include <boost/asio/experimental/concurrent_channel.hpp>
#else
#include <asio.hpp>
#include <asio/detail/signal_set_service.hpp>
#include <asio/experimental/channel.hpp>
#include <asio/experimental/concurrent_channel.hpp>
#endif

#include <array>
#include <atomic>
#include <cassert>
#include <chrono>
#include <concepts>
#include <condition_variable>
#include <functional>
#include <future>
#include <list>
#include <memory>
#include <mutex>
#include <optional>
#include <ostream>
#include <stop_token>
#include <string>
#include <thread>
#include <variant>
#include <version>
#ifdef __cpp_lib_expected
#include <expected>
#else
#include <tl/expected.hpp>
#endif

#define min(a, b) ((a) < (b) ? (a) : (b))
#define max(a, b) ((a) > (b) ? (a) : (b))

#include <runtime_bridge.hpp>
#include <runtime_bridge/streambuf.hpp>

int main() {
  const runtime_bridge::RuntimeBridge bridge;
  (void)bridge.block_on_for([] { return 1; }, std::chrono::hours(1));
  auto handle = bridge.submit([] { return 1; });
  (void)handle.wait_for(std::chrono::hours(1));
  (void)handle.join();
  runtime_bridge::istream in(
      bridge, [](auto buffer) { return buffer.size(); }, std::chrono::hours(1));
  runtime_bridge::ostream(bridge, [](auto) {}) << in.get();
  (void)bridge.shutdown(runtime_bridge::Shutdown::drain);
}
