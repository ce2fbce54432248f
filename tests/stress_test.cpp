// SPDX-License-Identifier: Apache-2.0
//
// Seeded random schedules of all public operations, on several bridges, on and off their workers. stress_oracle.hpp
// checks the outcome of each call. In the end everything must be given back.
//
//   RUNTIME_BRIDGE_SEED=N            runs this seed alone
//   RUNTIME_BRIDGE_STRESS_SECONDS=S  runs random seeds for S seconds: the long form
//
// The seed decides what each thread does, not how the threads interleave: run a failing one more than once.

#include "stress_oracle.hpp"

#include <algorithm>
#include <array>
#include <cstdlib>
#include <optional>
#include <random>
#include <runtime_bridge/hosted.hpp>
#include <runtime_bridge/range.hpp>
#include <semaphore>
#include <sstream>

// The worker releases a child coroutine's exception after the caller has read it. The reference count that orders the
// two is in libstdc++, where ThreadSanitizer does not see it.
extern "C" const char* __tsan_default_suppressions() {
  return "race:std::__exception_ptr::exception_ptr::_M_release\n";
}

using namespace stress;
using runtime_bridge::CallInfo;
using runtime_bridge::Hosted;
using runtime_bridge::poll_every;
using runtime_bridge::Shutdown;
using runtime_bridge::Stats;
using runtime_bridge::Stop;
using runtime_bridge::unlimited;

namespace {

struct Stray {
  std::shared_ptr<std::atomic<bool>> seen;
};

class World : public Ground {
 public:
  explicit World(std::uint64_t seed) : seed_(seed), ordered_(seed % 2 == 0) {
    Dice dice(~seed);
    for (int level = 0; level < slots; ++level) bridges_[static_cast<std::size_t>(level)] = make(dice, level);
  }

  void run() {
    std::vector<jthread> threads;
    for (std::uint64_t i = 0; i < 3; ++i) {
      threads.emplace_back([this, i] {
        Dice dice(seed_ * 64 + i);
        for (int step = 0; step < 100; ++step) operate(dice, {});
      });
    }
    threads.clear();
    // First, since tasks that outlive their bridge may still call the others.
    if (!comes([&] { return frames == 0; })) violation("a frame is never destroyed");
    // Nothing waits any more, so no call closes a ring.
    for (const auto& a : bridges_) {
      for (const auto& b : bridges_) {
        if (a == b || a->history->closing || b->history->closing) continue;
        const auto call = [&] { return b->bridge.block_on([] {}).has_value(); };
        if (a->bridge.block_on(call) != true) violation("a call between idle bridges is refused");
      }
    }
    for (auto& bridge : bridges_) {
      if (!comes([&] { return bridge->bridge.in_flight() == 0; })) violation("in_flight does not come back to zero");
      if (!bridge->bridge.calls().empty()) violation("a call that has ended is listed");
      const Stats stats = bridge->bridge.stats();
      // Calls that end before they are admitted are counted, too: their deadline has passed, or a stop was requested.
      if (stats.values + stats.response_lost > stats.admitted) violation("a call was counted twice");
      if (stats.values + stats.response_lost + stats.timed_out + stats.cancelled < stats.admitted)
        violation("a call was not counted");
      bridge.reset();
    }
    pool.join();
    if (!comes([&] { return ends_told_ == ends_awaited_; })) violation("an end was not told");
    if (!comes([&] { return guests_ == 0; })) violation("a hosted object is never destroyed");
  }

  void operate(Dice& schedule, const Path& path) {
    Dice dice(schedule.next());  // its own, since the number of throws depends on timing
    const int roll = dice.under(64);
    ++operations;
    if (roll < 32) return call(dice, path);
    if (roll < 36) return call_operation(dice, path);
    if (roll < 56) return submit(dice, path);
    if (roll < 57) return dice.one_in(2) ? host(dice, path) : loop(dice, path);
    if (roll < 58) return stray(dice, path);
    if (roll < 59) return look(dice, path);
    if (roll < 61) return shut(dice, path);
    if (roll < 62) return move(dice, path);
    replace(dice, path);
  }

  template <class Condition>
  static bool comes(Condition condition) {
    const auto end = Clock::now() + 20s;
    while (!condition()) {
      if (Clock::now() > end) return false;
      std::this_thread::yield();
    }
    return true;
  }

