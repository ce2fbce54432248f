// SPDX-License-Identifier: Apache-2.0
//
// Stopping now, with every shape of task that users write: by the destructor, at a limit that has passed, and by
// context().stop(). Run it under ASan, since most failures are a use after free.

#include <atomic>
#include <csignal>
#include <functional>
#include <latch>
#include <memory>
#include <string>

#include "shapes.hpp"
#include "support.hpp"

using runtime_bridge::Shutdown;

namespace {

/// A way to stop a bridge now. Each destroys the bridge.
struct Ending {
  std::string name;
  std::function<void(std::unique_ptr<RuntimeBridge>&)> stop;
};

const std::vector<Ending>& endings() {
  static const std::vector<Ending> all{
      {"destructor", [](auto& bridge) { bridge.reset(); }},
      {"a limit that has passed",
       [](auto& bridge) {
         (void)bridge->shutdown(Shutdown::drain, 0s);
         bridge.reset();
       }},
      {"context().stop()",
       [](auto& bridge) {
         bridge->get_executor().context().stop();
         await_state([&] { return bridge->in_flight() == 0; });
         bridge.reset();
       }},
  };
  return all;
}

using Time = std::chrono::steady_clock;

#ifdef SANITIZED
constexpr int slowness = 10;
#else
constexpr int slowness = 1;
#endif

Time::duration time_to_destroy_over(int tasks, const std::function<awaitable<void>()>& task) {
  auto bridge = std::make_unique<RuntimeBridge>();
  std::vector<JoinHandle<void>> handles;
  for (int i = 0; i < tasks; ++i) handles.push_back(bridge->submit(task));
  await_calls(*bridge, static_cast<std::size_t>(tasks));
  const auto begin = Time::now();
  bridge.reset();
  const auto took = Time::now() - begin;
  for (auto& handle : handles) REQUIRE(outcome(handle.join()) == response_lost);
  return took;
}

}  // namespace

TEST_CASE("hard stop: every shape of task, with every way to stop") {
  for (const Shape& shape : shapes()) {
    for (const Ending& ending : endings()) {
      INFO(shape.name << ", by " << ending.name);
      Ground ground;
      auto bridge = std::make_unique<RuntimeBridge>();
      const auto token = std::make_shared<int>();
      Outcome result;
      long alive = -1;
      jthread caller([&, call = bridge.get()] {
        const auto answer = call->block_on([&, held = token] { return shape.make(ground, held); });
        alive = ground.alive;
        result = outcome(answer);
      });
      await_calls(*bridge, 1);
      ground.let_foreign_go();
      ending.stop(bridge);
      caller.join();
      INFO(result);
      CHECK(shape.explains(result));
      CHECK(alive == 0);
      CHECK(token.use_count() == 1);
    }
  }
}

TEST_CASE("hard stop: many shapes at once") {
  for (const Ending& ending : endings()) {
    INFO(ending.name);
    Ground ground;
    auto bridge = std::make_unique<RuntimeBridge>();
    std::vector<JoinHandle<void>> tasks;
    for (int copy = 0; copy < 3; ++copy) {
      for (const Shape& shape : shapes()) {
        tasks.push_back(bridge->submit([&] { return shape.make(ground, nullptr); }));
      }
    }
    await_calls(*bridge, tasks.size());
    ground.let_foreign_go();
    ending.stop(bridge);
    for (std::size_t i = 0; i < tasks.size(); ++i) {
      const Shape& shape = shapes()[i % shapes().size()];
      INFO(shape.name);
      CHECK(shape.explains(outcome(tasks[i].join())));
    }
    CHECK(ground.alive == 0);
  }
}

TEST_CASE("hard stop: takes no fixed time", "[timing]") {
  CHECK(quickest([] { return time_to_destroy_over(1, park); }) < 10ms * slowness);
  CHECK(quickest([] { return time_to_destroy_over(1000, park); }) < 100ms * slowness);
  CHECK(quickest([] { return time_to_destroy_over(1, park_stubbornly); }) < 10ms * slowness);
  CHECK(quickest([] { return time_to_destroy_over(100, park_stubbornly); }) < 100ms * slowness);
}

TEST_CASE("hard stop: a shutdown keeps to its limit", "[timing]") {
  const auto took = quickest([] {
    RuntimeBridge bridge;
    auto parked = bridge.submit(park());
    await_calls(bridge, 1);
    const auto begin = Time::now();
    REQUIRE_FALSE(bridge.shutdown(Shutdown::drain, 100ms));
    return Time::now() - begin;
  });
  CHECK(took >= 100ms);
  CHECK(took < 100ms + 20ms * slowness);
}

