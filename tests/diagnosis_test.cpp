// SPDX-License-Identifier: Apache-2.0
//
// What a bridge tells about its calls: calls, report, stats, and the hooks. tests/hangs.cpp is about whole programs.

#include <array>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <iomanip>
#include <mutex>
#include <semaphore>
#include <sstream>
#include <vector>

#include "support.hpp"

#if __has_include(<catch2/catch_test_macros.hpp>)
#include <catch2/matchers/catch_matchers_string.hpp>
using Catch::Matchers::ContainsSubstring;
#else
template <class... Args>
auto ContainsSubstring(Args... args) {
  return Catch::Matchers::Contains(args...);
}
#endif

using runtime_bridge::CallEnd;
using runtime_bridge::CallInfo;
using runtime_bridge::named;
using runtime_bridge::Shutdown;
using runtime_bridge::SourceLocation;
using runtime_bridge::State;
using runtime_bridge::Stats;
using runtime_bridge::WhenFull;
using SteadyClock = std::chrono::steady_clock;

namespace {

/// Waits until the bridge has this number of calls, all in this state.
void await_all(const RuntimeBridge& bridge, State state, std::size_t number = 1) {
  await_state([&] {
    const auto calls = bridge.calls();
    return calls.size() == number &&
           std::all_of(calls.begin(), calls.end(), [&](const auto& call) { return call.state == state; });
  });
}

std::string report() {
  std::ostringstream out;
  RuntimeBridge::report(out);
  return out.str();
}

/// A bridge whose worker is blocked in a handler until `go_on`.
class StuckBridge {
 public:
  StuckBridge() {
    asio::post(bridge.get_executor(), [this] {
      stuck_.release();
      go_on_.acquire();
    });
    stuck_.acquire();
  }
  ~StuckBridge() { go_on(); }
  void go_on() { go_on_.release(); }

  RuntimeBridge bridge;

 private:
  std::binary_semaphore stuck_{0};
  std::counting_semaphore<> go_on_{0};
};

/// What a hook was told. Hooks may be called by several threads.
template <class Told>
class Log {
 public:
  void add(Told told) {
    const std::lock_guard lock(mutex_);
    told_.push_back({std::this_thread::get_id(), std::move(told)});
  }
  std::size_t size() const {
    const std::lock_guard lock(mutex_);
    return told_.size();
  }
  struct Entry {
    std::thread::id thread;
    Told told;
  };
  std::vector<Entry> take() {
    const std::lock_guard lock(mutex_);
    return std::exchange(told_, {});
  }

 private:
  mutable std::mutex mutex_;
  std::vector<Entry> told_;
};

struct End {
  explicit End(const CallEnd& end)
      : line(end.where.line()), name(end.name), error(end.error), queued(end.queued), ran(end.ran) {}

  unsigned line;
  std::string name;
  std::optional<BridgeError::Kind> error;
  SteadyClock::duration queued, ran;
};

Options noting_ends(Log<End>& log) {
  Options options;
  options.on_call_end = [&log](const CallEnd& end) { log.add(End(end)); };
  return options;
}

Options noting_lost_errors(Log<BridgeError>& log) {
  Options options;
  options.on_unjoined_error = [&log](const BridgeError& error) { log.add(error); };
  return options;
}

awaitable<void> throw_boo() {
  co_await asio::post(use_awaitable);
  throw std::runtime_error("boo");
}

}  // namespace

// ---------------------------------------------------------------------------------------------------------------------
// calls

TEST_CASE("calls: a call knows its line, its caller, its age and its deadline") {
  RuntimeBridge bridge;
  CHECK(bridge.calls().empty());
  unsigned line = 0;
  std::thread::id id;
  const auto before = SteadyClock::now();
  std::atomic<bool> may_end{false};
  jthread caller([&] {
    pthread_setname_np(pthread_self(), "reader");
    id = std::this_thread::get_id();
    line = __LINE__ + 1;
    (void)bridge.block_on_for([&] { return run_until(may_end); }, 1h);
  });
  await_all(bridge, State::running);
  const auto calls = bridge.calls();
  const auto now = SteadyClock::now();
  CHECK(calls[0].where.line() == line);
  CHECK_THAT(calls[0].where.file_name(), ContainsSubstring("diagnosis_test.cpp"));
  CHECK(calls[0].name.empty());
  CHECK(calls[0].caller == id);
  CHECK(calls[0].caller_name == "reader");
  CHECK(calls[0].age <= now - before);
  REQUIRE(calls[0].deadline);
  CHECK(*calls[0].deadline >= before + 1h);
  CHECK(*calls[0].deadline <= now + 1h);
  may_end = true;
  caller.join();
  CHECK(bridge.calls().empty());
}

