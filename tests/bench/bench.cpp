// SPDX-License-Identifier: Apache-2.0
//
// What a call costs, beside the other ways to make one. tests/bench/run runs it and writes docs/numbers.md from it.

#include <runtime_bridge.hpp>

#include <asio/buffer.hpp>
#include <asio/local/connect_pair.hpp>
#include <asio/local/stream_protocol.hpp>
#include <asio/post.hpp>
#include <asio/read.hpp>
#include <asio/steady_timer.hpp>
#include <asio/use_awaitable.hpp>
#include <asio/use_future.hpp>
#include <asio/write.hpp>

#include <benchmark/benchmark.h>
#include <linux/futex.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <array>
#include <atomic>
#include <chrono>
#include <cstdlib>
#include <exception>
#include <future>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <thread>
#include <utility>
#include <vector>

namespace {
std::atomic<long> allocations{0};
}

// Asio takes its frames with aligned_alloc, everybody else with operator new, which calls malloc.
extern "C" {
// NOLINTBEGIN(bugprone-reserved-identifier, readability-identifier-naming): the names are glibc's
void* __libc_malloc(std::size_t);
void* __libc_memalign(std::size_t, std::size_t);
// NOLINTEND(bugprone-reserved-identifier, readability-identifier-naming)

void* malloc(std::size_t size) {
  allocations.fetch_add(1, std::memory_order_relaxed);
  return __libc_malloc(size);
}
void* aligned_alloc(std::size_t alignment, std::size_t size) {
  allocations.fetch_add(1, std::memory_order_relaxed);
  return __libc_memalign(alignment, size);
}
}

namespace {

using Executor = asio::io_context::executor_type;
using Clock = std::chrono::steady_clock;

// ---------------------------------------------------------------------------------------------------------------------
// The ways to make a call. Each has a worker of its own; call() runs a callable that makes an awaitable<int>.

struct Bridge {
  explicit Bridge(runtime_bridge::Options options = {}) : bridge(std::move(options)) {}

  runtime_bridge::RuntimeBridge bridge;

  Executor executor() const { return bridge.get_executor(); }
  template <class Task>
  auto call(Task&& task) {
    return runtime_bridge::unwrap(bridge.block_on(std::forward<Task>(task)));
  }
};

// The same without ever spinning.
struct NoSpinning : Bridge {
  NoSpinning() : Bridge({.spin_limit = std::chrono::microseconds::zero()}) {}
};

class Loop {
 public:
  Executor executor() { return context_.get_executor(); }

 private:
  asio::io_context context_;
  asio::executor_work_guard<Executor> work_{context_.get_executor()};
  std::jthread thread_{[this] { context_.run(); }};

 public:
  Loop() = default;
  Loop(const Loop&) = delete;
  Loop& operator=(const Loop&) = delete;
  ~Loop() { context_.stop(); }
};

struct UseFuture : Loop {
  template <class Task>
  auto call(Task&& task) {
    return asio::co_spawn(executor(), std::forward<Task>(task), asio::use_future).get();
  }
};

// What a careful user writes: a post, so that the frames come from the worker's cache, a co_spawn there, and a promise.
struct PostAndPromise : Loop {
  template <class Task>
  int call(Task&& task) {
    std::promise<int> promise;
    std::future<int> future = promise.get_future();
    asio::post(executor(), [&] {
      asio::co_spawn(executor(), std::forward<Task>(task),
                     [p = std::move(promise)](std::exception_ptr e, int v) mutable {
                       if (e) {
                         p.set_exception(std::move(e));
                       } else {
                         p.set_value(v);
                       }
                     });
    });
    return future.get();
  }
};

// Without a worker: the same as a blocking system call.
struct Blocking {};

// The same after somebody has used a timer: from then on the worker waits in epoll.
template <class Way>
struct WithReactor : Way {
  asio::steady_timer timer{this->executor()};
};

// ---------------------------------------------------------------------------------------------------------------------
// What is called. One object for each caller.

asio::awaitable<int> one() { co_return 1; }

struct Callable {
  template <class Way>
  static int call(Way& way) {
    return way.call([] { return one(); });
  }
};

struct Awaitable {
  template <class Way>
  static int call(Way& way) {
    return way.call(one());
  }
};

asio::awaitable<int, Executor> one_lean() { co_return 1; }

// The same with an awaitable that knows its executor's type.
struct Lean {
  template <class Way>
  static int call(Way& way) {
    return way.call([] { return one_lean(); });
  }
};

asio::awaitable<int> hop(Executor executor) {
  co_await asio::post(executor, asio::use_awaitable);
  co_return 1;
}

struct Suspends {
  template <class Way>
  static int call(Way& way) {
    return way.call([&] { return hop(way.executor()); });
  }
};

asio::awaitable<int> sleep(Executor executor) {
  asio::steady_timer timer(executor, std::chrono::milliseconds(1));
  co_await timer.async_wait(asio::use_awaitable);
  co_return 1;
}

struct Timer {
  template <class Way>
  static int call(Way& way) {
    return way.call([&] { return sleep(way.executor()); });
  }
  static int call(Blocking&) {
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
    return 1;
  }
};

using Socket = asio::local::stream_protocol::socket;
using Message = std::array<char, 64>;

asio::awaitable<int> exchange(Socket& socket) {
  Message message{};
  co_await asio::async_write(socket, asio::buffer(message), asio::use_awaitable);
  co_await asio::async_read(socket, asio::buffer(message), asio::use_awaitable);
  co_return 1;
}

// A blocking thread at the other end of a socket pair sends back what it gets.
class Echo {
 public:
  Echo() {
    std::array<int, 2> ends{};
    if (::socketpair(AF_UNIX, SOCK_STREAM, 0, ends.data()) != 0) throw std::runtime_error("socketpair failed");
    mine_ = ends[0];
    thread_ = std::jthread([end = ends[1]] {
      Message message{};
      while (::recv(end, message.data(), message.size(), MSG_WAITALL) == static_cast<ssize_t>(message.size()))
        if (::send(end, message.data(), message.size(), 0) < 0) break;
      ::close(end);
    });
  }
  Echo(const Echo&) = delete;
  Echo& operator=(const Echo&) = delete;
  ~Echo() {
    ::shutdown(mine_, SHUT_RDWR);
    if (close_) {
      close_();
    } else {
      ::close(mine_);
    }
  }

