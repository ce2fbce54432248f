// SPDX-License-Identifier: Apache-2.0
//
// The tasks of the stress test, and the oracle. It checks that the outcome of a call is one that the contract allows,
// given what was done to the call and to its bridge, and that nothing of the call is left when it is over.

#ifndef RUNTIME_BRIDGE_TESTS_STRESS_ORACLE_HPP
#define RUNTIME_BRIDGE_TESTS_STRESS_ORACLE_HPP

#include <atomic>
#include <cstdint>
#include <initializer_list>
#include <memory>
#include <mutex>
#include <string_view>

#include "support.hpp"

namespace stress {

using Clock = std::chrono::steady_clock;
using Payload = std::unique_ptr<std::uint64_t>;  // move-only; the id of its task

/// splitmix64. Every task has its own dice, so what it throws depends only on the seed.
class Dice {
 public:
  explicit Dice(std::uint64_t seed) : state_(seed) {}
  std::uint64_t next() {
    std::uint64_t z = (state_ += 0x9e3779b97f4a7c15);
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9;
    z = (z ^ (z >> 27)) * 0x94d049bb133111eb;
    return z ^ (z >> 31);
  }
  int under(int n) { return static_cast<int>(next() % static_cast<std::uint64_t>(n)); }
  bool one_in(int n) { return under(n) == 0; }
  template <class T>
  T one_of(std::initializer_list<T> all) {
    return *(all.begin() + under(static_cast<int>(all.size())));
  }

 private:
  std::uint64_t state_;
};

/// What has been done to a bridge. Each flag is set before that is done, except `closed`.
struct History {
  int level = 0;
  std::atomic<bool> closing{false};    // it is about to refuse calls
  std::atomic<bool> closed{false};     // it refuses calls
  std::atomic<bool> cancelled{false};  // all its calls are cancelled
  std::atomic<bool> hard{false};       // its context may be stopped with calls in flight
};
using Path = std::vector<std::shared_ptr<History>>;  // the bridges whose workers wait for the code that has this path

struct Bridge {
  Bridge(int level, const Options& options, bool makes_timers) : timers(makes_timers), bridge(options) {
    history->level = level;
    if (timers) const asio::steady_timer first(bridge.get_executor());
  }
  Bridge(const Bridge&) = delete;
  Bridge& operator=(const Bridge&) = delete;
  ~Bridge() { history->closing = history->hard = true; }

  std::shared_ptr<History> history = std::make_shared<History>();
  // Whether threads may make timers on it. The first timer adds a service to the context, which Asio does not allow
  // while the context is shut down, so it is made above.
  const bool timers;
  RuntimeBridge bridge;
};

enum class Kind {
  returns,
  throws,
  suspends,
  hops,
  circles,
  parks,
  swallows,
  ignores,
  stops_itself,
  awaits_a_child,
  parks_on_a_strand,  // in a child
  awaits_either,
  waits_for_a_channel,
  ends_elsewhere,
  nests,
};

struct Boom {
  std::uint64_t id;
};

/// Shared by all tasks of a round.
struct Ground {
  void violation(const std::string& what) {
    const std::lock_guard lock(mutex);
    violations += what + "\n";
  }

  std::atomic<std::int64_t> frames{0}, operations{0};
  asio::thread_pool pool{2};  // belongs to no bridge, and is never blocked
  std::mutex mutex;           // guards what follows
  std::string violations;
};

/// A task and its history. The counters are not atomic: the call's answer must order them before the caller reads them,
/// which ThreadSanitizer checks.
struct Record {
  void check(bool holds, std::string_view what) const {
    if (!holds)
      ground.violation("task " + std::to_string(id) + " of kind " + std::to_string(int(kind)) + ": " +
                       std::string(what));
  }
  bool plain() const { return kind == Kind::returns || kind == Kind::throws || kind == Kind::nests; }
  bool needs_stop() const {
    return kind == Kind::parks || kind == Kind::swallows || kind == Kind::parks_on_a_strand ||
           kind == Kind::waits_for_a_channel;
  }

  Ground& ground;
  const std::shared_ptr<History> history;
  const std::uint64_t id;
  Path path{};                      // of its task
  std::shared_ptr<Bridge> entry{};  // the caller's reference to the bridge
  Kind kind = Kind::returns;
  bool drops = false;          // the task drops `entry` before anything else
  bool may_start = true;       // false: it must be refused
  bool known_ring = false;     // waiting for it closes a ring
  bool ring_possible = false;  // waiting for it may close a ring
  stop_source source{};
  Clock::time_point deadline = Clock::time_point::max();
  int started = 0, returned = 0, threw = 0, frames = 0;
};

/// A coroutine's parameter, or a callable's capture.
class Frame {
 public:
  explicit Frame(Record& record, std::shared_ptr<Record> keep = nullptr) : record_(&record), keep_(std::move(keep)) {
    ++record.frames;
    ++record.ground.frames;
  }
  Frame(Frame&& other) noexcept : record_(std::exchange(other.record_, nullptr)), keep_(std::move(other.keep_)) {}
  Frame& operator=(Frame&&) = delete;
  ~Frame() {
    if (!record_) return;
    --record_->frames;
    --record_->ground.frames;
  }
  Frame another() const { return Frame(*record_, keep_); }
  Record& record() const { return *record_; }

