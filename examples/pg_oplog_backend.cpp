// SPDX-License-Identifier: Apache-2.0
//
// A synchronous log of operations over asynchronous PostgreSQL. Each batch is in the log exactly once and in order,
// even if the server is killed.

#include <algorithm>
#include <array>
#include <asio/awaitable.hpp>
#include <atomic>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <iostream>
#include <map>
#include <memory>
#include <optional>
#include <random>
#include <string>
#include <thread>
#include <type_traits>
#include <utility>
#include <vector>

#include "support/backends.hpp"
#include "support/pg.hpp"
#include "support/pg_backend.hpp"
#include "support/program.hpp"

namespace {

using namespace std::chrono_literals;
using asio::awaitable;
using std::chrono::steady_clock;

/// The texts as a PostgreSQL array literal.
std::string array_of(const std::vector<std::string>& texts) {
  std::string array = "{";
  for (const std::string& text : texts) {
    array += array.size() == 1 ? "\"" : ",\"";
    for (const char c : text) {
      if (c == '"' || c == '\\') array += '\\';
      array += c;
    }
    array += '"';
  }
  return array + '}';
}

/// Every change is one transaction on one connection, which first locks the log's row in `oplog_head`. So numbers
/// follow commit order, and the number of a failed transaction is used again. A caller that has a connection never
/// waits for another one.
class PgOpLogBackend final : public OpLogBackend {
 public:
  PgOpLogBackend(PgClient client, std::string name) : client_(std::move(client)), name_(std::move(name)) {}

  Outcome<std::int64_t> append(const std::vector<std::string>& operations, const std::string& transaction_id) override {
    return client_.transaction([&](pg::Connection& connection) -> awaitable<std::int64_t> {
      // Look up the id after taking the lock: a statement sees only what was committed before it began.
      co_await lock(connection);
      const auto there = co_await connection.query(
          "select number from runtime_bridge.oplog where log = $1 and transaction_id = $2", name_, transaction_id);
      if (there.rows() != 0) co_return there.get<std::int64_t>(0, 0);
      co_await connection.query("update runtime_bridge.oplog set mark = 'discarded' where log = $1 and mark = 'undone'",
                                name_);
      const auto appended = co_await connection.query(
          "with head as (update runtime_bridge.oplog_head set last = last + 1 where log = $1 returning last) "
          "insert into runtime_bridge.oplog select $1, last, $2, $3, 'done' from head returning number",
          name_, transaction_id, array_of(operations));
      co_return appended.get<std::int64_t>(0, 0);
    });
  }

  Outcome<std::vector<Batch>> recent(int count) override {
    return client_.call([&](pg::Connection& connection) -> awaitable<std::vector<Batch>> {
      const auto rows = co_await connection.query(
          "select number, transaction_id, mark, operation "
          "from (select * from runtime_bridge.oplog where log = $1 order by number desc limit $2) as batch "
          "left join lateral unnest(operations) with ordinality as o (operation, position) on true "
          "order by number desc, position",
          name_, count);
      std::vector<Batch> batches;
      for (int row = 0; row < rows.rows(); ++row) {
        const auto number = rows.get<std::int64_t>(row, 0);
        if (batches.empty() || batches.back().number != number) {
          const auto mark = rows.get<std::string>(row, 2);
          batches.push_back({number,
                             rows.get<std::string>(row, 1),
                             {},
                             mark == "done"     ? Batch::Done
                             : mark == "undone" ? Batch::Undone
                                                : Batch::Discarded});
        }
        auto operation = rows.get<std::optional<std::string>>(row, 3);  // null: the batch is empty
        if (operation) batches.back().operations.push_back(*std::move(operation));
      }
      co_return batches;
    });
  }

  Outcome<std::optional<std::int64_t>> undo() override {
    return mark("undone", "select max(number) from runtime_bridge.oplog where log = $1 and mark = 'done'");
  }
  // The undone batches are the last ones of the log, apart from discarded ones, so the oldest of them was undone last.
  Outcome<std::optional<std::int64_t>> redo() override {
    return mark("done", "select min(number) from runtime_bridge.oplog where log = $1 and mark = 'undone'");
  }

  /// Creates the log, and the tables for all logs, if they do not exist.
  Outcome<bool> create() {
    const Outcome<bool> tables = client_.create(
        {"create table if not exists runtime_bridge.oplog_head (log text primary key, last bigint not null)",
         "create table if not exists runtime_bridge.oplog (log text not null references runtime_bridge.oplog_head "
         "on delete cascade, number bigint, transaction_id text not null, operations text[] not null, mark text not "
         "null check (mark in ('done', 'undone', 'discarded')), primary key (log, number), unique (log, "
         "transaction_id))",
         "create index if not exists oplog_mark on runtime_bridge.oplog (log, mark, number)"});
    return tables ? client_.run("insert into runtime_bridge.oplog_head values ($1, 0) on conflict do nothing", name_)
                  : tables;
  }
  Outcome<bool> drop() { return client_.run("delete from runtime_bridge.oplog_head where log = $1", name_); }

