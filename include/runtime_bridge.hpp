// SPDX-License-Identifier: Apache-2.0
//
// runtime_bridge: call asynchronous Asio code from synchronous code.
// One header, C++20, standalone Asio >= 1.22.1. Documentation: README.md and the comments below.
//
// Define RUNTIME_BRIDGE_USE_BOOST_ASIO in front of it to use Boost.Asio (Boost >= 1.81) instead. A program may use
// both, but not in the same source file.

#ifdef RUNTIME_BRIDGE_HPP
#if defined(RUNTIME_BRIDGE_USE_BOOST_ASIO) != defined(RUNTIME_BRIDGE_IS_FOR_BOOST)
#error "runtime_bridge was included for the other Asio before: use one of the two in each source file"
#endif
#else
#define RUNTIME_BRIDGE_HPP

#define RUNTIME_BRIDGE_VERSION_MAJOR 0
#define RUNTIME_BRIDGE_VERSION_MINOR 2
#define RUNTIME_BRIDGE_VERSION_PATCH 0

// Contents. Each part knows only those above it.
//
//    0  What it is built on: Asio or Boost.Asio, expected, the platform. The only part with #if
//    1  Errors and results: BridgeError, Result, unwrap
//    2  Options
//    3  Task traits: what a Task is, and what is wrong with what is none
//    4  Time, and stops: deadlines without overflow, and who else ends a call early
//    5  Process: fork
//    6  Handler memory: a post that cannot fail
//    7  Gate: admits calls, counts them
//    8  Context: the io_context, and the destruction of what waits on it
//    9  Wait graph: which worker waits for which bridge
//   10  Call registry: which calls are in flight, for those who ask
//   11  Spin policy: how long to busy-wait before sleeping
//   12  Call reference: the last one completes the call
//   13  Cancellation signals: the worker's pool
//   14  Call: where caller and worker meet
//   15  Worker: thread, loop, stop
//   16  Task call: the task and the value of a call
//   17  RuntimeBridge and JoinHandle: the public face
//
// A call's way: RuntimeBridge::block_on -> Worker::block -> Worker::send -> (on the worker) Worker::begin ->
// Call::start -> drive -> CallRef::~CallRef -> Worker::complete -> the caller wakes.
//
// Who may touch what:
//
//   - The worker thread owns the context, the cancellation signals, the mode, and the "worker's" part of each call.
//     Anyone else posts to it.
//   - The caller owns its call until `send`, and again once the call is completed. In between it only waits, and asks
//     for cancellation. The promise orders the two.
//   - Gate, fork counter, spin counters and a call's "shared" part are atomics: any thread.
//   - The wait graph has one lock, the thread and its state (`Worker::mutex_`) another; they are never held together.
//   - The registry has a lock for the calls of each bridge and one for all bridges. They are leaves: only those who ask
//     take another lock in them, in the order bridges, calls, wait graph.
//   - The Worker object is co-owned by the bridge, the thread, the handles and each call that is waited for.

// =====================================================================================================================
// 0. What it is built on

// After an #error nothing else is compiled, so that the error is the only one.
#if __cplusplus < 202002L
#error "runtime_bridge needs C++20: compile with -std=c++20 or newer"
#elif defined(_WIN32)
#error "runtime_bridge needs POSIX threads (it watches for fork); Windows is not supported"
#elif !defined(__cpp_exceptions)
#error "runtime_bridge needs exceptions, and so does Asio: compile without -fno-exceptions"
#elif !defined(__cpp_rtti) && defined(RUNTIME_BRIDGE_USE_BOOST_ASIO) && !defined(BOOST_ASIO_NO_TYPEID)
#error "Boost.Asio needs -DBOOST_ASIO_NO_TYPEID beside -fno-rtti, in every file of the program"
#elif !defined(__cpp_rtti) && !defined(RUNTIME_BRIDGE_USE_BOOST_ASIO) && !defined(ASIO_NO_TYPEID)
#error "Asio needs -DASIO_NO_TYPEID beside -fno-rtti, in every file of the program"
#else

// Before Asio: 1.22.1 looks whether the standard library has aligned_alloc, and sees it only once one of its headers
// was included. Two units that differ in that would free each other's memory in the wrong way.
#include <version>

#ifdef RUNTIME_BRIDGE_USE_BOOST_ASIO
#define RUNTIME_BRIDGE_IS_FOR_BOOST
#include <boost/asio/detail/config.hpp>
#include <boost/asio/version.hpp>
#if BOOST_ASIO_VERSION < 102600
#error "runtime_bridge needs Boost 1.81 or newer"
#elif !defined(BOOST_ASIO_HAS_CO_AWAIT)
#error "Boost.Asio sees no coroutines: compile as C++20, with g++ >= 11 or clang >= 14"
#else
#define RUNTIME_BRIDGE_HAS_ASIO
#include <boost/asio/any_io_executor.hpp>
#include <boost/asio/awaitable.hpp>
#include <boost/asio/bind_allocator.hpp>
#include <boost/asio/bind_executor.hpp>
#include <boost/asio/cancellation_signal.hpp>
#include <boost/asio/cancellation_type.hpp>
#include <boost/asio/co_spawn.hpp>
#include <boost/asio/execution_context.hpp>
#include <boost/asio/executor_work_guard.hpp>
#include <boost/asio/io_context.hpp>
#include <boost/asio/post.hpp>
#include <boost/asio/this_coro.hpp>
#include <boost/asio/use_awaitable.hpp>
#include <boost/system/system_error.hpp>

#include <boost/asio/detail/null_mutex.hpp>
#include <boost/asio/detail/reactor.hpp>
#include <boost/asio/detail/signal_set_service.hpp>
#include <boost/asio/experimental/detail/channel_service.hpp>
#ifdef BOOST_ASIO_HAS_IO_URING
#include <boost/asio/detail/io_uring_service.hpp>
#define RUNTIME_BRIDGE_HAS_IO_URING
#endif
#ifdef BOOST_ASIO_HAS_IO_URING_AS_DEFAULT
#define RUNTIME_BRIDGE_USES_IO_URING
#endif
#endif

#else  // standalone Asio
#include <asio/version.hpp>
#if ASIO_VERSION < 102201
#error "runtime_bridge needs standalone Asio 1.22.1 or newer"
#else
#include <asio/detail/config.hpp>
#ifndef ASIO_HAS_CO_AWAIT
#error "Asio sees no coroutines: with clang and Asio < 1.24 add -DASIO_HAS_CO_AWAIT=1 -DASIO_HAS_STD_COROUTINE=1"
#else
#define RUNTIME_BRIDGE_HAS_ASIO
#include <asio/any_io_executor.hpp>
#include <asio/awaitable.hpp>
#include <asio/bind_allocator.hpp>
#include <asio/bind_executor.hpp>
#include <asio/cancellation_signal.hpp>
#include <asio/cancellation_type.hpp>
#include <asio/co_spawn.hpp>
#include <asio/execution_context.hpp>
#include <asio/executor_work_guard.hpp>
#include <asio/io_context.hpp>
#include <asio/post.hpp>
#include <asio/this_coro.hpp>
#include <asio/use_awaitable.hpp>

// Asio's own headers, which name its services. A block of their own, as they are not self-contained: since Asio 1.38
// the reactor's must come after io_context.hpp.
#include <asio/detail/null_mutex.hpp>
#include <asio/detail/reactor.hpp>
#include <asio/detail/signal_set_service.hpp>
#include <asio/experimental/detail/channel_service.hpp>
#ifdef ASIO_HAS_IO_URING
#include <asio/detail/io_uring_service.hpp>
#define RUNTIME_BRIDGE_HAS_IO_URING
#endif
#ifdef ASIO_HAS_IO_URING_AS_DEFAULT
#define RUNTIME_BRIDGE_USES_IO_URING
#endif
#endif
#endif
#endif

#ifdef RUNTIME_BRIDGE_HAS_ASIO
#include <pthread.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cassert>
#include <chrono>
#include <concepts>
#include <condition_variable>
#include <csignal>
#include <cstddef>
#include <cstdint>
#include <ctime>
#include <exception>
#include <forward_list>
#include <functional>
#include <future>
#include <limits>
#include <memory>
#include <mutex>
#include <new>
#include <optional>
#include <ostream>
#include <sstream>
#include <stdexcept>
#include <string>
#include <string_view>
#include <system_error>
#include <thread>
#include <tuple>
#include <type_traits>
#include <utility>
#include <variant>
#include <vector>

// The flavour: which Asio, and which `expected`. What depends on it lies in a namespace of its own, so that one program
// may use several. The rest is shared: all flavours have the same `BridgeError`, and one graph of who waits for whom.
#if defined(RUNTIME_BRIDGE_IS_FOR_BOOST) && defined(__cpp_lib_expected)
#define RUNTIME_BRIDGE_FLAVOUR on_boost_with_std_expected
#elif defined(RUNTIME_BRIDGE_IS_FOR_BOOST)
#define RUNTIME_BRIDGE_FLAVOUR on_boost_with_tl_expected
#elif defined(__cpp_lib_expected)
#define RUNTIME_BRIDGE_FLAVOUR on_asio_with_std_expected
#else
#define RUNTIME_BRIDGE_FLAVOUR on_asio_with_tl_expected
#endif

#ifdef __cpp_lib_jthread
#include <stop_token>
#endif
#ifdef __cpp_lib_source_location
#include <source_location>
#endif
#ifdef __FreeBSD__
#include <pthread_np.h>
#endif

#ifdef __cpp_lib_expected
#include <expected>
#define RUNTIME_BRIDGE_EXPECTED std
#else
#include <tl/expected.hpp>
#define RUNTIME_BRIDGE_EXPECTED tl
#endif

// Header-only by default. With RUNTIME_BRIDGE_SEPARATE_COMPILATION, defined for all files of a program, what needs most
// time to compile is compiled once: by the one file that includes runtime_bridge/src.hpp.
#ifdef RUNTIME_BRIDGE_SOURCE
#define RUNTIME_BRIDGE_INLINE
#define RUNTIME_BRIDGE_COMPILE_ONCE(...) template __VA_ARGS__;
#elif defined(RUNTIME_BRIDGE_SEPARATE_COMPILATION)
#define RUNTIME_BRIDGE_DECLARATIONS_ONLY
#define RUNTIME_BRIDGE_INLINE
#define RUNTIME_BRIDGE_COMPILE_ONCE(...) extern template __VA_ARGS__;
#else
#define RUNTIME_BRIDGE_INLINE inline
#define RUNTIME_BRIDGE_COMPILE_ONCE(...)
#endif

// The modules of a program share what the linker can unite, even where their own symbols are hidden.
#pragma GCC visibility push(default)

