// SPDX-License-Identifier: Apache-2.0
//
// CASE is what `range` is given. 0 is all that it takes, for a compiler that warns of everything.

#include <memory>
#include <optional>
#include <runtime_bridge/range.hpp>

#ifdef RUNTIME_BRIDGE_USE_BOOST_ASIO
namespace asio = boost::asio;
#endif

using runtime_bridge::prefetch;
using runtime_bridge::range;

asio::awaitable<std::optional<std::unique_ptr<int>>> next();
asio::awaitable<std::optional<int>, asio::io_context::executor_type> other_next();
asio::awaitable<int> not_optional();
asio::awaitable<std::optional<int>, asio::system_executor> on_another_executor();

int use(const runtime_bridge::RuntimeBridge& bridge) {
  int sum = 0;
#if CASE == 0
  for (const std::unique_ptr<int>& item : range(bridge, next, prefetch(1))) sum += *item;
  for (const int item : range(bridge, &other_next)) sum += item;
  auto one = range(bridge, next);
  one = range(bridge, next);
  if (const auto first = one.begin(); first != one.end()) sum += **first;
#elif CASE == 1
  range(bridge, 1);
#elif CASE == 2
  range(bridge, not_optional);
#elif CASE == 3
  range(bridge, next());
#elif CASE == 4
  range(bridge, on_another_executor, prefetch(1));
#elif CASE == 5
  const auto plain = [] { return std::optional(1); };
  range(bridge, plain);
#elif CASE == 6
  const auto can_only_be_moved = [owned = std::make_unique<int>(1)] { return other_next(); };
  range(bridge, can_only_be_moved);
#endif
  return sum;
}
