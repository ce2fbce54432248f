// SPDX-License-Identifier: Apache-2.0
//
// A synchronous cache over Boost.Redis, whose connections are asynchronous and serve many callers at once.

#include <runtime_bridge.hpp>

#include <atomic>
#include <boost/redis/connection.hpp>
#include <chrono>
#include <cstring>
#include <iostream>
#include <memory>
#include <optional>
#include <random>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "support/asio.hpp"
#include "support/backends.hpp"
#include "support/program.hpp"
#include "support/redis.hpp"
#include "support/ref_checks.hpp"
#include "support/shared_client.hpp"

namespace {

using namespace std::chrono_literals;
using asio::awaitable;
using std::chrono::milliseconds;
using std::chrono::steady_clock;
namespace redis = boost::redis;

struct Entry {
  std::optional<std::string> value;
  milliseconds lifetime;  // negative: without an end
  long long reads;
};

class RedisCache final : public RefBackend {
 public:
  RedisCache(const redis::config& config, milliseconds timeout) : client_(timeout, config) {}

  Outcome<std::optional<std::string>> get(const std::string& name) override {
    return ask<std::optional<std::string>>("GET", name);
  }
  Outcome<bool> set(const std::string& name, const std::string& value) override {
    return is("OK", ask<std::string>("SET", name, value));
  }
  // One command: a connection that others use, too, cannot WATCH.
  Outcome<bool> compare_and_set(const std::string& name, const std::optional<std::string>& expected,
                                const std::string& value) override {
    if (!expected) return is("OK", ask<std::optional<std::string>>("SET", name, value, "NX"));
    const char* const script =
        "if redis.call('get', KEYS[1]) ~= ARGV[1] then return 0 end redis.call('set', KEYS[1], ARGV[2]) return 1";
    return is(1, ask<int>("EVAL", script, 1, name, *expected, value));
  }
  Outcome<bool> remove(const std::string& name) override { return is(1, ask<int>("DEL", name)); }

  /// Three commands in one request.
  Outcome<Entry> read(const std::string& name) {
    redis::request request;
    request.push("GET", name);
    request.push("PTTL", name);
    request.push("INCR", name + ":reads");
    return client_.call([&](RedisClient& client) -> awaitable<Entry> {
      auto answers = co_await client.ask<redis::response<std::optional<std::string>, long long, long long>>(request);
      auto& [value, lifetime, reads] = answers;
      co_return Entry{value_of(value), milliseconds(value_of(lifetime)), value_of(reads)};
    });
  }

  Outcome<int> push(const std::string& queue, const std::string& value) { return ask<int>("RPUSH", queue, value); }
  /// Waits for a value, for so long; zero is for ever, or until the timeout.
  Outcome<std::optional<std::string>> pop(const std::string& queue, milliseconds wait) {
    redis::request request;
    request.push("BLPOP", queue, std::to_string(static_cast<double>(wait.count()) / 1000));
    using Popped = std::optional<std::vector<std::string>>;  // the queue's name and the value
    return client_.call([&](RedisClient& client) -> awaitable<std::optional<std::string>> {
      auto answers = co_await client.ask_blocking<redis::response<Popped>>(request);
      Popped popped = value_of(std::get<0>(answers));
      if (!popped) co_return std::nullopt;
      co_return std::move(popped->at(1));
    });
  }
  Outcome<bool> set_for(milliseconds lifetime, const std::string& name, const std::string& value) {
    return is("OK", ask<std::string>("SET", name, value, "PX", lifetime.count()));
  }
  // Not KEYS, during which the server serves nobody else.
  Outcome<std::vector<std::string>> list(const std::string& prefix) override {
    std::string pattern;
    for (const char c : prefix) (std::strchr("*?[]\\", c) ? pattern += '\\' : pattern) += c;
    return client_.call([&](RedisClient& client) -> awaitable<std::vector<std::string>> {
      std::set<std::string> names;  // one may come twice
      std::string cursor = "0";
      do {
        redis::request request;
        request.push("SCAN", cursor, "MATCH", pattern + "*", "COUNT", 1000);
        auto answer = co_await client.ask<redis::generic_response>(request);
        for (const auto& node : value_of(answer)) {  // [cursor, [name, ...]]
          if (node.depth == 1 && node.data_type == redis::resp3::type::blob_string) cursor = node.value;
          if (node.depth == 2) names.insert(node.value);
        }
      } while (cursor != "0");
      co_return std::vector<std::string>(names.begin(), names.end());
    });
  }
  void set_timeout(milliseconds timeout) { client_.set_timeout(timeout); }

