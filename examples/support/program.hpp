// SPDX-License-Identifier: Apache-2.0
//
// Shared by the example programs, apart from their settings.

#ifndef RUNTIME_BRIDGE_EXAMPLES_PROGRAM_HPP
#define RUNTIME_BRIDGE_EXAMPLES_PROGRAM_HPP

#include <cstddef>
#include <exception>
#include <future>
#include <iostream>
#include <latch>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "support/backends.hpp"
#include "support/command_line.hpp"

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

inline const Setting connect_setting{"connect", "CONNINFO",
                                     "libpq connection string; defaults come from PGHOST, PGPORT, ..."};

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

/// The body of main(). Prints an exception's text on one line, and returns 2 for a UsageError, 1 for any other
/// exception.
template <class Function>
int run_program(const std::string& name, Function function) {
  try {
    function();
    return 0;
  } catch (const UsageError& e) {
    std::cerr << name << ": " << e.what() << '\n';
    return 2;
  } catch (const std::exception& e) {
    std::cerr << name << ": " << e.what() << '\n';
    return 1;
  }
}

#endif  // RUNTIME_BRIDGE_EXAMPLES_PROGRAM_HPP