TEST_CASE("calls: a deadline of another clock is told on the steady clock") {
  RuntimeBridge bridge;
  std::atomic<bool> may_end{false};
  const auto before = SteadyClock::now();
  jthread caller(
      [&] { (void)bridge.block_on_until([&] { return run_until(may_end); }, std::chrono::system_clock::now() + 1h); });
  await_all(bridge, State::running);
  const auto deadline = bridge.calls()[0].deadline;
  may_end = true;
  caller.join();
  REQUIRE(deadline);
  CHECK(*deadline >= before + 59min);
  CHECK(*deadline <= SteadyClock::now() + 61min);
}

TEST_CASE("calls: a submitted call has no caller and no deadline") {
  RuntimeBridge bridge;
  const unsigned line = __LINE__ + 1;
  auto handle = bridge.submit(named("in the background", park()));
  await_all(bridge, State::running);
  const auto calls = bridge.calls();
  CHECK(calls[0].where.line() == line);
  CHECK(calls[0].name == "in the background");
  CHECK(calls[0].caller == std::thread::id());
  CHECK(calls[0].caller_name.empty());
  CHECK_FALSE(calls[0].deadline);
}

TEST_CASE("calls: a worker that is stuck in a handler keeps nobody from asking") {
  StuckBridge stuck;
  auto handle = stuck.bridge.submit([] { return 5; });
  Result<int> result;
  jthread caller([&] { result = stuck.bridge.block_on([] { return 6; }); });
  await_all(stuck.bridge, State::queued, 2);
  handle.request_stop();
  await_state([&] { return stuck.bridge.calls()[0].state == State::cancelling; });
  CHECK(stuck.bridge.calls()[1].state == State::queued);
  CHECK(stuck.bridge.stats().admitted == 2);
  CHECK_THAT(report(), ContainsSubstring("2 calls in flight"));
  stuck.go_on();
  caller.join();
  CHECK(result == 6);
}

TEST_CASE("calls: a task that ignores its stop is being cancelled") {
  RuntimeBridge bridge;
  std::atomic<bool> may_end{false};
  auto handle = bridge.submit([&]() -> awaitable<void> {
    co_await asio::this_coro::reset_cancellation_state(asio::disable_cancellation());
    auto running = run_until(may_end);
    co_await std::move(running);
  });
  await_all(bridge, State::running);
  handle.request_stop();
  await_all(bridge, State::cancelling);
  may_end = true;
  CHECK(handle.join());
}

namespace {
Result<void> wrapper(const RuntimeBridge& bridge, const std::atomic<bool>& may_end,
                     SourceLocation where = SourceLocation::current()) {
  return bridge.block_on([&] { return run_until(may_end); }, {}, where);
}
}  // namespace

TEST_CASE("calls: a wrapper passes its caller's line on") {
  RuntimeBridge bridge;
  std::atomic<bool> may_end{false};
  unsigned line = 0;
  jthread caller([&] {
    line = __LINE__ + 1;
    (void)wrapper(bridge, may_end);
  });
  await_all(bridge, State::running);
  CHECK(bridge.calls()[0].where.line() == line);
  may_end = true;
}

TEST_CASE("named: every kind of task can have a name") {
  Log<End> ends;
  RuntimeBridge bridge(noting_ends(ends));
  const std::string name = "a name that is too long for a small string";
  asio::steady_timer timer(bridge.get_executor(), 1ms);
  auto lvalue = [calls = 0]() mutable { return ++calls; };
  auto named_lvalue = named(name, lvalue);
  CHECK(bridge.block_on(named(name, seven())) == 7);
  CHECK(bridge.block_on(named(name, seven)) == 7);
  CHECK(bridge.block_on(named(name, [] { return 8; })) == 8);
  CHECK(bridge.block_on(named(name, [box = std::make_unique<int>(9)] { return *box; })) == 9);
  CHECK(bridge.block_on(named_lvalue) == 1);
  CHECK(bridge.block_on_for(named_lvalue, 1h) == 2);  // the name is still there
  CHECK(lvalue() == 3);                               // the task was borrowed
  CHECK(bridge.submit(named_lvalue).join() == 4);     // and copied by submit
  CHECK(lvalue() == 4);
  CHECK(bridge.submit(named(name, [box = std::make_unique<int>(9)] { return *box; })).join() == 9);
  CHECK(bridge.submit(named(name, seven())).join() == 7);
  const auto told = ends.take();
  CHECK(told.size() == 9);
  for (const auto& entry : told) CHECK(entry.told.name == name);
}

