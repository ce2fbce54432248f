// SPDX-License-Identifier: Apache-2.0
//
// What several test files share. Catch2's assertions are for the main thread only: other threads collect.
//
// Tags say what a test needs, so that a run can leave it out: `hop_test "~[race]~[slow]"`, or for all that ctest runs
// `cmake -DRUNTIME_BRIDGE_TEST_SPEC="~[race]~[slow]"`.
//
//   [race]        Threads must run at the same time. Too slow, or pointless, under valgrind, which runs one at a time.
//   [child]       Forks a child process.
//   [timing]      Asserts that something is quick, or measures CPU time.
//   [slow]        Takes seconds, or would under valgrind.
//   [limit]       Sets a limit of address space.
//   [signal_set]  A task waits for a signal_set when its bridge stops. With io_uring, Asio before 1.38 then frees
//                 something twice.
//   [socket]      The same for a socket.

#ifndef RUNTIME_BRIDGE_TESTS_SUPPORT_HPP
#define RUNTIME_BRIDGE_TESTS_SUPPORT_HPP

#if __has_include(<catch2/catch_test_macros.hpp>)
#include <catch2/catch_template_test_macros.hpp>
#include <catch2/catch_test_macros.hpp>
#include <catch2/matchers/catch_matchers.hpp>
#else
#include <catch2/catch.hpp>
#endif

#include <pthread.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <concepts>
#include <cstdio>
#include <ctime>
#include <exception>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <memory>
#include <optional>
#include <ostream>
#include <semaphore>
#include <stdexcept>
#include <string>
#include <system_error>
#include <thread>
#include <type_traits>
#include <utility>
#include <vector>

#include "asio.hpp"

#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
#define SANITIZED 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer) || __has_feature(thread_sanitizer)
#define SANITIZED 1
#endif
#if __has_feature(thread_sanitizer)
#define SANITIZED_BY_CLANG_TSAN 1
#endif
#endif

// clang's ThreadSanitizer starts a program for what it suppresses, and keeps descriptors to it.
#ifdef SANITIZED_BY_CLANG_TSAN
constexpr bool counts_descriptors = false;
#else
constexpr bool counts_descriptors = true;
#endif

#ifdef COVERED
extern "C" void __gcov_dump();
#endif

// Without it (libc++ without -fexperimental-library) tests that stop a call by a token are left out.
#ifdef __cpp_lib_jthread
#define HAS_STOP_TOKEN
#include <stop_token>
using std::jthread;
using std::stop_source;
using std::stop_token;
#else
class stop_token {
 public:
  bool stop_requested() const { return *stopped_; }

 protected:
  std::shared_ptr<std::atomic<bool>> stopped_ = std::make_shared<std::atomic<bool>>(false);
};

class stop_source : public stop_token {
 public:
  bool request_stop() { return !stopped_->exchange(true); }
};

class jthread {
 public:
  jthread() = default;
  template <class Function>
  explicit jthread(Function function)
      : thread_([token = stop_token(source_), f = std::move(function)]() mutable {
          if constexpr (std::invocable<Function&, stop_token>) {
            f(token);
          } else {
            f();
          }
        }) {}
  jthread(jthread&&) = default;
  jthread& operator=(jthread&& other) {
    jthread ended(std::move(*this));
    source_ = std::move(other.source_);
    thread_ = std::move(other.thread_);
    return *this;
  }
  ~jthread() {
    if (thread_.joinable()) {
      source_.request_stop();
      thread_.join();
    }
  }
  bool joinable() const { return thread_.joinable(); }
  auto native_handle() { return thread_.native_handle(); }
  void join() { thread_.join(); }

 private:
  stop_source source_;
  std::thread thread_;
};
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

/// Waits until another thread has made the condition true. If it never does, the ctest timeout ends the test.
template <class Condition>
void await_state(Condition condition) {
  while (!condition()) std::this_thread::yield();
}

/// The name and the state of a thread, as the system reports them.
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
  char state = 0;  // 'R': running or runnable; 'S': sleeping
};

/// How many threads of this process meet the condition.
template <class Condition>
std::size_t count_threads(Condition condition) {
  std::error_code gone;  // threads that end while they are listed
  const std::filesystem::directory_iterator threads("/proc/self/task", gone);
  return static_cast<std::size_t>(
      std::count_if(begin(threads), end(threads), [&](const auto& thread) { return condition(ThreadStatus(thread)); }));
}

