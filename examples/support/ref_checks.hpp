// SPDX-License-Identifier: Apache-2.0
//
// What the example programs do with a RefBackend, whatever server it uses. Each function checks what comes back.

#ifndef RUNTIME_BRIDGE_EXAMPLES_REF_CHECKS_HPP
#define RUNTIME_BRIDGE_EXAMPLES_REF_CHECKS_HPP

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstddef>
#include <cstdlib>
#include <iostream>
#include <optional>
#include <string>
#include <vector>

#include "support/backends.hpp"
#include "support/program.hpp"

inline const char* yes_or_no(bool yes) { return yes ? "yes" : "no"; }

/// `folder` is a prefix that no other run uses. The backend may be shared by many threads.
inline void five_operations(RefBackend& refs, const std::string& folder) {
  const std::string main = folder + "main", topic = folder + "topic";
  need(refs.set(main, "a1"));
  std::cout << "set main to a1, then get it: " << need(refs.get(main)).value_or("nothing") << '\n';
  check(need(refs.compare_and_set(main, "a1", "a1")), "the expected value was found, and was called different");
  const bool first = need(refs.compare_and_set(main, "a1", "b2")),
             second = need(refs.compare_and_set(main, "a1", "c3"));
  std::cout << "set it to b2 if it is a1: " << yes_or_no(first) << "; to c3 if it is a1: " << yes_or_no(second) << '\n';
  const bool made = need(refs.compare_and_set(topic, std::nullopt, "d4")),
             made_again = need(refs.compare_and_set(topic, std::nullopt, "e5"));
  std::cout << "set topic to d4 if it is absent: " << yes_or_no(made) << "; to e5: " << yes_or_no(made_again) << '\n';
  std::cout << "list:";
  for (const std::string& name : need(refs.list(folder))) std::cout << ' ' << name.substr(folder.size());
  const bool removed = need(refs.remove(topic)), removed_again = need(refs.remove(topic));
  std::cout << "\nremove topic: " << yes_or_no(removed) << "; again: " << yes_or_no(removed_again) << '\n';
  check(!need(refs.get(topic)), "what was removed is still there");
  need(refs.remove(main));
}

/// In every other round the reference does not exist at first.
inline void race(RefBackend& refs, const std::string& name) {
  constexpr int threads = 8, rounds = 60;
  std::optional<std::string> now;
  for (int round = 0; round < rounds; ++round) {
    const auto mine = [&](int thread) { return std::to_string(round) + " by " + std::to_string(thread); };
    const std::vector<bool> won =
        from_threads(threads, [&](int i) { return need(refs.compare_and_set(name, now, mine(i))); });
    check(std::ranges::count(won, true) == 1, "a round of the race does not have exactly one winner");
    now = need(refs.get(name));
    check(now == mine(static_cast<int>(std::ranges::find(won, true) - won.begin())), "the winner's value is not there");
    if (round % 2 == 1) check(need(refs.remove(name)), "the reference is gone"), now.reset();
  }
  need(refs.remove(name));
  std::cout << "race: " << threads << " threads, " << rounds << " rounds, exactly one winner in each\n";
}

/// `sleep` is a call that takes 250 ms at the server.
template <class Function>
void concurrent_callers(const std::string& name, Function sleep) {
  constexpr int callers = 4;
  const auto start = std::chrono::steady_clock::now();
  from_threads(callers, [&](int) { return need(sleep()); });
  const auto elapsed = since(start).count();
  std::cout << name << " from " << callers << " callers: " << elapsed << " ms\n";
  check(elapsed < callers * 250 / 2, "the calls did not run concurrently");
}

/// Eight threads set a reference each, again and again. One of them runs the command halfway, and the others go on
/// until it is done and calls succeed again.
inline void restart_halfway(RefBackend& refs, const std::string& folder, const std::string& command) {
  constexpr int callers = 8, values = 50;
  std::atomic<int> errors{0}, count{0};
  std::atomic<bool> command_done{false};
  const std::vector<std::string> last = from_threads(callers, [&](int caller) {
    const std::string name = folder + std::to_string(caller);
    std::string value;
    for (int i = 0, after = 0; i < values || after < 3; ++i) {
      if (command_done) ++after;
      value = std::to_string(i);
      until_it_succeeds(errors, [&] { return refs.set(name, value); });
      if (++count == callers * values / 2) {
        const int status = std::system(command.c_str());
        command_done = true;
        check(status == 0, "command failed: " + command);
      }
    }
    return value;
  });
  for (int caller = 0; caller < callers; ++caller) {
    const std::string name = folder + std::to_string(caller);
    check(need(refs.get(name)) == last[static_cast<std::size_t>(caller)], "an acknowledged value is lost");
    need(refs.remove(name));
  }
  check(errors > 0, "no call noticed the restart");
  std::cout << "restart: " << callers << " callers set " << count
            << " values; calls that failed and were retried: " << errors << '\n';
}

#endif  // RUNTIME_BRIDGE_EXAMPLES_REF_CHECKS_HPP