  template <class Way>
  int call(Way& way) {
    if (!close_) {
      auto socket = std::make_shared<std::optional<Socket>>();
      auto open = [&]() -> asio::awaitable<int> {
        socket->emplace(way.executor(), asio::local::stream_protocol(), mine_);
        co_return 1;
      };
      way.call(open);
      socket_ = &**socket;
      close_ = [socket, &way] {
        auto close = [&]() -> asio::awaitable<int> {
          socket->reset();
          co_return 1;
        };
        way.call(close);
      };
    }
    return way.call([&] { return exchange(*socket_); });
  }

  int call(Blocking&) {
    Message message{};
    if (::send(mine_, message.data(), message.size(), 0) < 0) return 0;
    return ::recv(mine_, message.data(), message.size(), MSG_WAITALL) == static_cast<ssize_t>(message.size()) ? 1 : 0;
  }

 private:
  int mine_ = -1;
  Socket* socket_ = nullptr;
  std::function<void()> close_;
  std::jthread thread_;
};

// ---------------------------------------------------------------------------------------------------------------------
// The measurement

struct Usage {
  double cpu_us;
  long switches;
  long allocations;
  Clock::time_point time;
};

double microseconds(const timeval& t) { return static_cast<double>(t.tv_sec) * 1e6 + static_cast<double>(t.tv_usec); }

Usage usage() {
  rusage u{};
  getrusage(RUSAGE_SELF, &u);
  return {microseconds(u.ru_utime) + microseconds(u.ru_stime), u.ru_nvcsw + u.ru_nivcsw, allocations.load(),
          Clock::now()};
}

// Of the whole process, since all of it is at work on the calls.
void report(benchmark::State& state, const Usage& before, double calls) {
  const Usage now = usage();
  state.counters["us"] = std::chrono::duration<double, std::micro>(now.time - before.time).count() / calls;
  state.counters["cpu_us"] = (now.cpu_us - before.cpu_us) / calls;
  state.counters["switches"] = static_cast<double>(now.switches - before.switches) / calls;
  state.counters["allocations"] = static_cast<double>(now.allocations - before.allocations) / calls;
}

template <class Way>
std::optional<Way> way;

template <class Way, class What>
void measure(benchmark::State& state) {
  What what;
  // What only the first calls do is not measured: Asio's caches fill, and the bridge learns whether spinning pays.
  for (int i = 0; i < 300; ++i) what.call(*way<Way>);
  std::optional<Usage> before;
  for (auto _ : state) {
    if (!before && state.thread_index() == 0) before = usage();
    if (what.call(*way<Way>) != 1) state.SkipWithError("a call failed");
  }
  if (state.thread_index() == 0)
    report(state, *before, static_cast<double>(state.iterations()) * static_cast<double>(state.threads()));
}

template <class Way, class What>
void add(const std::string& what, const std::string& name, std::initializer_list<int> callers) {
  const std::string full_name = what + "/" + name;
  for (const int n : callers) {
    benchmark::RegisterBenchmark(full_name.c_str(), measure<Way, What>)
        ->Threads(n)
        ->UseRealTime()
        ->Setup([](const benchmark::State&) { way<Way>.emplace(); })
        ->Teardown([](const benchmark::State&) { way<Way>.reset(); });
  }
}

// What two thread switches cost: the floors below which no call gets that leaves its thread.
class PingPong {
 public:
  explicit PingPong(bool spin) : spin_(spin) {
    thread_ = std::jthread([this] {
      for (int round = 1; await(2 * round - 1); ++round) say(2 * round);
    });
  }
  PingPong(const PingPong&) = delete;
  PingPong& operator=(const PingPong&) = delete;
  ~PingPong() { say(end); }

