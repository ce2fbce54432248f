// SPDX-License-Identifier: Apache-2.0
//
// A forked child has the bridge's memory but not its worker. There no call hangs, and no destructor joins a thread that
// does not exist.

#include <cstdlib>
#include <memory>

#include "support.hpp"

using runtime_bridge::Shutdown;

#ifdef __GLIBC__
extern "C" int __register_atfork(void (*)(), void (*)(), void (*)(), void*);  // NOLINT(bugprone-reserved-identifier)

namespace {

int fork_handlers = 0;
const int fork_handlers_before_main = fork_handlers;

}  // namespace

/// Replaces the C library's, to count the calls.
extern "C" int pthread_atfork(void (*prepare)(), void (*parent)(), void (*child)()) noexcept {
  ++fork_handlers;
  return __register_atfork(prepare, parent, child, nullptr);
}
#endif

TEST_CASE("fork: every call in the child is WorkerDead, and destroying the bridge does nothing", "[child]") {
  auto bridge = std::make_unique<RuntimeBridge>();
  CHECK(bridge->block_on([] { return 1; }) == 1);
  CHECK(in_child_process([&] {
          if (outcome(bridge->block_on([] { return 2; })) != worker_dead) return 1;
          if (bridge->in_flight() != 0) return 2;
          bridge.reset();
          return 0;
        }) == 0);
  CHECK(bridge->block_on([] { return 3; }) == 3);
}

TEST_CASE("fork: a lazy bridge that was not started belongs to the parent, too", "[child]") {
  RuntimeBridge bridge(lazy());
  CHECK(in_child_process([&] { return outcome(bridge.block_on([] { return 2; })) == worker_dead ? 0 : 1; }) == 0);
  CHECK(bridge.block_on([] { return 3; }) == 3);
}

TEST_CASE("fork: from a task on the worker", "[child]") {
  auto bridge = std::make_unique<RuntimeBridge>();
  const auto code = bridge->block_on([&] {
    return in_child_process([&] {
      if (bridge->block_on([] {}).error() != BridgeError::WorkerDead) return 1;
      bridge.reset();
      return 0;
    });
  });
  CHECK(code == 0);
  // A nested call takes the lock that was held during the fork.
  CHECK(bridge->block_on([] { return RuntimeBridge().block_on([] { return 3; }).value_or(0); }) == 3);
}

TEST_CASE("fork: a handle does not wait in the child", "[child]") {
  RuntimeBridge bridge;
  auto parked = bridge.submit(park());
  await_calls(bridge, 1);
  CHECK(in_child_process([&] {
          if (!parked.done() || !parked.wait_for(1h)) return 1;
          parked.request_stop();
          return parked.join().error() == BridgeError::WorkerDead ? 0 : 2;
        }) == 0);
  CHECK_FALSE(parked.done());
}

TEST_CASE("fork: the child of a child", "[child]") {
  RuntimeBridge bridge;
  CHECK(in_child_process([&] {
          return in_child_process([&] { return bridge.block_on([] {}).error() == BridgeError::WorkerDead ? 0 : 1; });
        }) == 0);
}

#ifndef _LIBCPP_VERSION  // with libc++ it reports what the lost thread owned
// AddressSanitizer looks for leaks at exit.
TEST_CASE("fork: the child may call exit", "[child]") {
  auto first = std::make_unique<RuntimeBridge>();
  auto second = std::make_unique<RuntimeBridge>(lazy());
  CHECK(first->block_on([] { return 1; }) == 1);
  CHECK(in_child_process([&]() -> int {
          second.reset();
          first.reset();
          std::exit(7);
        }) == 7);
}
#endif

#ifdef __GLIBC__
// If the first bridge registered them, and one thread did so while another forks, the child would wait for it forever.
TEST_CASE("fork: the fork handlers are registered before main") {
  CHECK(RuntimeBridge().block_on([] { return 1; }) == 1);
  CHECK(fork_handlers == fork_handlers_before_main);
}
#endif

#ifndef SANITIZED  // the runtimes do not survive a fork of a busy process, and report that worker as leaked
TEST_CASE("fork: a worker that ended by itself and was not joined", "[child]") {
  auto bridge = std::make_unique<RuntimeBridge>();
  unwrap(bridge->block_on([&] { bridge->shutdown(Shutdown::drain); }));
  await_workers(0);
  CHECK(in_child_process([&] {
          bridge.reset();
          return 0;
        }) == 0);
}

TEST_CASE("fork: the child may make bridges of its own", "[child]") {
  RuntimeBridge bridge;
  CHECK(in_child_process([&] {
          RuntimeBridge a, b;
          bridge = RuntimeBridge();
          return a.block_on([&] { return *b.block_on([&] { return *bridge.block_on([] { return 0; }); }); }).value();
        }) == 0);
}
#endif
