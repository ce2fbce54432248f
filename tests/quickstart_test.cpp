// SPDX-License-Identifier: Apache-2.0
//
// The client of examples/quickstart.cpp, against its server.

// NOLINTBEGIN(bugprone-suspicious-include,readability-identifier-naming): the program is one file, with a main().
#define main quickstart_main
#include "quickstart.cpp"
#undef main
// NOLINTEND(bugprone-suspicious-include,readability-identifier-naming)

#include <string>

#include "support.hpp"

TEST_CASE("quickstart: its client survives a server that closes idle connections") {
  // It closes a connection after each request, so some are idle, and closed, whenever a call starts.
  const kv::Server server(1);
  RemoteStore store(server.endpoint());
  std::atomic<int> wrong{0};
  std::array<std::future<void>, 4> threads;
  for (std::size_t t = 0; t < threads.size(); ++t) {
    threads.at(t) = std::async(std::launch::async, [&, t] {
      for (int i = 0; i < 50; ++i) {
        const std::string key = std::to_string(t) + " " + std::to_string(i);
        store.put(key, key);
        if (store.get(key) != key) ++wrong;
      }
    });
  }
  for (auto& thread : threads) thread.get();
  CHECK(wrong == 0);
}

TEST_CASE("quickstart: what the server refuses is an error, and the next call works") {
  const kv::Server server;
  RemoteStore store(server.endpoint());
  CHECK_THROWS_AS(store.put(std::string(kv::max_key + 1, 'k'), ""), kv::ProtocolError);
  CHECK_THROWS_AS(store.get("absent"), std::out_of_range);
  store.put("a", std::string(100'000, 'v'));
  CHECK(store.get("a").size() == 100'000);
}

TEST_CASE("quickstart: no server is an error") {
  tcp::endpoint closed;
  {
    const kv::Server server;
    closed = server.endpoint();
  }
  RemoteStore store(closed);
  CHECK_THROWS_AS(store.get("a"), std::system_error);
}
