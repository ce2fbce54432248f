// SPDX-License-Identifier: Apache-2.0
//
// Exhaustion of threads and descriptors, signals, fork, exit and dlclose. Most tests run in a child process, since they
// change the process; its exit code is the number of the check that failed.

#include <dlfcn.h>
#include <fcntl.h>
#include <sys/resource.h>

#include <array>
#include <atomic>
#include <cerrno>
#include <csignal>
#include <cstdlib>
#include <functional>
#include <latch>
#include <list>
#include <memory>
#include <mutex>
#include <optional>
#include <system_error>

#include "support.hpp"

using runtime_bridge::Shutdown;

namespace {

/// Lets this process open only this number of further descriptors.
class DescriptorsLeft : Limit {
 public:
  explicit DescriptorsLeft(int number) : Limit(RLIMIT_NOFILE, end_of(number)) {}

 private:
  static rlim_t end_of(int number) {
    int end = 0;
    for (int free = 0; free < number || fcntl(end, F_GETFD) != -1; ++end) free += fcntl(end, F_GETFD) == -1 ? 1 : 0;
    return static_cast<rlim_t>(end);
  }
};

template <class T>
bool could_not_start(const Result<T>& result, std::errc why) {
  return outcome(result) == BridgeError::WorkerDead && code_of(result.error().cause()) == why;
}

/// Whether the constructor and `create` fail.
bool none_starts(std::errc why) {
  const auto created = RuntimeBridge::create();
  if (created.has_value() || created.error() != why) return false;
  try {
    const RuntimeBridge bridge;
  } catch (const std::system_error& e) {
    return e.code() == why;
  }
  return false;
}

/// Takes this many milliseconds, a few at a time.
awaitable<int> take(int milliseconds) {
  asio::steady_timer timer(co_await asio::this_coro::executor);
  for (int i = 0; i < milliseconds; i += 5) {
    timer.expires_after(5ms);
    co_await timer.async_wait(use_awaitable);
  }
  co_return milliseconds;
}

/// Runs a function when a static or a thread_local is destroyed: after those that were made later.
struct AtExit {
  std::function<void()> run;
  ~AtExit() { run(); }
};

}  // namespace

// ---------------------------------------------------------------------------------------------------------------------
// No thread, no descriptor

TEST_CASE("system: a worker starts once threads are available again", "[child][limit]") {
  CHECK(in_child_process([] {
          const auto none = std::errc::resource_unavailable_try_again;
          const auto descriptors = descriptors_of_this_process();
          std::atomic<int> runs{0};
          std::atomic<int> refused{0};
          const auto held = std::make_shared<int>();
          const auto task = [&runs, held] { return ++runs; };
          {
            const RuntimeBridge late(lazy());
            std::latch limited(1);
            std::vector<jthread> callers;
            for (int i = 0; i < 4; ++i) {
              callers.emplace_back([&] {
                limited.wait();
                if (could_not_start(late.block_on(task), none)) ++refused;
              });
            }
            {
              const NoMoreThreads limit;
              limited.count_down();
              callers.clear();
              if (refused != 4) return 1;
              if (!none_starts(none)) return 2;
              if (!could_not_start(late.submit(task).join(), none)) return 3;
              if (late.in_flight() != 0 || runs != 0 || held.use_count() != 2) return 4;
            }
            if (late.block_on(task) != 1 || RuntimeBridge().block_on(task) != 2) return 5;
          }
          await_workers(0);
          return descriptors_of_this_process() == descriptors ? 0 : 6;
        }) == 0);
}

#ifdef ASIO_HAS_IO_URING_AS_DEFAULT
constexpr int too_few = 1;  // one more than the number of descriptors that cannot be enough: none
#else
constexpr int too_few = 2;  // or one
#endif

TEST_CASE("system: too few descriptors for a worker", "[child]") {
  CHECK(in_child_process([] {
          const auto none = std::errc::too_many_files_open;
          const auto descriptors = descriptors_of_this_process();
          int left = 0;
          for (bool enough = false; !enough; ++left) {
            std::optional<RuntimeBridge> late(lazy());
            int runs = 0;
            {
              const DescriptorsLeft limit(left);
              const auto first = late->block_on([&] { return ++runs; });
              enough = first.has_value();
              if (enough && late->block_on([] { return take(5); }) != 5) return 1;  // works without a timerfd, too
              if (!enough && (!could_not_start(first, none) || runs != 0 || !none_starts(none))) return 2;
            }
            if (late->block_on([] { return take(5); }) != 5) return 3;
            late.reset();
            if (descriptors_of_this_process() != descriptors) return 4;
          }
          return left > too_few ? 0 : 5;
        }) == 0);
}

