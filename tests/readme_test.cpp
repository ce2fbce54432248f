// SPDX-License-Identifier: Apache-2.0
//
// Compiles and runs the examples of the README and of pages in docs/. pages_test.cmake checks that each of their code
// blocks is in a file that is compiled, such as this one.

#include <runtime_bridge/hosted.hpp>
#include <runtime_bridge/range.hpp>
#include <runtime_bridge/streambuf.hpp>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <functional>
#include <iostream>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "support.hpp"

using runtime_bridge::Shutdown;
using namespace runtime_bridge;

namespace {

struct Client {
  awaitable<std::string> get(std::string key) {
    if (key == "slow") co_await park();
    co_return "value of " + key;
  }
};

}  // namespace

TEST_CASE("readme: a deadline") {
  RuntimeBridge bridge;
  Client client;
  const std::string key = "slow";
  bool timed_out = false;
  const auto use_the_cache = [&timed_out] { timed_out = true; };

  auto value = bridge.block_on_for([&] { return client.get(key); }, std::chrono::milliseconds(200));
  if (!value && value.error() == BridgeError::TimedOut) use_the_cache();

  CHECK(timed_out);
}

#ifdef HAS_STOP_TOKEN
TEST_CASE("readme: a stop token") {
  RuntimeBridge bridge;
  Client client;
  const std::string key = "slow";
  std::string reported;

  std::jthread reader([&](std::stop_token stop) {  // stopped and joined by its destructor
    auto value = bridge.block_on([&] { return client.get(key); }, stop);
    if (!value) reported = value.error().message();
  });

  await_calls(bridge, 1);
  reader.request_stop();
  reader.join();
  CHECK(reported.starts_with(BridgeError(BridgeError::Cancelled).message()));
}
#endif

TEST_CASE("readme: submit") {
  RuntimeBridge bridge;
  Client client;

  JoinHandle<std::string> first = bridge.submit(client.get("a"));  // both tasks run concurrently
  JoinHandle<std::string> second = bridge.submit(client.get("b"));
  std::string both = unwrap(first.join()) + ", " + unwrap(second.join());

  CHECK(both == "value of a, value of b");
}

TEST_CASE("readme: shutdown") {
  RuntimeBridge bridge;
  bool logged = false;
  const auto log = [&logged](const char*) { logged = true; };
  auto handle = bridge.submit([]() -> awaitable<void> {
    co_await asio::this_coro::reset_cancellation_state(asio::disable_cancellation());
    asio::steady_timer timer(co_await asio::this_coro::executor, 24h);
    co_await timer.async_wait(use_awaitable);
  });
  await_calls(bridge, 1);

  using std::chrono::milliseconds;
  if (!bridge.shutdown(Shutdown::cancel, milliseconds(100))) log("calls were cut off");

  CHECK(logged);
}

TEST_CASE("readme: an Asio operation") {
  RuntimeBridge bridge;

  asio::steady_timer timer(bridge.get_executor(), std::chrono::milliseconds(10));
  unwrap(bridge.block_on(timer.async_wait(asio::deferred)));  // asio::experimental::deferred before Asio 1.24

  CHECK(timer.expiry() <= std::chrono::steady_clock::now());
}

TEST_CASE("readme: a report, and the calls in flight") {
  RuntimeBridge bridge;
  const auto task = bridge.submit(park());
  const auto log = [](const std::string&) {};

  RuntimeBridge::report(std::cerr);  // all bridges of the process, and which waits for which
  for (const CallInfo& call : bridge.calls()) {
    if (call.age > std::chrono::minutes(1)) log(call.name + " hangs");
  }

  CHECK(bridge.calls().size() == 1);
}

namespace {

struct Wrapper {
  std::string get(const std::string& key, SourceLocation where = SourceLocation::current()) {
    return unwrap(bridge.block_on(named("get " + key, [&] { return client.get(key); }), {}, where));
  }

  RuntimeBridge& bridge;
  Client client;
};

}  // namespace