TEST_CASE("hard stop: a task that returns a value when it is cancelled keeps it") {
  for (const Ending& ending : endings()) {
    INFO(ending.name);
    auto bridge = std::make_unique<RuntimeBridge>();
    auto cleans_up = bridge->submit(park_and_return(8));
    await_calls(*bridge, 1);
    ending.stop(bridge);
    CHECK(cleans_up.join() == 8);
  }
}

TEST_CASE("hard stop: queued tasks are destroyed on the worker without being run") {
  auto bridge = std::make_unique<RuntimeBridge>();
  const auto worker = worker_of(*bridge);
  std::thread::id released;
  bool ran = false;
  std::binary_semaphore busy(0), go_on(0);
  asio::post(bridge->get_executor(), [&] {
    busy.release();
    go_on.acquire();
  });
  busy.acquire();
  auto queued = bridge->submit([&ran, note = NotesItsEnd(released)] { ran = true; });
  bridge->get_executor().context().stop();
  go_on.release();
  CHECK(outcome(queued.join()) == response_lost);
  CHECK_FALSE(ran);
  CHECK(released == worker);
}

// I/O on services that were shut down succeeds with zero bytes.
TEST_CASE("hard stop: a call that was cut off has no value") {
  for (const Ending& ending : endings()) {
    INFO(ending.name);
    Foreign foreign;
    auto bridge = std::make_unique<RuntimeBridge>();
    const auto executor = bridge->get_executor();
    auto task = bridge->submit([&]() -> awaitable<std::size_t> {
      asio::local::stream_protocol::socket a(executor), b(executor);
      asio::local::connect_pair(a, b);
      co_await asio::this_coro::reset_cancellation_state(asio::disable_cancellation());
      auto visit = foreign.visit(1);
      (void)co_await std::move(visit);
      co_return co_await asio::async_write(a, asio::buffer("12345678", 8), use_awaitable);
    });
    auto parked = bridge->submit(park_stubbornly());
    await_calls(*bridge, 2);
    jthread stopper([&] { ending.stop(bridge); });
    CHECK(outcome(parked.join()) == response_lost);  // it was destroyed
    foreign.go_on();
    CHECK(outcome(task.join()) == response_lost);
  }
}

namespace {

/// A user's own protocol, as for an address family that Asio does not support.
struct OwnProtocol {
  using endpoint = asio::ip::basic_endpoint<OwnProtocol>;
  using socket = asio::basic_stream_socket<OwnProtocol>;
  using resolver = asio::ip::basic_resolver<OwnProtocol>;
  static OwnProtocol v4() { return {}; }
  static OwnProtocol v6() { return {}; }
  int type() const { return SOCK_STREAM; }
  int protocol() const { return 0; }
  int family() const { return AF_INET; }
};

/// Stops the context and then looks up a name again and again, ignoring cancellation.
template <class Protocol>
awaitable<void> look_up(RuntimeBridge& bridge, int& found) {
  co_await asio::this_coro::reset_cancellation_state(asio::disable_cancellation());
  typename Protocol::resolver resolver(co_await asio::this_coro::executor);
  bridge.get_executor().context().stop();
  for (int i = 0; i < 50; ++i) {
    const auto results = co_await resolver.async_resolve("127.0.0.1", "", use_awaitable);
    if (results.begin() != results.end()) ++found;
  }
}

}  // namespace

TEMPLATE_TEST_CASE("hard stop: name look-ups continue and are waited for", "", asio::ip::tcp, asio::ip::udp,
                   asio::ip::icmp, OwnProtocol) {
  RuntimeBridge bridge;
  int found = 0;
  auto task = bridge.submit(look_up<TestType>(bridge, found));
  const Outcome result = outcome(task.join());
  CHECK((result == succeeded || result == response_lost));  // a quick look-up may end before anything is destroyed
  CHECK(found == 50);
}

TEST_CASE("hard stop: a loop that swallows every exception is destroyed where it waits") {
  for (const Ending& ending : endings()) {
    INFO(ending.name);
    auto bridge = std::make_unique<RuntimeBridge>();
    auto loop = bridge->submit([]() -> awaitable<void> {
      asio::steady_timer timer(co_await asio::this_coro::executor);
      for (;;) {
        try {
          timer.expires_after(1h);
          co_await timer.async_wait(use_awaitable);
        } catch (...) {
        }
      }
    });
    await_calls(*bridge, 1);
    ending.stop(bridge);
    CHECK(outcome(loop.join()) == response_lost);
  }
}