/// Whether a thread has the default name of workers. A thread gets its name after it has started and is listed for a
/// moment after it was joined, so use `await_workers` to wait for a number of them.
inline bool is_worker(const ThreadStatus& thread) { return thread.name == Options().thread_name; }

/// Waits until the bridge has this number of calls in flight, all of them started and suspended.
inline void await_calls(const RuntimeBridge& bridge, std::size_t calls) {
  // A call is counted before it is sent, and its caller sleeps afterwards.
  const auto awake = [](const ThreadStatus& thread) { return thread.state != 'S' && !is_worker(thread); };
  await_state([&] { return bridge.in_flight() == calls && count_threads(awake) == 1; });
  unwrap(bridge.block_on([] {}));  // queued behind their starts
}

/// Waits on the bridge's own context, longer than any test runs.
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

/// Never waits: posts itself to the context again and again.
inline awaitable<void> run_in_circles() {
  for (;;) co_await asio::post(use_awaitable);
}

/// The same, until the flag is set.
template <class Flag>
awaitable<void> run_until(const Flag& flag) {
  while (!flag) co_await asio::post(use_awaitable);
}

/// Suspends this number of times, and returns it.
inline awaitable<int> hops(int number) {
  for (int hop = 0; hop < number; ++hop) co_await asio::post(use_awaitable);
  co_return number;
}

/// Suspends once.
inline awaitable<int> seven() {
  co_await asio::post(use_awaitable);
  co_return 7;
}

inline awaitable<void> sleep_for(std::chrono::milliseconds time) {
  asio::steady_timer timer(co_await asio::this_coro::executor, time);
  co_await timer.async_wait(use_awaitable);
}

/// Parks, and returns the value when it is cancelled.
inline awaitable<int> park_and_return(int value) {
  try {
    co_await park();
  } catch (const AsioError&) {
  }
  co_return value;
}

inline std::thread::id worker_of(const RuntimeBridge& bridge) {
  return unwrap(bridge.block_on([] { return std::this_thread::get_id(); }));
}

/// Its destructor records the thread that it runs on.
class NotesItsEnd {
 public:
  explicit NotesItsEnd(std::thread::id& where) : where_(&where) {}
  NotesItsEnd(NotesItsEnd&& other) noexcept : where_(std::exchange(other.where_, nullptr)) {}
  NotesItsEnd& operator=(NotesItsEnd&&) = delete;
  ~NotesItsEnd() {
    if (where_) *where_ = std::this_thread::get_id();
  }

 private:
  std::thread::id* where_;
};

/// Its destructor sets the flag.
struct SetsFlag {
  bool& flag;
  ~SetsFlag() { flag = true; }
};

