// SPDX-License-Identifier: Apache-2.0
//
// A synchronous store of named references over Boost.MySQL's asynchronous connection pool.

#include <runtime_bridge.hpp>

#include <boost/asio/cancel_after.hpp>
#include <boost/asio/redirect_error.hpp>
#include <boost/asio/use_awaitable.hpp>
#include <boost/mysql/any_connection.hpp>
#include <boost/mysql/connection_pool.hpp>
#include <boost/mysql/error_with_diagnostics.hpp>
#include <boost/mysql/is_fatal_error.hpp>
#include <boost/mysql/results.hpp>
#include <boost/mysql/throw_on_error.hpp>
#include <boost/mysql/with_params.hpp>
#include <chrono>
#include <cstddef>
#include <functional>
#include <iostream>
#include <memory>
#include <optional>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "support/asio.hpp"
#include "support/backends.hpp"
#include "support/program.hpp"
#include "support/ref_checks.hpp"
#include "support/shared_client.hpp"

namespace {

using namespace std::chrono_literals;
using asio::awaitable;
using std::chrono::steady_clock;
namespace mysql = boost::mysql;

struct Settings {
  std::string host = "127.0.0.1", user = "root", password, database;
  unsigned short port = mysql::default_port;
  std::size_t connections = 8;
};

/// Describes the exception that is being handled, or rethrows it. The server's own sentence says most, and the pool
/// says why it cannot connect.
BackendError describe_mysql_error() {
  try {
    throw;
  } catch (const mysql::error_with_diagnostics& e) {
    if (e.code() == asio::error::operation_aborted) throw;  // by the deadline, which the bridge reports
    std::string message(e.get_diagnostics().server_message());
    if (message.empty()) message = e.get_diagnostics().client_message();
    const bool lost = mysql::is_fatal_error(e.code()) || e.code() == mysql::client_errc::no_connection_available;
    return {lost ? BackendError::Unavailable : BackendError::Refused, message.empty() ? e.what() : message};
  }
}

/// A pool of connections, and the task that keeps them up.
class Pool {
 public:
  Pool(Bridge bridge, mysql::pool_params params)
      : bridge_(std::move(bridge)),
        pool_(std::make_shared<mysql::connection_pool>(bridge_->get_executor(), std::move(params))) {}
  Pool(const Pool&) = delete;
  Pool& operator=(const Pool&) = delete;
  ~Pool() { pool_->cancel(); }  // ends run()

  template <class Statement>
  awaitable<mysql::results> execute(const Statement& statement) {
    if (!std::exchange(running_, true)) bridge_->submit(run(bridge_, pool_)).detach();  // without it, nothing connects
    mysql::diagnostics diagnostics;
    mysql::error_code error;
    const auto token = asio::redirect_error(asio::use_awaitable, error);
    // The pool tries to connect for as long as it takes, so without this limit, a caller would not learn what fails.
    mysql::pooled_connection lease = co_await pool_->async_get_connection(diagnostics, asio::cancel_after(2s, token));
    if (is_cancelled(co_await asio::this_coro::cancellation_state)) error = asio::error::operation_aborted;
    mysql::throw_on_error(error, diagnostics);
    mysql::results results;
    co_await lease->async_execute(statement, results, diagnostics, token);
    if (error && mysql::is_fatal_error(error)) {
      // For example after a deadline. The answer is still to come, and the pool does not see that: without this, the
      // next caller gets it as the answer to another statement. A closed connection is replaced.
      mysql::error_code ignored;
      mysql::diagnostics ignored_too;
      lease->close(ignored, ignored_too);
    }
    mysql::throw_on_error(error, diagnostics);
    co_return results;
  }

 private:
  // It shares both, because it ends a moment after the destructor.
  static awaitable<void> run([[maybe_unused]] Bridge bridge, std::shared_ptr<mysql::connection_pool> pool) {
    co_await pool->async_run(asio::use_awaitable);
  }
  static bool is_cancelled(asio::cancellation_state state) {
    return state.cancelled() != asio::cancellation_type::none;
  }

  Bridge bridge_;
  std::shared_ptr<mysql::connection_pool> pool_;
  bool running_ = false;
};

class MysqlRefs final : public RefBackend {
 public:
  MysqlRefs(const Settings& settings, std::chrono::milliseconds timeout) : client_(timeout, parameters_of(settings)) {}

  Outcome<std::optional<std::string>> get(const std::string& name) override {
    const auto found = run("select value from refs where name = {}", name);
    if (!found) return Failure(found.error());
    if (found->rows().empty()) return std::nullopt;
    return text(found->rows().at(0).at(0));
  }
  Outcome<bool> set(const std::string& name, const std::string& value) override {
    const auto done = run("insert into refs values ({0}, {1}, 0) on duplicate key update value = {1}", name, value);
    return done ? Outcome<bool>(true) : Failure(done.error());
  }
  // One statement, so that no other client can change the value between the comparison and the update. The server
  // counts the rows that have really changed: hence `changes`. "insert ignore" would also ignore that a value is cut
  // off.
  Outcome<bool> compare_and_set(const std::string& name, const std::optional<std::string>& expected,
                                const std::string& value) override {
    return expected ? change("update refs set value = {2}, changes = changes + 1 where name = {0} and value = {1}",
                             name, *expected, value)
                    : change("insert into refs values ({0}, {1}, 0) on duplicate key update name = name", name, value);
  }
  Outcome<bool> remove(const std::string& name) override { return change("delete from refs where name = {}", name); }
  Outcome<std::vector<std::string>> list(const std::string& prefix) override {
    const auto found = run("select name from refs where left(name, length({0})) = {0} order by name", prefix);
    if (!found) return Failure(found.error());
    std::vector<std::string> names;
    for (const auto row : found->rows()) names.push_back(text(row.at(0)));
    return names;
  }

