// SPDX-License-Identifier: Apache-2.0
//
// Shared by the example programs: options, checks, threads and measuring.

#ifndef RUNTIME_BRIDGE_EXAMPLES_PROGRAM_HPP
#define RUNTIME_BRIDGE_EXAMPLES_PROGRAM_HPP

#include <pthread.h>
#include <sched.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstddef>
#include <exception>
#include <future>
#include <iostream>
#include <latch>
#include <stdexcept>
#include <stop_token>
#include <string>
#include <thread>
#include <type_traits>
#include <utility>
#include <vector>

#include "support/backends.hpp"

inline void check(bool condition, const std::string& otherwise) {
  if (!condition) throw std::runtime_error(otherwise);
}

/// Returns the value, or throws the error.
template <class T>
T need(Outcome<T> outcome) {
  if (!outcome) throw std::runtime_error(outcome.error().message);
  if constexpr (!std::is_void_v<T>) return *std::move(outcome);
}

/// Checks the outcome of the first call: if the server is unavailable, the error says how to start one. `kind` is the
/// argument of examples/serve.
template <class T>
void need_server(const Outcome<T>& outcome, const std::string& server, const std::string& kind) {
  if (outcome || outcome.error().kind != BackendError::Unavailable) return void(need(outcome));
  throw std::runtime_error("no " + server + ": " + outcome.error().message + "; start one with: examples/serve " +
                           kind);
}

/// The option of the programs that use PostgreSQL.
inline void add_connect_option(CLI::App& app, std::string& conninfo) {
  app.add_option("--connect", conninfo, "libpq connection string; defaults come from PGHOST, PGPORT, ...");
}

/// Calls the function with 0, 1, ..., each in a thread of its own, all at the same moment. Returns the results.
template <class Function>
auto from_threads(int count, Function function) {
  using Value = std::invoke_result_t<Function&, int>;
  std::latch start(count);
  std::vector<std::future<Value>> threads;
  threads.reserve(static_cast<std::size_t>(count));
  for (int i = 0; i < count; ++i) {
    try {
      threads.push_back(std::async(std::launch::async, [&, i] {
        start.arrive_and_wait();
        return function(i);
      }));
    } catch (...) {
      start.count_down(count - i);  // release the threads that already wait
      throw;
    }
  }
  if constexpr (std::is_void_v<Value>) {
    for (auto& thread : threads) thread.get();
  } else {
    std::vector<Value> values;
    for (auto& thread : threads) values.push_back(thread.get());
    return values;
  }
}

/// Repeats the call until it succeeds, for up to a minute. It may have taken effect each time.
template <class Function>
auto until_it_succeeds(std::atomic<int>& errors, Function function) {
  using namespace std::chrono_literals;
  const auto deadline = std::chrono::steady_clock::now() + 60s;
  for (auto pause = 5ms;; pause = std::min(2 * pause, 200ms)) {
    auto outcome = function();
    if (outcome) return *std::move(outcome);
    ++errors;
    check(outcome.error().kind != BackendError::Refused && std::chrono::steady_clock::now() < deadline,
          outcome.error().message);
    std::this_thread::sleep_for(pause);
  }
}

inline std::chrono::milliseconds since(std::chrono::steady_clock::time_point start) {
  return std::chrono::duration_cast<std::chrono::milliseconds>(std::chrono::steady_clock::now() - start);
}

/// Keeps all processors awake, with threads that give way to any other. A processor that sleeps takes 20 to 50 us to
/// wake up, which says more about the machine than about a client.
class SpinningThreads {
 public:
  SpinningThreads() {
    for (unsigned i = 0; i < std::thread::hardware_concurrency(); ++i) {
      threads_.emplace_back([]([[maybe_unused]] const std::stop_token& stop) {
#ifdef SCHED_IDLE
        const sched_param none{};
        if (pthread_setschedparam(pthread_self(), SCHED_IDLE, &none) != 0) return;
        while (!stop.stop_requested()) {
        }
#endif
      });
    }
  }

 private:
  std::vector<std::jthread> threads_;
};

inline double median(std::vector<double> values) {
  const auto middle = values.begin() + static_cast<std::ptrdiff_t>(values.size() / 2);
  std::ranges::nth_element(values, middle);
  return *middle;
}

/// The body of main(). The function adds its options to the app, and calls its `parse`. Prints an error on one line,
/// and returns 2 if the options are wrong, 1 after any other exception.
template <class Function>
int run_program(const std::string& name, Function function) {
  try {
    CLI::App app("", name);
    app.failure_message([](const CLI::App* self, const CLI::Error& e) {
      return self->get_name() + ": " + e.what() + "; see --help\n";
    });
    try {
      function(app);
    } catch (const CLI::ParseError& e) {
      return app.exit(e) == 0 ? 0 : 2;  // zero: it has printed the help
    }
    return 0;
  } catch (const std::exception& e) {
    std::cerr << name << ": " << e.what() << '\n';
    return 1;
  }
}

#endif  // RUNTIME_BRIDGE_EXAMPLES_PROGRAM_HPP
