// SPDX-License-Identifier: Apache-2.0
//
// runtime_bridge: call asynchronous Asio code from synchronous code.
// One header, C++20, standalone Asio >= 1.22.1. Documentation: README.md and the comments below.

#ifndef RUNTIME_BRIDGE_HPP
#define RUNTIME_BRIDGE_HPP

#define RUNTIME_BRIDGE_VERSION_MAJOR 0
#define RUNTIME_BRIDGE_VERSION_MINOR 1
#define RUNTIME_BRIDGE_VERSION_PATCH 0

// After an #error nothing else is compiled, so that the error is the only one.
#if __cplusplus < 202002L
#error "runtime_bridge needs C++20: compile with -std=c++20 or newer"
#elif defined(_WIN32)
#error "runtime_bridge needs POSIX threads (it watches for fork); Windows is not supported"
#elif !defined(__cpp_exceptions)
#error "runtime_bridge needs exceptions, and so does Asio: compile without -fno-exceptions"
#elif !defined(__cpp_rtti) && !defined(ASIO_NO_TYPEID)
#error "Asio needs -DASIO_NO_TYPEID beside -fno-rtti, in every file of the program"
#else

// Before Asio: 1.22.1 looks whether the standard library has aligned_alloc, and sees it only once one of its headers
// was included. Two units that differ in that would free each other's memory in the wrong way.
#include <version>

#include <asio/version.hpp>
#if ASIO_VERSION < 102201
#error "runtime_bridge needs standalone Asio 1.22.1 or newer"
#else

#include <asio/detail/config.hpp>
#ifndef ASIO_HAS_CO_AWAIT
#error "Asio sees no coroutines: with clang and Asio < 1.24 add -DASIO_HAS_CO_AWAIT=1 -DASIO_HAS_STD_COROUTINE=1"
#else

#include <asio/any_io_executor.hpp>
#include <asio/awaitable.hpp>
#include <asio/bind_allocator.hpp>
#include <asio/bind_cancellation_slot.hpp>
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
#endif

#include <pthread.h>

#include <array>
#include <atomic>
#include <cassert>
#include <chrono>
#include <concepts>
#include <condition_variable>
#include <csignal>
#include <cstddef>
#include <cstdint>
#include <exception>
#include <functional>
#include <future>
#include <list>
#include <memory>
#include <mutex>
#include <new>
#include <optional>
#include <ostream>
#include <stdexcept>
#include <stop_token>
#include <string>
#include <system_error>
#include <thread>
#include <type_traits>
#include <utility>
#include <variant>

// The library's own `expected` is part of the public types, so it is part of the namespace's name: two
// translation units that choose differently make two types, not a violation of the one definition rule.
#ifdef __cpp_lib_expected
#include <expected>
#define RUNTIME_BRIDGE_ABI v0_1_std_expected
#else
#include <tl/expected.hpp>
#define RUNTIME_BRIDGE_ABI v0_1_tl_expected
#endif

// The modules of a program share what the linker can unite, also where their own symbols are hidden.
#pragma GCC visibility push(default)

/// Calls asynchronous Asio code from synchronous code.
///
/// A `RuntimeBridge` owns one worker thread that runs one private `asio::io_context`. `block_on` posts a task to it and
/// blocks the calling thread until the task is over. The caller may be any thread; its own event loop, if it has one,
/// is never entered. Calls of several threads make progress side by side on the worker.
///
/// *Errors.* What goes wrong with a call comes back as a `BridgeError` in its `Result`, and ends that call alone. Only
/// `std::bad_alloc`, when there is no memory to make the call, is thrown.
///
/// *The life of a call.* `Gate` admits it, `Core::post` carries it to the worker, `TaskCall::drive` runs the task, and
/// the `Ticket` that goes along answers the caller from its destructor. A ticket cannot be lost: whether the task
/// returns, throws, is destroyed or never starts, some destructor ends the call.
///
/// *The end.* The destructor stops the worker at once; calls in flight are answered with `ResponseLost`.
///
/// *Modules.* A bridge may be passed between the program and its plugins, whatever the visibility of their symbols. A
/// plugin must not be unloaded before the bridges that it has called are gone: the worker runs its code.
namespace runtime_bridge {
inline namespace RUNTIME_BRIDGE_ABI {

// ---------------------------------------------------------------------------------------------------------------------
// Errors and results

/// Why a call has no value: a kind to act on, and a cause and a message to report.
class [[nodiscard]] BridgeError {
 public:
  enum Kind {
    WorkerDead = 1,  ///< The task was not started: there is no worker to run it.
    ResponseLost,    ///< The task threw, or was destroyed before its end.
    TimedOut,        ///< The deadline passed; the task was cancelled and is over.
    Cancelled,       ///< A stop was requested; the task was cancelled and is over.
    WouldDeadlock,   ///< The task was not started: waiting for it could never end.
  };

  BridgeError() noexcept = default;
  BridgeError(Kind kind, std::exception_ptr cause = nullptr, std::shared_ptr<const char> text = nullptr) noexcept
      : kind_(kind), cause_(std::move(cause)), text_(std::move(text)) {}

  [[nodiscard]] Kind kind() const noexcept { return kind_; }

  /// What the task threw, or what kept the worker from starting; null if nothing did.
  [[nodiscard]] std::exception_ptr cause() const noexcept { return cause_; }

  /// One sentence for a log; it ends with the `what()` of the cause.
  [[nodiscard]] std::string message() const;

  /// Errors of the same kind are equal, whatever their causes.
  friend bool operator==(const BridgeError& a, const BridgeError& b) noexcept { return a.kind_ == b.kind_; }
  friend bool operator==(const BridgeError& a, Kind b) noexcept { return a.kind_ == b; }

  /// Writes the message.
  template <class Traits>
  friend std::basic_ostream<char, Traits>& operator<<(std::basic_ostream<char, Traits>& out, const BridgeError& error) {
    return out << error.message();
  }

 private:
  /// The message, without the name of this library before it.
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
      default: return "unknown error";
    }
  }

  [[nodiscard]] std::error_condition default_error_condition(int kind) const noexcept override {
    switch (kind) {
      case BridgeError::TimedOut: return std::errc::timed_out;
      case BridgeError::Cancelled: return std::errc::operation_canceled;
      case BridgeError::WouldDeadlock: return std::errc::resource_deadlock_would_occur;
      default: return {kind, *this};
    }
  }
};

inline const ErrorCategory error_category;

/// A sentence that needs no memory of its own.
inline std::shared_ptr<const char> literal(const char* text) noexcept { return {std::shared_ptr<void>(), text}; }

#ifdef __cpp_lib_expected
template <class T, class E>
using Expected = std::expected<T, E>;
using std::unexpected;
using InPlace = std::in_place_t;
#else
template <class T, class E>
using Expected = tl::expected<T, E>;
using tl::unexpected;
using InPlace = tl::in_place_t;
#endif

inline unexpected<BridgeError> refuse(BridgeError::Kind kind, const char* why) {
  return unexpected<BridgeError>({kind, nullptr, literal(why)});
}

}  // namespace detail

inline std::error_code make_error_code(BridgeError::Kind kind) noexcept { return {kind, detail::error_category}; }

