// SPDX-License-Identifier: Apache-2.0
//
// Shared by the synchronous backends over asynchronous PostgreSQL.

#ifndef RUNTIME_BRIDGE_EXAMPLES_PG_BACKEND_HPP
#define RUNTIME_BRIDGE_EXAMPLES_PG_BACKEND_HPP

#include <runtime_bridge.hpp>

#include <asio/awaitable.hpp>
#include <chrono>
#include <cstddef>
#include <functional>
#include <memory>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "support/backends.hpp"
#include "support/pg.hpp"

/// Turns what an asynchronous function returns or throws into a backend's result.
template <class T>
asio::awaitable<Outcome<T>> outcome_of(asio::awaitable<T> task) {
  try {
    co_return co_await std::move(task);
  } catch (const pg::Error& e) {
    co_return Failure({e.kind() == pg::Error::statement ? BackendError::Refused : BackendError::Unavailable, e.what()});
  } catch (const std::invalid_argument& e) {  // a text that PostgreSQL cannot store
    co_return Failure({BackendError::Refused, e.what()});
  }
}

// [readme]
/// Copies are cheap: they share one bridge, whose worker starts with the first call, and one connection pool.
class PgClient {
  struct Shared {
    Shared(const pg::Settings& settings, std::size_t connections)
        : pool(bridge.get_executor(), settings, connections) {}
    Shared(const Shared&) = delete;
    Shared& operator=(const Shared&) = delete;
    // A task may own the last copy. This then runs on the worker, where block_on is refused and close() may be called.
    ~Shared() {
      const auto closed = bridge.block_on([&] { pool.close(); });
      if (!closed && closed.error() == runtime_bridge::BridgeError::WouldDeadlock) pool.close();
    }
    runtime_bridge::RuntimeBridge bridge{{.start = runtime_bridge::Start::lazy}};
    pg::Pool pool;  // declared last: its connections must be destroyed before the bridge
  };

 public:
  PgClient(const pg::Settings& settings, std::size_t connections, std::chrono::milliseconds timeout)
      : shared_(std::make_shared<Shared>(settings, connections)), timeout_(timeout) {}

  /// Runs `function(connection)` on the worker. It has ended when this returns, so it may refer to the caller's locals.
  template <class Function>
  auto call(Function function) const {
    const auto task = [&]() -> std::invoke_result_t<Function&, pg::Connection&> {
      const auto lease = co_await shared_->pool.acquire();
      co_return co_await function(*lease);
    };
    return flatten(shared_->bridge.block_on_for([&] { return outcome_of(task()); }, timeout_));
  }
  // [/readme]

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
  std::shared_ptr<Shared> shared_;
  std::chrono::milliseconds timeout_;
};

#endif  // RUNTIME_BRIDGE_EXAMPLES_PG_BACKEND_HPP