TEST_CASE("hard stop: an earlier stop request is remembered") {
  auto bridge = std::make_unique<RuntimeBridge>();
  int tried = 0;
  auto polls = bridge->submit([&]() -> awaitable<int> {
    asio::steady_timer timer(co_await asio::this_coro::executor, 24h);
    while ((co_await asio::this_coro::cancellation_state).cancelled() == asio::cancellation_type::none) {
      ++tried;
      (void)co_await timer.async_wait(as_tuple_awaitable);
    }
    co_return 7;
  });
  await_calls(*bridge, 1);
  std::binary_semaphore busy(0), go_on(0);
  asio::post(bridge->get_executor(), [&] {
    busy.release();
    go_on.acquire();
  });
  busy.acquire();
  polls.request_stop();  // still queued when the worker is stopped
  bridge->get_executor().context().stop();
  go_on.release();
  bridge.reset();
  CHECK(polls.join() == 7);
  CHECK(tried == 1);
}

TEST_CASE("hard stop: a task that survived a stop request and throws when the bridge stops is ResponseLost") {
  auto bridge = std::make_unique<RuntimeBridge>();
  std::atomic<bool> goes_on{false};
  auto task = bridge->submit([&]() -> awaitable<void> {
    try {
      co_await park();
    } catch (const AsioError&) {
    }
    co_await asio::this_coro::reset_cancellation_state(asio::enable_total_cancellation());
    goes_on = true;
    co_await park();
  });
  await_calls(*bridge, 1);
  task.request_stop();
  await_state([&] { return goes_on.load(); });
  bridge.reset();
  CHECK(outcome(task.join()) == response_lost);
}

TEST_CASE("hard stop: an earlier shutdown(cancel) is remembered") {
  RuntimeBridge bridge;
  std::atomic<int> waits{0};
  auto polls = bridge.submit([&]() -> awaitable<int> {
    co_await asio::this_coro::throw_if_cancelled(false);
    asio::steady_timer timer(co_await asio::this_coro::executor, 24h);
    while (++waits < 3) (void)co_await timer.async_wait(as_tuple_awaitable);
    const auto state = co_await asio::this_coro::cancellation_state;
    co_return state.cancelled() == asio::cancellation_type::none ? 8 : 7;
  });
  await_calls(bridge, 1);
  const jthread shutter([&] { bridge.shutdown(Shutdown::cancel); });
  await_state([&] { return waits == 2; });
  CHECK_FALSE(bridge.shutdown(Shutdown::drain, 0s));
  CHECK(polls.join() == 7);
}

TEST_CASE("hard stop: a task that retries once and returns a value keeps it") {
  auto bridge = std::make_unique<RuntimeBridge>();
  auto tries = bridge->submit([]() -> awaitable<int> {
    for (int i = 0; i < 2; ++i) {
      try {
        co_await park();
      } catch (const AsioError&) {
      }
    }
    co_return 8;
  });
  await_calls(*bridge, 1);
  bridge.reset();
  CHECK(tries.join() == 8);
}

namespace {

template <class Messages>
awaitable<void> wait_for_channel() {
  Messages messages(co_await asio::this_coro::executor);
  (void)co_await messages.async_receive(use_awaitable);
}

awaitable<void> wait_for_signal() {
  asio::signal_set signals(co_await asio::this_coro::executor, SIGUSR2);
  (void)co_await signals.async_wait(use_awaitable);
}

/// Checks that a task which comes back from another executor after the hard stop, and then waits here, is destroyed.
void check_destroyed_after_foreign(awaitable<void> (*wait)()) {
  auto bridge = std::make_unique<RuntimeBridge>();
  Foreign foreign;
  auto task = bridge->submit([&]() -> awaitable<void> {
    co_await asio::this_coro::reset_cancellation_state(asio::disable_cancellation());
    auto visit = foreign.visit(1);
    (void)co_await std::move(visit);
    auto waiting = wait();
    co_await std::move(waiting);
  });
  auto parked = bridge->submit(park_stubbornly());
  await_calls(*bridge, 2);
  const jthread destroyer([&] { bridge.reset(); });
  CHECK(outcome(parked.join()) == response_lost);  // it was destroyed
  foreign.go_on();
  CHECK(outcome(task.join()) == response_lost);
}

}  // namespace

