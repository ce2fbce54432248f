// SPDX-License-Identifier: Apache-2.0
//
// Hosted<T>: the object is made, used and destroyed on the worker, in whatever order and on whatever thread its owner
// lets it and the bridge go.

#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <functional>
#include <latch>
#include <memory>
#include <runtime_bridge/hosted.hpp>
#include <semaphore>
#include <string>
#include <string_view>

#include "support.hpp"

using runtime_bridge::Hosted;
using runtime_bridge::named;
using runtime_bridge::poll_every;
using runtime_bridge::Shutdown;
using runtime_bridge::SourceLocation;
using runtime_bridge::State;
using runtime_bridge::WhenFull;

namespace {

/// What becomes of a `Guest`. Read it when the guest is gone.
struct Life {
  std::thread::id made{};
  std::thread::id destroyed{};
  std::atomic<int> alive{0};
};

/// An object to host. Uses no lock: it must only be used on the worker, or when the worker has ended.
class Guest {
 public:
  explicit Guest(Life& life, int number = 0) : life_(life), number_(number) {
    life_.made = std::this_thread::get_id();
    ++life_.alive;
  }
  Guest(const Guest&) = delete;
  Guest& operator=(const Guest&) = delete;
  ~Guest() {
    life_.destroyed = std::this_thread::get_id();
    --life_.alive;
  }

  int number() const { return number_; }
  int increment() { return ++number_; }

  /// Suspends between two uses of the object.
  awaitable<int> increment_twice() {
    increment();
    co_await asio::post(use_awaitable);
    co_return increment();
  }

 private:
  Life& life_;
  int number_;
};

/// With an operation that is pending for as long as the object lives.
class Waiter {
 public:
  Waiter(asio::any_io_executor executor, std::shared_ptr<int> token) : timer_(std::move(executor), 24h) {
    timer_.async_wait([held = std::move(token)](ErrorCode) {});
  }

  awaitable<void> wait() { co_await timer_.async_wait(use_awaitable); }

 private:
  asio::steady_timer timer_;
};

template <class Function>
std::error_code code_thrown_by(Function function) {
  try {
    function();
  } catch (...) {
    return code_of(std::current_exception());
  }
  return {};
}

/// A task that is in flight until it is cut off, and uses the guest until its frame is destroyed.
awaitable<void> hold(std::unique_ptr<Hosted<Guest>> hosted, std::atomic<bool>& started) {
  (void)hosted;
  co_await asio::this_coro::reset_cancellation_state(asio::disable_cancellation());
  started = true;
  auto parked = park();
  co_await std::move(parked);
}

Options at_most(std::size_t calls, WhenFull when_full) {
  Options options;
  options.max_in_flight = calls;
  options.when_full = when_full;
  return options;
}

}  // namespace

// ---------------------------------------------------------------------------------------------------------------------
// Made

TEST_CASE("hosted: made, used and destroyed on the worker") {
  RuntimeBridge bridge;
  const auto worker = worker_of(bridge);
  Life life;
  std::thread::id used;
  {
    const Hosted<Guest> hosted(bridge, life, 3);
    CHECK(life.made == worker);
    const auto number = hosted.call([&](Guest& guest) {
      used = std::this_thread::get_id();
      return guest.number();
    });
    CHECK(number == 3);
    CHECK(used == worker);
    CHECK(life.alive == 1);
  }
  CHECK(life.alive == 0);
  CHECK(life.destroyed == worker);
  CHECK(bridge.in_flight() == 0);
}

TEST_CASE("hosted: a lazy bridge is started") {
  RuntimeBridge bridge(lazy());
  Life life;
  { const Hosted<Guest> hosted(bridge, life); }
  CHECK(life.destroyed == worker_of(bridge));
}

TEST_CASE("hosted: the executor is given to what takes one first") {
  using Executor = RuntimeBridge::executor_type;
  RuntimeBridge bridge;
  struct Takes {
    explicit Takes(const Executor& e) : executor(e) {}
    Takes(const Executor& e, int n) : executor(e), number(n) {}
    Takes(int) = delete;
    Executor executor;
    int number = 0;
  };
  struct TakesNone {
    explicit TakesNone(int n = 1) : number(n) {}
    int number;
  };
  struct Prefers {
    Prefers() = default;
    explicit Prefers(const Executor&) : has_executor(true) {}
    bool has_executor = false;
  };
  const Hosted<Takes> without(bridge);
  const Hosted<Takes> with(bridge, 7);
  CHECK(without.call([&](Takes& takes) { return takes.executor == bridge.get_executor(); }) == true);
  CHECK(with.call([](Takes& takes) { return takes.number; }) == 7);
  CHECK(Hosted<Prefers>(bridge).call([](Prefers& prefers) { return prefers.has_executor; }) == true);
  CHECK(Hosted<TakesNone>(bridge).call([](TakesNone& none) { return none.number; }) == 1);
  CHECK(Hosted<TakesNone>(bridge, 2).call([](TakesNone& none) { return none.number; }) == 2);
}