TEST_CASE("system: no descriptor is left while a bridge is used", "[child]") {
  CHECK(in_child_process([] {
          const RuntimeBridge bridge;
          const RuntimeBridge other;
          const auto open = [&] {
            const asio::local::stream_protocol::socket socket(bridge.get_executor(), asio::local::stream_protocol());
          };
          {
            const DescriptorsLeft limit(0);
            for (int i = 0; i < 20; ++i) {
              const auto failed = bridge.block_on(open);
              if (outcome(failed) != BridgeError::ResponseLost) return 1;
              if (code_of<AsioError>(failed.error().cause()).value() != EMFILE) return 2;
              if (!none_starts(std::errc::too_many_files_open)) return 3;
              if (bridge.block_on([] { return take(5); }) != 5) return 4;
              if (outcome(bridge.block_on_for(park, 1ms)) != BridgeError::TimedOut) return 5;
            }
            auto parked = other.submit(park);
            if (!other.shutdown(Shutdown::cancel) || outcome(parked.join()) != BridgeError::Cancelled) return 6;
          }
          return bridge.block_on(open).has_value() ? 0 : 7;
        }) == 0);
}

// ---------------------------------------------------------------------------------------------------------------------
// Signals

namespace {

std::atomic<int> signals{0};
std::atomic<int> signals_of_worker{0};
thread_local bool is_a_worker = false;

void count_signal(int) {
  ++signals;
  if (is_a_worker) ++signals_of_worker;
}

/// Sends signals to all threads except its own.
void storm(const stop_token& stop) {
  while (!stop.stop_requested()) {
    for (const auto& task : std::filesystem::directory_iterator("/proc/self/task")) {
      const pid_t thread = std::stoi(task.path().filename());
      if (thread != gettid()) tgkill(getpid(), thread, SIGUSR1);
    }
    std::this_thread::sleep_for(50us);  // let them make progress
  }
}

}  // namespace

TEST_CASE("system: signals do not end a wait early", "[timing]") {
  struct sigaction action {};
  action.sa_handler = count_signal;  // and no SA_RESTART
  sigaction(SIGUSR1, &action, nullptr);
  const RuntimeBridge bridge;
  const RuntimeBridge drained;
  unwrap(bridge.block_on([] { is_a_worker = true; }));
  const auto slow = [] { return take(300); };
  const auto lasts = [](const auto& wait) {
    const auto begin = std::chrono::steady_clock::now();
    return wait() && std::chrono::steady_clock::now() - begin >= 300ms;
  };
  const std::vector<std::function<bool()>> waits{
      [&] { return bridge.block_on(slow) == 300; },
      [&] { return bridge.submit(slow).join() == 300; },
      [&] { return lasts([&] { return outcome(bridge.block_on_for(park, 300ms)) == BridgeError::TimedOut; }); },
      [&] {
        auto parked = bridge.submit(park);
        return lasts([&] { return !parked.wait_for(300ms); });
      },
      [&] {
        auto call = drained.submit(slow);
        return drained.shutdown(Shutdown::drain, 1min) && call.join() == 300;
      },
  };
  std::array<bool, 5> right{};
  {
    std::latch ready(5);
    std::vector<jthread> callers;
    for (std::size_t i = 0; i < waits.size(); ++i) {
      callers.emplace_back([&, i] {
        ready.arrive_and_wait();
        right.at(i) = waits[i]();
      });
    }
    ready.wait();
    const jthread interrupter(storm);
    callers.clear();
  }
  signal(SIGUSR1, SIG_IGN);  // some may still be pending
  CHECK(right == std::array{true, true, true, true, true});
  CHECK(signals > 100);
  CHECK(signals_of_worker == 0);
}