 private:
  static constexpr int slots = 3;

  static std::shared_ptr<Bridge> make(Dice& dice, int level) {
    Options options;
    options.start = dice.one_of({Start::eager, Start::lazy});
    options.spin_limit = dice.one_of({0us, 20us, 100us});
    options.max_in_flight = dice.one_of({unlimited, std::size_t{3}, std::size_t{8}});
    options.slow_after = dice.one_of({std::chrono::nanoseconds::max(), std::chrono::nanoseconds(200us)});
    options.on_slow_call = [](const CallInfo&) { RuntimeBridge::report(*std::make_unique<std::ostringstream>()); };
    options.on_stray_exception = [](const std::exception_ptr& exception) {
      try {
        std::rethrow_exception(exception);
      } catch (const Stray& stray) {
        *stray.seen = true;
      }
    };
    return std::make_shared<Bridge>(level, options, dice.one_in(2));
  }

  /// Every user of a bridge holds a reference. The last one destroys it, which may be a task on its own worker.
  std::shared_ptr<Bridge> take(Dice& dice, const Path& path) {
    const int level = slot(dice, path);
    const std::lock_guard lock(mutex);
    return bridges_[static_cast<std::size_t>(level)];
  }
  int slot(Dice& dice, const Path& path) const {
    const int lowest = ordered_ && !path.empty() ? path.back()->level : 0;
    return lowest + dice.under(slots - lowest);
  }

  void plan(Record& record, Dice& dice, const Path& path) {
    const int roll = dice.under(path.size() < 3 ? 34 : 30);  // limits how deep calls are nested
    record.kind = roll < 4 ? Kind::returns : roll < 30 ? Kind(1 + (roll - 4) / 2) : Kind::nests;
    record.known_ring = std::find(path.begin(), path.end(), record.history) != path.end();
    record.ring_possible = record.known_ring || (!ordered_ && !path.empty());
  }

  /// A caller cancels by a deadline, by a stop from another thread, by both, or not at all.
  template <class Task>
  auto enter(Record& record, Dice& dice, Task&& task) {
    const RuntimeBridge& bridge = record.entry->bridge;
    const auto limit = dice.one_of({-1us, 0us, 50us, 400us, 2'000us, 20'000us});
    Stop token = poll_every(100us, [&record] { return record.source.stop_requested(); });
#ifdef HAS_STOP_TOKEN
    if (!dice.one_in(4)) token = record.source.get_token();
#endif
    const bool has_deadline = dice.one_in(3);
    const bool stopped = dice.one_in(16);
    const bool stop = dice.one_in(4) || (record.needs_stop() && !has_deadline);
    record.may_start = !stopped && !record.known_ring && !(has_deadline && limit <= 0us) && !record.history->closed;
    if (stopped) record.source.request_stop();
    if (stop) asio::post(pool, [source = record.source]() mutable { source.request_stop(); });
    if (!has_deadline) return bridge.block_on(std::forward<Task>(task), token);
    record.deadline = Clock::now() + limit;
    if (limit == 400us) return bridge.block_on_until(std::forward<Task>(task), record.deadline, token);
    return bridge.block_on_for(std::forward<Task>(task), limit, token);
  }

  void call(Dice& dice, const Path& path) {
    auto bridge = take(dice, path);
    Record record{*this, bridge->history, dice.next(), path, bridge};
    bridge.reset();
    record.path.push_back(record.history);
    plan(record, dice, path);
    record.drops = dice.one_in(3);
    const int form = dice.under(5);
    if (form == 0) return judge(record, enter(record, dice, task_of(Frame(record))), 0);
    if (form == 1 && record.plain()) return judge(record, enter(record, dice, Plain{Frame(record)}), 1);
    if (form == 2) return judge(record, enter(record, dice, Callable{Frame(record)}), 1);
    if (form == 3 && !record.needs_stop()) return call_with_arguments(record, dice);
    const Callable callable{Frame(record)};
    judge(record, enter(record, dice, callable), 1);
  }