  void call() {
    say(++said_);
    await(++said_);
  }

 private:
  static constexpr int end = -1;

  void say(int value) {
    word_.store(value);
    if (!spin_) ::syscall(SYS_futex, &word_, FUTEX_WAKE_PRIVATE, 1, nullptr, nullptr, 0);
  }
  bool await(int value) {
    for (int now = word_.load(); now != value; now = word_.load()) {
      if (now == end) return false;
      if (spin_) continue;
      ::syscall(SYS_futex, &word_, FUTEX_WAIT_PRIVATE, now, nullptr, nullptr, 0);
    }
    return true;
  }

  bool spin_;
  int said_ = 0;
  std::atomic<int> word_{0};
  std::jthread thread_;
};

void ping_pong(benchmark::State& state, bool spin) {
  PingPong pair(spin);
  for (int i = 0; i < 100; ++i) pair.call();
  const Usage before = usage();
  for (auto _ : state) pair.call();
  report(state, before, static_cast<double>(state.iterations()));
}

void submit_many(benchmark::State& state) {
  constexpr int many = 10'000;
  const runtime_bridge::RuntimeBridge bridge;
  std::vector<runtime_bridge::JoinHandle<int>> handles;
  handles.reserve(many);
  const Usage before = usage();
  for (auto _ : state) {
    for (int i = 0; i < many; ++i) handles.push_back(bridge.submit([] { return one(); }));
    for (auto& handle : handles)
      if (!handle.join()) state.SkipWithError("a call failed");
    handles.clear();
  }
  report(state, before, static_cast<double>(state.iterations()) * many);
}

template <class What>
void add_ways(const std::string& what, std::initializer_list<int> callers) {
  add<Bridge, What>(what, "bridge", callers);
  add<NoSpinning, What>(what, "no_spinning", callers);
  add<UseFuture, What>(what, "use_future", callers);
  add<PostAndPromise, What>(what, "post_and_promise", callers);
}

}  // namespace

int main(int argc, char** argv) {
  add_ways<Callable>("callable", {1, 2, 8, 64});
  add_ways<Awaitable>("awaitable", {1, 8});
  add<Bridge, Lean>("lean", "bridge", {1, 8});
  add_ways<Suspends>("suspends", {1, 8});
  add<WithReactor<Bridge>, Callable>("reactor", "bridge", {1, 2, 8, 64});
  add<WithReactor<UseFuture>, Callable>("reactor", "use_future", {1, 2, 8, 64});
  add_ways<Echo>("echo", {1, 8});
  add<Blocking, Echo>("echo", "blocking", {1, 8});
  add_ways<Timer>("timer", {1, 8});
  add<Blocking, Timer>("timer", "blocking", {1, 8});
  benchmark::RegisterBenchmark("floor/futex", ping_pong, false)->UseRealTime();
  benchmark::RegisterBenchmark("floor/spinning", ping_pong, true)->UseRealTime();
  benchmark::RegisterBenchmark("submit/bridge", submit_many)->UseRealTime();

  using Call = runtime_bridge::detail::TaskCall<int>;
  benchmark::AddCustomContext("bridge_bytes", std::to_string(sizeof(runtime_bridge::RuntimeBridge)));
  benchmark::AddCustomContext("worker_bytes", std::to_string(sizeof(runtime_bridge::detail::Worker)));
  benchmark::AddCustomContext("call_bytes", std::to_string(sizeof(Call)));
  benchmark::AddCustomContext("asio", std::to_string(ASIO_VERSION));
#ifdef __clang__
  benchmark::AddCustomContext("compiler", __VERSION__);
#else
  benchmark::AddCustomContext("compiler", "g++ " __VERSION__);
#endif

  benchmark::Initialize(&argc, argv);
  if (benchmark::ReportUnrecognizedArguments(argc, argv)) return 2;
  benchmark::RunSpecifiedBenchmarks();
}
