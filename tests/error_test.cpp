// SPDX-License-Identifier: Apache-2.0
//
// BridgeError, its error category, Result and unwrap. The exact texts of all messages are tested here, and only here.

#include <concepts>
#include <memory>
#include <optional>
#include <sstream>
#include <stdexcept>

#include "support.hpp"

static_assert(std::regular<BridgeError>);
static_assert(std::is_nothrow_move_constructible_v<BridgeError> && std::is_nothrow_move_assignable_v<BridgeError>);
static_assert(std::is_error_code_enum_v<BridgeError::Kind>);
static_assert(!std::is_copy_constructible_v<RuntimeBridge> && std::is_nothrow_move_constructible_v<RuntimeBridge> &&
              std::is_nothrow_move_assignable_v<RuntimeBridge>);

namespace {

Result<int> failed(BridgeError error) { return error_result<int>(std::move(error)); }

std::exception_ptr some_exception() { return std::make_exception_ptr(std::out_of_range("row 7")); }

}  // namespace

TEST_CASE("error: compares by kind") {
  const BridgeError a(BridgeError::TimedOut, some_exception());
  CHECK(a == BridgeError(BridgeError::TimedOut));
  CHECK(a == BridgeError::TimedOut);
  CHECK(BridgeError::TimedOut == a);
  CHECK(a != BridgeError::Cancelled);
  CHECK(a != BridgeError(BridgeError::Cancelled, a.cause()));
}

TEST_CASE("error: the category") {
  const std::error_code code = BridgeError::WouldDeadlock;
  CHECK(code.category().name() == std::string("runtime_bridge"));
  CHECK(code.value() == 5);
  CHECK(code == std::errc::resource_deadlock_would_occur);
  CHECK(make_error_code(BridgeError::TimedOut) == std::errc::timed_out);
  CHECK(make_error_code(BridgeError::Cancelled) == std::errc::operation_canceled);
  CHECK(make_error_code(BridgeError::WorkerDead) == BridgeError::WorkerDead);
  CHECK(make_error_code(BridgeError::WorkerDead) != BridgeError::ResponseLost);
  const std::error_condition own = make_error_code(BridgeError::WorkerDead).default_error_condition();
  CHECK((own.value() == 1 && own.category() == code.category()));
}

TEST_CASE("unwrap: returns values of every type") {
  CHECK(unwrap(Result<int>(3)) == 3);
  unwrap(Result<void>());
  CHECK(*unwrap(Result<std::unique_ptr<int>>(std::make_unique<int>(4))) == 4);
}

TEST_CASE("unwrap: rethrows the task's own exception") {
  CHECK_THROWS_AS(unwrap(failed({BridgeError::ResponseLost, some_exception()})), std::out_of_range);
  CHECK_THROWS_AS(unwrap(failed({BridgeError::ResponseLost, std::make_exception_ptr(7)})), int);
}

TEST_CASE("unwrap: throws std::system_error for any other error") {
  // A timeout is not hidden behind the "operation aborted" that it caused.
  for (const auto kind : {BridgeError::WorkerDead, BridgeError::TimedOut, BridgeError::Cancelled}) {
    try {
      (void)unwrap(failed({kind, some_exception()}));
      FAIL("did not throw");
    } catch (const std::system_error& e) {
      CHECK(e.code() == kind);
      CHECK(e.what() == BridgeError(kind, some_exception()).message());
    }
  }
  CHECK_THROWS_AS(unwrap(failed(BridgeError::ResponseLost)), std::system_error);
}

TEST_CASE("unwrap: copies from an lvalue and moves from an rvalue") {
  Result<std::string> text("a text that is too long for the small string");
  const Result<std::string>& same = text;
  CHECK(unwrap(text) == unwrap(same));
  const char* const where = text->data();
  const std::string moved = unwrap(std::move(text));
  CHECK(moved.data() == where);
}

TEST_CASE("error: operator<< writes the message") {
  std::ostringstream out;
  const BridgeError error(BridgeError::TimedOut, some_exception());
  out << error << '.';
  CHECK(out.str() == error.message() + ".");
}

// ---------------------------------------------------------------------------------------------------------------------
// The texts

