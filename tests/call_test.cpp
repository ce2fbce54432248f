// SPDX-License-Identifier: Apache-2.0
//
// call and call_for: a function and its arguments, on the worker.

#include <array>
#include <filesystem>
#include <functional>
#include <latch>
#include <memory>
#include <sstream>
#include <string>
#include <string_view>

#include "support.hpp"

using runtime_bridge::named;
using runtime_bridge::State;

namespace {

/// Goes on after the function that made it has returned, and its temporaries are gone.
awaitable<void> hop() { co_await asio::post(use_awaitable); }

class Client {
 public:
  awaitable<std::string> get(const std::string& key) {
    auto suspended = hop();
    co_await std::move(suspended);
    co_return prefix + key;
  }
  std::string peek(std::string_view key) const noexcept { return prefix + std::string(key); }
  std::string give_up(std::string&& key) && { return std::move(prefix) + std::move(key); }

  std::string prefix = "value of ";
};

const std::string long_text(100, 'x');  // more than a string keeps inside itself
constexpr const char* literal = "a text of more bytes than a string keeps inside of itself";

awaitable<std::size_t> total_size(const std::string& a, std::string_view b, std::string&& c) {
  auto suspended = hop();
  co_await std::move(suspended);
  co_return a.size() + b.size() + c.size();
}

std::size_t path_size(const std::filesystem::path& path, int more = 0) {
  return path.string().size() + static_cast<std::size_t>(more);
}

/// Counts copies. Cannot be made from anything else.
struct Big {
  Big() = default;
  Big(const Big& other) : copies(other.copies + 1) {}
  Big& operator=(const Big&) = delete;
  int copies = 0;
};
struct Bigger : Big {};

struct Overloaded {
  int operator()(int i) const { return i; }
  int operator()(const std::string& text) const { return static_cast<int>(text.size()); }
};

}  // namespace

TEST_CASE("call: functions, members and function objects, on the worker") {
  const RuntimeBridge bridge;
  Client client;
  CHECK(bridge.call([] { return std::this_thread::get_id(); }) == worker_of(bridge));
  CHECK(bridge.call([](int a, int b) { return a + b; }, 1, 2) == 3);
  CHECK(bridge.call(path_size, std::filesystem::path("four"), 1) == 5U);
  CHECK(bridge.call(&path_size, std::filesystem::path("four"), 1) == 5U);
  CHECK(bridge.call(&Client::peek, client, "a") == "value of a");
  CHECK(bridge.call(&Client::peek, &client, "a") == "value of a");
  CHECK(bridge.call(&Client::peek, std::cref(client), "a") == "value of a");
  CHECK(bridge.call(&Client::peek, std::make_unique<Client>(), "a") == "value of a");
  CHECK(bridge.call(&Client::give_up, Client(), "a") == "value of a");
  CHECK(bridge.call(std::function<int(int)>([](int i) { return 2 * i; }), 3) == 6);
  CHECK(bridge.call(Overloaded(), 3) == 3);
  CHECK(bridge.call(Overloaded(), "text") == 4);
  int calls = 0;
  auto counts = [&calls]() mutable { ++calls; };
  CHECK(bridge.call(counts));
  CHECK(calls == 1);
}

TEST_CASE("call: coroutines and operations are run") {
  const RuntimeBridge bridge;
  Client client;
  CHECK(bridge.call(&Client::get, client, long_text) == "value of " + long_text);
  asio::steady_timer timer(bridge.get_executor(), 0s);
  const auto wait = [](asio::steady_timer& t) { return t.async_wait(asio::deferred); };
  CHECK(bridge.call(wait, timer));
  CHECK(bridge.block_on([&] { return timer.async_wait(asio::deferred); }));  // as for any callable
  CHECK(bridge.call([](auto& t) { return t.async_wait(use_awaitable); }, timer));
}

// The sanitizers see a coroutine that uses an argument after its end.
TEST_CASE("call: arguments live until the call is over") {
  const RuntimeBridge bridge;
  Client client;
  const std::string key = "key";
  CHECK(bridge.call(&Client::get, client, long_text + key) == "value of " + long_text + key);
  CHECK(bridge.call(total_size, long_text + key, long_text + key, long_text + key) == 309U);
  const auto of_lambda = [](const std::string& text) -> awaitable<std::size_t> {
    auto suspended = hop();
    co_await std::move(suspended);
    co_return text.size();
  };
  CHECK(bridge.call(of_lambda, long_text + key) == 103U);
  CHECK(bridge.call(
            [capture = long_text + key](const auto& text) -> awaitable<std::size_t> {
              auto suspended = hop();
              co_await std::move(suspended);
              co_return capture.size() + text.size();
            },
            long_text + key) == 206U);
}