namespace detail {

/// What `unwrap` throws. The text of a plain `std::system_error` would say the kind once more behind the message.
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

inline std::string BridgeError::sentence() const {
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

/// The outcome of a call: `std::expected` where the standard library has it, else `tl::expected`.
template <class T>
using Result = detail::Expected<T, BridgeError>;

namespace detail {

[[noreturn]] inline void throw_error(const BridgeError& error) {
  if (error == BridgeError::ResponseLost && error.cause()) std::rethrow_exception(error.cause());
  throw UnwrapError(error);
}

}  // namespace detail

/// The value of a call, for callers who want exceptions.
///
/// Without a value it rethrows the task's own exception (`ResponseLost` with a cause), else throws a
/// `std::system_error` whose code is the error's kind and whose text is its message.
template <class T>
requires(!std::is_void_v<T>) [[nodiscard]] T unwrap(Result<T>&& result) {
  if (!result.has_value()) detail::throw_error(result.error());
  return *std::move(result);
}
template <class T>
requires std::copy_constructible<T>
[[nodiscard]] T unwrap(const Result<T>& result) {
  if (!result.has_value()) detail::throw_error(result.error());
  return *result;
}
inline void unwrap(const Result<void>& result) {
  if (!result.has_value()) detail::throw_error(result.error());
}
// A compiler that refuses a call shows the line of the function's name.
// clang-format off
template <class T>
  requires(!std::is_void_v<T> && !std::copy_constructible<T>)
T unwrap(const Result<T>& result) = delete;  // The value can only be moved: write unwrap(std::move(result)).
// clang-format on

/// When the worker thread is made.
enum class Start {
  eager,  ///< By the constructor, which fails if it cannot be had.
  lazy,   ///< By the first call, which is `WorkerDead` if it cannot be had; the next call tries again.
};

/// What `shutdown` does with the calls in flight.
enum class Shutdown {
  drain,   ///< Waits for them.
  cancel,  ///< Cancels them, and waits for them to end.
};

struct Options {
  /// The worker's name in debuggers and process lists; cut to what the system takes (15 bytes on Linux).
  std::string thread_name = "runtime-bridge";
  Start start = Start::eager;
  /// Gets, on the worker, each exception that escapes a raw handler on the bridge's context. What the hook itself
  /// throws is dropped, and so is the exception where there is no hook.
  std::function<void(std::exception_ptr)> on_stray_exception = nullptr;
  /// The longest that a thread spins before it sleeps: a caller while its call is the only one in flight, even past its
  /// deadline, and after a call that was spun for the worker, which still serves whatever else comes. With several
  /// calls in flight the callers yield instead, up to 64 times. Whoever spins yields in between as well, unless the
  /// threads that it yields to are found to compute. Nobody spins where that has lately been in vain, on a machine with
  /// one core, and at zero.
  std::chrono::microseconds spin_limit{100};
};

// ---------------------------------------------------------------------------------------------------------------------
// Tasks

namespace detail {

template <class T>
struct AwaitableTraits : std::false_type {
  using Value = T;
  using Executor = asio::io_context::executor_type;
};
template <class T, class Ex>
struct AwaitableTraits<asio::awaitable<T, Ex>> : std::true_type {
  using Value = T;
  using Executor = Ex;
};
template <class T>
inline constexpr bool is_awaitable = AwaitableTraits<std::remove_cvref_t<T>>::value;

using UseAwaitable = asio::use_awaitable_t<asio::io_context::executor_type>;

template <class T>
concept Operation =
    !std::invocable<T> && std::invocable<T, UseAwaitable> && is_awaitable<std::invoke_result_t<T, UseAwaitable>>;

struct NotATask {};

/// What `begin` gives: an awaitable to be driven, or, for a plain callable, the value itself.
template <class Task>
decltype(auto) begin(std::remove_reference_t<Task>& task) {
  if constexpr (is_awaitable<Task>) {
    return std::remove_cvref_t<Task>(std::move(task));
  } else if constexpr (std::invocable<Task>) {
    return std::forward<Task>(task)();
  } else if constexpr (Operation<Task>) {
    return std::forward<Task>(task)(UseAwaitable{});
  } else {
    return NotATask{};
  }
}

/// An awaitable of another Asio, told by its members, as its headers need not be there.
template <class T>
concept OtherAwaitable = !is_awaitable<T> && requires(std::remove_cvref_t<T> & t) {
  typename std::remove_cvref_t<T>::value_type;
  typename std::remove_cvref_t<T>::executor_type;
  t.await_ready();
};

enum class Refusal { none, not_given_up, other_asio, no_task, executor, reference, not_started, immovable };

/// Why a type is not a Task. It looks at one thing at a time, so that nothing fails but the assertion that tells of it.
template <class Task>
consteval Refusal refusal_of() {
  if constexpr (is_awaitable<Task> && std::is_lvalue_reference_v<Task>) {
    return Refusal::not_given_up;
  } else if constexpr (OtherAwaitable<Task>) {
    return Refusal::other_asio;
  } else if constexpr (!is_awaitable<Task> && !std::invocable<Task> && !Operation<Task>) {
    return Refusal::no_task;
  } else {
    using Begun = decltype(begin<Task>(std::declval<std::remove_reference_t<Task>&>()));
    using Traits = AwaitableTraits<std::remove_cvref_t<Begun>>;
    using Value = std::conditional_t<is_awaitable<Begun>, typename Traits::Value, Begun>;
    constexpr bool known_executor = std::is_same_v<typename Traits::Executor, asio::any_io_executor> ||
                                    std::is_same_v<typename Traits::Executor, asio::io_context::executor_type>;
    if constexpr (OtherAwaitable<Begun>) {
      return Refusal::other_asio;
    } else if constexpr (!known_executor) {
      return Refusal::executor;
    } else if constexpr (std::is_reference_v<Value>) {
      return Refusal::reference;
    } else if constexpr (Operation<Value>) {
      return Refusal::not_started;
    } else if constexpr (!std::is_void_v<Value> && !std::is_move_constructible_v<Value>) {
      return Refusal::immovable;
    } else {
      return Refusal::none;
    }
  }
}

template <class Task>
inline constexpr bool is_task = refusal_of<Task>() == Refusal::none;

/// Says what is wrong with what is no Task. Where it is called nothing else is wrong with it.
template <class Task>
constexpr void assert_task() {
  constexpr Refusal refusal = refusal_of<Task>();
  static_assert(refusal != Refusal::not_given_up,
                "runtime_bridge: an awaitable runs once, so give it up: block_on(std::move(task))");
  static_assert(refusal != Refusal::other_asio,
                "runtime_bridge: this awaitable is another library's, such as boost::asio::awaitable: give an "
                "asio::awaitable, of standalone Asio");
  static_assert(refusal != Refusal::no_task,
                "runtime_bridge: not a Task: give an asio::awaitable, a callable without parameters, or an Asio "
                "operation that waits for its token, such as timer.async_wait(asio::deferred)");
  static_assert(refusal != Refusal::executor,
                "runtime_bridge: the awaitable's executor must be asio::any_io_executor (the default) or "
                "asio::io_context::executor_type");
  static_assert(refusal != Refusal::reference,
                "runtime_bridge: a task cannot return a reference: return a copy, a pointer or a "
                "std::reference_wrapper");
  static_assert(refusal != Refusal::not_started,
                "runtime_bridge: the callable returns an operation that nobody starts: give block_on the operation, or "
                "co_await it in a coroutine");
  static_assert(refusal != Refusal::immovable, "runtime_bridge: a task's result must be movable");
}

template <class Task, Refusal refusal = refusal_of<Task>()>
struct TaskTraits {
  using Value = void;
};

template <class Task>
struct TaskTraits<Task, Refusal::none> {
  using Begun = decltype(begin<Task>(std::declval<std::remove_reference_t<Task>&>()));
  using Executor = typename AwaitableTraits<std::remove_cvref_t<Begun>>::Executor;
  using Returned =
      std::conditional_t<is_awaitable<Begun>, typename AwaitableTraits<std::remove_cvref_t<Begun>>::Value, Begun>;
  using Value = std::remove_cv_t<Returned>;
};

template <class Task>
using TaskValue = typename TaskTraits<Task>::Value;

// ---------------------------------------------------------------------------------------------------------------------
// The worker and its parts

class Core;

/// Admits calls, counts them, and keeps the context from being shut down while a thread is inside `asio::post`.
///
/// It is one word, so that no call slips in between a check and a count. Bits: closed to calls, closed to posts, the
/// number of threads that are posting, the number of calls in flight.
class Gate {
 public:
  /// Counts a call and its poster, unless the gate is closed to calls.
  bool enter_call() noexcept { return enter(call + poster, no_calls); }

  /// Counts a poster, unless the gate is closed to posts. For a post on behalf of a call that was admitted before.
  bool enter_post() noexcept { return enter(poster, no_posts); }

  /// The poster is through. Pairs with `close`, which may be waiting for it.
  void leave() noexcept {
    const std::uint64_t before = word_.fetch_sub(poster);
    if ((before & no_posts) && posters(before) == 1) word_.notify_all();
  }

  /// A call is over. True if it was the last one of a closed gate.
  bool end_call() noexcept {
    const std::uint64_t before = word_.fetch_sub(call);
    return (before & no_calls) && calls(before) == 1;
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

  bool enter(std::uint64_t who, std::uint64_t closed) noexcept {
    std::uint64_t word = word_.load(std::memory_order_relaxed);
    do {
      if (word & closed) return false;
    } while (!word_.compare_exchange_weak(word, word + who));
    return true;
  }

  static std::uint64_t posters(std::uint64_t word) noexcept { return (word % call) / poster; }
  static std::size_t calls(std::uint64_t word) noexcept { return word / call; }

  std::atomic<std::uint64_t> word_{0};
};

/// The service that opens the descriptors that all I/O of a context goes through.
#ifdef ASIO_HAS_IO_URING_AS_DEFAULT
using Reactor = asio::detail::io_uring_service;
#else
using Reactor = asio::detail::reactor;
#endif

/// The `io_context`, with the things that the worker needs and Asio keeps to itself.
class Context : public asio::io_context {
 public:
  /// Takes the reactor's descriptors now. Asio would take them with the first timer or socket, and fail in the user's
  /// hands. Until then the context keeps its faster wait without a reactor.
  void open_reactor() {
    try {
      asio::use_service<Reactor>(*this);
    } catch (const std::system_error& e) {
      // Asio's own category compares equal to no std::errc in some versions.
      throw std::system_error(e.code().value(), std::system_category(), "runtime_bridge: no reactor");
    }
  }

  /// Destroys every operation of Asio's that waits on this context, but for those on channels, and with it the
  /// coroutines that await it. What is queued to run stays queued, for the loop to run. Timers and sockets are of no
  /// use afterwards.
  ///
  /// Not by `asio::execution_context::shutdown`. That shuts down the scheduler as well, which empties its queue without
  /// its lock: a foreign thread that posts just then would corrupt it. And it shuts down the resolvers, which crash
  /// when they are used afterwards. A look-up that is under way is on a thread of Asio's, and thus foreign.
  void destroy_parked() {
    shut_down<asio::detail::signal_set_service>();
#ifdef ASIO_HAS_IO_URING
    shut_down<asio::detail::io_uring_service>();
#endif
    shut_down<asio::detail::reactor>();
  }

  /// Destroys the operations that wait on channels. Last, as a coroutine that is destroyed may use one, to give back
  /// what it has borrowed from a pool for instance, and Asio's channels do not bear that afterwards.
  void destroy_on_channels() {
    shut_down<asio::experimental::detail::channel_service<asio::detail::null_mutex>>();
    shut_down<asio::experimental::detail::channel_service<asio::detail::mutex>>();
  }

  /// Forgets so many operations that were destroyed. Asio does not: a destroyed operation, unless it was a channel's,
  /// leaves its work behind, and the loop would never run out of it. Returns how many there were to forget.
  std::size_t forget_operations(std::size_t number) {
    std::size_t forgotten = 0;
    for (; forgotten < number && !stopped(); ++forgotten) scheduler().work_finished();
    return forgotten;
  }

  /// Takes that back.
  void remember_operations(std::size_t number) {
    for (; number != 0; --number) scheduler().work_started();
  }

 private:
  asio::detail::io_context_impl& scheduler() { return asio::use_service<asio::detail::io_context_impl>(*this); }

  template <class Service>
  void shut_down() {
    if (asio::has_service<Service>(*this)) asio::use_service<Service>(*this).shutdown();
  }
};

/// Counts the forks between the process that made a bridge and this one. The child of a fork has the bridge's memory
/// but not its worker, and locks that other threads held stay locked there for ever.
///
/// Each module has this once: a plugin beside the program, if the linker does not unite their symbols. A bridge uses
/// that of the module that made it, whichever calls it.
struct Forks {
  static unsigned count() {
    if (failed) throw std::system_error(failed, std::generic_category(), "runtime_bridge: pthread_atfork");
    return seen.load(std::memory_order_relaxed);
  }

  static inline std::atomic<unsigned> seen{0};
  static inline std::mutex ring_mutex;  // guards Core::waits_for_ of all bridges that the module made

  // Before main, and not where it is needed first: the guard of a function's static stays locked in a child if another
  // thread holds it during the fork.
  static inline const int failed = pthread_atfork([] { ring_mutex.lock(); }, [] { ring_mutex.unlock(); },
                                                  [] {
                                                    ring_mutex.unlock();
                                                    seen.fetch_add(1, std::memory_order_relaxed);
                                                  });
};

/// Keeps signals from this thread, and from those that it starts meanwhile. But for those of a fault, which are for the
/// thread that commits it: blocked they would end the process past the handlers of crash reporters and sanitizers.
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

/// Memory for one posted operation, inside the call that posts it: posting then needs no allocation and cannot fail.
class OperationMemory {
 public:
  void* take(std::size_t size) { return size <= bytes_.size() ? bytes_.data() : ::operator new(size); }
  void give_back(void* memory) noexcept {
    if (memory != bytes_.data()) ::operator delete(memory);
  }

 private:
  alignas(std::max_align_t) std::array<std::byte, 128> bytes_;
};

template <class T>
struct OperationAllocator {
  using value_type = T;

  explicit OperationAllocator(OperationMemory& m) noexcept : memory(&m) {}
  template <class U>
  OperationAllocator(const OperationAllocator<U>& other) noexcept : memory(other.memory) {}

  T* allocate(std::size_t n) { return static_cast<T*>(memory->take(n * sizeof(T))); }
  void deallocate(T* p, std::size_t) noexcept { memory->give_back(p); }
  bool operator==(const OperationAllocator&) const noexcept = default;

  OperationMemory* memory;
};

/// Nanoseconds that do not overflow, for sums with whatever a caller gives.
using Exact = std::chrono::duration<long double, std::nano>;

/// The time until `deadline`: none if it has passed, and else not more than an hour. Long waits are taken in steps, so
/// that no sum overflows, and a clock that can be set is looked at every second.
template <class Clock, class Duration>
std::chrono::nanoseconds time_left(const std::chrono::time_point<Clock, Duration>& deadline) {
  constexpr std::chrono::seconds step(Clock::is_steady ? 3600 : 1);
  if (deadline == (deadline.max)()) return step;  // without a look at the clock, for most calls have no deadline
  const Exact left = Exact(deadline.time_since_epoch()) - Exact(Clock::now().time_since_epoch());
  if (!(left > Exact::zero())) return std::chrono::nanoseconds::zero();
  return left < step ? std::chrono::ceil<std::chrono::nanoseconds>(left) : step;
}

using SteadyTime = std::chrono::steady_clock::time_point;

/// The time after `duration` from now; the clock's last time if that is further off than the clock can tell.
template <class Rep, class Period>
SteadyTime time_after(const std::chrono::duration<Rep, Period>& duration) {
  const SteadyTime now = std::chrono::steady_clock::now();
  const Exact exact(duration);
  if (!(exact > Exact::zero())) return now;
  if (exact >= Exact((SteadyTime::max)() - now)) return (SteadyTime::max)();
  return now + std::chrono::ceil<std::chrono::nanoseconds>(exact);
}

/// Whether to spin, judged by how the last times ended: after each that was in vain twice as many are left out, up to
/// 255. It is a guess, so races between callers do no harm.
class Experience {
 public:
  bool encourages() noexcept {
    const unsigned left = left_out_.load(std::memory_order_relaxed);
    if (left != 0) left_out_.store(left - 1, std::memory_order_relaxed);
    return left == 0;
  }

  void learn(bool success) noexcept {
    const unsigned before = turns_.load(std::memory_order_relaxed);
    const unsigned turns = success ? 1 : before < 256 ? 2 * before : before;
    turns_.store(turns, std::memory_order_relaxed);
    left_out_.store(turns - 1, std::memory_order_relaxed);
  }

 private:
  std::atomic<unsigned> turns_{1};  // of so many one is taken
  std::atomic<unsigned> left_out_{0};
};

/// Tells the processor that this is a spin.
inline void pause() noexcept {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

class Ticket;
struct Running;

/// A call in flight. It lives where its caller waits, or with its `JoinHandle`; the worker writes its outcome here
/// before it answers.
class Call {
 public:
  Call(const Call&) = delete;
  Call& operator=(const Call&) = delete;
  virtual ~Call() = default;

  void wait() const noexcept { answered_.wait(); }

  /// Waits for the answer until `deadline`, of whatever clock. False if it did not come.
  template <class Clock, class Duration>
  bool wait_until(const std::chrono::time_point<Clock, Duration>& deadline) const {
    while (deadline != (deadline.max)()) {
      const std::chrono::nanoseconds left = time_left(deadline);
      if (answered_.wait_for(left) == std::future_status::ready) return true;
      if (left == std::chrono::nanoseconds::zero()) return false;
    }
    answered_.wait();
    return true;
  }

  /// For a submitted call, which lives until it is over even if nobody waits for it.
  void keep(std::shared_ptr<Call> self) noexcept { self_ = std::move(self); }

  /// Answers a call that was not sent.
  void refuse(BridgeError error) {
    tickets_ = 0;  // it is over: a stop must not post for it
    release_task();
    self_.reset();
    refusal_ = std::move(error);
    if (!answered()) answer_.set_value();
  }

  /// Leaves a submitted call to itself. Its handle keeps it, as other threads may be asking the handle.
  void detach() noexcept { detached_.store(true, std::memory_order_relaxed); }
  bool detached() const noexcept { return detached_.load(std::memory_order_relaxed); }

  bool answered() const noexcept {
    return answered_.wait_for(std::chrono::nanoseconds::zero()) == std::future_status::ready;
  }

  /// Why there is no value. For a call that was answered without one.
  BridgeError error() const {
    if (refusal_) return *refusal_;
    const int asked = asked_.load();
    // A task that was destroyed with its coroutine suspended was neither cancelled nor failed.
    const bool ended = cause_ || stage_ == Stage::queued;
    if (asked != 0 && ended && !cut_off_) return {static_cast<BridgeError::Kind>(asked), cause_};
    if (cause_ && !cut_off_) return {BridgeError::ResponseLost, cause_, literal("the task threw")};
    if (stage_ == Stage::starting) {
      return {BridgeError::ResponseLost, std::make_exception_ptr(std::bad_alloc()), literal("the task did not start")};
    }
    return {BridgeError::ResponseLost, nullptr,
            literal(abandoned_ ? "the worker was stopped under the task" : "the task was destroyed before its end")};
  }

 protected:
  enum class Stage { queued, starting, running };

  Call() = default;

  Stage stage_ = Stage::queued;
  std::exception_ptr cause_;
  Running* running_ = nullptr;  // the worker's own: what cancels the task while it runs
  bool cut_off_ = false;        // the worker was stopped under the task
  bool abandoned_ = false;      // the worker had been stopped when it ended
  OperationMemory start_memory_;

 private:
  friend class Core;
  friend class Ticket;

  /// Begins the task. On the worker.
  virtual void start(Ticket ticket) noexcept = 0;

  /// Destroys the task, if it is the call's own.
  virtual void release_task() noexcept = 0;

  /// Makes one more ticket possible. False if there is none any more: the call is over.
  bool hold() noexcept {
    int tickets = tickets_.load(std::memory_order_relaxed);
    do {
      if (tickets == 0) return false;
    } while (!tickets_.compare_exchange_weak(tickets, tickets + 1));
    return true;
  }

  /// Notes why the call is cancelled. False if that has been asked for before.
  bool ask(BridgeError::Kind why) noexcept {
    int none = 0;
    return asked_.compare_exchange_strong(none, why);
  }

  std::promise<void> answer_;
  std::future<void> answered_ = answer_.get_future();
  std::optional<BridgeError> refusal_;
  std::shared_ptr<Call> self_;  // a submitted call keeps itself until it is over
  std::atomic<int> tickets_{1};
  std::atomic<int> asked_{0};           // the BridgeError::Kind that cancellation was asked for with
  std::atomic<Core*> waiter_{nullptr};  // the bridge whose worker waits for this call; its own bridge once it is over
  std::atomic<bool> detached_{false};   // from its handle
  OperationMemory cancel_memory_;
};

/// The right to end a call. Whoever drops the last one of a call answers the caller.
class Ticket {
 public:
  Ticket(Core& core, Call& call) noexcept : core_(&core), call_(&call) {}
  Ticket(Ticket&& other) noexcept : core_(other.core_), call_(std::exchange(other.call_, nullptr)) {}
  Ticket& operator=(Ticket&&) = delete;
  ~Ticket();

  Core& core() const noexcept { return *core_; }
  Call& call() const noexcept { return *call_; }

 private:
  Core* core_;
  Call* call_;
};

/// What cancels a coroutine. It is the worker's, and used on the worker only, because Asio touches it for a moment
/// after the call is over.
struct Running {
  explicit Running(const Core& c) noexcept : core(c) {}

  const Core& core;
  asio::cancellation_signal signal;
  Call* call = nullptr;          // null unless the task runs
  bool remembered = false;       // the task has been told that it is cancelled
  std::optional<Ticket> ticket;  // of a task that was destroyed: what is left of it in the signal must go first
  std::list<Running>* home = nullptr;
};

/// Forgets the exceptions of a driver, which has none, and gives its `Running` back when Asio is through with it.
class Finished {
 public:
  explicit Finished(Core& core);
  Finished(Finished&& other) noexcept : core_(std::exchange(other.core_, nullptr)), running_(other.running_) {}
  Finished& operator=(Finished&&) = delete;
  ~Finished();

  Running& running() const noexcept { return *running_; }
  void operator()(const std::exception_ptr&) const noexcept {}

 private:
  Core* core_;
  std::list<Running>::iterator running_;
};

/// The bridge's inside: co-owned by the bridge, its worker, its handles and every thread in one of its functions.
class Core : public std::enable_shared_from_this<Core> {
 public:
  explicit Core(Options options) : options_(std::move(options)) {}
  Core(const Core&) = delete;
  Core& operator=(const Core&) = delete;

  asio::io_context::executor_type get_executor() noexcept { return context_.get_executor(); }
  std::size_t in_flight() const noexcept { return gate_.in_flight(); }
  bool forked() const noexcept { return forks_ != seen_forks_.load(std::memory_order_relaxed); }

  /// Whether this thread is the worker. By its id, as a plugin does not see the thread_locals of the module that made
  /// the bridge.
  bool on_worker() const noexcept { return worker_.load(std::memory_order_relaxed) == std::this_thread::get_id(); }

  /// Whether operations were destroyed under the tasks. What a task says after that is worth nothing: reads and writes
  /// on services that are shut down succeed, with no bytes.
  bool has_destroyed() const noexcept { return emission_ == Emission::mark; }

  /// What emitting does: it cancels; or, when the worker is stopped, it first aborts what the task waits for, and last
  /// lets the task know of it, but not what it waits for.
  enum class Emission { cancel, abort, mark };
  Emission emission() const noexcept { return emission_; }

  /// Keeps an owner for ever, where a leak checker finds it. For the child of a fork, where nothing in here can be
  /// destroyed without the worker, and for a worker that outlives the bridge.
  static void leave(std::shared_ptr<Core> core) noexcept {
    Core& self = *core;
    self.left_before_ = left_.exchange(&self);
    self.left_owner_ = std::move(core);
  }

  /// Starts the worker, unless it was started or the gate is closed.
  void start();

  /// Admits the call and sends it to the worker, or says why not. Once it is sent it will be answered, whatever
  /// happens. `waits` tells whether this thread is going to wait for the answer.
  std::optional<BridgeError> post(Call& call, bool waits);

  /// Asks the worker to cancel the call, unless it is over or that was asked for before.
  void cancel(Call& call, BridgeError::Kind why) noexcept;

  /// If this thread is a worker, notes that it is about to wait for this bridge: for `call`, or for its end. If that
  /// would close a ring of waiting workers it notes nothing, puts the names of the ring into `ring` and returns false.
  /// A worker waits for at most one bridge, so following the notes finds every ring, and only rings.
  bool begin_wait(Call* call, std::shared_ptr<const char>* ring = nullptr);

  /// Waits a little for the answer without sleeping, if that is promising. True if it has come.
  bool spin(const Call& call) noexcept;

  /// Takes the note back, for a wait that ended without an answer.
  void end_wait(Call* call) noexcept;

  /// Admits no more calls, ends the worker once those in flight are over or at `deadline`, and waits for that. False if
  /// calls were left. `last` if the bridge is being destroyed: a worker that cannot be waited for then ends by itself.
  bool shut_down(Shutdown how, SteadyTime deadline, bool last) noexcept;

 private:
  friend class Ticket;
  friend class Finished;

  class Poster {
   public:
    explicit Poster(Gate& gate) noexcept : gate_(gate) {}
    Poster(const Poster&) = delete;
    Poster& operator=(const Poster&) = delete;
    ~Poster() { gate_.leave(); }

   private:
    Gate& gate_;
  };

  std::shared_ptr<const char> name_ring(const Core& first) const;
  void end_call(Call& call) noexcept;
  void cancel_calls() noexcept;
  void stop() noexcept;
  template <class Condition>
  void emit_to_all(Condition condition) noexcept;
  void run() noexcept;
  std::size_t end_calls() noexcept;
  void settle(std::size_t destroyed) noexcept;
  std::size_t poll_one() noexcept;
  void run_what_is_ready() noexcept;
  void forget_worker() noexcept;
  void linger();
  void keep_awake() noexcept;
  bool yield() noexcept;

  /// Posts `handler`, in memory that is there already.
  template <class Handler>
  void post_in(OperationMemory& memory, Handler handler) {
    asio::post(context_, asio::bind_allocator(OperationAllocator<void>(memory), std::move(handler)));
  }

  /// Runs a step of the loop; what escapes a raw handler goes to the hook, and the step is taken again.
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

  /// Hands the exception that is being handled to the hook.
  void report_stray() noexcept {
    try {
      if (options_.on_stray_exception) options_.on_stray_exception(std::current_exception());
    } catch (...) {
    }
  }

  void emit(Running& running) noexcept {
    if (emission_ != Emission::abort) running.remembered = true;
    try {
      running.signal.emit(asio::cancellation_type::terminal);
    } catch (...) {
      report_stray();
    }
  }

  static Core*& current() noexcept {
    static thread_local constinit Core* core = nullptr;
    return core;
  }

  static inline std::atomic<Core*> left_{nullptr};  // a list
  static inline std::atomic<unsigned> made_{0};

  const Options options_;
  const unsigned number_ = ++made_;  // tells it from others of the same name

  // Of the module that made the bridge, whichever calls it.
  const std::atomic<unsigned>& seen_forks_ = Forks::seen;
  std::mutex& ring_mutex_ = Forks::ring_mutex;
  Core*& (*const current_)() noexcept = current;  // the bridge whose worker this thread is, if that module made it

  const unsigned forks_ = Forks::count();
  const bool one_core_ = std::thread::hardware_concurrency() == 1;
  Gate gate_;
  std::atomic<bool> started_{false};
  std::atomic<std::thread::id> worker_{};
  std::atomic<bool> cancel_asked_{false};
  OperationMemory cancel_memory_;
  Experience spins_;
  std::atomic<int> spinners_{0};                               // callers that spin; a hint
  std::atomic<SteadyTime> yields_again_{(SteadyTime::min)()};  // until then nobody does

  // The worker's own.
  Experience lingers_;
  OperationMemory linger_memory_;
  SteadyTime linger_end_;
  bool lingering_ = false;
  bool called_ = false;      // since it has begun to linger
  bool stopped_ = false;     // what is queued still is not to be started any more
  bool cancelling_ = false;  // nor this, because its call is cancelled
  Emission emission_ = Emission::cancel;
  std::size_t destroyed_ = 0;  // tasks, since it was set to zero
  std::list<Running> running_;
  std::list<Running> to_cancel_;
  std::list<Running> spare_;

  Context context_;  // below what its handlers use when they are destroyed with it
  std::optional<asio::executor_work_guard<asio::io_context::executor_type>> work_{context_.get_executor()};

  std::shared_ptr<Core> left_owner_;
  Core* left_before_ = nullptr;

  // Guarded by `ring_mutex_`.
  Core* waits_for_ = nullptr;
  const Call* waits_for_call_ = nullptr;

  std::mutex mutex_;  // guards what follows
  std::condition_variable changed_;
  std::thread thread_;
  bool ended_ = true;       // there is no worker: not yet, or not any more
  bool joined_ = true;      // nor its thread
  bool abandoned_ = false;  // it was stopped under calls
};

/// What a task's cancellation lets in: it is remembered, and makes every later `co_await` throw. Asio's default until
/// the worker is stopped. Then it is not remembered at first: a loop that swallows every exception would go on for ever
/// without waiting, and could not be destroyed where it waits.
struct Remembers {
  const Running* running;
  asio::cancellation_type operator()(asio::cancellation_type type) const noexcept {
    const bool only_aborts = running->core.emission() == Core::Emission::abort && !running->remembered;
    return only_aborts ? asio::cancellation_type::none : type & asio::cancellation_type::terminal;
  }
};

/// What a task's cancellation passes on to the operation that is waited for.
struct PassesOn {
  const Running* running;
  asio::cancellation_type operator()(asio::cancellation_type remembered) const noexcept {
    switch (running->core.emission()) {
      case Core::Emission::abort: return asio::cancellation_type::terminal;
      case Core::Emission::mark: return asio::cancellation_type::none;
      default: return remembered;
    }
  }
};

inline Ticket::~Ticket() {
  if (call_ && call_->tickets_.fetch_sub(1) == 1) core_->end_call(*call_);
}

inline Finished::Finished(Core& core) : core_(&core) {
  if (core.spare_.empty()) core.spare_.emplace_back(core);
  running_ = core.spare_.begin();
  core.running_.splice(core.running_.end(), core.spare_, running_);
  running_->home = &core.running_;
}

inline Finished::~Finished() {
  if (!core_) return;
  std::optional<Ticket> ticket;
  if (running_->ticket) {
    // A destroyed operation has left its handler in the slot, with whatever that captured.
    running_->signal.slot().clear();
    ticket.emplace(*std::move(running_->ticket));
    running_->ticket.reset();
    ++core_->destroyed_;
  }
  core_->spare_.splice(core_->spare_.end(), *running_->home, running_);
}

inline void Core::start() {
  // Pairs with the store below: who sees it need not take the lock.
  if (started_.load(std::memory_order_acquire)) return;
  const std::lock_guard lock(mutex_);
  // `shut_down` closes the gate before it takes the lock: a worker that is made here is one that it will see.
  if (started_.load(std::memory_order_relaxed) || gate_.closed_to_calls()) return;
  context_.open_reactor();
  const SignalsBlocked blocked;
  thread_ = std::thread([self = shared_from_this()] { self->run(); });
  ended_ = joined_ = false;
  started_.store(true, std::memory_order_release);
}

inline std::optional<BridgeError> Core::post(Call& call, bool waits) {
  const auto dead = [](const char* why, std::exception_ptr cause = nullptr) {
    return BridgeError(BridgeError::WorkerDead, std::move(cause), literal(why));
  };
  if (forked()) return dead("the worker lives in the parent process");
  if (!gate_.enter_call()) return dead("the worker was stopped");
  const Poster poster(gate_);
  Ticket ticket(*this, call);
  std::shared_ptr<const char> ring;
  if (waits && !begin_wait(&call, &ring)) return BridgeError(BridgeError::WouldDeadlock, nullptr, std::move(ring));
  try {
    start();
  } catch (const std::system_error&) {
    return dead("the worker could not be started", std::current_exception());
  }
  if (!started_) return dead("the worker was stopped");

  post_in(call.start_memory_, [t = std::move(ticket)]() mutable {
    Call& c = t.call();
    Core& core = t.core();
    core.called_ = true;
    if (core.cancelling_ && !core.stopped_) c.ask(BridgeError::Cancelled);
    if (!core.stopped_ && c.asked_ == 0) {
      c.start(std::move(t));
    } else {
      c.release_task();  // here, and not where the last ticket happens to be dropped
    }
  });
  return std::nullopt;
}

inline void Core::cancel(Call& call, BridgeError::Kind why) noexcept {
  if (forked() || !gate_.enter_post()) return;
  const Poster poster(gate_);
  if (!call.hold()) return;
  Ticket ticket(*this, call);  // so the call cannot end before the handler below has run
  if (!call.ask(why)) return;
  // Emitted anywhere but on the worker, a cancellation would be a data race inside Asio.
  post_in(call.cancel_memory_, [t = std::move(ticket)] {
    Running* running = t.call().running_;
    if (!running || t.core().has_destroyed()) return;
    running->remembered = true;
    t.core().emit(*running);
  });
}

/// Cancels all calls in flight, those that are not started yet included. Once is enough: no calls come any more.
inline void Core::cancel_calls() noexcept {
  if (cancel_asked_.exchange(true) || !gate_.enter_post()) return;
  const Poster poster(gate_);
  post_in(cancel_memory_, [this] {
    if (stopped_) return;
    cancelling_ = true;
    emit_to_all([](Call& call) { return call.ask(BridgeError::Cancelled); });
  });
}

/// Ends the worker's loop, unless it has ended: what the worker does after it is not to be cut short.
inline void Core::stop() noexcept {
  if (!gate_.enter_post()) return;
  const Poster poster(gate_);
  context_.stop();
}

/// Cancels the coroutines whose call meets the condition. An emit may run other tasks to their end, which takes them
/// off whatever list they are on.
template <class Condition>
void Core::emit_to_all(Condition condition) noexcept {
  to_cancel_.swap(running_);
  for (Running& running : to_cancel_) running.home = &to_cancel_;
  while (!to_cancel_.empty()) {
    Running& running = to_cancel_.front();
    running_.splice(running_.end(), to_cancel_, to_cancel_.begin());
    running.home = &running_;
    if (running.call && condition(*running.call)) emit(running);
  }
}

inline void Core::end_call(Call& call) noexcept {
  call.release_task();
  const bool by_worker = on_worker();
  call.abandoned_ = by_worker && stopped_;
  // Exactly here a waiting worker is free again: a note that stood any longer would be a false alarm.
  Core* none = nullptr;
  if (!call.waiter_.compare_exchange_strong(none, this)) {
    // Whoever gives up waiting takes the same lock, so the waiter found here is alive.
    const std::lock_guard lock(ring_mutex_);
    Core* waiter = call.waiter_.exchange(this);
    if (waiter && waiter->waits_for_call_ == &call) {
      waiter->waits_for_ = nullptr;
      waiter->waits_for_call_ = nullptr;
    }
  }
  // Nothing of the call may be touched once the caller wakes, so take along what answers it.
  std::promise<void> answer = std::move(call.answer_);
  std::exchange(call.self_, nullptr).reset();
  if (gate_.end_call()) context_.stop();
  // A ticket that never got to the worker is dropped by the caller's thread.
  const bool stay_awake = by_worker && !stopped_ && spinners_.load(std::memory_order_relaxed) != 0;
  answer.set_value();
  if (stay_awake) keep_awake();
}

/// A caller that spun for its answer may well call again: the worker had better not be asleep then.
inline void Core::keep_awake() noexcept {
  if (lingering_) {
    lingers_.learn(true);
  } else if (!lingers_.encourages()) {
    return;
  }
  called_ = false;
  linger_end_ = time_after(options_.spin_limit);
  if (!std::exchange(lingering_, true)) linger();
}

/// A handler that comes again and again keeps the loop from going to sleep, and lets everything else through. In
/// between it leaves the loop's lock alone, for whoever posts. While a caller spins it goes on, for what the task waits
/// for may be about to come.
inline void Core::linger() {
  post_in(linger_memory_, [this] {
    if (stopped_) return;
    for (int i = 0; i < 32 && gate_.in_flight() == 0; ++i) pause();
    if (gate_.in_flight() != 0) yield();
    const bool awaited = !called_ || spinners_.load(std::memory_order_relaxed) != 0;
    if (awaited && std::chrono::steady_clock::now() < linger_end_) return linger();
    lingering_ = false;
    lingers_.learn(called_);
  });
}

/// Lets other threads have the processor: who makes the next call or the answer may be one of them. A thread that
/// computes keeps it for milliseconds, though, and would have been preempted by whoever wakes up. So once that happens
/// nobody yields for a while, and this is false.
inline bool Core::yield() noexcept {
  const SteadyTime before = std::chrono::steady_clock::now();
  if (before < yields_again_.load(std::memory_order_relaxed)) return false;
  std::this_thread::yield();
  const SteadyTime after = std::chrono::steady_clock::now();
  if (after - before < std::chrono::milliseconds(1)) return true;
  yields_again_.store(after + std::chrono::milliseconds(100), std::memory_order_relaxed);
  return false;
}

inline bool Core::spin(const Call& call) noexcept {
  if (one_core_ || options_.spin_limit <= std::chrono::microseconds::zero() || !spins_.encourages()) return false;
  const auto alone = [&] { return gate_.in_flight() <= 1; };
  const SteadyTime end = time_after(options_.spin_limit);
  spinners_.fetch_add(1, std::memory_order_relaxed);
  bool answered = false;
  bool yields = true;
  int turns = 64;
  do {
    for (int i = 0; i < 32 && !answered && alone(); ++i) {
      pause();
      answered = call.answered();
    }
    if (answered) break;
    yields = yields && yield();
    answered = call.answered();
  } while (!answered && (alone() ? std::chrono::steady_clock::now() < end : yields && --turns > 0));
  spinners_.fetch_sub(1, std::memory_order_relaxed);
  spins_.learn(answered);
  return answered;
}

inline bool Core::begin_wait(Call* call, std::shared_ptr<const char>* ring) {
  Core* const waiter = on_worker() ? this : current_();
  if (!waiter) return true;
  const std::lock_guard lock(ring_mutex_);
  Core* last = this;
  while (last != waiter && last->waits_for_) last = last->waits_for_;
  if (last == waiter) {
    if (ring) *ring = waiter->name_ring(*this);
    return false;
  }
  Core* none = nullptr;
  if (call && !call->waiter_.compare_exchange_strong(none, waiter)) return true;  // it is over
  waiter->waits_for_ = this;
  waiter->waits_for_call_ = call;
  return true;
}

/// The ring that a wait of this bridge's worker for `first` would close. The lock is held.
inline std::shared_ptr<const char> Core::name_ring(const Core& first) const {
  const auto name = [&](const Core& core) {
    const auto is_namesake = [&](const Core& other) {
      return &other != &core && other.options_.thread_name == core.options_.thread_name;
    };
    bool ambiguous = is_namesake(*this);
    for (const Core* c = &first; c != this; c = c->waits_for_) ambiguous = ambiguous || is_namesake(*c);
    std::string text = core.options_.thread_name;
    if (ambiguous) text.append("#").append(std::to_string(core.number_));
    return text;
  };
  auto text = std::make_shared<std::string>("the call would wait for itself: ");
  *text += name(*this);
  for (const Core* c = &first; c != this; c = c->waits_for_) *text += " -> " + name(*c);
  *text += " -> " + name(*this);
  return {text, text->c_str()};
}

inline void Core::end_wait(Call* call) noexcept {
  Core* waiter = current_();
  if (!waiter) return;
  const std::lock_guard lock(ring_mutex_);
  waiter->waits_for_ = nullptr;
  waiter->waits_for_call_ = nullptr;
  if (call) call->waiter_.compare_exchange_strong(waiter, nullptr);
}

inline void Core::run() noexcept {
  worker_.store(std::this_thread::get_id(), std::memory_order_relaxed);
  current_() = this;
#ifdef __linux__
  pthread_setname_np(pthread_self(), options_.thread_name.substr(0, 15).c_str());
#endif
  survive([&] { return context_.run(); });

  // Somebody stopped the context. From here on no thread of ours posts, and nothing is started.
  gate_.close();
  stopped_ = true;
  const bool abandoned = gate_.in_flight() != 0;
  settle(end_calls());

  const std::lock_guard lock(mutex_);
  ended_ = true;
  abandoned_ = abandoned;
  changed_.notify_all();
  // A thread that was detached may outlive this object, and the destructors of its thread_locals may make calls.
  if (joined_) forget_worker();
}

/// The thread that was the worker is not any more.
inline void Core::forget_worker() noexcept {
  worker_.store({}, std::memory_order_relaxed);
  if (current_() == this) current_() = nullptr;
}

/// Ends the calls in flight. Tasks are cancelled while all that they wait for is alive, and destroyed only if that has
/// not ended them: a cancellation must not reach what was destroyed. Returns how many operations were destroyed, if
/// nothing foreign was about: what an operation leaves behind looks like a foreign thread.
inline std::size_t Core::end_calls() noexcept {
  const auto emit_to_tasks = [&](Emission emission) {
    emission_ = emission;
    emit_to_all([](Call& call) { return call.cut_off_ = true; });
  };
  // More than once, for what was ready to go on may wait only now, and a task may try again. It is not told that it was
  // cancelled, for then a loop that swallows every exception would go on for ever, without waiting.
  for (int round = 0; round < 3 && gate_.in_flight() != 0; ++round) {
    emit_to_tasks(Emission::abort);
    run_what_is_ready();
  }
  if (gate_.in_flight() == 0) return 0;

  // What waits on this context is destroyed now. What comes back from elsewhere is to end at its next co_await.
  emit_to_tasks(Emission::mark);
  destroyed_ = 0;
  context_.destroy_parked();
  run_what_is_ready();
  const std::size_t destroyed = destroyed_;  // without those on channels, which leave nothing behind
  context_.destroy_on_channels();
  run_what_is_ready();
  if (gate_.in_flight() == 0) return destroyed;

  // What waits elsewhere comes back to this context, which must not die before.
  while (gate_.in_flight() != 0) {
    if (poll_one() != 0) continue;
    context_.destroy_parked();
    if (poll_one() != 0) continue;
    context_.destroy_on_channels();
    if (poll_one() == 0 && gate_.in_flight() != 0) survive([&] { return context_.run_one(); });
  }
  return 0;
}

/// Runs a handler, if one is ready, even if somebody has stopped the context again.
inline std::size_t Core::poll_one() noexcept {
  context_.restart();
  return survive([&] { return context_.poll_one(); });
}

/// Runs handlers until none is ready. A coroutine that never waits always has one, so after some time it is let be.
inline void Core::run_what_is_ready() noexcept {
  const SteadyTime end = std::chrono::steady_clock::now() + std::chrono::milliseconds(5);
  int handlers = 0;
  for (int rounds = 0; handlers != 1 && (rounds < 4 || std::chrono::steady_clock::now() < end); ++rounds) {
    // The queue is served in order: when this has passed, each handler that was queued has run.
    OperationMemory memory;
    bool passed = false;
    post_in(memory, [&] { passed = true; });
    handlers = 0;
    do {
      poll_one();
      ++handlers;
    } while (!passed);
  }
}

/// Waits for foreign threads, and destroys what raw users of the executor have left behind.
inline void Core::settle(std::size_t destroyed) noexcept {
  // A foreign thread that has just handed a task back still holds the context for some instructions, and may be
  // preempted there. If nothing else does, this returns as soon as it lets go; but Asio cannot tell it from operations
  // that were destroyed or left behind, so with such give it time.
  context_.restart();
  work_.reset();
  const std::size_t forgotten = context_.forget_operations(destroyed);
  const auto end = std::chrono::steady_clock::now() + std::chrono::milliseconds(200);
  // More than once, if somebody stops the context again. Without work it returns at once.
  for (int times = 0; times < 3; ++times) {
    survive([&] { return context_.run_until(end); });
    context_.restart();
  }
  work_.emplace(context_.get_executor());
  context_.remember_operations(forgotten);

  context_.destroy_parked();  // what waits on a channel is destroyed with the context
  run_what_is_ready();
}

inline bool Core::shut_down(Shutdown how, SteadyTime deadline, bool last) noexcept {
  gate_.close_to_calls();
  if (how == Shutdown::cancel) cancel_calls();
  const auto none = std::chrono::nanoseconds::zero();
  // With calls in flight the last of them does this.
  if (gate_.in_flight() == 0 || time_left(deadline) == none) stop();

  if (!begin_wait(nullptr)) {
    const std::lock_guard lock(mutex_);
    if (last && thread_.joinable()) {
      thread_.detach();
      joined_ = true;
      // After its loop a worker still destroys its thread_locals, which may make calls: they must not find the bridge.
      if (ended_ && on_worker()) {
        forget_worker();
      } else if (ended_) {
        leave(shared_from_this());  // one of them makes a call just now
      }
    }
    return gate_.in_flight() == 0;
  }
  std::unique_lock lock(mutex_);
  while (!ended_) {
    const std::chrono::nanoseconds left = time_left(deadline);
    if (left == none) {
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
    forget_worker();  // its id may be another thread's from now on
    joined_ = true;
    changed_.notify_all();
  } else {
    changed_.wait(lock, [&] { return joined_; });
  }
  end_wait(nullptr);
  return !abandoned_;
}

// ---------------------------------------------------------------------------------------------------------------------
// A call and its task

/// A call that may end with a `T`.
template <class T>
class ResultCall : public Call {
  using Stored = std::conditional_t<std::is_void_v<T>, std::monostate, T>;

 public:
  /// For a call that was answered.
  Result<T> result() {
    if (!value_) return unexpected<BridgeError>(error());
    if constexpr (std::is_void_v<T>) {
      return {};
    } else {
      try {
        return Result<T>(InPlace{}, std::move(*value_));
      } catch (...) {
        return unexpected<BridgeError>(
            {BridgeError::ResponseLost, std::current_exception(), literal("the task threw")});
      }
    }
  }

 protected:
  std::optional<Stored> value_;
};

/// A call of one kind of Task, which is borrowed from the caller (`Held` is a pointer) or the call's own (`Held` is a
/// `std::optional`).
template <class Task, class Held>
class TaskCall final : public ResultCall<TaskValue<Task>> {
  using Traits = TaskTraits<Task>;

 public:
  template <class T>
  TaskCall(std::in_place_t, T&& task) : held_(hold(std::forward<T>(task))) {}

 private:
  template <class T>
  static Held hold(T&& task) {
    if constexpr (std::is_pointer_v<Held>) {
      return std::addressof(task);
    } else {
      return Held(std::forward<T>(task));
    }
  }

  void start(Ticket ticket) noexcept override {
    this->stage_ = Call::Stage::starting;
    if constexpr (is_awaitable<typename Traits::Begun>) {
      // Without memory for the coroutines the ticket is dropped on the way, and the stage tells the caller why.
      Core& core = ticket.core();
      try {
        Finished finished(core);
        Running& running = finished.running();
        asio::co_spawn(core.get_executor(), drive(std::move(ticket), *this, running),
                       asio::bind_cancellation_slot(running.signal.slot(), std::move(finished)));
      } catch (...) {
      }
    } else {
      this->stage_ = Call::Stage::running;
      try {
        if constexpr (std::is_void_v<typename Traits::Value>) {
          begin<Task>(*held_);
          this->value_.emplace();
        } else {
          this->value_.emplace(begin<Task>(*held_));
        }
      } catch (...) {
        this->cause_ = std::current_exception();
      }
      release_task();
    }
  }

  void release_task() noexcept override {
    if constexpr (!std::is_pointer_v<Held>) held_.reset();
  }

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wzero-as-null-pointer-constant"  // g++ 12 means its own code in a coroutine
#endif

  /// While it lives the task can be cancelled; with it, the task dies.
  class Cancellable {
   public:
    Cancellable(Ticket& ticket, TaskCall& call, Running& running) noexcept
        : call_(call), running_(running), ticket_(std::move(ticket)) {
      call.running_ = &running;
      running.call = &call;
      running.remembered = false;
    }
    Cancellable(const Cancellable&) = delete;
    Cancellable& operator=(const Cancellable&) = delete;
    ~Cancellable() {
      running_.call = nullptr;
      call_.running_ = nullptr;
      call_.release_task();
      if (!ended_) running_.ticket.emplace(std::move(ticket_));
    }

    void end() noexcept { ended_ = true; }

   private:
    TaskCall& call_;
    Running& running_;
    bool ended_ = false;  // the task was not destroyed
    Ticket ticket_;
  };

  /// Runs an awaitable as `co_await` does, but leaves its frame and its result where they are: it may come back on
  /// another thread.
  struct Enter {
    using Executor = typename Traits::Executor;

    asio::detail::awaitable_thread<Executor>* operator()(asio::detail::awaitable_frame_base<Executor>* base) const {
      using Frame = asio::detail::awaitable_frame<void, Executor>;
      awaitable.await_suspend(asio::detail::coroutine_handle<Frame>::from_promise(static_cast<Frame&>(*base)));
      return nullptr;
    }

    std::remove_cvref_t<typename Traits::Begun>& awaitable;
  };

  /// Runs the task, and outlives it: the first local is destroyed last, so when its ticket answers the caller, the
  /// task's own frame is gone.
  static asio::awaitable<void, typename Traits::Executor> drive(Ticket ticket, TaskCall& self, Running& running) {
    Core& core = ticket.core();
    Cancellable cancellable(ticket, self, running);
    try {
      co_await asio::this_coro::reset_cancellation_state(Remembers{&running}, PassesOn{&running});
      self.stage_ = Call::Stage::running;
      auto awaitable = begin<Task>(*self.held_);
      if (!awaitable.valid()) throw std::invalid_argument("runtime_bridge: an awaitable that was given up before");
      const Enter enter{awaitable};
      co_await enter;
      // A task that went on elsewhere is brought back. Whether it is cancelled meanwhile is the worker's to know, so
      // that is not looked at here.
      while (!core.on_worker()) {
        co_await asio::this_coro::throw_if_cancelled(false);
        try {
          const auto post = self.post_back(core);
          const asio::use_awaitable_t<typename Traits::Executor> token;
          co_await asio::async_initiate<decltype(token), void()>(post, token);
        } catch (const std::bad_alloc&) {
          std::this_thread::yield();
        }
      }
      if (!core.has_destroyed()) self.take(awaitable);
    } catch (...) {
      self.cause_ = std::current_exception();
    }
    // Nothing of the task stays in the signal: not the handler of its last operation, nor its filters.
    co_await asio::this_coro::reset_cancellation_state();
    cancellable.end();
  }

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic pop
#endif

  auto post_back(Core& core) noexcept {
    return [&core, memory = OperationAllocator<void>(this->start_memory_)](auto handler) {
      // The worker may go on at once, and end, while this thread is still inside asio::post.
      const std::shared_ptr<Core> alive = core.shared_from_this();
      const auto executor = alive->get_executor();
      asio::post(executor, asio::bind_allocator(memory, asio::bind_executor(executor, std::move(handler))));
    };
  }

  template <class Awaitable>
  void take(Awaitable& awaitable) {
    if constexpr (std::is_void_v<typename Traits::Value>) {
      awaitable.await_resume();
      this->value_.emplace();
    } else {
      this->value_.emplace(awaitable.await_resume());
    }
  }

  Held held_;
};

/// A call whose caller waits for it: it borrows a callable, and takes an awaitable.
template <class Task>
using WaitedCall = TaskCall<Task, std::conditional_t<is_awaitable<Task>, std::optional<std::remove_reference_t<Task>>,
                                                     std::remove_reference_t<Task>*>>;

/// A call that owns its task.
template <class Task>
using SubmittedCall = TaskCall<std::decay_t<Task>, std::optional<std::decay_t<Task>>>;

}  // namespace detail

// ---------------------------------------------------------------------------------------------------------------------
// The bridge

template <class T>
class JoinHandle;

/// A worker thread with a private `asio::io_context`, and the way to call it.
///
/// *Threads.* Every member function may be called from any thread, at the same time as any other; moving and assigning
/// are as for any object. Calls in flight do not touch the bridge itself, so it may be destroyed under them.
///
/// *Lifetimes.* I/O objects built on the bridge's executor must be destroyed before the bridge, and must not be built
/// by other threads while it is shut down: Asio adds its services without a lock then. The bridge may be destroyed by a
/// task on its own worker: the worker then ends by itself, after that task's current step. In a part of a task that has
/// gone on on another executor it would wait for that task.
///
/// *fork.* In a child process every call is `WorkerDead`, and shutting down or destroying the bridge does nothing.
class RuntimeBridge {
 public:
  using executor_type = asio::io_context::executor_type;

  /// Makes the worker. Throws `std::system_error` if there is no thread to be had, or no descriptors for its reactor
  /// (with `Start::lazy` that is found out by the first call).
  explicit RuntimeBridge(Options options = {}) {
    const bool eager = options.start == Start::eager;
    core_ = std::make_shared<detail::Core>(std::move(options));
    if (eager) core_->start();
  }

  /// A bridge with this name for its worker and defaults for the rest.
  [[nodiscard]] static RuntimeBridge with_thread_name(std::string name) {
    Options options;
    options.thread_name = std::move(name);
    return RuntimeBridge(std::move(options));
  }

  /// The constructor, for callers without exceptions. `std::errc::not_enough_memory` stands for `std::bad_alloc`.
  [[nodiscard]] static detail::Expected<RuntimeBridge, std::error_code> create(Options options = {}) noexcept {
    try {
      return RuntimeBridge(std::move(options));
    } catch (const std::system_error& e) {
      return detail::unexpected<std::error_code>(e.code());
    } catch (...) {
      return detail::unexpected<std::error_code>(std::make_error_code(std::errc::not_enough_memory));
    }
  }

  /// The moved-from bridge is as one that was shut down, but has no executor.
  RuntimeBridge(RuntimeBridge&&) noexcept = default;

  RuntimeBridge& operator=(RuntimeBridge&& other) noexcept {
    RuntimeBridge taken(std::move(other));
    std::swap(core_, taken.core_);
    return *this;
  }

  /// Stops the worker now and joins it. First the tasks in flight are cancelled, while all that they wait for is alive;
  /// one that ends with a value has it. Then those that ignore it are destroyed on the worker where they wait, and
  /// their callers get `ResponseLost`. A task that waits for something foreign (another context, a pool, a look-up of a
  /// name) is waited for, and so is one that ignores cancellation and never waits.
  ///
  /// With tasks that heed cancellation this is over at once. It takes up to a fifth of a second if something was
  /// destroyed while something foreign was about, or if raw users of the executor have left operations or work behind:
  /// a foreign thread may still be at it.
  ~RuntimeBridge() {
    if (!core_) return;
    if (core_->forked()) {
      detail::Core::leave(std::move(core_));
    } else {
      core_->shut_down(Shutdown::drain, (detail::SteadyTime::min)(), true);
    }
  }

  /// The worker's executor, to build sockets, timers and pools on. The bridge must not be moved from.
  [[nodiscard]] executor_type get_executor() const noexcept {
    assert(core_ && "runtime_bridge: get_executor of a bridge that was moved from");
    return core_->get_executor();
  }

  /// The number of calls that were admitted and have not ended.
  [[nodiscard]] std::size_t in_flight() const noexcept { return core_ ? core_->in_flight() : 0; }

  /// Runs a task on the worker and waits until it is over.
  ///
  /// A Task is an `asio::awaitable`, given as an rvalue; a callable without parameters that returns one, called on the
  /// worker and borrowed until the call is over; a callable without parameters that returns a plain value or void, run
  /// on the worker; or an Asio operation that waits for its token.
  ///
  /// | what happens                                                 | result                                      |
  /// |--------------------------------------------------------------|---------------------------------------------|
  /// | the task returns, even if it was cancelled                   | its value                                   |
  /// | the task throws                                              | `ResponseLost`, with what it threw as cause |
  /// | the worker is stopped under the task, or what the task waits | `ResponseLost`, no cause                    |
  /// | for goes away                                                |                                             |
  /// | the bridge was shut down or moved from, its worker has ended | `WorkerDead`; the task is destroyed unrun   |
  /// | or lives in the parent process, or could not be started      |                                             |
  /// | (then with the cause)                                        |                                             |
  /// | the deadline passes                                          | the task is cancelled and waited for; then  |
  /// |                                                              | `TimedOut`, with what it threw as cause     |
  /// | a stop is requested, or `shutdown(Shutdown::cancel)` comes   | the same, `Cancelled`                       |
  /// | called on the bridge's own worker, or in a way that closes a | `WouldDeadlock`; the task is destroyed      |
  /// | ring of bridges that wait for each other                     | unrun                                       |
  ///
  /// The task is over when this returns: its coroutine was destroyed on the worker, and nothing of it is used there any
  /// more. So it may hold references to the caller's locals. Throws `std::bad_alloc` if there is no memory to make the
  /// call, which then never was.
  ///
  /// A stop may be requested by any thread, the task itself included. Cancellation is Asio's: the operation that the
  /// task waits for ends with `operation_aborted`, and so does every later `co_await`. A task that ignores that is
  /// waited for. A stop that was requested before the call does not start the task.
  ///
  /// Not for coroutines, which can `co_await`; not for work that only computes and so holds up all other calls; not for
  /// a task that waits for something that only the blocked caller could do.
  template <class Task>
  [[nodiscard]] Result<detail::TaskValue<Task>> block_on(Task&& task, std::stop_token stop = {}) const {
    return block_on_until(std::forward<Task>(task), (detail::SteadyTime::max)(), std::move(stop));
  }

  /// `block_on` with a deadline: this long from now. Durations too long for the clock mean no deadline; with zero or
  /// less the task is not started.
  template <class Task, class Rep, class Period>
  [[nodiscard]] Result<detail::TaskValue<Task>> block_on_for(Task&& task, std::chrono::duration<Rep, Period> timeout,
                                                             std::stop_token stop = {}) const {
    return block_on_until(std::forward<Task>(task), detail::time_after(timeout), std::move(stop));
  }

  /// `block_on` with a deadline, by any clock. If it has passed already the task is not started. A clock that is not
  /// steady and is set forward meanwhile may be noticed a second late. What the clock throws is thrown here, after the
  /// task was cancelled and is over.
  template <class Task, class Clock, class Duration>
  [[nodiscard]] Result<detail::TaskValue<Task>> block_on_until(Task&& task,
                                                               std::chrono::time_point<Clock, Duration> deadline,
                                                               std::stop_token stop = {}) const {
    detail::assert_task<Task>();
    if constexpr (!detail::is_task<Task>) {
      return detail::refuse(BridgeError::WorkerDead, "not a Task");
    } else {
      const std::shared_ptr<detail::Core> core = core_;
      detail::WaitedCall<Task> call(std::in_place, std::forward<Task>(task));
      if (!core) return detail::refuse(BridgeError::WorkerDead, "the bridge was moved from");
      if (stop.stop_requested()) return detail::refuse(BridgeError::Cancelled, "a stop was requested before the call");
      if (detail::time_left(deadline) == std::chrono::nanoseconds::zero()) {
        return detail::refuse(BridgeError::TimedOut, "the deadline had passed before the call");
      }
      if (auto refusal = core->post(call, true)) return detail::unexpected<BridgeError>(std::move(*refusal));

      const std::stop_callback on_stop(stop, [&]() noexcept { core->cancel(call, BridgeError::Cancelled); });
      try {
        if (!core->spin(call) && !call.wait_until(deadline)) {
          core->cancel(call, BridgeError::TimedOut);
          call.wait();
        }
      } catch (...) {  // out of the clock
        core->cancel(call, BridgeError::Cancelled);
        call.wait();
        throw;
      }
      return call.result();
    }
  }

  /// Runs a task on the worker without waiting. What it is given must own its data, for it may outlive the caller.
  ///
  /// The task is as for `block_on`, and so is what `JoinHandle::join` returns. Never waits, so it may be called on the
  /// worker itself. Throws `std::bad_alloc` like `block_on`.
  template <class Task>
  JoinHandle<detail::TaskValue<Task>> submit(Task&& task) const;

  /// Admits no more calls, waits for those in flight, and ends the worker. Later calls are `WorkerDead`.
  ///
  /// At `limit` the worker is stopped as by the destructor, and the callers that are left get `ResponseLost`; false
  /// tells that this has happened. What waits for something foreign is waited for even then. May be called from any
  /// thread, again, and at the same time; each call may shorten the limit of the others. I/O objects may be destroyed
  /// afterwards.
  ///
  /// On the worker itself, or where waiting for it would close a ring, it does not wait: the worker ends by itself once
  /// the last call in flight is over, at once if there is none or `limit` is zero, and the result tells whether there
  /// is none.
  template <class Rep = std::chrono::hours::rep, class Period = std::chrono::hours::period>
  bool shutdown(Shutdown how, std::chrono::duration<Rep, Period> limit = (std::chrono::hours::max)()) const noexcept {
    const std::shared_ptr<detail::Core> core = core_;
    return !core || core->forked() || core->shut_down(how, detail::time_after(limit), false);
  }

 private:
  std::shared_ptr<detail::Core> core_;
};

/// A submitted task, to be waited for. As with `std::jthread`, its destructor requests a stop and waits until the task
/// is over, unless it was joined or detached.
///
/// It may outlive the bridge. One thread at a time may use it, but `request_stop` and `done` may be called by others,
/// too. On the bridge's own worker, or where waiting would close a ring of bridges that wait for each other, nothing
/// waits: `join` is `WouldDeadlock`, `wait_for` tells what is, and the destructor detaches.
template <class T>
class [[nodiscard]] JoinHandle {
 public:
  JoinHandle() noexcept = default;
  JoinHandle(JoinHandle&&) noexcept = default;
  JoinHandle& operator=(JoinHandle&& other) noexcept {
    JoinHandle taken(std::move(other));
    std::swap(core_, taken.core_);
    std::swap(call_, taken.call_);
    std::swap(joined_, taken.joined_);
    return *this;
  }
  ~JoinHandle() {
    if (!joinable()) return;
    request_stop();
    (void)wait_until((detail::SteadyTime::max)());
  }

  /// Whether there is a task to be joined.
  [[nodiscard]] bool joinable() const noexcept { return call_ && !joined_ && !call_->detached(); }

  /// Waits until the task is over, and gives what `block_on` would. Once: the handle has no task any more, unless the
  /// result is `WouldDeadlock`, or `WorkerDead` in a forked child. Throws `std::system_error`
  /// (`std::errc::invalid_argument`) if it had none.
  [[nodiscard]] Result<T> join() {
    if (!joinable()) {
      throw std::system_error(std::make_error_code(std::errc::invalid_argument), "runtime_bridge: join without a task");
    }
    if (!call_->answered()) {
      if (core_->forked()) return detail::refuse(BridgeError::WorkerDead, "the worker lives in the parent process");
      std::shared_ptr<const char> ring;
      if (!core_->begin_wait(call_.get(), &ring)) {
        return detail::unexpected<BridgeError>({BridgeError::WouldDeadlock, nullptr, std::move(ring)});
      }
      call_->wait();
    }
    joined_ = true;
    return call_->result();
  }

  /// Waits until the task is over, but not for longer than this. True if it is over, or if there is none.
  template <class Rep, class Period>
  bool wait_for(std::chrono::duration<Rep, Period> timeout) const {
    return wait_until(detail::time_after(timeout));
  }

  /// Whether the task is over, or there is none (as in a forked child).
  [[nodiscard]] bool done() const noexcept {
    return !call_ || call_->detached() || call_->answered() || core_->forked();
  }

  /// Asks for the cancellation of the task, as a stop does for `block_on`. Does not wait.
  void request_stop() noexcept {
    if (call_ && core_ && !call_->detached()) core_->cancel(*call_, BridgeError::Cancelled);
  }

  /// Lets the task run on. Its result is discarded.
  void detach() noexcept {
    if (call_) call_->detach();
  }

 private:
  friend class RuntimeBridge;

  JoinHandle(std::shared_ptr<detail::Core> core, std::shared_ptr<detail::ResultCall<T>> call) noexcept
      : core_(std::move(core)), call_(std::move(call)) {}

  bool wait_until(detail::SteadyTime deadline) const {
    if (done()) return true;
    if (!core_->begin_wait(call_.get())) return false;
    const bool over = call_->wait_until(deadline);
    if (!over) core_->end_wait(call_.get());
    return over;
  }

  std::shared_ptr<detail::Core> core_;
  std::shared_ptr<detail::ResultCall<T>> call_;
  bool joined_ = false;  // `call_` stays, for other threads may be asking it to stop
};

template <class Task>
JoinHandle<detail::TaskValue<Task>> RuntimeBridge::submit(Task&& task) const {
  constexpr bool can_be_kept = std::constructible_from<std::decay_t<Task>, Task>;
  detail::assert_task<Task>();
  static_assert(!detail::is_task<Task> || can_be_kept,
                "runtime_bridge: submit keeps the task, and this one cannot be copied: give it up: "
                "submit(std::move(task))");
  if constexpr (!detail::is_task<Task> || !can_be_kept) {
    return {};
  } else {
    const std::shared_ptr<detail::Core> core = core_;
    auto call = std::make_shared<detail::SubmittedCall<Task>>(std::in_place, std::forward<Task>(task));
    call->keep(call);
    if (!core) {
      call->refuse({BridgeError::WorkerDead, nullptr, detail::literal("the bridge was moved from")});
    } else if (auto refusal = core->post(*call, false)) {
      call->refuse(std::move(*refusal));
    }
    return {core, std::move(call)};
  }
}

}  // namespace RUNTIME_BRIDGE_ABI
}  // namespace runtime_bridge

template <>
struct std::is_error_code_enum<runtime_bridge::BridgeError::Kind> : std::true_type {};

#pragma GCC visibility pop

#endif  // Asio's coroutines
#endif  // Asio's version
#endif  // C++20, POSIX, exceptions
#endif  // RUNTIME_BRIDGE_HPP