namespace {

/// The message of an error, without the name of the library in front.
std::string text(const BridgeError& error) {
  const std::string message = error.message();
  const std::string prefix = "runtime_bridge: ";
  return message.starts_with(prefix) ? message.substr(prefix.size()) : "no prefix: " + message;
}
template <class T>
std::string text(const Result<T>& result) {
  return result.has_value() ? "a value" : text(result.error());
}

RuntimeBridge named(const char* name) { return RuntimeBridge::with_thread_name(name); }

}  // namespace

TEST_CASE("message: of each kind, with and without a cause") {
  CHECK(text(BridgeError(BridgeError::WorkerDead)) == "the worker is gone");
  CHECK(text(BridgeError(BridgeError::ResponseLost)) == "the task ended without a value");
  CHECK(text(BridgeError(BridgeError::TimedOut)) == "the deadline passed and the task was cancelled");
  CHECK(text(BridgeError(BridgeError::Cancelled)) == "a stop was requested and the task was cancelled");
  CHECK(text(BridgeError(BridgeError::WouldDeadlock)) == "the call would wait for itself");
  CHECK(text(BridgeError(BridgeError::TimedOut, some_exception())) ==
        "the deadline passed and the task was cancelled: row 7");
  CHECK(text(BridgeError(BridgeError::ResponseLost, std::make_exception_ptr(7))) ==
        "the task ended without a value: an exception that is not a std::exception");

  const std::error_category& category = make_error_code(BridgeError::WorkerDead).category();
  CHECK(category.message(BridgeError::WouldDeadlock) == "the call would wait for itself");
  CHECK(category.message(0) == "unknown error");
}

TEST_CASE("message: of a task that threw") {
  const RuntimeBridge bridge;
  CHECK(text(bridge.block_on([] { throw std::runtime_error("disk full"); })) == "the task threw: disk full");
  const auto coroutine = []() -> awaitable<void> {
    throw 42;
    co_return;
  };
  CHECK(text(bridge.block_on(coroutine)) == "the task threw: an exception that is not a std::exception");
  auto twice = []() -> awaitable<void> { co_return; }();
  CHECK(text(bridge.block_on(std::move(twice))) == "a value");
  CHECK(text(bridge.block_on(std::move(twice))) ==  // NOLINT(bugprone-use-after-move)
        "the task threw: runtime_bridge: an awaitable that was given up before");
}

TEST_CASE("message: of a deadline and of a stop, before the call and during it") {
  const RuntimeBridge bridge;
  CHECK(text(bridge.block_on_for([] {}, 0s)) == "the deadline had passed before the call");
  Result<void> timed;
  auto limit = 5ms;
  do {  // on a busy machine it may pass before the task starts
    timed = bridge.block_on_for(park, limit);
    REQUIRE_FALSE(timed.has_value());
    limit *= 2;
  } while (!timed.error().cause());
  CHECK(text(timed) == "the deadline passed and the task was cancelled: " + what(timed.error().cause()));

#ifdef HAS_STOP_TOKEN
  stop_source source;
  const auto stops_itself = [&] {
    source.request_stop();
    return park();
  };
  const Result<void> stopped = bridge.block_on(stops_itself, source.get_token());
  REQUIRE_FALSE(stopped.has_value());
  CHECK(text(stopped) == "a stop was requested and the task was cancelled: " + what(stopped.error().cause()));
  CHECK(text(bridge.block_on([] {}, source.get_token())) == "a stop was requested before the call");
#endif
}

TEST_CASE("message: of a task that was destroyed, and of one whose worker was stopped") {
  const RuntimeBridge bridge;
  std::optional<asio::io_context> elsewhere(std::in_place);
  auto handle = bridge.submit([&]() -> awaitable<void> { co_await asio::post(*elsewhere, use_awaitable); });
  await_calls(bridge, 1);
  elsewhere.reset();
  CHECK(text(handle.join()) == "the task was destroyed before its end");

  handle = bridge.submit(park());
  await_calls(bridge, 1);
  bridge.get_executor().context().stop();
  CHECK(text(handle.join()) == "the worker was stopped under the task");
}

TEST_CASE("message: of a bridge without a worker") {
  RuntimeBridge moved;
  const RuntimeBridge bridge = std::move(moved);
  CHECK(text(moved.block_on([] {})) == "the bridge was moved from");  // NOLINT(bugprone-use-after-move)
  CHECK(text(moved.submit([] {}).join()) == "the bridge was moved from");
  bridge.shutdown(runtime_bridge::Shutdown::drain);
  CHECK(text(bridge.block_on([] {})) == "the worker was stopped");
  CHECK(text(bridge.submit([] {}).join()) == "the worker was stopped");
  const RuntimeBridge never_started(lazy());
  never_started.shutdown(runtime_bridge::Shutdown::drain);
  CHECK(text(never_started.block_on([] {})) == "the worker was stopped");
}