 private:
  /// One command, and its answer.
  template <class T, class... Ts>
  Outcome<T> ask(const char* command, const Ts&... arguments) {
    redis::request request;
    request.push(command, arguments...);
    return client_.call([&](RedisClient& client) -> awaitable<T> {
      auto answers = co_await client.ask<redis::response<T>>(request);
      co_return value_of(std::get<0>(answers));
    });
  }
  template <class T, class U>
  static Outcome<bool> is(const T& expected, const Outcome<U>& answer) {
    return answer ? Outcome<bool>(*answer == expected) : Failure(answer.error());
  }

  SharedClient<RedisClient, describe_redis_error> client_;
};

// ---------------------------------------------------------------------------------------------------------------------
// The program

void pipeline(RedisCache& cache, const std::string& name) {
  need(cache.set_for(60s, name, "v"));
  need(cache.read(name));
  const Entry entry = need(cache.read(name));
  std::cout << "one request, three commands: " << entry.value.value_or("nothing") << ", " << entry.lifetime / 1s
            << " s to live, read " << entry.reads << " times\n";
  const Outcome<int> refused = cache.push(name, "w");
  check(!refused && refused.error().kind == BackendError::Refused, "a push to a text was not refused");
  std::cout << "push to a text: " << refused.error().message << '\n';
  need(cache.remove(name + ":reads"));
  need(cache.remove(name));
}

void blocking_pops(RedisCache& cache, const std::string& queue) {
  constexpr int callers = 4;
  std::atomic<int> ended{0};
  auto start = steady_clock::now();
  from_threads(callers + 1, [&](int caller) {
    if (caller < callers) {
      check(!need(cache.pop(queue, 250ms)), "there was something to pop");
      ++ended;
    } else {
      need(cache.get(queue));
      check(ended == 0, "a call waited for those that block");
    }
  });
  const auto elapsed = since(start).count();
  std::cout << "pop from " << callers << " callers, which waits for 250 ms: " << elapsed << " ms\n";
  check(elapsed < callers * 250 / 2, "the calls did not run concurrently");

  RedisCache hurried = cache;
  hurried.set_timeout(250ms);
  start = steady_clock::now();
  const auto slow = hurried.pop(queue, 0ms);
  check(!slow && slow.error().kind == BackendError::TimedOut, "the deadline was not kept");
  std::cout << "deadline of 250 ms: TimedOut after " << since(start).count() << " ms";
  need(cache.push(queue, "job"));
  std::cout << "; what is pushed then is popped by the next call: " << need(cache.pop(queue, 250ms)).value_or("nothing")
            << '\n';
}

void run(CLI::App& app, int count, char** arguments) {
  app.description(
      "A cache in Redis: sets, compares, lists and removes entries, from racing threads, too, and waits for others.\n"
      "To start a server for it: examples/serve redis");
  redis::config config;
  std::string command;
  app.add_option("--host", config.addr.host, "the server's host")->envname("REDIS_HOST")->capture_default_str();
  app.add_option("--port", config.addr.port, "its port")->envname("REDIS_PORT")->capture_default_str();
  app.add_option("--user", config.username, "the user's name")->envname("REDIS_USER")->capture_default_str();
  app.add_option("--password", config.password, "the user's password")->envname("REDIS_PASSWORD");
  app.add_option("--restart", command, "a command to run halfway: \"examples/serve redis --restart\"");
  app.parse(count, arguments);
  RedisCache cache(config, 10s);
  // Each run has names of its own, because runs may overlap.
  const std::string folder = std::to_string(std::random_device()()) + "/";
  need_server(cache.get(folder), "Redis server", "redis");
  five_operations(cache, folder);
  race(cache, folder + "race");
  pipeline(cache, folder + "entry");
  blocking_pops(cache, folder + "queue");
  if (!command.empty()) restart_halfway(cache, folder, command);
}

}  // namespace

int main(int argc, char** argv) {
  return run_program("redis_cache", [&](CLI::App& app) { run(app, argc, argv); });
}