TEST_CASE("call: what an argument is converted to lives until the call is over") {
  const RuntimeBridge bridge;
  Client client;
  const std::size_t size = std::string_view(literal).size();
  CHECK(bridge.call(&Client::get, client, literal) == "value of " + std::string(literal));
  CHECK(bridge.call(total_size, literal, literal, literal) == 3 * size);
  CHECK(bridge.call(&path_size, literal, 1) == size + 1);
  const auto of_lambda = [](const std::string& text) -> awaitable<std::size_t> {
    auto suspended = hop();
    co_await std::move(suspended);
    co_return text.size();
  };
  CHECK(bridge.call(of_lambda, literal) == size);
  CHECK(bridge.call(named("a name", of_lambda), literal) == size);
}

TEST_CASE("call: an argument of the right type is not copied") {
  const RuntimeBridge bridge;
  const auto copies = [](const Big& big) { return big.copies; };
  Big big;
  const Bigger bigger;
  CHECK(bridge.call(copies, big) == 0);
  CHECK(bridge.call(copies, Big()) == 0);
  CHECK(bridge.call(copies, bigger) == 0);
  CHECK(bridge.call(copies, std::ref(big)) == 0);
  CHECK(bridge.call([](Big& b) { return ++b.copies; }, big) == 1);
  CHECK(big.copies == 1);
  CHECK(bridge.call([](Big b) { return b.copies; }, Big()) == 1);
  auto moved = std::make_unique<int>(3);
  CHECK(bridge.call([](std::unique_ptr<int> p) { return *p; }, std::move(moved)) == 3);
  CHECK(moved == nullptr);
  const auto result = bridge.call([](std::unique_ptr<int>&& p) { return std::move(p); }, std::make_unique<int>(4));
  CHECK(*result.value() == 4);
}

TEST_CASE("call: a conversion that throws throws before the call") {
  struct Throws {
    operator std::string() const { throw std::runtime_error("no text"); }  // NOLINT(google-explicit-constructor)
  };
  const RuntimeBridge bridge;
  Client client;
  CHECK_THROWS_AS((void)bridge.call(&Client::get, client, Throws()), std::runtime_error);
  CHECK(bridge.stats().admitted == 0);
}

TEST_CASE("call: errors are those of block_on") {
  RuntimeBridge bridge;
  CHECK(bridge.call([](int) { throw std::runtime_error("no"); }, 1).error() == BridgeError::ResponseLost);
  CHECK(outcome(bridge.call_for(
            1ms, [](int) { return park(); }, 1)) == BridgeError::TimedOut);
  CHECK(outcome(bridge.call_for(
            0s, [](int) {}, 1)) == BridgeError::TimedOut);
  CHECK(bridge.call_for(
            24h, [](int i) { return i; }, 1) == 1);
  CHECK(unwrap(bridge.block_on([&] { return outcome(bridge.call([](int) {}, 1)); })) == BridgeError::WouldDeadlock);
  bridge.shutdown(runtime_bridge::Shutdown::drain);
  CHECK(outcome(bridge.call([](int) {}, 1)) == worker_dead);
  const RuntimeBridge other = std::move(bridge);
  CHECK(outcome(bridge.call([](int) {}, 1)) == worker_dead);  // NOLINT(bugprone-use-after-move)
}

TEST_CASE("call: the name is in reports, the place is not") {
  const RuntimeBridge bridge;
  const auto look = [&](int) {
    std::ostringstream out;
    RuntimeBridge::report(out);
    return std::pair(bridge.calls(), out.str());
  };
  const auto [calls, report] = unwrap(bridge.call(named("look", look), 1));
  REQUIRE(calls.size() == 1);
  CHECK(calls[0].name == "look");
  CHECK(calls[0].where.line() == 0);
  CHECK(calls[0].state == State::running);
  CHECK(calls[0].caller == std::this_thread::get_id());
  CHECK(report.find("old: place unknown \"look\", called by thread") != std::string::npos);
  auto kept = named("kept", look);
  CHECK(unwrap(bridge.call(kept, 1)).first.at(0).name == "kept");
  CHECK(kept.name == "kept");
}