namespace {

/// The caller that reads it is held until the test lets it go on.
struct HeldClock {
  using duration = std::chrono::nanoseconds;
  using rep = duration::rep;
  using period = duration::period;
  using time_point = std::chrono::time_point<HeldClock>;
  static constexpr bool is_steady = true;
  static time_point now() {
    if (++reads > 1) {  // the first comes before the call
      held = true;
      go_on.acquire();
    }
    return time_point();
  }

  static inline std::atomic<int> reads{0};
  static inline std::atomic<bool> held{false};
  static inline std::counting_semaphore<> go_on{0};
};

}  // namespace

TEST_CASE("calls: what has ended is not listed, even if its caller is not awake yet") {
  Options options;
  options.spin_limit = 0us;
  RuntimeBridge bridge(std::move(options));
  std::atomic<bool> may_end{false};
  Result<void> result;
  jthread caller(
      [&] { result = bridge.block_on_until([&] { return run_until(may_end); }, HeldClock::time_point(1h)); });
  await_state([] { return HeldClock::held.load(); });
  CHECK(bridge.calls().size() == 1);
  may_end = true;
  await_state([&] { return bridge.in_flight() == 0; });
  CHECK(bridge.calls().empty());
  HeldClock::go_on.release(100);
  caller.join();
  CHECK(result);
}

TEST_CASE("calls: what has ended is not listed, whoever asks", "[race]") {
  RuntimeBridge bridge;
  std::atomic<bool> stop{false};
  std::atomic<int> wrong{0};
  std::vector<jthread> threads;
  threads.reserve(5);
  for (int i = 0; i < 3; ++i) {
    threads.emplace_back([&, i] {
      while (!stop) {
        const std::string name = "caller " + std::to_string(i) + " with a name on the heap";
        switch (i) {
          case 0: (void)bridge.block_on(named(name, [] { return 1; })); break;
          case 1: (void)bridge.block_on_for(named(name, seven), 1ms); break;
          default: {
            auto handle = bridge.submit(named(name, seven));
            handle.request_stop();
          }
        }
      }
    });
  }
  for (int i = 0; i < 2; ++i) {
    threads.emplace_back([&, i] {
      for (int n = 0; n < 300; ++n) {
        for (const CallInfo& call : bridge.calls())
          if (call.name.size() != std::string("caller 0 with a name on the heap").size()) ++wrong;
        const Stats stats = bridge.stats();
        if (stats.in_flight > 3) ++wrong;
        if (n % 16 == 0) (void)report();
      }
      if (i == 0) stop = true;
    });
  }
  threads.clear();
  CHECK(wrong == 0);
  CHECK(bridge.in_flight() == 0);
  CHECK(bridge.calls().empty());
}

// ---------------------------------------------------------------------------------------------------------------------
// report

TEST_CASE("report: names bridges, calls and callers") {
  RuntimeBridge bridge = RuntimeBridge::with_thread_name("storage");
  std::atomic<bool> may_end{false};
  jthread caller([&] {
    pthread_setname_np(pthread_self(), "reader");
    (void)bridge.block_on_for(named("get a", [&] { return run_until(may_end); }), 1h);
  });
  auto handle = bridge.submit(park());
  await_all(bridge, State::running, 2);
  const std::string text = report();
  may_end = true;
  CHECK_THAT(text, ContainsSubstring("runtime_bridge: 1 bridge\nstorage#"));
  CHECK_THAT(text, ContainsSubstring(": 2 calls in flight; "));
  CHECK_THAT(text, ContainsSubstring("  running, "));
  CHECK_THAT(text, ContainsSubstring(" \"get a\", called by thread "));
  CHECK_THAT(text, ContainsSubstring(" \"reader\", deadline in 35"));
  CHECK_THAT(text, ContainsSubstring("diagnosis_test.cpp:"));
  CHECK_THAT(text, ContainsSubstring(", submitted\n"));
}