TEST_CASE("readme: a wrapper passes on where it was called, and the hooks tell") {
  struct {
    void record(std::chrono::steady_clock::duration time) { longest = std::max(longest, time); }
    std::chrono::steady_clock::duration longest{};
  } durations;
  std::string logged;
  const auto log = [&logged](const std::string& message) { logged = message; };

  Options options;
  options.slow_after = std::chrono::seconds(5);  // and again after 10, 20, 40, ...; on the thread that waits
  options.on_slow_call = [](const CallInfo&) { RuntimeBridge::report(std::cerr); };
  options.on_call_end = [&](const CallEnd& call) { durations.record(call.queued + call.ran); };
  options.on_unjoined_error = [&](const BridgeError& error) { log(error.message()); };  // nobody joins this task
  options.max_in_flight = 100;           // more tasks wait for their turn,
  options.when_full = WhenFull::refuse;  // or their calls return Overloaded at once

  std::string ended;
  unsigned line = 0;
  options.on_call_end = [&, record = options.on_call_end](const CallEnd& call) {
    record(call);
    ended = call.name;
    line = static_cast<unsigned>(call.where.line());
  };
  options.max_in_flight = 1;
  RuntimeBridge bridge(options);
  Wrapper wrapper{bridge, {}};
  CHECK(wrapper.get("a") == "value of a");
  CHECK(line == __LINE__ - 1);
  CHECK(ended == "get a");
  CHECK(durations.longest > 0ns);

  {
    const auto running = bridge.submit(park());
    CHECK(outcome(bridge.block_on([] {})) == BridgeError::Overloaded);
  }
  bridge.submit([] { throw std::runtime_error("lost"); }).detach();
  await_state([&] { return bridge.stats().response_lost == 1; });
  bridge.shutdown(Shutdown::drain);
  CHECK(logged == "runtime_bridge: the task threw: lost");
}

TEST_CASE("readme: arguments") {
  RuntimeBridge bridge;
  Client client;
  const std::string key = "a";

  auto value = bridge.call(&Client::get, client, "prefix/" + key);
  auto soon = bridge.call_for(std::chrono::milliseconds(200), &Client::get, client, key);

  CHECK(value == "value of prefix/a");
  CHECK((soon == "value of a" || soon.error() == BridgeError::TimedOut));
}

TEST_CASE("readme: a predicate") {
  RuntimeBridge bridge;
  Client client;
  const std::string key = "slow";
  int asked = 0;
  const auto user_pressed_cancel = [&asked] { return ++asked == 2; };

  auto value =
      bridge.block_on([&] { return client.get(key); }, poll_every(std::chrono::milliseconds(50), user_pressed_cancel));

  CHECK(value.error() == BridgeError::Cancelled);
  CHECK(asked == 2);
}

TEST_CASE("readme: a function for the end") {
  Options options;
  std::atomic<int> shown{0};
  const auto show = [&shown](const std::string&) { ++shown; };
  RuntimeBridge bridge(options);
  Client client;

  bridge.submit(client.get("a"), [&](Result<std::string> value) {
    show(value ? *value : value.error().message());  // on the worker, so it must not block
  });

  bridge.shutdown(Shutdown::drain);
  CHECK(shown == 1);
}

TEST_CASE("readme: a hosted object") {
  RuntimeBridge bridge;
  const std::string key = "slow";

  Hosted<Client> client(bridge);
  auto value = client.call_for(std::chrono::milliseconds(200), [&](Client& c) { return c.get(key); });

  CHECK(value.error() == BridgeError::TimedOut);
}

namespace {

struct Listing {
  awaitable<std::optional<std::string>> next() {
    if (left.empty()) co_return std::nullopt;
    std::string name = left.substr(0, 1);
    left.erase(0, 1);
    co_return name;
  }
  std::string left = "abc";
};

}  // namespace

TEST_CASE("readme: a loop") {
  RuntimeBridge bridge;
  Listing listing;
  std::string names;

  const auto next = [&]() -> awaitable<std::optional<std::string>> { return listing.next(); };
  for (const std::string& name : range(bridge, next, prefetch(1))) {
    names += name;
  }

  CHECK(names == "abc");
}

TEST_CASE("readme: a stream") {
  RuntimeBridge bridge;
  asio::local::stream_protocol::socket socket(bridge.get_executor()), other(bridge.get_executor());
  asio::local::connect_pair(socket, other);
  asio::write(other, asio::buffer("a line\nand more", 15));

  // clang-format off
  runtime_bridge::istream input(bridge, [&](asio::mutable_buffer buffer) {
    return socket.async_read_some(buffer, asio::use_awaitable);
  }, std::chrono::seconds(5));
  std::string line;
  std::getline(input, line);
  // clang-format on

  CHECK(line == "a line");
  CHECK_FALSE(input.error());
}