TEST_CASE("system: the worker blocks the program's signals") {
  const auto blocked = [](const RuntimeBridge& bridge) {
    return *bridge.block_on([] {
      sigset_t signals_of_thread;
      pthread_sigmask(SIG_SETMASK, nullptr, &signals_of_thread);
      return signals_of_thread;
    });
  };
  sigset_t before, after;
  pthread_sigmask(SIG_SETMASK, nullptr, &before);
  const RuntimeBridge eager, late(lazy());
  for (const sigset_t& mask : {blocked(eager), blocked(late)}) {
    for (const int number : {SIGHUP, SIGINT, SIGQUIT, SIGTERM, SIGALRM, SIGCHLD, SIGPIPE, SIGPROF, SIGUSR1, SIGRTMIN}) {
      CHECK(sigismember(&mask, number) == 1);
    }
    CHECK(sigismember(&mask, SIGSEGV) == 0);  // for crash reporters
  }
  pthread_sigmask(SIG_SETMASK, nullptr, &after);
  for (int number = 1; number < SIGRTMIN; ++number) CHECK(sigismember(&before, number) == sigismember(&after, number));
}

// As in poco#2978: the worker exists before main blocks the signals that it waits for.
TEST_CASE("system: a signal reaches the thread that waits for it", "[child]") {
  CHECK(in_child_process([] {
          const RuntimeBridge bridge;
          sigset_t set;
          sigemptyset(&set);
          sigaddset(&set, SIGTERM);
          pthread_sigmask(SIG_BLOCK, &set, nullptr);
          unwrap(bridge.block_on([] {}));
          kill(getpid(), SIGTERM);
          int number = 0;
          return sigwait(&set, &number) == 0 && number == SIGTERM ? 0 : 1;
        }) == 0);
}

// ---------------------------------------------------------------------------------------------------------------------
// fork

namespace {

/// Uses the parent's bridge in a child, and destroys it.
int use_inherited(std::unique_ptr<RuntimeBridge>& bridge) {
  if (outcome(bridge->block_on([] {})) != BridgeError::WorkerDead) return 1;
  if (outcome(bridge->block_on_for(park, 1h)) != BridgeError::WorkerDead) return 2;
  if (outcome(bridge->submit(park).join()) != BridgeError::WorkerDead) return 3;
  if (!bridge->shutdown(Shutdown::drain) || !bridge->shutdown(Shutdown::cancel, 1ms)) return 4;
  bridge.reset();
  return 0;
}

}  // namespace

TEST_CASE("system: fork while threads wait", "[child]") {
  std::array<std::unique_ptr<RuntimeBridge>, 3> bridges;
  std::array<JoinHandle<void>, 3> parked;
  std::atomic<int> cancelled{0};
  for (std::size_t i = 0; i < 3; ++i) {
    bridges.at(i) = std::make_unique<RuntimeBridge>();
    parked.at(i) = bridges.at(i)->submit(park);
    await_calls(*bridges.at(i), 1);
  }
  {
    std::list<jthread> threads;  // with a vector, g++ 12 warns about its own header
    threads.emplace_back([&, &bridge = *bridges[0]] {
      if (outcome(bridge.block_on(park)) == BridgeError::Cancelled) ++cancelled;
    });
    threads.emplace_back([&] {
      if (outcome(parked[1].join()) == BridgeError::Cancelled) ++cancelled;
    });
    threads.emplace_back([&bridge = *bridges[2]] { bridge.shutdown(Shutdown::drain); });
    await_calls(*bridges[0], 2);
    await_state([&] { return !bridges[2]->block_on([] {}).has_value(); });
    for (int i = 0; i < 20; ++i) {
      REQUIRE(in_child_process([&] {
                for (auto& bridge : bridges) {
                  if (const int code = use_inherited(bridge)) return code;
                }
                if (!parked[1].done() || !parked[1].wait_for(1h)) return 5;
                for (auto& handle : parked) handle = {};  // stops it and does not wait
                return 0;
              }) == 0);
    }
    bridges[0]->shutdown(Shutdown::cancel);
    for (auto& handle : parked) handle.request_stop();
  }
  CHECK(outcome(parked[2].join()) == BridgeError::Cancelled);
  CHECK(cancelled == 2);
}

