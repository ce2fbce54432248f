// SPDX-License-Identifier: Apache-2.0
//
// range: a synchronous loop over what a coroutine fetches. allocation_test.cpp has it without memory.

#include <array>
#include <atomic>
#include <memory>
#include <optional>
#include <ranges>
#include <runtime_bridge/range.hpp>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "support.hpp"

using runtime_bridge::prefetch;
using runtime_bridge::range;
using runtime_bridge::Shutdown;
using runtime_bridge::WhenFull;

namespace {

/// A source of 0, 1, 2, ... and what it has seen.
struct Numbers {
  explicit Numbers(int e) : end(e) {}

  const int end;  // how many there are
  std::atomic<int> begun{0};
  std::atomic<int> running{0};
  std::atomic<bool> overlapped{false};
};

/// The next number, or none.
awaitable<std::optional<int>> number(Numbers& numbers) {
  if (++numbers.running != 1) numbers.overlapped = true;
  const int n = numbers.begun++;
  co_await asio::post(use_awaitable);
  --numbers.running;
  std::optional<int> result;
  if (n < numbers.end) result = n;
  co_return result;
}

/// The next number. Throws in place of the end.
awaitable<std::optional<int>> number_or_throw(Numbers& numbers) {
  auto next = number(numbers);
  auto result = co_await std::move(next);
  if (!result) throw std::runtime_error("no more numbers");
  co_return result;
}

/// Where a source parks instead of ending.
struct Parking {
  bool over = false;
  std::exception_ptr cause;
};

/// The next number. Parks in place of the end.
awaitable<std::optional<int>> number_or_park(Numbers& numbers, Parking& parking) {
  auto next = number(numbers);
  auto result = co_await std::move(next);
  if (result) co_return result;
  const SetsFlag over{parking.over};
  try {
    auto parked = park();
    co_await std::move(parked);
  } catch (...) {
    parking.cause = std::current_exception();
    throw;
  }
  co_return result;
}

/// Its destructor notes whether something is still there.
class NotesWhetherAlive {
 public:
  NotesWhetherAlive(std::weak_ptr<Numbers> watch, bool& alive) : watch_(std::move(watch)), alive_(&alive) {}
  NotesWhetherAlive(NotesWhetherAlive&& other) noexcept
      : watch_(std::move(other.watch_)), alive_(std::exchange(other.alive_, nullptr)) {}
  NotesWhetherAlive& operator=(NotesWhetherAlive&&) = delete;
  ~NotesWhetherAlive() {
    if (alive_) *alive_ = !watch_.expired();
  }

 private:
  std::weak_ptr<Numbers> watch_;
  bool* alive_;
};

awaitable<std::optional<int>> number_with(Numbers& numbers, Parking& parking, NotesWhetherAlive) {
  auto next = number_or_park(numbers, parking);
  co_return co_await std::move(next);
}

/// What the function throws.
template <class Function>
std::exception_ptr thrown_by(Function function) {
  try {
    function();
    return nullptr;
  } catch (...) {
    return std::current_exception();
  }
}

/// Collects the items, and returns what ends the loop, if that is an exception.
template <class Range>
std::exception_ptr collect(Range&& items, std::vector<int>& into) {
  return thrown_by([&] {
    for (const int& item : items) into.push_back(item);
  });
}

std::vector<int> first_numbers(int count) {
  std::vector<int> result;
  for (int i = 0; i < count; ++i) result.push_back(i);
  return result;
}

Options telling(std::atomic<int>& told) {
  Options options;
  options.on_unjoined_error = [&told](const BridgeError&) { ++told; };
  return options;
}

/// Movable, and nothing else.
class Token {
 public:
  explicit Token(int value) : value_(std::make_unique<int>(value)) {}
  Token(Token&&) = default;
  Token& operator=(Token&&) = delete;
  ~Token() = default;
  int value() const { return *value_; }

 private:
  std::unique_ptr<int> value_;
};

using Plain = asio::io_context::executor_type;

asio::awaitable<std::optional<int>, Plain> no_numbers() { co_return std::nullopt; }

const std::array some_prefetches = {std::size_t{0}, std::size_t{1},   std::size_t{2},
                                    std::size_t{3}, std::size_t{100}, runtime_bridge::unlimited};

}  // namespace