TEST_CASE("readme: fan-out") {
  RuntimeBridge bridge;
  Client client;
  const std::vector<std::string> keys{"a", "b", "c"};

  std::vector<JoinHandle<std::string>> fetches;
  for (const std::string& key : keys) fetches.push_back(bridge.submit(client.get(key)));
  std::vector<std::string> values;
  for (auto& fetch : fetches) values.push_back(unwrap(fetch.join()));  // if this throws, the others are stopped

  CHECK(values == std::vector<std::string>{"value of a", "value of b", "value of c"});
}

namespace {

struct Leases {
  awaitable<void> renew() {
    ++renewed;
    co_await asio::post(use_awaitable);
  }
  std::atomic<int> renewed{0};
};

/// Renews a lease as long as it lives.
class Heartbeat {
 public:
  Heartbeat(const RuntimeBridge& bridge, Leases& leases) : beats_(bridge.submit(beat(leases))) {}

 private:
  static awaitable<void> beat(Leases& leases) {
    asio::steady_timer timer(co_await asio::this_coro::executor);
    for (;;) {
      co_await leases.renew();
      timer.expires_after(std::chrono::seconds(1));
      co_await timer.async_wait(use_awaitable);
    }
  }

  JoinHandle<void> beats_;  // its destructor stops the task, and waits until that has ended
};

/// Tasks on several cores. A key's tasks are always on the same bridge, so they may share a connection.
class Bridges {
 public:
  explicit Bridges(std::size_t cores) : bridges_(cores) {}

  const RuntimeBridge& of(std::string_view key) const {
    return bridges_[std::hash<std::string_view>()(key) % bridges_.size()];
  }

 private:
  std::vector<RuntimeBridge> bridges_;
};

}  // namespace

TEST_CASE("readme: a heartbeat") {
  RuntimeBridge bridge;
  Leases leases;
  {
    const Heartbeat heartbeat(bridge, leases);
    await_state([&] { return leases.renewed == 1; });
  }
  CHECK(bridge.in_flight() == 0);
}

TEST_CASE("readme: several bridges") {
  const Bridges bridges(3);
  CHECK(bridges.of("a").block_on([] { return 1; }) == 1);
  CHECK(&bridges.of("a") == &bridges.of("a"));
}

TEST_CASE("readme: completion in another event loop") {
  RuntimeBridge bridge;
  Client client;
  asio::io_context gui;
  auto work = asio::make_work_guard(gui);
  std::string shown;
  const auto show = [&](const Result<std::string>& value) {
    shown = value.value_or("none");
    work.reset();
  };

  bridge.submit(client.get("a"), [&](Result<std::string> value) {
    asio::post(gui, [&, value = std::move(value)] { show(value); });  // back to the thread that runs this loop
  });

  gui.run();
  CHECK(shown == "value of a");
}

TEST_CASE("readme: one bridge for the process") {
  Client client;
  const std::string key = "a";

  auto value = RuntimeBridge::shared().block_on([&] { return client.get(key); });

  CHECK(value == "value of a");
  RuntimeBridge::shared().shutdown(Shutdown::drain);  // no test needs it after this one, and valgrind sees its thread
}

namespace {

awaitable<std::size_t> size_of(std::string_view text) {
  co_await asio::post(use_awaitable);
  co_return text.size();
}

}  // namespace

TEST_CASE("readme: arguments that are destroyed at the first suspension") {
  RuntimeBridge bridge;
  const std::string key = "a name that is too long for the small string";

  auto wrong = [&] { return size_of("prefix/" + key); };  // size_of takes a std::string_view: it dangles
  auto right = [&, name = "prefix/" + key] { return size_of(name); };

  static_cast<void>(wrong);
  CHECK(bridge.block_on(right) == key.size() + 7);
}

TEST_CASE("readme: the trap of g++ 12") {
  RuntimeBridge bridge;
  const auto task = []() -> awaitable<int> {
    const int size = 7;

    auto read = [&]() -> asio::awaitable<int> { co_return size; };
    co_return co_await read();  // not: co_await [&]() -> asio::awaitable<int> { co_return size; }()
  };
  CHECK(bridge.block_on(task) == 7);
}