#ifndef SANITIZED  // the runtimes do not survive a fork of a busy process
TEST_CASE("system: hundreds of forks while threads call, submit, stop, shut down and destroy", "[child][race][slow]") {
  auto first = std::make_unique<RuntimeBridge>();
  auto second = std::make_unique<RuntimeBridge>();
  const RuntimeBridge third;
  std::atomic<int> wrong{0};
  std::atomic<int> calls{0};
  const std::vector<std::function<bool()>> loads{
      [&a = *first, &b = *second] { return a.block_on([&] { return *b.block_on([] { return 1; }); }) == 1; },
      [&a = *first] { return a.block_on([] { return take(5); }) == 5; },
      [&b = *second] { return outcome(b.block_on_for(park, 50us)) == BridgeError::TimedOut; },
      [&b = *second] {
        auto submitted = b.submit(park);
        submitted.request_stop();
        return outcome(submitted.join()) == BridgeError::Cancelled;
      },
      [] {
        const RuntimeBridge own;
        auto parked = own.submit(park);
        return own.shutdown(Shutdown::cancel) && outcome(parked.join()) == BridgeError::Cancelled;
      },
      [] { return RuntimeBridge(lazy()).block_on([] { return 1; }) == 1; },
      [&third] {  // holds the lock of the wait graph most of the time
        const auto rings = [&] {
          int found = 0;
          for (int i = 0; i < 1000; ++i) found += outcome(third.block_on([] {})) == BridgeError::WouldDeadlock ? 1 : 0;
          return found;
        };
        return third.block_on(rings) == 1000;
      },
  };
  auto parked = first->submit(park);
  std::vector<jthread> threads;
  for (const auto& load : loads) {
    threads.emplace_back([&](const stop_token& stop) {
      for (; !stop.stop_requested(); ++calls) wrong += load() ? 0 : 1;
    });
  }
  for (int i = 0; i < 300; ++i) {
    const int before = calls;
    REQUIRE(in_child_process([&] {
              parked.request_stop();
              for (auto* inherited : {&first, &second}) {
                if (const int code = use_inherited(*inherited)) return code;
              }
              const RuntimeBridge a;
              const RuntimeBridge b(lazy());
              if (a.block_on([&] { return *b.block_on([] { return take(5); }); }) != 5) return 5;
              auto own = b.submit(park);
              return b.shutdown(Shutdown::cancel) && outcome(own.join()) == BridgeError::Cancelled ? 0 : 6;
            }) == 0);
    await_state([&] { return calls != before; });
  }
  threads.clear();
  CHECK(wrong == 0);
}
#endif

// ---------------------------------------------------------------------------------------------------------------------
// exit, statics and thread_locals

namespace {

std::atomic<int> endless_calls{0};

/// Made before any static of a header, so it is destroyed last. Endless calls, if there are any, must still go on then.
[[gnu::init_priority(101)]] const struct Last {
  ~Last() {
    if (const int before = endless_calls) await_state([before] { return endless_calls > before + 100; });
  }
} last;

const pid_t program = getpid();

// Its worker starts after main(). A child that calls exit() destroys the bridge, too, but has no worker.
RuntimeBridge at_namespace_scope(lazy());

const AtExit uses_it{[] {
  const auto result = at_namespace_scope.block_on([] { return take(5); });
  if (getpid() == program ? result != 5 : outcome(result) != BridgeError::WorkerDead) _exit(70);
}};

/// Starts calls that only exit ends, each on its own thread, and counts those that end with ResponseLost.
void begin_calls(const RuntimeBridge& bridge, std::size_t number, std::atomic<int>& lost) {
  for (std::size_t i = 0; i < number; ++i) {
    std::thread([&] {
      if (outcome(bridge.block_on(park)) != BridgeError::ResponseLost) _exit(1);
      ++lost;
      for (;;) pause();
    }).detach();
  }
  await_calls(bridge, number);
}

}  // namespace

