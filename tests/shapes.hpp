// SPDX-License-Identifier: Apache-2.0
//
// The shapes of tasks that users write. Each waits until it is cancelled or destroyed, and returns nothing.

#ifndef RUNTIME_BRIDGE_TESTS_SHAPES_HPP
#define RUNTIME_BRIDGE_TESTS_SHAPES_HPP

#include <atomic>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "support.hpp"

using Channel = asio::experimental::channel<void(ErrorCode, int)>;
using ConcurrentChannel = asio::experimental::concurrent_channel<void(ErrorCode, int)>;

constexpr asio::as_tuple_t<asio::use_awaitable_t<>> as_tuple_awaitable{};

/// Counts the living locals of the shapes, and has the pools that they use. It outlives the bridge.
class Ground {
 public:
  std::atomic<long> alive{0};

  awaitable<int> visit_pool() { return foreign_.visit(1); }
  auto pool() { return pool_.get_executor(); }

  /// Lets the tasks that wait for the pool come back.
  void let_foreign_go() { foreign_.go_on(); }

 private:
  Foreign foreign_;
  asio::thread_pool pool_{1};
};

/// A local variable of a shape, counted while it is alive.
class Alive {
 public:
  explicit Alive(Ground& ground) : ground_(ground) { ++ground_.alive; }
  Alive(const Alive&) = delete;
  Alive& operator=(const Alive&) = delete;
  ~Alive() { --ground_.alive; }

 private:
  Ground& ground_;
};

/// Operations that keep their handlers in this object, which may be in the frame of the coroutine that waits. So they
/// end only if they are cancelled. Cancelling one of them ends all of them at once.
class AllForOne {
 public:
  awaitable<void> wait() {
    const auto initiate = [this](auto handler) {
      auto slot = asio::get_associated_cancellation_slot(handler);
      waiting_.push_back([h = std::make_shared<decltype(handler)>(std::move(handler))] { std::move (*h)(); });
      slot.assign([this](asio::cancellation_type) {
        for (const auto& end : std::exchange(waiting_, {})) end();
      });
    };
    return asio::async_initiate<decltype(use_awaitable), void()>(initiate, use_awaitable);
  }

 private:
  std::vector<std::function<void()>> waiting_;
};