TEST_CASE("report: says what the worker does") {
  RuntimeBridge bridge;
  // A worker that has just started, or is on its way to wait, is not idle yet.
  SECTION("idle") {
    await_state([] { return report().find(": 0 calls in flight; the worker is idle\n") != std::string::npos; });
  }
  SECTION("idle, with tasks that wait") {
    auto handle = bridge.submit(park());
    await_all(bridge, State::running);
    await_state([] { return report().find("idle: what the tasks wait for has not happened") != std::string::npos; });
  }
  SECTION("not started") {
    const RuntimeBridge other(lazy());
    CHECK_THAT(report(), ContainsSubstring("the worker has not started"));
  }
  SECTION("ended") {
    (void)bridge.shutdown(Shutdown::drain);
    CHECK_THAT(report(), ContainsSubstring("the worker has ended"));
  }
  SECTION("shutting down") {
    std::atomic<bool> may_end{false};
    auto handle = bridge.submit([&] { return run_until(may_end); });
    await_all(bridge, State::running);
    jthread closer([&] { (void)bridge.shutdown(Shutdown::drain); });
    await_closed(bridge);
    CHECK_THAT(report(), ContainsSubstring("the bridge is being shut down"));
    may_end = true;
  }
}

namespace {

/// Whether the report says that a worker has been busy for this long, or a bit longer.
bool says_busy_for_tenths(int tenths) {
  const std::string text = report();
  const std::string words = "the worker has been busy for ";
  const std::size_t at = text.find(words);
  if (at == std::string::npos) return false;
  std::istringstream rest(text.substr(at + words.size()));
  double number = 0;
  std::string unit;
  rest.imbue(std::locale::classic());
  rest >> number >> unit;
  const double seconds = unit.substr(0, 2) == "ms" ? number / 1000 : number;
  return seconds >= 0.1 * tenths - 0.01 && seconds < 0.1 * tenths + 20;
}

}  // namespace

TEST_CASE("report: tells how long a worker has not come back to its loop") {
  // Each blocks the worker at a different place. The age must be that of the blockage, not that of the call.
  std::binary_semaphore blocks(0);
  std::binary_semaphore go_on(0);
  const auto block = [&] {
    blocks.release();
    go_on.acquire();
  };
  const auto check = [&] {
    blocks.acquire();
    const auto begin = SteadyClock::now();
    await_state([&] { return SteadyClock::now() - begin >= 300ms; });
    CHECK(says_busy_for_tenths(3));
    go_on.release();
  };
  SECTION("the first step of a call") {
    RuntimeBridge bridge;
    auto handle = bridge.submit([&] { block(); });
    check();
  }
  SECTION("the first step of a coroutine") {
    RuntimeBridge bridge;
    auto handle = bridge.submit([&]() -> awaitable<void> {
      block();
      co_return;
    });
    check();
  }
  SECTION("a step after a timer") {
    RuntimeBridge bridge;
    auto handle = bridge.submit([&]() -> awaitable<void> {
      co_await sleep_for(1ms);
      block();
    });
    check();
  }
  SECTION("a step after a timer, on a lazy bridge that a client was made for before") {
    RuntimeBridge bridge(lazy());
    asio::steady_timer timer(bridge.get_executor(), 1ms);
    auto handle = bridge.submit([&]() -> awaitable<void> {
      co_await timer.async_wait(use_awaitable);
      block();
    });
    check();
  }
  SECTION("a raw handler") {
    RuntimeBridge bridge;
    asio::steady_timer timer(bridge.get_executor(), 1ms);
    timer.async_wait([&](const auto&) { block(); });
    check();
  }
}

TEST_CASE("report: a worker that does no I/O, and is stuck after its first step, does not answer") {
  StuckBridge stuck;
  CHECK_THAT(report(), ContainsSubstring("the worker has been busy for "));  // since it was asked
  CHECK_THAT(report(), ContainsSubstring("the worker has been busy for "));
  stuck.go_on();
  unwrap(stuck.bridge.block_on([] {}));
  await_state([] { return report().find("the worker is idle") != std::string::npos; });
}

TEST_CASE("report: says which bridge waits for which") {
  RuntimeBridge a = RuntimeBridge::with_thread_name("first");
  RuntimeBridge b = RuntimeBridge::with_thread_name("second");
  std::atomic<bool> may_end{false};
  auto handle = a.submit([&] { return b.block_on([&] { return run_until(may_end); }).has_value(); });
  await_all(b, State::running);
  const std::string text = report();
  may_end = true;
  CHECK_THAT(text, ContainsSubstring("runtime_bridge: 2 bridges\n"));
  CHECK_THAT(text, ContainsSubstring("the worker has been waiting for second#"));
  CHECK_THAT(text, ContainsSubstring(" \"first\"\n"));  // the worker of the first is the caller
  CHECK(handle.join() == true);
}