TEST_CASE("hosted: Asio's own objects") {
  RuntimeBridge bridge;
  const Hosted<asio::steady_timer> timer(bridge, 1ms);
  CHECK(timer.call([](asio::steady_timer& t) { return t.async_wait(asio::deferred); }).has_value());
  const Hosted<asio::local::stream_protocol::socket> socket(bridge);
  const Hosted<asio::ip::tcp::resolver> resolver(bridge);
  CHECK(socket.call([](auto& s) { return s.is_open(); }) == false);
}

TEST_CASE("hosted: arguments are passed on as they are given") {
  RuntimeBridge bridge;
  struct Arguments {
    Arguments(std::unique_ptr<int> m, int& r, const std::string& c) : moved(std::move(m)), referred(r), copied(c) {}
    std::unique_ptr<int> moved;
    int& referred;
    std::string copied;
  };
  int local = 1;
  const std::string text = "text";
  auto pointer = std::make_unique<int>(4);
  const Hosted<Arguments> hosted(bridge, std::move(pointer), local, text);
  const auto sum =
      hosted.call([](Arguments& a) { return *a.moved + ++a.referred + static_cast<int>(a.copied.size()); });
  CHECK(sum == 4 + 2 + 4);
  CHECK(local == 2);
}

TEST_CASE("hosted: an over-aligned object, and one that is const") {
  RuntimeBridge bridge;
  struct alignas(256) Aligned {
    int number = 5;
  };
  for (int i = 0; i < 10; ++i) {
    const Hosted<Aligned> hosted(bridge);
    const auto address = hosted.call([](Aligned& a) { return reinterpret_cast<std::uintptr_t>(&a); });
    CHECK(*address % alignof(Aligned) == 0);
  }
  CHECK(Hosted<const std::string>(bridge, "text").call([](const std::string& s) { return s.size(); }) == 4);
}

TEST_CASE("hosted: what the constructor throws is thrown to the caller") {
  RuntimeBridge bridge;
  struct Throws {
    explicit Throws(Life& life) : guest(life) { throw std::out_of_range("no"); }
    Guest guest;
  };
  Life life;
  CHECK_THROWS_AS(Hosted<Throws>(bridge, life), std::out_of_range);
  CHECK(life.alive == 0);
  CHECK(life.destroyed == worker_of(bridge));
  struct ThrowsInt {
    ThrowsInt() { throw 42; }
  };
  CHECK_THROWS_AS(Hosted<ThrowsInt>(bridge), int);
  CHECK(bridge.block_on([] { return 1; }) == 1);
}

TEST_CASE("hosted: a bridge that makes no calls any more throws WorkerDead") {
  Life life;
  const auto code = [&](const RuntimeBridge& bridge) { return code_thrown_by([&] { Hosted<Guest>(bridge, life); }); };
  RuntimeBridge shut;
  unwrap(shut.block_on([] {}));
  shut.shutdown(Shutdown::drain);
  CHECK(code(shut) == BridgeError::WorkerDead);
  RuntimeBridge moved;
  const RuntimeBridge heir(std::move(moved));
  CHECK(code(moved) == BridgeError::WorkerDead);  // NOLINT(bugprone-use-after-move)
  CHECK(life.made == std::thread::id());
}

