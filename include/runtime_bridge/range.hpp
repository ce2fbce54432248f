// SPDX-License-Identifier: Apache-2.0
//
// A synchronous range over items that a coroutine fetches one after another, such as the objects of a listing:
//
//   const auto next = [&]() -> asio::awaitable<std::optional<Object>> { ... };
//   for (Object& object : runtime_bridge::range(bridge, next, runtime_bridge::prefetch(1))) use(object);

#ifndef RUNTIME_BRIDGE_RANGE_HPP
#define RUNTIME_BRIDGE_RANGE_HPP

#include "../runtime_bridge.hpp"

#include <iterator>

namespace runtime_bridge {
inline namespace v0_2 {
inline namespace RUNTIME_BRIDGE_FLAVOUR {
namespace range_detail {

#ifdef RUNTIME_BRIDGE_USE_BOOST_ASIO
namespace net = boost::asio;
#else
namespace net = asio;
#endif

template <class Awaitable>
inline constexpr bool gives_optional = false;
template <class T>
inline constexpr bool gives_optional<net::awaitable<std::optional<T>, net::any_io_executor>> = true;
template <class T>
inline constexpr bool gives_optional<net::awaitable<std::optional<T>, net::io_context::executor_type>> = true;

template <class Next>
concept IsNext = std::invocable<Next&> && gives_optional<std::invoke_result_t<Next&>>;

}  // namespace range_detail

/// How many items a range fetches ahead.
struct Prefetch {
  std::size_t items = 0;
};
[[nodiscard]] constexpr Prefetch prefetch(std::size_t items) noexcept { return {items}; }

/// An input range over what `next` gives: see `range`. One thread at a time may use it. Iterators stay valid when it is
/// moved.
template <class Next>
class [[nodiscard]] Range {
  using Awaitable = std::invoke_result_t<Next&>;
  using Value = typename Awaitable::value_type;
  using Item = typename Value::value_type;

  /// One call of `next`. It is a submitted call of its own, sent by the one before it or by the loop: a task that
  /// waited for room would keep a turn of `max_in_flight`.
  struct Fetch {
    JoinHandle<Value> call;
    std::unique_ptr<Fetch> following;  // set before this one ends, or later by the loop
  };

  /// What the loop and the fetches share. There is no lock, since in a forked child it might be locked for ever. Only
  /// the last fetch, or the loop once `room` is negative, sends another one. The loop follows a link only from a fetch
  /// that has ended.
  struct Shared : std::enable_shared_from_this<Shared> {
    template <class N>
    Shared(const RuntimeBridge& b, N&& n, Prefetch p, const SourceLocation& w)
        : bridge(b.share()), where(w), next(std::forward<N>(n)), ahead((std::min)(p.items, unlimited / 4)) {}

    const RuntimeBridge bridge;
    const SourceLocation where;
    Next next;
    const std::size_t ahead;
    /// How many fetches may be sent ahead; negative if none is on its way, either.
    std::atomic<std::ptrdiff_t> room{static_cast<std::ptrdiff_t>(ahead)};
    Fetch* last = nullptr;           // if the room is negative: the last fetch
    std::unique_ptr<Fetch> current;  // the loop's: the fetch of `item`
    std::optional<Item> item;

    void send(std::unique_ptr<Fetch>& link) {
      auto fetch = std::make_unique<Fetch>();
      auto task = [self = this->shared_from_this(), f = fetch.get()] { return run(*self, *f); };
      fetch->call = bridge.submit(std::move(task), where);
      link = std::move(fetch);
    }

#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wzero-as-null-pointer-constant"  // g++ 12 means its own code in a coroutine
    static Awaitable run(Shared& self, Fetch& fetch) {
      Awaitable next = std::invoke(self.next);
      Value value = co_await std::move(next);
      if (value) {
        self.last = &fetch;
        if (self.room.fetch_sub(1) > 0) self.send(fetch.following);
      }
      co_return value;
    }
#pragma GCC diagnostic pop

    void advance() {
      if (!item) return;
      item.reset();
      if (room.fetch_add(1) < 0) send(last->following);
      current = std::move(current->following);
      take();
    }

    void take() {
      Result<Value> result = current->call.join();
      // With `WhenFull::refuse` it may have been refused while it was early. Now it is needed.
      const bool again = ahead != 0 && !result.has_value() && result.error() == BridgeError::Overloaded;
      if (again) send(current);
      Value value = unwrap(again ? current->call.join() : std::move(result));
      if (value) item.emplace(*std::move(value));
    }

    void leave() noexcept {
      for (room = -1; current; current = std::move(current->following)) {
        current->call.request_stop();
        if (!current->call.wait_for((std::chrono::hours::max)())) return current->call.detach();
        if (current->call.joinable())
          (void)current->call.join();  // so that its error is not reported: the loop did not ask for it
      }
    }
  };

  struct Leave {
    std::shared_ptr<Shared> shared;  // the fetches have others
    void operator()(Shared* s) const noexcept { s->leave(); }
  };

 public:
  class iterator {
   public:
    using iterator_concept = std::input_iterator_tag;
    using value_type = std::remove_cv_t<Item>;
    using difference_type = std::ptrdiff_t;

    explicit iterator(Shared& shared) noexcept : shared_(&shared) {}
    Item& operator*() const noexcept { return *shared_->item; }
    iterator& operator++() { return shared_->advance(), *this; }
    void operator++(int) { shared_->advance(); }
    friend bool operator==(const iterator& i, std::default_sentinel_t) noexcept { return !i.shared_->item; }

   private:
    Shared* shared_;
  };

  template <class N>
  Range(const RuntimeBridge& bridge, N&& next, Prefetch ahead, const SourceLocation& where) {
    auto shared = std::make_shared<Shared>(bridge, std::forward<N>(next), ahead, where);
    Shared* const pointer = shared.get();
    shared_ = {pointer, Leave{std::move(shared)}};
  }

  /// Fetches the first item. Later calls return the current position.
  iterator begin() {
    if (!shared_->current) {
      shared_->send(shared_->current);
      shared_->take();
    }
    return iterator(*shared_);
  }
  std::default_sentinel_t end() const noexcept { return {}; }

 private:
  std::unique_ptr<Shared, Leave> shared_;
};

/// The items that `next` gives, until it gives none. `next` is called on the worker, never while it is running already.
/// With `prefetch(n)` up to n items are fetched while the loop uses another one; without it, none is.
///
/// What `next` throws comes out of `begin` or `++`, after the items before it, and so does each other error of a call,
/// as a `std::system_error`. Then the range is at its end. Leaving the loop early cancels the fetch in progress and
/// waits for it; on the worker itself, or if waiting would close a ring of bridges, it only cancels it.
///
/// The range keeps `next`, and may outlive the bridge. Each fetch is a call of the bridge: it takes one of its turns if
/// `max_in_flight` is set, and `calls()` shows it with the line of this call.
template <class Next>
auto range(const RuntimeBridge& bridge, Next&& next, Prefetch ahead = {},
           SourceLocation where = SourceLocation::current()) {
  using N = std::decay_t<Next>;
  constexpr bool is_next = range_detail::IsNext<N> && std::constructible_from<N, Next>;
  static_assert(is_next,
                "runtime_bridge: range needs a callable without parameters that returns an "
                "asio::awaitable<std::optional<T>>; give it up by std::move(next) if it cannot be copied");
  if constexpr (is_next) return Range<N>(bridge, std::forward<Next>(next), ahead, where);
}

}  // namespace RUNTIME_BRIDGE_FLAVOUR
}  // namespace v0_2
}  // namespace runtime_bridge

#endif  // RUNTIME_BRIDGE_RANGE_HPP