TEST_CASE("report: names are printed as they are, control characters escaped") {
  RuntimeBridge bridge = RuntimeBridge::with_thread_name("sto\x1b[31mrage");
  auto handle = bridge.submit(named("\xc3\xa4\n\t\x7f%s", park()));
  await_all(bridge, State::running);
  const std::string text = report();
  CHECK_THAT(text, ContainsSubstring("sto\\x1b[31mrage#"));
  CHECK_THAT(text, ContainsSubstring("\"\xc3\xa4\\x0a\\x09\\x7f%s\""));
}

TEST_CASE("report: the flags of the stream do not matter") {
  const RuntimeBridge bridge;
  std::ostringstream out;
  out << std::hex << std::setw(200) << std::setfill('*');
  RuntimeBridge::report(out);
  CHECK(out.str().rfind("runtime_bridge: 1 bridge\n", 0) == 0);
}

#ifndef SANITIZED  // the runtimes do not survive a fork of a busy process
TEST_CASE("report: bridges come and go, and fork", "[race][child]") {
  std::atomic<bool> stop{false};
  std::vector<jthread> threads;
  threads.reserve(3);
  for (int i = 0; i < 2; ++i) {
    threads.emplace_back([&] {
      while (!stop) {
        RuntimeBridge bridge;
        (void)bridge.block_on([] {});
      }
    });
  }
  threads.emplace_back([&] {
    while (!stop) (void)report();
  });
  RuntimeBridge parents;
  auto handle = parents.submit(park());
  await_all(parents, State::running);
  for (int n = 0; n < 20; ++n) {
    const int status = in_child_process([&] {
      if (!parents.calls().empty()) return 1;
      if (parents.stats().admitted != 0) return 2;
      if (report() != "runtime_bridge: 0 bridges\n") return 3;
      if (parents.block_on([] {}).has_value()) return 4;
      const RuntimeBridge childs;
      if (childs.block_on([] { return 5; }) != 5) return 5;
      if (report().rfind("runtime_bridge: 1 bridge\n", 0) != 0) return 6;
      return childs.stats().values == 1 ? 0 : 7;
    });
    CHECK(status == 0);
  }
  stop = true;
}
#endif

// ---------------------------------------------------------------------------------------------------------------------
// The hooks

namespace {

/// A bridge whose slow calls are noted.
struct SlowBridge {
  explicit SlowBridge(std::chrono::nanoseconds slow_after) : bridge(options(slow_after)) {}

  Options options(std::chrono::nanoseconds slow_after) {
    Options options;
    options.slow_after = slow_after;
    options.on_slow_call = [this](const CallInfo& call) {
      slow.add(call);
      (void)report();
      throw std::runtime_error("dropped");
    };
    return options;
  }

  /// Runs until this number of slow calls was told.
  awaitable<void> run(std::size_t number) {
    while (slow.size() < number) co_await sleep_for(1ms);
  }

  Log<CallInfo> slow;
  RuntimeBridge bridge;
};

void check_doubling(const std::vector<Log<CallInfo>::Entry>& told, SteadyClock::duration first) {
  for (const auto& entry : told) {
    CHECK(entry.told.age >= first);
    first = 2 * entry.told.age;
    CHECK(entry.thread == std::this_thread::get_id());
  }
}

}  // namespace

TEST_CASE("slow calls: told on the thread that waits, again each time the age has doubled") {
  SlowBridge slow(5ms);
  CHECK(slow.bridge.block_on(named("get", [&] { return slow.run(4); })));
  const auto told = slow.slow.take();
  CHECK(told.size() >= 4);
  check_doubling(told, 5ms);
  for (const auto& entry : told) {
    CHECK(entry.told.name == "get");
    CHECK(entry.told.state == State::running);
    CHECK(entry.told.caller == std::this_thread::get_id());
  }
}

TEST_CASE("slow calls: a task that ignores its deadline stays slow") {
  Log<CallInfo> slow;
  std::atomic<bool> told_of_cancellation{false};
  Options options;
  options.slow_after = 5ms;
  options.on_slow_call = [&](const CallInfo& call) {
    slow.add(call);
    if (call.state == State::cancelling) told_of_cancellation = true;
  };
  RuntimeBridge bridge(std::move(options));
  const auto stubborn = [&]() -> awaitable<void> {
    co_await asio::this_coro::reset_cancellation_state(asio::disable_cancellation());
    auto running = run_until(told_of_cancellation);
    co_await std::move(running);
  };
  CHECK(bridge.block_on_for(stubborn, 300ms));  // long enough to start on a busy machine
  const auto told = slow.take();
  check_doubling(told, 5ms);
  CHECK(told.back().told.state == State::cancelling);
}

