// SPDX-License-Identifier: Apache-2.0
//
// Two translation units include the header: it must link, and both must see one library. Here the header comes after
// the standard library's, in the other unit it comes first.

#include <iostream>
#include <runtime_bridge.hpp>

#include "other.hpp"

using runtime_bridge::BridgeError;
using runtime_bridge::RuntimeBridge;

namespace {

bool check(bool holds, const char* what) {
  std::cout << (holds ? "ok: " : "WRONG: ") << what << '\n';
  return holds;
}

}  // namespace

int main() {
  const RuntimeBridge mine = RuntimeBridge::with_thread_name("mine");
  const RuntimeBridge other = other::make_bridge();
  const auto mine_is_seven = [&] { return other::call(mine); };
  const auto ring = [&] { return other.block_on(mine_is_seven).value(); };

  bool good = check(runtime_bridge::make_error_code(BridgeError::WorkerDead).category() == other::category(),
                    "one error category");
  good &= check(other::asio_aligns() == asio_aligns, "one Asio");
  good &= check(other::call(mine) == 7, "a bridge of this unit, called by the other");
  good &= check(other.block_on([] { return 8; }) == 8, "a bridge of the other unit, called by this one");

  // Which worker a thread is, and who waits for whom, are variables of the header.
  const auto own = mine.block_on(mine_is_seven);
  good &= check(own && !*own && own->error() == BridgeError::WouldDeadlock, "the other unit knows this unit's worker");
  const auto closed = mine.block_on(ring);
  good &= check(closed && !*closed && closed->error() == BridgeError::WouldDeadlock, "a ring through both units");
  return good ? 0 : 1;
}