/// A result without a value.
template <class T>
Result<T> error_result(BridgeError error) {
#ifdef __cpp_lib_expected
  return std::unexpected<BridgeError>(std::move(error));
#else
  return tl::unexpected<BridgeError>(std::move(error));
#endif
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

/// The code of a `std::system_error`, or of an `AsioError`; none of anything else.
template <class Error = std::system_error, class Code = std::remove_cvref_t<decltype(std::declval<Error>().code())>>
Code code_of(const std::exception_ptr& cause) {
  try {
    if (cause) std::rethrow_exception(cause);
  } catch (const Error& e) {
    return e.code();
  } catch (...) {
  }
  return {};
}

/// How a call ended. Threads that cannot use Catch2's assertions keep it for the main thread, which compares it with a
/// kind of error, whatever its cause, or with one of the outcomes below.
struct Outcome {
  bool returned = false;
  std::optional<BridgeError::Kind> error{};  // none: the call has a value
  std::exception_ptr cause{};

  bool operator==(BridgeError::Kind kind) const { return error == kind; }
  /// Causes are equal if their texts are.
  bool operator==(const Outcome& other) const {
    return returned == other.returned && error == other.error && what(cause) == what(other.cause);
  }
};

template <class T>
Outcome outcome(const Result<T>& result) {
  if (result.has_value()) return {true};
  return {true, result.error().kind(), result.error().cause()};
}

inline const Outcome succeeded{true};

/// Errors without a cause. A task that was cut off by the end of its worker is `response_lost`.
inline const Outcome worker_dead{true, BridgeError::WorkerDead};
inline const Outcome response_lost{true, BridgeError::ResponseLost};
inline const Outcome cancelled_unrun{true, BridgeError::Cancelled};
inline const Outcome would_deadlock{true, BridgeError::WouldDeadlock};

/// The task threw an exception with this text.
inline Outcome threw(const std::string& text) {
  return {true, BridgeError::ResponseLost, std::make_exception_ptr(std::runtime_error(text))};
}

inline std::string name_of(BridgeError::Kind kind) {
  switch (kind) {
    case BridgeError::WorkerDead: return "WorkerDead";
    case BridgeError::ResponseLost: return "ResponseLost";
    case BridgeError::TimedOut: return "TimedOut";
    case BridgeError::Cancelled: return "Cancelled";
    case BridgeError::WouldDeadlock: return "WouldDeadlock";
    default: return "kind " + std::to_string(static_cast<int>(kind));
  }
}

inline std::string to_string(const Outcome& outcome) {
  if (!outcome.returned) return "the call has not returned";
  if (!outcome.error) return "a value";
  return name_of(*outcome.error) + (outcome.cause ? ", cause: " : ", ") + what(outcome.cause);
}
inline std::ostream& operator<<(std::ostream& out, const Outcome& outcome) { return out << to_string(outcome); }

template <>
struct Catch::StringMaker<BridgeError::Kind> {
  static std::string convert(BridgeError::Kind kind) { return name_of(kind); }
};

/// Waits until the bridge admits no calls any more.
inline void await_closed(const RuntimeBridge& bridge) {
  await_state([&] {
    auto probe = bridge.submit([] {});  // not waited for, since it may never run
    const bool refused = probe.done() && outcome(probe.join()) == worker_dead;
    probe.detach();
    return refused;
  });
}

/// How many calls of the bridge are in this state.
inline std::size_t count_calls(const RuntimeBridge& bridge, runtime_bridge::State state) {
  const auto calls = bridge.calls();
  return static_cast<std::size_t>(
      std::count_if(calls.begin(), calls.end(), [&](const auto& call) { return call.state == state; }));
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

/// The shortest time of several attempts, since the machine may be busy.
template <class Attempt>
std::chrono::nanoseconds quickest(Attempt attempt, int attempts = 5) {
  auto best = std::chrono::nanoseconds::max();
  for (int i = 0; i < attempts; ++i) best = std::min(best, std::chrono::nanoseconds(attempt()));
  return best;
}

/// The CPU time and the state of a thread.
class Watch {
 public:
  /// Watches the current thread.
  Watch() : folder_("/proc/self/task/" + std::to_string(gettid())) { pthread_getcpuclockid(pthread_self(), &clock_); }

  std::chrono::nanoseconds cpu() const { return cpu_time(clock_); }

  bool sleeps() const { return ThreadStatus(folder_).state == 'S'; }

 private:
  std::string folder_;
  clockid_t clock_{};
};

/// A pool with one thread that is blocked until `go_on`: a task can wait there, where the bridge cannot destroy it.
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

/// Sets a resource limit of this process until it is destroyed.
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

/// Makes the creation of threads fail: there is no address space for another stack.
class NoMoreThreads {
 public:
  NoMoreThreads() {
    pthread_getattr_default_np(&before_);
    pthread_attr_t large;
    pthread_attr_init(&large);
#ifdef SANITIZED  // the shadow memory does not fit under any limit
    pthread_attr_setstacksize(&large, std::size_t{1} << 60);
#else
    pthread_attr_setstacksize(&large, std::size_t{8} << 30);  // larger than the stacks that glibc keeps for reuse
    address_space_.emplace(RLIMIT_AS, rlim_t{4} << 30);
#endif
    pthread_setattr_default_np(&large);
  }
  ~NoMoreThreads() { pthread_setattr_default_np(&before_); }

 private:
  pthread_attr_t before_{};
  std::optional<Limit> address_space_;
};

/// Runs `body` in a child process and returns its exit code, or -1 if a signal ended it, which a hang gets.
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
    __gcov_dump();  // _exit does not
#endif
    _exit(code);
  }
  int status = 0;
  while (waitpid(child, &status, 0) == -1 && errno == EINTR) {
  }
  return WIFEXITED(status) ? WEXITSTATUS(status) : -1;
}

#endif  // RUNTIME_BRIDGE_TESTS_SUPPORT_HPP
