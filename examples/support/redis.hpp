// SPDX-License-Identifier: Apache-2.0
//
// Connections of Boost.Redis that reconnect, and requests that may be given up.

#ifndef RUNTIME_BRIDGE_EXAMPLES_REDIS_HPP
#define RUNTIME_BRIDGE_EXAMPLES_REDIS_HPP

#include <boost/asio/co_spawn.hpp>
#include <boost/asio/detached.hpp>
#include <boost/asio/redirect_error.hpp>
#include <boost/asio/steady_timer.hpp>
#include <boost/asio/use_awaitable.hpp>
#include <boost/redis/connection.hpp>
#include <boost/version.hpp>
#include <chrono>
#include <cstddef>
#include <memory>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "support/asio.hpp"
#include "support/backends.hpp"
#include "support/shared_client.hpp"

/// What the server says about a command that it refuses.
struct RedisRefusal : std::runtime_error {
  using runtime_error::runtime_error;
};

/// Describes the exception that is being handled, or rethrows it.
inline BackendError describe_redis_error() {
  try {
    throw;
  } catch (const RedisRefusal& e) {
    const bool starting = std::string(e.what()).starts_with("LOADING");
    return {starting ? BackendError::Unavailable : BackendError::Refused, e.what()};
  } catch (const boost::system::system_error& e) {
    if (e.code() == asio::error::operation_aborted) throw;  // by the deadline, which the bridge reports
    return {BackendError::Unavailable, e.code().message()};
  }
}

/// The value of one command's answer. Throws if it is an error.
template <class T>
T value_of(boost::redis::adapter::result<T>& answer) {
  if (answer.has_error()) throw RedisRefusal(answer.error().diagnostic);
  return std::move(answer.value());
}

/// A connection. Its tasks share it, because they may end after those that wait for them.
class RedisConnection {
 public:
  RedisConnection(const asio::any_io_executor& executor, boost::redis::config config)
#if BOOST_VERSION >= 109000
      : connection_(executor, boost::redis::logger(boost::redis::logger::level::disabled)),
#else
      : connection_(executor),
#endif
        pause_(executor),
        config_(std::move(config)) {
    config_.reconnect_wait_interval = std::chrono::seconds(0);  // run() reconnects
  }

  /// Connects, and reconnects until close().
  ///
  /// async_run ends if the server cannot be reached, even if it is configured to reconnect, and leaves the requests
  /// waiting. So this loop reconnects, and after each failed attempt it ends the requests: their callers learn why.
  static asio::awaitable<void> run(std::shared_ptr<RedisConnection> self) {
    boost::system::error_code ignored;
    while (!self->closed_) {
      self->problem_ = {};
      const auto token = asio::redirect_error(asio::use_awaitable, self->problem_);
#if BOOST_VERSION >= 109000
      co_await self->connection_.async_run(self->config_, token);
#else
      co_await self->connection_.async_run(self->config_, {boost::redis::logger::level::disabled}, token);
      self->connection_.reset_stream();
#endif
      self->connection_.cancel(boost::redis::operation::exec);
      if (self->closed_) break;
      self->pause_.expires_after(std::chrono::milliseconds(50));
      co_await self->pause_.async_wait(asio::redirect_error(asio::use_awaitable, ignored));
    }
    self->ended_ = true;
    self->pause_.cancel();
  }

  /// Ends run(), soon. Call it on the worker.
  static void close(const std::shared_ptr<RedisConnection>& self) {
    self->closed_ = true;
    asio::co_spawn(self->pause_.get_executor(), cancel(self), asio::detached);
  }

