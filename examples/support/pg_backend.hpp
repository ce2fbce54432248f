// SPDX-License-Identifier: Apache-2.0
//
// What synchronous backends over asynchronous PostgreSQL have in common.

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

/// What an asynchronous function comes to, as a backend says it.
template <class T>
asio::awaitable<Outcome<T>> outcome_of(asio::awaitable<T> task) {
  try {
    co_return co_await std::move(task);
  } catch (const pg::Error& e) {
    co_return Failure({e.kind() == pg::Error::statement ? BackendError::Refused : BackendError::Unavailable, e.what()});
  } catch (const std::invalid_argument& e) {  // a text that PostgreSQL cannot hold
    co_return Failure({BackendError::Refused, e.what()});
  }
}

// [readme]
/// Copies are cheap: they share one bridge, whose worker starts with the first call, and one pool of connections.
class PgClient {
  struct Shared {
    Shared(const pg::Settings& settings, std::size_t connections)
        : pool(bridge.get_executor(), settings, connections) {}
    Shared(const Shared&) = delete;
    Shared& operator=(const Shared&) = delete;
    // If the last copy was a task's, this is the worker: the bridge refuses to wait for itself, and need not.
    ~Shared() {
      const auto closed = bridge.block_on([&] { pool.close(); });
      if (!closed && closed.error() == runtime_bridge::BridgeError::WouldDeadlock) pool.close();
    }
    runtime_bridge::RuntimeBridge bridge{{.start = runtime_bridge::Start::lazy}};
    pg::Pool pool;  // declared last: its connections must be gone before the bridge
  };

 public:
  PgClient(const pg::Settings& settings, std::size_t connections, std::chrono::milliseconds timeout)
      : shared_(std::make_shared<Shared>(settings, connections)), timeout_(timeout) {}

  /// Runs `function(connection)` on the worker. It is over when block_on returns, so it may borrow the caller's stack.
  template <class Function>
  auto call(Function function) const {
    const auto task = [&]() -> std::invoke_result_t<Function&, pg::Connection&> {
      const auto lease = co_await shared_->pool.acquire();
      co_return co_await function(*lease);
    };
    return flatten(shared_->bridge.block_on_for([&] { return outcome_of(task()); }, timeout_));
  }
  // [/readme]

  /// The same in a transaction.
  template <class Function>
  auto transaction(Function function) const {
    return call([&](pg::Connection& connection) { return connection.transaction(std::ref(function)); });
  }

  /// Runs one statement; whether it returned or changed any rows.
  template <class... Ts>
  Outcome<bool> run(const std::string& sql, const Ts&... parameters) const {
    return call([&](pg::Connection& connection) -> asio::awaitable<bool> {
      const pg::Result result = co_await connection.query(sql, parameters...);
      co_return result.affected() != 0;
    });
  }

  /// Creates what is not there. "if not exists" alone would fail when two programs do this at the same time.
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
