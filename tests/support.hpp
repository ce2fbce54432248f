// SPDX-License-Identifier: Apache-2.0
//
// What several test files share. Catch2's assertions are for the main thread only: other threads collect.

#ifndef RUNTIME_BRIDGE_TESTS_SUPPORT_HPP
#define RUNTIME_BRIDGE_TESTS_SUPPORT_HPP

#if __has_include(<catch2/catch_test_macros.hpp>)
#include <catch2/catch_template_test_macros.hpp>
#include <catch2/catch_test_macros.hpp>
#include <catch2/matchers/catch_matchers.hpp>
#else
#include <catch2/catch.hpp>
#endif

#include <asio/version.hpp>
#if ASIO_VERSION < 102400
#include <asio/experimental/deferred.hpp>
namespace asio {
using experimental::deferred;
}
#else
#include <asio/deferred.hpp>
#endif

#include <pthread.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <asio/detached.hpp>
#include <asio/post.hpp>
#include <asio/steady_timer.hpp>
#include <asio/thread_pool.hpp>
#include <chrono>
#include <cstdio>
#include <ctime>
#include <exception>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <mutex>
#include <optional>
#include <runtime_bridge.hpp>
#include <semaphore>
#include <string>
#include <system_error>
#include <thread>
#include <utility>
#include <vector>

#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
#define SANITIZED 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer) || __has_feature(thread_sanitizer)
#define SANITIZED 1
#endif
#endif

#ifdef COVERED
extern "C" void __gcov_dump();
#endif

using asio::awaitable;
using asio::use_awaitable;
using runtime_bridge::BridgeError;
using runtime_bridge::JoinHandle;
using runtime_bridge::Options;
using runtime_bridge::Result;
using runtime_bridge::RuntimeBridge;
using runtime_bridge::Start;
using runtime_bridge::unwrap;
using namespace std::chrono_literals;

inline Options lazy() {
  Options options;
  options.start = Start::lazy;
  return options;
}

/// Waits for a state that another thread brings about. A state that never comes is the ctest timeout's business.
template <class Condition>
void await_state(Condition condition) {
  while (!condition()) std::this_thread::yield();
}

/// What the system tells of a thread.
struct ThreadStatus {
  explicit ThreadStatus(const std::filesystem::path& folder) {
    std::string line;  // "123 (name) S ..."; none if the thread has ended
    std::getline(std::ifstream(folder / "stat"), line);
    const std::size_t begin = line.find('(') + 1;
    const std::size_t end = line.rfind(')');
    if (end == std::string::npos) return;
    name = line.substr(begin, end - begin);
    state = line.at(end + 2);
  }

  std::string name;
  char state = 0;  // 'R' if it runs, or could; 'S' if it waits for something
};

/// How many threads of this process meet the condition.
template <class Condition>
std::size_t count_threads(Condition condition) {
  std::error_code gone;  // threads that end while they are listed
  const std::filesystem::directory_iterator threads("/proc/self/task", gone);
  return static_cast<std::size_t>(
      std::count_if(begin(threads), end(threads), [&](const auto& thread) { return condition(ThreadStatus(thread)); }));
}

/// Whether a thread has the name that workers have by default. A thread names itself when it starts and is listed for a
/// moment after it was joined, so wait for a number of them: `await_workers`.
inline bool is_worker(const ThreadStatus& thread) { return thread.name == Options().thread_name; }

/// Waits until `calls` calls of the bridge have been started and run as far as they can by themselves.
inline void await_calls(const RuntimeBridge& bridge, std::size_t calls) {
  // A call counts before it is sent, and its caller sleeps only after.
  const auto awake = [](const ThreadStatus& thread) { return thread.state != 'S' && !is_worker(thread); };
  await_state([&] { return bridge.in_flight() == calls && count_threads(awake) == 1; });
  unwrap(bridge.block_on([] {}));  // which was queued behind their starts
}

/// Parks on the bridge's own context, for longer than any test runs.
inline awaitable<void> park() {
  asio::steady_timer timer(co_await asio::this_coro::executor, 24h);
  co_await timer.async_wait(use_awaitable);
}

/// The same, and ignores cancellation.
inline awaitable<void> park_stubbornly() {
  co_await asio::this_coro::reset_cancellation_state(asio::disable_cancellation());
  auto parked = park();
  co_await std::move(parked);
}

/// Never parks: runs on through the context's queue.
inline awaitable<void> run_in_circles() {
  for (;;) co_await asio::post(use_awaitable);
}

inline std::string what(const std::exception_ptr& cause) {
  if (!cause) return "no cause";
  try {
    std::rethrow_exception(cause);
  } catch (const std::exception& e) {
    return e.what();
  } catch (...) {
    return "not a std::exception";
  }
}

/// The code of a `std::system_error`; none of anything else.
inline std::error_code code_of(const std::exception_ptr& cause) {
  try {
    if (cause) std::rethrow_exception(cause);
  } catch (const std::system_error& e) {
    return e.code();
  } catch (...) {
  }
  return {};
}

