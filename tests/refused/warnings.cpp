// SPDX-License-Identifier: Apache-2.0
//
// All that the header has, for a compiler that warns of everything.

#include <chrono>
#include <memory>
#include <ostream>
#include <runtime_bridge.hpp>
#include <runtime_bridge/streambuf.hpp>
#include <stop_token>
#include <string>
#include <utility>

#ifdef RUNTIME_BRIDGE_USE_BOOST_ASIO
namespace asio = boost::asio;
#endif

using namespace runtime_bridge;

asio::awaitable<int> task(const int value);
asio::awaitable<void, asio::io_context::executor_type> other_task();

int use(std::ostream& out) {
  Options options;
  options.on_stray_exception = [](const std::exception_ptr&) {};
  RuntimeBridge bridge(std::move(options)), named = RuntimeBridge::with_thread_name("x");
  const auto made = RuntimeBridge::create();
  named = std::move(bridge);
  std::stop_source source;
  Result<int> number = named.block_on([] { return task(1); }, source.get_token());
  const Result<void> nothing = named.block_on_for(other_task(), std::chrono::milliseconds(1));
  Result<std::string> text =
      named.block_on_until([] { return std::string("x"); }, std::chrono::system_clock::now(), source.get_token());
  Result<std::unique_ptr<int>> movable = named.block_on([] { return std::make_unique<int>(1); });
  if (!nothing) out << nothing.error() << make_error_code(nothing.error().kind());
  unwrap(nothing);
  JoinHandle<int> handle = named.submit(task(2));
  JoinHandle<int> other;
  other = std::move(handle);
  if (!other.wait_for(std::chrono::seconds(1)) && other.joinable() && !other.done()) other.request_stop();
  istream in(
      named, [](asio::mutable_buffer buffer) { return buffer.size(); }, std::chrono::seconds(1));
  istream in_pieces(named, [](asio::mutable_buffer) { return 0; });
  ostream(named, [](asio::const_buffer) {}) << in.get() << in_pieces.rdbuf();
  const Result<int> joined = other.join();
  other.detach();
  const bool complete = named.shutdown(Shutdown::cancel, std::chrono::minutes(1));
  return unwrap(number) + unwrap(joined) + *unwrap(std::move(movable)) + (complete && made ? 1 : 0) +
         (unwrap(std::move(text)).empty() ? 0 : 1);
}