TEST_CASE("slow calls: those that are joined") {
  SlowBridge slow(5ms);
  auto handle = slow.bridge.submit([&] { return slow.run(3); });
  await_state([&] { return slow.bridge.calls()[0].age > 5ms; });
  CHECK(slow.slow.size() == 0);  // nobody waits
  (void)handle.wait_for(1ms);
  CHECK(slow.slow.size() >= 1);
  (void)handle.wait_for(0ms);
  CHECK(handle.join());
  const auto told = slow.slow.take();
  CHECK(told.size() >= 3);
  check_doubling(told, 5ms);
}

TEST_CASE("slow calls: zero means at once") {
  SlowBridge slow(0ns);
  CHECK(slow.bridge.block_on([&] { return slow.run(3); }));
  check_doubling(slow.slow.take(), 0ns);
}

TEST_CASE("slow calls: none without a limit, or before it") {
  SlowBridge never((std::chrono::nanoseconds::max)());
  CHECK(never.bridge.block_on(sleep_for(5ms)));
  CHECK(never.slow.size() == 0);
  SlowBridge later(1h);
  CHECK(later.bridge.block_on(sleep_for(5ms)));
  CHECK(later.slow.size() == 0);
}

TEST_CASE("slow calls: a hook on another bridge's worker cannot wait for a bridge") {
  RuntimeBridge other;
  RuntimeBridge outer;
  std::optional<Outcome> nested;
  std::atomic<bool> told{false};
  Options options;
  options.slow_after = 1ms;
  options.on_slow_call = [&](const CallInfo&) {
    if (!nested) nested = outcome(other.block_on([] {}));
    told = true;
  };
  RuntimeBridge inner(std::move(options));
  CHECK(outer.block_on([&] { return inner.block_on([&] { return run_until(told); }).has_value(); }) == true);
  CHECK(nested == would_deadlock);
  // On a plain thread it can.
  nested.reset();
  told = false;
  CHECK(inner.block_on([&] { return run_until(told); }));
  CHECK(nested == succeeded);
  // Rings are still found afterwards.
  CHECK(outer.block_on([&] { return outcome(inner.block_on([&] { return outcome(outer.block_on([] {})); })); })
            .has_value());
}

TEST_CASE("on_call_end: once for each call, with its outcome") {
  Log<End> ends;
  RuntimeBridge bridge(noting_ends(ends));
  const auto me = std::this_thread::get_id();
  const auto worker = worker_of(bridge);
  ends.take();
  const auto check = [&](std::optional<BridgeError::Kind> error, std::thread::id thread) {
    const auto told = ends.take();
    REQUIRE(told.size() == 1);
    CHECK(told[0].told.error == error);
    CHECK(told[0].thread == thread);
    CHECK(told[0].told.queued >= 0ns);
    CHECK(told[0].told.ran >= 0ns);
  };
  CHECK(bridge.block_on(seven) == 7);
  check(std::nullopt, me);
  CHECK_FALSE(bridge.block_on(throw_boo));
  check(BridgeError::ResponseLost, me);
  CHECK_FALSE(bridge.block_on_for(park(), 1ms));
  check(BridgeError::TimedOut, me);
  CHECK_FALSE(bridge.block_on_for([] {}, 0ms));
  check(BridgeError::TimedOut, me);
  CHECK(bridge.submit(seven).join() == 7);
  check(std::nullopt, worker);
  {
    auto handle = bridge.submit(park());
    handle.request_stop();
    CHECK_FALSE(handle.join());
  }
  check(BridgeError::Cancelled, worker);
  CHECK(bridge.block_on([&] { return outcome(bridge.block_on([] {})); }).value() == would_deadlock);
  auto told = ends.take();
  REQUIRE(told.size() == 2);
  CHECK(told[0].told.error == BridgeError::WouldDeadlock);
  CHECK(told[0].thread == worker);
  CHECK_FALSE(told[1].told.error);
  (void)bridge.shutdown(Shutdown::drain);
  CHECK_FALSE(bridge.block_on([] {}));
  check(BridgeError::WorkerDead, me);
  CHECK_FALSE(bridge.submit([] {}).join());
  check(BridgeError::WorkerDead, me);
}

