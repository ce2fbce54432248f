// SPDX-License-Identifier: Apache-2.0
//
// A synchronous range over items that a coroutine fetches one after another.

#ifndef RUNTIME_BRIDGE_RANGE_HPP
#define RUNTIME_BRIDGE_RANGE_HPP

#include <iterator>

#include "detail/fetches.hpp"

namespace runtime_bridge {
inline namespace v0_2 {
inline namespace RUNTIME_BRIDGE_FLAVOUR {

/// How many items a range fetches ahead.
struct Prefetch {
  std::size_t items = 0;  ///< zero: each item is fetched when the loop asks for it
};
/// `range(bridge, next, prefetch(n))` fetches up to n items ahead.
[[nodiscard]] constexpr Prefetch prefetch(std::size_t items) noexcept { return {items}; }

/// An input range over what `next` gives: see `range`. One thread at a time may use it. Iterators stay valid when it is
/// moved.
template <class Next>
class [[nodiscard]] Range {
  using Fetches = range_detail::Fetches<Next>;
  using Item = typename Fetches::Item;

 public:
  class iterator {
   public:
    using iterator_concept = std::input_iterator_tag;
    using value_type = std::remove_cv_t<Item>;
    using difference_type = std::ptrdiff_t;

    explicit iterator(Fetches& fetches) noexcept : fetches_(&fetches) {}
    Item& operator*() const noexcept { return *fetches_->item(); }
    iterator& operator++() { return fetches_->advance(), *this; }
    void operator++(int) { fetches_->advance(); }
    friend bool operator==(const iterator& i, std::default_sentinel_t) noexcept { return !i.fetches_->item(); }

   private:
    Fetches* fetches_;
  };

  /// Called by `range`.
  template <class N>
  Range(const RuntimeBridge& bridge, N&& next, Prefetch ahead, const SourceLocation& where) {
    // The fetches share it, too, so it is told when the loop is over.
    auto fetches = std::make_shared<Fetches>(bridge, std::forward<N>(next), ahead.items, where);
    fetches_ = {fetches.get(), [fetches](Fetches* f) noexcept { f->leave(); }};
  }
  Range(Range&&) noexcept = default;
  Range& operator=(Range&&) noexcept = default;

  /// Fetches the first item. Later calls return the current position.
  iterator begin() { return fetches_->begin(), iterator(*fetches_); }
  /// The end, whatever the position.
  std::default_sentinel_t end() const noexcept { return {}; }

 private:
  std::shared_ptr<Fetches> fetches_;
};

/// The items that `next` gives, until it gives none:
///
///     const auto next = [&]() -> asio::awaitable<std::optional<Object>> { ... };
///     for (Object& object : range(bridge, next, prefetch(1))) use(object);
///
/// `next` is called on the worker, never while it is running already. With `prefetch(n)` up to n items are fetched
/// while the loop uses another one; without it, none is.
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