TEST_CASE("hard stop: a task that comes back from another executor and waits for a channel is destroyed") {
  check_destroyed_after_foreign(wait_for_channel<Channel>);
  check_destroyed_after_foreign(wait_for_channel<ConcurrentChannel>);
}

// This makes the signal service of the context, after the other services have been shut down.
TEST_CASE("hard stop: a task that comes back from another executor and waits for a signal_set is destroyed",
          "[signal_set]") {
  check_destroyed_after_foreign(wait_for_signal);
}

TEST_CASE("hard stop: a task that only computes between its steps is cancelled soon", "[timing]") {
  auto bridge = std::make_unique<RuntimeBridge>();
  int steps = 0;
  std::atomic<bool> stopping{false};
  auto computes = bridge->submit([&]() -> awaitable<void> {
    for (;;) {
      const auto end = Time::now() + 1ms;
      while (Time::now() < end) continue;
      if (stopping) ++steps;
      co_await asio::post(use_awaitable);
    }
  });
  await_calls(*bridge, 1);
  stopping = true;
  bridge.reset();
  CHECK(outcome(computes.join()) == response_lost);
  CHECK(steps < 50);
}

namespace {

/// A pool as users write it: tokens in a channel, and leases whose destructor gives the token back.
class TokenPool {
 public:
  explicit TokenPool(const asio::any_io_executor& executor) : tokens_(executor, 1) { tokens_.try_send(ErrorCode(), 1); }

  class Lease {
   public:
    explicit Lease(ConcurrentChannel& tokens) : tokens_(tokens) {}
    Lease(const Lease&) = delete;
    Lease& operator=(const Lease&) = delete;
    ~Lease() { tokens_.try_send(ErrorCode(), 1); }

   private:
    ConcurrentChannel& tokens_;
  };

  awaitable<void> use(bool stubborn) {
    if (stubborn) co_await asio::this_coro::reset_cancellation_state(asio::disable_cancellation());
    (void)co_await tokens_.async_receive(use_awaitable);
    const Lease lease(tokens_);
    co_await park();
  }

 private:
  ConcurrentChannel tokens_;
};

}  // namespace

TEST_CASE("hard stop: destroyed tasks give their tokens back to a channel") {
  for (const bool stubborn : {false, true}) {
    INFO(stubborn);
    RuntimeBridge bridge;
    TokenPool pool(bridge.get_executor());
    std::vector<JoinHandle<void>> tasks;
    for (int i = 0; i < 3; ++i) tasks.push_back(bridge.submit(pool.use(stubborn)));
    await_calls(bridge, tasks.size());
    bridge.shutdown(Shutdown::drain, 0s);
    for (auto& task : tasks) CHECK(outcome(task.join()) == response_lost);
  }
}

namespace {

/// Ends when `go_on` is called, on any thread. Cancelling it only calls a function, on the worker.
class Stubborn {
 public:
  awaitable<void> wait(std::function<void()> on_cancel) {
    const auto initiate = [this, on_cancel](auto handler) {
      const auto call = [on_cancel](asio::cancellation_type) { on_cancel(); };
      asio::get_associated_cancellation_slot(handler).assign(call);
      go_on = [h = std::make_shared<decltype(handler)>(std::move(handler))] {
        asio::post(asio::get_associated_executor(*h), std::move(*h));
      };
    };
    return asio::async_initiate<decltype(use_awaitable), void()>(initiate, use_awaitable);
  }

  std::function<void()> go_on;
};

}  // namespace

TEST_CASE("hard stop: nothing is cancelled after operations were destroyed") {
  std::optional<RuntimeBridge> bridge(std::in_place);
  std::atomic<bool> destroyed{false};
  int early = 0, late = 0;
  Stubborn stubborn;
  const auto count = [&] { ++(destroyed ? late : early); };
  auto waits = bridge->submit([&]() -> awaitable<void> {
    auto operation = stubborn.wait(count);
    co_await std::move(operation);
  });
  auto parked = bridge->submit([&]() -> awaitable<void> {
    const std::shared_ptr<void> at_end(nullptr, [&](void*) { destroyed = true; });
    co_await park_stubbornly();
  });
  await_calls(*bridge, 2);
  jthread stops([&] { bridge.reset(); });
  await_state([&] { return destroyed.load(); });
  stubborn.go_on();
  stops.join();
  CHECK(outcome(waits.join()) == response_lost);
  CHECK(early > 0);
  CHECK(late == 0);
}

