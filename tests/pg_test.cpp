// SPDX-License-Identifier: Apache-2.0
//
// examples/support/pg.hpp, over the PostgreSQL server of the environment: examples/serve postgres pg_test

#include <netinet/in.h>
#include <sys/socket.h>

#include <array>
#include <asio/bind_cancellation_slot.hpp>
#include <asio/cancellation_signal.hpp>
#include <asio/co_spawn.hpp>
#include <asio/io_context.hpp>
#include <asio/ip/tcp.hpp>
#include <asio/thread_pool.hpp>
#include <asio/write.hpp>
#include <atomic>
#include <csignal>
#include <cstdint>
#include <cstdlib>
#include <functional>
#include <future>
#include <limits>
#include <list>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <string_view>
#include <system_error>
#include <vector>

#include "support.hpp"
#include "support/pg.hpp"

#ifndef SANITIZED  // the sanitizers replace close, too
#include <sys/syscall.h>

static std::atomic<int> wrong_closes{0};

/// Replaces the C library's, for libpq and Asio, too, and counts the calls for descriptors that are not open.
extern "C" int close(int descriptor) {
  const int result = static_cast<int>(syscall(SYS_close, descriptor));
  if (result != 0 && errno == EBADF) ++wrong_closes;
  return result;
}
#endif

namespace {

using std::chrono::steady_clock;

pg::Settings settings(std::string conninfo = {}) {
  pg::Settings result;
  result.conninfo = std::move(conninfo);
  return result;
}

/// An application name for a pool of this process.
std::string unique_name() {
  static int count = 0;
  return "pg_test-" + std::to_string(getpid()) + "-" + std::to_string(++count);
}

/// A bridge and a pool, as in a backend.
struct Database {
  explicit Database(std::size_t size = 1, pg::Settings how = settings())
      : pool(bridge.get_executor(), named(how), size) {}
  ~Database() {
    (void)bridge.block_on([&] { pool.close(); });
  }

  /// Runs a task that gets a leased connection.
  template <class Body>
  auto with_connection(Body body, std::chrono::milliseconds timeout = std::chrono::hours(1)) {
    using Awaitable = std::invoke_result_t<Body&, pg::Connection&>;
    return bridge.block_on_for(
        [&]() -> Awaitable {
          auto lease = co_await pool.acquire();
          co_return co_await body(*lease);
        },
        timeout);
  }

  /// The same, but the call is cancelled while the task waits for the server.
  template <class Body>
  auto interrupted(Body body) {
    using Awaitable = std::invoke_result_t<Body&, pg::Connection&>;
    std::stop_source stop;
    return bridge.block_on(
        [&]() -> Awaitable {
          auto lease = co_await pool.acquire();
          asio::post(bridge.get_executor(), [stop]() mutable { stop.request_stop(); });
          co_return co_await body(*lease);
        },
        stop.get_token());
  }

  /// The first value of what the statement returns.
  template <class T, class... Ts>
  Result<T> select(const std::string& sql, const Ts&... parameters) {
    return with_connection([&](pg::Connection& connection) -> awaitable<T> {
      const pg::Result result = co_await connection.query(sql, parameters...);
      co_return result.get<T>(0, 0);
    });
  }

  template <class... Ts>
  Result<long long> execute(const std::string& sql, const Ts&... parameters) {
    return with_connection([&](pg::Connection& connection) -> awaitable<long long> {
      const pg::Result result = co_await connection.query(sql, parameters...);
      co_return result.affected();
    });
  }

  pg::Settings named(pg::Settings how) const {
    how.conninfo += " application_name=" + name;
    return how;
  }

  Result<int> pid() { return select<int>("select pg_backend_pid()"); }

  std::string name = unique_name();
  RuntimeBridge bridge;
  pg::Pool pool;
};

/// How a call ended: "value", the kind and SQLSTATE of a pg::Error, "aborted", or the text of another exception.
std::string failure(const std::exception_ptr& cause) {
  static constexpr std::array kinds{"statement", "connection", "commit_unknown", "timeout", "closed"};
  try {
    std::rethrow_exception(cause);
  } catch (const pg::Error& e) {
    return std::string(kinds.at(e.kind())) + (e.sqlstate().empty() ? "" : " ") + e.sqlstate();
  } catch (const std::system_error& e) {
    return e.code() == asio::error::operation_aborted ? "aborted" : e.what();
  } catch (const std::exception& e) {
    return e.what();
  }
}
template <class T>
std::string failure(const Result<T>& result) {
  if (result.has_value()) return "value";
  return result.error().cause() ? failure(result.error().cause()) : result.error().message();
}

/// A listening socket on loopback. The test plays the server.
class FakeServer {
 public:
  FakeServer() : acceptor_(context_, {asio::ip::address_v4::loopback(), 0}) {}
  ~FakeServer() { join(); }

  std::string conninfo() const {
    return "host=127.0.0.1 sslmode=disable gssencmode=disable user=nobody dbname=none port=" +
           std::to_string(acceptor_.local_endpoint().port());
  }