  /// Names and values are bytes: texts would be compared without the spaces at their ends.
  Outcome<bool> create_table() {
    return change(
        "create table if not exists refs (name varbinary(255) primary key, value mediumblob not null, "
        "changes bigint not null)");
  }
  Outcome<bool> sleep(double seconds) { return change("do sleep({})", seconds); }
  void set_timeout(std::chrono::milliseconds timeout) { client_.set_timeout(timeout); }

 private:
  static mysql::pool_params parameters_of(const Settings& settings) {
    mysql::pool_params parameters;
    parameters.server_address.emplace_host_and_port(settings.host, settings.port);
    parameters.username = settings.user;
    parameters.password = settings.password;
    parameters.database = settings.database;
    parameters.max_size = settings.connections;
    parameters.connect_timeout = 2s;
    parameters.retry_interval = 100ms;  // 30 s by default
    return parameters;
  }
  static std::string text(mysql::field_view field) {
    const auto bytes = field.as_blob();
    return {bytes.begin(), bytes.end()};
  }

  /// Runs one statement. The pool runs it on the worker, while the parameters stay here.
  template <class... Ts>
  Outcome<mysql::results> run(mysql::constant_string_view sql, const Ts&... parameters) const {
    const auto statement = mysql::with_params(sql, std::cref(parameters)...);
    return client_.call([&](Pool& pool) { return pool.execute(statement); });
  }
  /// True if it changed any rows.
  template <class... Ts>
  Outcome<bool> change(mysql::constant_string_view sql, const Ts&... parameters) const {
    const auto done = run(sql, parameters...);
    return done ? Outcome<bool>(done->affected_rows() != 0) : Failure(done.error());
  }

  SharedClient<Pool, describe_mysql_error> client_;
};

// ---------------------------------------------------------------------------------------------------------------------
// The program

/// With one connection, so that the next call shows whether it has been replaced. The statement ends soon after the
/// deadline, and its answer must not reach anyone.
void deadline(Settings settings, const std::string& name) {
  settings.connections = 1;
  MysqlRefs refs(settings, 30s), hurried = refs;
  hurried.set_timeout(250ms);
  need(refs.set(name, "kept"));
  const auto start = steady_clock::now();
  const Outcome<bool> slow = hurried.sleep(1);
  const auto elapsed = since(start).count();
  check(!slow && slow.error().kind == BackendError::TimedOut && elapsed < 900, "the deadline was not kept");
  const auto next = steady_clock::now();
  check(need(refs.get(name)) == "kept", "the call after a deadline got the answer of another one");
  std::cout << "deadline of 250 ms: TimedOut after " << elapsed << " ms; the next call took " << since(next).count()
            << " ms\n";
  need(refs.remove(name));
}

void run(CLI::App& app, int count, char** arguments) {
  app.description(
      "Keeps references in MySQL or MariaDB: sets, compares, lists and removes them, from racing threads, too.\n"
      "To start a server for it: examples/serve mariadb");
  Settings settings;
  std::string command;
  app.add_option("--host", settings.host, "the server's host")->envname("MYSQL_HOST")->capture_default_str();
  app.add_option("--port", settings.port, "its port")->envname("MYSQL_TCP_PORT")->capture_default_str();
  app.add_option("--user", settings.user, "the user's name")->envname("MYSQL_USER")->capture_default_str();
  app.add_option("--password", settings.password, "the user's password")->envname("MYSQL_PWD");
  app.add_option("--database", settings.database, "the database")->envname("MYSQL_DATABASE");
  app.add_option("--restart", command, "a command to run halfway: \"examples/serve mariadb --restart\"");
  app.parse(count, arguments);
  MysqlRefs refs(settings, 30s);
  need_server(refs.create_table(), "MySQL server", "mariadb");
  // Each run has names of its own, because runs may overlap.
  const std::string folder = std::to_string(std::random_device()()) + "/";
  five_operations(refs, folder);
  race(refs, folder + "race");
  concurrent_callers("sleep(0.25)", [&] { return MysqlRefs(refs).sleep(0.25); });
  const Outcome<bool> refused = refs.set(std::string(300, 'x'), "");
  check(!refused && refused.error().kind == BackendError::Refused, "a name that is too long was not refused");
  std::cout << "a name of 300 bytes: " << refused.error().message << '\n';
  deadline(settings, folder + "deadline");
  if (!command.empty()) restart_halfway(refs, folder, command);
}

}  // namespace

int main(int argc, char** argv) {
  return run_program("mysql_refs", [&](CLI::App& app) { run(app, argc, argv); });
}