TEST_CASE("on_call_end: what throws is dropped") {
  Options options;
  options.on_call_end = [](const CallEnd&) { throw std::runtime_error("dropped"); };
  RuntimeBridge bridge(std::move(options));
  CHECK(bridge.block_on(seven) == 7);
  CHECK(bridge.submit(seven).join() == 7);
}

TEST_CASE("on_call_end: tells how long a call was queued, and how long its task ran") {
  Log<End> ends;
  RuntimeBridge bridge(noting_ends(ends));
  CHECK(bridge.block_on(sleep_for(20ms)));
  auto told = ends.take();
  REQUIRE(told.size() == 1);
  CHECK(told[0].told.ran >= 20ms);

  std::binary_semaphore go_on(0);
  asio::post(bridge.get_executor(), [&] { go_on.acquire(); });
  auto handle = bridge.submit([] {});
  await_state([&] { return bridge.calls()[0].age >= 20ms; });
  go_on.release();
  CHECK(handle.join());
  told = ends.take();
  REQUIRE(told.size() == 1);
  CHECK(told[0].told.queued >= 20ms);
}

TEST_CASE("on_call_end: a call that never ran was queued until it ended") {
  Log<End> ends;
  RuntimeBridge bridge(noting_ends(ends));
  std::binary_semaphore go_on(0);
  asio::post(bridge.get_executor(), [&] { go_on.acquire(); });
  auto handle = bridge.submit([] {});
  handle.request_stop();
  await_state([&] { return bridge.calls()[0].age >= 20ms; });
  go_on.release();
  CHECK_FALSE(handle.join());
  const auto told = ends.take();
  REQUIRE(told.size() == 1);
  CHECK(told[0].told.queued >= 20ms);
  CHECK(told[0].told.ran == 0ns);
}

TEST_CASE("stats: each call is counted once") {
  RuntimeBridge bridge;
  CHECK(bridge.block_on(seven) == 7);
  CHECK(bridge.submit(seven).join() == 7);
  CHECK_FALSE(bridge.block_on(throw_boo));
  CHECK_FALSE(bridge.block_on_for(park(), 50ms));
  CHECK_FALSE(bridge.block_on_for([] {}, 0ms));
  {
    const auto cancelled = bridge.submit(park());
    CHECK(bridge.stats().in_flight == 1);
  }
  CHECK(bridge.block_on([&] { return outcome(bridge.block_on([] {})); }).value() == would_deadlock);
  (void)bridge.shutdown(Shutdown::drain);
  CHECK_FALSE(bridge.block_on([] {}));
  const Stats stats = bridge.stats();
  CHECK(stats.admitted == 6);
  CHECK(stats.values == 3);
  CHECK(stats.response_lost == 1);
  CHECK(stats.timed_out == 2);
  CHECK(stats.cancelled == 1);
  CHECK(stats.would_deadlock == 1);
  CHECK(stats.worker_dead == 1);
  CHECK(stats.overloaded == 0);
  CHECK(stats.in_flight == 0);
  CHECK(stats.most_in_flight == 1);
}

TEST_CASE("diagnosis: a bridge that was moved from has nothing to tell") {
  RuntimeBridge bridge;
  const RuntimeBridge taken(std::move(bridge));
  CHECK(bridge.calls().empty());  // NOLINT(bugprone-use-after-move): that is the test
  CHECK(bridge.stats().admitted == 0);
}

TEST_CASE("on_unjoined_error: a detached call that fails") {
  Log<BridgeError> lost;
  RuntimeBridge bridge(noting_lost_errors(lost));
  const auto worker = worker_of(bridge);
  SECTION("after it was detached") {
    std::atomic<bool> may_end{false};
    bridge
        .submit([&may_end]() -> awaitable<void> {
          co_await run_until(may_end);
          throw std::runtime_error("boo");
        })
        .detach();
    may_end = true;
    await_state([&] { return lost.size() == 1; });
    const auto told = lost.take();
    CHECK(told[0].thread == worker);
    CHECK(told[0].told == BridgeError::ResponseLost);
    CHECK(what(told[0].told.cause()) == "boo");
  }
  SECTION("before it was detached") {
    auto handle = bridge.submit(throw_boo);
    (void)handle.wait_for(1h);
    CHECK(lost.size() == 0);
    handle.detach();
    handle.detach();
    const auto told = lost.take();
    REQUIRE(told.size() == 1);
    CHECK(told[0].thread == std::this_thread::get_id());
    CHECK(what(told[0].told.cause()) == "boo");
  }
  SECTION("because the bridge is stopped under it") {
    {
      const RuntimeBridge stopped(noting_lost_errors(lost));
      stopped.submit(park_stubbornly()).detach();
    }
    const auto told = lost.take();
    REQUIRE(told.size() == 1);
    CHECK(outcome(error_result<void>(told[0].told)) == response_lost);
  }
  SECTION("because it was refused") {
    (void)bridge.shutdown(Shutdown::drain);
    bridge.submit([] {}).detach();
    const auto told = lost.take();
    REQUIRE(told.size() == 1);
    CHECK(told[0].told == BridgeError::WorkerDead);
  }
}

