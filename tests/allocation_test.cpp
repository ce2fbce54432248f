// SPDX-License-Identifier: Apache-2.0
//
// What happens without memory. Each scenario runs again and again, and in each run the next allocation fails, on any
// thread, until a run needs no more allocations. No failure is silent, loses an answer, leaks, or harms what comes
// after.

#include <array>
#include <atomic>
#include <cstdlib>
#include <ios>
#include <memory>
#include <new>
#include <optional>
#include <runtime_bridge/hosted.hpp>
#include <runtime_bridge/range.hpp>
#include <runtime_bridge/streambuf.hpp>
#include <string>
#include <utility>

#include "support.hpp"

using runtime_bridge::Hosted;
using runtime_bridge::named;
using runtime_bridge::poll_every;
using runtime_bridge::Shutdown;
using runtime_bridge::WhenFull;

namespace {

// Asio itself ends the program if it has no memory
//   - to destroy a suspended coroutine, which it posts from a destructor,
//   - before 1.23, to initiate an operation that a coroutine waits for, or to start a coroutine on any_io_executor,
//   - in some versions, to make the exception of a failed operation.
// So allocations of the workers do not fail there. When an exception passes through coroutines, Asio destroys some of
// them, so in a lasting shortage the workers still get memory for frames and handlers.
constexpr bool initiations_may_fail = ASIO_VERSION >= 102300;
constexpr bool cancellations_may_fail = ASIO_VERSION < 103400;

// Newer versions (1.36, not 1.30) leak a block if they run out of memory while they make an io_context.
constexpr long lost_by_asio = ASIO_VERSION > 103002 ? 1 : 0;

enum class Kind {
  general,  // operator new
  asio,     // aligned_alloc: Asio's frames and handlers
};

#ifdef ASIO_HAS_STD_ALIGNED_ALLOC
constexpr Kind kind_of_new = Kind::general;
#else
// With libc++ Asio uses operator new for everything, so a lasting shortage does not affect the workers.
constexpr Kind kind_of_new = Kind::asio;
#endif

struct Shortage {
  std::atomic<long> first{0};  // the number of the allocation that fails; 0: none
  std::atomic<bool> lasts{false};
  std::atomic<bool> workers_spared{false};
  std::atomic<bool> frames_spared{false};  // of the workers
  std::atomic<long> seen{0};
  std::atomic<long> hit{0};  // how many have failed
  std::atomic<long> on_workers{0};

  bool hits(Kind kind) noexcept;

  void begin(long n, bool lasting) noexcept {
    seen = hit = on_workers = 0;
    workers_spared = false;
    lasts = lasting;
    first = n;
  }
  void end() noexcept { first = 0; }

  /// Ends a step of the scenario, and the shortage if it has begun.
  void end_step() noexcept {
    workers_spared = false;
    if (hit != 0) end();
  }
};

Shortage shortage;
std::atomic<long> blocks{0};       // allocated with operator new and not freed
thread_local bool caller = false;  // or else this thread is a worker
thread_local long failed_here = 0;

bool Shortage::hits(Kind kind) noexcept {
  if (first == 0) return false;
  if (!caller && (workers_spared || (kind == Kind::asio && (lasts || frames_spared)))) return false;
  const long n = ++seen;
  if (lasts ? n < first : n != first) return false;
  ++hit;
  ++failed_here;
  if (!caller) ++on_workers;
  return true;
}

void* take(std::size_t size, std::size_t alignment = alignof(std::max_align_t)) noexcept {
  void* p = nullptr;
  if (shortage.hits(kind_of_new) || posix_memalign(&p, alignment, size) != 0) return nullptr;
  ++blocks;
  return p;
}

void* take_or_throw(std::size_t size, std::size_t alignment = alignof(std::max_align_t)) {
  if (void* p = take(size, alignment)) return p;
  throw std::bad_alloc();
}

void give_back(void* p) noexcept {
  if (p) --blocks;
  std::free(p);
}

}  // namespace