TEST_CASE("system: exit with calls in flight", "[child]") {
  enum class Leave { main, thread, task };
  for (const Leave leave : {Leave::main, Leave::thread, Leave::task}) {
    for (const bool destroyed : {true, false}) {
      CHECK(in_child_process([=]() -> int {
              static std::atomic<int> lost{0};
              static const AtExit judge{[=] {
                if (destroyed && leave != Leave::task) await_state([] { return lost == 4; });
              }};
              static const RuntimeBridge in_static;
              static const RuntimeBridge* const leaked = new RuntimeBridge;
              const RuntimeBridge on_the_stack;
              const RuntimeBridge& used = destroyed ? in_static : *leaked;
              begin_calls(used, 4, lost);
              for (const RuntimeBridge* bridge : {leaked, &on_the_stack}) {
                std::thread([bridge] {  // runs until the process ends
                  while (bridge->block_on([] { return 1; }) == 1) ++endless_calls;
                  _exit(2);
                })
                    .detach();
              }
              await_state([] { return endless_calls > 0; });
              if (leave == Leave::main) std::exit(7);
              if (leave == Leave::thread) std::thread([] { std::exit(7); }).detach();
              if (leave == Leave::task) (void)used.block_on([] { std::exit(7); });
              for (;;) pause();
            }) == 7);
    }
  }
}

TEST_CASE("system: a static bridge serves the destructors of other statics", "[child]") {
  CHECK(in_child_process([]() -> int {
          static int served = 0;
          static const AtExit judge{[] {
            await_workers(0);
            if (served != 3) _exit(1);
          }};
          static RuntimeBridge bridge;
          static RuntimeBridge late(lazy());
          static const AtExit user{[] {
            served += bridge.block_on([] { return late.block_on([] { return 1; }).value_or(0); }).value_or(0);
            if (outcome(bridge.block_on_for(park, 1ms)) == BridgeError::TimedOut) ++served;
            auto submitted = late.submit(park);
            submitted.request_stop();
            if (outcome(submitted.join()) == BridgeError::Cancelled) ++served;
          }};
          std::exit(7);
        }) == 7);
}

TEST_CASE("system: thread_local bridges of threads and of another bridge's worker") {
  std::atomic<int> served{0};
  const auto use = [&] {
    thread_local RuntimeBridge bridge;
    thread_local const AtExit user{[&served] { served += bridge.block_on([] { return 1; }).value_or(0); }};
    served += bridge.block_on([] { return take(5); }).value_or(0);
  };
  {
    std::vector<jthread> threads;
    for (int i = 0; i < 4; ++i) threads.emplace_back(use);
  }
  CHECK(served == 4 * 6);
  unwrap(RuntimeBridge().block_on(use));
  CHECK(served == 5 * 6);
  await_workers(0);
}

TEST_CASE("system: a thread_local bridge that outlives those of main", "[child]") {
  CHECK(in_child_process([]() -> int {
          static std::atomic<bool> main_is_over{false};
          static std::atomic<int> served{0};
          static const AtExit judge{[] {
            await_workers(0);
            if (served != 2) _exit(1);
          }};
          static RuntimeBridge of_the_program;
          static std::latch begun(1);
          static const jthread thread([] {  // exit joins it, after main's thread_locals
            thread_local RuntimeBridge bridge;
            served += bridge.block_on([] { return 1; }).value_or(0);
            begun.count_down();
            await_state([] { return main_is_over.load(); });
            served += bridge.block_on([] { return *of_the_program.block_on([] { return 1; }); }).value_or(0);
          });
          begun.wait();
          thread_local const AtExit last_of_main{[] { main_is_over = true; }};
          thread_local RuntimeBridge of_main;
          unwrap(of_main.block_on([] {}));
          std::exit(7);
        }) == 7);
}

TEST_CASE("system: a worker's thread_local outlives its bridge", "[child]") {
  static std::atomic<bool> dies{false};
  static std::atomic<bool> is_alone{false};
  static std::atomic<int> served{0};
  CHECK(in_child_process([] {
          auto bridge = std::make_unique<RuntimeBridge>();
          auto handle = bridge->submit([&] {
            thread_local const AtExit user{[] {
              dies = true;
              await_state([] { return is_alone.load(); });
              served = RuntimeBridge().block_on([] { return 1; }).value_or(0);
            }};
            bridge.reset();
          });
          await_state([] { return dies.load(); });
          handle = {};  // the last owner of the bridge's shared state
          is_alone = true;
          await_workers(0);
          return served == 1 ? 0 : 1;
        }) == 0);
}