TEST_CASE("hosted: made and destroyed on the worker itself") {
  Life life;
  SECTION("in a task") {
    RuntimeBridge bridge;
    const auto worker = worker_of(bridge);
    std::optional<Hosted<Guest>> outlives;
    unwrap(bridge.block_on([&] {
      const Hosted<Guest> inside(bridge, life);
      outlives.emplace(bridge, life);
    }));
    CHECK(life.alive == 1);
    CHECK(life.made == worker);
    outlives.reset();
    CHECK(life.alive == 0);
    CHECK(life.destroyed == worker);
    CHECK(bridge.stats().would_deadlock == 0);
  }
  SECTION("in a handler, before any call") {
    RuntimeBridge bridge;
    std::optional<Hosted<Guest>> hosted;
    std::atomic<bool> made{false};
    asio::post(bridge.get_executor(), [&] {
      hosted.emplace(bridge, life);
      made = true;
    });
    await_state([&] { return made.load(); });
    CHECK(life.made == worker_of(bridge));
    CHECK(hosted->call(&Guest::number) == 0);
  }
  SECTION("in a coroutine") {
    RuntimeBridge bridge;
    const auto coroutine = [&]() -> awaitable<void> {
      const Hosted<Guest> inside(bridge, life);
      co_await asio::post(use_awaitable);
    };
    unwrap(bridge.block_on(coroutine));
    CHECK(life.alive == 0);
    CHECK(life.destroyed == worker_of(bridge));
  }
  SECTION("as a part of another hosted object") {
    struct Outer {
      Outer(const RuntimeBridge& bridge, Life& l) : inner(bridge, l) {}
      Hosted<Guest> inner;
    };
    RuntimeBridge bridge;
    const auto worker = worker_of(bridge);
    { const Hosted<Outer> hosted(bridge, bridge, life); }
    CHECK(life.made == worker);
    CHECK(life.destroyed == worker);
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// Called

TEST_CASE("hosted: every kind of function") {
  RuntimeBridge bridge;
  Life life;
  const Hosted<Guest> hosted(bridge, life, 1);
  CHECK(hosted.call([](Guest&) {}).has_value());
  CHECK(hosted.call([](Guest& guest) { return guest.increment_twice(); }) == 3);
  CHECK(hosted.call(&Guest::increment_twice) == 5);
  CHECK(hosted.call(&Guest::number) == 5);
  const auto coroutine = [](Guest& guest) -> awaitable<int, RuntimeBridge::executor_type> { co_return guest.number(); };
  CHECK(hosted.call(coroutine) == 5);
  const auto operation = [&](Guest&) { return asio::post(bridge.get_executor(), asio::deferred); };
  CHECK(hosted.call(operation).has_value());

  auto result = hosted.call([held = std::make_unique<int>(6)](Guest&) mutable { return std::move(held); });
  CHECK(**result == 6);
  struct OnlyOnce {
    int operator()(Guest& guest) && { return guest.number(); }
    int operator()(Guest&) & { return -1; }
  } once;
  CHECK(hosted.call(std::move(once)) == 5);
  CHECK(hosted.call(once) == -1);
  struct Immovable {
    Immovable() = default;
    Immovable(const Immovable&) = delete;
    Immovable& operator=(const Immovable&) = delete;
    int operator()(Guest& guest) const { return guest.number(); }
  };
  const Immovable immovable;
  CHECK(hosted.call(immovable) == 5);
  static_assert(std::is_same_v<decltype(hosted.call(&Guest::number)), Result<int>>);
  static_assert(std::is_same_v<decltype(hosted.call_for(1s, &Guest::increment_twice)), Result<int>>);
}

TEST_CASE("hosted: what the function throws is the cause of a ResponseLost, and the object stays") {
  RuntimeBridge bridge;
  Life life;
  const Hosted<Guest> hosted(bridge, life, 1);
  CHECK(outcome(hosted.call([](Guest&) { throw std::runtime_error("no"); })) == threw("no"));
  CHECK(hosted.call(&Guest::number) == 1);
}

TEST_CASE("hosted: the function is borrowed, and unused when the call is over") {
  RuntimeBridge bridge;
  Life life;
  const Hosted<Guest> hosted(bridge, life, 1);
  const auto token = std::make_shared<int>(0);
  const auto function = [token](Guest& guest) { return guest.increment_twice(); };
  CHECK(hosted.call(function) == 3);
  CHECK(token.use_count() == 2);
  const auto borrows = [&](Guest& guest) -> awaitable<void> { *token = co_await guest.increment_twice(); };
  CHECK(hosted.call(borrows).has_value());
  CHECK(*token == 5);
}

TEST_CASE("hosted: names, and the lines of callers") {
  struct Slow {
    explicit Slow(std::binary_semaphore& g) : go_on(g) { go_on.acquire(); }
    ~Slow() { go_on.acquire(); }
    std::binary_semaphore& go_on;
  };
  RuntimeBridge bridge;
  std::binary_semaphore go_on(0);
  const auto running = [&] {
    await_state([&] { return count_calls(bridge, State::running) == 1; });
    auto call = bridge.calls().at(0);
    go_on.release();
    return call;
  };
  std::optional<Hosted<Slow>> hosted;
  runtime_bridge::CallInfo made, called, destroyed;
  unsigned made_line = 0, call_line = 0;
  {
    jthread watcher([&] { made = running(); });
    made_line = __LINE__ + 1;
    hosted = Hosted<Slow>(bridge, go_on);
  }
  {
    jthread watcher([&] { called = running(); });
    call_line = __LINE__ + 1;
    CHECK(hosted->call(named("find", [&](Slow&) { go_on.acquire(); })).has_value());
  }
  {
    jthread watcher([&] { destroyed = running(); });
    hosted.reset();
  }
  CHECK(made.name == "Hosted()");
  CHECK(made.where.line() == made_line);
  CHECK(std::string_view(made.where.file_name()) == __FILE__);
  CHECK(called.name == "find");
  CHECK(called.where.line() == call_line);
  CHECK(std::string_view(called.where.file_name()) == __FILE__);
  CHECK(destroyed.name == "~Hosted()");
  CHECK(destroyed.where.line() == made_line);
}

TEST_CASE("hosted: named functions of every kind") {
  RuntimeBridge bridge;
  Life life;
  const Hosted<Guest> hosted(bridge, life, 1);
  const auto function = [](Guest& guest) { return guest.increment(); };
  CHECK(hosted.call(named("temporary", [](Guest& guest) { return guest.increment(); })) == 2);
  CHECK(hosted.call(named("borrowed", function)) == 3);
  const auto kept = named("kept", function);
  CHECK(hosted.call(kept) == 4);
  CHECK(hosted.call(kept) == 5);
  CHECK(kept.name == "kept");
  CHECK(hosted.call_for(1h, named("member", &Guest::increment_twice)) == 7);
  struct OnlyOnce {
    int operator()(Guest& guest) && { return guest.number(); }
  };
  CHECK(hosted.call(named("once", OnlyOnce())) == 7);
}

TEST_CASE("hosted: deadlines and stops") {
  RuntimeBridge bridge;
  const auto token = std::make_shared<int>();
  const Hosted<Waiter> hosted(bridge, token);
  CHECK(hosted.call_for(1ms, &Waiter::wait).error() == BridgeError::TimedOut);
  bool ran = false;
  CHECK(hosted.call_for(0ms, [&](Waiter&) { ran = true; }).error() == BridgeError::TimedOut);
  CHECK_FALSE(ran);
  int asked = 0;
  const auto poll = [&] { return poll_every(1ms, [&] { return ++asked == 3; }); };
  CHECK(hosted.call(&Waiter::wait, poll()).error() == BridgeError::Cancelled);
  CHECK(asked == 3);
  asked = 0;
  CHECK(hosted.call_for(1h, &Waiter::wait, poll()).error() == BridgeError::Cancelled);
#ifdef HAS_STOP_TOKEN
  stop_source stop;
  jthread stopper([&] {
    await_state([&] { return count_calls(bridge, State::running) == 1; });
    stop.request_stop();
  });
  CHECK(hosted.call(&Waiter::wait, stop.get_token()).error() == BridgeError::Cancelled);
  CHECK(hosted.call_for(1h, &Waiter::wait, stop.get_token()).error() == BridgeError::Cancelled);
#endif
  // Only the wait was cancelled, and not the object's own.
  CHECK(token.use_count() == 2);
}

TEST_CASE("hosted: a call on the worker itself is refused") {
  RuntimeBridge bridge;
  Life life;
  const Hosted<Guest> hosted(bridge, life);
  Outcome inner;
  CHECK(hosted.call([&](Guest&) { inner = outcome(hosted.call(&Guest::number)); }).has_value());
  CHECK(inner == would_deadlock);
}

TEST_CASE("hosted: several threads call at the same time", "[race]") {
  RuntimeBridge bridge;
  Life life;
  const Hosted<Guest> hosted(bridge, life);
  std::atomic<int> failed{0};
  {
    std::vector<jthread> threads;
    for (int i = 0; i < 4; ++i) {
      threads.emplace_back([&] {
        for (int round = 0; round < 200; ++round) failed += !hosted.call(&Guest::increment_twice).has_value();
      });
    }
  }
  CHECK(failed == 0);
  CHECK(hosted.call(&Guest::number) == 1600);
}

// ---------------------------------------------------------------------------------------------------------------------
// Moved

TEST_CASE("hosted: moving") {
  static_assert(std::is_nothrow_move_constructible_v<Hosted<Guest>>);
  static_assert(std::is_nothrow_move_assignable_v<Hosted<Guest>>);
  static_assert(!std::is_copy_constructible_v<Hosted<Guest>>);
  RuntimeBridge a, b;
  const auto worker_a = worker_of(a);
  const auto worker_b = worker_of(b);
  Life first, second;
  {
    Hosted<Guest> one(a, first, 1);
    Hosted<Guest> two(std::move(one));
    CHECK(outcome(one.call(&Guest::number)) == worker_dead);  // NOLINT(bugprone-use-after-move)
    CHECK(outcome(one.call_for(1h, &Guest::number)) == worker_dead);
    CHECK(two.call(&Guest::number) == 1);
    Hosted<Guest> other(b, second, 2);
    two = std::move(other);
    CHECK(first.alive == 0);
    CHECK(first.destroyed == worker_a);
    CHECK(second.alive == 1);
    CHECK(two.call(&Guest::number) == 2);
    CHECK(outcome(other.call(&Guest::number)) == worker_dead);  // NOLINT(bugprone-use-after-move)
    Hosted<Guest>& same = two;
    two = std::move(same);
    CHECK(two.call(&Guest::number) == 2);
    one = std::move(two);
    CHECK(one.call(&Guest::number) == 2);
  }
  CHECK(second.alive == 0);
  CHECK(second.destroyed == worker_b);
}

TEST_CASE("hosted: the bridge may be moved") {
  RuntimeBridge bridge;
  Life life;
  const Hosted<Guest> hosted(bridge, life, 1);
  RuntimeBridge heir(std::move(bridge));
  CHECK(hosted.call(&Guest::number) == 1);
  heir.shutdown(Shutdown::drain);
  CHECK(outcome(hosted.call(&Guest::number)) == worker_dead);
}

// ---------------------------------------------------------------------------------------------------------------------
// Destroyed

TEST_CASE("hosted: the bridge may be destroyed first") {
  Life life;
  auto token = std::make_shared<int>();
  {
    std::optional<RuntimeBridge> bridge(std::in_place);
    const Hosted<Guest> guest(*bridge, life);
    const Hosted<asio::steady_timer> timer(*bridge, 24h);
    const Hosted<Waiter> waiter(*bridge, token);
    const Hosted<asio::ip::tcp::resolver> resolver(*bridge);
    std::optional<Hosted<asio::local::stream_protocol::socket>> socket(std::in_place, *bridge);
    unwrap(socket->call([](auto& s) { s.open(); }));
    bridge.reset();
    CHECK(life.alive == 1);
    CHECK(outcome(guest.call(&Guest::number)) == worker_dead);
    CHECK(outcome(timer.call([](asio::steady_timer& t) { return t.async_wait(asio::deferred); })) == worker_dead);
  }
  CHECK(life.alive == 0);
  CHECK(token.use_count() == 1);
}

TEST_CASE("hosted: destroyed first, with an operation pending") {
  auto token = std::make_shared<int>();
  {
    RuntimeBridge bridge;
    { const Hosted<Waiter> waiter(bridge, token); }
    CHECK(bridge.block_on([] { return 1; }) == 1);  // behind the handler of the cancelled operation
    CHECK(token.use_count() == 1);
  }
}

TEST_CASE("hosted: destroyed after the worker has ended") {
  Life life;
  for (const auto how : {Shutdown::drain, Shutdown::cancel}) {
    RuntimeBridge bridge;
    std::optional<Hosted<Guest>> hosted(std::in_place, bridge, life);
    CHECK(bridge.shutdown(how));
    CHECK(life.alive == 1);
    hosted.reset();
    CHECK(life.alive == 0);
    CHECK(life.destroyed == std::this_thread::get_id());
  }
  {
    RuntimeBridge bridge;
    std::optional<Hosted<Guest>> hosted(std::in_place, bridge, life);
    auto parked = bridge.submit(park_stubbornly());
    await_calls(bridge, 1);
    CHECK_FALSE(bridge.shutdown(Shutdown::drain, 0s));
    hosted.reset();
    CHECK(life.alive == 0);
  }
  {
    RuntimeBridge bridge;
    std::optional<Hosted<Guest>> hosted(std::in_place, bridge, life);
    bridge.get_executor().context().stop();
    hosted.reset();
    CHECK(life.alive == 0);
  }
}

TEST_CASE("hosted: destroyed while a task that uses it is drained") {
  RuntimeBridge bridge;
  Life life;
  std::optional<Hosted<Guest>> hosted(std::in_place, bridge, life);
  Guest* guest = nullptr;
  unwrap(hosted->call([&](Guest& g) { guest = &g; }));
  std::atomic<bool> may_end{false};
  int alive_at_end = -1;
  const auto use = [&]() -> awaitable<void> {
    auto running = run_until(may_end);
    co_await std::move(running);
    co_await guest->increment_twice();
    alive_at_end = life.alive;
  };
  auto user = bridge.submit(use);
  jthread drainer([&] { bridge.shutdown(Shutdown::drain); });
  await_closed(bridge);
  jthread destroyer([&] { hosted.reset(); });
  // It waits for the task: nothing destroys the guest meanwhile.
  for (int i = 0; i < 100; ++i) std::this_thread::yield();
  CHECK(life.alive == 1);
  may_end = true;
  destroyer.join();
  CHECK(life.alive == 0);
  CHECK(alive_at_end == 1);
  CHECK(user.join().has_value());
}

TEST_CASE("hosted: destroyed by a task") {
  RuntimeBridge bridge;
  const auto worker = worker_of(bridge);
  Life life;
  auto hosted = std::make_unique<Hosted<Guest>>(bridge, life);
  SECTION("that is plain") {
    unwrap(bridge.block_on([&] { hosted.reset(); }));
  }
  SECTION("that is a coroutine") {
    const auto coroutine = [&]() -> awaitable<void> {
      co_await asio::post(use_awaitable);
      hosted.reset();
    };
    unwrap(bridge.block_on(coroutine));
  }
  SECTION("of the hosted object") {
    unwrap(hosted->call([&](Guest&) { hosted.reset(); }));
  }
  SECTION("on a pool") {
    asio::thread_pool pool(1);
    const auto coroutine = [&]() -> awaitable<void> {
      co_await asio::post(asio::bind_executor(pool, use_awaitable));
      hosted.reset();
    };
    unwrap(bridge.block_on(coroutine));
  }
  SECTION("on the worker, which was shut down") {
    unwrap(bridge.block_on([&] {
      bridge.shutdown(Shutdown::drain);
      hosted.reset();
    }));
  }
  SECTION("on the worker, with the bridge") {
    auto last = std::make_shared<RuntimeBridge>(std::move(bridge));
    const RuntimeBridge& b = *last;
    unwrap(b.block_on([&] {
      last.reset();
      hosted.reset();
    }));
  }
  CHECK(life.alive == 0);
  CHECK(life.destroyed == worker);
}

TEST_CASE("hosted: destroyed with the frame of a task that the stop destroys") {
  for (const bool explicit_stop : {false, true}) {
    Life life;
    std::atomic<bool> started{false};
    std::thread::id worker;
    {
      RuntimeBridge bridge;
      worker = worker_of(bridge);
      auto task = bridge.submit(hold(std::make_unique<Hosted<Guest>>(bridge, life), started));
      await_state([&] { return started.load(); });
      await_calls(bridge, 1);
      if (explicit_stop)
        bridge.get_executor().context().stop();
      else
        CHECK_FALSE(bridge.shutdown(Shutdown::drain, 0s));
      CHECK(outcome(task.join()) == response_lost);
      CHECK(life.alive == 0);
      CHECK(life.destroyed == worker);
    }
  }
}

TEST_CASE("hosted: destroyed with a coroutine that is no task") {
  Life life;
  std::thread::id worker;
  {
    RuntimeBridge bridge;
    worker = worker_of(bridge);
    std::atomic<bool> started{false};
    asio::co_spawn(bridge.get_executor(), hold(std::make_unique<Hosted<Guest>>(bridge, life), started), asio::detached);
    await_state([&] { return started.load(); });
  }
  CHECK(life.alive == 0);
  CHECK(life.destroyed == worker);
}

namespace {

thread_local std::shared_ptr<void> kept_by_thread;

}  // namespace

TEST_CASE("hosted: destroyed by the end of the worker's thread") {
  Life life;
  std::thread::id worker;
  {
    RuntimeBridge bridge;
    worker = worker_of(bridge);
    auto hosted = std::make_shared<Hosted<Guest>>(bridge, life);
    unwrap(bridge.block_on([&] { kept_by_thread = std::move(hosted); }));
    CHECK(life.alive == 1);
  }
  CHECK(life.alive == 0);
  CHECK(life.destroyed == worker);
}

TEST_CASE("hosted: destroyed in a ring of bridges, the worker destroys it later") {
  RuntimeBridge a, b;
  const auto worker = worker_of(a);
  Life life;
  auto hosted = std::make_unique<Hosted<Guest>>(a, life);
  int alive_in_ring = -1;
  unwrap(a.block_on([&] {
    unwrap(b.block_on([&] {
      hosted.reset();
      alive_in_ring = life.alive;
    }));
  }));
  CHECK(alive_in_ring == 1);
  unwrap(a.block_on([] {}));  // behind it
  CHECK(life.alive == 0);
  CHECK(life.destroyed == worker);
}

TEST_CASE("hosted: destroyed in a ring of bridges, one of which is being shut down") {
  Life life;
  std::thread::id worker;
  bool alive_in_ring = false;
  {
    RuntimeBridge a, b;
    worker = worker_of(a);
    auto hosted = std::make_unique<Hosted<Guest>>(a, life);
    std::binary_semaphore go_on(0);
    auto task = a.submit([&] {
      unwrap(b.block_on([&] {
        go_on.acquire();
        hosted.reset();
        alive_in_ring = life.alive == 1;
      }));
    });
    jthread drainer([&] { a.shutdown(Shutdown::drain); });
    await_closed(a);
    go_on.release();
    CHECK(task.join().has_value());
  }
  CHECK(alive_in_ring);
  CHECK(life.alive == 0);
  CHECK(life.destroyed == worker);
}

TEST_CASE("hosted: destroyed by another bridge's worker") {
  RuntimeBridge a, b;
  const auto worker = worker_of(a);
  Life life;
  auto hosted = std::make_unique<Hosted<Guest>>(a, life);
  unwrap(b.block_on([&] { hosted.reset(); }));
  CHECK(life.alive == 0);
  CHECK(life.destroyed == worker);
}

TEST_CASE("hosted: a bridge that refuses more calls destroys it later") {
  RuntimeBridge bridge(at_most(1, WhenFull::refuse));
  const auto worker = worker_of(bridge);
  Life life;
  std::optional<Hosted<Guest>> hosted(std::in_place, bridge, life);
  std::atomic<bool> may_end{false};
  auto running = bridge.submit(run_until(may_end));
  CHECK(code_thrown_by([&] { Hosted<Guest>(bridge, life); }) == BridgeError::Overloaded);
  CHECK(hosted->call(&Guest::number).error() == BridgeError::Overloaded);
  hosted.reset();
  await_state([&] { return life.alive == 0; });
  may_end = true;
  CHECK(running.join().has_value());
  CHECK(life.destroyed == worker);
}

TEST_CASE("hosted: a bridge with a limit destroys it in its turn") {
  RuntimeBridge bridge(at_most(1, WhenFull::wait));
  const auto worker = worker_of(bridge);
  Life life;
  std::optional<Hosted<Guest>> hosted(std::in_place, bridge, life);
  std::atomic<bool> may_end{false};
  auto running = bridge.submit(run_until(may_end));
  jthread destroyer([&] { hosted.reset(); });
  await_state([&] { return count_calls(bridge, State::waiting) == 1; });
  CHECK(life.alive == 1);
  may_end = true;
  destroyer.join();
  CHECK(life.alive == 0);
  CHECK(life.destroyed == worker);
}

// Cancelling takes its destructor's call out of the row, while a task is in flight.
TEST_CASE("hosted: destroyed in its turn, while the calls are cancelled") {
  RuntimeBridge bridge(at_most(1, WhenFull::wait));
  Life life;
  std::optional<Hosted<Guest>> hosted(std::in_place, bridge, life);
  std::atomic<bool> may_end{false};
  int alive_at_end = -1;
  const auto ignores_cancellation = [&]() -> awaitable<void> {
    co_await asio::this_coro::reset_cancellation_state(asio::disable_cancellation());
    auto running = run_until(may_end);
    co_await std::move(running);
    alive_at_end = life.alive;
  };
  auto task = bridge.submit(ignores_cancellation);
  jthread destroyer([&] { hosted.reset(); });
  await_state([&] { return count_calls(bridge, State::waiting) == 1; });
  jthread ender([&] { bridge.shutdown(Shutdown::cancel); });
  await_state([&] { return count_calls(bridge, State::waiting) == 0; });
  may_end = true;
  destroyer.join();
  CHECK(life.alive == 0);
  CHECK(alive_at_end == 1);
}

// ---------------------------------------------------------------------------------------------------------------------
// Forked

TEST_CASE("hosted: in a forked child nothing is made, called or destroyed", "[child]") {
  RuntimeBridge bridge;
  Life life;
  auto hosted = std::make_unique<Hosted<Guest>>(bridge, life, 1);
  auto timer = std::make_unique<Hosted<asio::steady_timer>>(bridge, 24h);
  SECTION("by another thread") {
    CHECK(in_child_process([&] {
            if (outcome(hosted->call(&Guest::number)) != worker_dead) return 1;
            if (code_thrown_by([&] { Hosted<Guest>(bridge, life); }) != BridgeError::WorkerDead) return 2;
            hosted.reset();
            timer.reset();
            return life.alive == 1 ? 0 : 3;
          }) == 0);
  }
  SECTION("by a task on the worker") {
    const auto code = bridge.block_on([&] {
      return in_child_process([&] {
        if (outcome(hosted->call(&Guest::number)) != worker_dead) return 1;
        if (code_thrown_by([&] { Hosted<Guest>(bridge, life); }) != BridgeError::WorkerDead) return 2;
        hosted.reset();
        timer.reset();
        return life.alive == 1 ? 0 : 3;
      });
    });
    CHECK(code == 0);
  }
  SECTION("after the bridge was destroyed in the parent") {
    { const RuntimeBridge taken(std::move(bridge)); }
    CHECK(in_child_process([&] {
            hosted.reset();
            timer.reset();
            return life.alive == 1 ? 0 : 3;
          }) == 0);
    CHECK(outcome(hosted->call(&Guest::number)) == worker_dead);
    return;
  }
#ifndef _LIBCPP_VERSION  // with libc++ it reports what the lost thread owned
  SECTION("that calls exit") {
    CHECK(in_child_process([&]() -> int {
            hosted.reset();
            timer.reset();
            std::exit(7);
          }) == 7);
  }
#endif
  CHECK(hosted->call(&Guest::number) == 1);
  unwrap(timer->call([](asio::steady_timer& t) { t.expires_after(0s); }));
  CHECK(timer->call([](asio::steady_timer& t) { return t.async_wait(asio::deferred); }).has_value());
}

#ifndef SANITIZED  // the runtimes do not survive a fork of a busy process
TEST_CASE("hosted: a forked child may host on a bridge of its own", "[child]") {
  RuntimeBridge bridge;
  Life life;
  std::optional<Hosted<Guest>> hosted(std::in_place, bridge, life, 1);
  CHECK(in_child_process([&] {
          RuntimeBridge own;
          Life own_life;
          *hosted = Hosted<Guest>(own, own_life, 2);
          if (hosted->call(&Guest::number) != 2) return 1;
          hosted.reset();
          return own_life.alive == 0 && life.alive == 1 ? 0 : 2;
        }) == 0);
  CHECK(hosted->call(&Guest::number) == 1);
}
#endif

// ---------------------------------------------------------------------------------------------------------------------
// Races

constexpr int rounds = 1000;

// Race: the destructor's call arrives before, while and after the bridge is ended by another thread.
TEST_CASE("hosted: destroyed while another thread ends the bridge", "[race]") {
  const std::vector<std::function<void(std::optional<RuntimeBridge>&)>> endings{
      [](auto& bridge) { bridge->shutdown(Shutdown::drain); },
      [](auto& bridge) { bridge->shutdown(Shutdown::cancel); },
      [](auto& bridge) { bridge->shutdown(Shutdown::drain, 0s); },
      [](auto& bridge) { bridge->get_executor().context().stop(); },
      [](auto& bridge) { bridge.reset(); },
  };
  for (int round = 0; round < rounds; ++round) {
    std::optional<RuntimeBridge> bridge(std::in_place);
    auto token = std::make_shared<int>();
    Life life;
    std::optional<Hosted<Guest>> hosted(std::in_place, *bridge, life);
    // Seldom, since the bridge's end waits for 200 ms if an operation is pending that belongs to no task.
    std::optional<Hosted<Waiter>> waiter;
    if (round % 500 < 5) waiter.emplace(*bridge, token);
    auto task = bridge->submit(hops(3));
    std::latch both(2);
    jthread ender([&, end = endings[static_cast<std::size_t>(round) % endings.size()]] {
      both.arrive_and_wait();
      end(bridge);
    });
    both.arrive_and_wait();
    for (int i = 0; i < round % 50 * 100; ++i) std::atomic_signal_fence(std::memory_order_seq_cst);  // a moment
    hosted.reset();
    REQUIRE(life.alive == 0);
    waiter.reset();
    ender.join();
    bridge.reset();
    REQUIRE(token.use_count() == 1);
    (void)task.join();
  }
}

// Race: calls are refused, run or cut off, while another thread ends the bridge. The object is there for all that run.
TEST_CASE("hosted: called while another thread ends the bridge", "[race]") {
  for (int round = 0; round < rounds; ++round) {
    std::optional<RuntimeBridge> bridge(std::in_place);
    Life life;
    Outcome last;
    int values = 0;
    {
      const Hosted<Guest> hosted(*bridge, life);
      std::latch both(2);
      jthread ender([&] {
        both.arrive_and_wait();
        if (round % 3 == 0) bridge->shutdown(Shutdown::drain);
        if (round % 3 == 1) bridge->shutdown(Shutdown::cancel);
        bridge.reset();
      });
      both.arrive_and_wait();
      do {
        const auto result = hosted.call(&Guest::increment_twice);
        last = outcome(result);
        if (result.has_value()) REQUIRE(*result == 2 * ++values);
        if (result.has_value() || last == worker_dead) continue;
        REQUIRE((last.error == BridgeError::ResponseLost || last.error == BridgeError::Cancelled));
      } while (last != worker_dead);
    }
    REQUIRE(life.alive == 0);
  }
}

// Race: the bridge is destroyed by its own task, and the worker ends by itself, while another thread destroys the
// object.
TEST_CASE("hosted: destroyed while the worker ends by itself", "[race]") {
  for (int round = 0; round < rounds; ++round) {
    auto bridge = std::make_shared<RuntimeBridge>();
    Life life;
    std::optional<Hosted<Guest>> hosted(std::in_place, *bridge, life);
    const RuntimeBridge& b = *bridge;
    b.submit([last = std::move(bridge)] {}).detach();
    hosted.reset();
    REQUIRE(life.alive == 0);
  }
  await_workers(0);
}