namespace shape {

using Token = std::shared_ptr<int>;

inline awaitable<void> nap(Ground& ground, Token) {
  const Alive alive(ground);
  co_await park();
}

inline awaitable<void> child(Ground& ground, Token token) {
  const Alive alive(ground);
  const auto executor = co_await asio::this_coro::executor;
  co_await asio::co_spawn(executor, nap(ground, token), use_awaitable);
}

inline awaitable<void> child_on_strand(Ground& ground, Token token) {
  const Alive alive(ground);
  const auto strand = asio::make_strand(co_await asio::this_coro::executor);
  co_await asio::co_spawn(strand, nap(ground, token), use_awaitable);
}

inline awaitable<void> child_on_any_strand(Ground& ground, Token token) {
  const Alive alive(ground);
  const asio::any_io_executor strand = asio::make_strand(co_await asio::this_coro::executor);
  co_await asio::co_spawn(strand, nap(ground, token), use_awaitable);
}

inline awaitable<void> grandchildren(Ground& ground, Token token) {
  const Alive alive(ground);
  const asio::any_io_executor strand = asio::make_strand(co_await asio::this_coro::executor);
  auto inner = child_on_strand(ground, token);
  co_await asio::co_spawn(strand, std::move(inner), use_awaitable);
}

inline awaitable<void> detached_beside(Ground& ground, Token token) {
  const Alive alive(ground);
  asio::co_spawn(co_await asio::this_coro::executor, park(), asio::detached);
  co_await nap(ground, token);
}

inline awaitable<void> as_tuple(Ground& ground, Token) {
  const Alive alive(ground);
  asio::steady_timer timer(co_await asio::this_coro::executor, 24h);
  const auto [error] = co_await timer.async_wait(as_tuple_awaitable);
  if (error) throw AsioError(error);
}

inline awaitable<void> both(Ground& ground, Token token) {
  using namespace asio::experimental::awaitable_operators;
  const Alive alive(ground);
  co_await (nap(ground, token) && child(ground, token));
}

inline awaitable<void> either(Ground& ground, Token token) {
  using namespace asio::experimental::awaitable_operators;
  const Alive alive(ground);
  co_await (nap(ground, token) || child_on_strand(ground, token));
}

inline awaitable<void> parallel_group(Ground& ground, Token) {
  const Alive alive(ground);
  asio::steady_timer one(co_await asio::this_coro::executor, 24h), two(co_await asio::this_coro::executor, 24h);
  auto group = asio::experimental::make_parallel_group(one.async_wait(asio::deferred), two.async_wait(asio::deferred));
  const auto results = co_await group.async_wait(asio::experimental::wait_for_all(), use_awaitable);
  if (std::get<1>(results)) throw AsioError(std::get<1>(results));
}

inline awaitable<void> channel(Ground& ground, Token) {
  const Alive alive(ground);
  Channel messages(co_await asio::this_coro::executor);
  (void)co_await messages.async_receive(use_awaitable);
}

inline awaitable<void> concurrent_channel(Ground& ground, Token) {
  const Alive alive(ground);
  ConcurrentChannel messages(co_await asio::this_coro::executor);
  (void)co_await messages.async_receive(use_awaitable);
}

inline awaitable<void> socket(Ground& ground, Token) {
  const Alive alive(ground);
  const auto executor = co_await asio::this_coro::executor;
  asio::local::stream_protocol::socket a(executor), b(executor);
  asio::local::connect_pair(a, b);
  char byte = 0;
  (void)co_await asio::async_read(a, asio::buffer(&byte, 1), use_awaitable);
}

inline awaitable<void> keeps_its_handler(Ground& ground, Token) {
  const Alive alive(ground);
  AllForOne operations;
  co_await operations.wait();
  throw std::runtime_error("cancelled");
}

inline awaitable<void> catches_and_retries(Ground& ground, Token token) {
  const Alive alive(ground);
  for (int i = 0; i < 2; ++i) {
    try {
      co_await nap(ground, token);
    } catch (const AsioError&) {
    }
  }
  co_await child(ground, token);
}

inline awaitable<void> swallows_everything(Ground& ground, Token token) {
  const Alive alive(ground);
  for (;;) {
    try {
      co_await nap(ground, token);
    } catch (...) {
    }
  }
}

inline awaitable<void> ignores_cancellation(Ground& ground, Token token) {
  const Alive alive(ground);
  co_await asio::this_coro::reset_cancellation_state(asio::disable_cancellation());
  co_await child_on_strand(ground, token);
}

inline awaitable<void> runs_in_circles(Ground& ground, Token) {
  const Alive alive(ground);
  co_await run_in_circles();
}

inline awaitable<void> visits_pool_and_parks(Ground& ground, Token token) {
  const Alive alive(ground);
  auto visit = ground.visit_pool();
  (void)co_await std::move(visit);
  co_await child(ground, token);
}

inline awaitable<void> hops_to_pool(Ground& ground, Token token) {
  const Alive alive(ground);
  auto visit = ground.visit_pool();
  (void)co_await std::move(visit);
  // The worker's cancellation does not reach it there.
  co_await asio::this_coro::throw_if_cancelled(false);
  co_await asio::post(asio::bind_executor(ground.pool(), use_awaitable));
  if (token.use_count() >= 0) throw std::runtime_error("on the pool");
}

inline awaitable<void> child_on_pool(Ground& ground, Token) {
  const Alive alive(ground);
  auto visit = ground.visit_pool();
  // Without a slot: a cancellation would use the child's state while the pool runs it.
  (void)co_await asio::co_spawn(ground.pool(), std::move(visit),
                                asio::bind_cancellation_slot(asio::cancellation_slot(), use_awaitable));
  co_await park();
}

#if ASIO_VERSION >= 103400
inline awaitable<void> cancel_after(Ground& ground, Token token) {
  const Alive alive(ground);
  const auto executor = co_await asio::this_coro::executor;
  co_await asio::co_spawn(executor, nap(ground, token), asio::cancel_after(24h, use_awaitable));
}

inline awaitable<void> cancel_at(Ground& ground, Token) {
  const Alive alive(ground);
  asio::steady_timer timer(co_await asio::this_coro::executor, 24h);
  co_await timer.async_wait(asio::cancel_at(std::chrono::steady_clock::now() + 24h, use_awaitable));
}
#endif

#ifndef __clang__
inline asio::experimental::coro<void> coro_nap(asio::any_io_executor executor) {
  asio::steady_timer timer(executor, 24h);
  co_await timer.async_wait(asio::experimental::use_coro);
}

inline awaitable<void> coro(Ground& ground, Token) {
  const Alive alive(ground);
  auto inner = coro_nap(co_await asio::this_coro::executor);
  co_await inner.async_resume(use_awaitable);
}
#endif

}  // namespace shape

struct Shape {
  std::string name;
  awaitable<void> (*make)(Ground&, std::shared_ptr<int>);
  std::optional<Outcome> own_end{};  // how it may end when it is cancelled, or has come back from the pool

  bool explains(const Outcome& end) const { return end == response_lost || end == own_end; }
};

inline const std::vector<Shape>& shapes() {
  static const std::vector<Shape> all {
    {"waits for a timer", shape::nap}, {"awaits a child", shape::child},
        {"awaits a child on a strand", shape::child_on_strand},
        {"awaits a child on a strand that is an any_io_executor", shape::child_on_any_strand},
        {"awaits grandchildren", shape::grandchildren}, {"has a detached coroutine beside it", shape::detached_beside},
        {"takes the error as a tuple", shape::as_tuple}, {"awaits one and the other", shape::both},
        {"awaits one or the other", shape::either}, {"awaits a parallel_group", shape::parallel_group},
        {"waits for a channel", shape::channel}, {"waits for a concurrent_channel", shape::concurrent_channel},
        {"reads from a socket", shape::socket},
        {"awaits an operation that keeps its handler in the frame", shape::keeps_its_handler},
        {"catches and retries", shape::catches_and_retries}, {"swallows every exception", shape::swallows_everything},
        {"ignores cancellation", shape::ignores_cancellation}, {"runs in circles", shape::runs_in_circles},
        {"visits a pool and parks", shape::visits_pool_and_parks},
        {"ends on a pool", shape::hops_to_pool, threw("on the pool")},
        {"awaits a child on a pool", shape::child_on_pool},
#if ASIO_VERSION >= 103400
        {"awaits a child with cancel_after", shape::cancel_after},
        {"waits for a timer with cancel_at", shape::cancel_at},
#endif
#ifndef __clang__
        {"awaits an experimental::coro", shape::coro, succeeded},
#endif
  };
  return all;
}

#endif  // RUNTIME_BRIDGE_TESTS_SHAPES_HPP
