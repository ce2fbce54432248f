// SPDX-License-Identifier: Apache-2.0
//
// Hosted<T>: an object that is made, used and destroyed on a bridge's worker, whoever owns it.

#ifndef RUNTIME_BRIDGE_HOSTED_HPP
#define RUNTIME_BRIDGE_HOSTED_HPP

#include "../runtime_bridge.hpp"

#include <unistd.h>

namespace runtime_bridge {
inline namespace v0_2 {
inline namespace RUNTIME_BRIDGE_FLAVOUR {

/// A bridge, and where it is given, for diagnosis: no default argument can follow a constructor's pack.
struct BridgeAt {
  // NOLINTNEXTLINE(google-explicit-constructor): an implicit conversion takes the caller's line
  BridgeAt(const RuntimeBridge& b, SourceLocation w = SourceLocation::current()) noexcept : bridge(b), where(w) {}
  const RuntimeBridge& bridge;
  SourceLocation where;
};

/// An object that is made, used and destroyed on the worker of a bridge, such as a pool of connections:
///
///     Hosted<pg::Pool> pool(bridge, settings, 8);
///     auto found = pool.call([&](pg::Pool& p) { return find(p, name); });
///
/// Several threads may call at the same time, but not while another one moves, assigns or destroys the `Hosted`. Calls
/// return `WorkerDead` if the bridge is destroyed first, or after a move. Submitted tasks that use the object must be
/// over before it is destroyed. Raw handlers and detached coroutines on the bridge's executor must not own a `Hosted`:
/// those that are left when the worker ends would keep the bridge's inside alive, and themselves.
template <class T>
class Hosted {
 public:
  /// Makes the object on the worker; at once if this is the worker. As `T(executor, args...)` with the bridge's
  /// executor, as Asio's I/O objects are made, or as `T(args...)` if T has no such constructor. Throws what T's
  /// constructor throws, or a `std::system_error` with a `BridgeError::Kind` if the worker cannot make it.
  template <class... Args>
  explicit Hosted(BridgeAt at, Args&&... args) : bridge_(at.bridge.share()), hosted_(std::make_shared<State>()) {
    constexpr bool takes_executor = std::is_constructible_v<T, RuntimeBridge::executor_type, Args...>;
    constexpr bool takes_none = std::is_constructible_v<T, Args...>;
    static_assert(takes_executor || takes_none,
                  "runtime_bridge: T has no constructor T(executor, args...) or T(args...)");
    hosted_->where = at.where;
    const auto make = [&] {
      hosted_->worker = std::this_thread::get_id();
      if constexpr (takes_executor) {
        hosted_->object.emplace(bridge_.get_executor(), std::forward<Args>(args)...);
      } else if constexpr (takes_none) {
        hosted_->object.emplace(std::forward<Args>(args)...);
      }
    };
    const auto on_worker = [&] { return bridge_.get_executor().running_in_this_thread(); };
    // Without calls this may be a fork of the worker, or the bridge was moved from: `block_on` knows.
    if (bridge_.stats().admitted == 0 || !on_worker()) {
      const auto result = bridge_.block_on(named("Hosted()", make), {}, at.where);
      if (result.has_value()) return;
      if (result.error() != BridgeError::WouldDeadlock || !on_worker()) unwrap(result);
    }
    make();
  }

  Hosted(Hosted&&) noexcept = default;
  Hosted& operator=(Hosted other) noexcept {
    std::swap(bridge_, other.bridge_);
    std::swap(hosted_, other.hosted_);
    return *this;
  }

  /// Destroys the object on the worker and waits for that, in its turn if the bridge has a `max_in_flight`. After a
  /// shutdown, waits until the calls in flight are over, which may use the object, and destroys it here; so it must not
  /// run then in a task of the bridge that has moved to another executor. If waiting would close a ring of bridges, or
  /// the bridge refuses the call (`WhenFull::refuse`), the worker destroys the object later. A forked child never
  /// destroys it. Without memory, tries again until there is some.
  ~Hosted() {
    while (hosted_ && !end()) std::this_thread::yield();
  }

  /// Calls `f(object)` on the worker; the rest is as for `RuntimeBridge::block_on`. `f` may be `named`.
  template <class F>
  [[nodiscard]] auto call(F&& f, Stop stop = {}, SourceLocation where = SourceLocation::current()) const {
    return bridge_.block_on(task<F>(f), std::move(stop), where);
  }

  /// `call` with a deadline: see `RuntimeBridge::block_on_for`.
  template <class Rep, class Period, class F>
  [[nodiscard]] auto call_for(std::chrono::duration<Rep, Period> timeout, F&& f, Stop stop = {},
                              SourceLocation where = SourceLocation::current()) const {
    return bridge_.block_on_for(task<F>(f), timeout, std::move(stop), where);
  }

 private:
  struct State {
    SourceLocation where{};
    std::thread::id worker{};
    const pid_t process = getpid();
    std::optional<T> object{};
    // In a forked child, these keep an object that is never destroyed, where leak checkers find it.
    std::shared_ptr<State> self{};
    State* before = nullptr;
  };

  /// Does what the destructor says. False without memory: a destructor can neither fail nor leave the object behind.
  bool end() noexcept try {
    if (hosted_->process != getpid()) {
      hosted_->before = leaks_.exchange(hosted_.get());
      hosted_->self = hosted_;
      return true;
    }
    // Where this returns true with an object, `hosted_` destroys it here.
    if (hosted_->worker == std::this_thread::get_id()) return true;
    const auto destroy = [this] { hosted_->object.reset(); };
    const auto result = bridge_.block_on(named("~Hosted()", destroy), {}, hosted_->where);
    if (result.has_value()) return true;
    const bool closed = result.error() != BridgeError::WouldDeadlock && result.error() != BridgeError::Overloaded;
    // False without calls in flight: some were cut off, but the worker has ended. False with calls: it did not wait.
    if (closed && (bridge_.shutdown(Shutdown::drain) || bridge_.in_flight() == 0)) return true;
    post(bridge_.get_executor(), [hosted = hosted_] { hosted->object.reset(); });
    return true;
  } catch (const std::bad_alloc&) {
    return false;
  }

  /// The task that calls `f`, as an rvalue if it was given as one.
  template <class F>
  auto task(std::remove_reference_t<F>& f) const {
    constexpr bool callable = std::is_invocable_v<F, T&>;
    if constexpr (!callable && requires { named(f.name, f.task); }) {
      return named(std::forward<F>(f).name, task<decltype((std::forward<F>(f).task))>(f.task));
    } else {
      static_assert(callable, "runtime_bridge: Hosted<T> calls f(object): give a callable that takes a T&");
      return [hosted = hosted_.get(), function = std::addressof(f)]() -> decltype(auto) {
        if constexpr (callable) return std::invoke(std::forward<F>(*function), *hosted->object);
      };
    }
  }

  static inline std::atomic<State*> leaks_{nullptr};

  RuntimeBridge bridge_;
  std::shared_ptr<State> hosted_;
};

}  // namespace RUNTIME_BRIDGE_FLAVOUR
}  // namespace v0_2
}  // namespace runtime_bridge

#endif  // RUNTIME_BRIDGE_HOSTED_HPP
