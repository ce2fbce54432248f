// SPDX-License-Identifier: Apache-2.0
//
// What the example programs have in common, beside their settings.

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

/// The value, or the error as an exception.
template <class T>
T need(Outcome<T> outcome) {
  if (!outcome) throw std::runtime_error(outcome.error().message);
  if constexpr (!std::is_void_v<T>) return *std::move(outcome);
}

/// For the first call. `kind` is what examples/serve calls the server.
template <class T>
void need_server(const Outcome<T>& outcome, const std::string& server, const std::string& kind) {
  if (outcome || outcome.error().kind != BackendError::Unavailable) return void(need(outcome));
  throw std::runtime_error("no " + server + ": " + outcome.error().message + "; start one with: examples/serve " +
                           kind);
}

inline const Setting connect_setting{"connect", "CONNINFO",
                                     "libpq's connection string; what it leaves out comes from PGHOST, PGPORT, ..."};

/// Calls the function with 0, 1, ... from as many threads at the same moment, and returns their results.
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
      start.count_down(count - i);  // the others must not wait for this one
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

/// The whole of main(): what is wrong becomes one sentence, and 2 for a mistake in the arguments, else 1.
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
