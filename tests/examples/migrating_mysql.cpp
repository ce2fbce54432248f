// SPDX-License-Identifier: Apache-2.0
//
// Compiles and runs the code of docs/migrating.md for Boost.MySQL, with the server that the environment names.

#include <runtime_bridge.hpp>
#include <runtime_bridge/hosted.hpp>

#include <boost/asio/any_io_executor.hpp>
#include <boost/asio/awaitable.hpp>
#include <boost/asio/detached.hpp>
#include <boost/asio/redirect_error.hpp>
#include <boost/asio/use_awaitable.hpp>
#include <boost/mysql/any_connection.hpp>
#include <boost/mysql/connection_pool.hpp>
#include <boost/mysql/diagnostics.hpp>
#include <boost/mysql/error_code.hpp>
#include <boost/mysql/error_with_diagnostics.hpp>
#include <boost/mysql/is_fatal_error.hpp>
#include <boost/mysql/results.hpp>
#include <boost/mysql/throw_on_error.hpp>
#include <boost/mysql/with_params.hpp>
#include <chrono>
#include <cstdlib>
#include <iostream>
#include <string>
#include <utility>

namespace asio = boost::asio;
namespace mysql = boost::mysql;
using namespace std::chrono_literals;
using runtime_bridge::BridgeError;

namespace {

const char* variable(const char* name) {
  const char* value = std::getenv(name);
  return value == nullptr ? "" : value;
}

template <class Parameters>
Parameters parameters_of() {
  Parameters parameters;
  parameters.server_address.emplace_host_and_port(variable("MYSQL_HOST"),
                                                  static_cast<unsigned short>(std::stoi(variable("MYSQL_TCP_PORT"))));
  parameters.username = variable("MYSQL_USER");
  parameters.password = variable("MYSQL_PWD");
  parameters.database = variable("MYSQL_DATABASE");
  return parameters;
}

int failures = 0;
void check(bool right, const char* what) {
  if (right) return;
  std::cerr << "migrating_mysql: " << what << '\n';
  ++failures;
}

/// A pool that lives on the worker.
class Database {
 public:
  Database(asio::any_io_executor executor, mysql::pool_params parameters)
      : pool_(std::move(executor), std::move(parameters)) {
    pool_.async_run(asio::detached);
  }

  template <class Statement>
  asio::awaitable<mysql::results> execute(const Statement& statement) {
    mysql::pooled_connection lease = co_await pool_.async_get_connection();
    mysql::results found;
    mysql::diagnostics diagnostics, ignored;
    mysql::error_code error, ignored_too;
    co_await lease->async_execute(statement, found, diagnostics, asio::redirect_error(asio::use_awaitable, error));
    // After a deadline the answer is still to come. Without this, the next caller gets it.
    if (mysql::is_fatal_error(error)) lease->close(ignored_too, ignored);
    mysql::throw_on_error(error, diagnostics);
    co_return found;
  }

 private:
  mysql::connection_pool pool_;
};

std::string echo(const runtime_bridge::Hosted<Database>& database, const std::string& text) {
  const auto statement = mysql::with_params("select {}", text);  // named: it must outlive the task
  const auto found = unwrap(database.call_for(10s, [&](Database& d) { return d.execute(statement); }));
  return std::string(found.rows().at(0).at(0).as_string());
}

void use_pool() {
  auto parameters = parameters_of<mysql::pool_params>();
  parameters.max_size = 1;  // so that the call after a deadline needs the same connection
  runtime_bridge::RuntimeBridge bridge;
  runtime_bridge::Hosted<Database> database(bridge, std::move(parameters));
  check(echo(database, "a") == "a", "the wrong text");
  const auto late = database.call_for(250ms, [](Database& d) { return d.execute("do sleep(1)"); });
  check(!late && late.error() == BridgeError::TimedOut, "no TimedOut");
  check(echo(database, "b") == "b", "after a deadline: the wrong text");
  try {
    check(unwrap(database.call([](Database& d) { return d.execute("nonsense"); })).rows().empty(), "no error");
    check(false, "nonsense was not refused");
  } catch (const mysql::error_with_diagnostics& e) {
    check(!e.get_diagnostics().server_message().empty(), "the server's message is missing");
  }
}

void use_connection() {
  const auto parameters = parameters_of<mysql::connect_params>();
  runtime_bridge::RuntimeBridge bridge;
  mysql::results found;

  runtime_bridge::Hosted<mysql::any_connection> connection(bridge);
  unwrap(connection.call_for(10s, [&](mysql::any_connection& c) { return c.async_connect(parameters); }));
  unwrap(connection.call_for(10s, [&](mysql::any_connection& c) { return c.async_execute("select 7", found); }));

  check(found.rows().at(0).at(0) == mysql::field_view(7), "a connection: the wrong number");
  const auto refused = connection.call([&](mysql::any_connection& c) { return c.async_execute("nonsense", found); });
  try {
    unwrap(refused);
    check(false, "a connection: nonsense was not refused");
  } catch (const mysql::error_with_diagnostics& e) {
    check(!e.get_diagnostics().server_message().empty(), "a connection: the server's message is missing");
  }
}

}  // namespace

int main() {
  use_pool();
  use_connection();
  return failures == 0 ? 0 : 1;
}
