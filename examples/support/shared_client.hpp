// SPDX-License-Identifier: Apache-2.0
//
// Shared by the synchronous backends: an asynchronous client together with the bridge that it runs on.

#ifndef RUNTIME_BRIDGE_EXAMPLES_SHARED_CLIENT_HPP
#define RUNTIME_BRIDGE_EXAMPLES_SHARED_CLIENT_HPP

#include <runtime_bridge.hpp>
#include <runtime_bridge/hosted.hpp>
#include <runtime_bridge/range.hpp>

#include <chrono>
#include <memory>
#include <type_traits>
#include <utility>

#include "support/asio.hpp"
#include "support/backends.hpp"

/// Turns what a task returns or throws into an outcome. `describe` is called while the exception is handled; it
/// rethrows what it does not know, and the bridge then reports that.
template <class T>
asio::awaitable<Outcome<T>> outcome_of(asio::awaitable<T> task, BackendError (*describe)()) {
  try {
    if constexpr (std::is_void_v<T>) {
      co_await std::move(task);
      co_return Outcome<T>();
    } else {
      co_return co_await std::move(task);
    }
  } catch (...) {
    co_return Failure(describe());
  }
}

/// A bridge for clients that have tasks in the background, which hold it until they end.
using Bridge = std::shared_ptr<const runtime_bridge::RuntimeBridge>;

/// Copies are cheap: they share one bridge, and one client that lives on its worker. The client is made there as
/// `Client(executor, args...)`, or, if it has tasks in the background, as `Client(bridge, args...)`. Its destructor
/// runs there, too, and asks these tasks to end. `describe` is as in `outcome_of`.
template <class Client, BackendError (*describe)()>
class SharedClient {
 public:
  template <class... Args>
  explicit SharedClient(std::chrono::milliseconds timeout, Args&&... args)
      : shared_(std::make_shared<Shared>(std::forward<Args>(args)...)), timeout_(timeout) {}

  /// Runs `function(client)`, which returns an awaitable, on the worker. It has ended when this returns, so it may
  /// refer to the caller's locals.
  template <class Function>
  auto call(Function function) const {
    const auto task = [&](Client& client) { return outcome_of(function(client), describe); };
    return flatten(shared_->client.call_for(timeout_, task));
  }

  /// Starts `function(client)` and does not wait. The task must own its data.
  template <class Function>
  auto submit(Function function) const {
    return bridge().submit(
        [shared = shared_, function = std::move(function)] { return outcome_of(function(shared->hosted), describe); });
  }
  /// The items that the coroutine `next(client)` gives, each fetched while the one before it is used.
  template <class Next>
  auto range(Next next) const {
    return runtime_bridge::range(
        bridge(), [shared = shared_, next = std::move(next)] { return next(shared->hosted); },
        runtime_bridge::prefetch(1));
  }
  [[nodiscard]] const runtime_bridge::RuntimeBridge& bridge() const { return *shared_->drained.bridge; }
  [[nodiscard]] std::chrono::milliseconds timeout() const { return timeout_; }

  /// For the calls of this copy.
  void set_timeout(std::chrono::milliseconds timeout) { timeout_ = timeout; }

 private:
  /// Waits for the tasks in the background. If the bridge were stopped under them, they could use what is destroyed. On
  /// the worker, which may drop the last copy, this does not wait, and the last of the tasks destroys the bridge.
  struct Drained {
    Drained() = default;
    Drained(const Drained&) = delete;
    Drained& operator=(const Drained&) = delete;
    ~Drained() { bridge->shutdown(runtime_bridge::Shutdown::drain, std::chrono::seconds(10)); }

    Bridge bridge = std::make_shared<const runtime_bridge::RuntimeBridge>();
  };

  struct Shared {
    template <class... Args>
    explicit Shared(Args&&... args) : client(host(drained.bridge, std::forward<Args>(args)...)) {}

    template <class... Args>
    static runtime_bridge::Hosted<Client> host(const Bridge& bridge, Args&&... args) {
      if constexpr (std::is_constructible_v<Client, const Bridge&, Args...>) {
        return runtime_bridge::Hosted<Client>(*bridge, bridge, std::forward<Args>(args)...);
      } else {
        return runtime_bridge::Hosted<Client>(*bridge, std::forward<Args>(args)...);
      }
    }

    Drained drained;  // declared first: the client must ask its tasks to end before they are waited for
    runtime_bridge::Hosted<Client> client;
    Client& hosted = *runtime_bridge::unwrap(client.call([](Client& c) { return &c; }));  // for tasks on the worker
  };

  std::shared_ptr<Shared> shared_;
  std::chrono::milliseconds timeout_;
};

#endif  // RUNTIME_BRIDGE_EXAMPLES_SHARED_CLIENT_HPP