 private:
  Record* record_;
  std::shared_ptr<Record> keep_;  // for a task without a waiting caller
};

void nest(Record& record);  // in stress_test.cpp: more operations, on the worker

inline awaitable<void> nap(Record& record, std::chrono::microseconds length) {
  asio::steady_timer timer(co_await asio::this_coro::executor, length);
  co_await timer.async_wait(use_awaitable);
  record.check(Clock::now() >= timer.expiry(), "a timer that has not expired seems to");
}

/// Kinds that consist of several coroutines and operations.
inline awaitable<void> act_together(Record& r, std::chrono::microseconds length) {
  using namespace asio::experimental::awaitable_operators;
  const asio::any_io_executor executor = co_await asio::this_coro::executor;
  if (r.kind == Kind::awaits_a_child) co_await asio::co_spawn(executor, nap(r, length), use_awaitable);
  if (r.kind == Kind::parks_on_a_strand) {
    const asio::any_io_executor strand = asio::make_strand(executor);
    co_await asio::co_spawn(strand, park(), use_awaitable);
  }
  if (r.kind == Kind::awaits_either) co_await (nap(r, length) || park());
  if (r.kind == Kind::waits_for_a_channel) {
    asio::experimental::channel<void(ErrorCode, int)> channel(executor);
    (void)co_await channel.async_receive(use_awaitable);
  }
}

inline awaitable<void> act(Record& r) {
  const std::chrono::microseconds length(r.id % 500);
  if (r.kind == Kind::throws) throw Boom{r.id};
  if (r.kind == Kind::ignores) co_await asio::this_coro::reset_cancellation_state(asio::disable_cancellation());
  if (r.kind == Kind::hops) co_await asio::post(r.ground.pool, use_awaitable);
  if (r.kind == Kind::ignores || r.kind == Kind::suspends || (r.kind == Kind::hops && r.id % 2))
    co_await nap(r, length);
  for (int i = 0; r.kind == Kind::circles && i < 20; ++i) co_await asio::post(use_awaitable);
  if (r.kind == Kind::stops_itself) r.source.request_stop();
  if (r.kind == Kind::parks || r.kind == Kind::stops_itself || r.kind == Kind::swallows) co_await park();
  if (r.kind >= Kind::awaits_a_child && r.kind <= Kind::waits_for_a_channel) co_await act_together(r, length);
  if (r.kind == Kind::ends_elsewhere) {
    co_await asio::post(asio::bind_executor(r.ground.pool.get_executor(), use_awaitable));
  }
  if (r.kind == Kind::nests) co_await asio::post(use_awaitable);
}

/// Its first step may destroy the bridge that it runs on.
inline void begin(Record& record) {
  ++record.started;
  record.check(record.may_start, "it was started");
  if (record.drops) record.entry.reset();
}

inline Payload end(Record& record) {
  if (record.kind == Kind::nests) nest(record);
  ++record.returned;
  return std::make_unique<std::uint64_t>(record.id);
}

inline awaitable<Payload> task_of(Frame frame) {
  Record& record = frame.record();
  begin(record);
  try {
    co_await act(record);
  } catch (...) {
    ++record.threw;
    if (record.kind != Kind::swallows) throw;
    record.threw = 0;
  }
  co_return end(record);
}

struct Callable {
  awaitable<Payload> operator()() const { return task_of(frame.another()); }
  Frame frame;
};

struct Plain {
  Payload operator()() const {
    Record& record = frame.record();
    begin(record);
    if (record.kind == Kind::throws && ++record.threw) throw Boom{record.id};
    return end(record);
  }
  Frame frame;
};

/// The oracle. `held` is the number of frames that the caller still owns.
inline void judge(const Record& r, const Result<Payload>& result, int held) {
  const History& history = *r.history;
  const auto check = [&](bool holds, const char* what) {
    if (!holds) r.check(false, what + (": " + to_string(outcome(result))));
  };
  const bool refused = !result.has_value() && result.error() == BridgeError::WouldDeadlock;
  if (refused) check(r.ring_possible, "a ring where none can be");
  if (refused && r.entry == nullptr && r.may_start) return;  // the handle was not joined: its task goes on
  check(r.frames == held, "a frame or a capture outlives the call");
  check(r.started <= 1 && r.returned + r.threw <= r.started, "it ran more than once");
  check(r.returned == 1 || !result.has_value(), "a value, and the task has not ended with one");
  check(result.has_value() || r.returned == 0 || history.hard, "no value, but the task has ended with one");
  if (result.has_value()) return check(result->get() && **result == r.id, "not its own value");

  const auto cause = result.error().cause();
  if (r.started == 1) check(bool(cause) == (r.threw == 1) || history.hard, "not what it threw");
  bool boom = false;
  try {
    if (cause) std::rethrow_exception(cause);
  } catch (const Boom& thrown) {
    boom = true;
    check(thrown.id == r.id, "the exception of another");
  } catch (const AsioError& e) {
    check(e.code() == asio::error::operation_aborted || r.kind == Kind::waits_for_a_channel,
          "an exception from nowhere");
  } catch (const asio::multiple_exceptions&) {
    check(r.kind == Kind::awaits_either, "exceptions from nowhere");
  }
  switch (result.error().kind()) {
    case BridgeError::WorkerDead: check(history.closing && r.started == 0 && !cause, "the worker was not dead"); break;
    case BridgeError::ResponseLost: check(boom || (!cause && history.hard), "lost without a reason"); break;
    case BridgeError::TimedOut: check(Clock::now() >= r.deadline, "the deadline has not passed"); break;
    case BridgeError::Cancelled: check(r.source.stop_requested() || history.cancelled, "nobody asked for it"); break;
    case BridgeError::WouldDeadlock: check(r.started == 0, "it was started and refused"); break;
    case BridgeError::Overloaded: check(false, "this bridge has no limit"); break;
  }
}

}  // namespace stress

#endif  // RUNTIME_BRIDGE_TESTS_STRESS_ORACLE_HPP
