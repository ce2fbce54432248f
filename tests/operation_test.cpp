// SPDX-License-Identifier: Apache-2.0
//
// Asio operations as Tasks: their errors, their results, their cancellation.

#include <array>
#include <tuple>

#include "support.hpp"

namespace {

using Socket = asio::local::stream_protocol::socket;

}  // namespace

TEST_CASE("operation: returns its results") {
  RuntimeBridge bridge;
  Socket a(bridge.get_executor()), b(bridge.get_executor());
  asio::local::connect_pair(a, b);
  const std::string text = "hello";
  CHECK(bridge.block_on(asio::async_write(a, asio::buffer(text), asio::deferred)) == text.size());
  std::array<char, 5> bytes{};
  CHECK(bridge.block_on(asio::async_read(b, asio::buffer(bytes), asio::deferred)) == text.size());
  CHECK(std::string(bytes.data(), bytes.size()) == text);
}

TEST_CASE("operation: several results are a tuple") {
  RuntimeBridge bridge;
  asio::experimental::channel<void(ErrorCode, int, std::string)> channel(bridge.get_executor(), 1);
  auto send = channel.async_send(ErrorCode(), 3, std::string("three"), asio::deferred);
  CHECK(bridge.block_on(send).has_value());
  CHECK(bridge.block_on(channel.async_receive(asio::deferred)) == std::tuple(3, std::string("three")));
}

TEST_CASE("operation: its error is the exception that co_await would throw") {
  RuntimeBridge bridge;
  Socket a(bridge.get_executor()), b(bridge.get_executor());
  asio::local::connect_pair(a, b);
  a.close();
  std::array<char, 1> byte{};
  const auto result = bridge.block_on(asio::async_read(b, asio::buffer(byte), asio::deferred));
  REQUIRE_FALSE(result.has_value());
  CHECK(result.error() == BridgeError::ResponseLost);
  CHECK(code_of<AsioError>(result.error().cause()) == asio::error::eof);
}

TEST_CASE("operation: a deadline and a stop cancel it") {
  RuntimeBridge bridge;
  asio::steady_timer timer(bridge.get_executor(), 24h);
  Result<void> timed;
  auto limit = 5ms;
  do {  // on a busy machine it may pass before the task starts
    timed = bridge.block_on_for(timer.async_wait(asio::deferred), limit);
    REQUIRE_FALSE(timed.has_value());
    limit *= 2;
  } while (!timed.error().cause());
  CHECK(timed.error() == BridgeError::TimedOut);
  CHECK(code_of<AsioError>(timed.error().cause()) == asio::error::operation_aborted);

#ifdef HAS_STOP_TOKEN
  stop_source source;
  Outcome stopped;
  jthread caller([&] { stopped = outcome(bridge.block_on(timer.async_wait(asio::deferred), source.get_token())); });
  await_calls(bridge, 1);
  source.request_stop();
  caller.join();
  CHECK(stopped == BridgeError::Cancelled);
  CHECK(stopped.cause);
#endif
}
