// SPDX-License-Identifier: Apache-2.0
//
// A program that hangs on purpose: `hangs HANG [report] [stop]`. Once it hangs, it prints a report if it is told to,
// and then raises SIGTRAP for a debugger, or ends. hangs.cmake compares what the report and the debugger say with
// expected/HANG.txt, which names lines of this file by the comments at their ends.

#include "support.hpp"

#include <array>
#include <csignal>
#include <functional>
#include <future>
#include <iostream>
#include <map>
#include <sstream>
#include <string>
#include <string_view>
#include <vector>

namespace {

using runtime_bridge::named;
using runtime_bridge::State;
using Channel = asio::experimental::channel<void(ErrorCode, int)>;
using Socket = asio::local::stream_protocol::socket;

bool prints_report = false;
bool stops = false;

/// Starts a plain thread, with a name.
template <class Function>
jthread thread(const char* name, Function function) {
  return jthread([name, function] {
    pthread_setname_np(pthread_self(), name);
    function();
  });
}

/// Ends the program, though its threads hang.
[[noreturn]] void leave() {
  std::cout.flush();
#ifdef COVERED
  __gcov_dump();
#endif
  _exit(0);
}

/// The program hangs now.
[[noreturn]] void hang() {
  if (prints_report) RuntimeBridge::report(std::cout);
  std::cout.flush();
  if (stops) std::raise(SIGTRAP);
  leave();
}

/// Waits until a report says these words, or does not say them. Not for ever: the test shows what it says instead.
void await_report(std::string_view words, bool says = true) {
  const auto end = std::chrono::steady_clock::now() + 10s;
  await_state([&] {
    std::ostringstream report;
    RuntimeBridge::report(report);
    return (report.str().find(words) != std::string::npos) == says || std::chrono::steady_clock::now() > end;
  });
}

/// Waits until no worker runs a handler.
void await_idle_workers() { await_report("the worker is running", false); }

/// Waits until whatever the bridge does now has taken 200 ms: workers are called busy after 50 ms.
void let_time_pass(const RuntimeBridge& bridge) {
  const auto age = [&] { return bridge.calls().front().age; };
  const auto before = age();
  await_state([&] { return age() > before + 200ms; });
}

// ---- The worker is blocked in a handler.

[[noreturn]] void blocked() {
  const auto bridge = RuntimeBridge::with_thread_name("storage");
  std::promise<void> reached;
  std::promise<void> never;
  const auto compact = [&]() -> awaitable<void> {
    co_await sleep_for(1ms);
    reached.set_value();
    never.get_future().wait();  // the mistake: it should co_await
  };
  const auto caller = thread("compactor", [&] {
    (void)bridge.block_on(named("compact", compact));  // the call whose task blocks
  });
  reached.get_future().wait();
  const auto victim = thread("reader", [&] {
    (void)bridge.block_on_for([] {}, 24h);  // the call behind it
  });
  await_state([&] { return bridge.calls().size() == 2; });
  let_time_pass(bridge);
  hang();
}

/// The same without a timer or a socket: then the loop is not watched, and debuggers look at the worker's stack.
[[noreturn]] void blocked_unwatched() {
  const auto bridge = RuntimeBridge::with_thread_name("storage");
  std::promise<void> reached;
  std::promise<void> never;
  const auto compact = [&]() -> awaitable<void> {
    co_await asio::post(use_awaitable);
    reached.set_value();
    never.get_future().wait();
  };
  const auto caller = thread("compactor", [&] {
    (void)bridge.block_on(named("compact", compact));  // the call whose task blocks
  });
  reached.get_future().wait();
  hang();
}

// ---- Two callers on one connection: one reads the answer that is for the other.

awaitable<std::string> receive(Socket& connection) {
  std::string text(64, '\0');
  text.resize(co_await connection.async_read_some(asio::buffer(text), use_awaitable));
  co_return text;
}

[[noreturn]] void connection() {
  const auto bridge = RuntimeBridge::with_thread_name("redis");
  Socket client(bridge.get_executor());
  asio::io_context servers;
  Socket server(servers);
  asio::local::connect_pair(client, server);

  std::promise<void> watching;
  std::promise<void> swallowed;
  const auto watch = [&]() -> awaitable<void> {
    watching.set_value();
    for (std::string event; event != "changed";) {
      event = co_await receive(client);
      if (event == "the value") swallowed.set_value();  // and ignored, as it is no event
    }
  };
  const auto get = [&]() -> awaitable<std::string> {
    co_await asio::async_write(client, asio::buffer("get", 3), use_awaitable);
    auto answer = receive(client);
    co_return co_await std::move(answer);
  };
  const auto watcher = thread("watcher", [&] {
    (void)bridge.block_on(named("watch", watch));  // the call that reads first
  });
  watching.get_future().wait();
  const auto reader = thread("reader", [&] {
    (void)bridge.block_on(named("get", get));  // the call whose answer is lost
  });
  std::array<char, 3> request{};
  asio::read(server, asio::buffer(request));
  asio::write(server, asio::buffer("the value", 9));
  swallowed.get_future().wait();
  await_idle_workers();
  hang();
}

// ---- A ring through a plain thread: the task waits for a thread that waits for the task's worker.

[[noreturn]] void ring() {
  const auto bridge = RuntimeBridge::with_thread_name("storage");
  const auto load = [&] {
    const auto helper = thread("helper", [&] {
      (void)bridge.block_on(named("load part", seven));  // the call that the worker cannot start
    });
    // The helper is joined here.
  };
  const auto caller = thread("loader", [&] {
    (void)bridge.block_on(named("load", load));  // the call that waits for a thread
  });
  await_state([&] { return bridge.calls().size() == 2; });
  let_time_pass(bridge);
  hang();
}

// ---- A lost completion: nobody ever calls the handler that the task waits for.

/// A client that should call back when an answer arrives, but has forgotten a request.
class Client {
 public:
  template <class Token>
  auto async_ask(Token&& token) {
    return asio::async_initiate<Token, void()>([this](auto handler) { forgotten_ = keep(std::move(handler)); }, token);
  }