  /// Plays the server on a thread of its own.
  void play(std::function<void(FakeServer&)> script) {
    thread_ = std::thread([this, script = std::move(script)] {
      try {
        script(*this);
      } catch (const std::exception&) {  // the client has hung up
      }
    });
  }
  void join() {
    if (thread_.joinable()) thread_.join();
  }

  asio::ip::tcp::socket accept() {
    asio::ip::tcp::socket peer(context_);
    acceptor_.accept(peer);
    return peer;
  }

  /// Accepts a connection, and lets it in without a password.
  asio::ip::tcp::socket accept_session() {
    asio::ip::tcp::socket peer = accept();
    std::array<char, 4096> startup{};
    peer.read_some(asio::buffer(startup));
    send(peer, 'R', std::string(4, '\0'));
    send(peer, 'K', std::string(8, '\1'));
    send(peer, 'Z', "I");
    return peer;
  }

  static void send(asio::ip::tcp::socket& peer, char type, const std::string& body) {
    const std::uint32_t length = htonl(static_cast<std::uint32_t>(body.size() + 4));
    std::string message(1, type);
    message.append(reinterpret_cast<const char*>(&length), sizeof length);
    asio::write(peer, asio::buffer(message + body));
  }

  /// Reads until the client hangs up or enough has come.
  static std::size_t read_all(asio::ip::tcp::socket& peer,
                              std::size_t enough = std::numeric_limits<std::size_t>::max()) {
    std::vector<char> chunk(1 << 16);
    std::size_t total = 0;
    std::error_code end;
    while (!end && total < enough) total += peer.read_some(asio::buffer(chunk), end);
    return total;
  }

 private:
  asio::io_context context_;
  asio::ip::tcp::acceptor acceptor_;
  std::thread thread_;
};

/// A port of 127.0.0.1 that refuses connections.
std::string refusing_port() {
  asio::io_context context;
  const asio::ip::tcp::acceptor acceptor(context, {asio::ip::address_v4::loopback(), 0});
  return std::to_string(acceptor.local_endpoint().port());
}

std::string environment(const char* name) {
  const char* value = std::getenv(name);
  return value == nullptr ? "" : value;
}

/// Waits until this backend of the server has ended.
void await_end_of(Database& observer, int pid) {
  await_state([&] {
    return !unwrap(observer.select<bool>("select exists(select from pg_stat_activity where pid = $1)", pid));
  });
}

/// Waits until this number of statements like this one run on a pool of this name.
void await_statements(Database& observer, const std::string& name, const std::string& like, int count) {
  const std::string statements =
      "select count(*)::int from pg_stat_activity where application_name = $1 and state = 'active' and query like $2";
  await_state([&] { return unwrap(observer.select<int>(statements, name, like)) == count; });
}

awaitable<int> sleep_long(pg::Connection& connection) {
  co_await connection.query("select pg_sleep(60)");
  co_return 0;
}

}  // namespace

// ---------------------------------------------------------------------------------------------------------------------
// Values

TEST_CASE("pg: parameters are bound and come back unchanged") {
  Database db;
  CHECK(db.select<std::string>("select $1", "'; drop table x; -- \\ \" \xc3\xa4") ==
        "'; drop table x; -- \\ \" \xc3\xa4");
  CHECK(db.select<std::string>("select $1", std::string()) == "");
  CHECK(db.select<std::string>("select $1::text", std::string_view("view").substr(1, 2)) == "ie");
  CHECK(db.select<std::int64_t>("select $1::int8", std::numeric_limits<std::int64_t>::min()) ==
        std::numeric_limits<std::int64_t>::min());
  CHECK(db.select<double>("select $1::float8", 0.1) == 0.1);
  CHECK(db.select<bool>("select not $1::bool", true) == false);
  CHECK(db.select<bool>("select $1::text is null and $2::int is null", std::nullopt, std::optional<int>()) == true);
  CHECK(db.select<std::optional<std::string>>("select null::text").value() == std::nullopt);
  CHECK(db.select<std::optional<int>>("select 7").value() == 7);

  std::string all_bytes(256, '\0');
  for (std::size_t i = 0; i < all_bytes.size(); ++i) all_bytes[i] = static_cast<char>(i);
  CHECK(db.select<pg::Bytes>("select $1::bytea", pg::Bytes(all_bytes)).value().value == all_bytes);
  CHECK(db.select<int>("select octet_length($1::bytea)", pg::Bytes(std::string())) == 0);
}

TEST_CASE("pg: a text with a NUL byte is refused, not truncated") {
  Database db;
  CHECK(failure(db.select<std::string>("select $1", std::string("a\0b", 3))).find("NUL") != std::string::npos);
  CHECK(db.select<std::string>("select $1", "next") == "next");
}