  void call_with_arguments(Record& record, Dice& dice) {
    if (record.kind == Kind::stops_itself) record.kind = Kind::suspends;
    const RuntimeBridge& bridge = record.entry->bridge;
    const Frame frame(record);
    const auto function = runtime_bridge::named("call", [](const Frame& f, Frame) { return task_of(f.another()); });
    record.may_start = !record.known_ring && !record.history->closed;
    const bool has_deadline = dice.one_in(2);
    const auto limit = dice.one_of({50us, 2'000us});
    if (has_deadline) record.deadline = Clock::now() + limit;
    // A statement of its own, after which the arguments are gone.
    const auto result = has_deadline ? bridge.call_for(limit, function, frame, Frame(record))
                                     : bridge.call(function, frame, Frame(record));
    judge(record, result, 1);
  }

  void call_operation(Dice& dice, const Path& path) {
    const auto bridge = take(dice, path);
    if (!bridge->timers) return;
    Record record{*this, bridge->history, dice.next(), path, bridge};
    plan(record, dice, path);
    record.kind = Kind::suspends;
    asio::steady_timer timer(bridge->bridge.get_executor(), std::chrono::microseconds(dice.under(500)));
    const Result<void> result = enter(record, dice, timer.async_wait(asio::deferred));
    if (!result.has_value()) {
      record.threw = record.started = result.error().cause() ? 1 : 0;
      return judge(record, error_result<Payload>(result.error()), 0);
    }
    record.check(record.may_start && Clock::now() >= timer.expiry(), "a timer that has not expired seems to");
  }

  std::pair<std::shared_ptr<Record>, JoinHandle<Payload>> send(Dice& dice, const Path& path, const Bridge& bridge) {
    auto record = std::make_shared<Record>(Record{*this, bridge.history, dice.next(), {bridge.history}});
    plan(*record, dice, path);
    if (record->kind == Kind::stops_itself) record->kind = Kind::parks;  // its handle belongs to the caller
    // This thread's own bridges have no level, so they must not wait for those that have one.
    if (record->kind == Kind::nests && bridge.history->level == slots) record->kind = Kind::returns;
    record->may_start = !bridge.history->closed;
    const int form = dice.under(3);
    if (form == 0) return {record, bridge.bridge.submit(task_of(Frame(*record, record)))};
    if (form == 1 && record->plain()) return {record, bridge.bridge.submit(Plain{Frame(*record, record)})};
    return {record, bridge.bridge.submit(Callable{Frame(*record, record)})};
  }

  /// Nobody stops such a task.
  void submit_with_end(Dice& dice, const Path& path) {
    const auto bridge = take(dice, path);
    auto record = std::make_shared<Record>(Record{*this, bridge->history, dice.next(), {bridge->history}});
    plan(*record, dice, path);
    if (record->needs_stop() || record->kind == Kind::stops_itself) record->kind = Kind::ignores;
    record->ring_possible = false;
    record->may_start = !bridge->history->closed;
    ++ends_awaited_;
    const auto on_end = [this, record, times = std::make_shared<int>(0)](const Result<Payload>& result) {
      judge(*record, result, 0);
      record->check(++*times == 1, "its end was told twice");
      ++ends_told_;
    };
    if (dice.one_in(2)) return bridge->bridge.submit(task_of(Frame(*record, record)), on_end);
    bridge->bridge.submit(Callable{Frame(*record, record)}, on_end);
  }

  void submit(Dice& dice, const Path& path) {
    if (dice.one_in(4)) return submit_with_end(dice, path);
    auto bridge = take(dice, path);
    auto [record, handle] = send(dice, path, *bridge);
    bridge.reset();
    finish(*record, std::move(handle), dice.under(6));
  }

  /// Does one of the things that can be done with a handle. Leaves no task that waits forever.
  void finish(Record& record, JoinHandle<Payload> handle, int end) {
    const auto stop = [&] { record.source.request_stop(), handle.request_stop(); };
    if (end == 0 && handle.wait_for(100us)) record.check(handle.done(), "waited for, and not done");
    if (end == 1) handle = std::exchange(handle, JoinHandle<Payload>());
    if (end <= 1 || (end == 2 && record.needs_stop())) stop();
    if (end <= 2) return judge(record, handle.join(), 0);
    if (end == 3) {
      if (record.needs_stop()) stop();
      return handle.detach();
    }
    if (end == 4) {
      std::binary_semaphore told(0);
      asio::post(pool, [&] { stop(), told.release(); });
      const auto result = handle.join();
      told.acquire();
      return judge(record, result, 0);
    }
    handle = JoinHandle<Payload>();  // stops and waits, unless that closes a ring
    if (!record.ring_possible) record.check(record.frames == 0, "the handle's destructor did not wait");
  }

  /// The error of something that was tried on a bridge must have a reason.
  void explain(BridgeError::Kind kind, const History& history, const Path& path) {
    const bool known_ring =
        std::find_if(path.begin(), path.end(), [&](auto& h) { return h.get() == &history; }) != path.end();
    switch (kind) {
      case BridgeError::WorkerDead:
        if (!history.closing) violation("the worker is not dead");
        break;
      case BridgeError::ResponseLost:
        if (!history.hard) violation("lost without a reason");
        break;
      case BridgeError::Cancelled:
        if (!history.cancelled) violation("nobody has cancelled it");
        break;
      case BridgeError::WouldDeadlock:
        if (!known_ring && (ordered_ || path.empty())) violation("a ring where none can be");
        break;
      default: violation("an error that cannot be");
    }
  }
  /// The same for what `unwrap` throws.
  void explain(const std::system_error& e, const History& history, const Path& path) {
    if (e.code().category() != make_error_code(BridgeError::WorkerDead).category()) return violation(e.what());
    explain(static_cast<BridgeError::Kind>(e.code().value()), history, path);
  }

  struct Guest {
    explicit Guest(std::atomic<std::int64_t>& a) : alive(a) { ++alive; }
    Guest(const Guest&) = delete;
    Guest& operator=(const Guest&) = delete;
    ~Guest() { --alive; }
    std::atomic<std::int64_t>& alive;
    int calls = 0;  // not atomic: all calls are on the worker
  };

  void host(Dice& dice, const Path& path) {
    const auto bridge = take(dice, path);
    try {
      const Hosted<Guest> hosted(bridge->bridge, guests_);
      for (int i = 1; i <= 2; ++i) {
        const auto calls = hosted.call([](Guest& guest) { return ++guest.calls; });
        if (!calls) return explain(calls.error().kind(), *bridge->history, path);
        if (*calls != i) violation("a hosted object has forgotten a call");
      }
    } catch (const std::system_error& e) {
      explain(e, *bridge->history, path);
    }
  }

  void loop(Dice& dice, const Path& path) {
    const auto bridge = take(dice, path);
    const bool throws = dice.one_in(4);
    const int leaves_at = dice.under(6);
    const auto next = [n = 0, throws]() mutable -> awaitable<std::optional<int>> {
      const int item = n++;
      return [](int i, bool boom) -> awaitable<std::optional<int>> {
        if (i % 2 == 1) co_await asio::post(use_awaitable);
        if (i == 3 && boom) throw Boom{3};
        co_return i < 4 ? std::optional(i) : std::nullopt;
      }(item, throws);
    };
    int expected = 0;
    try {
      const auto ahead = runtime_bridge::prefetch(static_cast<std::size_t>(dice.under(3)));
      for (const int item : runtime_bridge::range(bridge->bridge, next, ahead)) {
        if (item != expected++) violation("a range loses an item");
        if (item == leaves_at) return;
      }
      if (expected != 4 || throws) violation("a range ends early");
    } catch (const Boom&) {
      if (!throws || expected != 3) violation("a range throws at the wrong item");
    } catch (const std::system_error& e) {
      explain(e, *bridge->history, path);
    }
  }

  void shut(Dice& dice, const Path& path) {
    const auto bridge = take(dice, path);
    History& history = *bridge->history;
    const auto how = dice.one_of({Shutdown::drain, Shutdown::cancel});
    const auto limit = dice.one_of({0us, 300us, 2'000us});
    const bool limited = dice.one_in(2);
    history.closing = true;
    if (how == Shutdown::cancel) history.cancelled = true;
    if (limited) history.hard = true;
    const bool complete = limited ? bridge->bridge.shutdown(how, limit) : bridge->bridge.shutdown(how);
    history.closed = true;
    if (!path.empty()) return;
    if (!complete && !history.hard) violation("shutdown: false without a limit");
    if (bridge->bridge.in_flight() != 0) violation("shutdown: returned with calls in flight");
  }

  void replace(Dice& dice, const Path& path) {
    const int level = slot(dice, path);
    auto bridge = make(dice, level);
    const std::lock_guard lock(mutex);
    bridges_[static_cast<std::size_t>(level)].swap(bridge);
  }

  /// Moves this thread's own bridges, with calls in flight.
  void move(Dice& dice, const Path& path) {
    const auto to = make(dice, slots), from = make(dice, slots);
    std::vector<std::pair<std::shared_ptr<Record>, JoinHandle<Payload>>> calls;
    for (int i = 0; i < 12; ++i) calls.push_back(send(dice, path, i % 3 ? *to : *from));
    to->history->closing = to->history->hard = true;
    std::swap(to->history, from->history);
    to->bridge = std::move(from->bridge);
    from->history->closed = true;
    if (from->bridge.in_flight() != 0) violation("a bridge that was moved from has calls in flight");
    for (const auto& bridge : {to, from}) calls.push_back(send(dice, path, *bridge));
    for (auto& [record, handle] : calls) finish(*record, std::move(handle), dice.under(6));
  }

  void stray(Dice& dice, const Path& path) {
    const auto bridge = take(dice, path);
    const auto seen = std::make_shared<std::atomic<bool>>(false);
    asio::post(bridge->bridge.get_executor(), [seen] { throw Stray{seen}; });
    const bool next = bridge->bridge.block_on([] {}).has_value();
    if (next && !*seen) violation("a stray exception was not handed to the hook");
  }

  void look(Dice& dice, const Path& path) {
    const auto bridge = take(dice, path);
    for (const CallInfo& call : bridge->bridge.calls())
      if (call.where.line() == 0 && call.name.empty()) violation("a call that is over is listed");
    const Stats stats = bridge->bridge.stats();
    if (stats.in_flight > stats.admitted) violation("more calls are in flight than there were");
    std::ostringstream out;
    RuntimeBridge::report(out);
    if (out.str().rfind("runtime_bridge: ", 0) != 0) violation("no report");
  }

  const std::uint64_t seed_;
  const bool ordered_;  // workers wait only for bridges of their own level or a higher one, so there are no rings
  std::atomic<std::int64_t> ends_awaited_{0}, ends_told_{0};
  std::atomic<std::int64_t> guests_{0};                 // the hosted objects
  std::array<std::shared_ptr<Bridge>, slots> bridges_;  // guarded by `mutex`
};

}  // namespace

/// More operations, on the worker.
void stress::nest(Record& record) {
  Dice dice(record.id);
  for (int i = 0; i < 2; ++i) static_cast<World&>(record.ground).operate(dice, record.path);
}

namespace {

std::int64_t run_seed(std::uint64_t seed) {
  std::fprintf(stderr, "\rseed %llu ", static_cast<unsigned long long>(seed));  // in case of a crash or a hang
  const std::size_t descriptors = descriptors_of_this_process();
  World world(seed);
  alarm(100);
  world.run();
  if (!World::comes([] { return count_threads(is_worker) == 0; })) world.violation("workers are left");
  if (counts_descriptors && !World::comes([&] { return descriptors_of_this_process() == descriptors; }))
    world.violation("descriptors are left");
  alarm(0);
  INFO("RUNTIME_BRIDGE_SEED=" << seed << "\n" << world.violations);
  REQUIRE(world.violations.empty());
  return world.operations;
}

}  // namespace

TEST_CASE("stress: random schedules over all operations", "[race][slow]") {
  const char* const one = std::getenv("RUNTIME_BRIDGE_SEED");
  const char* const seconds = std::getenv("RUNTIME_BRIDGE_STRESS_SECONDS");
  const auto begin = Clock::now();
  std::int64_t operations = 0;
  if (one) {
    operations = run_seed(std::strtoull(one, nullptr, 10));
  } else if (seconds) {
    std::random_device random;
    const auto end = begin + std::chrono::seconds(std::strtoll(seconds, nullptr, 10));
    while (Clock::now() < end) operations += run_seed(random());
  } else {
    for (std::uint64_t seed = 1; seed <= 60; ++seed) operations += run_seed(seed);
  }
  const double took = std::chrono::duration<double>(Clock::now() - begin).count();
  std::printf("%lld operations, %.0f in a second\n", static_cast<long long>(operations), double(operations) / took);
}