 private:
  template <class Handler>
  static std::shared_ptr<void> keep(Handler handler) {
    return std::make_shared<Handler>(std::move(handler));
  }

  std::shared_ptr<void> forgotten_;
};

[[noreturn]] void lost() {
  const auto bridge = RuntimeBridge::with_thread_name("client");
  Client client;
  std::promise<void> reached;
  const auto ask = [&]() -> awaitable<void> {
    reached.set_value();
    co_await client.async_ask(use_awaitable);
  };
  const auto caller = thread("asker", [&] {
    (void)bridge.block_on(named("ask", ask));  // the call that nobody answers
  });
  reached.get_future().wait();
  (void)bridge.block_on([] {});  // behind it: from here on the task waits
  await_idle_workers();
  hang();
}

// ---- A full bridge: the tasks that run wait for a call that may not run before one of them has ended.

[[noreturn]] void full() {
  Options options;
  options.thread_name = "pool";
  options.max_in_flight = 2;
  const RuntimeBridge bridge(std::move(options));
  std::array<std::unique_ptr<Channel>, 2> looked_up;
  for (auto& channel : looked_up) channel = std::make_unique<Channel>(bridge.get_executor());
  std::vector<jthread> callers;
  for (auto& channel : looked_up) {
    const auto transfer = [&]() -> awaitable<void> { (void)co_await channel->async_receive(use_awaitable); };
    callers.push_back(thread("transfer", [&, transfer] {
      (void)bridge.block_on(named("transfer", transfer));  // the calls that have all turns
    }));
  }
  await_state([&] { return count_calls(bridge, State::running) == 2; });
  const auto look_up = thread("look-up", [&] {
    (void)bridge.block_on(named("look up", seven));  // the call that they wait for
    for (auto& channel : looked_up) asio::post(bridge.get_executor(), [&] { channel->try_send(ErrorCode(), 0); });
  });
  await_state([&] { return count_calls(bridge, State::waiting) == 1; });
  await_idle_workers();
  hang();
}

// ---- No hang, but everything else that a report can say.

[[noreturn]] void everything() {
  const RuntimeBridge not_started([] {
    Options options = lazy();
    options.thread_name = "lazy";
    return options;
  }());
  const auto bridge = RuntimeBridge::with_thread_name("tab\t, bell\a, delete\x7f, \xc3\xa9");
  const auto other = RuntimeBridge::with_thread_name("long names do not fit into the text of a short string");
  auto submitted = bridge.submit(named("line\nbreak", park));  // submitted
  auto cancelled = bridge.submit(park_stubbornly);             // submitted and cancelled
  await_state([&] { return count_calls(bridge, State::running) == 2; });
  cancelled.request_stop();
  const auto late = thread("l\x01te", [&] {
    (void)bridge.block_on_for(park_stubbornly, 500ms);  // late
  });
  await_state([&] { return count_calls(bridge, State::cancelling) == 2; });
  const auto early = thread("early", [&] {
    (void)bridge.block_on_for(named("a name that does not fit into a short string", park), 24h);  // early
  });
  await_state([&] { return count_calls(bridge, State::running) == 2; });
  const auto waits = thread("waits", [&] {
    const auto parked = [&] { return bridge.block_on(park); };  // called by a worker
    (void)other.block_on(parked);                               // whose worker waits
  });
  await_state([&] { return count_calls(bridge, State::running) == 3; });
  const auto ended = RuntimeBridge::with_thread_name("ended");
  ended.shutdown(runtime_bridge::Shutdown::drain);
  const auto closing = RuntimeBridge::with_thread_name("closing");
  auto last = closing.submit(park);  // waited for by a shutdown
  const auto closer = thread("closer", [&] { closing.shutdown(runtime_bridge::Shutdown::drain); });
  await_report("the bridge is being shut down");
  let_time_pass(other);
  await_idle_workers();
  hang();
}

// ---- A forked child does not have its parent's bridges.

[[noreturn]] void forked() {
  const auto parents = RuntimeBridge::with_thread_name("parent");
  const auto call = parents.submit(park);
  await_state([&] { return count_calls(parents, State::running) == 1; });
  // A worker that is inside malloc during the fork would leave AddressSanitizer's locks locked in the child.
  await_idle_workers();
  const pid_t child = fork();
  if (child == 0) {
    const auto childs = RuntimeBridge::with_thread_name("child");
    auto submitted = childs.submit(park);  // the call of the child
    await_state([&] { return count_calls(childs, State::running) == 1; });
    await_idle_workers();
    hang();
  }
  waitpid(child, nullptr, 0);
  leave();
}

}  // namespace

int main(int argc, char** argv) {
  const std::vector<std::string_view> arguments(argv + 1, argv + argc);
  const auto is_given = [&](std::string_view word) {
    return std::find(arguments.begin(), arguments.end(), word) != arguments.end();
  };
  prints_report = is_given("report");
  stops = is_given("stop");
  const std::map<std::string_view, void (*)()> hangs{{"blocked", blocked},
                                                     {"blocked_unwatched", blocked_unwatched},
                                                     {"connection", connection},
                                                     {"ring", ring},
                                                     {"lost", lost},
                                                     {"full", full},
                                                     {"everything", everything},
                                                     {"forked", forked},
                                                     {"none", hang}};
  for (const auto& [name, function] : hangs) {
    if (is_given(name)) function();
  }
  std::cerr << "usage: hangs HANG [report] [stop]\n";
  return 2;
}