TEST_CASE("range: all items in order, one fetch at a time, whatever is fetched ahead") {
  const RuntimeBridge bridge;
  for (const std::size_t ahead : some_prefetches) {
    for (const int end : {0, 1, 2, 7, 50}) {
      Numbers numbers(end);
      std::vector<int> seen;
      CHECK(collect(range(
                        bridge, [&] { return number(numbers); }, prefetch(ahead)),
                    seen) == nullptr);
      CHECK(seen == first_numbers(end));
      CHECK(numbers.begun == end + 1);
      CHECK_FALSE(numbers.overlapped);
      CHECK(bridge.in_flight() == 0);
    }
  }
}

TEST_CASE("range: as many items are fetched ahead as was asked for, and no more") {
  const RuntimeBridge bridge;
  for (const std::size_t ahead : some_prefetches) {
    Numbers numbers(10);
    int used = 0;
    const auto next = [&] { return number(numbers); };
    auto items = ahead == 0 ? range(bridge, next) : range(bridge, next, prefetch(ahead));
    CHECK(numbers.begun == 0);
    for (const int item : items) {
      CHECK(item == used++);
      await_state([&] { return bridge.in_flight() == 0; });  // each fetch sends the next one before its end
      REQUIRE(numbers.begun == std::min(used + static_cast<int>(std::min(ahead, std::size_t{20})), 11));
    }
    CHECK(used == 10);
  }
}

TEST_CASE("range: fetches that end on another thread do not overlap", "[race]") {
  const RuntimeBridge bridge;
  asio::thread_pool pool(1);
  Numbers numbers(500);
  const auto next = [&]() -> awaitable<std::optional<int>> {
    auto on_worker = number(numbers);
    auto result = co_await std::move(on_worker);
    co_await asio::post(pool, use_awaitable);
    co_return result;
  };
  std::vector<int> seen;
  CHECK(collect(range(bridge, next, prefetch(2)), seen) == nullptr);
  CHECK(seen == first_numbers(500));
  CHECK_FALSE(numbers.overlapped);
  pool.join();
}

TEST_CASE("range: leaving early cancels the fetch in progress and waits for it") {
  std::atomic<int> told{0};
  const RuntimeBridge bridge(telling(told));
  for (const std::size_t ahead : {1u, 2u, 5u}) {
    for (const bool throws : {false, true}) {
      Numbers numbers(2);
      Parking parking;
      const auto loop = [&] {
        for (const int item : range(
                 bridge, [&] { return number_or_park(numbers, parking); }, prefetch(ahead))) {
          if (item == 0) continue;
          await_state([&] { return numbers.begun == 3 && numbers.running == 0; });
          if (throws) throw std::runtime_error("enough");
          break;
        }
      };
      CHECK((thrown_by(loop) != nullptr) == throws);
      CHECK(parking.over);
      CHECK(code_of<AsioError>(parking.cause) == asio::error::operation_aborted);
      CHECK(bridge.in_flight() == 0);
      CHECK(numbers.begun == 3);
    }
  }
  CHECK(told == 0);

  // Without prefetch nothing is in progress.
  Numbers numbers(2);
  for (const int item : range(bridge, [&] { return number(numbers); })) {
    CHECK(item == 0);
    CHECK(bridge.in_flight() == 0);
    break;
  }
  CHECK(numbers.begun == 1);
}

TEST_CASE("range: an exception of next comes out of begin or ++, after the items before it") {
  std::atomic<int> told{0};
  const RuntimeBridge bridge(telling(told));
  for (const std::size_t ahead : some_prefetches) {
    for (const int end : {0, 1, 3}) {
      Numbers numbers(end);
      std::vector<int> seen;
      const auto next = [&] { return number_or_throw(numbers); };
      CHECK(what(collect(range(bridge, next, prefetch(ahead)), seen)) == "no more numbers");
      CHECK(seen == first_numbers(end));
      CHECK(numbers.begun == end + 1);
    }
  }
  CHECK(told == 0);

  // Then the range is at its end.
  for (const std::size_t ahead : some_prefetches) {
    Numbers numbers(1);
    auto items = range(
        bridge, [&] { return number_or_throw(numbers); }, prefetch(ahead));
    auto i = items.begin();
    CHECK(*i == 0);
    CHECK(what(thrown_by([&] { ++i; })) == "no more numbers");
    CHECK(i == items.end());
    CHECK(items.begin() == items.end());
    ++i;
    CHECK(i == items.end());
    CHECK(numbers.begun == 2);
  }
}

