// SPDX-License-Identifier: Apache-2.0
//
// A synchronous store of named references over asynchronous PostgreSQL.

#include <libpq-fe.h>

#include <asio/awaitable.hpp>
#include <chrono>
#include <cstddef>
#include <functional>
#include <iomanip>
#include <iostream>
#include <memory>
#include <optional>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "support/backends.hpp"
#include "support/pg.hpp"
#include "support/pg_backend.hpp"
#include "support/program.hpp"
#include "support/ref_checks.hpp"

namespace {

using namespace std::chrono_literals;
using asio::awaitable;
using std::chrono::steady_clock;
using Microseconds = std::chrono::duration<double, std::micro>;

class PgRefBackend final : public RefBackend {
 public:
  explicit PgRefBackend(PgClient client) : client_(std::move(client)) {}

  Outcome<std::optional<std::string>> get(const std::string& name) override {
    return client_.call([&](pg::Connection& connection) -> awaitable<std::optional<std::string>> {
      const auto found = co_await connection.query("select value from runtime_bridge.refs where name = $1", name);
      if (found.rows() == 0) co_return std::nullopt;
      co_return found.get<std::string>(0, 0);
    });
  }
  Outcome<bool> set(const std::string& name, const std::string& value) override {
    return client_.run("insert into runtime_bridge.refs values ($1, $2) on conflict (name) do update set value = $2",
                       name, value);
  }
  // One statement, so that no other client can change the value between the comparison and the update.
  Outcome<bool> compare_and_set(const std::string& name, const std::optional<std::string>& expected,
                                const std::string& value) override {
    return expected
               ? client_.run("update runtime_bridge.refs set value = $3 where name = $1 and value = $2", name,
                             *expected, value)
               : client_.run("insert into runtime_bridge.refs values ($1, $2) on conflict do nothing", name, value);
  }
  Outcome<bool> remove(const std::string& name) override {
    return client_.run("delete from runtime_bridge.refs where name = $1", name);
  }
  Outcome<std::vector<std::string>> list(const std::string& prefix) override {
    return client_.call([&](pg::Connection& connection) -> awaitable<std::vector<std::string>> {
      const auto found = co_await connection.query(
          "select name from runtime_bridge.refs where starts_with(name, $1) order by name", prefix);
      std::vector<std::string> names;
      for (int row = 0; row < found.rows(); ++row) names.push_back(found.get<std::string>(row, 0));
      co_return names;
    });
  }

  Outcome<bool> create_table() {
    return client_.create(
        {"create table if not exists runtime_bridge.refs (name text collate \"C\" primary key, value text not null)"});
  }

 private:
  PgClient client_;
};

// ---------------------------------------------------------------------------------------------------------------------
// The program

// Each round measures all ways, one after the other, so that other load on the machine affects all. A processor that
// sleeps takes 20 to 50 us to wake up, and the bridge wakes twice as many threads as libpq.
void benchmark(const PgClient& client, const std::string& conninfo, int callers, int rounds) {
  const char* const sql = "select $1::int8";
  using Samples = std::vector<double>;
  struct {
    Samples plain, bridged;
  } quiet, awake;
  const auto measure = [&](Samples& into, const std::function<std::function<void()>()>& connect) {
    const auto calls = [&](int) {
      const auto query = connect();
      query();  // warm up
      Samples samples;
      for (int i = 0; i < 1000 / callers; ++i) {
        const auto start = steady_clock::now();
        query();
        samples.push_back(Microseconds(steady_clock::now() - start).count());
      }
      return samples;
    };
    for (const Samples& samples : from_threads(callers, calls)) into.insert(into.end(), samples.begin(), samples.end());
  };
  const auto through_libpq = [&]() -> std::function<void()> {
    const std::shared_ptr<PGconn> connection(PQconnectdb(conninfo.c_str()), PQfinish);
    return [=] {
      const char* const value = "7";
      const pg::Result result(PQexecParams(connection.get(), sql, 1, nullptr, &value, nullptr, nullptr, 0));
      check(result.rows() == 1, "PQexecParams failed");
    };
  };
  const auto through_bridge = [&]() -> std::function<void()> { return [&] { need(client.run(sql, 7)); }; };
  for (int round = 0; round < rounds; ++round) {
    measure(quiet.plain, through_libpq);
    measure(quiet.bridged, through_bridge);
    const SpinningThreads spinning;
    measure(awake.plain, through_libpq);
    measure(awake.bridged, through_bridge);
  }
  const auto print = [&](const char* processors, auto& samples) {
    const double one = median(samples.plain), other = median(samples.bridged);
    std::cout << callers << (callers == 1 ? " caller" : " callers") << ", " << processors << ": PQexecParams " << one
              << " us, through the bridge " << other << " us, ratio " << other / one << '\n';
  };
  print("processors may sleep", quiet);
  print("processors kept awake", awake);
}

void run(CLI::App& app, int count, char** arguments) {
  app.description(
      "Keeps references in PostgreSQL: sets, compares, lists and removes them, from racing threads, too.\n"
      "To start a server for it: examples/serve postgres");
  pg::Settings settings;
  add_connect_option(app, settings.conninfo);
  bool measure = false;
  app.add_flag("--benchmark", measure, "compare a query through the bridge with PQexecParams: median times");
  int rounds = 11;
  app.add_option("--rounds", rounds, "how often to measure")->check(CLI::Range(1, 1000))->capture_default_str();
  app.parse(count, arguments);
  const PgClient client(settings, 8, 30s);
  PgRefBackend refs(client);
  need_server(refs.create_table(), "PostgreSQL server", "postgres");
  if (measure) {
    std::cout << std::fixed << std::setprecision(1);
    for (const int callers : {1, 8}) benchmark(client, settings.conninfo, callers, rounds);
    return;
  }
  // Each run has names of its own, because runs may overlap.
  const std::string folder = std::to_string(std::random_device()()) + "/";
  five_operations(refs, folder);
  race(refs, folder + "race");
  concurrent_callers("pg_sleep(0.25)", [&] { return client.run("select pg_sleep(0.25)"); });
}

}  // namespace

int main(int argc, char** argv) {
  return run_program("pg_ref_backend", [&](CLI::App& app) { run(app, argc, argv); });
}