TEST_CASE("message: of a worker that could not be started") {
  const RuntimeBridge bridge(lazy());
  std::string constructor;
  Result<void> called, submitted;
  {
    const Limit limit(RLIMIT_NOFILE, 0);
    try {
      const RuntimeBridge none;
    } catch (const std::system_error& e) {
      constructor = e.what();
    }
    called = bridge.block_on([] {});
    submitted = bridge.submit([] {}).join();
  }
  CHECK(constructor.starts_with("runtime_bridge: no reactor: "));
  CHECK(text(called) == "the worker could not be started: " + constructor);
  CHECK(text(submitted) == text(called));
}

TEST_CASE("message: in a forked child", "[child]") {
  const RuntimeBridge bridge;
  auto handle = bridge.submit(park());
  await_calls(bridge, 1);
  const std::string in_the_parent = "the worker lives in the parent process";
  CHECK(in_child_process([&] {
          if (text(bridge.block_on([] {})) != in_the_parent) return 1;
          if (text(bridge.submit([] {}).join()) != in_the_parent) return 2;
          return text(handle.join()) == in_the_parent ? 0 : 3;
        }) == 0);
}

TEST_CASE("message: names the bridges of a ring") {
  const RuntimeBridge a = named("A"), b = named("B"), c = named("C");
  std::string one, joined, two, three;
  unwrap(a.block_on([&] {
    one = text(a.block_on([] {}));
    auto handle = a.submit([] {});
    joined = text(handle.join());
    handle.detach();
    unwrap(b.block_on([&] {
      two = text(a.block_on([] {}));
      unwrap(c.block_on([&] { three = text(a.block_on([] {})); }));
    }));
  }));
  CHECK(one == "the call would wait for itself: A -> A");
  CHECK(joined == one);
  CHECK(two == "the call would wait for itself: B -> A -> B");
  CHECK(three == "the call would wait for itself: C -> A -> B -> C");
}

TEST_CASE("message: numbers the bridges of a ring that have the same name") {
  const RuntimeBridge a = named("store"), b = named("store"), c = named("index");
  std::string two, three;
  unwrap(a.block_on([&] {
    unwrap(b.block_on([&] {
      two = text(a.block_on([] {}));
      unwrap(c.block_on([&] { three = text(a.block_on([] {})); }));
    }));
  }));
  const auto ring = [](const std::string& message) { return message.substr(message.rfind(": ") + 2); };
  INFO(two << "\n" << three);
  const std::string to = " -> ";
  const std::string first = ring(two).substr(0, ring(two).find(to));
  const std::string second = ring(two).substr(first.size() + to.size(), first.size());
  CHECK(first.starts_with("store#"));
  CHECK(second.starts_with("store#"));
  CHECK(first != second);
  CHECK(ring(two) == first + to + second + to + first);
  CHECK(ring(three) == "index" + to + second + to + first + to + "index");
}

TEST_CASE("message: an error that unwrap threw in a task is not repeated") {
  const RuntimeBridge bridge, gone;
  gone.shutdown(runtime_bridge::Shutdown::drain);
  const auto nested = bridge.block_on([&] { return unwrap(gone.block_on([] { return 1; })); });
  REQUIRE_FALSE(nested.has_value());
  CHECK(nested.error() == BridgeError::ResponseLost);
  CHECK(text(nested) == "the task threw: the worker was stopped");
  CHECK_THROWS_WITH(unwrap(nested), "runtime_bridge: the worker was stopped");
  const auto deep = bridge.block_on([&] { return unwrap(nested); });
  CHECK(text(deep) == text(nested));
}

TEST_CASE("message: of a handle that is joined twice") {
  const RuntimeBridge bridge;
  auto handle = bridge.submit([] {});
  unwrap(handle.join());
  try {
    (void)handle.join();
    FAIL("did not throw");
  } catch (const std::system_error& e) {
    CHECK(e.what() == "runtime_bridge: join without a task: " + e.code().message());
  }
}