// A task may retry after the cancellation of a hard stop, which is not remembered. A deadline is: it soon ends a loop
// over a thousand keys that logs each failure.
TEST_CASE("hard stop: cancellation by a deadline, unlike that of a hard stop, is remembered") {
  RuntimeBridge bridge;
  int tried = 0;
  const auto over_keys = [&]() -> awaitable<void> {
    asio::steady_timer timer(co_await asio::this_coro::executor);
    for (int key = 0; key < 1000; ++key) {
      try {
        timer.expires_after(1h);
        ++tried;
        co_await timer.async_wait(use_awaitable);
      } catch (const std::exception&) {
      }
    }
  };
  CHECK(bridge.block_on_for(over_keys, 20ms).has_value());
  CHECK(tried == 1000);
}

namespace {

/// A cancellation handler that owns something.
struct Handler {
  explicit Handler(std::shared_ptr<int> held) : token(std::move(held)) {}
  void operator()(asio::cancellation_type) const {}
  std::shared_ptr<int> token;
};

}  // namespace

TEST_CASE("hard stop: nothing of a call stays in its cancellation slot") {
  const auto token = std::make_shared<int>();
  const auto leaves_a_handler = [&](bool parks) -> awaitable<void> {
    auto slot = (co_await asio::this_coro::cancellation_state).slot();
    slot.assign(Handler(token));
    asio::steady_timer timer(co_await asio::this_coro::executor, parks ? std::chrono::hours(1) : std::chrono::hours(0));
    co_await timer.async_wait(asio::bind_cancellation_slot(asio::cancellation_slot(), use_awaitable));
  };
  const auto leaves_filters = [&]() -> awaitable<void> {
    const auto filter = [held = token](asio::cancellation_type type) { return type; };
    co_await asio::this_coro::reset_cancellation_state(filter, filter);
  };
  auto bridge = std::make_unique<RuntimeBridge>();
  unwrap(bridge->block_on([&] { return leaves_a_handler(false); }));
  CHECK(token.use_count() == 1);
  unwrap(bridge->block_on(leaves_filters));
  CHECK(token.use_count() == 1);
  long uses = 0;
  jthread caller([&, call = bridge.get()] {
    (void)call->block_on([&] { return leaves_a_handler(true); });
    uses = token.use_count();
  });
  await_calls(*bridge, 1);
  bridge.reset();
  caller.join();
  CHECK(uses == 1);
}

namespace {

/// Waits for an operation that never ends, and ignores cancellation.
template <class Operation>
awaitable<void> stubbornly(Operation operation) {
  co_await asio::this_coro::reset_cancellation_state(asio::disable_cancellation());
  (void)co_await operation(use_awaitable);
}

template <class Operation>
void check_destroyed(RuntimeBridge& bridge, Operation operation) {
  auto task = bridge.submit(stubbornly(operation));
  await_calls(bridge, 1);
  CHECK_FALSE(bridge.shutdown(Shutdown::drain, 0s));
  CHECK(outcome(task.join()) == response_lost);
}

}  // namespace

TEST_CASE("hard stop: a task that waits for a socket and ignores cancellation is destroyed", "[socket]") {
  RuntimeBridge bridge;
  asio::local::stream_protocol::socket a(bridge.get_executor()), b(bridge.get_executor());
  asio::local::connect_pair(a, b);
  char byte = 0;
  check_destroyed(bridge, [&](auto token) { return asio::async_read(a, asio::buffer(&byte, 1), token); });
}

TEST_CASE("hard stop: a task that waits for a channel and ignores cancellation is destroyed") {
  RuntimeBridge bridge;
  Channel channel(bridge.get_executor());
  check_destroyed(bridge, [&](auto token) { return channel.async_receive(token); });
  RuntimeBridge other;
  ConcurrentChannel concurrent(other.get_executor());
  check_destroyed(other, [&](auto token) { return concurrent.async_receive(token); });
}

TEST_CASE("hard stop: a task that waits for a signal_set and ignores cancellation is destroyed", "[signal_set]") {
  RuntimeBridge bridge;
  asio::signal_set signals(bridge.get_executor(), SIGUSR2);
  check_destroyed(bridge, [&](auto token) { return signals.async_wait(token); });
}