TEST_CASE("system: a worker's thread_locals destroy its bridge and make calls", "[child]") {
  for (const bool by_another : {false, true}) {
    CHECK(in_child_process([=] {
            static std::atomic<int> served{0};
            static std::optional<RuntimeBridge> bridge(std::in_place);
            static const bool another = by_another;
            unwrap(bridge->block_on([] {
              thread_local const AtExit user{[] { served = RuntimeBridge().block_on([] { return 1; }).value_or(0); }};
              thread_local const AtExit destroyer{[] {  // destroyed first
                await_state([] { return bridge->in_flight() == 0; });
                if (another) {
                  unwrap(RuntimeBridge().block_on([] { bridge.reset(); }));
                } else {
                  bridge.reset();
                }
              }};
              bridge->shutdown(Shutdown::drain);  // the worker ends by itself
            }));
            await_workers(0);
            return served == 1 && !bridge ? 0 : 1;
          }) == 0);
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// Libraries that are unloaded

#ifdef PLUGIN  // tests/faults has none
namespace {

class Library {
 public:
  explicit Library(const char* path) {
    const std::lock_guard lock(loader);
    handle_ = dlopen(path, RTLD_NOW | RTLD_LOCAL);
  }
  ~Library() {
    const std::lock_guard lock(loader);
    dlclose(handle_);
  }

  template <class Signature>
  Signature* function(const char* name) const {
    return reinterpret_cast<Signature*>(dlsym(handle_, name));
  }

 private:
  static inline std::mutex loader;  // the loader has its own, which ThreadSanitizer does not see
  void* handle_;
};

bool is_loaded(const char* path) {
  void* const handle = dlopen(path, RTLD_NOW | RTLD_NOLOAD);
  if (handle) dlclose(handle);
  return handle;
}

/// Loads, uses and closes a library repeatedly, beside a bridge of the program. The library's static bridge is
/// destroyed with it, or both stay: g++ makes inline variables unique in a process, and never unloads a library that
/// has some.
int load_and_close(const char* path, bool may_stay) {
  const auto without = descriptors_of_this_process();
  const RuntimeBridge own;
  const auto descriptors = descriptors_of_this_process();
  bool stays = false;
  for (int round = 1; round <= 30; ++round) {
    {
      const Library library(path);
      auto* const increment = library.function<int(int)>("increment");
      auto* const count = library.function<int()>("count");
      if (increment(round) != round + 1) return 1;
      if (own.block_on([&] { return increment(round); }) != round + 1) return 2;
      if (count() != (stays ? round : 1)) return 3;
      if (in_child_process([&] { return count() == -1 ? 0 : 1; }) != 0) return 4;
    }
    if (round == 1) stays = may_stay && is_loaded(path);
    if (is_loaded(path) != stays) return 5;
    // The library's fork handlers are gone, or the library is still there.
    if (in_child_process([&] { return outcome(own.block_on([] {})) == BridgeError::WorkerDead ? 0 : 1; }) != 0)
      return 6;
    await_workers(stays ? 2 : 1);
    if (descriptors_of_this_process() != descriptors + (stays ? descriptors - without : 0)) return 7;
  }
#ifndef _LIBCPP_VERSION  // LLVM's unwinder takes the loader's lock, which dlclose holds while the call is cancelled
  {
    const Library library(path);
    library.function<void()>("leave_a_call")();
  }
#endif
  await_workers(stays ? 2 : 1);
  return own.block_on([] { return 0; }).value();
}

}  // namespace

TEST_CASE("system: a library with bridges is loaded and closed", "[child]") {
  CHECK(in_child_process([]() -> int { std::exit(load_and_close(PLUGIN, true)); }) == 0);
  CHECK(in_child_process([]() -> int { std::exit(load_and_close(PLUGIN_HIDDEN, false)); }) == 0);
}

TEST_CASE("system: libraries with bridges are loaded and closed concurrently", "[child][race]") {
  CHECK(in_child_process([]() -> int {
          const RuntimeBridge own;
          std::atomic<int> wrong{0};
          std::vector<jthread> threads;
          for (const char* path : {PLUGIN, PLUGIN_HIDDEN, PLUGIN_HIDDEN}) {
            threads.emplace_back([&, path] {
              for (int round = 0; round < 30; ++round) {
                const Library library(path);
                if (library.function<int(int)>("increment")(round) != round + 1) ++wrong;
                if (own.block_on([&] { return library.function<int()>("count")(); }).value_or(0) < 1) ++wrong;
              }
            });
          }
          threads.clear();
          await_workers(is_loaded(PLUGIN) ? 2 : 1);
          std::exit(wrong);
        }) == 0);
}
#endif