// Not inlined, or g++ sees only one half of a pair and warns of a mismatch. All other forms call these.
[[gnu::noinline]] void* operator new(std::size_t size) { return take_or_throw(size); }
[[gnu::noinline]] void* operator new(std::size_t size, const std::nothrow_t&) noexcept { return take(size); }
[[gnu::noinline]] void* operator new[](std::size_t size) { return take_or_throw(size); }
[[gnu::noinline]] void* operator new[](std::size_t size, const std::nothrow_t&) noexcept { return take(size); }
[[gnu::noinline]] void* operator new(std::size_t size, std::align_val_t alignment) {
  return take_or_throw(size, static_cast<std::size_t>(alignment));
}
[[gnu::noinline]] void* operator new(std::size_t size, std::align_val_t alignment, const std::nothrow_t&) noexcept {
  return take(size, static_cast<std::size_t>(alignment));
}
[[gnu::noinline]] void* operator new[](std::size_t size, std::align_val_t alignment) {
  return take_or_throw(size, static_cast<std::size_t>(alignment));
}
[[gnu::noinline]] void* operator new[](std::size_t size, std::align_val_t alignment, const std::nothrow_t&) noexcept {
  return take(size, static_cast<std::size_t>(alignment));
}
[[gnu::noinline]] void operator delete(void* p) noexcept { give_back(p); }
[[gnu::noinline]] void operator delete(void* p, std::size_t) noexcept { give_back(p); }
[[gnu::noinline]] void operator delete(void* p, const std::nothrow_t&) noexcept { give_back(p); }
[[gnu::noinline]] void operator delete(void* p, std::align_val_t) noexcept { give_back(p); }
[[gnu::noinline]] void operator delete(void* p, std::size_t, std::align_val_t) noexcept { give_back(p); }
[[gnu::noinline]] void operator delete(void* p, std::align_val_t, const std::nothrow_t&) noexcept { give_back(p); }
[[gnu::noinline]] void operator delete[](void* p) noexcept { give_back(p); }
[[gnu::noinline]] void operator delete[](void* p, std::size_t) noexcept { give_back(p); }
[[gnu::noinline]] void operator delete[](void* p, const std::nothrow_t&) noexcept { give_back(p); }
[[gnu::noinline]] void operator delete[](void* p, std::align_val_t) noexcept { give_back(p); }
[[gnu::noinline]] void operator delete[](void* p, std::size_t, std::align_val_t) noexcept { give_back(p); }
[[gnu::noinline]] void operator delete[](void* p, std::align_val_t, const std::nothrow_t&) noexcept { give_back(p); }

// libc++ uses aligned_alloc for exceptions only, and has a reserve for them: there nothing fails.
#ifdef ASIO_HAS_STD_ALIGNED_ALLOC
extern "C" void* aligned_alloc(std::size_t alignment, std::size_t size) noexcept {
  void* p = nullptr;
  if (shortage.hits(Kind::asio)) return nullptr;
  return posix_memalign(&p, alignment, size) == 0 ? p : nullptr;
}
#endif

// `lost_by_asio` counts what Asio leaks.
extern "C" const char* __lsan_default_suppressions() { return "leak:asio::execution_context::execution_context"; }

namespace {

bool is_bad_alloc(const std::exception_ptr& cause) noexcept {
  if (!cause) return false;
  try {
    std::rethrow_exception(cause);
  } catch (const std::bad_alloc&) {
    return true;
  } catch (...) {
    return false;
  }
}

// How often a shortage was reported: thrown, as the cause of an error, as an error code, or to a worker's hook.
std::atomic<long> told{0};
std::atomic<long> tasks_begun{0};

Options options(Start start = Start::eager) {
  Options result;
  result.start = start;
  result.on_stray_exception = [](const std::exception_ptr& stray) {
    if (is_bad_alloc(stray)) ++told;
  };
  return result;
}

/// A part of a task. None may outlive its call.
struct Part {
  Part() noexcept { ++alive; }
  Part(const Part&) noexcept { ++alive; }
  Part(Part&&) noexcept { ++alive; }
  Part& operator=(const Part&) = default;
  Part& operator=(Part&&) = default;
  ~Part() { --alive; }
  static inline std::atomic<long> alive{0};
};

/// Collects the complaints of a scenario, for Catch2 to check later. It allocates nothing itself.
class Scene {
 public:
  void expect(bool holds, const char* complaint) noexcept {
    if (!holds && count_ < complaints_.size()) complaints_.at(count_++) = complaint;
  }

  /// Runs a step that must throw std::bad_alloc if and only if it has no memory. Returns whether it had.
  template <class Step>
  bool attempt(Step step) {
    const long before = failed_here;
    try {
      step();
      expect(failed_here == before, "a failure on the calling thread was swallowed");
      shortage.end_step();
      return true;
    } catch (const std::bad_alloc&) {
      expect(failed_here != before, "std::bad_alloc out of nowhere");
      ++told;
      shortage.end_step();
      return false;
    }
  }

  /// Makes a call. Unless an allocation fails it must satisfy `undisturbed`. It must leave nothing behind.
  template <class Undisturbed, class Call>
  void call(const RuntimeBridge& bridge, Undisturbed undisturbed, Call call) {
    const long on_workers = shortage.on_workers;
    const long alive = Part::alive;
    tasks_begun = 0;
    const bool was = attempt([&] {
      const auto result = call();
      if (!result.has_value() && is_bad_alloc(result.error().cause())) ++told;
      if (undisturbed(result)) return;
      expect(shortage.on_workers != on_workers, "an outcome that nothing explains");
      expect(!result.has_value() && result.error() == BridgeError::ResponseLost, "another error than ResponseLost");
      if (result.has_value() || is_bad_alloc(result.error().cause())) return;
      // The exception went through Asio and did not reach the coroutine.
      expect(initiations_may_fail && !result.error().cause(), "ResponseLost for the wrong cause");
    });
    expect(was || tasks_begun == 0, "std::bad_alloc for a call that was");
    expect(bridge.in_flight() == 0, "the call is still in flight");
    expect(Part::alive == alive, "something of the task outlives its call");
  }