  /// Sends the commands of a request in one piece, and returns their answers: a `response<T...>`, so that each command
  /// has its own answer or error. (In a `generic_response`, an answer after an error throws outside of all tasks.)
  ///
  /// Cancelling async_exec would close the connection, which others use, too. So a caller whose deadline passes stops
  /// waiting, and the answer to its request is dropped when it comes.
  template <class Response>
  static asio::awaitable<Response> ask(std::shared_ptr<RedisConnection> self, boost::redis::request request) {
    struct Exchange {
      boost::redis::request request;
      Response response;
      boost::system::error_code error;
      bool ended;
      asio::steady_timer end;
    };
    auto exchange = std::make_shared<Exchange>(
        Exchange{std::move(request),
                 {},
                 {},
                 false,
                 {self->pause_.get_executor(), std::chrono::steady_clock::time_point::max()}});
    self->connection_.async_exec(exchange->request, exchange->response,
                                 [self, exchange](boost::system::error_code error, std::size_t) {
                                   exchange->error = error;
                                   exchange->ended = true;
                                   exchange->end.cancel();
                                 });
    boost::system::error_code ignored;
    co_await exchange->end.async_wait(asio::redirect_error(asio::use_awaitable, ignored));
    if (!exchange->ended) throw boost::system::system_error(asio::error::operation_aborted);
    if (exchange->error == asio::error::operation_aborted) {  // with the connection
      const bool known = self->problem_ && self->problem_ != asio::error::operation_aborted;
      exchange->error = known ? self->problem_ : boost::redis::error::not_connected;
    }
    if (exchange->error) throw boost::system::system_error(exchange->error);
    co_return std::move(exchange->response);
  }

 private:
  /// Up to Boost 1.89, a cancel() between two steps of async_run is lost.
  static asio::awaitable<void> cancel(std::shared_ptr<RedisConnection> self) {
    boost::system::error_code ignored;
    while (!self->ended_) {
      self->connection_.cancel();
      self->pause_.expires_after(std::chrono::milliseconds(10));
      co_await self->pause_.async_wait(asio::redirect_error(asio::use_awaitable, ignored));
    }
  }

  boost::redis::connection connection_;
  asio::steady_timer pause_;
  boost::redis::config config_;
  boost::system::error_code problem_;  // why the last attempt to connect failed
  bool closed_ = false, ended_ = false;
};

/// One connection for all callers, and others for commands that block: behind those, all other requests would wait.
class RedisClient {
 public:
  RedisClient(Bridge bridge, boost::redis::config config) : bridge_(std::move(bridge)), config_(std::move(config)) {}
  RedisClient(const RedisClient&) = delete;
  RedisClient& operator=(const RedisClient&) = delete;
  ~RedisClient() {
    if (shared_) RedisConnection::close(shared_);
    for (const auto& connection : idle_) RedisConnection::close(connection);
  }

  template <class Response>
  asio::awaitable<Response> ask(boost::redis::request request) {
    if (!shared_) shared_ = connect(config_);
    return RedisConnection::ask<Response>(shared_, std::move(request));
  }

  /// Only one blocking command runs on a connection. If it does not end well, the connection is closed, so that the
  /// server does not go on with it: a BLPOP would take what nobody then gets.
  template <class Response>
  asio::awaitable<Response> ask_blocking(boost::redis::request request) {
    std::shared_ptr<RedisConnection> connection;
    if (idle_.empty()) {
      boost::redis::config config = config_;
      config.health_check_interval = std::chrono::seconds(0);  // its PING would wait behind the command
      connection = connect(config);
    } else {
      connection = std::move(idle_.back());
      idle_.pop_back();
    }
    struct Close {
      ~Close() {
        if (connection) RedisConnection::close(connection);
      }
      std::shared_ptr<RedisConnection> connection;
    } unless_idle{connection};
    Response response = co_await RedisConnection::ask<Response>(connection, std::move(request));
    idle_.push_back(std::exchange(unless_idle.connection, nullptr));
    co_return response;
  }

 private:
  static asio::awaitable<void> run([[maybe_unused]] Bridge bridge, std::shared_ptr<RedisConnection> connection) {
    co_await RedisConnection::run(std::move(connection));
  }

  std::shared_ptr<RedisConnection> connect(const boost::redis::config& config) {
    auto connection = std::make_shared<RedisConnection>(bridge_->get_executor(), config);
    bridge_->submit(run(bridge_, connection)).detach();
    return connection;
  }

  Bridge bridge_;
  boost::redis::config config_;
  std::shared_ptr<RedisConnection> shared_;
  std::vector<std::shared_ptr<RedisConnection>> idle_;
};

#endif  // RUNTIME_BRIDGE_EXAMPLES_REDIS_HPP
