// SPDX-License-Identifier: Apache-2.0
//
// One program with all flavours of the header. They share the errors and the graph of who waits for whom.

#include "flavours.hpp"

#include <array>
#include <latch>

#include "support.hpp"

using Answer = std::variant<int, BridgeError>;

std::unique_ptr<Peer> asio_20_peer(), boost_20_peer(), asio_23_peer(), boost_23_peer();

// Those with the same `expected` have the same Result.
#ifdef __cpp_lib_expected
Result<int> asio_23_increment(const Result<int>& number);
Result<int> boost_23_increment(const Result<int>& number);
constexpr auto asio_increment = asio_23_increment, boost_increment = boost_23_increment;
#else
Result<int> asio_20_increment(const Result<int>& number);
Result<int> boost_20_increment(const Result<int>& number);
constexpr auto asio_increment = asio_20_increment, boost_increment = boost_20_increment;
#endif

namespace {

std::array<std::unique_ptr<Peer>, 4> peers() {
  return {asio_20_peer(), boost_20_peer(), asio_23_peer(), boost_23_peer()};
}

int value(const Answer& answer) { return std::get<int>(answer); }

bool is_ring(const Answer& answer) {
  const auto* error = std::get_if<BridgeError>(&answer);
  return error && *error == BridgeError::WouldDeadlock;
}

}  // namespace

TEST_CASE("flavours: tasks call all other flavours and back, nested") {
  const auto there = peers(), back = peers();
  std::vector<const Peer*> chain;
  for (const auto& peer : there) chain.push_back(peer.get());
  for (const auto& peer : back) chain.push_back(peer.get());
  const std::function<int(std::size_t)> depth = [&](std::size_t from) {
    return from == chain.size() ? 0 : 1 + value(chain[from]->call([&] { return depth(from + 1); }));
  };
  std::atomic<int> wrong{0};
  const auto call_often = [&] {
    for (int round = 0; round < 1'000; ++round) wrong += depth(0) == 8 ? 0 : 1;
  };
  {
    const jthread other(call_often);
    call_often();
  }
  CHECK(wrong == 0);
}

TEST_CASE("flavours: a ring through two of them is found") {
  const auto all = peers();
  for (const auto& a : all) {
    for (const auto& b : all) {
      Answer ring = 0;
      const auto call_back = [&] {
        ring = a->call([] { return 1; });
        return 2;
      };
      CHECK(value(a->call([&] { return a == b ? call_back() : value(b->call(call_back)); })) == 2);
      CHECK(is_ring(ring));
    }
  }
}

// Race: two flavours call each other at the same time. At most one of the inner calls can be refused.
TEST_CASE("flavours: rings race with each other", "[race]") {
  const auto all = peers();
  for (int round = 0; round < 500; ++round) {
    const Peer& a = *all[static_cast<std::size_t>(round % 4)];
    const Peer& b = *all[static_cast<std::size_t>((round + 1) % 4)];
    std::array<Answer, 2> inner;
    std::latch go(2);
    const auto call = [&](const Peer& first, const Peer& second, Answer& answer) {
      go.arrive_and_wait();
      (void)first.call([&] {
        answer = second.call([] { return 1; });
        return 0;
      });
    };
    {
      const jthread other([&] { call(b, a, inner[1]); });
      call(a, b, inner[0]);
    }
    const int refused = (is_ring(inner[0]) ? 1 : 0) + (is_ring(inner[1]) ? 1 : 0);
    REQUIRE(refused <= 1);
    for (const auto& answer : inner) REQUIRE((is_ring(answer) || answer == Answer(1)));
  }
}

TEST_CASE("flavours: errors arrive as they were made") {
  for (const auto& peer : peers()) {
    const Answer thrown = peer->call([]() -> int { throw std::runtime_error("elsewhere"); });
    const auto* error = std::get_if<BridgeError>(&thrown);
    REQUIRE(error);
    CHECK(outcome(error_result<int>(*error)) == threw("elsewhere"));
  }
}

TEST_CASE("flavours: Results are passed between standalone Asio and Boost.Asio") {
  Result<int> number = 0;
  for (int i = 0; i < 100; ++i) number = asio_increment(boost_increment(number));
  CHECK(number == 200);
  number = asio_increment(boost_increment(error_result<int>(BridgeError::TimedOut)));
  CHECK(outcome(number) == Outcome{true, BridgeError::TimedOut});
}