TEST_CASE("pg: results are checked") {
  Database db;
  const auto task = [](pg::Connection& connection) -> awaitable<std::vector<std::string>> {
    const pg::Result result =
        co_await connection.query("select 300, null, 'x' union all select 1, null, 'y' order by 1");
    std::vector<std::string> found{std::to_string(result.rows()) + " x " + std::to_string(result.columns())};
    const auto attempt = [&](auto get) {
      try {
        get();
        found.emplace_back("value");
      } catch (const std::out_of_range&) {
        found.emplace_back("out of range");
      } catch (const std::invalid_argument&) {
        found.emplace_back("invalid");
      }
    };
    attempt([&] { (void)result.get<int>(2, 0); });
    attempt([&] { (void)result.get<int>(0, 3); });
    attempt([&] { (void)result.get<int>(-1, 0); });
    attempt([&] { (void)result.get<int>(0, -1); });
    attempt([&] { (void)result.is_null(0, 3); });
    attempt([&] { (void)result.get<std::string>(0, 1); });  // null
    attempt([&] { (void)result.get<int>(0, 2); });
    attempt([&] { (void)result.get<bool>(0, 2); });
    attempt([&] { (void)result.get<std::int8_t>(1, 0); });  // 300
    attempt([&] { (void)result.get<std::int16_t>(1, 0); });
    co_return found;
  };
  CHECK(db.with_connection(task).value() ==
        std::vector<std::string>{"2 x 3", "out of range", "out of range", "out of range", "out of range",
                                 "out of range", "invalid", "invalid", "invalid", "invalid", "value"});
}

TEST_CASE("pg: megabytes in both directions") {
  Database db;
  std::string large(std::size_t{12} << 20, 'x');
  for (std::size_t i = 0; i < large.size(); i += 7) large[i] = static_cast<char>(i);
  const auto result = db.select<pg::Bytes>("select $1::bytea", pg::Bytes(large));
  REQUIRE(failure(result) == "value");
  CHECK(result.value().value == large);
}