  /// Runs a step in which no allocation fails.
  template <class Step>
  static void calmly(Step step) {
    const long first = shortage.first.exchange(0);
    step();
    shortage.workers_spared = false;
    shortage.first = first;
  }

  /// A failure in a task whose result is discarded is not reported.
  void not_told() noexcept { silent_ = true; }
  [[nodiscard]] bool silent() const noexcept { return silent_; }

  /// Checks that the bridge still works.
  void works(const RuntimeBridge& bridge) {
    shortage.end();
    expect(bridge.block_on([] { return 1; }) == 1, "the bridge does not work any more");
    expect(bridge.block_on([]() -> awaitable<int> { co_return 2; }) == 2, "the bridge runs no coroutines any more");
  }

  [[nodiscard]] std::string complaints() const {
    std::string all;
    for (std::size_t i = 0; i < count_; ++i) all += std::string("\n  ") + complaints_.at(i);
    return all;
  }

 private:
  std::array<const char*, 16> complaints_{};
  std::size_t count_ = 0;
  bool silent_ = false;
};

/// Runs the scenario with its first allocation failing, then its second, and so on until none is left. In the first
/// round one allocation fails, in the second round also all later ones of the same step. The scenario must allocate
/// more than `at_least` times.
template <class Scenario>
void sweep(long at_least, Scenario scenario, bool frames_spared = false) {
  caller = true;
  shortage.frames_spared = frames_spared;
  {
    Scene calm;  // also makes the allocations that are made only once
    scenario(calm);
    REQUIRE(calm.complaints().empty());
  }
  for (const bool lasting : {false, true}) {
    for (long n = 1;; ++n) {
      INFO("allocation " << n << (lasting ? " fails with those after it" : " fails"));
      await_workers(0);
      const std::size_t descriptors = descriptors_of_this_process();
      const long blocks_before = blocks;
      const long alive = Part::alive;
      told = 0;
      Scene scene;
      shortage.begin(n, lasting);
      try {
        scenario(scene);
      } catch (...) {
        shortage.end();
        throw;
      }
      shortage.end();

      const long hit = shortage.hit;
      await_workers(0);
      const long leaked = blocks - blocks_before;
      INFO("complaints:" << scene.complaints());
      CHECK(leaked >= 0);
      CHECK(leaked <= lost_by_asio);
      CHECK(Part::alive == alive);
      CHECK(descriptors_of_this_process() == descriptors);
      CHECK(scene.complaints().empty());
      if (!scene.silent()) {
        if (lasting) {
          CHECK((told > 0) == (hit > 0));
        } else {
          CHECK(told == hit);
        }
      }
      if (hit == 0) {
        CHECK(n > at_least);  // or else the test does not test
        break;
      }
      REQUIRE(n < 1000);
    }
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// Tasks

// To be called before an operation of Asio is initiated.
void initiate() noexcept {
  if (!initiations_may_fail) shortage.workers_spared = true;
}

using Plain = asio::io_context::executor_type;

template <class Executor>
using Timer =
    asio::basic_waitable_timer<std::chrono::steady_clock, asio::wait_traits<std::chrono::steady_clock>, Executor>;

template <class Executor>
asio::awaitable<int, Executor> seven([[maybe_unused]] Part part) {
  ++tasks_begun;
  co_return 7;
}

template <class Executor>
asio::awaitable<int, Executor> hop([[maybe_unused]] Part part) {
  ++tasks_begun;
  initiate();
  co_await asio::post(asio::use_awaitable_t<Executor>());
  co_return 8;
}

template <class Executor>
asio::awaitable<int, Executor> nap([[maybe_unused]] Part part) {
  ++tasks_begun;
  Timer<Executor> timer(co_await asio::this_coro::executor, 0ms);
  initiate();
  co_await timer.async_wait(asio::use_awaitable_t<Executor>());
  co_return 9;
}

template <class Executor>
asio::awaitable<int, Executor> fail([[maybe_unused]] Part part) {
  ++tasks_begun;
  throw 42;
  co_return 0;
}

/// Waits until it is cancelled.
asio::awaitable<int, Plain> park([[maybe_unused]] Part part) {
  ++tasks_begun;
  Timer<Plain> timer(co_await asio::this_coro::executor, 24h);
  shortage.workers_spared = true;  // from here Asio makes its exception
  co_await timer.async_wait(asio::use_awaitable_t<Plain>());
  co_return 0;
}

/// The call must end like this.
auto gives(int value) {
  return [value](const Result<int>& result) { return result.has_value() && *result == value; };
}
auto gives(BridgeError::Kind kind) {
  return [kind](const auto& result) { return !result.has_value() && result.error() == kind; };
}
auto succeeds = [](const auto& result) { return result.has_value(); };

template <class Executor>
void every_kind_of_task(Scene& scene, Start start) {
  std::optional<RuntimeBridge> bridge;
  if (!scene.attempt([&] { bridge.emplace(options(start)); })) return;
  const auto& b = *bridge;
  const Part part;

  scene.call(b, gives(6), [&] { return b.block_on([part] { return ++tasks_begun, 6; }); });
  scene.call(b, succeeds, [&] { return b.block_on([part] { ++tasks_begun; }); });
  scene.call(b, gives(7), [&] { return b.block_on([part] { return seven<Executor>(part); }); });
  scene.call(b, gives(7), [&] { return b.block_on(seven<Executor>(part)); });
  scene.call(b, gives(8), [&] { return b.block_on([part] { return hop<Executor>(part); }); });
  scene.call(b, gives(9), [&] { return b.block_on([part] { return nap<Executor>(part); }); });
  const auto operation = [&] {
    asio::steady_timer timer(b.get_executor(), 0ms);
    auto deferred = timer.async_wait(asio::deferred);
    const auto wait = [&deferred, part](auto token) {
      ++tasks_begun;
      initiate();
      return deferred(std::move(token));
    };
    return b.block_on(wait);
  };
  scene.call(b, succeeds, operation);
  const auto threw_42 = [](const Result<int>& result) {
    return gives(BridgeError::ResponseLost)(result) && result.error().cause() && !is_bad_alloc(result.error().cause());
  };
  scene.call(b, threw_42, [&] { return b.block_on([part] { return fail<Executor>(part); }); });
  scene.call(b, threw_42, [&] { return b.block_on([part]() -> int { throw 42; }); });
  scene.works(b);
}

}  // namespace

TEST_CASE("allocation: a bridge whose constructor runs out of memory throws and leaves nothing behind") {
  SECTION("eager") {
    sweep(5, [](Scene& scene) {
      std::optional<RuntimeBridge> bridge;
      if (scene.attempt([&] { bridge.emplace(options()); })) scene.works(*bridge);
    });
  }
  SECTION("lazy: the first call throws, and the next one tries again") {
    sweep(6, [](Scene& scene) {
      std::optional<RuntimeBridge> bridge;
      if (!scene.attempt([&] { bridge.emplace(options(Start::lazy)); })) return;
      scene.call(*bridge, gives(3), [&] { return bridge->block_on([] { return ++tasks_begun, 3; }); });
      scene.works(*bridge);
    });
  }
  SECTION("create tells not_enough_memory") {
    sweep(5, [](Scene& scene) {
      auto made = RuntimeBridge::create(options());
      scene.expect(made.has_value() == (shortage.hit == 0), "create does not tell what happened");
      shortage.end_step();
      if (made.has_value()) return scene.works(*made);
      scene.expect(made.error() == std::errc::not_enough_memory, "create tells another error");
      ++told;
    });
  }
  SECTION("with a long name") {
    sweep(5, [](Scene& scene) {
      std::optional<RuntimeBridge> bridge;
      const auto make = [&] { bridge.emplace(RuntimeBridge::with_thread_name("runtime-bridge, and no short name")); };
      if (scene.attempt(make)) scene.works(*bridge);
    });
  }
  SECTION("moving takes none") {
    sweep(12, [](Scene& scene) {
      std::optional<RuntimeBridge> bridge;
      if (!scene.attempt([&] { bridge.emplace(options()); })) return;
      RuntimeBridge heir(std::move(*bridge));
      const auto gone = [&] { return bridge->block_on([] { return ++tasks_begun, 3; }); };
      scene.call(*bridge, gives(BridgeError::WorkerDead), gone);
      scene.attempt([&] { heir = RuntimeBridge(options()); });
      scene.call(heir, gives(4), [&] { return heir.block_on([] { return ++tasks_begun, 4; }); });
      scene.works(heir);
    });
  }
}

TEST_CASE("allocation: a call without memory throws std::bad_alloc, and a task without memory is ResponseLost") {
  SECTION("on the worker's own executor") {
    sweep(16, [](Scene& scene) { every_kind_of_task<Plain>(scene, Start::eager); });
  }
  SECTION("on a lazy bridge") {
    sweep(16, [](Scene& scene) { every_kind_of_task<Plain>(scene, Start::lazy); });
  }
  SECTION("on any_io_executor") {
    const auto scenario = [](Scene& scene) { every_kind_of_task<asio::any_io_executor>(scene, Start::eager); };
    sweep(16, scenario, !initiations_may_fail);
  }
}

TEST_CASE("allocation: cancelling allocates nothing") {
  sweep(11, [](Scene& scene) {
    std::optional<RuntimeBridge> bridge;
    if (!scene.attempt([&] { bridge.emplace(options()); })) return;
    const auto& b = *bridge;
    const Part part;

    const auto parks = [part] { return park(part); };
    scene.call(b, gives(BridgeError::TimedOut), [&] { return b.block_on_for(parks, 1ms); });
    scene.call(b, gives(BridgeError::TimedOut), [&] { return b.block_on_for(parks, 0ms); });

#ifdef HAS_STOP_TOKEN
    std::optional<stop_source> stop;
    if (!scene.attempt([&] { stop.emplace(); })) return;
    const auto asks_to_be_stopped = [&stop, part] {
      stop->request_stop();
      return park(part);
    };
    const auto stopped = [&] { return b.block_on(asks_to_be_stopped, stop->get_token()); };
    scene.call(b, gives(BridgeError::Cancelled), stopped);
    stop->request_stop();
    scene.call(b, gives(BridgeError::Cancelled), stopped);  // before the task starts
#endif

    const auto through_its_handle = [&] {
      auto handle = b.submit(parks);
      await_state([&] { return handle.done() || tasks_begun == 1; });
      handle.request_stop();
      return handle.join();
    };
    scene.call(b, gives(BridgeError::Cancelled), through_its_handle);
    scene.works(b);
  });
}

TEST_CASE("allocation: submit") {
  sweep(20, [](Scene& scene) {
    std::optional<RuntimeBridge> bridge;
    if (!scene.attempt([&] { bridge.emplace(options(Start::lazy)); })) return;
    const auto& b = *bridge;
    const Part part;

    const auto submitted = [&](auto task) {
      const long alive = Part::alive;
      auto handle = b.submit(std::move(task));
      auto result = handle.join();
      scene.expect(Part::alive <= alive, "something of the task outlives its answer");
      return result;
    };
    scene.call(b, gives(6), [&] { return submitted([part] { return ++tasks_begun, 6; }); });
    scene.call(b, gives(7), [&] { return submitted([part] { return seven<Plain>(part); }); });
    scene.call(b, gives(7), [&] { return submitted(seven<Plain>(part)); });
    scene.call(b, gives(8), [&] { return submitted([part] { return hop<Plain>(part); }); });

    const long on_workers = shortage.on_workers;
    const auto detached = [&] {
      b.submit([part] { return hop<Plain>(part); }).detach();
      await_state([&] { return b.in_flight() == 0; });
      return Result<int>(0);
    };
    scene.call(b, succeeds, detached);
    const auto dropped = [&] {
      {
        const auto handle = b.submit([part] { return park(part); });
      }
      return Result<int>(0);
    };
    scene.call(b, succeeds, dropped);
    if (shortage.on_workers != on_workers) scene.not_told();
    scene.works(b);
  });
}

TEST_CASE("allocation: arguments, predicates, and functions for the end") {
  sweep(14, [](Scene& scene) {
    std::optional<RuntimeBridge> bridge;
    if (!scene.attempt([&] { bridge.emplace(options(Start::lazy)); })) return;
    const auto& b = *bridge;
    const Part part;

    const auto measures = [](const std::string& text, [[maybe_unused]] Part p) {
      ++tasks_begun;
      return static_cast<int>(text.size());
    };
    scene.call(b, gives(35), [&] { return b.call(measures, "more than a string keeps in itself.", part); });

    const auto parks = [part] { return park(part); };
    const auto polled = [&] { return b.block_on(parks, poll_every(1ms, [n = 0]() mutable { return ++n == 3; })); };
    scene.call(b, gives(BridgeError::Cancelled), polled);

    const auto told_of_end = [&](auto task) {
      std::optional<Result<int>> result;
      b.submit(std::move(task), [&](Result<int> end) { result.emplace(std::move(end)); });
      await_state([&] { return b.in_flight() == 0; });
      return *std::move(result);
    };
    scene.call(b, gives(6), [&] { return told_of_end([part] { return ++tasks_begun, 6; }); });
    scene.call(b, gives(8), [&] { return told_of_end([part] { return hop<Plain>(part); }); });
    scene.call(b, gives(7), [&] { return told_of_end(seven<Plain>(part)); });
    scene.works(b);
  });
}

TEST_CASE("allocation: streams") {
  sweep(14, [](Scene& scene) {
    std::optional<RuntimeBridge> bridge;
    if (!scene.attempt([&] { bridge.emplace(options(Start::lazy)); })) return;
    const auto& b = *bridge;
    const Part part;

    const auto read = [](asio::mutable_buffer room) -> asio::awaitable<std::size_t, Plain> {
      ++tasks_begun;
      initiate();
      co_await asio::post(asio::use_awaitable_t<Plain>());
      co_return asio::buffer_copy(room, asio::buffer("0123456789", 10));
    };
    const auto write = [](asio::const_buffer bytes) -> asio::awaitable<std::size_t, Plain> {
      ++tasks_begun;
      initiate();
      co_await asio::post(asio::use_awaitable_t<Plain>());
      co_return bytes.size();
    };
    // What the use of a stream came to. A lack of memory is thrown, if it was this thread's.
    const auto use = [](auto& stream, auto used) -> Result<int> {
      const long before = failed_here;
      stream.clear();
      const int value = used();
      if (!stream.bad()) return value;
      if (failed_here != before && is_bad_alloc(stream.error()->cause())) {
        tasks_begun = 0;  // those of calls before it
        throw std::bad_alloc();
      }
      return error_result<int>(*stream.error());
    };

    std::optional<runtime_bridge::istream<decltype(read)>> in;
    if (!scene.attempt([&] { in.emplace(b, read, 1h, 10); })) return scene.works(b);
    std::array<char, 12> room{};
    const auto get = [&] { return in->get() == '0' ? 1 : 0; };
    for (int attempt = 0; attempt < 3; ++attempt) {
      scene.call(b, gives(1), [&] { return use(*in, get); });
      in->read(room.data(), in->rdbuf()->in_avail());  // not `ignore`, which looks for more
    }
    const auto read_past_the_buffer = [&] { return in->read(room.data(), 12) && room[11] == '1' ? 2 : 0; };
    scene.call(b, gives(2), [&] { return use(*in, read_past_the_buffer); });

    for (const int length : {3, 30}) {
      std::optional<runtime_bridge::ostream<decltype(write)>> out;
      if (!scene.attempt([&] { out.emplace(b, write, 1h, 10); })) break;
      const auto put = [&] {
        out->write("                              ", length).flush();
        return 3;
      };
      scene.call(b, gives(3), [&] { return use(*out, put); });
    }
    scene.works(b);
  });
}

TEST_CASE("allocation: calls from workers, and rings of bridges") {
  sweep(20, [](Scene& scene) {
    std::optional<RuntimeBridge> first;
    std::optional<RuntimeBridge> second;
    if (!scene.attempt([&] { first.emplace(options()); })) return;
    if (!scene.attempt([&] { second.emplace(options()); })) return scene.works(*first);
    const auto& a = *first;
    const auto& b = *second;
    const Part part;

    const auto nested = [&] { return a.block_on([&, part] { return unwrap(b.block_on([part] { return 5; })); }); };
    const auto nested_coroutine = [&] {
      return a.block_on([&, part] { return unwrap(b.block_on([part] { return seven<Plain>(part); })); });
    };
    scene.call(a, gives(5), nested);
    scene.call(a, gives(7), nested_coroutine);

    // Naming the ring allocates. A wait record that is left behind would be a false alarm later.
    const auto refused = [](Result<int> result) {
      if (!gives(BridgeError::WouldDeadlock)(result)) (void)unwrap(std::move(result));
      return 1;
    };
    const auto own = [&] { return a.block_on([&, part] { return refused(a.block_on([part] { return 0; })); }); };
    scene.call(a, gives(1), own);
    const auto ring = [&] {
      return a.block_on(
          [&, part] { return unwrap(b.block_on([&, part] { return refused(a.block_on([part] { return 0; })); })); });
    };
    scene.call(a, gives(1), ring);
    scene.call(a, gives(5), nested);
    const auto joined = [&] {
      return a.block_on([&, part] {
        auto handle = a.submit([part] { return 0; });
        return refused(handle.join());
      });
    };
    scene.call(a, gives(1), [&] {
      auto result = joined();
      await_state([&] { return a.in_flight() == 0; });  // the handle has detached its task
      return result;
    });
    scene.call(b, gives(6), [&] { return b.block_on([&] { return unwrap(a.block_on([] { return 6; })); }); });
    scene.works(a);
    scene.works(b);
  });
}

TEST_CASE("allocation: shutting down allocates nothing") {
  const auto scenario = [](Scene& scene, Shutdown how, bool parks) {
    std::optional<RuntimeBridge> bridge;
    if (!scene.attempt([&] { bridge.emplace(options()); })) return;
    const auto& b = *bridge;
    const Part part;

    const auto under_a_call = [&] {
      auto handle = b.submit([part, parks] { return parks ? park(part) : hop<Plain>(part); });
      if (parks) await_state([&] { return handle.done() || tasks_begun == 1; });
      scene.expect(b.shutdown(how), "the shutdown has left calls");
      return handle.join();
    };
    const auto over = [&](const Result<int>& result) {
      return parks ? gives(BridgeError::Cancelled)(result)
                   : gives(8)(result) || (how == Shutdown::cancel && gives(BridgeError::Cancelled)(result));
    };
    scene.call(b, over, under_a_call);
    scene.expect(b.shutdown(how), "a second shutdown has left calls");

    // A refused call still allocates, and must free what it allocated.
    const auto dead = gives(BridgeError::WorkerDead);
    scene.call(b, dead, [&] { return b.block_on([part] { return ++tasks_begun, 1; }); });
    scene.call(b, dead, [&] { return b.block_on(seven<Plain>(part)); });
    scene.call(b, dead, [&] { return b.submit([part] { return ++tasks_begun, 1; }).join(); });
    scene.call(b, dead, [&] { return b.submit(seven<Plain>(part)).join(); });
  };
  SECTION("drain") {
    sweep(16, [&](Scene& scene) { scenario(scene, Shutdown::drain, false); });
  }
  SECTION("cancel") {
    sweep(16, [&](Scene& scene) { scenario(scene, Shutdown::cancel, false); });
  }
  SECTION("cancel, what is parked") {
    sweep(16, [&](Scene& scene) { scenario(scene, Shutdown::cancel, true); });
  }
}

TEST_CASE("allocation: destroying a bridge with calls in flight allocates nothing") {
  const auto scenario = [](Scene& scene) {
    std::optional<RuntimeBridge> bridge;
    std::optional<Result<int>> blocked;
    std::thread other;
    runtime_bridge::JoinHandle<int> first;
    runtime_bridge::JoinHandle<int> second;
    Scene::calmly([&] {
      bridge.emplace(options());
      other = std::thread([&] {
        caller = true;
        blocked = bridge->block_on([] { return park(Part()); });
      });
      first = bridge->submit(park(Part()));
      second = bridge->submit([part = Part()] { return park(part); });
      await_calls(*bridge, 3);
    });
    shortage.workers_spared = !cancellations_may_fail;
    scene.attempt([&] { bridge.reset(); });
    shortage.end();
    other.join();
    scene.expect(outcome(*blocked) == response_lost, "the blocked caller got another outcome");
    scene.expect(outcome(first.join()) == response_lost, "the first handle got another outcome");
    scene.expect(outcome(second.join()) == response_lost, "the second handle got another outcome");
  };
  sweep(0, scenario, true);  // Asio allocates frames to destroy suspended coroutines
}

TEST_CASE("allocation: a bridge that is destroyed by its own task") {
  sweep(8, [](Scene& scene) {
    const auto last_owner = [] {
      auto bridge = std::make_shared<RuntimeBridge>(options());
      const RuntimeBridge& b = *bridge;
      b.submit([bridge = std::move(bridge), part = Part()] {}).detach();
    };
    scene.attempt(last_owner);
    await_state([] { return Part::alive == 0; });
  });
}

namespace {

/// An object that allocates.
struct Guest {
  explicit Guest(const Part& p) : part(p) {}
  Part part;
  std::unique_ptr<int> number = std::make_unique<int>(6);
};

/// Makes a hosted object, or none if there is no memory.
std::optional<Hosted<Guest>> host(Scene& scene, const RuntimeBridge& bridge, const Part& part) {
  std::optional<Hosted<Guest>> hosted;
  const long alive = Part::alive;
  const long hit = shortage.hit;
  try {
    hosted.emplace(bridge, part);
  } catch (const std::bad_alloc&) {
    ++told;
  }
  shortage.end_step();
  scene.expect(hosted.has_value() == (shortage.hit == hit), "the constructor does not tell what happened");
  scene.expect(Part::alive == alive + (hosted ? 1 : 0), "an object without its owner");
  return hosted;
}

/// Destroys it. That tries again while there is no memory, so a shortage that lasts ends here.
void evict(Scene& scene, std::optional<Hosted<Guest>>& hosted, long alive) {
  std::atomic<bool> done{false};
  std::thread relief;
  Scene::calmly([&] {
    relief = std::thread([&] {
      await_state([&] { return shortage.hit != 0 || done; });
      shortage.end();
    });
  });
  const long failed = failed_here;
  hosted.reset();
  told += failed_here - failed;
  done = true;
  relief.join();
  await_state([&] { return Part::alive == alive; });
  scene.expect(Part::alive == alive, "the object was not destroyed");
}

}  // namespace

TEST_CASE("allocation: a hosted object is made or not, and is destroyed in any case") {
  SECTION("and is called") {
    sweep(12, [](Scene& scene) {
      std::optional<RuntimeBridge> bridge;
      if (!scene.attempt([&] { bridge.emplace(options()); })) return;
      const auto& b = *bridge;
      const Part part;
      const long alive = Part::alive;
      auto hosted = host(scene, b, part);
      if (hosted) {
        scene.call(b, gives(6), [&] { return hosted->call([part](Guest& g) { return ++tasks_begun, *g.number; }); });
        scene.call(b, gives(9), [&] { return hosted->call([part](Guest&) { return nap<Plain>(part); }); });
        const auto named_call = [&] {
          return hosted->call_for(
              1h, named("a name that is not a short one", [part](Guest& g) { return ++tasks_begun, *g.number; }));
        };
        scene.call(b, gives(6), named_call);
      }
      evict(scene, hosted, alive);
      scene.works(b);
    });
  }
  SECTION("on the worker") {
    sweep(5, [](Scene& scene) {
      std::optional<RuntimeBridge> bridge;
      if (!scene.attempt([&] { bridge.emplace(options()); })) return;
      const Part part;
      scene.call(*bridge, gives(6), [&] {
        return bridge->block_on([&, part] {
          const Hosted<Guest> hosted(*bridge, part);
          return 6;
        });
      });
      scene.works(*bridge);
    });
  }
  SECTION("after a shutdown") {
    sweep(5, [](Scene& scene) {
      std::optional<RuntimeBridge> bridge;
      if (!scene.attempt([&] { bridge.emplace(options()); })) return;
      const Part part;
      const long alive = Part::alive;
      auto hosted = host(scene, *bridge, part);
      bridge->shutdown(Shutdown::drain);
      evict(scene, hosted, alive);
    });
  }
  SECTION("later, by a bridge that refuses more calls") {
    sweep(5, [](Scene& scene) {
      std::optional<RuntimeBridge> bridge;
      Options limited = options();
      limited.max_in_flight = 1;
      limited.when_full = WhenFull::refuse;
      if (!scene.attempt([&] { bridge.emplace(std::move(limited)); })) return;
      const Part part;
      const long alive = Part::alive;
      auto hosted = host(scene, *bridge, part);
      JoinHandle<int> parked;
      Scene::calmly([&] {
        tasks_begun = 0;
        parked = bridge->submit(park(part));
        await_state([] { return tasks_begun == 1; });
      });
      evict(scene, hosted, alive + 1);
      shortage.end();
      parked.request_stop();
      scene.expect(gives(BridgeError::Cancelled)(parked.join()), "the task was not cancelled");
    });
  }
}

TEST_CASE("allocation: each of many concurrent callers gets its answer", "[race]") {
  sweep(50, [](Scene& scene) {
    std::optional<RuntimeBridge> bridge;
    std::array<std::thread, 3> callers;
    std::atomic<bool> may_begin{false};
    std::atomic<int> wrong{0};
    const auto ends_well = [&](auto call) {
      const long before = failed_here;
      try {
        const auto result = call();
        if (result == 7 && failed_here == before) return;
        if (result.has_value() || !is_bad_alloc(result.error().cause())) ++wrong;
      } catch (const std::bad_alloc&) {
        if (failed_here == before) ++wrong;
      }
      ++told;
    };
    const auto work = [&] {
      caller = true;
      await_state([&] { return may_begin.load(); });
      for (int i = 0; i < 5; ++i) {
        ends_well([&] { return bridge->block_on([part = Part()] { return 7; }); });
        ends_well([&] { return bridge->block_on([part = Part()] { return seven<Plain>(part); }); });
        ends_well([&] { return bridge->submit([part = Part()] { return seven<Plain>(part); }).join(); });
      }
    };
    Scene::calmly([&] {
      bridge.emplace(options());
      for (std::thread& thread : callers) thread = std::thread(work);
    });
    may_begin = true;
    for (std::thread& thread : callers) thread.join();
    scene.expect(wrong == 0, "a call ended in a way that nothing explains");
    scene.expect(bridge->in_flight() == 0, "a call is still in flight");
    scene.works(*bridge);
  });
}

TEST_CASE("allocation: a loop over a range throws std::bad_alloc, wherever it runs out of memory") {
  const auto next = [](int& n, bool parks) -> asio::awaitable<std::optional<int>, Plain> {
    const int item = n++;
    if (item == 3 && parks) {
      auto parked = park(Part());
      co_await std::move(parked);
    }
    std::optional<int> result;
    if (item < 3) result = item;
    co_return result;
  };
  const auto scenario = [next](Scene& scene, std::size_t ahead, bool parks) {
    std::optional<RuntimeBridge> bridge;
    if (!scene.attempt([&] { bridge.emplace(options()); })) return;
    const long alive = Part::alive;
    const long hit = shortage.hit;
    int n = 0;
    int seen = 0;
    tasks_begun = 0;
    try {
      const auto fetch = [&n, next, parks, part = Part()] { return next(n, parks); };
      for (const int item : runtime_bridge::range(*bridge, fetch, runtime_bridge::prefetch(ahead))) {
        scene.expect(item == seen++, "a wrong item");
        if (parks && item == 2) {
          await_state([&] { return tasks_begun == 1 || bridge->in_flight() == 0; });
          break;
        }
      }
      scene.expect(seen == 3, "items are missing");
      if (parks) scene.not_told();  // a fetch that the loop did not get to may have failed
    } catch (const std::bad_alloc&) {
      scene.expect(shortage.hit != hit, "std::bad_alloc out of nowhere");
      ++told;
    } catch (const std::system_error& e) {
      // The exception went through Asio and did not reach the coroutine.
      scene.expect(initiations_may_fail && e.code() == BridgeError::ResponseLost && shortage.hit != hit,
                   "another error than std::bad_alloc");
    }
    shortage.end_step();
    scene.expect(bridge->in_flight() == 0, "a fetch is still in flight");
    scene.expect(Part::alive == alive, "something of a fetch outlives the range");
    scene.works(*bridge);
  };
  for (const std::size_t ahead : {std::size_t{0}, std::size_t{1}, std::size_t{2}}) {
    sweep(10, [&](Scene& scene) { scenario(scene, ahead, false); });
    if (ahead != 0) sweep(10, [&](Scene& scene) { scenario(scene, ahead, true); });
  }
}