TEST_CASE("on_unjoined_error: a handle that is destroyed without a join") {
  Log<BridgeError> lost;
  RuntimeBridge bridge(noting_lost_errors(lost));
  SECTION("its task had failed") {
    {
      auto handle = bridge.submit(throw_boo);
      (void)handle.wait_for(1h);
    }
    REQUIRE(lost.size() == 1);
    CHECK(what(lost.take()[0].told.cause()) == "boo");
  }
  SECTION("another one takes its place") {
    auto handle = bridge.submit(throw_boo);
    (void)handle.wait_for(1h);
    handle = JoinHandle<void>();
    CHECK(lost.size() == 1);
  }
  SECTION("its task fails because it is cancelled") {
    {
      auto handle = bridge.submit(park());
      await_all(bridge, State::running);
    }
    CHECK(lost.size() == 0);
  }
  SECTION("its task never starts because it is cancelled") {
    std::binary_semaphore go_on(0);
    asio::post(bridge.get_executor(), [&] { go_on.acquire(); });
    auto handle = bridge.submit([] {});
    handle.request_stop();
    go_on.release();
    handle = JoinHandle<void>();
    CHECK(lost.size() == 0);
  }
  SECTION("its task fails in another way once it is cancelled") {
    {
      auto handle = bridge.submit([]() -> awaitable<void> {
        try {
          co_await park();
        } catch (const AsioError&) {
          throw std::runtime_error("cannot clean up");
        }
      });
      await_all(bridge, State::running);
    }
    REQUIRE(lost.size() == 1);
    CHECK(what(lost.take()[0].told.cause()) == "cannot clean up");
  }
  SECTION("on the worker, where nothing waits") {
    CHECK(bridge.block_on([&] { auto handle = bridge.submit(throw_boo); }));
    await_state([&] { return bridge.in_flight() == 0; });
    CHECK(lost.size() <= 1);  // the stop may come first
  }
  SECTION("it was joined") {
    auto handle = bridge.submit(throw_boo);
    CHECK_FALSE(handle.join());
    handle.detach();
    handle = JoinHandle<void>();
    CHECK(lost.size() == 0);
  }
  SECTION("its task has a value") {
    { auto handle = bridge.submit(park_and_return(3)); }
    bridge.submit(seven).detach();
    await_state([&] { return bridge.in_flight() == 0; });
    CHECK(lost.size() == 0);
  }
}

TEST_CASE("on_unjoined_error: once, when a detach races the end", "[race]") {
  std::atomic<int> lost{0};
  Options options;
  options.on_unjoined_error = [&](const BridgeError&) { ++lost; };
  RuntimeBridge bridge(std::move(options));
  for (int round = 1; round <= 1000; ++round) {
    auto handle = bridge.submit([]() -> int { throw std::runtime_error("boo"); });
    if (round % 2 == 0) std::this_thread::yield();
    handle.detach();
    await_state([&] { return bridge.in_flight() == 0; });
    CHECK(lost == round);
  }
}

TEST_CASE("hooks: none is called in a forked child", "[child]") {
  std::atomic<int> told{0};
  Options options;
  options.slow_after = 1ms;
  options.on_slow_call = [&](const CallInfo&) { ++told; };
  options.on_call_end = [&](const CallEnd&) { ++told; };
  options.on_unjoined_error = [&](const BridgeError&) { ++told; };
  RuntimeBridge bridge(std::move(options));
  auto handle = bridge.submit(park());
  await_all(bridge, State::running);
  const int status = in_child_process([&] {
    const auto refused = bridge.block_on([] {});
    bridge.submit([] {}).detach();
    handle = JoinHandle<void>();
    return !refused && refused.error() == BridgeError::WorkerDead ? told.load() : 99;
  });
  CHECK(status == 0);
}