TEST_CASE("pg: a server that sends while it receives does not deadlock") {
  FakeServer server;
  server.play([](FakeServer& self) {
    asio::ip::tcp::socket peer = self.accept_session();
    // It reads only after it has sent this: 70 MB, more than the buffers of sockets hold.
    const std::string notice =
        std::string("SNOTICE\0VNOTICE\0C00000\0M", 24) + std::string(100'000, 'x') + std::string(2, '\0');
    for (int i = 0; i < 700; ++i) FakeServer::send(peer, 'N', notice);
    FakeServer::read_all(peer, std::size_t{20} << 20);
    FakeServer::send(peer, '1', "");
    FakeServer::send(peer, '2', "");
    FakeServer::send(peer, 'n', "");
    FakeServer::send(peer, 'C', std::string("DONE\0", 5));
    FakeServer::send(peer, 'Z', "I");
    FakeServer::read_all(peer);
  });
  {
    Database db(1, settings(server.conninfo()));
    const auto task = [](pg::Connection& connection) -> awaitable<std::string> {
      const pg::Result result = co_await connection.query("-", std::string(std::size_t{20} << 20, 'x'));
      co_return std::string(result.command());
    };
    CHECK(db.with_connection(task) == "DONE");
  }
  server.join();
}

// ---------------------------------------------------------------------------------------------------------------------
// Errors

TEST_CASE("pg: a failed statement leaves the connection usable") {
  Database db;
  const int pid = db.pid().value();
  const auto result = db.select<int>("select 1 / $1::int", 0);
  REQUIRE(failure(result) == "statement 22012");
  try {
    (void)unwrap(result);
  } catch (const pg::Error& e) {
    CHECK(e.severity() == "ERROR");
    CHECK(std::string(e.what()) == "ERROR: division by zero");
    CHECK_FALSE(e.connection_lost());
  }
  CHECK(failure(db.select<int>("nonsense")) == "statement 42601");
  CHECK(failure(db.select<int>("select $1::int")) == "statement 08P01");  // a parameter is missing
  CHECK(db.pid() == pid);
}

TEST_CASE("pg: COPY closes the connection and does not hang") {
  Database db;
  const int pid = db.pid().value();
  CHECK(failure(db.execute("copy (select 1) to stdout")) == "connection");
  CHECK(db.pid().value() != pid);
}

TEST_CASE("pg: connections that cannot be made") {
  const std::string port = refusing_port();
  Database refused(1, settings("host=127.0.0.1 port=" + port));
  CHECK(failure(refused.pid()) == "connection");
  CHECK(what(refused.pid().error().cause()).find("port " + port + " failed: Connection refused") != std::string::npos);
  CHECK(what(refused.pid().error().cause()).find('\n') == std::string::npos);

  Database nowhere(1, settings("host=no.such.host.invalid"));
  CHECK(failure(nowhere.pid()) == "connection");
  Database nonsense(1, settings("nonsense"));
  CHECK(failure(nonsense.pid()) == "connection");
  Database nobody(1, settings("dbname=no_such_database"));
  CHECK(failure(nobody.pid()) == "connection");
}

TEST_CASE("pg: tries the next host when the first refuses") {
  Database db(2, settings("host=127.0.0.1,127.0.0.1,127.0.0.1 port=" + refusing_port() + "," + refusing_port() + "," +
                          environment("PGPORT")));
  const std::size_t descriptors = descriptors_of_this_process();
  CHECK(db.select<int>("select 1") == 1);
  CHECK(db.select<int>("select 2") == 2);
  CHECK(descriptors_of_this_process() == descriptors + 1);
}

TEST_CASE("pg: a server that does not answer") {
  const FakeServer silent;
  pg::Settings how = settings(silent.conninfo());
  how.connect_timeout = 50ms;
  Database db(1, how);
  how.connect_timeout = 1h;
  Database cancelled(1, how);
  const std::size_t descriptors = descriptors_of_this_process();
  CHECK(failure(db.pid()) == "timeout");
  CHECK(descriptors_of_this_process() == descriptors);

  const auto task = [](pg::Connection&) -> awaitable<int> { co_return 0; };
  const auto result = cancelled.with_connection(task, 50ms);
  CHECK(failure(result) == "aborted");
  CHECK(result.error() == BridgeError::TimedOut);
  CHECK(descriptors_of_this_process() == descriptors);

  const auto late = [&]() -> awaitable<void> { (void)co_await cancelled.pool.acquire(pg::Clock::now() + 50ms); };
  CHECK(failure(cancelled.bridge.block_on(late)) == "timeout");
}

TEST_CASE("pg: each descriptor is closed exactly once") {
  RuntimeBridge bridge;
  const std::size_t before = descriptors_of_this_process();
  for (int round = 0; round < 20; ++round) {
    pg::Pool pool(bridge.get_executor(), settings(), 3);
    const auto hold_three = [&]() -> awaitable<std::size_t> {
      const auto a = co_await pool.acquire();
      const auto b = co_await pool.acquire();
      auto c = co_await pool.acquire();
      c->close();
      co_return descriptors_of_this_process();
    };
    CHECK(bridge.block_on(hold_three) == before + 2);
    unwrap(bridge.block_on([&] { pool.close(); }));
    CHECK(descriptors_of_this_process() == before);
  }
#ifndef SANITIZED
  CHECK(wrong_closes == 0);
#endif
}

TEST_CASE("pg: a second command on a busy connection is an error") {
  Database db;
  const auto task = [&](pg::Connection& connection) -> awaitable<std::string> {
    std::string second = "not run";
    const auto intrude = [&]() -> awaitable<void> {
      try {
        co_await asio::post(use_awaitable);  // the other one first
        co_await connection.query("select 1");
      } catch (const pg::Error& e) {
        second = e.what();
      }
    };
    asio::co_spawn(db.bridge.get_executor(), intrude, asio::detached);
    const pg::Result result = co_await connection.query("select 'first' from pg_sleep(0.05)");
    co_return result.get<std::string>(0, 0) + ", " + second;
  };
  CHECK(db.with_connection(task) == "first, another command is already in progress");
}

// ---------------------------------------------------------------------------------------------------------------------
// The pool

TEST_CASE("pg: connections are given out in order of arrival") {
  Database db;
  std::vector<int> order;
  std::list<JoinHandle<void>> calls;
  unwrap(db.bridge.block_on([&]() -> awaitable<void> {
    const auto held = co_await db.pool.acquire();
    for (int i = 0; i < 8; ++i) {
      const auto wait = [](Database& on, std::vector<int>& log, int number) -> awaitable<void> {
        const auto lease = co_await on.pool.acquire();
        co_await lease->query("select 1");
        log.push_back(number);
      };
      calls.push_back(db.bridge.submit(wait(db, order, i)));
    }
    co_await held->query("select pg_sleep(0.05)");
  }));
  for (auto& call : calls) unwrap(call.join());
  CHECK(order == std::vector{0, 1, 2, 3, 4, 5, 6, 7});
}

TEST_CASE("pg: a pool opens connections on demand, up to its size") {
  Database db(3);
  const int first = db.pid().value();
  for (int i = 0; i < 5; ++i) CHECK(db.pid() == first);
  std::atomic<int> most{0}, now{0};
  std::vector<std::jthread> threads;
  for (int i = 0; i < 8; ++i) {
    threads.emplace_back([&] {
      (void)db.with_connection([&](pg::Connection& connection) -> awaitable<int> {
        most = std::max(most.load(), ++now);
        co_await connection.query("select pg_sleep(0.02)");
        co_return --now;
      });
    });
  }
  threads.clear();
  CHECK(most == 3);
}

TEST_CASE("pg: a deadline for a connection") {
  Database db;
  const auto task = [&](pg::Connection&) -> awaitable<std::string> {
    const auto start = pg::Clock::now();
    try {
      (void)co_await db.pool.acquire(start + 30ms);
    } catch (const pg::Error& e) {
      if (e.kind() == pg::Error::timeout && pg::Clock::now() >= start + 30ms) co_return "in time";
    }
    co_return "not in time";
  };
  CHECK(db.with_connection(task) == "in time");
  CHECK(db.select<int>("select 1") == 1);
}

TEST_CASE("pg: a connection that reaches a cancelled caller goes to the next one") {
  Database db;
  for (const bool cancel_first : {true, false}) {
    for (const bool keeps_it : {true, false}) {
      // Both events happen on the worker, with nothing in between.
      std::vector<std::string> log;
      std::optional<pg::Pool::Lease> held;
      asio::cancellation_signal cancel;
      std::atomic<int> ended{0};
      const auto wait = [&](std::string name) -> awaitable<void> {
        auto lease = co_await db.pool.acquire();
        log.push_back(name + " has it");
        if (keeps_it) co_await lease->query("select 1");
      };
      const auto end_of = [&](const std::string& name) {
        return [&, name](const std::exception_ptr& failed) {
          log.push_back(name + (failed ? ": " + failure(failed) : " done"));
          ++ended;
        };
      };
      unwrap(db.bridge.block_on([&]() -> awaitable<void> {
        held.emplace(co_await db.pool.acquire());
        asio::co_spawn(db.bridge.get_executor(), wait("first"),
                       asio::bind_cancellation_slot(cancel.slot(), end_of("first")));
        asio::co_spawn(db.bridge.get_executor(), wait("second"), end_of("second"));
      }));
      unwrap(db.bridge.block_on([&] {
        if (cancel_first) cancel.emit(asio::cancellation_type::terminal);
        held.reset();
        if (!cancel_first) cancel.emit(asio::cancellation_type::terminal);
      }));
      await_state([&] { return ended == 2; });
      unwrap(db.bridge.block_on([] {}));
      CHECK(std::count(log.begin(), log.end(), "second done") == 1);
      CHECK(db.select<int>("select 1") == 1);
    }
  }
}

TEST_CASE("pg: a connection that reaches a destroyed coroutine goes to the next one") {
  asio::io_context context;
  auto doomed = std::make_unique<asio::io_context>();
  pg::Pool pool(context.get_executor(), settings(), 1);
  std::optional<pg::Pool::Lease> held;
  bool served = false;
  const auto hold = [&]() -> awaitable<void> { held.emplace(co_await pool.acquire()); };
  const auto wait = [&]() -> awaitable<void> {
    const auto lease = co_await pool.acquire();
    served = true;
  };
  asio::co_spawn(context, hold, asio::detached);
  context.run();
  REQUIRE(held.has_value());
  asio::co_spawn(*doomed, wait, asio::detached);
  doomed->poll();
  asio::co_spawn(context, wait, asio::detached);
  context.restart();
  context.poll();
  held.reset();
  context.poll();  // posts the first one's next step to its own context
  doomed.reset();
  context.run();
  CHECK(served);
}

namespace {

/// Starts another call that waits for a connection.
awaitable<JoinHandle<void>> wait_for_connection(Database& db) {
  bool waits = false;
  JoinHandle<void> waiting = db.bridge.submit([&]() -> awaitable<void> {
    waits = true;
    (void)co_await db.pool.acquire();
  });
  while (!waits) co_await asio::post(use_awaitable);
  co_return waiting;
}

}  // namespace

TEST_CASE("pg: cancellation while waiting for a connection") {
  Database db;
  const auto task = [&](const pg::Connection&) -> awaitable<std::string> {
    JoinHandle<void> waiting = co_await wait_for_connection(db);
    waiting.request_stop();
    while (!waiting.done()) co_await asio::post(use_awaitable);
    co_return failure(waiting.join());
  };
  const auto waiting = db.with_connection(task);
  REQUIRE(failure(waiting) == "value");
  CHECK(*waiting == "aborted");
  CHECK(db.select<int>("select 1") == 1);
}

TEST_CASE("pg: close wakes the waiting callers, and leased connections are closed on return") {
  Database db;
  const std::size_t descriptors = descriptors_of_this_process();
  const auto task = [&](pg::Connection& held) -> awaitable<std::string> {
    JoinHandle<void> waiting = co_await wait_for_connection(db);
    db.pool.close();
    while (!waiting.done()) co_await asio::post(use_awaitable);
    const pg::Result still_works = co_await held.query("select 'works'");
    co_return still_works.get<std::string>(0, 0) + ", " + failure(waiting.join());
  };
  CHECK(db.with_connection(task) == "works, closed");
  CHECK(descriptors_of_this_process() == descriptors);
  CHECK(failure(db.pid()) == "closed");
}

TEST_CASE("pg: a connection that the server has closed is replaced") {
  Database observer;
  Database db;
  SECTION("while nobody used it") {
    const int pid = db.pid().value();
    CHECK(observer.select<bool>("select pg_terminate_backend($1)", pid) == true);
    await_end_of(observer, pid);
    CHECK(db.pid().value() != pid);
  }
  SECTION("under a statement") {
    const int pid = db.pid().value();
    JoinHandle<int> call = db.bridge.submit([&]() -> awaitable<int> {
      auto lease = co_await db.pool.acquire();
      co_return co_await sleep_long(*lease);
    });
    await_statements(observer, db.name, "%pg_sleep(60)%", 1);
    CHECK(observer.select<bool>("select pg_terminate_backend($1)", pid) == true);
    const auto result = call.join();
    CHECK(failure(result) == "connection 57P01");
    CHECK(db.pid().value() != pid);
  }
  SECTION("killed under a statement") {
    const int pid = db.pid().value();
    const auto lose_it = [&](pg::Connection& connection) -> awaitable<std::string> {
      bool lost = false;
      try {
        co_await connection.query("select pg_terminate_backend(pg_backend_pid()), pg_sleep(60)");
      } catch (const pg::Error& e) {
        lost = e.connection_lost() && !connection.is_open() && !connection.usable();
      }
      try {
        co_await connection.query("select 1");
      } catch (const pg::Error& e) {
        co_return std::string(lost ? "lost, " : "not lost, ") + e.what();
      }
      co_return "a value";
    };
    CHECK(db.with_connection(lose_it) == "lost, the connection is closed");
    CHECK(db.pid().value() != pid);
  }
}

TEST_CASE("pg: a connection that comes back in a transaction is closed") {
  Database db;
  const int pid = db.pid().value();
  const std::size_t descriptors = descriptors_of_this_process();
  CHECK(failure(db.execute("begin")) == "value");
  CHECK(descriptors_of_this_process() == descriptors - 1);  // at once: the transaction may hold locks
  CHECK(db.pid().value() != pid);
}

// ---------------------------------------------------------------------------------------------------------------------
// Cancellation

TEST_CASE("pg: a deadline ends the statement on the server and keeps the connection") {
  Database db;
  const int pid = db.pid().value();
  const auto start = steady_clock::now();
  const auto result = db.with_connection(sleep_long, 50ms);
  CHECK(steady_clock::now() - start < 5s);
  CHECK(result.error() == BridgeError::TimedOut);
  CHECK(failure(result) == "aborted");
  CHECK(db.pid() == pid);
}

TEST_CASE("pg: a cancel request never hits the next statement") {
  Database db;
  const int pid = db.pid().value();
  int values = 0, aborted = 0;
  for (int round = 0; round < 240 || values == 0 || aborted == 0; ++round) {
    // The statement ends at about the time of the deadline, before it or after; on a busy machine later.
    const auto task = [&](pg::Connection& connection) -> awaitable<int> {
      co_await connection.query("select pg_sleep(0.01)");
      co_return 1;
    };
    const auto result = db.with_connection(task, std::chrono::milliseconds(1 + round % (round < 240 ? 12 : 240)));
    (result.has_value() ? values : aborted) += 1;
    const auto next = db.select<int>("select pg_backend_pid() from pg_sleep(0.001)");
    REQUIRE(failure(next) == "value");
    REQUIRE(next == pid);
  }
}

TEST_CASE("pg: a statement that ends before its cancellation keeps its result or error") {
  for (const bool succeeds : {true, false}) {
    FakeServer server;
    std::atomic<bool> cancel_seen{false};
    server.play([&](FakeServer& self) {
      asio::ip::tcp::socket peer = self.accept_session();
      asio::ip::tcp::socket cancel = self.accept();
      cancel_seen = true;
      if (succeeds) {
        FakeServer::send(peer, '1', "");
        FakeServer::send(peer, '2', "");
        FakeServer::send(peer, 'n', "");
        FakeServer::send(peer, 'C', std::string("DONE\0", 5));
      } else {
        FakeServer::send(peer, 'E', std::string("SERROR\0VERROR\0C23505\0Mno\0\0", 26));
      }
      FakeServer::send(peer, 'Z', "I");
      cancel.close();
      FakeServer::read_all(peer);
    });
    {
      Database db(1, settings(server.conninfo()));
      const auto task = [](pg::Connection& connection) -> awaitable<std::string> {
        const pg::Result result = co_await connection.query("-");
        co_return std::string(result.command());
      };
      const auto result = db.interrupted(task);
      CHECK(failure(result) == (succeeds ? "value" : "statement 23505"));
      CHECK(result.value_or("") == (succeeds ? "DONE" : ""));
      CHECK(cancel_seen);
    }
    server.join();
  }
}

TEST_CASE("pg: a cancelled task stays cancelled") {
  Database db;
  std::string first;
  const auto task = [&](pg::Connection& connection) -> awaitable<int> {
    try {
      co_await connection.query("select pg_sleep(60)");
    } catch (const std::system_error&) {
      first = failure(std::current_exception());
    }
    co_await asio::post(use_awaitable);
    co_return 0;
  };
  CHECK(failure(db.interrupted(task)) == "aborted");
  CHECK(first == "aborted");
}

TEST_CASE("pg: a backend that ignores a cancellation loses the connection, and the caller does not wait") {
  pg::Settings how = settings();
  how.cancel_timeout = 100ms;
  Database db(1, how);
  const int pid = db.pid().value();
  REQUIRE(kill(pid, SIGSTOP) == 0);  // needs a server of this user on this machine
  const auto start = steady_clock::now();
  const auto result = db.interrupted(sleep_long);
  CHECK(steady_clock::now() - start < 5s);
  CHECK(failure(result) == "aborted");
  CHECK(db.pid().value() != pid);
  REQUIRE(kill(pid, SIGCONT) == 0);
}

TEST_CASE("pg: a server that does not accept the cancel request blocks no caller") {
  FakeServer server;
  std::atomic<bool> over{false};
  server.play([&](FakeServer& self) {
    // Accepts sessions and cancel requests, and does not answer them.
    std::list<asio::ip::tcp::socket> peers;
    peers.push_back(self.accept_session());
    peers.push_back(self.accept());  // PQcancel waits for the end of this one
    peers.push_back(self.accept_session());
    await_state([&] { return over.load(); });
  });
  const auto start = steady_clock::now();
  {
    pg::Settings how = settings(server.conninfo());
    how.cancel_timeout = 50ms;
    Database db(1, how);
    CHECK(failure(db.interrupted(sleep_long)) == "aborted");
    CHECK(failure(db.interrupted(sleep_long)) == "aborted");  // its request is queued
  }
  CHECK(steady_clock::now() - start < 5s);
  over = true;
  server.join();
}

// ---------------------------------------------------------------------------------------------------------------------
// Transactions

namespace {

const std::string table_name = "pg_test_" + std::to_string(getpid());  // several tests may run at once

struct Table {
  explicit Table(Database& on) : db(on) {
    (void)unwrap(db.execute("drop table if exists " + table_name + " cascade"));
    (void)unwrap(db.execute("create table " + table_name + " (n int)"));
  }
  ~Table() {
    (void)db.execute("drop table " + table_name);
    (void)db.execute("drop function if exists " + table_name + "_slow");
  }
  int count() { return db.select<int>("select count(*)::int from " + table_name).value(); }
  Database& db;
};

awaitable<int> insert_one(pg::Connection& connection) {
  const pg::Result result = co_await connection.query("insert into " + table_name + " values (1)");
  co_return static_cast<int>(result.affected());
}

awaitable<void> insert_and_throw(pg::Connection& connection) {
  co_await insert_one(connection);
  throw std::runtime_error("on second thoughts");
}

awaitable<void> insert_and_sleep(pg::Connection& connection) {
  co_await insert_one(connection);
  co_await sleep_long(connection);
}

awaitable<void> insert_and_swallow(pg::Connection& connection) {
  co_await insert_one(connection);
  try {
    co_await connection.query("select 1 / 0");
  } catch (const pg::Error&) {
  }
}

/// A transaction with this body.
template <class T>
auto transaction(awaitable<T> (*body)(pg::Connection&)) {
  return [body](pg::Connection& connection) { return connection.transaction(body); };
}

/// Makes COMMIT take a minute.
void slow_down_commit(Database& db) {
  (void)unwrap(
      db.execute("create function " + table_name +
                 "_slow() returns trigger language plpgsql as 'begin perform pg_sleep(60); return null; end'"));
  (void)unwrap(db.execute("create constraint trigger slow after insert on " + table_name +
                          " deferrable initially deferred for each row execute function " + table_name + "_slow()"));
}

}  // namespace

TEST_CASE("pg: a transaction is committed or rolled back") {
  Database db;
  Table table(db);
  const int pid = db.pid().value();
  CHECK(db.with_connection(transaction(insert_one)) == 1);
  CHECK(table.count() == 1);
  CHECK(failure(db.with_connection(transaction(insert_and_throw))) == "on second thoughts");
  CHECK(failure(db.with_connection(transaction(insert_and_swallow))) == "statement");
  CHECK(failure(db.with_connection(transaction(insert_and_sleep), 50ms)) == "aborted");
  CHECK(table.count() == 1);
  CHECK(db.pid() == pid);
}

TEST_CASE("pg: a transaction that is cancelled during COMMIT is rolled back") {
  Database db;
  Table table(db);
  slow_down_commit(db);
  const int pid = db.pid().value();
  CHECK(failure(db.with_connection(transaction(insert_one), 50ms)) == "aborted");
  CHECK(table.count() == 0);
  CHECK(db.pid() == pid);
}

TEST_CASE("pg: a connection lost during COMMIT, and one lost before") {
  Database observer;
  Database db;
  Table table(observer);
  slow_down_commit(observer);
  const auto lose = [&](auto task, const std::string& under_way) {
    const int pid = db.pid().value();
    auto call = db.bridge.submit([&]() -> awaitable<void> {
      auto lease = co_await db.pool.acquire();
      co_await task(*lease);
    });
    await_statements(observer, db.name, under_way, 1);
    (void)unwrap(observer.execute("select pg_terminate_backend($1)", pid));
    return failure(call.join());
  };
  CHECK(lose(transaction(insert_one), "commit") == "commit_unknown");
  CHECK(lose(transaction(insert_and_sleep), "%pg_sleep(60)%") == "connection 57P01");
  CHECK(table.count() == 0);
}

TEST_CASE("pg: a transaction whose backend does not answer closes the connection") {
  pg::Settings how = settings();
  how.cancel_timeout = 100ms;
  Database observer;
  Database db(1, how);
  Table table(observer);
  const int pid = db.pid().value();
  const auto freeze = [&](pg::Connection& connection) -> awaitable<void> {
    const auto body = [&](pg::Connection& inside) -> awaitable<void> {
      co_await insert_one(inside);
      kill(pid, SIGSTOP);
      throw std::runtime_error("on second thoughts");
    };
    co_await connection.transaction(body);
  };
  CHECK(failure(db.with_connection(freeze)) == "on second thoughts");
  REQUIRE(kill(pid, SIGCONT) == 0);
  CHECK(db.pid().value() != pid);
  CHECK(table.count() == 0);
}

// ---------------------------------------------------------------------------------------------------------------------
// The end of the bridge, the server, the process

TEST_CASE("pg: a bridge may be destroyed with statements in every state") {
  Database observer;
  (void)unwrap(observer.pid());
  const std::string large(std::size_t{4} << 20, 'x');
  const std::size_t descriptors = descriptors_of_this_process();
  for (int round = 0; round < 10; ++round) {
    const auto bridge = std::make_unique<RuntimeBridge>();
    const std::string name = unique_name();
    auto pool =
        std::make_unique<pg::Pool>(bridge->get_executor(), settings("application_name=" + name), std::size_t{4});
    const auto sleeping = [&]() -> awaitable<void> {
      auto lease = co_await pool->acquire();
      co_await lease->query("select pg_sleep(60)");
    };
    const auto in_transaction = [&]() -> awaitable<void> {
      auto lease = co_await pool->acquire();
      co_await lease->transaction(insert_and_sleep);
    };
    const auto busy = [&]() -> awaitable<void> {
      auto lease = co_await pool->acquire();
      for (;;) co_await lease->query("select $1::text", large);
    };
    const Table table(observer);
    std::list<JoinHandle<void>> calls;
    calls.push_back(bridge->submit(sleeping));
    calls.push_back(bridge->submit(in_transaction));
    for (int i = 0; i < 6; ++i) calls.push_back(bridge->submit(busy));
    if (round % 2 == 0) {
      std::this_thread::sleep_for(std::chrono::milliseconds(round * 3));  // in any state
    } else {
      await_statements(observer, name, "select pg_sleep(60)", 2);
      calls.front().request_stop();  // now its cancel request is under way
    }
    const auto start = steady_clock::now();
    CHECK_FALSE(bridge->shutdown(runtime_bridge::Shutdown::drain, 0ms));
    CHECK(steady_clock::now() - start < 1s);
    for (auto& call : calls) CHECK_FALSE(call.join().has_value());
    pool.reset();
    (void)unwrap(
        observer.execute("select pg_terminate_backend(pid) from pg_stat_activity where application_name = $1", name));
  }
  await_state(
      [&] { return descriptors_of_this_process() == descriptors; });  // the last cancel request may be under way
}

TEST_CASE("pg: a statement on a stopped bridge fails and does not loop") {
  Database db;
  asio::thread_pool elsewhere(1);
  std::promise<void> stopped;
  std::atomic<bool> started{false};
  std::string came_to;
  const auto task = [&]() -> awaitable<void> {
    co_await asio::this_coro::reset_cancellation_state(asio::disable_cancellation());
    auto lease = co_await db.pool.acquire();
    const auto block = [&]() -> awaitable<void> {
      started = true;
      stopped.get_future().wait();
      co_return;
    };
    co_await asio::co_spawn(elsewhere, block, use_awaitable);
    try {
      co_await lease->query("select pg_sleep(60)");
    } catch (const pg::Error&) {
      came_to = failure(std::current_exception());
    }
  };
  JoinHandle<void> call = db.bridge.submit(task);
  JoinHandle<void> parked = db.bridge.submit(park_stubbornly());
  await_state([&] { return started.load(); });
  const std::jthread back_from_elsewhere([&] {
    await_state([&] { return parked.done(); });  // the bridge has destroyed what waits on its own context
    stopped.set_value();
  });
  CHECK_FALSE(db.bridge.shutdown(runtime_bridge::Shutdown::drain, 0ms));
  CHECK(came_to == "connection");
}

TEST_CASE("pg: leases may outlive their pool") {
  RuntimeBridge bridge;
  auto pool = std::make_optional<pg::Pool>(bridge.get_executor(), settings(), 2);
  const auto task = [&]() -> awaitable<int> {
    auto lease = co_await pool->acquire();
    bool begun = false;
    JoinHandle<void> other = bridge.submit([&]() -> awaitable<void> {
      begun = true;
      auto second = co_await pool->acquire();
      co_await second->query("select pg_sleep(0.05)");
    });
    while (!begun) co_await asio::post(use_awaitable);
    co_await lease->query("select 1");
    pool.reset();
    while (!other.done()) co_await asio::post(use_awaitable);
    const pg::Result result = co_await lease->query("select 7");
    co_return result.get<int>(0, 0);
  };
  CHECK(bridge.block_on(task) == 7);
}

TEST_CASE("pg: a pool survives a restart of its server") {
  const std::string serve = environment("RUNTIME_BRIDGE_SERVE");
  REQUIRE_FALSE(serve.empty());
  Database db(4);
  std::list<JoinHandle<int>> calls;
  for (int i = 0; i < 3; ++i) {
    calls.push_back(db.bridge.submit([&]() -> awaitable<int> {
      auto lease = co_await db.pool.acquire();
      co_return co_await sleep_long(*lease);
    }));
  }
  await_statements(db, db.name, "select pg_sleep(60)", 3);  // uses the fourth connection, which is idle afterwards
  REQUIRE(std::system((serve + " postgres --restart").c_str()) == 0);
  for (auto& call : calls) CHECK(failure(call.join()).starts_with("connection"));
  for (int i = 0; i < 8; ++i) CHECK(db.select<int>("select 1") == 1);
}

TEST_CASE("pg: a forked child leaves its parent's connections alone", "[child]") {
  auto db = std::make_unique<Database>(2);
  const int pid = db->pid().value();
  CHECK(in_child_process([&] {
          const bool refused = outcome(db->pid()) == worker_dead;
          db.reset();
          return refused ? 0 : 1;
        }) == 0);
  CHECK(db->pid() == pid);
}