TEST_CASE("range: an error that the loop does not get to is told to nobody") {
  std::atomic<int> told{0};
  const RuntimeBridge bridge(telling(told));
  Numbers numbers(1);
  for (const int item : range(
           bridge, [&] { return number_or_throw(numbers); }, prefetch(1))) {
    CHECK(item == 0);
    await_state([&] { return bridge.in_flight() == 0; });
    break;
  }
  CHECK(numbers.begun == 2);
  CHECK(bridge.stats().response_lost == 1);
  CHECK(told == 0);
}

TEST_CASE("range: a bridge that is shut down under the loop") {
  for (const std::size_t ahead : {0u, 1u, 3u}) {
    SECTION("cancelled, with " + std::to_string(ahead) + " ahead") {
      RuntimeBridge bridge;
      Numbers numbers(2);
      Parking parking;
      std::vector<int> seen;
      jthread shutter([&] {
        await_state([&] { return numbers.begun == 3; });
        bridge.shutdown(Shutdown::cancel);
      });
      const auto end = collect(range(
                                   bridge, [&] { return number_or_park(numbers, parking); }, prefetch(ahead)),
                               seen);
      CHECK(code_of(end) == BridgeError::Cancelled);
      CHECK(seen == first_numbers(2));
      CHECK(parking.over);
    }
    SECTION("destroyed, with " + std::to_string(ahead) + " ahead") {
      std::optional<RuntimeBridge> bridge(std::in_place);
      Numbers numbers(2);
      Parking parking;
      std::vector<int> seen;
      auto items = range(
          *bridge, [&] { return number_or_park(numbers, parking); }, prefetch(ahead));
      jthread destroyer([&] {
        await_state([&] { return numbers.begun == 3; });
        bridge.reset();
      });
      CHECK(code_of(collect(items, seen)) == BridgeError::ResponseLost);
      CHECK(seen == first_numbers(2));
      CHECK(parking.over);
    }
    SECTION("drained, with " + std::to_string(ahead) + " ahead") {
      RuntimeBridge bridge;
      Numbers numbers(100);
      std::atomic<bool> goes_on{false};
      std::vector<int> seen;
      const auto next = [&]() -> awaitable<std::optional<int>> {
        auto item = number(numbers);
        auto result = co_await std::move(item);
        if (result == 5) co_await run_until(goes_on);
        co_return result;
      };
      jthread shutter([&] {
        await_state([&] { return numbers.begun == 6; });
        jthread drainer([&] { bridge.shutdown(Shutdown::drain); });
        await_closed(bridge);
        goes_on = true;
      });
      CHECK(code_of(collect(range(bridge, next, prefetch(ahead)), seen)) == BridgeError::WorkerDead);
      CHECK(seen == first_numbers(6));
    }
  }
}

TEST_CASE("range: it may outlive the bridge") {
  std::optional<RuntimeBridge> bridge(std::in_place);
  Numbers numbers(10);
  auto items = range(
      *bridge, [&] { return number(numbers); }, prefetch(2));
  auto i = items.begin();
  await_state([&] { return bridge->in_flight() == 0; });
  bridge.reset();
  CHECK(*i == 0);
  ++i;
  CHECK(*i == 1);  // what was fetched ahead is there
  ++i;
  CHECK(*i == 2);
  CHECK(code_of(thrown_by([&] { ++i; })) == BridgeError::WorkerDead);
  CHECK(i == items.end());

  RuntimeBridge moved;
  const RuntimeBridge heir = std::move(moved);
  auto of_moved = range(moved, [&] { return number(numbers); });  // NOLINT(bugprone-use-after-move)
  CHECK(code_of(thrown_by([&] { of_moved.begin(); })) == BridgeError::WorkerDead);
}

TEST_CASE("range: on the bridge's own worker nothing waits") {
  std::atomic<int> told{0};
  RuntimeBridge bridge(telling(told));
  Numbers numbers(10);
  Parking parking;
  for (const std::size_t ahead : {0u, 1u}) {
    std::exception_ptr thrown;
    std::vector<int> seen;
    unwrap(bridge.block_on([&] {
      thrown = collect(range(
                           bridge, [&] { return number(numbers); }, prefetch(ahead)),
                       seen);
    }));
    CHECK(code_of(thrown) == BridgeError::WouldDeadlock);
    CHECK(seen.empty());
    await_state([&] { return bridge.in_flight() == 0; });
    CHECK(numbers.begun == 0);
  }

  // What is there already can be had, but only be cancelled and not waited for.
  auto owned = std::make_shared<int>(0);
  const std::weak_ptr<int> watch = owned;
  Numbers two(2);
  std::optional items = range(
      bridge, [&, o = std::move(owned)] { return number_or_park(two, parking); }, prefetch(2));
  auto i = items->begin();
  await_state([&] { return two.begun == 3 && two.running == 0; });
  unwrap(bridge.block_on([&] { ++i; }));
  CHECK(*i == 1);
  std::exception_ptr thrown;
  unwrap(bridge.block_on([&] {
    thrown = thrown_by([&] { ++i; });
    items.reset();
  }));
  CHECK(code_of(thrown) == BridgeError::WouldDeadlock);
  await_state([&] { return bridge.in_flight() == 0; });
  unwrap(bridge.block_on([] {}));
  CHECK(parking.over);
  CHECK(watch.expired());
  CHECK(told == 0);
}

