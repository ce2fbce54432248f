// SPDX-License-Identifier: Apache-2.0
//
// Shared by the synchronous backends over asynchronous PostgreSQL.

#ifndef RUNTIME_BRIDGE_EXAMPLES_PG_BACKEND_HPP
#define RUNTIME_BRIDGE_EXAMPLES_PG_BACKEND_HPP

#include <asio/awaitable.hpp>
#include <chrono>
#include <cstddef>
#include <functional>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <vector>

#include "support/backends.hpp"
#include "support/pg.hpp"
#include "support/shared_client.hpp"

/// Thrown by a task to end its call with this error.
class BackendException : public std::runtime_error {
 public:
  BackendException(BackendError::Kind kind, const std::string& message) : std::runtime_error(message), kind_(kind) {}
  [[nodiscard]] BackendError::Kind kind() const noexcept { return kind_; }

 private:
  BackendError::Kind kind_;
};

/// Describes the exception that is being handled, or rethrows it.
inline BackendError describe_pg_error() {
  try {
    throw;
  } catch (const BackendException& e) {
    return {e.kind(), e.what()};
  } catch (const pg::Error& e) {
    const bool refused = e.kind() == pg::Error::statement || e.kind() == pg::Error::invalid;
    if (refused && e.unchanged()) return {BackendError::Refused, e.what()};
    if (e.kind() == pg::Error::decode) return {BackendError::BadAnswer, e.what()};
    if (e.kind() == pg::Error::commit_unknown) return {BackendError::CommitUnknown, e.what()};
    return {BackendError::Unavailable, e.what()};
  }
}

/// Runs `function(connection)`. If a statement is refused after an earlier one took effect, the error says so.
template <class Function>
std::invoke_result_t<Function&, pg::Connection&> run_on(pg::Connection& connection, Function& function) {
  const auto completed = connection.completed();
  try {
    co_return co_await function(connection);
  } catch (const pg::Error& e) {
    if (!e.unchanged() || connection.completed() == completed) throw;
    throw BackendException(BackendError::PartlyDone, std::string(e.what()) + "; statements before it took effect");
  }
}

/// Copies are cheap: they share one bridge and one connection pool.
class PgClient {
 public:
  PgClient(const pg::Settings& settings, std::size_t connections, std::chrono::milliseconds timeout)
      : pool_(timeout, settings, connections) {}

  /// Runs `function(connection)` on the worker. It has ended when this returns, so it may refer to the caller's locals.
  template <class Function>
  auto call(Function function) const {
    return pool_.call([&](pg::Pool& pool) -> std::invoke_result_t<Function&, pg::Connection&> {
      const auto lease = co_await pool.acquire();
      co_return co_await run_on(*lease, function);
    });
  }

  /// Like `call`, in a transaction.
  template <class Function>
  auto transaction(Function function) const {
    return call([&](pg::Connection& connection) { return connection.transaction(std::ref(function)); });
  }

  /// Runs one statement. True if it returned or changed any rows.
  template <class... Ts>
  Outcome<bool> run(const std::string& sql, const Ts&... parameters) const {
    return call([&](pg::Connection& connection) -> asio::awaitable<bool> {
      const pg::Result result = co_await connection.query(sql, parameters...);
      co_return result.affected() != 0;
    });
  }

  /// Runs "create ... if not exists" statements. It takes a lock, because one of two programs that run such a statement
  /// at the same time may still fail.
  [[nodiscard]] Outcome<bool> create(const std::vector<std::string>& statements) const {
    return transaction([&](pg::Connection& connection) -> asio::awaitable<bool> {
      co_await connection.query("select pg_advisory_xact_lock(hashtext('runtime_bridge'))");
      co_await connection.query("create schema if not exists runtime_bridge");
      for (const std::string& statement : statements) co_await connection.query(statement);
      co_return true;
    });
  }

 private:
  SharedClient<pg::Pool, describe_pg_error> pool_;
};

#endif  // RUNTIME_BRIDGE_EXAMPLES_PG_BACKEND_HPP