/// What a call came to, for a thread that cannot use Catch2's assertions.
template <class T>
std::string outcome(const Result<T>& result) {
  if (result.has_value()) return "value";
  const std::string kind = runtime_bridge::make_error_code(result.error().kind()).message();
  return result.error().cause() ? kind + ": " + what(result.error().cause()) : kind;
}
inline const std::string worker_dead = "the worker is gone";
inline const std::string response_lost = "the task ended without a value";
inline const std::string would_deadlock = "the call would wait for itself";

/// Waits until the bridge admits no calls any more.
inline void await_closed(const RuntimeBridge& bridge) {
  await_state([&] {
    auto probe = bridge.submit([] {});  // which is not waited for, as nobody might run it
    const bool refused = probe.done() && outcome(probe.join()) == worker_dead;
    probe.detach();
    return refused;
  });
}

inline void await_workers(std::size_t number) {
  await_state([&] { return count_threads(is_worker) == number; });
}

inline std::size_t entries(const char* folder) {
  const std::filesystem::directory_iterator begin(folder);
  return static_cast<std::size_t>(std::distance(begin, std::filesystem::directory_iterator()));
}
inline std::size_t descriptors_of_this_process() { return entries("/proc/self/fd"); }

inline std::chrono::nanoseconds cpu_time(clockid_t clock) {
  timespec t{};
  clock_gettime(clock, &t);
  return std::chrono::seconds(t.tv_sec) + std::chrono::nanoseconds(t.tv_nsec);
}

/// What a thread is at.
class Watch {
 public:
  /// The one that makes this.
  Watch() : folder_("/proc/self/task/" + std::to_string(gettid())) { pthread_getcpuclockid(pthread_self(), &clock_); }

  std::chrono::nanoseconds cpu() const { return cpu_time(clock_); }

  bool sleeps() const { return ThreadStatus(folder_).state == 'S'; }

 private:
  std::string folder_;
  clockid_t clock_{};
};

/// The worker of a bridge of its own, which is about to call another one and is held up inside its gate: admitted, and
/// not sent. There it looks for rings, and this has the lock.
class HeldUp {
 public:
  explicit HeldUp(const RuntimeBridge& bridge)
      : call_(own_.submit([&bridge] { return outcome(bridge.block_on([] { return 1; })); })) {
    await_state([&] { return bridge.in_flight() == 1; });
  }

  ~HeldUp() {
    if (lock_) lock_.unlock();
  }

  /// What the call came to.
  std::string go_on() {
    lock_.unlock();
    return call_.join().value_or("none");
  }

 private:
  RuntimeBridge own_;
  std::unique_lock<std::mutex> lock_{runtime_bridge::detail::WaitNode::mutex};
  JoinHandle<std::string> call_;
};

/// A thread pool of one, occupied until it is told to go on: something foreign that a task can be parked on.
class Foreign {
 public:
  Foreign() {
    asio::post(pool_, [this] { go_on_.acquire(); });
  }
  ~Foreign() {
    go_on();
    pool_.join();
  }
  void go_on() { go_on_.release(); }

  awaitable<int> visit(int value) {
    co_await asio::post(pool_, use_awaitable);
    co_return value;
  }

 private:
  std::binary_semaphore go_on_{0};
  asio::thread_pool pool_{1};
};

/// A limit of this process, while it lives.
class Limit {
 public:
  using Resource = decltype(RLIMIT_NOFILE);
  Limit(Resource resource, rlim_t value) : resource_(resource) {
    getrlimit(resource_, &before_);
    rlimit limited = before_;
    limited.rlim_cur = value;
    setrlimit(resource_, &limited);
  }
  ~Limit() { setrlimit(resource_, &before_); }

 private:
  Resource resource_;
  rlimit before_{};
};

/// Leaves no address space for the stack of another thread.
class NoMoreThreads {
 public:
  NoMoreThreads() {
    pthread_getattr_default_np(&before_);
    pthread_attr_t large;
    pthread_attr_init(&large);
#ifdef SANITIZED  // whose shadow memory does not fit under any limit
    pthread_attr_setstacksize(&large, std::size_t{1} << 60);
#else
    pthread_attr_setstacksize(&large, std::size_t{8} << 30);  // larger than those that glibc keeps of past threads
    address_space_.emplace(RLIMIT_AS, rlim_t{4} << 30);
#endif
    pthread_setattr_default_np(&large);
  }
  ~NoMoreThreads() { pthread_setattr_default_np(&before_); }

 private:
  pthread_attr_t before_{};
  std::optional<Limit> address_space_;
};

/// Runs `body` in a child process and gives its exit code; -1 for a signal, which is what a hang ends with.
template <class Body>
int in_child_process(Body body) {
  std::fflush(nullptr);
  const pid_t child = fork();
  if (child == 0) {
    alarm(30);
    int code = 99;
    try {
      code = body();
    } catch (...) {
    }
#ifdef COVERED
    __gcov_dump();  // which _exit leaves out
#endif
    _exit(code);
  }
  int status = 0;
  while (waitpid(child, &status, 0) == -1 && errno == EINTR) {
  }
  return WIFEXITED(status) ? WEXITSTATUS(status) : -1;
}

#endif  // RUNTIME_BRIDGE_TESTS_SUPPORT_HPP