TEST_CASE("range: nothing is fetched once the loop was left, even if cancelling has no effect") {
  RuntimeBridge bridge;
  for (const bool on_worker : {false, true}) {
    std::atomic<int> begun{0};
    const auto next = [&]() -> awaitable<std::optional<int>> {
      if (begun++ != 0) {
        auto stubborn = park_and_return(1);
        co_await std::move(stubborn);
      }
      co_return 1;
    };
    std::optional items = range(bridge, next, prefetch(5));
    CHECK(*items->begin() == 1);
    await_state([&] { return begun == 2; });
    if (on_worker) {
      unwrap(bridge.block_on([&] { items.reset(); }));
    } else {
      items.reset();
    }
    await_state([&] { return bridge.in_flight() == 0; });
    CHECK(begun == 2);
  }
}

TEST_CASE("range: in a ring of bridges nothing waits") {
  RuntimeBridge a, b;
  Numbers numbers(1), one(1);
  Parking parking;
  std::exception_ptr thrown;
  std::vector<int> seen;
  std::optional items = range(
      a, [&] { return number_or_park(one, parking); }, prefetch(1));
  CHECK(*items->begin() == 0);
  await_state([&] { return one.begun == 2 && one.running == 0; });
  bool over = true;
  unwrap(a.block_on([&] {
    unwrap(b.block_on([&] {
      thrown = collect(range(
                           a, [&] { return number(numbers); }, prefetch(1)),
                       seen);
      items.reset();
    }));
    over = parking.over;
  }));
  CHECK(code_of(thrown) == BridgeError::WouldDeadlock);
  CHECK_FALSE(over);
  await_state([&] { return a.in_flight() == 0; });
  unwrap(a.block_on([] {}));
  CHECK(parking.over);
  CHECK(numbers.begun == 0);

  // From another bridge it waits.
  CHECK(b.block_on([&] {
    return collect(range(
                       a, [&] { return number(numbers); }, prefetch(1)),
                   seen) == nullptr;
  }) == true);
  CHECK(seen == first_numbers(1));
}

// A fetch holds its turn only while `next` runs.
TEST_CASE("range: on a bridge with one turn, which the loop's body needs too") {
  for (const WhenFull when_full : {WhenFull::wait, WhenFull::refuse}) {
    std::atomic<int> told{0};
    Options options = telling(told);
    options.max_in_flight = 1;
    options.when_full = when_full;
    const RuntimeBridge bridge(std::move(options));
    for (const std::size_t ahead : some_prefetches) {
      Numbers numbers(20);
      std::vector<int> seen;
      for (const int item : range(
               bridge, [&] { return number(numbers); }, prefetch(ahead))) {
        if (when_full == WhenFull::refuse) await_state([&] { return bridge.in_flight() == 0; });
        seen.push_back(unwrap(bridge.block_on([item] { return item; })));
      }
      CHECK(seen == first_numbers(20));
      CHECK_FALSE(numbers.overlapped);
      for (const int item : range(
               bridge, [&] { return number(numbers); }, prefetch(ahead))) {
        CHECK(item == -1);
      }
    }
    CHECK(told == 0);

    // Without a turn for the item that is needed, the loop waits for it or is refused.
    Numbers numbers(1);
    auto parked = bridge.submit(park());
    auto items = range(
        bridge, [&] { return number(numbers); }, prefetch(1));
    if (when_full == WhenFull::refuse) {
      CHECK(code_of(thrown_by([&] { items.begin(); })) == BridgeError::Overloaded);
    } else {
      jthread stopper([&] {
        await_state([&] { return count_calls(bridge, runtime_bridge::State::waiting) == 1; });
        parked.request_stop();
      });
      CHECK(*items.begin() == 0);
    }
  }
}

