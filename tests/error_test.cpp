// SPDX-License-Identifier: Apache-2.0
//
// BridgeError, its error category, Result and unwrap.

#include <concepts>
#include <memory>
#include <sstream>
#include <stdexcept>

#include "support.hpp"

static_assert(std::regular<BridgeError>);
static_assert(std::is_nothrow_move_constructible_v<BridgeError> && std::is_nothrow_move_assignable_v<BridgeError>);
static_assert(std::is_error_code_enum_v<BridgeError::Kind>);
static_assert(!std::is_copy_constructible_v<RuntimeBridge> && std::is_nothrow_move_constructible_v<RuntimeBridge> &&
              std::is_nothrow_move_assignable_v<RuntimeBridge>);

namespace {

Result<int> failed(BridgeError error) { return runtime_bridge::detail::unexpected<BridgeError>(std::move(error)); }

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

TEST_CASE("error: the message is one sentence that ends with the cause") {
  CHECK(BridgeError(BridgeError::WorkerDead).message() == "runtime_bridge: the worker is gone");
  CHECK(BridgeError(BridgeError::ResponseLost, some_exception()).message() ==
        "runtime_bridge: the task ended without a value: row 7");
  CHECK(BridgeError(BridgeError::TimedOut, std::make_exception_ptr(7)).message() ==
        "runtime_bridge: the deadline passed and the task was cancelled: an exception that is not a std::exception");
}

TEST_CASE("error: the category") {
  const std::error_code code = BridgeError::WouldDeadlock;
  CHECK(code.category().name() == std::string("runtime_bridge"));
  CHECK(code.value() == 5);
  CHECK(code.message() == "the call would wait for itself");
  CHECK(code == std::errc::resource_deadlock_would_occur);
  CHECK(make_error_code(BridgeError::TimedOut) == std::errc::timed_out);
  CHECK(make_error_code(BridgeError::Cancelled) == std::errc::operation_canceled);
  CHECK(make_error_code(BridgeError::WorkerDead) == BridgeError::WorkerDead);
  CHECK(make_error_code(BridgeError::WorkerDead) != BridgeError::ResponseLost);
  const std::error_condition own = make_error_code(BridgeError::WorkerDead).default_error_condition();
  CHECK((own.value() == 1 && own.category() == code.category()));
  CHECK(code.category().message(6) == "unknown error");
}

TEST_CASE("unwrap: the value, whatever its type") {
  CHECK(unwrap(Result<int>(3)) == 3);
  unwrap(Result<void>());
  CHECK(*unwrap(Result<std::unique_ptr<int>>(std::make_unique<int>(4))) == 4);
}

TEST_CASE("unwrap: rethrows the task's own exception") {
  CHECK_THROWS_AS(unwrap(failed({BridgeError::ResponseLost, some_exception()})), std::out_of_range);
  CHECK_THROWS_AS(unwrap(failed({BridgeError::ResponseLost, std::make_exception_ptr(7)})), int);
}

TEST_CASE("unwrap: a std::system_error for what is not the task's own") {
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

TEST_CASE("unwrap: inside a task it says its text once") {
  const RuntimeBridge bridge, gone;
  gone.shutdown(runtime_bridge::Shutdown::drain);
  const auto nested = bridge.block_on([&] { return unwrap(gone.block_on([] { return 1; })); });
  REQUIRE_FALSE(nested.has_value());
  CHECK(nested.error() == BridgeError::ResponseLost);
  CHECK(nested.error().message() == "runtime_bridge: the task threw: the worker was stopped");
  CHECK_THROWS_WITH(unwrap(nested), "runtime_bridge: the worker was stopped");
  const auto deep = bridge.block_on([&] { return unwrap(nested); });
  CHECK(deep.error().message() == nested.error().message());
}

TEST_CASE("unwrap: of an lvalue copies, and of an rvalue moves") {
  Result<std::string> text("a text that is too long for the small string");
  const Result<std::string>& same = text;
  CHECK(unwrap(text) == unwrap(same));
  const char* const where = text->data();
  const std::string moved = unwrap(std::move(text));
  CHECK(moved.data() == where);
}

TEST_CASE("error: is written as its message") {
  std::ostringstream out;
  const BridgeError error(BridgeError::TimedOut, some_exception());
  out << error << '.';
  CHECK(out.str() == error.message() + ".");
}