/// Calls asynchronous Asio code from synchronous code.
///
/// A `RuntimeBridge` owns one worker thread that runs one private `asio::io_context`. `block_on` posts a task to it and
/// blocks the calling thread until the task is over. Any thread may call; its own event loop, if it has one, is never
/// entered. Calls from different threads run concurrently on the worker.
///
/// *Errors.* A call that fails returns a `BridgeError` in its `Result`, and no other call is affected. Only
/// `std::bad_alloc`, when there is no memory to make the call, is thrown.
///
/// *Shutdown.* The destructor stops the worker at once; calls in flight return `ResponseLost`.
///
/// *Modules.* A bridge may be passed between the program and its plugins, whatever the visibility of their symbols. Do
/// not unload a plugin before the bridges that it has called are destroyed: the worker runs its code.
namespace runtime_bridge {
inline namespace v0_2 {

#ifdef __cpp_lib_source_location
/// The place of a call, for diagnosis: `std::source_location`, or a class like it if the standard library has none.
using SourceLocation = std::source_location;
#else
/// Stands for `std::source_location`, where the standard library has none, as with clang 14.
class SourceLocation {
 public:
  static constexpr SourceLocation current(const char* file = __builtin_FILE(),
                                          const char* function = __builtin_FUNCTION(),
                                          std::uint_least32_t line = __builtin_LINE()) noexcept {
    SourceLocation here;
    here.file_ = file;
    here.function_ = function;
    here.line_ = line;
    return here;
  }

  [[nodiscard]] constexpr const char* file_name() const noexcept { return file_; }
  [[nodiscard]] constexpr const char* function_name() const noexcept { return function_; }
  [[nodiscard]] constexpr std::uint_least32_t line() const noexcept { return line_; }
  [[nodiscard]] static constexpr std::uint_least32_t column() noexcept { return 0; }

 private:
  const char* file_ = "";
  const char* function_ = "";
  std::uint_least32_t line_ = 0;
};
#endif

namespace detail {

inline namespace RUNTIME_BRIDGE_FLAVOUR {

#ifdef RUNTIME_BRIDGE_IS_FOR_BOOST
namespace net = boost::asio;
using AsioError = boost::system::system_error;  // what Asio throws
#else
namespace net = asio;
using AsioError = std::system_error;
#endif

template <class T, class E>
using Expected = RUNTIME_BRIDGE_EXPECTED::expected<T, E>;
using InPlace = RUNTIME_BRIDGE_EXPECTED::in_place_t;
using RUNTIME_BRIDGE_EXPECTED::unexpected;

/// The service that opens the descriptors that all I/O of a context goes through.
#ifdef RUNTIME_BRIDGE_USES_IO_URING
using Reactor = net::detail::io_uring_service;
#else
using Reactor = net::detail::reactor;
#endif

/// The services that asynchronous operations wait in.
template <class... Service>
struct Services {};
#ifdef RUNTIME_BRIDGE_HAS_IO_URING
using ParkingServices = Services<net::detail::signal_set_service, net::detail::io_uring_service, net::detail::reactor>;
#else
using ParkingServices = Services<net::detail::signal_set_service, net::detail::reactor>;
#endif
using ChannelServices = Services<net::experimental::detail::channel_service<net::detail::null_mutex>,
                                 net::experimental::detail::channel_service<net::detail::mutex>>;

}  // namespace RUNTIME_BRIDGE_FLAVOUR

#ifdef __cpp_lib_jthread
using StopToken = std::stop_token;
template <class Callback>
using StopCallback = std::stop_callback<Callback>;
#else
/// Never stops. For standard libraries without `std::stop_token`, such as libc++ without -fexperimental-library.
class StopToken {
 public:
  static bool stop_requested() noexcept { return false; }
};
template <class Callback>
class StopCallback {
 public:
  StopCallback(const StopToken&, const Callback&) noexcept {}
};
#endif

/// What one thread writes all the time and another one uses is kept this far apart: two lines, as processors fetch
/// pairs.
inline constexpr std::size_t cache_line = 128;

/// Names this thread for debuggers and process lists, where the system has names for threads.
inline void name_thread([[maybe_unused]] const std::string& name) noexcept {
  // With the final zero, as many as the system takes.
#if defined(__linux__)
  std::array<char, 16> text{};
  name.copy(text.data(), text.size() - 1);
  pthread_setname_np(pthread_self(), text.data());
#elif defined(__APPLE__)
  std::array<char, 64> text{};
  name.copy(text.data(), text.size() - 1);
  pthread_setname_np(text.data());
#elif defined(__FreeBSD__)
  std::array<char, 20> text{};
  name.copy(text.data(), text.size() - 1);
  pthread_set_name_np(pthread_self(), text.data());
#endif
}

/// The name of a thread that is alive; empty if the system has none for it.
inline std::string thread_name([[maybe_unused]] pthread_t thread) {
  std::array<char, 64> text{};
#if defined(__linux__) || defined(__APPLE__) || defined(__FreeBSD__)
  if (pthread_getname_np(thread, text.data(), text.size()) != 0) return {};
#endif
  return text.data();
}

/// The time of `steady_clock`, some milliseconds late but cheap where the system can do that.
inline std::chrono::steady_clock::time_point coarse_now() noexcept {
#ifdef __linux__
  timespec time{};
  clock_gettime(CLOCK_MONOTONIC_COARSE, &time);
  return std::chrono::steady_clock::time_point(std::chrono::seconds(time.tv_sec) +
                                               std::chrono::nanoseconds(time.tv_nsec));
#else
  return std::chrono::steady_clock::now();
#endif
}

/// Tells the processor that this is a busy-wait.
inline void pause() noexcept {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

/// Registers functions to be called around `fork`: before it, and after it in the parent and in the child. Returns an
/// error number.
inline int at_fork(void (*before)(), void (*parent)(), void (*child)()) noexcept {
  return pthread_atfork(before, parent, child);
}

/// Holds the lock during a fork, so that the child finds it free. Returns an error number.
template <std::mutex& mutex>
int lock_around_fork() noexcept {
  return at_fork([] { mutex.lock(); }, [] { mutex.unlock(); }, [] { mutex.unlock(); });
}

/// For who needs functions that were registered before main.
inline void check_at_fork(int error) {
  // Branch not covered: needs malloc to fail, before main.
  if (error) throw std::system_error(error, std::generic_category(), "runtime_bridge: pthread_atfork");
}

/// Blocks signals for this thread, and for those that it starts meanwhile. Not those of a fault, which are for the
/// thread that commits it: blocked, they would end the process before the handlers of crash reporters and sanitizers.
class SignalsBlocked {
 public:
  SignalsBlocked() noexcept {
    sigset_t signals;
    sigfillset(&signals);
    for (const int fault : {SIGBUS, SIGFPE, SIGILL, SIGSEGV, SIGSYS, SIGTRAP}) sigdelset(&signals, fault);
    pthread_sigmask(SIG_BLOCK, &signals, &before_);
  }
  SignalsBlocked(const SignalsBlocked&) = delete;
  SignalsBlocked& operator=(const SignalsBlocked&) = delete;
  ~SignalsBlocked() { pthread_sigmask(SIG_SETMASK, &before_, nullptr); }

 private:
  sigset_t before_;
};

}  // namespace detail

// =====================================================================================================================
// 1. Errors and results. Nothing here knows Asio.

/// Why a call has no value: a kind to act on, and a cause and a message to report.
class [[nodiscard]] BridgeError {
 public:
  /// What happened to the call.
  enum Kind {
    WorkerDead = 1,  ///< The task was not started: no worker can run it.
    ResponseLost,    ///< The task threw, or was destroyed before it returned.
    TimedOut,        ///< The deadline passed. The task was cancelled and has ended.
    Cancelled,       ///< A stop was requested. The task was cancelled and has ended.
    WouldDeadlock,   ///< The task was not started: the caller would wait for itself.
    Overloaded,      ///< The task was not started: `Options::max_in_flight` calls are in flight.
  };

  /// `ResponseLost`, without a cause.
  BridgeError() noexcept = default;

  /// An error of this kind. `text`, if it is not null, stands in the message in place of the kind's own text.
  BridgeError(Kind kind, std::exception_ptr cause = nullptr, std::shared_ptr<const char> text = nullptr) noexcept
      : kind_(kind), cause_(std::move(cause)), text_(std::move(text)) {}

  /// What happened to the call.
  [[nodiscard]] Kind kind() const noexcept { return kind_; }

  /// What the task threw, or why the worker could not be started; null if neither happened.
  [[nodiscard]] std::exception_ptr cause() const noexcept { return cause_; }

  /// One sentence for a log. It ends with the `what()` of the cause. Throws `std::bad_alloc`.
  [[nodiscard]] std::string message() const;

  /// Errors of the same kind are equal, whatever their causes.
  friend bool operator==(const BridgeError& a, const BridgeError& b) noexcept { return a.kind_ == b.kind_; }
  /// Whether the error is of this kind: `if (result.error() == BridgeError::TimedOut)`.
  friend bool operator==(const BridgeError& a, Kind b) noexcept { return a.kind_ == b; }

  /// Writes the message.
  template <class Traits>
  friend std::basic_ostream<char, Traits>& operator<<(std::basic_ostream<char, Traits>& out, const BridgeError& error) {
    return out << error.message();
  }

 private:
  /// The message without the library's name in front.
  [[nodiscard]] std::string sentence() const;

  Kind kind_ = ResponseLost;
  std::exception_ptr cause_;
  std::shared_ptr<const char> text_;  // null: the category's text for the kind
};

namespace detail {

class ErrorCategory final : public std::error_category {
 public:
  [[nodiscard]] const char* name() const noexcept override { return "runtime_bridge"; }

  [[nodiscard]] std::string message(int kind) const override {
    switch (kind) {
      case BridgeError::WorkerDead: return "the worker is gone";
      case BridgeError::ResponseLost: return "the task ended without a value";
      case BridgeError::TimedOut: return "the deadline passed and the task was cancelled";
      case BridgeError::Cancelled: return "a stop was requested and the task was cancelled";
      case BridgeError::WouldDeadlock: return "the call would wait for itself";
      case BridgeError::Overloaded: return "too many calls are in flight";
      default: return "unknown error";
    }
  }

  [[nodiscard]] std::error_condition default_error_condition(int kind) const noexcept override {
    switch (kind) {
      case BridgeError::TimedOut: return std::errc::timed_out;
      case BridgeError::Cancelled: return std::errc::operation_canceled;
      case BridgeError::WouldDeadlock: return std::errc::resource_deadlock_would_occur;
      case BridgeError::Overloaded: return std::errc::resource_unavailable_try_again;
      default: return {kind, *this};
    }
  }
};

inline const ErrorCategory error_category;

/// A string literal as the text of an error, without an allocation.
inline std::shared_ptr<const char> static_text(const char* literal) noexcept {
  return {std::shared_ptr<void>(), literal};
}

}  // namespace detail

/// The error code of a kind, in a category named "runtime_bridge". Some kinds equal a `std::errc`: `timed_out`,
/// `operation_canceled`, `resource_deadlock_would_occur`, and `resource_unavailable_try_again` for `Overloaded`.
inline std::error_code make_error_code(BridgeError::Kind kind) noexcept { return {kind, detail::error_category}; }

namespace detail {

/// What `unwrap` throws. A plain `std::system_error` would add the text of the kind to a message that has it already.
class UnwrapError final : public std::system_error {
 public:
  explicit UnwrapError(const BridgeError& error)
      : std::system_error(make_error_code(error.kind())),
        error_(std::make_shared<const BridgeError>(error)),
        message_(std::make_shared<const std::string>(error.message())) {}

  [[nodiscard]] const char* what() const noexcept override { return message_->c_str(); }
  [[nodiscard]] const BridgeError& error() const noexcept { return *error_; }

 private:
  // Shared, since copying an exception must not throw.
  std::shared_ptr<const BridgeError> error_;
  std::shared_ptr<const std::string> message_;
};

}  // namespace detail

inline std::string BridgeError::message() const {
  std::string text = "runtime_bridge: ";
  return text += sentence();
}

// Here, because it needs UnwrapError.
inline std::string BridgeError::sentence() const {
  // Branch not covered: g++ destroys a temporary of either side.
  std::string text = text_ ? std::string(text_.get()) : detail::error_category.message(kind_);
  if (!cause_) return text;
  try {
    std::rethrow_exception(cause_);
  } catch (const detail::UnwrapError& e) {
    return text + ": " + e.error().sentence();
  } catch (const std::exception& e) {
    return text + ": " + e.what();
  } catch (...) {
    return text + ": an exception that is not a std::exception";
  }
}

namespace detail {

[[noreturn]] inline void throw_error(const BridgeError& error) {
  if (error == BridgeError::ResponseLost && error.cause()) std::rethrow_exception(error.cause());
  throw UnwrapError(error);
}

}  // namespace detail

inline namespace RUNTIME_BRIDGE_FLAVOUR {

/// The outcome of a call: `std::expected` if the standard library has it, else `tl::expected`.
template <class T>
using Result = detail::Expected<T, BridgeError>;

/// The value of a call, for callers that want exceptions.
///
/// If there is no value, rethrows the task's own exception (`ResponseLost` with a cause), or throws a
/// `std::system_error` whose code is the error's kind and whose `what()` is its message.
template <class T>
requires(!std::is_void_v<T>) [[nodiscard]] T unwrap(Result<T>&& result) {
  if (!result.has_value()) detail::throw_error(result.error());
  return *std::move(result);
}
/// The same for a result that is kept: its value is copied.
template <class T>
requires std::copy_constructible<T>
[[nodiscard]] T unwrap(const Result<T>& result) {
  if (!result.has_value()) detail::throw_error(result.error());
  return *result;
}
/// The same for a call without a value: returns if it succeeded.
inline void unwrap(const Result<void>& result) {
  if (!result.has_value()) detail::throw_error(result.error());
}
// A compiler that refuses a call shows the line of the function's name.
// clang-format off
template <class T>
  requires(!std::is_void_v<T> && !std::copy_constructible<T>)
T unwrap(const Result<T>& result) = delete;  // The value can only be moved: write unwrap(std::move(result)).
// clang-format on

}  // namespace RUNTIME_BRIDGE_FLAVOUR

namespace detail {
inline namespace RUNTIME_BRIDGE_FLAVOUR {

inline unexpected<BridgeError> failure(BridgeError::Kind kind, const char* why) {
  return unexpected<BridgeError>({kind, nullptr, static_text(why)});
}

}  // namespace RUNTIME_BRIDGE_FLAVOUR
}  // namespace detail

// =====================================================================================================================
// 2. Options, and what a bridge tells about its calls

/// When the worker thread is made.
enum class Start {
  eager,  ///< By the constructor, which throws if that fails.
  lazy,   ///< By the first call, which returns `WorkerDead` if that fails; the next call tries again.
};

/// What `shutdown` does with the calls in flight.
enum class Shutdown {
  drain,   ///< Waits for them.
  cancel,  ///< Cancels them, and waits for them to end.
};

/// What the next call does while `Options::max_in_flight` calls are in flight.
enum class WhenFull {
  wait,    ///< Waits for its turn. Calls are started in the order of their arrival.
  refuse,  ///< Returns `Overloaded` at once.
};

/// What a call is doing.
enum class State {
  queued,      ///< The worker has not come to it yet.
  waiting,     ///< It waits for its turn: see `Options::max_in_flight`.
  running,     ///< Its task has started.
  cancelling,  ///< Its deadline has passed, or a stop was requested: the worker has been asked to cancel it.
};

/// A call in flight.
struct CallInfo {
  SourceLocation where;                       ///< Where `block_on` or `submit` was called. Line 0 for `call`.
  std::string name{};                         ///< The one given to `named`, or empty.
  std::chrono::steady_clock::duration age{};  ///< Time since it was called.
  State state = State::queued;                ///< What it is doing.
  std::thread::id caller{};                   ///< The thread that waits; none for a submitted call.
  std::string caller_name{};                  ///< The name that the system has for that thread.
  std::optional<std::chrono::steady_clock::time_point> deadline{};  ///< None if the call has no deadline.
};

/// A call that has ended, or was refused.
struct CallEnd {
  SourceLocation where;                          ///< As in `CallInfo`.
  std::string_view name{};                       ///< As in `CallInfo`. Valid until the hook returns.
  std::optional<BridgeError::Kind> error{};      ///< None if the call has a value.
  std::chrono::steady_clock::duration queued{};  ///< From the call to the start of its task, or to its end without one.
  std::chrono::steady_clock::duration ran{};     ///< From the start of its task to its end.
};

/// Counts of a bridge's calls. Each call is counted once when it ends, or is refused: as a value, or as one kind of
/// error.
struct Stats {
  std::uint64_t admitted = 0;        ///< Calls that were not refused.
  std::uint64_t values = 0;          ///< Calls that returned a value.
  std::uint64_t worker_dead = 0;     ///< `BridgeError::WorkerDead`
  std::uint64_t response_lost = 0;   ///< `BridgeError::ResponseLost`
  std::uint64_t timed_out = 0;       ///< `BridgeError::TimedOut`
  std::uint64_t cancelled = 0;       ///< `BridgeError::Cancelled`
  std::uint64_t would_deadlock = 0;  ///< `BridgeError::WouldDeadlock`
  std::uint64_t overloaded = 0;      ///< `BridgeError::Overloaded`
  std::size_t in_flight = 0;         ///< Calls in flight at the moment.
  std::size_t most_in_flight = 0;    ///< The most ever at the same time, those that waited for their turn included.
};

/// The value of `Options::max_in_flight` for no limit.
inline constexpr std::size_t unlimited = (std::numeric_limits<std::size_t>::max)();

/// How to make a bridge: its worker, its limits, and hooks that it calls.
///
/// Hooks may be called by several threads at the same time. What they throw is dropped. None is called in a forked
/// child.
struct Options {
  /// The worker's name in debuggers and process lists; cut to what the system takes (15 bytes on Linux).
  std::string thread_name = "runtime-bridge";
  /// When the worker thread is made.
  Start start = Start::eager;
  /// Called on the worker with each exception that escapes a raw handler on the bridge's context.
  std::function<void(std::exception_ptr)> on_stray_exception = nullptr;
  /// Called with the error of a submitted call that nobody will ask for: its handle was detached, or destroyed without
  /// a join. Not if the call was cancelled and its task ended because of that. Called where the later of the two
  /// happens: on the worker when the call ends, or on the thread that gives up the handle.
  std::function<void(const BridgeError&)> on_unjoined_error = nullptr;
  /// The age at which a call is slow, and `on_slow_call` is called. By default, none is.
  std::chrono::nanoseconds slow_after = (std::chrono::nanoseconds::max)();
  /// Called with each call that is slow, on the thread that waits for it (in `block_on`, `join`, `wait_for` or the
  /// handle's destructor), and again each time the call's age has doubled. It may call `RuntimeBridge::report`, and
  /// make calls; but if that thread is the worker of another bridge, they return `WouldDeadlock`.
  std::function<void(const CallInfo&)> on_slow_call = nullptr;
  /// Called once for each call, when it has ended or was refused, before its result can be seen: on the thread that
  /// called `block_on`; for a submitted call on the worker, or on the thread whose `submit` was refused.
  std::function<void(const CallEnd&)> on_call_end = nullptr;
  /// How many tasks may run at the same time. Zero is refused by the constructor (`std::errc::invalid_argument`).
  std::size_t max_in_flight = unlimited;
  /// What the next call does while `max_in_flight` tasks run.
  WhenFull when_full = WhenFull::wait;
  /// The longest time that a thread busy-waits before it sleeps. A caller busy-waits while its call is the only one in
  /// flight, even past its deadline. After such a call so does the worker, which still serves everything else. With
  /// several calls in flight callers yield instead, up to 64 times. Busy-waiting threads yield in between, unless the
  /// threads that they yield to turn out to compute. Nobody busy-waits if that has failed lately, on a machine with one
  /// core, or if this is zero.
  std::chrono::microseconds spin_limit{100};
};

namespace detail {

/// Calls a hook of `Options`, if there is one. What it throws is dropped.
template <class... Args>
void call_hook(const std::function<void(Args...)>& hook, const std::type_identity_t<Args>&... args) noexcept {
  try {
    if (hook) hook(args...);
  } catch (...) {
  }
}

}  // namespace detail

// =====================================================================================================================
// 3. Task traits. What is no Task gives one sentence, and no other error.

/// A Task with a name. See `named`.
template <class Task>
struct Named {
  std::string name;  ///< For diagnosis.
  Task task;         ///< The Task itself; a reference if it was given as an lvalue.
};

/// A Task that does what `task` does, with a name for diagnosis: see `RuntimeBridge::calls`. It borrows a task that is
/// given as an lvalue.
template <class Task>
[[nodiscard]] Named<Task> named(std::string name, Task&& task) {
  return {std::move(name), std::forward<Task>(task)};
}

namespace detail {
inline namespace RUNTIME_BRIDGE_FLAVOUR {

template <class Task>
inline constexpr bool is_named = false;
template <class Task>
inline constexpr bool is_named<Named<Task>> = true;

/// The task in a `Named`; any other task itself.
template <class Task, bool = is_named<std::remove_cvref_t<Task>>>
struct WithoutName {
  using Type = Task;
};
template <class Task>
struct WithoutName<Task, true> {
  using Type = decltype((std::declval<Task>().task));
};
template <class Task>
using Unnamed = typename WithoutName<Task>::Type;

template <class T>
struct AwaitableTraits : std::false_type {
  using Value = T;
  using Executor = net::io_context::executor_type;
};
template <class T, class Ex>
struct AwaitableTraits<net::awaitable<T, Ex>> : std::true_type {
  using Value = T;
  using Executor = Ex;
};
template <class T>
inline constexpr bool is_awaitable = AwaitableTraits<std::remove_cvref_t<T>>::value;

using UseAwaitable = net::use_awaitable_t<net::io_context::executor_type>;

/// An Asio operation that waits for its completion token.
template <class T>
concept Operation =
    !std::invocable<T> && std::invocable<T, UseAwaitable> && is_awaitable<std::invoke_result_t<T, UseAwaitable>>;

struct NotATask {};

/// Calls the task: gives the awaitable that is to be run, or the value of a plain callable.
template <class Task>
decltype(auto) invoke_task(std::remove_reference_t<Task>& task) {
  if constexpr (is_awaitable<Task>) {
    // Not covered: only its type is used.
    return std::remove_cvref_t<Task>(std::move(task));
  } else if constexpr (std::invocable<Task>) {
    if constexpr (Operation<std::invoke_result_t<Task>>) {
      return std::forward<Task>(task)()(UseAwaitable{});
    } else {
      return std::forward<Task>(task)();
    }
  } else if constexpr (Operation<Task>) {
    return std::forward<Task>(task)(UseAwaitable{});
  } else {
    return NotATask{};
  }
}
template <class Task>
using Invoked = decltype(invoke_task<Task>(std::declval<std::remove_reference_t<Task>&>()));

/// An awaitable of another Asio, recognised by its members, since its headers may not be included.
template <class T>
concept OtherAwaitable = !is_awaitable<T> && requires(std::remove_cvref_t<T> & t) {
  typename std::remove_cvref_t<T>::value_type;
  typename std::remove_cvref_t<T>::executor_type;
  t.await_ready();
};

enum class Refusal { none, not_moved, other_asio, no_task, executor, reference, immovable };

/// Why a type is not a Task. Tests one thing at a time, so that nothing fails but the assertion that explains it.
template <class Task>
consteval Refusal refusal_of() {
  if constexpr (is_awaitable<Task> && std::is_lvalue_reference_v<Task>) {
    return Refusal::not_moved;
  } else if constexpr (OtherAwaitable<Task>) {
    return Refusal::other_asio;
  } else if constexpr (!is_awaitable<Task> && !std::invocable<Task> && !Operation<Task>) {
    return Refusal::no_task;
  } else {
    using Traits = AwaitableTraits<std::remove_cvref_t<Invoked<Task>>>;
    using Value = std::conditional_t<Traits::value, typename Traits::Value, Invoked<Task>>;
    constexpr bool known_executor = std::is_same_v<typename Traits::Executor, net::any_io_executor> ||
                                    std::is_same_v<typename Traits::Executor, net::io_context::executor_type>;
    if constexpr (OtherAwaitable<Invoked<Task>>) {
      return Refusal::other_asio;
    } else if constexpr (!known_executor) {
      return Refusal::executor;
    } else if constexpr (std::is_reference_v<Value>) {
      return Refusal::reference;
    } else if constexpr (!std::is_void_v<Value> && !std::is_move_constructible_v<Value>) {
      return Refusal::immovable;
    } else {
      return Refusal::none;
    }
  }
}

template <class Task>
inline constexpr bool is_task = refusal_of<Unnamed<Task>>() == Refusal::none;

/// Says what is wrong with a type that is not a Task. The functions that use it then have nothing else wrong with them.
template <class Task>
constexpr void assert_task() {
  constexpr Refusal refusal = refusal_of<Unnamed<Task>>();
  static_assert(refusal != Refusal::not_moved,
                "runtime_bridge: an awaitable runs once, so give it up: block_on(std::move(task))");
  static_assert(refusal != Refusal::other_asio,
                "runtime_bridge: this awaitable is another library's: give an asio::awaitable, of standalone Asio, or "
                "a boost::asio::awaitable if RUNTIME_BRIDGE_USE_BOOST_ASIO is defined");
  static_assert(refusal != Refusal::no_task,
                "runtime_bridge: not a Task: give an asio::awaitable, a callable without parameters, or an Asio "
                "operation that waits for its token, such as timer.async_wait(asio::deferred)");
  static_assert(refusal != Refusal::executor,
                "runtime_bridge: the awaitable's executor must be asio::any_io_executor (the default) or "
                "asio::io_context::executor_type");
  static_assert(refusal != Refusal::reference,
                "runtime_bridge: a task cannot return a reference: return a copy, a pointer or a "
                "std::reference_wrapper");
  static_assert(refusal != Refusal::immovable, "runtime_bridge: a task's result must be movable");
}

template <class Task, Refusal refusal = refusal_of<Task>()>
struct TaskTraits {
  using Value = void;
};
template <class Task>
struct TaskTraits<Task, Refusal::none> {
  using Called = std::remove_cvref_t<Invoked<Task>>;  // an awaitable, or a value
  using Value = std::remove_cv_t<typename AwaitableTraits<Called>::Value>;
};

/// The type of a Task's value; void for what is no Task.
template <class Task>
using TaskValue = typename TaskTraits<Unnamed<Task>>::Value;

}  // namespace RUNTIME_BRIDGE_FLAVOUR

// What `call` makes of a function and its arguments.

/// The parameters of a function. That of a member function's object is `Parameters<>`, as it is never converted.
template <class... P>
struct Parameters {};
template <class R, class... P>
Parameters<P...> parameters_of(R (*)(P...));
template <class R, class C, class... P>
Parameters<Parameters<>, P...> parameters_of(R (C::*)(P...));
template <class R, class C, class... P>
Parameters<Parameters<>, P...> parameters_of(R (C::*)(P...) const);
template <class R, class C, class... P>
Parameters<Parameters<>, P...> parameters_of(R (C::*)(P...) &);
template <class R, class C, class... P>
Parameters<Parameters<>, P...> parameters_of(R (C::*)(P...) const&);
template <class R, class C, class... P>
Parameters<Parameters<>, P...> parameters_of(R (C::*)(P...) &&);
template <class... P>
Parameters<P...> without_object(Parameters<Parameters<>, P...>);

/// Those of anything that can be called, if they are known: not those of a template, or of overloaded functions.
template <class F>
struct ParametersOf {
  using Type = Parameters<>;
};
template <class F>
requires requires(F f) { detail::parameters_of(f); }
struct ParametersOf<F> {
  using Type = decltype(detail::parameters_of(std::declval<F>()));
};
template <class F>
requires requires { detail::without_object(detail::parameters_of(&F::operator())); }
struct ParametersOf<F> {
  using Type = decltype(detail::without_object(detail::parameters_of(&F::operator())));
};

template <std::size_t index, class Known>
struct ParameterAt {
  using Type = Parameters<>;  // not known
};
template <std::size_t index, class... P>
requires(index < sizeof...(P)) struct ParameterAt<index, Parameters<P...>> {
  using Type = std::tuple_element_t<index, std::tuple<P...>>;
};

/// Whether a parameter `P` refers to a temporary if it is given an argument `A`.
template <class P, class A>
inline constexpr bool makes_temporary =
    std::is_reference_v<P>&& std::is_convertible_v<A, P> &&
    !std::is_convertible_v<std::remove_reference_t<A>*, std::remove_reference_t<P>*> &&
    !std::is_convertible_v<A, std::remove_cvref_t<P>&>;

/// How an argument `A` for a parameter `P` is kept during a call: borrowed, or converted.
template <class P, class A, bool = makes_temporary<P, A>>
struct Argument {
  using Kept = A&&;
  static A&& pass(A&& argument) noexcept { return std::forward<A>(argument); }
};
template <class P, class A>
struct Argument<P, A, true> {
  using Kept = std::remove_cvref_t<P>;
  static P pass(Kept&& argument) noexcept { return static_cast<P>(argument); }
};

/// `std::invoke(f, a...)` as a Task, for a caller that waits. An argument that is converted for a reference (a literal
/// for a `const std::string&`) is converted here, and not when a coroutine is made, which would outlive it.
template <class Indices, class F, class... A>
class Invocation;
template <std::size_t... index, class F, class... A>
class Invocation<std::index_sequence<index...>, F, A...> {
  using Known = typename ParametersOf<std::remove_cvref_t<F>>::Type;
  template <std::size_t i, class Given>
  using ArgumentAt = Argument<typename ParameterAt<i, Known>::Type, Given>;

 public:
  explicit Invocation(F&& f, A&&... a) : f_(std::forward<F>(f)), a_(std::forward<A>(a)...) {}

  decltype(auto) operator()() requires std::invocable<F, A...> {
    return std::invoke(
        std::forward<F>(f_),
        ArgumentAt<index, A>::pass(static_cast<typename ArgumentAt<index, A>::Kept&&>(std::get<index>(a_)))...);
  }

 private:
  F&& f_;
  std::tuple<typename ArgumentAt<index, A>::Kept...> a_;
};
template <class F, class... A>
using InvocationOf = Invocation<std::index_sequence_for<A...>, F, A...>;

// =====================================================================================================================
// 4. Time, and stops

/// Nanoseconds that do not overflow, for sums with any duration that a caller may give.
using Exact = std::chrono::duration<long double, std::nano>;

/// The time until `deadline`: zero if it has passed, and at most one hour. Long waits are made in steps, so that no sum
/// overflows. A clock that can be set is read every second.
template <class Clock, class Duration>
std::chrono::nanoseconds time_left(const std::chrono::time_point<Clock, Duration>& deadline) {
  constexpr std::chrono::seconds step(Clock::is_steady ? 3600 : 1);
  if (deadline == (deadline.max)()) return step;  // most calls have no deadline: do not read the clock for them
  const Exact left = Exact(deadline.time_since_epoch()) - Exact(Clock::now().time_since_epoch());
  if (!(left > Exact::zero())) return std::chrono::nanoseconds::zero();
  return left < step ? std::chrono::ceil<std::chrono::nanoseconds>(left) : step;
}

template <class Clock, class Duration>
bool has_passed(const std::chrono::time_point<Clock, Duration>& deadline) {
  return time_left(deadline) == std::chrono::nanoseconds::zero();
}

using SteadyTime = std::chrono::steady_clock::time_point;

/// The time at `duration` from `now`; the clock's last time if that is later than the clock can represent.
template <class Rep, class Period>
SteadyTime time_after(const std::chrono::duration<Rep, Period>& duration,
                      SteadyTime now = std::chrono::steady_clock::now()) {
  const Exact exact(duration);
  if (!(exact > Exact::zero())) return now;
  if (exact >= Exact((SteadyTime::max)() - now)) return (SteadyTime::max)();
  return now + std::chrono::ceil<std::chrono::nanoseconds>(exact);
}

/// The same time on the steady clock, as far as that can be known now.
template <class Clock, class Duration>
SteadyTime on_steady_clock(const std::chrono::time_point<Clock, Duration>& time, SteadyTime now) {
  if constexpr (std::is_same_v<std::chrono::time_point<Clock, Duration>, SteadyTime>) {
    return time;
  } else {
    if (time == (time.max)()) return (SteadyTime::max)();
    return time_after(Exact(time.time_since_epoch()) - Exact(Clock::now().time_since_epoch()), now);
  }
}

/// What `poll_every` asks, and how often.
class Poll {
 public:
  Poll(const Poll&) = delete;
  Poll& operator=(const Poll&) = delete;
  virtual ~Poll() = default;

  virtual bool ask() = 0;

  const std::chrono::nanoseconds interval;

 protected:
  explicit Poll(std::chrono::nanoseconds i) noexcept : interval(i) {}
};

template <class Predicate>
class PollOf final : public Poll {
 public:
  PollOf(std::chrono::nanoseconds i, Predicate&& predicate) : Poll(i), predicate_(std::move(predicate)) {}

  bool ask() override { return static_cast<bool>(std::invoke(predicate_)); }

 private:
  Predicate predicate_;
};

}  // namespace detail

/// Who may request the cancellation of a call: nobody, a `std::stop_token`, or a predicate (see `poll_every`). If the
/// standard library has no stop tokens (libc++ without -fexperimental-library), they are left out.
class Stop {
 public:
  /// Nobody.
  Stop() = default;

  /// Whoever calls `request_stop` on the token's source.
  // Implicit, since a token is what callers have. NOLINTNEXTLINE(google-explicit-constructor)
  Stop(detail::StopToken token) noexcept : token_(std::move(token)) {}

  /// @cond For `poll_every` and the bridge.
  explicit Stop(std::shared_ptr<detail::Poll> poll) noexcept : poll_(std::move(poll)) {}
  const detail::StopToken& token() const noexcept { return token_; }
  detail::Poll* poll() const noexcept { return poll_.get(); }
  /// @endcond

 private:
  detail::StopToken token_{};
  std::shared_ptr<detail::Poll> poll_{};
};

/// Requests the cancellation of a call once `predicate()` is true: `block_on(task, poll_every(50ms, is_interrupted))`.
///
/// The thread that waits for the call asks: before the call, which is not made if that is true, and then at each
/// interval. What the predicate throws cancels the call, and is thrown here once the task is over. So a predicate may
/// do what only this thread may do, such as looking for Ctrl-C in an interpreter. It may make calls, but if this thread
/// is the worker of another bridge they return `WouldDeadlock`. Throws `std::system_error`
/// (`std::errc::invalid_argument`) if the interval is zero or less.
template <class Rep, class Period, class Predicate>
[[nodiscard]] Stop poll_every(std::chrono::duration<Rep, Period> interval, Predicate predicate) {
  if (!(interval > interval.zero())) {
    throw std::system_error(std::make_error_code(std::errc::invalid_argument),
                            "runtime_bridge: poll_every needs an interval above zero");
  }
  const std::chrono::nanoseconds time = detail::time_after(interval, detail::SteadyTime()).time_since_epoch();
  return Stop(std::make_shared<detail::PollOf<Predicate>>(time, std::move(predicate)));
}

namespace detail {

// =====================================================================================================================
// 5. Process

/// Counts the forks between the process that made a bridge and this one. A forked child has the bridge's memory but not
/// its worker, and locks that other threads held during the fork stay locked there.
///
/// Each module has its own counter (a plugin beside the program, for example, if the linker does not unite their
/// symbols). A bridge uses the counter of the module that made it, whichever module calls it.
class ForkCounter {
 public:
  ForkCounter() { check_at_fork(failed_); }

  /// Whether this process is a fork of the one that made this object.
  bool forked() const noexcept { return made_at_ != forks_.load(std::memory_order_relaxed); }

 private:
  static inline std::atomic<unsigned> all_forks_{0};

  // Registered before main, and not when first needed: if another thread held the guard of a function's static during
  // the fork, the guard would stay locked in the child.
  static inline const int failed_ =
      at_fork(nullptr, nullptr, [] { all_forks_.fetch_add(1, std::memory_order_relaxed); });

  const std::atomic<unsigned>& forks_ = all_forks_;
  const unsigned made_at_ = forks_.load(std::memory_order_relaxed);
};

// =====================================================================================================================
// 6. Handler memory

/// Memory for one posted handler, inside the call that posts it: posting then needs no allocation and cannot fail.
class HandlerMemory {
 public:
  // Branch not covered: handlers fit in every Asio that is tested.
  void* allocate(std::size_t size) { return size <= bytes_.size() ? bytes_.data() : ::operator new(size); }
  void deallocate(void* memory) noexcept {
    // Branch not covered: as above.
    if (memory != bytes_.data()) ::operator delete(memory);
  }

 private:
  alignas(std::max_align_t) std::array<std::byte, 128> bytes_;
};

template <class T>
class HandlerAllocator {
 public:
  using value_type = T;

  explicit HandlerAllocator(HandlerMemory& memory) noexcept : memory_(&memory) {}
  template <class U>
  HandlerAllocator(const HandlerAllocator<U>& other) noexcept : memory_(other.memory_) {}

  T* allocate(std::size_t n) { return static_cast<T*>(memory_->allocate(n * sizeof(T))); }
  void deallocate(T* p, std::size_t) noexcept { memory_->deallocate(p); }
  bool operator==(const HandlerAllocator&) const noexcept = default;

 private:
  template <class U>
  friend class HandlerAllocator;

  HandlerMemory* memory_;
};

// =====================================================================================================================
// 7. Gate

/// Admits calls, counts them, and keeps the context from being shut down while a thread is inside `asio::post`.
///
/// One atomic word, so that no call slips in between a check and a count. Bits: closed to calls, closed to posts, the
/// number of threads that are posting, the number of calls in flight. A closed gate stays closed. `Loop` is what is
/// stopped when the gate is closed to calls and none is left.
template <class Loop>
class Gate {
 public:
  /// Leave to post. For a call, it also counts the call.
  class Admission {
   public:
    Admission(const Admission&) = delete;
    Admission& operator=(const Admission&) = delete;
    ~Admission() {
      if (!gate_) return;
      if (counts_call_) gate_->end_call();
      gate_->end_post();
    }

    explicit operator bool() const noexcept { return gate_; }

    /// The call was sent: it is uncounted when it is completed.
    void sent() noexcept { counts_call_ = false; }

   private:
    friend class Gate;
    Admission(Gate* gate, bool counts_call) noexcept : gate_(gate), counts_call_(counts_call) {}

    Gate* gate_;  // null if the gate was closed
    bool counts_call_;
  };

  explicit Gate(Loop& loop) noexcept : loop_(loop) {}

  /// None either if so many calls are in flight.
  Admission admit_call(std::size_t most) noexcept {
    return {enter(call + poster, no_calls, most) ? this : nullptr, true};
  }

  /// Leave to post for a call that was admitted, or for the bridge itself.
  Admission admit_post() noexcept { return {enter(poster, no_posts) ? this : nullptr, false}; }

  /// A call is over.
  void end_call() noexcept {
    const std::uint64_t before = word_.fetch_sub(call);
    if ((before & no_calls) && calls(before) == 1) loop_.stop();
  }

  void close_to_calls() noexcept { word_.fetch_or(no_calls); }

  /// Closes it to everyone and waits until no thread is posting.
  void close() noexcept {
    std::uint64_t word = word_.fetch_or(no_calls | no_posts);
    for (; posters(word) != 0; word = word_.load()) word_.wait(word);
  }

  bool closed_to_calls() const noexcept { return word_.load() & no_calls; }
  std::size_t in_flight() const noexcept { return calls(word_.load()); }

 private:
  static constexpr std::uint64_t no_calls = 1;
  static constexpr std::uint64_t no_posts = 2;
  static constexpr std::uint64_t poster = 4;
  static constexpr std::uint64_t call = std::uint64_t{1} << 32;

  bool enter(std::uint64_t counts, std::uint64_t closed, std::size_t most = unlimited) noexcept {
    std::uint64_t word = word_.load(std::memory_order_relaxed);
    do {
      if ((word & closed) || calls(word) >= most) return false;
    } while (!word_.compare_exchange_weak(word, word + counts));
    return true;
  }

  // Wakes `close`, which may be waiting for this poster.
  void end_post() noexcept {
    const std::uint64_t before = word_.fetch_sub(poster);
    // Branch not covered: needs two posters at once.
    if ((before & no_posts) && posters(before) == 1) word_.notify_all();
  }

  static std::uint64_t posters(std::uint64_t word) noexcept { return (word % call) / poster; }
  static std::size_t calls(std::uint64_t word) noexcept { return word / call; }

  Loop& loop_;
  std::atomic<std::uint64_t> word_{0};
};

// =====================================================================================================================
// 8. Context

/// Tells since when the worker has not come back to its loop.
class Heartbeat {
 public:
  /// Worker: it looks for what is ready.
  void begin_wait() noexcept { busy_since_.store(waits, std::memory_order_relaxed); }

  /// Worker: it has found something, and is going to run it.
  void begin_round() noexcept { busy_since_.store(coarse_now().time_since_epoch().count(), std::memory_order_relaxed); }

  /// Worker: the start of a task, which is told of while the rounds are not.
  class Step {
   public:
    explicit Step(Heartbeat& heartbeat) noexcept : heartbeat_(heartbeat) {
      if (!heartbeat_.watched()) heartbeat_.begin_round();
    }
    Step(const Step&) = delete;
    Step& operator=(const Step&) = delete;
    ~Step() {
      if (!heartbeat_.watched()) heartbeat_.begin_wait();
    }

   private:
    Heartbeat& heartbeat_;
  };

  /// Worker: from now on the reactor tells of each round.
  void watch() noexcept { watched_.store(true, std::memory_order_relaxed); }

  /// Whether each round is told of. Until the context has a timer or a socket only the starts of tasks are.
  bool watched() const noexcept { return watched_.load(std::memory_order_relaxed); }

  /// When the round began that the worker is in; none if it waits, or if nobody has told.
  std::optional<SteadyTime> busy_since() const noexcept {
    const SteadyTime::rep since = busy_since_.load(std::memory_order_relaxed);
    if (since == waits) return std::nullopt;
    return SteadyTime(SteadyTime::duration(since));
  }

 private:
  static constexpr SteadyTime::rep waits = 0;

  alignas(cache_line) std::atomic<SteadyTime::rep> busy_since_{waits};
  std::atomic<bool> watched_{false};
};

inline namespace RUNTIME_BRIDGE_FLAVOUR {

/// The reactor, which tells when the loop waits and when it goes on.
class WatchedReactor final : public Reactor {
 public:
  WatchedReactor(net::execution_context& context, Heartbeat& heartbeat) : Reactor(context), heartbeat_(heartbeat) {}

  void run(long microseconds, net::detail::op_queue<net::detail::scheduler_operation>& ready) override {
    heartbeat_.watch();
    heartbeat_.begin_wait();
    Reactor::run(microseconds, ready);
    heartbeat_.begin_round();
  }

 private:
  Heartbeat& heartbeat_;
};

/// The `io_context` and its loop, with what the worker needs and Asio keeps to itself. No exception leaves the loop:
/// what escapes a raw handler goes to the hook. Apart from `post`, all of it is for the worker.
class Context : public net::io_context {
 public:
  using Hook = std::function<void(std::exception_ptr)>;

  Context(const Hook& on_stray_exception, Heartbeat& heartbeat)
      : on_stray_exception_(on_stray_exception), heartbeat_(heartbeat) {}

  /// Opens the reactor's descriptors now. Asio would open them with the first timer or socket, and that would be what
  /// fails. One thread at a time.
  void open_reactor() {
    if (has_reactor()) return;
    try {
      auto reactor = std::make_unique<WatchedReactor>(*this, heartbeat_);
      net::add_service<Reactor>(*this, reactor.get());
      (void)reactor.release();
      has_reactor_.store(true, std::memory_order_release);
      // Branch not covered: Asio throws nothing else.
    } catch (const AsioError& e) {
      // Asio's own category compares equal to no std::errc in some versions.
      throw std::system_error(e.code().value(), std::system_category(), "runtime_bridge: no reactor");
    }
  }

  bool has_reactor() const noexcept { return has_reactor_.load(std::memory_order_acquire); }

  /// Posts `handler` in memory that is allocated already.
  template <class Handler>
  void post(HandlerMemory& memory, Handler handler) {
    net::post(*this, net::bind_allocator(HandlerAllocator<void>(memory), std::move(handler)));
  }

  /// Runs a step of the loop, again if an exception escapes a raw handler.
  template <class Step>
  std::size_t survive(Step step) noexcept {
    for (;;) {
      try {
        return step();
      } catch (...) {
        report_stray();
      }
    }
  }

  /// Passes the exception that is being handled to the hook.
  void report_stray() const noexcept { call_hook(on_stray_exception_, std::current_exception()); }

  /// Runs a handler if one is ready, even if somebody has stopped the context again.
  std::size_t run_ready_handler() noexcept {
    restart();
    return survive([&] { return poll_one(); });
  }

  /// Runs a function as a handler, after those that are ready. Returns how many have run. Cancellations are emitted in
  /// such a function: Asio 1.26 posts what is emitted outside of the loop, and uses a task's memory after its end.
  template <class Function>
  int run_in_turn(Function function) noexcept {
    HandlerMemory memory;
    bool passed = false;
    post(memory, [&] {
      passed = true;
      function();
    });
    int handlers = 0;
    // The queue is served in order. NOLINTNEXTLINE(bugprone-infinite-loop): the handler ends it
    do {
      run_ready_handler();
      ++handlers;
    } while (!passed);
    return handlers;
  }

  /// Runs handlers until none is ready. A coroutine that never waits always has one, so this gives up after some time.
  void run_ready_handlers() noexcept {
    const SteadyTime end = std::chrono::steady_clock::now() + std::chrono::milliseconds(5);
    int handlers = 0;
    for (int rounds = 0; handlers != 1 && (rounds < 4 || std::chrono::steady_clock::now() < end); ++rounds) {
      handlers = run_in_turn([] {});
    }
  }

  /// Destroys every operation of Asio's that waits on this context, except those on channels, and the coroutines that
  /// await it. What is queued to run stays queued, for the loop to run. Timers and sockets cannot be used afterwards.
  ///
  /// Not with `asio::execution_context::shutdown`. That shuts down the scheduler as well, which empties its queue
  /// without its lock: a foreign thread that posts at that moment would corrupt it. It also shuts down the resolvers,
  /// which crash if they are used afterwards. A look-up in progress is on a thread of Asio's, and so foreign.
  void destroy_parked() { shut_down(ParkingServices()); }

  /// Destroys the operations that wait on channels. Last, since a coroutine that is destroyed may use one (to return
  /// something to a pool, for instance), and Asio's channels crash if they are used afterwards.
  void destroy_on_channels() { shut_down(ChannelServices()); }

  /// Waits for foreign threads to let go of this context, and destroys what raw users of the executor have left behind.
  ///
  /// A foreign thread that has just handed a task back still uses the context for some instructions, and may be
  /// preempted there. Asio counts it as work. If nothing else counts, this returns as soon as the thread lets go. But
  /// operations that were destroyed or left behind count as well, and Asio cannot tell them apart, so with such this
  /// waits for a limited time. `destroyed` of them are known to be none.
  void destroy_leftovers(std::size_t destroyed) noexcept {
    restart();
    work_.reset();
    std::size_t forgotten = 0;
    // Branch not covered: the operations that were destroyed are always counted.
    for (; forgotten < destroyed && !stopped(); ++forgotten) scheduler().work_finished();
    const SteadyTime end = std::chrono::steady_clock::now() + std::chrono::milliseconds(200);
    // More than once, in case somebody stops the context again. Without work it returns at once.
    for (int times = 0; times < 3; ++times) {
      survive([&] { return run_until(end); });
      restart();
    }
    work_.emplace(get_executor());
    for (; forgotten != 0; --forgotten) scheduler().work_started();

    destroy_parked();  // what waits on a channel is destroyed with the context
    run_ready_handlers();
  }

 private:
  net::detail::io_context_impl& scheduler() { return net::use_service<net::detail::io_context_impl>(*this); }

  template <class... Service>
  void shut_down(Services<Service...>) {
    (shut_down<Service>(), ...);
  }
  template <class Service>
  void shut_down() {
    if (net::has_service<Service>(*this)) net::use_service<Service>(*this).shutdown();
  }

  const Hook& on_stray_exception_;
  Heartbeat& heartbeat_;
  std::atomic<bool> has_reactor_{false};
  std::optional<net::executor_work_guard<executor_type>> work_{get_executor()};
};

}  // namespace RUNTIME_BRIDGE_FLAVOUR

// =====================================================================================================================
// 9. Wait graph

class WaitNode;

/// The end of a wait that somebody else brings about: a call's part in the graph.
class WaitRecord {
 private:
  friend class WaitNode;
  std::atomic<WaitNode*> waiter_{nullptr};  // whose worker waits; the record's own bridge once the call is completed
};

/// A bridge in the graph of which worker waits for which bridge. Knows its worker, and finds rings.
///
/// A worker waits for at most one bridge, so following the records finds every ring, and only rings.
class WaitNode {
 public:
  explicit WaitNode(const std::string& name) : name_(name) { check_at_fork(failed_); }
  WaitNode(const WaitNode&) = delete;
  WaitNode& operator=(const WaitNode&) = delete;

  /// This thread is the worker from now on.
  void enter_worker() noexcept {
    worker_.store(std::this_thread::get_id(), std::memory_order_relaxed);
    current_node_() = this;
  }

  /// The thread that was the worker is not any more.
  void leave_worker() noexcept {
    worker_.store({}, std::memory_order_relaxed);
    if (current_node_() == this) current_node_() = nullptr;
  }

  const std::string& name() const noexcept { return name_; }
  unsigned number() const noexcept { return number_; }

  bool has_worker() const noexcept { return worker_.load(std::memory_order_relaxed) != std::thread::id(); }

  /// The bridge that the worker waits for, by name and number; empty if it waits for none.
  std::string waits_for() const {
    const std::lock_guard lock(mutex_);
    return waits_for_ ? waits_for_->name_ + "#" + std::to_string(waits_for_->number_) : std::string();
  }

  /// Whether this thread is the worker. By its id, since a plugin does not see the thread_locals of the module that
  /// made the bridge.
  bool on_worker() const noexcept { return worker_.load(std::memory_order_relaxed) == std::this_thread::get_id(); }

  /// If this thread is a worker, records that it is about to wait for this bridge: for `call`, or if that is null for
  /// its end. If that would close a ring of waiting workers it records nothing and returns false, with the names of the
  /// ring in `ring` if that is not null. So it does if the worker waits already, and this is a hook.
  bool begin_wait(WaitRecord* call, std::shared_ptr<const char>* ring) {
    WaitNode* const waiter = on_worker() ? this : current_node_();
    if (!waiter) return true;
    const std::lock_guard lock(mutex_);
    if (waiter->waits_for_) {
      if (ring) *ring = static_text("a hook on a worker that waits for a bridge cannot wait for another");
      return false;
    }
    WaitNode* last = this;
    while (last != waiter && last->waits_for_) last = last->waits_for_;
    if (last == waiter) {
      if (ring) *ring = waiter->name_ring(*this);
      return false;
    }
    WaitNode* none = nullptr;
    if (call && !call->waiter_.compare_exchange_strong(none, waiter)) return true;  // it is completed
    waiter->waits_for_ = this;
    waiter->waits_for_call_ = call;
    return true;
  }

  /// Takes the record back.
  void end_wait(WaitRecord* call) noexcept {
    WaitNode* waiter = current_node_();
    if (!waiter) return;
    const std::lock_guard lock(mutex_);
    waiter->waits_for_ = nullptr;
    waiter->waits_for_call_ = nullptr;
    if (call) call->waiter_.compare_exchange_strong(waiter, nullptr);
  }

  /// The call, one of this bridge's, is over. Before its caller wakes: with the record still there, the caller's next
  /// call would be reported as a deadlock.
  void complete(WaitRecord& call) noexcept {
    WaitNode* none = nullptr;
    if (call.waiter_.compare_exchange_strong(none, this)) return;
    // A waiter that gives up takes the same lock, so the one that is found here is alive.
    const std::lock_guard lock(mutex_);
    WaitNode* waiter = call.waiter_.exchange(this);
    // Branch not covered: needs a waiter that gives up at this moment.
    if (waiter && waiter->waits_for_call_ == &call) {
      waiter->waits_for_ = nullptr;
      waiter->waits_for_call_ = nullptr;
    }
  }

  static inline std::mutex mutex;  // guards waits_for_ and waits_for_call_ of all bridges that the module made

 private:
  /// The ring that a wait of this bridge's worker for `first` would close. The lock is held.
  std::shared_ptr<const char> name_ring(const WaitNode& first) const {
    const auto name = [&](const WaitNode& node) {
      const auto is_namesake = [&](const WaitNode& other) { return &other != &node && other.name_ == node.name_; };
      bool ambiguous = is_namesake(*this);
      for (const WaitNode* n = &first; n != this; n = n->waits_for_) ambiguous = ambiguous || is_namesake(*n);
      std::string text = node.name_;
      if (ambiguous) text.append("#").append(std::to_string(node.number_));
      return text;
    };
    auto text = std::make_shared<std::string>("the call would wait for itself: ");
    *text += name(*this);
    for (const WaitNode* n = &first; n != this; n = n->waits_for_) *text += " -> " + name(*n);
    *text += " -> " + name(*this);
    return {text, text->c_str()};
  }

  static WaitNode*& current_node() noexcept {
    static thread_local constinit WaitNode* node = nullptr;
    return node;
  }

  // Before main, like the fork counter's. A forked child finds the lock free.
  static inline const int failed_ = lock_around_fork<mutex>();
  static inline std::atomic<unsigned> made_{0};

  // Of the module that made the bridge, whichever module calls it.
  std::mutex& mutex_ = mutex;
  WaitNode*& (*const current_node_)() noexcept = current_node;  // whose worker this thread is

  const std::string& name_;
  const unsigned number_ = ++made_;  // tells bridges of the same name apart
  std::atomic<std::thread::id> worker_{};
  WaitNode* waits_for_ = nullptr;
  const WaitRecord* waits_for_call_ = nullptr;
};

/// A wait of this thread for a bridge.
class WaitScope {
 public:
  WaitScope() = default;
  WaitScope(const WaitScope&) = delete;
  WaitScope& operator=(const WaitScope&) = delete;
  ~WaitScope() {
    if (bridge_) bridge_->end_wait(call_);
  }

  /// See `WaitNode::begin_wait`.
  bool begin(WaitNode& bridge, WaitRecord* call, std::shared_ptr<const char>* ring = nullptr) {
    if (!bridge.begin_wait(call, ring)) return false;
    bridge_ = &bridge;
    call_ = call;
    return true;
  }

 private:
  WaitNode* bridge_ = nullptr;
  WaitRecord* call_ = nullptr;
};

// =====================================================================================================================
// 10. Call registry. Who asks takes locks that are held for a few instructions only, so a worker that is stuck in a
// handler never holds one.

/// A node of a circular list. Alone it is a list of one.
class ListNode {
 public:
  ListNode() = default;
  ListNode(const ListNode&) = delete;
  ListNode& operator=(const ListNode&) = delete;

  ListNode& next() const noexcept { return *next_; }
  bool alone() const noexcept { return next_ == this; }

  void insert_before(ListNode& other) noexcept {
    next_ = &other;
    before_ = std::exchange(other.before_, this);
    before_->next_ = this;
  }

  void remove() noexcept {
    before_->next_ = next_;
    next_->before_ = before_;
    next_ = before_ = this;
  }

 private:
  ListNode* next_ = this;
  ListNode* before_ = this;
};

/// What anybody may ask about a call. Constant while it is in the registry, but for the atomics.
class CallRecord : private ListNode {
 public:
  CallRecord() = default;

  /// Before the call is sent. `name` is moved from, or null.
  void describe(const SourceLocation& where, std::string* name, SteadyTime start) noexcept {
    where_ = where;
    if (name) name_ = std::move(*name);
    start_ = start;
  }

  /// This thread is going to wait for the call, until the deadline. The clock's last time is none.
  void set_caller(SteadyTime deadline) noexcept {
    caller_ = std::this_thread::get_id();
    caller_handle_ = pthread_self();
    deadline_ = deadline;
  }

  SteadyTime start() const noexcept { return start_; }

  /// Worker.
  void set_state(State state) noexcept { state_.store(state, std::memory_order_relaxed); }

  // For `end`, if somebody is going to ask for it.
  void set_task_started() noexcept { task_started_ = std::chrono::steady_clock::now(); }
  void set_ended() noexcept { ended_ = std::chrono::steady_clock::now(); }

  /// For the thread that waits: when it is to be told next that the call is slow.
  SteadyTime slow_at(std::chrono::nanoseconds slow_after) const noexcept {
    return slow_at_ != SteadyTime() ? slow_at_ : time_after(slow_after, start_);
  }
  void set_slow_at(SteadyTime time) noexcept { slow_at_ = time; }

  /// The call has ended: it is not in flight any more, even if it is still in the registry.
  void set_over() noexcept { over_.store(true, std::memory_order_relaxed); }

  /// Notes why the call is cancelled. False if that was noted before.
  bool ask(BridgeError::Kind why) noexcept {
    int none = 0;
    return asked_.compare_exchange_strong(none, why);
  }
  int asked() const noexcept { return asked_; }

  /// For the thread that waits, and for those that have the registry's lock.
  CallInfo info(SteadyTime now) const {
    CallInfo info{where_};
    info.name = name_;
    info.age = (std::max)(now - start_, SteadyTime::duration::zero());
    info.state = asked() != 0 ? State::cancelling : state_.load(std::memory_order_relaxed);
    info.caller = caller_;
    if (caller_ != std::thread::id()) info.caller_name = thread_name(caller_handle_);
    if (deadline_ != (SteadyTime::max)()) info.deadline = deadline_;
    return info;
  }

  /// For a call that is over, or was refused.
  CallEnd end(std::optional<BridgeError::Kind> error) const noexcept {
    const SteadyTime ended = ended_ != SteadyTime() ? ended_ : start_;
    const SteadyTime started = task_started_ != SteadyTime() ? task_started_ : ended;
    CallEnd end{where_};
    end.name = name_;
    end.error = error;
    end.queued = started - start_;
    end.ran = ended - started;
    return end;
  }

 private:
  friend class CallRegistry;

  // Beside each other, as the worker touches nothing else while the call is in flight.
  std::atomic<State> state_{State::queued};
  std::atomic<int> asked_{0};  // the BridgeError::Kind that the call is cancelled for
  std::atomic<bool> over_{false};

  SourceLocation where_;
  std::string name_;
  SteadyTime start_{};
  SteadyTime deadline_ = (SteadyTime::max)();
  SteadyTime task_started_{};
  SteadyTime ended_{};
  SteadyTime slow_at_{};
  std::thread::id caller_{};
  pthread_t caller_handle_{};
};

/// The calls of a bridge: which are in flight, and how many have ended in which way. Knows all bridges of the process.
class CallRegistry : private ListNode {
 public:
  CallRegistry(const WaitNode& node, const ForkCounter& fork_counter, const Heartbeat& heartbeat,
               std::size_t max_in_flight)
      : node_(node), fork_counter_(fork_counter), heartbeat_(heartbeat), max_in_flight_(max_in_flight) {
    check_at_fork(failed_);
  }
  CallRegistry(const CallRegistry&) = delete;
  CallRegistry& operator=(const CallRegistry&) = delete;

  /// From now on the bridge is in reports, until `forget`. `probe` asks the worker to call `answer`.
  void introduce(void (*probe)(void* worker), void* worker) {
    probe_ = probe;
    worker_ = worker;
    const std::lock_guard lock(bridges_mutex);
    system_minus_steady =
        std::chrono::system_clock::now().time_since_epoch() - std::chrono::steady_clock::now().time_since_epoch();
    insert_before(bridges);
  }
  void forget() noexcept {
    const std::lock_guard lock(bridges_mutex);
    ListNode::remove();
  }

  /// A call was admitted.
  void add(CallRecord& call) noexcept {
    const std::lock_guard lock(calls_mutex_);
    call.insert_before(calls_);
    ++counts_.admitted;
    counts_.most_in_flight = (std::max)(counts_.most_in_flight, ++listed_);
  }

  /// A call has ended, or was refused.
  void remove(CallRecord& call, std::optional<BridgeError::Kind> error) noexcept {
    const std::lock_guard lock(calls_mutex_);
    if (!call.alone()) {
      call.ListNode::remove();
      --listed_;
    }
    ++count_of(error);
  }

  /// Not in a forked child, where somebody may have the lock for ever. Nor are the functions below.
  std::vector<CallInfo> calls() const {
    const SteadyTime now = std::chrono::steady_clock::now();
    std::vector<CallInfo> calls;
    const std::lock_guard lock(calls_mutex_);
    calls.reserve(listed_);
    for (const ListNode* node = &calls_.next(); node != &calls_; node = &node->next()) {
      const auto& call = static_cast<const CallRecord&>(*node);
      if (!call.over_.load(std::memory_order_relaxed)) calls.push_back(call.info(now));
    }
    return calls;
  }

  Stats stats() const noexcept {
    const std::lock_guard lock(calls_mutex_);
    return counts_;
  }

  /// Describes all bridges of this process, those in other modules included if the linker unites their symbols.
  static std::string report();

  /// The bridge admits no more calls.
  void set_closed() noexcept { closed_.store(true, std::memory_order_relaxed); }

  // ---- For `report`: whether the worker answers, while nobody tells of the rounds of its loop.

  /// Worker.
  void answer() noexcept { asked_at_.store(0); }

  /// Any thread: notes that the worker is asked now. False if it was asked before, and has not answered yet.
  bool ask() noexcept {
    SteadyTime::rep none = 0;
    return asked_at_.compare_exchange_strong(none, std::chrono::steady_clock::now().time_since_epoch().count());
  }

 private:
  std::uint64_t& count_of(std::optional<BridgeError::Kind> error) noexcept {
    if (!error) return counts_.values;
    switch (*error) {
      case BridgeError::WorkerDead: return counts_.worker_dead;
      case BridgeError::TimedOut: return counts_.timed_out;
      case BridgeError::Cancelled: return counts_.cancelled;
      case BridgeError::WouldDeadlock: return counts_.would_deadlock;
      case BridgeError::Overloaded: return counts_.overloaded;
      default: return counts_.response_lost;
    }
  }

  /// Calls the function with each bridge whose worker is in this process. The lock is held.
  template <class Function>
  static void for_each_bridge(Function function) {
    for (ListNode* node = &bridges.next(); node != &bridges; node = &node->next()) {
      auto& bridge = static_cast<CallRegistry&>(*node);
      if (!bridge.fork_counter_.forked()) function(bridge);
    }
  }

  void describe(std::ostream& out, SteadyTime now) const;
  void describe_worker(std::ostream& out, const std::vector<CallInfo>& calls, SteadyTime now) const;

  // Before main, like the fork counter's. A forked child finds the lock free.
  static inline std::mutex bridges_mutex;
  static inline const int failed_ = lock_around_fork<bridges_mutex>();
  static inline ListNode bridges;  // tools/gdb/runtime_bridge.py starts here

  // For the same script: a core file has a date, but no steady clock. Nothing else reads it, so an optimiser that sees
  // the whole program would remove it.
  [[gnu::used]] static inline std::chrono::nanoseconds system_minus_steady{};

  const WaitNode& node_;
  const ForkCounter& fork_counter_;
  const Heartbeat& heartbeat_;
  const std::size_t max_in_flight_;
  void (*probe_)(void* worker) = nullptr;
  void* worker_ = nullptr;
  std::atomic<SteadyTime::rep> asked_at_{0};  // 0: it has answered
  std::atomic<bool> closed_{false};

  alignas(cache_line) mutable std::mutex calls_mutex_;  // guards what follows
  ListNode calls_;
  std::size_t listed_ = 0;
  Stats counts_;
};

/// For people: milliseconds, or tenths of a second.
struct Seconds {
  friend std::ostream& operator<<(std::ostream& out, Seconds seconds) {
    const auto ms = std::chrono::duration_cast<std::chrono::milliseconds>(seconds.time).count();
    if (ms < 1000) return out << ms << " ms";
    return out << ms / 1000 << "." << ms % 1000 / 100 << " s";
  }

  SteadyTime::duration time;
};

/// Text that somebody else has chosen, its control characters escaped.
struct Printable {
  friend std::ostream& operator<<(std::ostream& out, Printable printable) {
    constexpr std::string_view digits = "0123456789abcdef";
    for (const char c : printable.text) {
      const auto byte = static_cast<unsigned char>(c);
      if (byte >= 0x20 && byte != 0x7f) {
        out << c;
      } else {
        out << "\\x" << digits[byte / 16] << digits[byte % 16];
      }
    }
    return out;
  }

  std::string_view text;
};

struct Quoted {
  friend std::ostream& operator<<(std::ostream& out, Quoted quoted) {
    return quoted.text.empty() ? out : out << " \"" << Printable{quoted.text} << '"';
  }

  std::string_view text;
};

inline void describe(std::ostream& out, const CallInfo& call, SteadyTime now) {
  constexpr std::array<const char*, 4> states{"queued", "waiting for its turn", "running", "cancelling"};
  out << "  " << states.at(static_cast<std::size_t>(call.state)) << ", " << Seconds{call.age} << " old: ";
  if (call.where.line() != 0) {
    out << Printable{call.where.file_name()} << ':' << call.where.line();
  } else {
    out << "place unknown";
  }
  out << Quoted{call.name};
  if (call.caller == std::thread::id()) {
    out << ", submitted";
  } else {
    out << ", called by thread " << call.caller << Quoted{call.caller_name};
  }
  if (call.deadline && *call.deadline > now) {
    out << ", deadline in " << Seconds{*call.deadline - now};
  } else if (call.deadline) {
    out << ", deadline passed " << Seconds{now - *call.deadline} << " ago";
  }
  out << '\n';
}

inline std::string CallRegistry::report() {
  const std::lock_guard lock(bridges_mutex);
  std::size_t number = 0;
  bool silent = false;
  for_each_bridge([&](CallRegistry& bridge) {
    ++number;
    if (bridge.heartbeat_.watched() || bridge.heartbeat_.busy_since() || !bridge.node_.has_worker()) return;
    bridge.probe_(bridge.worker_);
    silent = true;
  });
  // A worker that is not stuck answers within microseconds, or some milliseconds on a busy machine.
  const SteadyTime patience = std::chrono::steady_clock::now() + std::chrono::milliseconds(50);
  while (silent && std::chrono::steady_clock::now() < patience) {
    std::this_thread::sleep_for(std::chrono::microseconds(100));
    silent = false;
    for_each_bridge([&](const CallRegistry& bridge) { silent = silent || bridge.asked_at_ != 0; });
  }
  std::ostringstream out;
  out.imbue(std::locale::classic());
  out << "runtime_bridge: " << number << (number == 1 ? " bridge\n" : " bridges\n");
  const SteadyTime now = std::chrono::steady_clock::now();
  for_each_bridge([&](const CallRegistry& bridge) { bridge.describe(out, now); });
  return out.str();
}

inline void CallRegistry::describe(std::ostream& out, SteadyTime now) const {
  const std::vector<CallInfo> calls = this->calls();
  out << Printable{node_.name()} << '#' << node_.number() << ": " << calls.size()
      << (calls.size() == 1 ? " call" : " calls") << " in flight; ";
  describe_worker(out, calls, now);
  if (closed_ && node_.has_worker()) out << "; the bridge is being shut down";
  const auto waits = [](const CallInfo& call) { return call.state == State::waiting; };
  if (const auto waiting = std::count_if(calls.begin(), calls.end(), waits)) {
    out << "; " << waiting << (waiting == 1 ? " call waits" : " calls wait") << " for one of the " << max_in_flight_
        << " that run (max_in_flight)";
  }
  out << '\n';
  for (const CallInfo& call : calls) detail::describe(out, call, now);
}

inline void CallRegistry::describe_worker(std::ostream& out, const std::vector<CallInfo>& calls, SteadyTime now) const {
  const SteadyTime::rep asked_at = asked_at_;
  const std::optional<SteadyTime> told = heartbeat_.busy_since();
  const SteadyTime busy_since = told ? *told : asked_at != 0 ? SteadyTime(SteadyTime::duration(asked_at)) : now;
  const SteadyTime::duration busy = (std::max)(now - busy_since, SteadyTime::duration::zero());
  const auto runs = [](const CallInfo& call) {
    return call.state == State::running || call.state == State::cancelling;
  };
  if (!node_.has_worker()) {
    out << (closed_ ? "the worker has ended" : "the worker has not started");
  } else if (const std::string other = node_.waits_for(); !other.empty()) {
    out << "the worker has been waiting for " << Printable{other} << " for " << Seconds{busy};
  } else if (busy > std::chrono::milliseconds(50)) {
    out << "the worker has been busy for " << Seconds{busy} << ": some task computes or blocks";
  } else if (told) {
    out << "the worker is running";
  } else if (std::any_of(calls.begin(), calls.end(), runs)) {
    out << "the worker is idle: what the tasks wait for has not happened";
  } else {
    out << "the worker is idle";
  }
}

// =====================================================================================================================
// 11. Spin policy. Only about speed: calls have the same results without it.

/// Whether to try something that may be in vain. Exponential backoff: each failure doubles the attempts that are
/// skipped (at most 255), a success resets it. A guess, so races do no harm.
class Backoff {
 public:
  bool should_try() noexcept {
    const unsigned skips = skips_.load(std::memory_order_relaxed);
    if (skips != 0) skips_.store(skips - 1, std::memory_order_relaxed);
    return skips == 0;
  }

  void record(bool success) noexcept {
    const unsigned before = interval_.load(std::memory_order_relaxed);
    const unsigned interval = success ? 1 : before < 256 ? 2 * before : before;
    interval_.store(interval, std::memory_order_relaxed);
    skips_.store(interval - 1, std::memory_order_relaxed);
  }

 private:
  std::atomic<unsigned> interval_{1};  // one attempt in so many is made
  std::atomic<unsigned> skips_{0};
};

inline namespace RUNTIME_BRIDGE_FLAVOUR {

/// Busy-waits of callers and of the worker, since waking a thread that sleeps takes far longer than a short call.
class SpinPolicy {
 public:
  SpinPolicy(Context& context, const Gate<Context>& gate, std::chrono::microseconds limit) noexcept
      : context_(context), gate_(gate), limit_(limit) {}

  /// Caller: busy-waits until `done`, if that is promising. True if it is done. `now` is the time of the call.
  template <class Done>
  bool spin(SteadyTime now, Done done) noexcept {
    // Branch not covered: needs a machine with one core.
    if (one_core_ || limit_ <= std::chrono::microseconds::zero() || !spins_.should_try()) return false;
    const auto alone = [&] { return gate_.in_flight() <= 1; };
    const SteadyTime end = time_after(limit_, now);
    spinners_.fetch_add(1, std::memory_order_relaxed);
    bool is_done = false;
    bool yields = true;
    int turns = 64;
    do {
      for (int i = 0; i < 32 && !is_done && alone(); ++i) {
        pause();
        is_done = done();
      }
      if (is_done) break;
      yields = yields && yield();
      is_done = done();
    } while (!is_done && (alone() ? std::chrono::steady_clock::now() < end : yields && --turns > 0));
    spinners_.fetch_sub(1, std::memory_order_relaxed);
    spins_.record(is_done);
    return is_done;
  }

  /// Worker: whether a caller busy-waits.
  bool has_spinners() const noexcept { return spinners_.load(std::memory_order_relaxed) != 0; }

  /// Worker: a call has arrived.
  void note_call() noexcept {
    called_ = true;
    lone_calls_ = gate_.in_flight() > 1 ? 0 : (std::min)(lone_calls_ + 1, 100);
  }

  /// Worker: a caller that busy-waited has its result, and may soon call again. Do not sleep for a while.
  void stay_awake() noexcept {
    if (polling_) {
      polls_.record(true);
    } else if (!polls_.should_try()) {
      return;
    }
    called_ = false;
    rounds_ = 0;
    end_ = time_after(limit_);
    if (!std::exchange(polling_, true)) poll();
  }

  /// Worker: no more of it, the loop is to end.
  void stop() noexcept { stopped_ = true; }

 private:
  /// Posts a handler that posts itself again, which keeps the loop from sleeping and lets everything else through. In
  /// between it leaves the loop's lock alone, for threads that post. It goes on while a caller busy-waits, since what
  /// the task waits for may be about to arrive.
  void poll() {
    context_.post(memory_, [this] {
      if (stopped_) return;
      for (int i = 0; i < 32 && gate_.in_flight() == 0; ++i) pause();
      // After a long row of lone calls nobody needs the processor for the first rounds, while the next one runs.
      if (gate_.in_flight() != 0 && (lone_calls_ < 100 || ++rounds_ > 4)) yield();
      const bool awaited = !called_ || has_spinners();
      if (awaited && std::chrono::steady_clock::now() < end_) return poll();
      polling_ = false;
      polls_.record(called_);
    });
  }

  /// Lets other threads have the processor: one of them may make the next call, or bring the result. A thread that
  /// computes keeps the processor for milliseconds, though, and any thread that wakes up would preempt it anyway. So
  /// after such a yield nobody yields for a while, and this returns false.
  bool yield() noexcept {
    const SteadyTime before = std::chrono::steady_clock::now();
    if (before < no_yields_until_.load(std::memory_order_relaxed)) return false;
    std::this_thread::yield();
    const SteadyTime after = std::chrono::steady_clock::now();
    if (after - before < std::chrono::milliseconds(1)) return true;
    no_yields_until_.store(after + std::chrono::milliseconds(100), std::memory_order_relaxed);
    return false;
  }

  Context& context_;
  const Gate<Context>& gate_;
  const std::chrono::microseconds limit_;
  const bool one_core_ = std::thread::hardware_concurrency() == 1;

  // Shared.
  Backoff spins_;
  std::atomic<int> spinners_{0};  // callers that busy-wait
  std::atomic<SteadyTime> no_yields_until_{(SteadyTime::min)()};

  // The worker's.
  alignas(cache_line) Backoff polls_;
  HandlerMemory memory_;
  SteadyTime end_;
  int rounds_ = 0;      // since polling began, with a call in flight
  int lone_calls_ = 0;  // in a row, at most 100
  bool polling_ = false;
  bool called_ = false;  // since polling began
  bool stopped_ = false;
};

// =====================================================================================================================
// 12. Call reference

class Call;

/// The base of a call that its references know.
class Counted {
 public:
  Counted() = default;
  Counted(const Counted&) = delete;
  Counted& operator=(const Counted&) = delete;

 protected:
  virtual ~Counted() = default;

 private:
  friend class CallRef;

  /// The last reference is gone.
  virtual void complete() noexcept = 0;

  std::atomic<int> references_{0};
};

/// Counted reference to a call. The last one completes the call and wakes the caller. It cannot be lost: whether the
/// task returns, throws, is destroyed or never starts, the reference is destroyed with whatever holds it.
class CallRef {
 public:
  /// The first reference to a call.
  static CallRef first(Counted& counted, Call& call) noexcept {
    counted.references_.store(1, std::memory_order_relaxed);
    return {counted, call};
  }

  /// One more, unless the call has no reference: it was completed, or never sent.
  static std::optional<CallRef> another(Counted& counted, Call& call) noexcept {
    int references = counted.references_.load(std::memory_order_relaxed);
    do {
      if (references == 0) return std::nullopt;
      // Branch not covered: needs two threads at once.
    } while (!counted.references_.compare_exchange_weak(references, references + 1));
    return CallRef(counted, call);
  }

  CallRef(CallRef&& other) noexcept : counted_(std::exchange(other.counted_, nullptr)), call_(other.call_) {}
  CallRef& operator=(CallRef&&) = delete;
  ~CallRef() {
    if (counted_ && counted_->references_.fetch_sub(1) == 1) counted_->complete();
  }

  Call& call() const noexcept { return *call_; }

 private:
  CallRef(Counted& counted, Call& call) noexcept : counted_(&counted), call_(&call) {}

  Counted* counted_;
  Call* call_;
};

// =====================================================================================================================
// 13. Cancellation signals. All of it is for the worker.

/// What an emission does to a task.
enum class Emission {
  cancel,  ///< Asio's default: aborts what the task waits for, and every later co_await throws.
  abort,   ///< The worker is being stopped: aborts what the task waits for, but the task is not marked as cancelled. A
           ///< loop that swallows every exception would then run on without waiting, and could not be destroyed.
  mark,    ///< Operations are about to be destroyed: marks the task as cancelled, but aborts nothing.
};

/// Cancellation signal of a running task. Pooled, because Asio uses the slot shortly after completion.
struct CancelSignal {
  explicit CancelSignal(const Emission& e) noexcept : emission(e) {}

  const Emission& emission;
  net::cancellation_signal signal;
  Call* call = nullptr;              // null unless the task runs
  bool marked = false;               // the task is marked as cancelled
  std::optional<CallRef> destroyed;  // the call of a task that was destroyed, to be completed once the slot is cleared
  CancelSignal* next_free = nullptr;
};

/// The worker's signals. They are never destroyed before it.
class CancelSignals {
 public:
  explicit CancelSignals(const Context& context) noexcept : context_(context) {}

  /// A signal for one task. As the completion handler of `co_spawn` it drops the exceptions of the coroutine, which has
  /// none, and returns the signal when Asio does not use it any more.
  class Lease {
   public:
    explicit Lease(CancelSignals& pool) : pool_(&pool), signal_(&pool.take()) {}
    Lease(Lease&& other) noexcept : pool_(std::exchange(other.pool_, nullptr)), signal_(other.signal_) {}
    Lease& operator=(Lease&&) = delete;
    ~Lease() {
      if (pool_) pool_->give_back(*signal_);
    }

    CancelSignal& signal() const noexcept { return *signal_; }

    // Not `bind_cancellation_slot`: with that, Asio 1.26 posts what is emitted outside of the loop, and uses the task's
    // memory then, even if the task was destroyed before.
    using cancellation_slot_type = net::cancellation_slot;
    cancellation_slot_type get_cancellation_slot() const noexcept { return signal_->signal.slot(); }

    void operator()(const std::exception_ptr&) const noexcept {}

   private:
    CancelSignals* pool_;
    CancelSignal* signal_;
  };

  Emission emission() const noexcept { return emission_; }

  /// Cancels a task. Handlers that call this run before operations are destroyed: they were queued before the stop.
  void cancel(CancelSignal& signal) noexcept {
    signal.marked = true;
    emit(signal);
  }

  /// Emits to each running task whose call meets the condition.
  template <class Condition>
  void emit_to_all(Emission emission, Condition condition) noexcept {
    emission_ = emission;
    // An emission may run other tasks to their end, but removes no signal.
    for (CancelSignal& signal : signals_) {
      // Branch not covered: needs a call that ends or was cancelled at this moment.
      if (signal.call && condition(*signal.call)) emit(signal);
    }
  }

  /// How many tasks were destroyed, instead of ending.
  std::size_t destroyed() const noexcept { return destroyed_; }

 private:
  CancelSignal& take() {
    if (!free_) free_ = &signals_.emplace_front(emission_);
    return *std::exchange(free_, free_->next_free);
  }

  void give_back(CancelSignal& signal) noexcept {
    if (signal.destroyed) {
      // The destroyed operation has left its handler in the slot, with whatever that captured.
      signal.signal.slot().clear();
      ++destroyed_;
    }
    const std::optional<CallRef> completes_call = std::exchange(signal.destroyed, std::nullopt);
    signal.next_free = std::exchange(free_, &signal);
  }

  void emit(CancelSignal& signal) noexcept {
    if (emission_ != Emission::abort) signal.marked = true;
    try {
      signal.signal.emit(net::cancellation_type::terminal);
    } catch (...) {
      context_.report_stray();
    }
  }

  const Context& context_;
  Emission emission_ = Emission::cancel;
  std::size_t destroyed_ = 0;
  std::forward_list<CancelSignal> signals_;
  CancelSignal* free_ = nullptr;
};

/// Filter of a task's cancellation state: what marks it as cancelled.
struct MarksTask {
  const CancelSignal* signal;
  net::cancellation_type operator()(net::cancellation_type type) const noexcept {
    const bool only_aborts = signal->emission == Emission::abort && !signal->marked;
    return only_aborts ? net::cancellation_type::none : type & net::cancellation_type::terminal;
  }
};

/// Filter of a task's cancellation state: what aborts the operation that it waits for.
struct AbortsOperation {
  const CancelSignal* signal;
  net::cancellation_type operator()(net::cancellation_type marks) const noexcept {
    switch (signal->emission) {
      case Emission::abort: return net::cancellation_type::terminal;
      case Emission::mark: return net::cancellation_type::none;
      default: return marks;
    }
  }
};

// =====================================================================================================================
// 14. Call

class Worker;

/// A call in flight: where caller and worker meet. It lives on its caller's stack, or is shared with its `JoinHandle`.
class Call : public Counted {
 public:
  ~Call() override = default;

  // ---- The caller's: before the call is sent, and once it is completed.

  bool completed() const noexcept { return wait_for(std::chrono::nanoseconds::zero()); }

  bool wait_for(std::chrono::nanoseconds time) const { return completed_.wait_for(time) == std::future_status::ready; }

  /// Waits until the call is completed, or until `deadline`, of any clock. False if it is not completed.
  template <class Clock, class Duration>
  bool wait_until(const std::chrono::time_point<Clock, Duration>& deadline) const {
    while (deadline != (deadline.max)()) {
      const std::chrono::nanoseconds left = time_left(deadline);
      if (wait_for(left)) return true;
      if (left == std::chrono::nanoseconds::zero()) return false;
    }
    completed_.wait();
    return true;
  }

  /// Completes a submitted call that was not sent.
  void refuse(BridgeError error) {
    release_task();
    error_ = std::move(error);
    (void)settle();
    completion_.set_value();
  }

  /// Makes the first reference, for the worker. A submitted call lives until it is completed, even if nobody waits for
  /// it, so it is given itself.
  CallRef send_to(Worker& worker, std::shared_ptr<Call> self) noexcept {
    worker_ = &worker;
    self_ = std::move(self);
    return CallRef::first(*this, *this);
  }

  /// Calls what `submit` was given for the end of the call, which is over. Throws what that throws.
  virtual void tell_end() {}

  /// Why a call that is over has no value.
  const BridgeError& error() const noexcept { return *error_; }
  std::optional<BridgeError::Kind> error_kind() const noexcept {
    return error_ ? std::optional(error_->kind()) : std::nullopt;
  }

  // ---- The worker's: from `send_to` until the call is completed.

  /// Starts the task.
  virtual void start(CallRef self) noexcept = 0;

  /// Destroys the task, if the call owns it.
  virtual void release_task() noexcept = 0;

  Worker& worker() const noexcept { return *worker_; }
  HandlerMemory& start_memory() noexcept { return start_memory_; }

  CancelSignal* signal() const noexcept { return signal_; }
  void set_signal(CancelSignal* signal) noexcept { signal_ = signal; }

  // Whether the task has started, returned or thrown. `stopped` tells that the worker is being stopped.
  void set_starting() noexcept { stage_ = Stage::starting; }
  void set_running() noexcept { stage_ = Stage::running; }
  void set_returned() noexcept { stage_ = Stage::ended; }
  void set_threw(bool stopped) noexcept {
    stage_ = Stage::ended;
    if (stopped) {
      lose(stopped_text);
    } else if (const int kind = record_.asked()) {
      error_.emplace(static_cast<BridgeError::Kind>(kind), std::current_exception());
    } else {
      error_ = thrown();
    }
  }

  /// Destroys what is left of the task. What has neither returned nor thrown until now has no value.
  void end(bool stopped) noexcept {
    release_task();
    const int asked = record_.asked();
    if (stage_ == Stage::queued && asked != 0) {
      error_.emplace(static_cast<BridgeError::Kind>(asked));
    } else if (stage_ == Stage::starting) {
      lose("the task did not start", std::make_exception_ptr(std::bad_alloc()));
    } else if (stage_ != Stage::ended) {
      lose(stopped ? stopped_text : "the task was destroyed before its end");
    }
  }

  /// What wakes the caller. The call may be gone when this returns, and is when the caller wakes.
  std::promise<void> take_completion() noexcept {
    std::promise<void> completion = std::move(completion_);
    const std::shared_ptr<Call> self = std::exchange(self_, nullptr);
    return completion;
  }

  /// Whether the call was submitted. Not once it is completed.
  bool submitted() const noexcept { return self_ != nullptr; }

  // The call's place in the row of those that wait for their turn, and whether it has had it.

  void wait_for_turn(CallRef self, ListNode& row) noexcept {
    record_.set_state(State::waiting);
    turn_.emplace(std::move(self), *this);
    turn_->insert_before(row);
  }
  static Call& first_of(const ListNode& row) noexcept { return static_cast<Turn&>(row.next()).call; }
  bool waits_for_turn() const noexcept { return turn_.has_value(); }
  CallRef end_wait_for_turn() noexcept {
    turn_->remove();
    CallRef self = std::move(turn_->self);
    turn_.reset();
    return self;
  }

  void set_has_turn() noexcept { has_turn_ = true; }
  bool has_turn() const noexcept { return has_turn_; }

  // ---- Shared.

  CallRecord& record() noexcept { return record_; }
  const CallRecord& record() const noexcept { return record_; }

  /// A reference for another thread than the worker, unless the call is completed or was never sent.
  std::optional<CallRef> reference() noexcept { return CallRef::another(*this, *this); }

  /// For the handler that cancels the call. There is one at most, since `ask` succeeds once.
  HandlerMemory& cancel_memory() noexcept { return cancel_memory_; }

  WaitRecord& wait_record() noexcept { return wait_record_; }

  /// Tells that no handle owns the call any more. The handle still keeps it, since other threads may use the handle.
  /// True if the call has ended before, so that nobody has seen its error.
  bool detach() noexcept { return fate_.fetch_or(is_detached) == is_settled; }
  bool detached() const noexcept { return fate_.load(std::memory_order_relaxed) & is_detached; }

  /// Tells that the error is what it will be, if there is one. True if the call was detached before.
  bool settle() noexcept { return fate_.fetch_or(is_settled) & is_detached; }

 protected:
  Call() = default;

  /// The error for the exception that is being handled.
  static BridgeError thrown() noexcept {
    return {BridgeError::ResponseLost, std::current_exception(), static_text("the task threw")};
  }

 private:
  enum class Stage { queued, starting, running, ended };
  static constexpr int is_settled = 1;
  static constexpr int is_detached = 2;

  struct Turn : ListNode {
    Turn(CallRef s, Call& c) noexcept : self(std::move(s)), call(c) {}

    CallRef self;
    Call& call;
  };

  static constexpr const char* stopped_text = "the worker was stopped under the task";

  RUNTIME_BRIDGE_INLINE void complete() noexcept override;

  void lose(const char* text, std::exception_ptr cause = nullptr) noexcept {
    error_.emplace(BridgeError::ResponseLost, std::move(cause), static_text(text));
  }

  std::promise<void> completion_;
  const std::future<void> completed_ = completion_.get_future();
  std::shared_ptr<Call> self_;

  Worker* worker_ = nullptr;
  CancelSignal* signal_ = nullptr;  // while the task runs
  Stage stage_ = Stage::queued;
  std::optional<BridgeError> error_;
  HandlerMemory start_memory_;

  std::atomic<int> fate_{0};
  bool has_turn_ = false;  // the worker's, and that of whoever completes the call
  WaitRecord wait_record_;
  CallRecord record_;
  std::optional<Turn> turn_;
  HandlerMemory cancel_memory_;
};

// =====================================================================================================================
// 15. Worker

/// The thread, its loop and its end. Co-owned by the bridge, the thread, the handles and each caller.
class Worker : public std::enable_shared_from_this<Worker> {
 public:
  explicit Worker(Options options);
  ~Worker();
  Worker(const Worker&) = delete;
  Worker& operator=(const Worker&) = delete;

  net::io_context::executor_type get_executor() noexcept;
  std::size_t in_flight() const noexcept { return has_turns() ? running_.load() : gate_.in_flight(); }
  std::vector<CallInfo> calls() const { return forked() ? std::vector<CallInfo>() : registry_.calls(); }
  Stats stats() const noexcept;
  bool forked() const noexcept { return fork_counter_.forked(); }
  bool on_worker() const noexcept { return node_.on_worker(); }
  WaitNode& node() noexcept { return node_; }

  /// Makes the thread, unless that was done before or no calls are admitted any more.
  void start();

  /// Sends the call to the worker and waits until it is completed. If it is not sent, returns why.
  template <class Clock, class Duration>
  std::optional<BridgeError> block(Call& call, const std::chrono::time_point<Clock, Duration>& deadline,
                                   const Stop& stop, const SourceLocation& where, std::string* name);

  /// Sends the call to the worker, or completes it with the reason why it is not sent.
  void submit(std::shared_ptr<Call> call, const SourceLocation& where, std::string* name);

  /// Waits until the call is completed, and tells of a slow call. If the call is to be cancelled before, returns why:
  /// `deadline`, of any clock, has passed, or `poll`, which may be null, has requested a stop.
  template <class Clock, class Duration>
  std::optional<BridgeError::Kind> wait(Call& call, const std::chrono::time_point<Clock, Duration>& deadline,
                                        Poll* poll) const;
  void wait(Call& call) const noexcept { (void)wait(call, (SteadyTime::max)(), nullptr); }

  /// The call is over, or was refused.
  void note_end(Call& call, std::optional<BridgeError::Kind> error) noexcept;

  /// Tells who submitted the call that it is over.
  void tell_end(Call& call) const noexcept;

  /// Nobody will ask for the result of the call, which is over.
  void note_unjoined(const Call& call) const noexcept;

  /// Asks the worker to cancel the call, unless it is completed or was cancelled before.
  void cancel(Call& call, BridgeError::Kind why) noexcept;

  /// Admits no more calls, ends the worker once those in flight are over or at `deadline`, and waits for that. False if
  /// calls were cut off. `last` if the bridge is being destroyed: a worker that cannot be waited for ends by itself.
  bool shut_down(Shutdown how, SteadyTime deadline, bool last) noexcept;

  /// Never destroys this owner, but keeps it where a leak checker finds it. For the child of a fork, where nothing in
  /// here can be destroyed without the worker, and for a thread that outlives the bridge.
  static void leak(std::shared_ptr<Worker> worker) noexcept {
    Worker& self = *worker;
    self.leaked_before_ = leaked_.exchange(&self);
    self.leaked_owner_ = std::move(worker);
  }

  // ---- For the parts below, on the worker.

  CancelSignals& signals() noexcept { return signals_; }

  bool stopped() const noexcept { return mode_ == Mode::stopped; }

  /// Whether operations were destroyed. A value that a task returns after that is worth nothing: reads and writes on
  /// services that were shut down succeed with no bytes.
  bool has_destroyed() const noexcept { return signals_.emission() == Emission::mark; }

  /// The last reference to the call is gone. On any thread: a reference may be destroyed before it came to the worker.
  void complete(Call& call) noexcept;

 private:
  /// Only moves forward, on the worker.
  enum class Mode {
    open,
    cancelling,  // calls that arrive are cancelled
    stopped,     // calls that arrive are destroyed
  };

  /// Admits the call and sends it to the worker, or returns why not. Whatever happens, a call that was sent will be
  /// completed. A caller that is going to wait for it gives `wait`, others give `self`, which then keeps the call: it
  /// is moved from, so that the worker may be the one to destroy the call.
  std::optional<BridgeError> send(Call& call, WaitScope* wait, std::shared_ptr<Call>* self);

  /// Starts a call that has arrived, unless it was cancelled or the worker is being stopped. Or lets it wait.
  void begin(CallRef ref) noexcept;

  void start_task(CallRef ref) noexcept;

  /// Tells of a slow call, if it is time to.
  void note_slow(CallRecord& call) const noexcept;

  // `max_in_flight` with `WhenFull::wait`. The calls that wait for their turn are the worker's, like all others that
  // were sent. A call that is completed on another thread sees whoever has begun to wait, or is seen by the worker.

  bool has_turns() const noexcept {
    return options_.when_full == WhenFull::wait && options_.max_in_flight != unlimited;
  }

  /// Starts the calls whose turn it is.
  void give_turns() noexcept;

  /// A call that had its turn is over. Any thread.
  void end_turn() noexcept;

  /// Completes the calls that wait for their turn.
  void release_waiting() noexcept;

  CallRef take_from_row(Call& call) noexcept {
    waiting_.fetch_sub(1);
    return call.end_wait_for_turn();
  }

  /// Asks the worker to answer, for a report.
  void probe() noexcept;

  /// Cancels all calls in flight, those that have not arrived yet included. Once is enough: no more calls are admitted.
  void cancel_all() noexcept;

  /// Ends the loop, unless it has ended: what the worker does after it must not be cut short.
  void stop() noexcept;

  void run() noexcept;

  /// Ends the calls in flight. Tasks are cancelled while everything that they wait for is alive. They are destroyed
  /// only if that does not end them, and nothing is emitted afterwards: a cancellation must not reach what was
  /// destroyed. Returns how many operations were destroyed, if nothing foreign was involved: what a destroyed operation
  /// leaves in Asio's count of work looks like a foreign thread.
  std::size_t end_calls() noexcept;

  /// Lets the thread end by itself.
  void detach() noexcept;

  static inline std::atomic<Worker*> leaked_{nullptr};  // a list

  const Options options_;
  const ForkCounter fork_counter_;
  std::atomic<bool> started_{false};
  std::atomic<bool> cancel_asked_{false};
  WaitNode node_{options_.thread_name};
  alignas(cache_line) Gate<Context> gate_{context_};
  SpinPolicy spin_{context_, gate_, options_.spin_limit};
  HandlerMemory cancel_memory_;
  HandlerMemory probe_memory_;
  HandlerMemory turns_memory_;
  std::atomic<bool> turns_posted_{false};
  std::atomic<std::size_t> running_{0};  // calls that have their turn
  std::atomic<std::size_t> waiting_{0};  // those in `row_`
  Heartbeat heartbeat_;
  CallRegistry registry_{node_, fork_counter_, heartbeat_, options_.max_in_flight};

  // The worker's.
  Mode mode_ = Mode::open;
  ListNode row_;  // of calls that wait for their turn
  CancelSignals signals_{context_};

  alignas(cache_line) Context context_{options_.on_stray_exception,
                                       heartbeat_};  // below what its handlers use when they are destroyed with it

  Worker* leaked_before_ = nullptr;
  std::shared_ptr<Worker> leaked_owner_;

  std::mutex mutex_;  // guards what follows
  std::condition_variable changed_;
  std::thread thread_;
  bool ended_ = true;     // the loop is not running
  bool joined_ = true;    // no thread is running
  bool cut_off_ = false;  // the loop was stopped under calls
};

/// Notes the end of a call when its caller leaves.
class EndOfCall {
 public:
  EndOfCall(Worker& worker, Call& call) noexcept : worker_(worker), call_(call) {}
  EndOfCall(const EndOfCall&) = delete;
  EndOfCall& operator=(const EndOfCall&) = delete;
  ~EndOfCall() { worker_.note_end(call_, call_.error_kind()); }

 private:
  Worker& worker_;
  Call& call_;
};

template <class Clock, class Duration>
std::optional<BridgeError> Worker::block(Call& call, const std::chrono::time_point<Clock, Duration>& deadline,
                                         const Stop& stop, const SourceLocation& where, std::string* name) {
  const SteadyTime now = std::chrono::steady_clock::now();
  const SteadyTime steady_deadline = on_steady_clock(deadline, now);
  call.record().describe(where, name, now);
  call.record().set_caller(steady_deadline);
  const auto refused = [&](BridgeError&& error) {
    note_end(call, error.kind());
    return std::move(error);
  };
  if (stop.token().stop_requested() || (stop.poll() && stop.poll()->ask())) {
    return refused({BridgeError::Cancelled, nullptr, static_text("a stop was requested before the call")});
  }
  if (steady_deadline <= now) {
    return refused({BridgeError::TimedOut, nullptr, static_text("the deadline had passed before the call")});
  }
  WaitScope wait_scope;
  if (auto refusal = send(call, &wait_scope, nullptr)) return refused(*std::move(refusal));
  const EndOfCall end(*this, call);
  const auto on_stop = [&]() noexcept { cancel(call, BridgeError::Cancelled); };
  const StopCallback<decltype(on_stop)> callback(stop.token(), on_stop);
  try {
    if (spin_.spin(now, [&] { return call.completed(); })) return std::nullopt;
    if (const auto why = wait(call, deadline, stop.poll())) {
      cancel(call, *why);
      wait(call);
    }
  } catch (...) {  // from the clock or the predicate
    cancel(call, BridgeError::Cancelled);
    wait(call);
    throw;
  }
  return std::nullopt;
}

template <class Clock, class Duration>
std::optional<BridgeError::Kind> Worker::wait(Call& call, const std::chrono::time_point<Clock, Duration>& deadline,
                                              Poll* poll) const {
  const bool tells = static_cast<bool>(options_.on_slow_call);
  if (!tells && !poll) return call.wait_until(deadline) ? std::nullopt : std::optional(BridgeError::TimedOut);
  SteadyTime poll_at = poll ? time_after(poll->interval) : (SteadyTime::max)();
  for (;;) {
    const std::chrono::nanoseconds left = time_left(deadline);
    const SteadyTime slow_at = tells ? call.record().slow_at(options_.slow_after) : (SteadyTime::max)();
    if (call.wait_for((std::min)({left, time_left(slow_at), time_left(poll_at)}))) return std::nullopt;
    if (left == std::chrono::nanoseconds::zero()) return BridgeError::TimedOut;
    if (tells) note_slow(call.record());
    if (!poll || !has_passed(poll_at)) continue;
    if (poll->ask()) return BridgeError::Cancelled;
    poll_at = time_after(poll->interval);
  }
}

RUNTIME_BRIDGE_COMPILE_ONCE(std::optional<BridgeError> Worker::block(Call&, const SteadyTime&, const Stop&,
                                                                     const SourceLocation&, std::string*))
RUNTIME_BRIDGE_COMPILE_ONCE(std::optional<BridgeError::Kind> Worker::wait(Call&, const SteadyTime&, Poll*) const)

// What is compiled once, if that is asked for. In the order of a call's life, and then of the worker's.
#ifndef RUNTIME_BRIDGE_DECLARATIONS_ONLY

RUNTIME_BRIDGE_INLINE std::optional<BridgeError> Worker::send(Call& call, WaitScope* wait,
                                                              std::shared_ptr<Call>* self) {
  const auto dead = [](const char* why, std::exception_ptr cause = nullptr) {
    return BridgeError(BridgeError::WorkerDead, std::move(cause), static_text(why));
  };
  if (forked()) return dead("the worker lives in the parent process");
  try {
    start();
    // Branch not covered: nothing else is thrown.
  } catch (const std::system_error&) {
    return dead("the worker could not be started", std::current_exception());
  }
  auto admission = gate_.admit_call(has_turns() ? unlimited : options_.max_in_flight);
  if (!admission && gate_.closed_to_calls()) return dead("the worker was stopped");
  if (!admission) return BridgeError(BridgeError::Overloaded);
  std::shared_ptr<const char> ring;
  if (wait && !wait->begin(node_, &call.wait_record(), &ring)) {
    return BridgeError(BridgeError::WouldDeadlock, nullptr, std::move(ring));
  }
  admission.sent();
  registry_.add(call.record());
  context_.post(call.start_memory(), [ref = call.send_to(*this, self ? std::move(*self) : nullptr)]() mutable {
    Worker& worker = ref.call().worker();
    worker.begin(std::move(ref));
  });
  return std::nullopt;
}

RUNTIME_BRIDGE_INLINE void Worker::begin(CallRef ref) noexcept {
  Call& call = ref.call();
  spin_.note_call();
  if (mode_ == Mode::cancelling) call.record().ask(BridgeError::Cancelled);
  if (mode_ == Mode::stopped || call.record().asked() != 0) {
    call.release_task();  // here, and not wherever the last reference is destroyed
  } else if (has_turns()) {
    waiting_.fetch_add(1);
    call.wait_for_turn(std::move(ref), row_);
    give_turns();
  } else {
    start_task(std::move(ref));
  }
}

RUNTIME_BRIDGE_INLINE void Worker::start_task(CallRef ref) noexcept {
  Call& call = ref.call();
  call.record().set_state(State::running);
  if (options_.on_call_end) call.record().set_task_started();
  const Heartbeat::Step step(heartbeat_);
  call.start(std::move(ref));
}

RUNTIME_BRIDGE_INLINE void Worker::give_turns() noexcept {
  while (!row_.alone() && running_ < options_.max_in_flight) {
    Call& call = Call::first_of(row_);
    CallRef ref = take_from_row(call);
    if (call.record().asked() != 0) continue;
    running_.fetch_add(1);
    call.set_has_turn();
    start_task(std::move(ref));
  }
}

RUNTIME_BRIDGE_INLINE void Worker::end_turn() noexcept {
  running_.fetch_sub(1);
  if (waiting_ == 0 || turns_posted_.exchange(true)) return;
  const auto admission = gate_.admit_post();
  if (!admission) return;  // the worker is being stopped, and completes those that wait
  context_.post(turns_memory_, [this] {
    turns_posted_ = false;
    give_turns();
  });
}

RUNTIME_BRIDGE_INLINE void Worker::release_waiting() noexcept {
  while (!row_.alone()) {
    Call& call = Call::first_of(row_);
    const CallRef ref = take_from_row(call);
    if (mode_ == Mode::cancelling) call.record().ask(BridgeError::Cancelled);
    call.release_task();
  }
}

RUNTIME_BRIDGE_INLINE void Worker::complete(Call& call) noexcept {
  const bool here = on_worker();
  const bool cut_off = here && stopped();
  call.end(cut_off);
  if (options_.on_call_end) call.record().set_ended();
  call.record().set_over();
  if (call.submitted()) {
    note_end(call, call.error_kind());
    if (call.settle()) note_unjoined(call);
    tell_end(call);
  }
  node_.complete(call.wait_record());
  if (call.has_turn()) end_turn();
  std::promise<void> completion = call.take_completion();
  gate_.end_call();
  const bool stay_awake = here && !cut_off && spin_.has_spinners();
  completion.set_value();
  if (stay_awake) spin_.stay_awake();
}

RUNTIME_BRIDGE_INLINE void Worker::cancel(Call& call, BridgeError::Kind why) noexcept {
  if (forked()) return;
  const auto admission = gate_.admit_post();
  if (!admission) return;
  std::optional<CallRef> ref = call.reference();  // so that the handler below runs before the call is completed
  if (!ref || !call.record().ask(why)) return;
  // An emission on another thread than the worker would be a data race inside Asio.
  context_.post(call.cancel_memory(), [r = *std::move(ref)] {
    Call& cancelled = r.call();
    Worker& worker = cancelled.worker();
    if (CancelSignal* const signal = cancelled.signal()) {
      worker.signals_.cancel(*signal);
    } else if (cancelled.waits_for_turn()) {
      const CallRef out_of_row = worker.take_from_row(cancelled);
    }
  });
}

// Here, because it needs Worker.
RUNTIME_BRIDGE_INLINE void Call::complete() noexcept { worker_->complete(*this); }

RUNTIME_BRIDGE_INLINE void Worker::submit(std::shared_ptr<Call> call, const SourceLocation& where, std::string* name) {
  call->record().describe(where, name, std::chrono::steady_clock::now());
  auto refusal = send(*call, nullptr, &call);
  if (!refusal) return;
  note_end(*call, refusal->kind());
  call->refuse(*std::move(refusal));
  tell_end(*call);
}

RUNTIME_BRIDGE_INLINE void Worker::note_end(Call& call, std::optional<BridgeError::Kind> error) noexcept {
  if (forked()) return;
  registry_.remove(call.record(), error);
  if (options_.on_call_end) call_hook(options_.on_call_end, call.record().end(error));
}

RUNTIME_BRIDGE_INLINE void Worker::tell_end(Call& call) const noexcept {
  try {
    call.tell_end();
  } catch (...) {
    if (!forked()) context_.report_stray();
  }
}

RUNTIME_BRIDGE_INLINE void Worker::note_slow(CallRecord& call) const noexcept {
  const SteadyTime now = std::chrono::steady_clock::now();
  if (forked() || now < call.slow_at(options_.slow_after)) return;
  try {
    options_.on_slow_call(call.info(now));
  } catch (...) {
  }
  call.set_slow_at(time_after(now - call.start(), now));
}

RUNTIME_BRIDGE_INLINE void Worker::note_unjoined(const Call& call) const noexcept {
  if (!options_.on_unjoined_error || !call.error_kind() || forked()) return;
  const BridgeError& error = call.error();
  // A task that was cancelled and has ended because of that has not failed.
  if (error == BridgeError::Cancelled && !error.cause()) return;
  try {
    if (error == BridgeError::Cancelled) std::rethrow_exception(error.cause());
  } catch (const AsioError& e) {
    if (e.code() == net::error::operation_aborted) return;
  } catch (...) {
  }
  call_hook(options_.on_unjoined_error, error);
}

RUNTIME_BRIDGE_INLINE Worker::Worker(Options options) : options_(std::move(options)) {
  if (options_.max_in_flight == 0) {
    throw std::system_error(std::make_error_code(std::errc::invalid_argument), "runtime_bridge: max_in_flight is zero");
  }
  registry_.introduce([](void* worker) { static_cast<Worker*>(worker)->probe(); }, this);
}

RUNTIME_BRIDGE_INLINE Worker::~Worker() { registry_.forget(); }

RUNTIME_BRIDGE_INLINE void Worker::probe() noexcept {
  if (!registry_.ask()) return;
  const auto admission = gate_.admit_post();
  if (!admission) return registry_.answer();
  context_.post(probe_memory_, [this] { registry_.answer(); });
}

RUNTIME_BRIDGE_INLINE net::io_context::executor_type Worker::get_executor() noexcept {
  // Who builds an I/O object makes Asio open the reactor. It must be ours.
  if (!context_.has_reactor() && !forked()) {
    const std::lock_guard lock(mutex_);
    try {
      context_.open_reactor();
    } catch (...) {
      // The caller's I/O object will fail in the same way, and the first call.
    }
  }
  return context_.get_executor();
}

RUNTIME_BRIDGE_INLINE Stats Worker::stats() const noexcept {
  if (forked()) return {};
  Stats stats = registry_.stats();
  // The gate counts a call before the registry does.
  stats.in_flight = static_cast<std::size_t>((std::min)(std::uint64_t{in_flight()}, stats.admitted));
  return stats;
}

RUNTIME_BRIDGE_INLINE void Worker::start() {
  if (started_.load(std::memory_order_acquire)) return;  // pairs with the store below
  const std::lock_guard lock(mutex_);
  // `shut_down` closes the gate before it takes the lock: it will see a thread that is made here.
  if (started_.load(std::memory_order_relaxed) || gate_.closed_to_calls()) return;
  context_.open_reactor();
  const SignalsBlocked blocked;
  thread_ = std::thread([self = shared_from_this()] { self->run(); });
  ended_ = joined_ = false;
  started_.store(true, std::memory_order_release);
}

RUNTIME_BRIDGE_INLINE void Worker::run() noexcept {
  node_.enter_worker();
  name_thread(options_.thread_name);
  context_.survive([&] { return context_.run(); });

  // Somebody has stopped the context. From here on no thread of ours posts, and no call is started.
  gate_.close();
  registry_.set_closed();
  mode_ = Mode::stopped;
  spin_.stop();
  const bool cut_off = gate_.in_flight() != 0;
  release_waiting();
  context_.destroy_leftovers(end_calls());

  const std::lock_guard lock(mutex_);
  ended_ = true;
  cut_off_ = cut_off;
  changed_.notify_all();
  // A detached thread may outlive this object, and the destructors of its thread_locals may make calls.
  if (joined_) node_.leave_worker();
}

RUNTIME_BRIDGE_INLINE std::size_t Worker::end_calls() noexcept {
  const auto every_task = [](Call&) { return true; };
  // More than once, since what was ready may wait only now, and a task may try again.
  for (int round = 0; round < 3 && gate_.in_flight() != 0; ++round) {
    context_.run_in_turn([&] { signals_.emit_to_all(Emission::abort, every_task); });
    context_.run_ready_handlers();
  }
  if (gate_.in_flight() == 0) return 0;

  // What waits on this context is destroyed now. What comes back from elsewhere ends at its next co_await.
  context_.run_in_turn([&] { signals_.emit_to_all(Emission::mark, every_task); });
  const std::size_t before = signals_.destroyed();
  context_.destroy_parked();
  context_.run_ready_handlers();
  const std::size_t destroyed = signals_.destroyed() - before;  // operations on channels leave nothing behind
  context_.destroy_on_channels();
  context_.run_ready_handlers();
  if (gate_.in_flight() == 0) return destroyed;

  // What waits elsewhere comes back to this context, which must live until then.
  while (gate_.in_flight() != 0) {
    if (context_.run_ready_handler() != 0) continue;
    context_.destroy_parked();
    if (context_.run_ready_handler() != 0) continue;
    context_.destroy_on_channels();
    // Branch not covered: needs the last call to end at this moment.
    if (context_.run_ready_handler() == 0 && gate_.in_flight() != 0) {
      context_.survive([&] { return context_.run_one(); });
    }
  }
  return 0;
}

RUNTIME_BRIDGE_INLINE bool Worker::shut_down(Shutdown how, SteadyTime deadline, bool last) noexcept {
  gate_.close_to_calls();
  registry_.set_closed();
  if (how == Shutdown::cancel) cancel_all();
  // If calls are in flight, the last one of them stops the loop.
  if (gate_.in_flight() == 0 || has_passed(deadline)) stop();

  WaitScope wait;
  if (!wait.begin(node_, nullptr)) {
    if (last) detach();
    return gate_.in_flight() == 0;
  }
  std::unique_lock lock(mutex_);
  while (!ended_) {
    const std::chrono::nanoseconds left = time_left(deadline);
    if (left == std::chrono::nanoseconds::zero()) {
      stop();
      changed_.wait(lock, [&] { return ended_; });
    } else {
      changed_.wait_for(lock, left);
    }
  }
  if (thread_.joinable()) {
    std::thread thread = std::move(thread_);
    lock.unlock();
    thread.join();
    lock.lock();
    node_.leave_worker();  // another thread may have its id from now on
    joined_ = true;
    changed_.notify_all();
  } else {
    changed_.wait(lock, [&] { return joined_; });
  }
  return !cut_off_;
}

RUNTIME_BRIDGE_INLINE void Worker::cancel_all() noexcept {
  if (cancel_asked_.exchange(true)) return;
  const auto admission = gate_.admit_post();
  if (!admission) return;
  context_.post(cancel_memory_, [this] {
    if (mode_ == Mode::stopped) return;
    mode_ = Mode::cancelling;
    release_waiting();
    signals_.emit_to_all(Emission::cancel, [](Call& call) { return call.record().ask(BridgeError::Cancelled); });
  });
}

RUNTIME_BRIDGE_INLINE void Worker::stop() noexcept {
  if (const auto admission = gate_.admit_post()) context_.stop();
}

RUNTIME_BRIDGE_INLINE void Worker::detach() noexcept {
  const std::lock_guard lock(mutex_);
  // Branch not covered: needs another thread that joins at this moment.
  if (!thread_.joinable()) return;
  thread_.detach();
  joined_ = true;
  // After its loop a worker still destroys its thread_locals, which may make calls: they must not find the bridge.
  if (ended_ && on_worker()) {
    node_.leave_worker();
  } else if (ended_) {
    leak(shared_from_this());  // one of them makes a call just now
  }
  // Branch not covered: g++ unlocks on both ways out.
}

#endif  // RUNTIME_BRIDGE_DECLARATIONS_ONLY

// =====================================================================================================================
// 16. Task call. Instantiated for each type that tasks give, and not for each task, to keep compile times low.

/// The part of a call that runs a coroutine, whatever that returns.
template <class Ex>
class CoroutineTask {
 public:
  using Frame = net::detail::awaitable_frame_base<Ex>;

  /// Calls the task, which makes its awaitable.
  virtual void call() = 0;

  /// Runs the awaitable as if it were awaited by the coroutine with this frame.
  virtual void enter(Frame* caller) = 0;

  /// Takes the result of the awaitable, which has ended. Throws what it threw.
  virtual void take_result() = 0;

 protected:
  ~CoroutineTask() = default;
};

/// While it lives a task can be cancelled. It destroys the task, and then completes the call.
class RunningTask {
 public:
  RunningTask(CallRef& ref, CancelSignal& signal) noexcept : signal_(signal), ref_(std::move(ref)) {
    ref_.call().set_signal(&signal);
    signal.call = &ref_.call();
    signal.marked = false;
  }
  RunningTask(const RunningTask&) = delete;
  RunningTask& operator=(const RunningTask&) = delete;
  ~RunningTask() {
    signal_.call = nullptr;
    ref_.call().set_signal(nullptr);
    ref_.call().release_task();
    if (!ended_) signal_.destroyed.emplace(std::move(ref_));
  }

  /// The task was not destroyed, and has left nothing in the signal's slot.
  void end() noexcept { ended_ = true; }

 private:
  CancelSignal& signal_;
  bool ended_ = false;
  CallRef ref_;
};

/// A function for `co_await` that runs the task's awaitable as if it were awaited, but leaves its frame and its result
/// where they are: it may end on another thread.
template <class Ex>
struct EnterTask {
  net::detail::awaitable_thread<Ex>* operator()(net::detail::awaitable_frame_base<Ex>* caller) const {
    task.enter(caller);
    return nullptr;
  }

  CoroutineTask<Ex>& task;
};

/// Initiates a post to the worker from another thread.
struct PostToWorker {
  template <class Handler>
  void operator()(Handler handler) const {
    // The worker may go on at once, and end, while this thread is still inside asio::post.
    const std::shared_ptr<Worker> alive = worker.shared_from_this();
    const auto executor = alive->get_executor();
    net::post(executor, net::bind_allocator(memory, net::bind_executor(executor, std::move(handler))));
  }

  Worker& worker;
  HandlerAllocator<void> memory;
};

#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wzero-as-null-pointer-constant"  // g++ 12 means its own code in a coroutine

/// Runs the task, and outlives it: `running` is destroyed last, and completes the call when the task's frame is gone.
template <class Ex>
net::awaitable<void, Ex> drive(CallRef ref, CoroutineTask<Ex>& task, CancelSignal& signal) {
  Call& call = ref.call();
  Worker& worker = call.worker();
  RunningTask running(ref, signal);
  try {
    co_await net::this_coro::reset_cancellation_state(MarksTask{&signal}, AbortsOperation{&signal});
    call.set_running();
    task.call();
    const EnterTask<Ex> enter{task};
    co_await enter;
    // A task that ended on another executor is brought back. Only the worker may know whether it was cancelled, so the
    // other thread does not look.
    while (!worker.on_worker()) {
      co_await net::this_coro::throw_if_cancelled(false);
      try {
        const PostToWorker post{worker, HandlerAllocator<void>(call.start_memory())};
        const net::use_awaitable_t<Ex> token;
        co_await net::async_initiate<decltype(token), void()>(post, token);
      } catch (const std::bad_alloc&) {
        std::this_thread::yield();
      }
    }
    if (!worker.has_destroyed()) task.take_result();
  } catch (...) {
    call.set_threw(worker.stopped());
  }
  // Nothing of the task stays in the signal: neither the handler of its last operation, nor its filters.
  co_await net::this_coro::reset_cancellation_state();
  running.end();
  // Branch not covered: g++ undoes a coroutine whose start throws, which Asio's does not.
}

#pragma GCC diagnostic pop

template <class Ex>
void spawn(CallRef ref, CoroutineTask<Ex>& task) noexcept {
  ref.call().set_starting();
  Worker& worker = ref.call().worker();
  try {
    CancelSignals::Lease lease(worker.signals());
    CancelSignal& signal = lease.signal();
    net::co_spawn(worker.get_executor(), drive(std::move(ref), task, signal), std::move(lease));
  } catch (...) {
    // No memory for the coroutine. The reference was destroyed on the way, and the call knows that it was starting.
  }
}

RUNTIME_BRIDGE_COMPILE_ONCE(void spawn(CallRef, CoroutineTask<net::any_io_executor>&) noexcept)
RUNTIME_BRIDGE_COMPILE_ONCE(void spawn(CallRef, CoroutineTask<net::io_context::executor_type>&) noexcept)

template <class T>
void* address_of(T& object) noexcept {
  return const_cast<void*>(static_cast<const volatile void*>(std::addressof(object)));
}

/// A task that somebody else keeps. `Called` is what calling it gives: an awaitable, or a value.
template <class Called>
struct TaskPointer {
  /// `Task` is as for `invoke_task`: an rvalue is called as an rvalue.
  template <class Task>
  static TaskPointer to(std::remove_reference_t<Task>& task) noexcept {
    using Object = std::remove_reference_t<Task>;
    return {address_of(task), [](void* t) -> Called { return invoke_task<Task>(*static_cast<Object*>(t)); }};
  }

  Called operator()() const { return call(object); }

  void* object;
  Called (*call)(void*);
};

/// The task of a call: borrowed from its caller, or the call's own.
template <class Called>
class HeldTask {
 public:
  HeldTask() = default;
  explicit HeldTask(TaskPointer<Called> task) noexcept : task_(task) {}
  HeldTask(const HeldTask&) = delete;
  HeldTask& operator=(const HeldTask&) = delete;
  ~HeldTask() { reset(); }

  template <class Task>
  void own(Task&& task) {
    using Object = std::decay_t<Task>;
    Object* object;
    if constexpr (sizeof(Object) <= sizeof(bytes_) && alignof(Object) <= alignof(std::max_align_t)) {
      // Branch not covered: not every constructor that may throw is made to.
      object = ::new (static_cast<void*>(bytes_.data())) Object(std::forward<Task>(task));
      destroy_ = [](void* o) { std::destroy_at(static_cast<Object*>(o)); };
    } else {
      // Branch not covered: as above.
      object = new Object(std::forward<Task>(task));
      // Branch not covered: the pointer is never null.
      destroy_ = [](void* o) { delete static_cast<Object*>(o); };
    }
    task_ = TaskPointer<Called>::template to<Object>(*object);
  }

  void reset() noexcept {
    if (destroy_) std::exchange(destroy_, nullptr)(task_.object);
  }

  Called operator()() { return task_(); }

 private:
  TaskPointer<Called> task_{};
  void (*destroy_)(void*) = nullptr;
  alignas(std::max_align_t) std::array<std::byte, 64> bytes_;
};

/// A call that may have a `T`.
template <class T>
class ResultCall : public Call {
 public:
  using Value = T;

  /// For a completed call.
  Result<T> result() {
    if (!value_) return unexpected<BridgeError>(this->error());
    if constexpr (std::is_void_v<T>) {
      return {};
    } else {
      try {
        return Result<T>(InPlace{}, std::move(*value_));
      } catch (...) {
        return unexpected<BridgeError>(this->thrown());
      }
    }
  }

 protected:
  /// Calls `function` and keeps what it returns.
  template <class Function>
  void keep_result(Function function) {
    if constexpr (std::is_void_v<T>) {
      function();
      value_.emplace();
    } else {
      value_.emplace(function());
    }
    this->set_returned();
  }

 private:
  std::optional<std::conditional_t<std::is_void_v<T>, std::monostate, T>> value_;
};

/// A call of a plain callable.
template <class Called>
class PlainCall : public ResultCall<Called> {
 public:
  PlainCall() = default;
  explicit PlainCall(TaskPointer<Called> task) : task_(task) {}

  template <class Task>
  void own(Task&& task) {
    task_.own(std::forward<Task>(task));
  }

 private:
  void start(CallRef) noexcept override {
    try {
      this->keep_result([this]() -> Called { return task_(); });
    } catch (...) {
      this->set_threw(false);
    }
  }

  void release_task() noexcept override { task_.reset(); }

  HeldTask<Called> task_;
};

/// A call of a coroutine: of an awaitable, or of something that makes one.
template <class Awaitable>
class CoroutineCall : public ResultCall<typename AwaitableTraits<Awaitable>::Value>,
                      private CoroutineTask<typename AwaitableTraits<Awaitable>::Executor> {
  using Executor = typename AwaitableTraits<Awaitable>::Executor;
  using typename CoroutineTask<Executor>::Frame;

 public:
  CoroutineCall() = default;
  explicit CoroutineCall(TaskPointer<Awaitable> task) : task_(task) {}
  explicit CoroutineCall(Awaitable&& awaitable) : awaitable_(std::move(awaitable)) {}

  template <class Task>
  void own(Task&& task) {
    if constexpr (is_awaitable<Task>) {
      awaitable_.emplace(std::forward<Task>(task));
    } else {
      task_.own(std::forward<Task>(task));
    }
  }

 private:
  void start(CallRef self) noexcept override { spawn<Executor>(std::move(self), *this); }

  void release_task() noexcept override {
    awaitable_.reset();
    task_.reset();
  }

  void call() override {
    if (!awaitable_) awaitable_.emplace(task_());
    if (!awaitable_->valid()) throw std::invalid_argument("runtime_bridge: an awaitable that was given up before");
  }

  void enter(Frame* caller) override {
    using Caller = net::detail::awaitable_frame<void, Executor>;
    awaitable_->await_suspend(net::detail::coroutine_handle<Caller>::from_promise(static_cast<Caller&>(*caller)));
  }

  void take_result() override {
    this->keep_result([this] { return awaitable_->await_resume(); });
  }

  HeldTask<Awaitable> task_;
  std::optional<Awaitable> awaitable_;
};

template <class Called>
using TaskCall = std::conditional_t<is_awaitable<Called>, CoroutineCall<Called>, PlainCall<Called>>;

/// A call whose result goes to a function.
template <class Called, class OnEnd>
class CallWithEnd final : public TaskCall<Called> {
 public:
  explicit CallWithEnd(OnEnd&& on_end) : on_end_(std::move(on_end)) {}

 private:
  void tell_end() override { std::invoke(std::move(on_end_), this->result()); }

  OnEnd on_end_;
};
struct NoEnd {};

/// Makes a call own a task.
template <class Task>
void own(TaskCall<typename TaskTraits<std::decay_t<Task>>::Called>& call, void* task) {
  call.own(std::forward<Task>(*static_cast<std::remove_reference_t<Task>*>(task)));
}

/// Submits a call. Not inlined, so that call sites stay small. `own` makes it own the task.
template <class Called>
[[gnu::noinline]] void submit(const std::shared_ptr<Worker>& worker, std::shared_ptr<TaskCall<Called>> call,
                              void (*own)(TaskCall<Called>& call, void* task), void* task, const SourceLocation& where,
                              std::string* name) {
  own(*call, task);
  if (worker) return worker->submit(std::move(call), where, name);
  call->refuse({BridgeError::WorkerDead, nullptr, static_text("the bridge was moved from")});
  try {
    static_cast<Call&>(*call).tell_end();
  } catch (...) {  // there is no hook either
  }
}

/// Runs a task and waits for it: see `RuntimeBridge::block_on_until`. Not inlined, so that call sites stay small.
template <class Called, class Task, class Clock, class Duration>
[[gnu::noinline]] auto block_on(const std::shared_ptr<Worker>& bridge, Task task,
                                const std::chrono::time_point<Clock, Duration>& deadline, const Stop& stop,
                                const SourceLocation& where, std::string* name)
    -> Result<typename TaskCall<Called>::Value> {
  // The bridge may be destroyed meanwhile. NOLINTNEXTLINE(performance-unnecessary-copy-initialization)
  const std::shared_ptr<Worker> worker = bridge;
  TaskCall<Called> call(std::move(task));
  if (!worker) return failure(BridgeError::WorkerDead, "the bridge was moved from");
  if (auto refusal = worker->block(call, deadline, stop, where, name))
    return unexpected<BridgeError>(*std::move(refusal));
  return call.result();
}

}  // namespace RUNTIME_BRIDGE_FLAVOUR
}  // namespace detail

// =====================================================================================================================
// 17. RuntimeBridge and JoinHandle

inline namespace RUNTIME_BRIDGE_FLAVOUR {

template <class T>
class JoinHandle;

/// A worker thread with a private `asio::io_context`, and the way to call it.
///
/// *Threads.* Any thread may call any member function at any time. Moving and assigning are as for any object. Calls in
/// flight do not touch the bridge itself, so it may be destroyed while they run.
///
/// *Lifetimes.* Destroy I/O objects built on the bridge's executor before the bridge, and do not build them on other
/// threads while it is being shut down: Asio adds its services without a lock then. A task on the bridge's own worker
/// may destroy the bridge: the worker then ends by itself, after the task's current step. A task that has moved to
/// another executor must not: the destructor would wait for that task.
///
/// *fork.* In a child process every call returns `WorkerDead`, and shutting down or destroying the bridge does nothing.
class RuntimeBridge {
 public:
  /// The type of the executor: what an `asio::io_context` has.
  using executor_type = detail::net::io_context::executor_type;

  /// Makes the worker. Throws `std::system_error` if the system has no thread, or no descriptors for its reactor (with
  /// `Start::lazy` the first call finds out).
  explicit RuntimeBridge(Options options = {}) {
    const bool eager = options.start == Start::eager;
    worker_ = std::make_shared<detail::Worker>(std::move(options));
    if (eager) worker_->start();
  }

  /// A bridge with this name for its worker, and defaults for everything else.
  [[nodiscard]] static RuntimeBridge with_thread_name(std::string name) {
    Options options;
    options.thread_name = std::move(name);
    return RuntimeBridge(std::move(options));
  }

  /// One bridge for the whole process, for libraries and small programs. Its worker starts with the first call. It is
  /// never destroyed, so the destructors of static objects may use it; tasks that are in flight when the process ends
  /// are not cancelled. A forked child gets a new one. Throws `std::bad_alloc`. Nobody should shut it down, for it is
  /// everybody's. Modules that do not share symbols have one each.
  [[nodiscard]] static RuntimeBridge& shared();

  /// The constructor for callers without exceptions. `std::errc::not_enough_memory` stands for `std::bad_alloc`.
  [[nodiscard]] static detail::Expected<RuntimeBridge, std::error_code> create(Options options = {}) noexcept {
    try {
      return RuntimeBridge(std::move(options));
    } catch (const std::system_error& e) {
      return detail::unexpected<std::error_code>(e.code());
    } catch (...) {
      return detail::unexpected<std::error_code>(std::make_error_code(std::errc::not_enough_memory));
    }
  }

  /// The moved-from bridge behaves like one that was shut down, but has no executor.
  RuntimeBridge(RuntimeBridge&&) noexcept = default;

  RuntimeBridge& operator=(RuntimeBridge&& other) noexcept {
    RuntimeBridge taken(std::move(other));
    std::swap(worker_, taken.worker_);
    std::swap(owns_worker_, taken.owns_worker_);
    return *this;
  }

  /// Another object for the same worker, for what may outlive this one. Its destructor does not stop the worker. After
  /// that of the original, calls return `WorkerDead`; the executor remains, so I/O objects may still be destroyed.
  [[nodiscard]] RuntimeBridge share() const noexcept { return {worker_, false}; }

  /// Stops the worker now and joins it. First, the tasks in flight are cancelled while everything that they wait for is
  /// alive; a task that returns a value then keeps it. Tasks that ignore cancellation are destroyed on the worker where
  /// they wait, and their callers get `ResponseLost`. The destructor waits for a task that waits for something foreign
  /// (another context, a pool, a look-up of a name), and for one that ignores cancellation and never waits.
  ///
  /// If all tasks heed cancellation this returns at once. It takes up to 200 ms if something was destroyed while
  /// something foreign was involved, or if raw users of the executor have left operations or work behind: a foreign
  /// thread may still use the context.
  ~RuntimeBridge() {
    if (!worker_ || !owns_worker_) return;
    if (worker_->forked()) {
      detail::Worker::leak(std::move(worker_));
    } else {
      worker_->shut_down(Shutdown::drain, (detail::SteadyTime::min)(), true);
    }
  }

  /// The worker's executor, to build sockets, timers and pools on. Not for a bridge that was moved from.
  [[nodiscard]] executor_type get_executor() const noexcept {
    // Branch not covered: a precondition.
    assert(worker_ && "runtime_bridge: get_executor of a bridge that was moved from");
    return worker_->get_executor();
  }

  /// The number of calls that were admitted and have not ended. Those that wait for their turn are not counted.
  [[nodiscard]] std::size_t in_flight() const noexcept { return worker_ ? worker_->in_flight() : 0; }

  /// The calls in flight, those that wait for their turn included; the oldest first. Never waits for the worker, which
  /// may be stuck. Empty in a forked child.
  [[nodiscard]] std::vector<CallInfo> calls() const { return worker_ ? worker_->calls() : std::vector<CallInfo>(); }

  /// What has become of the calls since the bridge was made. All zero in a forked child.
  [[nodiscard]] Stats stats() const noexcept { return worker_ ? worker_->stats() : Stats(); }

  /// Writes what all bridges of the process are doing, a line for each bridge and each call: where it was made, for how
  /// long it has been in flight, who waits for it, which bridge waits for which, and whether the worker is idle or for
  /// how long it has not come back to its loop. For people: the text may change.
  ///
  /// Any thread may call this, but not a signal handler. It never waits for a worker that is stuck, but gives each
  /// worker up to 50 ms to answer. Bridges of other modules are in it if the linker unites their symbols. A forked
  /// child has only its own.
  static void report(std::ostream& out) {
    const std::string text = detail::CallRegistry::report();
    out.write(text.data(), static_cast<std::streamsize>(text.size()));
  }

  /// Runs a task on the worker and waits until it is over.
  ///
  /// A Task is an `asio::awaitable`, given as an rvalue; a callable without parameters that returns one, called on the
  /// worker and borrowed until the call is over; a callable without parameters that returns a plain value or void, run
  /// on the worker; or an Asio operation that waits for its completion token.
  ///
  /// | what happens                                                                      | result               |
  /// |-----------------------------------------------------------------------------------|----------------------|
  /// | the task returns, even if it was cancelled                                        | its value            |
  /// | the task throws                                                                   | `ResponseLost`       |
  /// | the worker is stopped while the task runs, or what it waits for is destroyed      | `ResponseLost`       |
  /// | the bridge was shut down or moved from, or its worker has ended or did not start  | `WorkerDead`         |
  /// | the bridge was made by the parent process, before `fork`                          | `WorkerDead`         |
  /// | the deadline passes                                                               | `TimedOut`           |
  /// | a stop is requested, or `shutdown(Shutdown::cancel)` called                       | `Cancelled`          |
  /// | called on the bridge's own worker, or bridges would wait for each other in a ring | `WouldDeadlock`      |
  /// | `max_in_flight` calls are in flight, and `when_full` is `WhenFull::refuse`        | `Overloaded`         |
  ///
  /// With `TimedOut` and `Cancelled`, the task was cancelled and waited for. With `WorkerDead`, `WouldDeadlock` and
  /// `Overloaded`, it is destroyed without having run. The cause of an error is what the task threw, or why the worker
  /// did not start; in all other cases it is null.
  ///
  /// The task is over when this returns: its coroutine was destroyed on the worker, and the worker uses nothing of it
  /// any more. So it may hold references to the caller's locals. Throws `std::bad_alloc` if there is no memory to make
  /// the call; nothing was done then.
  ///
  /// Any thread may request a stop, the task itself included. Cancellation is Asio's: the operation that the task waits
  /// for ends with `operation_aborted`, and so does every later `co_await`. A task that ignores that is waited for. If
  /// the stop was requested before the call, the task is not started.
  ///
  /// Not for coroutines, which can `co_await`; not for work that only computes, since it holds up all other calls; not
  /// for a task that waits for something that only the blocked caller could do.
  ///
  /// `where` is for diagnosis. A function that wraps this one may take it from its own caller, in the same way.
  template <class Task>
  [[nodiscard]] Result<detail::TaskValue<Task>> block_on(Task&& task, Stop stop = {},
                                                         SourceLocation where = SourceLocation::current()) const {
    return run<Task>(task, (detail::SteadyTime::max)(), stop, where, nullptr);
  }

  /// `block_on` with a deadline: this long from now. A duration that is too long for the clock means no deadline. If it
  /// is zero or less, the task is not started.
  template <class Task, class Rep, class Period>
  [[nodiscard]] Result<detail::TaskValue<Task>> block_on_for(Task&& task, std::chrono::duration<Rep, Period> timeout,
                                                             Stop stop = {},
                                                             SourceLocation where = SourceLocation::current()) const {
    return run<Task>(task, detail::time_after(timeout), stop, where, nullptr);
  }

  /// `block_on` with a deadline, of any clock. If the deadline has already passed, the task is not started. If a clock
  /// that is not steady is set forward meanwhile, that may be noticed a second late. What the clock throws is thrown
  /// here, once the task was cancelled and is over.
  template <class Task, class Clock, class Duration>
  [[nodiscard]] Result<detail::TaskValue<Task>> block_on_until(Task&& task,
                                                               std::chrono::time_point<Clock, Duration> deadline,
                                                               Stop stop = {},
                                                               SourceLocation where = SourceLocation::current()) const {
    return run<Task>(task, deadline, stop, where, nullptr);
  }

  /// Calls `f(args...)` on the worker, as `std::invoke` does, and waits until that is over; `f` may be a pointer to a
  /// member. What it returns is run if it is an `asio::awaitable` or an operation, and the result is that of
  /// `block_on`.
  ///
  /// The function and its arguments are borrowed, temporaries included: they live until the call is over, also where a
  /// coroutine takes them by reference, and an argument that must be converted for such a parameter is converted first.
  /// (The parameters of templates and of overloaded functions are not known here: give those what they take.)
  ///
  /// For diagnosis `named` gives a name: `call(named("get", &Client::get), client, key)`. The place of the call is not
  /// known.
  template <class F, class... Args>
  [[nodiscard]] Result<detail::TaskValue<detail::InvocationOf<detail::Unnamed<F>, Args...>>> call(
      F&& f, Args&&... args) const {
    return invoke<F>((detail::SteadyTime::max)(), nullptr, f, std::forward<Args>(args)...);
  }

  /// `call` with a deadline: this long from now. See `block_on_for`.
  template <class Rep, class Period, class F, class... Args>
  [[nodiscard]] Result<detail::TaskValue<detail::InvocationOf<detail::Unnamed<F>, Args...>>> call_for(
      std::chrono::duration<Rep, Period> timeout, F&& f, Args&&... args) const {
    return invoke<F>(detail::time_after(timeout), nullptr, f, std::forward<Args>(args)...);
  }

  /// Runs a task on the worker without waiting. The task must own its data, since it may outlive the caller.
  ///
  /// Tasks are as for `block_on`, and so is the result of `JoinHandle::join`. This never waits, so it may be called on
  /// the worker itself. Throws `std::bad_alloc` like `block_on`.
  template <class Task>
  JoinHandle<detail::TaskValue<Task>> submit(Task&& task, SourceLocation where = SourceLocation::current()) const {
    detail::NoEnd none;
    return send<Task>(task, none, where, nullptr);
  }

  /// Runs a task on the worker, and calls `on_end` once with its `Result` when it is over, whatever ends it: on the
  /// worker; or in here if the call is refused. A bridge that is shut down or destroyed waits for that. `on_end` must
  /// not block, as it holds up the worker; it may submit the next task. What it throws goes to
  /// `Options::on_stray_exception`. Throws `std::bad_alloc` if there is no memory to make the call, and does not call
  /// `on_end` then.
  template <class Task, class OnEnd>
  requires(!std::same_as<OnEnd, SourceLocation>) void submit(Task&& task, OnEnd on_end,
                                                             SourceLocation where = SourceLocation::current()) const {
    constexpr bool fits = std::invocable<OnEnd, Result<detail::TaskValue<Task>>>;
    static_assert(!detail::is_task<Task> || fits,
                  "runtime_bridge: submit's second argument must be callable with the Result of the task");
    if constexpr (fits) send<Task>(task, on_end, where, nullptr);
  }

  /// Admits no more calls, waits for those in flight, and ends the worker. Later calls return `WorkerDead`.
  ///
  /// At `limit` the worker is stopped as by the destructor, and the remaining callers get `ResponseLost`; then this
  /// returns false. Tasks that wait for something foreign are waited for even then. Any thread may call this, more than
  /// once, and at the same time; each call may shorten the limit of the others. I/O objects may be destroyed
  /// afterwards.
  ///
  /// On the worker itself, or if waiting would close a ring, it does not wait: the worker ends by itself once the last
  /// call in flight is over, at once if there is none or `limit` is zero. The result tells whether there is none.
  template <class Rep = std::chrono::hours::rep, class Period = std::chrono::hours::period>
  bool shutdown(Shutdown how, std::chrono::duration<Rep, Period> limit = (std::chrono::hours::max)()) const noexcept {
    const std::shared_ptr<detail::Worker> worker = worker_;
    return !worker || worker->forked() || worker->shut_down(how, detail::time_after(limit), false);
  }

 private:
  /// What all calls that wait do. `name` is moved from, or null.
  template <class Task, class Clock, class Duration>
  Result<detail::TaskValue<Task>> run(std::remove_reference_t<Task>& task,
                                      const std::chrono::time_point<Clock, Duration>& deadline, const Stop& stop,
                                      const SourceLocation& where, std::string* name) const {
    detail::assert_task<Task>();
    if constexpr (!detail::is_task<Task>) {
      return detail::failure(BridgeError::WorkerDead, "not a Task");
    } else if constexpr (detail::is_named<std::remove_cvref_t<Task>>) {
      std::string own_name = std::forward<Task>(task).name;
      return run<detail::Unnamed<Task>>(task.task, deadline, stop, where, &own_name);
    } else if constexpr (std::is_function_v<std::remove_reference_t<Task>>) {
      auto* const pointer = &task;
      return run<decltype(pointer)>(pointer, deadline, stop, where, name);
    } else {
      using Called = typename detail::TaskTraits<Task>::Called;
      if constexpr (detail::is_awaitable<Task>) {
        return detail::block_on<Called>(worker_, std::forward<Task>(task), deadline, stop, where, name);
      } else {
        const auto pointer = detail::TaskPointer<Called>::template to<Task>(task);
        return detail::block_on<Called>(worker_, pointer, deadline, stop, where, name);
      }
    }
  }

  /// What `call` does, with or without a deadline. `name` is moved from, or null.
  template <class F, class... A>
  Result<detail::TaskValue<detail::InvocationOf<detail::Unnamed<F>, A...>>> invoke(detail::SteadyTime deadline,
                                                                                   std::string* name,
                                                                                   std::remove_reference_t<F>& f,
                                                                                   A&&... a) const {
    constexpr bool fits = std::invocable<detail::Unnamed<F>, A...>;
    static_assert(fits, "runtime_bridge: call's function cannot be called with these arguments");
    if constexpr (!fits) {
      return detail::failure(BridgeError::WorkerDead, "not a Task");
    } else if constexpr (detail::is_named<std::remove_cvref_t<F>>) {
      std::string own_name = std::forward<F>(f).name;
      return invoke<detail::Unnamed<F>>(deadline, &own_name, f.task, std::forward<A>(a)...);
    } else {
      detail::InvocationOf<F, A...> task(std::forward<F>(f), std::forward<A>(a)...);
      return run<decltype(task)&>(task, deadline, Stop(), SourceLocation(), name);
    }
  }

  /// What all of `submit` does.
  template <class Task, class OnEnd>
  auto send(std::remove_reference_t<Task>& task, OnEnd& on_end, const SourceLocation& where, std::string* name) const;

  RuntimeBridge(std::shared_ptr<detail::Worker> worker, bool owns_worker) noexcept
      : worker_(std::move(worker)), owns_worker_(owns_worker) {}

  std::shared_ptr<detail::Worker> worker_;
  bool owns_worker_ = true;
};

/// A submitted task. Like `std::jthread`, a handle requests a stop and joins in its destructor, unless it was joined or
/// detached.
///
/// It may outlive the bridge. One thread at a time may use it, but other threads may call `request_stop` and `done`. On
/// the bridge's own worker, or if waiting would close a ring of bridges that wait for each other, nothing waits: `join`
/// returns `WouldDeadlock`, `wait_for` returns at once, and the destructor detaches.
template <class T>
class [[nodiscard]] JoinHandle {
 public:
  /// A handle without a task.
  JoinHandle() noexcept = default;
  JoinHandle(JoinHandle&&) noexcept = default;
  JoinHandle& operator=(JoinHandle&& other) noexcept {
    JoinHandle taken(std::move(other));
    std::swap(worker_, taken.worker_);
    std::swap(call_, taken.call_);
    std::swap(joined_, taken.joined_);
    return *this;
  }
  /// Requests a stop and joins, if there is a task to join. An error then goes to `Options::on_unjoined_error`.
  [[gnu::noinline]] ~JoinHandle() {
    if (!joinable()) return;
    request_stop();
    if (!wait_until((detail::SteadyTime::max)())) {
      detach();
    } else if (worker_ && call_->completed()) {
      worker_->note_unjoined(*call_);
    }
  }

  /// Whether there is a task to join.
  [[nodiscard]] bool joinable() const noexcept { return call_ && !joined_ && !call_->detached(); }

  /// Waits until the task is over, and returns what `block_on` would. The handle has no task afterwards, unless the
  /// result is `WouldDeadlock`, or `WorkerDead` in a forked child. Throws `std::system_error`
  /// (`std::errc::invalid_argument`) if it has no task.
  [[nodiscard]] Result<T> join() {
    if (!joinable()) {
      throw std::system_error(std::make_error_code(std::errc::invalid_argument), "runtime_bridge: join without a task");
    }
    if (!call_->completed()) {
      if (worker_->forked()) return detail::failure(BridgeError::WorkerDead, "the worker lives in the parent process");
      detail::WaitScope wait;
      std::shared_ptr<const char> ring;
      if (!wait.begin(worker_->node(), &call_->wait_record(), &ring)) {
        return detail::unexpected<BridgeError>({BridgeError::WouldDeadlock, nullptr, std::move(ring)});
      }
      worker_->wait(*call_);
    }
    joined_ = true;
    return call_->result();
  }

  /// Waits until the task is over, but not longer than this. True if it is over, or if there is none.
  template <class Rep, class Period>
  bool wait_for(std::chrono::duration<Rep, Period> timeout) const {
    return wait_until(detail::time_after(timeout));
  }

  /// Whether the task is over, or there is none (as in a forked child).
  [[nodiscard]] bool done() const noexcept {
    return !call_ || call_->detached() || call_->completed() || worker_->forked();
  }

  /// Requests the cancellation of the task, as a stop does for `block_on`. Does not wait.
  void request_stop() noexcept {
    if (call_ && worker_ && !call_->detached()) worker_->cancel(*call_, BridgeError::Cancelled);
  }

  /// Lets the task run on. Its result is discarded; its error goes to `Options::on_unjoined_error`.
  void detach() noexcept {
    if (call_ && !joined_ && call_->detach() && worker_) worker_->note_unjoined(*call_);
  }

 private:
  friend class RuntimeBridge;

  JoinHandle(std::shared_ptr<detail::Worker> worker, std::shared_ptr<detail::ResultCall<T>> call) noexcept
      : worker_(std::move(worker)), call_(std::move(call)) {}

  bool wait_until(detail::SteadyTime deadline) const {
    if (done()) return true;
    detail::WaitScope wait;
    return wait.begin(worker_->node(), &call_->wait_record()) && !worker_->wait(*call_, deadline, nullptr);
  }

  std::shared_ptr<detail::Worker> worker_;
  std::shared_ptr<detail::ResultCall<T>> call_;
  bool joined_ = false;  // `call_` stays, for other threads may be asking it to stop
};

// Here, because it needs JoinHandle.
template <class Task, class OnEnd>
auto RuntimeBridge::send(std::remove_reference_t<Task>& task, OnEnd& on_end, const SourceLocation& where,
                         std::string* name) const {
  constexpr bool has_end = !std::is_same_v<OnEnd, detail::NoEnd>;
  constexpr bool can_be_kept = std::constructible_from<std::decay_t<detail::Unnamed<Task>>, detail::Unnamed<Task>>;
  using Handle = std::conditional_t<has_end, void, JoinHandle<detail::TaskValue<Task>>>;
  detail::assert_task<Task>();
  static_assert(!detail::is_task<Task> || can_be_kept,
                "runtime_bridge: submit keeps the task, and this one cannot be copied: give it up: "
                "submit(std::move(task))");
  if constexpr (!detail::is_task<Task> || !can_be_kept) {
    return Handle();
  } else if constexpr (detail::is_named<std::remove_cvref_t<Task>>) {
    std::string own_name = std::forward<Task>(task).name;
    return send<detail::Unnamed<Task>>(task.task, on_end, where, &own_name);
  } else if constexpr (std::is_function_v<std::remove_reference_t<Task>>) {
    auto* const pointer = &task;
    return send<decltype(pointer)>(pointer, on_end, where, name);
  } else {
    using Called = typename detail::TaskTraits<std::decay_t<Task>>::Called;
    std::shared_ptr<detail::Worker> worker = worker_;  // the bridge may be destroyed meanwhile
    if constexpr (has_end) {
      auto call = std::make_shared<detail::CallWithEnd<Called, OnEnd>>(std::move(on_end));
      detail::submit<Called>(worker, std::move(call), detail::own<Task>, detail::address_of(task), where, name);
    } else {
      auto call = std::make_shared<detail::TaskCall<Called>>();
      detail::submit<Called>(worker, call, detail::own<Task>, detail::address_of(task), where, name);
      return Handle(std::move(worker), std::move(call));
    }
  }
}

inline RuntimeBridge& RuntimeBridge::shared() {
  struct Shared {
    RuntimeBridge bridge;
    const Shared* before;  // that of the parent process: never destroyed, and kept where leak checkers find it
  };
  static constinit std::atomic<Shared*> newest{nullptr};
  Shared* current = newest.load();
  while (!current || current->bridge.worker_->forked()) {
    Options options;
    options.thread_name = "shared-bridge";
    options.start = Start::lazy;
    auto made = std::make_unique<Shared>(Shared{RuntimeBridge(std::move(options)), current});
    // Branch not covered: needs two threads at once.
    if (newest.compare_exchange_strong(current, made.get())) current = made.release();
  }
  return current->bridge;
}

}  // namespace RUNTIME_BRIDGE_FLAVOUR
}  // namespace v0_2
}  // namespace runtime_bridge

template <>
struct std::is_error_code_enum<runtime_bridge::BridgeError::Kind> : std::true_type {};

#pragma GCC visibility pop

#endif  // Asio
#endif  // C++20, POSIX, exceptions
#endif  // RUNTIME_BRIDGE_HPP