TEST_CASE("range: items that can only be moved, and every kind of next") {
  const RuntimeBridge bridge;
  Numbers numbers(5);
  auto next = [&numbers, owned = std::make_unique<int>(10)]() -> awaitable<std::optional<Token>> {
    auto item = number(numbers);
    const auto n = co_await std::move(item);
    std::optional<Token> result;
    if (n) result.emplace(*n + *owned);
    co_return result;
  };
  std::vector<Token> tokens;
  for (Token& token : range(bridge, std::move(next), prefetch(1))) tokens.push_back(std::move(token));
  CHECK(tokens.size() == 5);
  CHECK(tokens.back().value() == 14);

  std::vector<int> seen;
  CHECK(collect(range(bridge, no_numbers), seen) == nullptr);
  CHECK(collect(range(bridge, &no_numbers, prefetch(1)), seen) == nullptr);
  CHECK(seen.empty());

  int calls = 0;
  auto counts = [n = 0, &calls]() mutable {
    calls = ++n;
    return no_numbers();
  };
  CHECK(collect(range(bridge, counts), seen) == nullptr);
  CHECK(collect(range(bridge, counts), seen) == nullptr);
  CHECK(calls == 1);  // each range has a copy
}

TEST_CASE("range: next and its data live until the last fetch is over") {
  const RuntimeBridge bridge;
  auto owned = std::make_shared<Numbers>(3);
  const std::weak_ptr<Numbers> watch = owned;
  bool alive = false;
  Parking parking;
  {
    auto next = [n = std::move(owned), &alive, &parking] {
      return number_with(*n, parking, NotesWhetherAlive(n, alive));
    };
    auto items = range(bridge, std::move(next), prefetch(5));
    CHECK(*items.begin() == 0);
    const auto numbers = watch.lock();
    await_state([&] { return numbers->begun == 4 && numbers->running == 0; });
  }
  CHECK(alive);
  CHECK(watch.expired());
}

TEST_CASE("range: it is an input range that can be moved") {
  const RuntimeBridge bridge;
  Numbers numbers(100);
  const auto next = [&] { return number(numbers); };
  auto items = range(bridge, next, prefetch(1));
  using Items = decltype(items);
  static_assert(std::ranges::input_range<Items>);
  static_assert(!std::ranges::forward_range<Items>);
  static_assert(std::same_as<std::ranges::range_reference_t<Items>, int&>);
  static_assert(std::movable<Items> && !std::copyable<Items>);

  auto i = items.begin();
  auto elsewhere = std::move(items);
  ++i;
  CHECK(*i == 1);
  i++;
  CHECK(*elsewhere.begin() == 2);  // begin again: the same position
  *i = 7;
  CHECK(*elsewhere.begin() == 7);

  Numbers others(2);
  const auto other = [&] { return number(others); };
  auto first = range(bridge, other);
  CHECK(*first.begin() == 0);
  first = range(bridge, other);
  CHECK(*first.begin() == 1);
  CHECK(bridge.in_flight() <= 1);
}

// clang 14 does not compile the views of libstdc++ 12.
#if !defined(__clang__) || __clang_major__ >= 16
TEST_CASE("range: it works with views") {
  const RuntimeBridge bridge;
  std::vector<int> seen;
  const auto twice = [](int n) { return 2 * n; };
  Numbers more(10);
  const auto third = [&] { return number(more); };
  for (const int item : range(bridge, third, prefetch(2)) | std::views::transform(twice) | std::views::take(3)) {
    seen.push_back(item);
  }
  CHECK(seen == std::vector{0, 2, 4});
}
#endif

TEST_CASE("range: assigning another range leaves the one before") {
  const RuntimeBridge bridge;
  const auto make = [&](Numbers& numbers, Parking& parking) {
    return range(
        bridge, [&] { return number_or_park(numbers, parking); }, prefetch(1));
  };
  Numbers numbers(1), others(1);
  Parking parking, other_parking;
  auto items = make(numbers, parking);
  CHECK(*items.begin() == 0);
  await_state([&] { return numbers.begun == 2 && numbers.running == 0; });
  items = make(others, other_parking);
  CHECK(parking.over);
  CHECK(*items.begin() == 0);
}

