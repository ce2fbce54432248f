// SPDX-License-Identifier: Apache-2.0
//
// For range.hpp: the calls that fetch the items.

#ifndef RUNTIME_BRIDGE_DETAIL_FETCHES_HPP
#define RUNTIME_BRIDGE_DETAIL_FETCHES_HPP

#include "../../runtime_bridge.hpp"

namespace runtime_bridge {
inline namespace v0_2 {
inline namespace RUNTIME_BRIDGE_FLAVOUR {
namespace range_detail {

template <class Awaitable>
inline constexpr bool gives_optional = false;
template <template <class, class> class Awaitable, class T, class Executor>
inline constexpr bool gives_optional<Awaitable<std::optional<T>, Executor>> =
    std::convertible_to<RuntimeBridge::executor_type, Executor>;

template <class Next>
concept IsNext = std::invocable<Next&> && gives_optional<std::invoke_result_t<Next&>>;

/// What the loop and the fetches share. There is no lock, since in a forked child it might be locked for ever. Only the
/// last fetch, or the loop once `room_` is negative, sends another one. The loop follows a link only from a fetch that
/// has ended.
template <class Next>
class Fetches : public std::enable_shared_from_this<Fetches<Next>> {
  using Awaitable = std::invoke_result_t<Next&>;
  using Value = typename Awaitable::value_type;

 public:
  using Item = typename Value::value_type;

  template <class N>
  Fetches(const RuntimeBridge& bridge, N&& next, std::size_t ahead, const SourceLocation& where)
      : bridge_(bridge.share()),
        where_(where),
        next_(std::forward<N>(next)),
        ahead_((std::min)(ahead, unlimited / 4)) {}

  /// The current item; empty at the end.
  std::optional<Item>& item() noexcept { return item_; }

  void begin() {
    if (current_) return;
    send(current_);
    take();
  }

  void advance() {
    if (!item_) return;
    item_.reset();
    if (room_.fetch_add(1) < 0) send(last_->following);
    current_ = std::move(current_->following);
    take();
  }

  /// Cancels all fetches, and waits for them if it may.
  void leave() noexcept {
    for (room_ = -1; current_; current_ = std::move(current_->following)) {
      current_->call.request_stop();
      if (!current_->call.wait_for((std::chrono::hours::max)())) return current_->call.detach();
      if (current_->call.joinable())
        (void)current_->call.join();  // so that its error is not reported: the loop did not ask for it
    }
  }

 private:
  /// One call of `next`. It is a submitted call of its own, sent by the one before it or by the loop: a task that
  /// waited for room would keep a turn of `max_in_flight`.
  struct Fetch {
    JoinHandle<Value> call;
    std::unique_ptr<Fetch> following;  // set before this one ends, or later by the loop
  };

  void send(std::unique_ptr<Fetch>& link) {
    auto fetch = std::make_unique<Fetch>();
    auto task = [self = this->shared_from_this(), f = fetch.get()] { return run(*self, *f); };
    fetch->call = bridge_.submit(std::move(task), where_);
    link = std::move(fetch);
  }

#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wzero-as-null-pointer-constant"  // g++ 12 means its own code in a coroutine
  static Awaitable run(Fetches& self, Fetch& fetch) {
    Awaitable next = std::invoke(self.next_);
    Value value = co_await std::move(next);
    if (value) {
      self.last_ = &fetch;
      if (self.room_.fetch_sub(1) > 0) self.send(fetch.following);
    }
    co_return value;
  }
#pragma GCC diagnostic pop

  void take() {
    Result<Value> result = current_->call.join();
    // With `WhenFull::refuse` it may have been refused while it was early. Now it is needed.
    const bool again = ahead_ != 0 && !result.has_value() && result.error() == BridgeError::Overloaded;
    if (again) send(current_);
    Value value = unwrap(again ? current_->call.join() : std::move(result));
    if (value) item_.emplace(*std::move(value));
  }

  const RuntimeBridge bridge_;
  const SourceLocation where_;
  Next next_;
  const std::size_t ahead_;
  /// How many fetches may be sent ahead; negative if none is on its way, either.
  std::atomic<std::ptrdiff_t> room_{static_cast<std::ptrdiff_t>(ahead_)};
  Fetch* last_ = nullptr;           // if the room is negative: the last fetch
  std::unique_ptr<Fetch> current_;  // the loop's: the fetch of `item_`
  std::optional<Item> item_;
};

}  // namespace range_detail
}  // namespace RUNTIME_BRIDGE_FLAVOUR
}  // namespace v0_2
}  // namespace runtime_bridge

#endif  // RUNTIME_BRIDGE_DETAIL_FETCHES_HPP