 private:
  awaitable<void> lock(pg::Connection& connection) const {
    const auto head =
        co_await connection.query("select from runtime_bridge.oplog_head where log = $1 for update", name_);
    if (head.rows() == 0) throw BackendException(BackendError::NotFound, "no such log: " + name_);
  }

  /// Marks the batch whose number the SQL query `choice` returns.
  Outcome<std::optional<std::int64_t>> mark(const std::string& as, const std::string& choice) {
    return client_.transaction([&](pg::Connection& connection) -> awaitable<std::optional<std::int64_t>> {
      co_await lock(connection);
      const auto marked = co_await connection.query(
          "update runtime_bridge.oplog set mark = $2 where log = $1 and number = (" + choice + ") returning number",
          name_, as);
      if (marked.rows() == 0) co_return std::nullopt;
      co_return marked.get<std::int64_t>(0, 0);
    });
  }

  PgClient client_;
  std::string name_;
};

// ---------------------------------------------------------------------------------------------------------------------
// The program

/// Appends from eight threads. If there is a command, one thread runs it halfway, and the others append until it is
/// done.
void many_callers(PgOpLogBackend log, const std::string& command) {
  constexpr int callers = 8, batches = 25;
  const std::string text = R"("quoted" \ text)";
  std::atomic<int> errors{0}, appended{0};
  std::atomic<bool> command_done{command.empty()};
  using Numbers = std::map<std::int64_t, std::string>;

  const auto append = [&](int caller) {
    Numbers acknowledged;
    for (int i = 0, after = 0; i < batches || after < 3; ++i) {
      if (command_done) ++after;
      const std::string id = std::to_string(caller) + "-" + std::to_string(i);
      const std::int64_t number = until_it_succeeds(errors, [&] { return log.append({id, text}, id); });
      check(acknowledged.empty() || number > acknowledged.rbegin()->first, "a later batch has a smaller number");
      acknowledged.emplace(number, id);
      if (++appended == callers * batches / 2 && !command.empty()) {
        const int status = std::system(command.c_str());
        command_done = true;
        check(status == 0, "command failed: " + command);
      }
    }
    return acknowledged;
  };
  Numbers acknowledged;
  for (const Numbers& numbers : from_threads(callers, append)) acknowledged.insert(numbers.begin(), numbers.end());
  check(static_cast<int>(acknowledged.size()) == appended, "two batches have the same number");

  const std::vector<Batch> found = need(log.recent(1 << 30));
  for (std::int64_t number = std::ssize(found); const Batch& batch : found) {
    check(batch.number == number--, "the log has a gap");
    check(acknowledged[batch.number] == batch.transaction_id, "the log has a batch that was not appended");
    check(batch.operations == std::vector{batch.transaction_id, text}, "a batch has changed");
  }
  check(found.size() == acknowledged.size(), "an acknowledged batch is lost");
  std::cout << callers << " callers, 1 connection: " << acknowledged.size() << " batches acknowledged, " << found.size()
            << " found, no duplicates\n";
  if (!command.empty()) std::cout << "calls that failed and were retried: " << errors << '\n';
  check(command.empty() || errors > 0, "no call noticed the restart");
}

void undo_and_redo(PgOpLogBackend log) {
  const auto show = [&](const char* what) {
    std::cout << what << ':';
    for (const Batch& batch : need(log.recent(10))) {
      static constexpr std::array marks{"", " (undone)", " (discarded)"};
      std::cout << ' ' << batch.operations.at(0) << marks.at(batch.mark);
    }
    std::cout << '\n';
  };
  check(need(log.append({"a"}, "1")) == 1 && need(log.append({"b"}, "2")) == 2, "the first numbers are not 1 and 2");
  check(need(log.append({"a"}, "1")) == 1, "an id has more than one batch");
  show("append a, b, and a again");
  check(need(log.undo()) == 2 && need(log.undo()) == 1 && !need(log.undo()), "undo chose the wrong batch");
  show("undo all");
  check(need(log.redo()) == 1, "redo chose the wrong batch");
  show("redo");
  check(need(log.append({"c"}, "3")) == 3 && !need(log.redo()), "there was something to redo");
  show("append c");
}

void run(CLI::App& app, int count, char** arguments) {
  app.description(
      "Keeps logs of operations in PostgreSQL: appends from eight threads over one connection, undoes and redoes.\n"
      "To start a server for it: examples/serve postgres");
  pg::Settings settings;
  add_connect_option(app, settings.conninfo);
  std::string command;
  app.add_option("--restart", command, "a command to run halfway: \"examples/serve postgres --restart\"");
  app.parse(count, arguments);
  const PgClient client(settings, 1, 10s);
  // Each run has logs of its own, because runs may overlap.
  const std::string name = std::to_string(std::random_device()());
  for (const bool many : {false, true}) {
    PgOpLogBackend log(client, name + (many ? "-many" : "-undo"));
    need_server(log.create(), "PostgreSQL server", "postgres");
    if (!many) undo_and_redo(log);
    if (many) many_callers(log, command);
    need(log.drop());
  }
}

}  // namespace

int main(int argc, char** argv) {
  return run_program("pg_oplog_backend", [&](CLI::App& app) { run(app, argc, argv); });
}