TEST_CASE("range: its fetches are calls of the line that made it") {
  const RuntimeBridge bridge;
  Numbers numbers(1);
  Parking parking;
  const auto next = [&] { return number_or_park(numbers, parking); };
  auto items = range(bridge, next, prefetch(1));
  const auto line = __LINE__ - 1;
  CHECK(*items.begin() == 0);
  await_state([&] { return numbers.begun == 2; });
  const auto calls = bridge.calls();
  REQUIRE(calls.size() == 1);
  CHECK(calls.front().where.line() == line);
  CHECK(calls.front().where.file_name() == std::string(__FILE__));
  CHECK(calls.front().name.empty());
}

TEST_CASE("range: a forked child has what was fetched, and nothing hangs", "[child]") {
  const RuntimeBridge bridge;
  for (const std::size_t ahead : {0u, 1u, 5u}) {
    Numbers numbers(2);
    Parking parking;
    std::optional items = range(
        bridge, [&] { return number_or_park(numbers, parking); }, prefetch(ahead));
    auto i = items->begin();
    await_state([&] { return numbers.running == 0 && (ahead == 5 ? numbers.begun == 3 : bridge.in_flight() == 0); });
    CHECK(in_child_process([&] {
            if (*i != 0) return 1;
            if (ahead != 0 && *++i != 1) return 2;
            if (code_of(thrown_by([&] { ++i; })) != BridgeError::WorkerDead) return 3;
            if (i != items->end()) return 4;
            items.reset();
            return 0;
          }) == 0);
    CHECK(in_child_process([&] {
            items.reset();
            return 0;
          }) == 0);
    ++i;
    CHECK(*i == 1);
  }
}

// Race: the bridge is shut down while the loop, the fetches and their sending of one another go on.
TEST_CASE("range: a shutdown races with a loop", "[race]") {
  for (int round = 0; round < 1'000; ++round) {
    std::optional<RuntimeBridge> bridge(std::in_place);
    Numbers numbers(1'000'000'000);
    std::vector<int> seen;
    auto items = range(
        *bridge, [&] { return number(numbers); }, prefetch(static_cast<std::size_t>(round % 4)));
    jthread shutter([&] {
      await_state([&] { return numbers.begun >= round % 7; });
      if (round % 3 == 0) {
        bridge.reset();
      } else {
        bridge->shutdown(round % 3 == 1 ? Shutdown::drain : Shutdown::cancel);
      }
    });
    const auto code = code_of(collect(items, seen));
    const bool expected = code == BridgeError::WorkerDead || (round % 3 == 0 && code == BridgeError::ResponseLost) ||
                          (round % 3 == 2 && code == BridgeError::Cancelled);
    INFO(code);
    REQUIRE(expected);
    REQUIRE(seen == first_numbers(static_cast<int>(seen.size())));
  }
}

// Race: the loop is left while a fetch ends and sends the next one.
TEST_CASE("range: leaving races with the end of a fetch", "[race]") {
  std::atomic<int> told{0};
  const RuntimeBridge bridge(telling(told));
  for (int round = 0; round < 2'000; ++round) {
    auto alive = std::make_shared<Numbers>(4);
    const std::weak_ptr<Numbers> watch = alive;
    auto next = [n = std::move(alive)] { return number(*n); };
    for (const int item : range(bridge, std::move(next), prefetch(static_cast<std::size_t>(round % 4)))) {
      if (item == round % 5) break;
    }
    REQUIRE(bridge.in_flight() == 0);
    REQUIRE(watch.expired());
  }
  CHECK(told == 0);
}

// Race: the range is destroyed on another thread than that of the loop, in a ring, where it cannot wait, while a fetch
// ends and sends the next one.
TEST_CASE("range: leaving where nothing may wait races with the end of a fetch", "[race]") {
  RuntimeBridge a, b;
  for (int round = 0; round < 500; ++round) {
    auto alive = std::make_shared<Numbers>(1'000'000'000);
    const std::weak_ptr<Numbers> watch = alive;
    std::optional items = range(
        a, [n = std::move(alive)] { return number(*n); }, prefetch(3));
    CHECK(*items->begin() == 0);
    JoinHandle<void> leaves;
    unwrap(a.block_on([&] {
      leaves = b.submit([&] { items.reset(); });
      (void)leaves.wait_for(std::chrono::microseconds(round % 5));  // B's wait for this worker closes a ring, until now
    }));
    unwrap(leaves.join());
    await_state([&] { return a.in_flight() == 0; });
    unwrap(a.block_on([] {}));
    REQUIRE(watch.expired());
  }
}
