// SPDX-License-Identifier: Apache-2.0
//
// Hosted<T>: an object that is made, used and destroyed on a bridge's worker, whoever owns it.

#ifndef RUNTIME_BRIDGE_HOSTED_HPP
#define RUNTIME_BRIDGE_HOSTED_HPP

#include "../runtime_bridge.hpp"

#ifdef RUNTIME_BRIDGE_USE_BOOST_ASIO
#include <boost/asio/post.hpp>
#else
#include <asio/post.hpp>
#endif

#include <unistd.h>

#include <atomic>
#include <chrono>
#include <concepts>
#include <cstddef>
#include <functional>
#include <memory>
#include <new>
#include <optional>
#include <string>
#include <thread>
#include <type_traits>
#include <utility>

namespace runtime_bridge {
inline namespace v0_1 {
inline namespace RUNTIME_BRIDGE_FLAVOUR {

/// A bridge, and the line that gives it: for a constructor that cannot have a default argument behind its pack.
struct BridgeAt {
  // Implicit, to note the caller's line. NOLINTNEXTLINE(google-explicit-constructor)
  BridgeAt(const RuntimeBridge& b, SourceLocation w = SourceLocation::current()) noexcept : bridge(b), where(w) {}

  const RuntimeBridge& bridge;
  SourceLocation where;
};

/// An object that is made, used and destroyed on the worker of a bridge, such as a pool of connections:
///
///     Hosted<pg::Pool> pool(bridge, settings, 8);
///     auto found = pool.call([&](pg::Pool& p) { return find(p, name); });
///
/// *Threads.* Any thread may call, and several at the same time. Moving, assigning and destroying are as for any
/// object: not while another thread uses it. After a move the calls of the old `Hosted` return `WorkerDead`.
///
/// *Lifetimes.* The bridge may be destroyed first: calls then return `WorkerDead`, and the object remains until the
/// `Hosted` is destroyed. Tasks that were submitted and use the object must have ended before that.
template <class T>
class Hosted {
 public:
  /// Makes the object on the worker, as `T(executor, args...)` with the bridge's executor if T can be made like that,
  /// which is how Asio's I/O objects are made, or else as `T(args...)`. On the worker itself it is made at once. Throws
  /// what T's constructor throws, and `std::system_error` with a `BridgeError::Kind` if the worker cannot make it.
  template <class... Args>
  explicit Hosted(BridgeAt at, Args&&... args) : bridge_(at.bridge.share()) {
    constexpr bool takes_executor = std::is_constructible_v<T, RuntimeBridge::executor_type, Args...>;
    static_assert(takes_executor || std::is_constructible_v<T, Args...>,
                  "runtime_bridge: Hosted<T> makes T(executor, args...) or T(args...), and T has no such constructor");
    const auto make = [&] {
      if constexpr (takes_executor) {
        made_ = std::make_shared<Made>(at.where, bridge_.get_executor(), std::forward<Args>(args)...);
      } else if constexpr (std::is_constructible_v<T, Args...>) {
        made_ = std::make_shared<Made>(at.where, std::forward<Args>(args)...);
      }
    };
    const auto on_worker = [&] { return bridge_.get_executor().running_in_this_thread(); };
    // Without calls this may be a fork of the worker, or the bridge may have been moved from: a call knows.
    if (bridge_.stats().admitted == 0 || !on_worker()) {
      const auto result = bridge_.block_on(named("Hosted()", make), {}, at.where);
      if (result.has_value()) return;
      if (result.error() != BridgeError::WouldDeadlock || !on_worker()) unwrap(result);
    }
    make();
  }

  Hosted(Hosted&&) noexcept = default;
  Hosted& operator=(Hosted&& other) noexcept {
    Hosted taken(std::move(other));
    std::swap(bridge_, taken.bridge_);
    std::swap(made_, taken.made_);
    return *this;
  }

  /// Destroys the object on the worker and waits for that, in its turn if the bridge has a `max_in_flight`. On the
  /// worker it destroys the object at once. If the bridge was shut down, it waits for the calls in flight, as they may
  /// use the object, and destroys it here once the worker has ended. (So, like the bridge's destructor, it must not run
  /// then in a task of the bridge that has moved to another executor.)
  ///
  /// It does not wait if that would close a ring of bridges, or if the bridge refuses more calls (`WhenFull::refuse`):
  /// the worker then destroys the object later. In a forked child the object is never destroyed: the parent uses it.
  /// Without memory it tries again until there is some.
  ~Hosted() {
    if (!made_) return;
    if (made_->process != getpid()) {
      Leak* const leak = insist([&] { return new Leak{std::move(bridge_), std::move(made_), nullptr}; });
      leak->before = leaks_.exchange(leak);
    } else if (made_->worker == std::this_thread::get_id() || !destroy_on_worker()) {
      made_->object.reset();
    }
  }

  /// Calls `f(object)` on the worker. The rest is as for `RuntimeBridge::block_on`: what `f` may return, the results,
  /// and that `f` is borrowed until the call is over. `f` may be `named`. On the worker itself it is `WouldDeadlock`.
  template <class F>
  [[nodiscard]] auto call(F&& f, Stop stop = {}, SourceLocation where = SourceLocation::current()) const {
    return bridge_.block_on(task<F>(f), std::move(stop), where);
  }

  /// `call` with a deadline, as `RuntimeBridge::block_on_for`.
  template <class Rep, class Period, class F>
  [[nodiscard]] auto call_for(std::chrono::duration<Rep, Period> timeout, F&& f, Stop stop = {},
                              SourceLocation where = SourceLocation::current()) const {
    return bridge_.block_on_for(task<F>(f), timeout, std::move(stop), where);
  }

 private:
  struct Made {
    template <class... Args>
    explicit Made(const SourceLocation& w, Args&&... args)
        : where(w), object(std::in_place, std::forward<Args>(args)...) {}

    const SourceLocation where;
    const pid_t process = getpid();
    const std::thread::id worker = std::this_thread::get_id();
    std::optional<T> object;
  };

  /// An object that is never destroyed, nor its bridge, but kept where leak checkers find it.
  struct Leak {
    RuntimeBridge bridge;
    std::shared_ptr<Made> made;
    Leak* before;
  };

  /// False if the worker has ended.
  bool destroy_on_worker() noexcept {
    const auto destroy = [made = made_.get()] { made->object.reset(); };
    const auto result = insist([&] { return bridge_.block_on(named("~Hosted()", destroy), {}, made_->where); });
    if (result.has_value()) return true;
    const bool closed = result.error() == BridgeError::WorkerDead || result.error() == BridgeError::ResponseLost;
    // If it returns false, but no call is in flight, calls were cut off. Else this thread must not wait.
    if (closed && (bridge_.shutdown(Shutdown::drain) || bridge_.in_flight() == 0)) return false;
    insist([&] { post(bridge_.get_executor(), [made = made_] { made->object.reset(); }); });
    return true;
  }

  /// Tries again while there is no memory: a destructor can neither fail nor leave the object behind.
  template <class Function>
  static auto insist(Function function) noexcept {
    for (;;) {
      try {
        return function();
      } catch (const std::bad_alloc&) {
        std::this_thread::yield();
      }
    }
  }

  /// The task that calls `f`, as an rvalue if it was given as one.
  template <class F>
  auto task(std::remove_reference_t<F>& f) const {
    if constexpr (!std::invocable<F, T&> && requires { named(f.name, f.task); }) {
      return named(std::forward<F>(f).name, task<decltype((std::forward<F>(f).task))>(f.task));
    } else {
      static_assert(std::invocable<F, T&>,
                    "runtime_bridge: Hosted<T> calls f(object): give a callable that takes a T&");
      return [made = made_.get(), function = std::addressof(f)]() -> decltype(auto) {
        if constexpr (std::invocable<F, T&>) return std::invoke(std::forward<F>(*function), *made->object);
      };
    }
  }

  static inline std::atomic<Leak*> leaks_{nullptr};  // a list

  RuntimeBridge bridge_;
  std::shared_ptr<Made> made_;
};

}  // namespace RUNTIME_BRIDGE_FLAVOUR
}  // namespace v0_1
}  // namespace runtime_bridge

#endif  // RUNTIME_BRIDGE_HOSTED_HPP
