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
#include <asio/ip/v6_only.hpp>
#include <asio/read.hpp>
#include <asio/thread_pool.hpp>
#include <asio/write.hpp>
#include <atomic>
#include <cmath>
#include <csignal>
#include <cstdint>
#include <cstdlib>
#include <functional>
#include <future>
#include <limits>
#include <list>
#include <memory>
#include <optional>
#include <set>
#include <stdexcept>
#include <string>
#include <string_view>
#include <system_error>
#include <vector>

#include "support.hpp"
#include "support/pg.hpp"

#define Outcome BackendOutcome  // support.hpp has another one
#include "support/pg_backend.hpp"
#undef Outcome

#ifdef HAS_OPENSSL
#include <openssl/evp.h>
#include <openssl/ssl.h>
#include <openssl/x509.h>
#endif

#ifdef HAS_OPENSSL
/// Replaces OpenSSL's. Newer versions of libpq ask it for what is left in a record; this makes each like the older
/// ones.
extern "C" int SSL_pending(const SSL*) { return 0; }
#endif

#ifdef SANITIZED
extern "C" std::size_t __sanitizer_get_current_allocated_bytes();
#else
#include <malloc.h>
#endif

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

pg::Settings settings(std::string conninfo = {}) { return {std::move(conninfo)}; }

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
  static constexpr std::array kinds{"statement", "connection", "commit_unknown", "timeout",
                                    "closed",    "invalid",    "decode"};
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

  std::string port() const { return std::to_string(acceptor_.local_endpoint().port()); }
  std::string conninfo(const std::string& sslmode = "disable") const {
    return "host=127.0.0.1 sslmode=" + sslmode + " gssencmode=disable user=nobody dbname=none port=" + port();
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

  static std::string message(char type, const std::string& body) {
    const std::uint32_t length = htonl(static_cast<std::uint32_t>(body.size() + 4));
    return type + std::string(reinterpret_cast<const char*>(&length), sizeof length) + body;
  }

  static void send(asio::ip::tcp::socket& peer, char type, const std::string& body) {
    asio::write(peer, asio::buffer(message(type, body)));
  }

  /// Reads one statement and answers it: with an error if there is an SQLSTATE.
  static void answer(asio::ip::tcp::socket& peer, const std::string& tag, char status,
                     const std::string& sqlstate = {}) {
    std::array<char, 4096> statement{};
    peer.read_some(asio::buffer(statement));
    const std::string end(1, '\0');
    const std::string done =
        sqlstate.empty() ? message('1', "") + message('2', "") + message('n', "") + message('C', tag + end)
                         : message('E', "SERROR" + end + "VERROR" + end + "C" + sqlstate + end + "Mno" + end + end);
    asio::write(peer, asio::buffer(done + message('Z', std::string(1, status))));
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

std::size_t allocated_bytes() {
#ifdef SANITIZED
  return __sanitizer_get_current_allocated_bytes();
#else
  return mallinfo2().uordblks + mallinfo2().hblkhd;
#endif
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

TEST_CASE("pg: a text with a NUL is refused before anything is sent") {
  Database db;
  (void)unwrap(db.execute("create temp table numbers as select generate_series(1, 3) as n"));
  CHECK(failure(db.select<std::string>("select $1", std::string("a\0b", 3))) == "invalid");
  CHECK(failure(db.execute(std::string("delete from numbers\0 where n = 1", 32))) == "invalid");
  CHECK(db.select<int>("select count(*)::int from numbers") == 3);

  Database cut(1, settings(std::string("application_name=a\0 dbname=no_such_database", 42)));
  CHECK(failure(cut.pid()) == "invalid");
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
      } catch (const pg::Error&) {
        found.push_back(failure(std::current_exception()));
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
    attempt([&] { (void)result.get<pg::Bytes>(0, 2); });    // would lose backslashes
    attempt([&] { (void)result.get<std::int8_t>(1, 0); });  // 300
    attempt([&] { (void)result.get<std::int16_t>(1, 0); });
    co_return found;
  };
  std::vector<std::string> expected(11, "decode");
  expected.front() = "2 x 3";
  expected.emplace_back("value");
  CHECK(db.with_connection(task).value() == expected);
}

TEST_CASE("pg: unusual values") {
  Database db;
  CHECK(std::isnan(db.select<double>("select $1::float8", std::numeric_limits<double>::quiet_NaN()).value()));
  for (const double infinity : {HUGE_VAL, -HUGE_VAL}) {
    CHECK(db.select<double>("select $1::float8", infinity) == infinity);
    CHECK(db.select<double>("select $1::numeric", infinity) == infinity);
  }
  CHECK(failure(db.select<double>("select 1e400::numeric")) == "decode");
  CHECK(failure(db.select<float>("select 1e39::float8")) == "decode");
  CHECK(db.select<pg::Bytes>("select ''::bytea").value().value.empty());
  CHECK(db.select<pg::Bytes>("select 'a\\\\b\\000c'::bytea").value().value == std::string("a\\b\0c", 5));
  CHECK(failure(db.select<int>("")) == "decode");
  CHECK(db.execute("") == 0);
  CHECK(db.execute("-- only a comment") == 0);
  CHECK(failure(db.execute("create temp table a (); create temp table b ()")) == "statement 42601");
  CHECK(db.select<bool>("select to_regclass('pg_temp.a') is null") == true);
}

TEST_CASE("pg: what the server would not accept for its size is not sent") {
  Database db;
  const int pid = db.pid().value();
  std::string large(std::size_t{1} << 30, ' ');
  CHECK(failure(db.execute("select $1", large)) == "invalid");
  const auto statement = [&](pg::Connection& connection) -> awaitable<int> {
    co_await connection.query(std::move(large));
    co_return 0;
  };
  CHECK(failure(db.with_connection(statement)) == "invalid");
  CHECK(db.pid() == pid);
}

TEST_CASE("pg: settings may be written in place") {
  RuntimeBridge bridge;
  const auto task = [&]() -> awaitable<std::string> {
    const auto connection =
        co_await pg::Connection::open(bridge.get_executor(), {"application_name=longer_than_the_small_string"});
    const pg::Result result = co_await connection->query("select current_setting('application_name')");
    co_return result.get<std::string>(0, 0);
  };
  CHECK(bridge.block_on(task) == "longer_than_the_small_string");
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

#ifdef HAS_OPENSSL
namespace {

/// The server's side of TLS, with a certificate of its own.
std::shared_ptr<SSL_CTX> tls_context() {
  const std::unique_ptr<EVP_PKEY, void (*)(EVP_PKEY*)> key(EVP_EC_gen("P-256"), EVP_PKEY_free);
  const std::unique_ptr<X509, void (*)(X509*)> certificate(X509_new(), X509_free);
  X509_gmtime_adj(X509_getm_notBefore(certificate.get()), 0);
  X509_gmtime_adj(X509_getm_notAfter(certificate.get()), 3600);
  X509_set_pubkey(certificate.get(), key.get());
  X509_sign(certificate.get(), key.get(), EVP_sha256());
  const std::shared_ptr<SSL_CTX> context(SSL_CTX_new(TLS_server_method()), SSL_CTX_free);
  SSL_CTX_use_certificate(context.get(), certificate.get());
  SSL_CTX_use_PrivateKey(context.get(), key.get());
  return context;
}

class TlsPeer {
 public:
  TlsPeer(const std::shared_ptr<SSL_CTX>& context, asio::ip::tcp::socket socket)
      : socket_(std::move(socket)), tls_(SSL_new(context.get()), SSL_free) {
    std::array<char, 8> request{};  // SSLRequest
    asio::read(socket_, asio::buffer(request));
    asio::write(socket_, asio::buffer("S", 1));
    SSL_set_fd(tls_.get(), socket_.native_handle());
    if (SSL_accept(tls_.get()) != 1) throw std::runtime_error("no TLS");
  }

  std::string read() {
    std::string text(4096, '\0');
    const int length = SSL_read(tls_.get(), text.data(), static_cast<int>(text.size()));
    if (length <= 0) throw std::runtime_error("the client has hung up");
    text.resize(static_cast<std::size_t>(length));
    return text;
  }

  /// In records of this size.
  void write(std::string_view text, std::size_t record) {
    for (; !text.empty(); text.remove_prefix(std::min(record, text.size())))
      SSL_write(tls_.get(), text.data(), static_cast<int>(std::min(record, text.size())));
  }

 private:
  asio::ip::tcp::socket socket_;
  std::unique_ptr<SSL, void (*)(SSL*)> tls_;
};

/// A result of one text column.
std::string answer_of_rows(std::size_t rows, std::size_t size) {
  const auto message = FakeServer::message;
  const auto number = [](std::size_t value, int bytes) {
    std::string text;
    while (bytes-- > 0) text += static_cast<char>(value >> (8 * bytes));
    return text;
  };
  std::string text = message('1', "") + message('2', "") +
                     message('T', number(1, 2) + std::string("x\0", 2) + number(0, 6) + number(25, 4) +
                                      number(0xffff, 2) + number(0xffffffff, 4) + number(0, 2));
  for (std::size_t i = 0; i < rows; ++i) text += message('D', number(1, 2) + number(size, 4) + std::string(size, 'x'));
  return text + message('C', std::string("SELECT\0", 7)) + message('Z', "I");
}

}  // namespace

TEST_CASE("pg: rows of any size over TLS, in records of any size") {
  struct Shape {
    std::size_t rows, size, record;
  };
  std::vector<Shape> shapes;
  for (const std::size_t record : {1000, 10'000, 16'384}) {
    for (std::size_t rows = 1; rows < 32; rows += 3) shapes.push_back({rows, 3000, record});
    for (std::size_t size = 1; size < 300'000; size = size * 2 + 1) shapes.push_back({1, size, record});
    shapes.push_back({2, 10'000'000, record});
  }
  shapes.insert(shapes.end(), 30, {16, 3000, 16'384});  // part of the last record stays in the TLS library
  FakeServer server;
  server.play([&](FakeServer& self) {
    const std::shared_ptr<SSL_CTX> context = tls_context();
    for (const Shape& shape : shapes) {
      TlsPeer peer(context, self.accept());
      peer.read();
      std::string greeting = FakeServer::message('R', std::string(4, '\0'));
      for (std::size_t i = 0; i < shape.rows; ++i)
        greeting += FakeServer::message('S', std::to_string(i) + std::string(1, '\0') + std::string(997, 'x') + '\0');
      peer.write(greeting + FakeServer::message('K', std::string(8, '\1')) + FakeServer::message('Z', "I"),
                 shape.record);
      peer.read();
      peer.write(answer_of_rows(shape.rows, shape.size), shape.record);
      peer.read();  // Terminate
    }
  });
  {
    RuntimeBridge bridge;
    std::vector<std::string> failures;
    std::size_t slow = 0;
    for (const Shape& shape : shapes) {
      // libpq's buffer only grows, so each shape has a connection of its own.
      const auto task = [&]() -> awaitable<bool> {
        const auto connection = co_await pg::Connection::open(bridge.get_executor(), {server.conninfo("require")});
        const auto start = steady_clock::now();
        const pg::Result result = co_await connection->query("-");
        if (steady_clock::now() - start > 90ms) ++slow;
        bool whole = result.rows() == static_cast<int>(shape.rows);
        for (int row = 0; whole && row < result.rows(); ++row)
          whole = result.get<std::string>(row, 0).size() == shape.size;
        co_return whole;
      };
      const auto whole = bridge.block_on_for(task, 8s);
      if (whole != true)
        failures.push_back(std::to_string(shape.rows) + " rows of " + std::to_string(shape.size) + " in records of " +
                           std::to_string(shape.record) + ": " + failure(whole));
    }
    CHECK(failures == std::vector<std::string>());
    CHECK(slow < 20);  // it is not found by looking again
  }
  server.join();
}
#endif

// ---------------------------------------------------------------------------------------------------------------------
// What comes unasked

TEST_CASE("pg: notifications and notices do not pile up") {
  Database db;
  (void)unwrap(db.execute("listen x"));
  const auto task = [](pg::Connection& connection) -> awaitable<std::size_t> {
    std::size_t most = 0;
    for (int i = 0; i < 3; ++i) {
      const std::size_t before = allocated_bytes();
      co_await connection.query(
          "select count(pg_notify('x', repeat('y', 7000) || g || $1)) from generate_series(1, 2000) g", i);
      co_await connection.query(
          "do 'begin for i in 1..2000 loop raise notice ''%'', repeat(''z'', 7000); end loop; end'");
      most = std::max(most, allocated_bytes() - std::min(allocated_bytes(), before));
    }
    co_return most;
  };
  CHECK(db.with_connection(task).value() < std::size_t{1} << 20);
}

TEST_CASE("pg: notifications reach their callback while a statement runs") {
  FakeServer server;
  std::atomic<int> notified{0};
  server.play([&](FakeServer& self) {
    asio::ip::tcp::socket peer = self.accept_session();
    for (int i = 0; i < 100; ++i) FakeServer::send(peer, 'A', std::string("\0\0\0\7x\0y\0", 8));
    await_state([&] { return notified == 100; });
    FakeServer::answer(peer, "DONE", 'I');
    FakeServer::read_all(peer);
  });
  {
    pg::Settings how = settings(server.conninfo());
    how.on_notification = [&](const pg::Notification& notification) {
      if (notification.channel == "x" && notification.payload == "y" && notification.backend_pid == 7) ++notified;
      throw std::runtime_error("dropped");
    };
    Database db(1, how);
    CHECK(db.execute("-") == 0);
  }
  server.join();
}

TEST_CASE("pg: notifications for an idle connection, and notices") {
  std::vector<std::string> seen;
  pg::Settings how = settings();
  how.on_notification = [&](const pg::Notification& notification) { seen.emplace_back(notification.payload); };
  how.on_notice = [&](const pg::Error& notice) {
    seen.push_back(notice.severity() + " " + notice.sqlstate() + " " + notice.what());
    throw std::runtime_error("dropped");
  };
  Database db(1, how);
  Database other;
  CHECK(db.execute("listen x") == 0);
  const std::string arrival =
      "select count(*)::int from pg_stat_activity where application_name = $1 and wait_event = 'ClientRead'";
  (void)unwrap(other.execute("notify x, 'hello'"));
  await_state([&] { return unwrap(other.select<int>(arrival, db.name)) == 1; });
  CHECK(db.execute("do 'begin raise warning ''careful''; end'") == 0);
  CHECK(seen == std::vector<std::string>{"hello", "WARNING 01000 WARNING: careful"});
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

TEST_CASE("pg: a host that does not answer costs its own time only") {
  const FakeServer silent, silent_too;
  const std::string ports = silent.port() + "," + silent_too.port() + "," + environment("PGPORT");
  const auto connect = [](const std::string& conninfo) {
    pg::Settings how = settings(conninfo);
    how.connect_timeout = 50ms;
    Database db(1, how);
    const std::size_t descriptors = descriptors_of_this_process();
    const auto result = db.select<int>("select inet_server_port()");
    CHECK(descriptors_of_this_process() == descriptors + (result.has_value() ? 1 : 0));
    return result.has_value() ? std::to_string(*result) : failure(result) + ": " + what(result.error().cause());
  };
  const std::string three = "host=127.0.0.1,127.0.0.1,127.0.0.1 port=" + ports;
  const std::string silence = "127.0.0.1:" + silent.port() + " did not answer in time; 127.0.0.1:" + silent_too.port() +
                              " did not answer in time";
  CHECK(connect(three) == environment("PGPORT"));
  CHECK(connect("host=a,b,c hostaddr=127.0.0.1,127.0.0.1,127.0.0.1 port=" + ports) == environment("PGPORT"));
  CHECK(connect("host=a,127.0.0.1,c hostaddr=127.0.0.1,,127.0.0.1 port=" + ports) == environment("PGPORT"));
  CHECK(connect("host=localhost,127.0.0.1,127.0.0.1 port=" + ports) == environment("PGPORT"));
  // A standby is wanted first, so libpq must get the whole list.
  CHECK(connect(three + " target_session_attrs=prefer-standby") == environment("PGPORT"));
  CHECK(connect(three + " target_session_attrs=standby")
            .starts_with("connection: " + silence + "; connection to server"));
  CHECK(connect("host=127.0.0.1,127.0.0.1 port=" + silent.port() + "," + silent_too.port()) == "timeout: " + silence);
}

TEST_CASE("pg: an address that does not answer leaves time for the other addresses of its name") {
  asio::io_context context;
  const auto port = static_cast<std::uint16_t>(std::stoi(environment("PGPORT")));
  asio::ip::tcp::acceptor silent(context);
  std::error_code unavailable;
  const asio::ip::tcp::endpoint six(asio::ip::address_v6::loopback(), port);
  silent.open(six.protocol(), unavailable);
  silent.set_option(asio::ip::v6_only(true), unavailable);
  silent.bind(six, unavailable);
  silent.listen(8, unavailable);
  if (unavailable) WARN("skipped: no IPv6 here");
  pg::Settings how = settings("host=localhost");
  how.connect_timeout = 50ms;
  Database db(1, how);
  CHECK(db.select<int>("select inet_server_port()") == port);
}

TEST_CASE("pg: connect_timeout in the connection string takes precedence") {
  const FakeServer silent;
  pg::Settings how = settings(silent.conninfo() + " connect_timeout=0");  // no limit
  how.connect_timeout = 0ms;
  Database endless(1, how);
  const auto start = steady_clock::now();
  const auto late = [&]() -> awaitable<void> { (void)co_await endless.pool.acquire(start + 100ms); };
  CHECK(failure(endless.bridge.block_on(late)) == "timeout");
  CHECK(steady_clock::now() >= start + 100ms);

  how = settings(silent.conninfo() + " connect_timeout=1");  // which means 2
  how.connect_timeout = 1h;
  Database limited(1, how);
  CHECK(failure(limited.pid()) == "timeout");
  Database wrong(1, settings(silent.conninfo() + " connect_timeout=soon"));
  CHECK(failure(wrong.pid()) == "invalid");
}

TEST_CASE("pg: the longest durations are no limit, and zero and less are now") {
  using std::chrono::milliseconds;
  pg::Settings how = settings();
  how.connect_timeout = how.cancel_timeout = milliseconds::max();
  Database db(1, how);
  const int pid = db.pid().value();
  CHECK(failure(db.interrupted(sleep_long)) == "aborted");
  CHECK(db.pid() == pid);
  const auto acquire = [&](pg::Clock::time_point deadline) {
    return failure(db.bridge.block_on([&]() -> awaitable<void> {
      const auto held = co_await db.pool.acquire(pg::no_deadline);
      (void)co_await db.pool.acquire(deadline);
    }));
  };
  CHECK(acquire(pg::Clock::now()) == "timeout");
  CHECK(acquire(pg::Clock::time_point::min()) == "timeout");

  for (const milliseconds now : {milliseconds(0), milliseconds(-1), milliseconds::min()}) {
    how.cancel_timeout = now;
    how.connect_timeout = 10s;
    Database impatient(1, how);
    const int first = impatient.pid().value();
    CHECK(failure(impatient.interrupted(sleep_long)) == "aborted");
    CHECK(impatient.pid().value() != first);
    how.connect_timeout = now;
    Database closed(1, how);
    CHECK(failure(closed.pid()) == "timeout");
  }

  const PgClient client(settings(), 1, milliseconds::max());
  CHECK(client.run("select 1").value_or(false));
  const PgClient none(settings(), 1, milliseconds::zero());
  CHECK(none.run("select 1").error().kind == BackendError::TimedOut);
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
        second = failure(std::current_exception()) + ": " + e.what();
      }
    };
    asio::co_spawn(db.bridge.get_executor(), intrude, asio::detached);
    const pg::Result result = co_await connection.query("select 'first' from pg_sleep(0.05)");
    co_return result.get<std::string>(0, 0) + ", " + second;
  };
  CHECK(db.with_connection(task) == "first, invalid: another command is already in progress");
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

TEST_CASE("pg: a cancel request that the server gets before the statement is repeated") {
  FakeServer server;
  std::atomic<int> requests{0};
  server.play([&](FakeServer& self) {
    asio::ip::tcp::socket peer = self.accept_session();
    for (; requests < 3; ++requests) (void)self.accept();
    FakeServer::answer(peer, "", 'I', "57014");
    FakeServer::read_all(peer);
  });
  {
    pg::Settings how = settings(server.conninfo());
    how.cancel_timeout = 1h;
    Database db(1, how);
    CHECK(failure(db.interrupted(sleep_long)) == "aborted");
    CHECK(requests == 3);
  }
  server.join();
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

TEST_CASE("pg: a transaction in a transaction is a savepoint") {
  Database db;
  Table table(db);
  const int pid = db.pid().value();
  const auto outcome_of_outer = [&](auto body) {
    (void)unwrap(db.execute("truncate " + table_name));
    const auto task = [&](pg::Connection& connection) { return connection.transaction(body); };
    const std::string ended = failure(db.with_connection(task));
    return ended + ", " + std::to_string(table.count()) + " rows";
  };
  const auto outer_fails = [](pg::Connection& connection) -> awaitable<void> {
    co_await connection.transaction(insert_one);
    throw std::runtime_error("outer");
  };
  CHECK(outcome_of_outer(outer_fails) == "outer, 0 rows");

  const auto inner_fail = [](pg::Connection& connection) -> awaitable<void> {
    co_await insert_one(connection);
    for (const auto inner : {insert_and_throw, insert_and_swallow}) {
      try {
        co_await connection.transaction(inner);
      } catch (const std::exception&) {
      }
    }
    co_await connection.transaction(insert_one);
  };
  CHECK(outcome_of_outer(inner_fail) == "value, 2 rows");

  const auto deep = [](pg::Connection& connection) -> awaitable<void> {
    const auto middle = [](pg::Connection& inside) -> awaitable<void> {
      co_await inside.transaction(insert_one);
      co_await inside.transaction(insert_one);
      throw std::runtime_error("middle");
    };
    co_await insert_one(connection);
    try {
      co_await connection.transaction(middle);
    } catch (const std::runtime_error&) {
    }
  };
  CHECK(outcome_of_outer(deep) == "value, 1 rows");

  const auto after_a_failure = [](pg::Connection& connection) -> awaitable<void> {
    co_await insert_and_swallow(connection);
    co_await connection.transaction(insert_one);
  };
  CHECK(outcome_of_outer(after_a_failure) == "statement 25P02, 0 rows");

  std::string inner;
  const auto cancelled = [&](pg::Connection& connection) -> awaitable<void> {
    co_await insert_one(connection);
    try {
      co_await connection.transaction(insert_and_sleep);
    } catch (const std::system_error&) {
      inner = failure(std::current_exception());
    }
    co_await asio::this_coro::reset_cancellation_state();
    co_await asio::this_coro::throw_if_cancelled(false);
    co_await insert_one(connection);
  };
  (void)unwrap(db.execute("truncate " + table_name));
  const auto late = [&](pg::Connection& connection) { return connection.transaction(cancelled); };
  CHECK(failure(db.with_connection(late, 100ms)) == "value");
  CHECK(inner == "aborted");
  CHECK(table.count() == 2);

  const auto in_ones_own = [](pg::Connection& connection) -> awaitable<void> {
    co_await connection.query("begin");
    co_await connection.transaction(insert_one);
    co_await connection.query("rollback");
  };
  CHECK(failure(db.with_connection(in_ones_own)) == "value");
  CHECK(table.count() == 2);
  CHECK(db.pid() == pid);
}

TEST_CASE("pg: failed transactions in a transaction leave no savepoint") {
  Database db;
  Table table(db);
  const auto body = [](pg::Connection& connection) -> awaitable<void> {
    try {
      co_await connection.transaction(insert_and_throw);
    } catch (const std::runtime_error&) {
    }
    co_await connection.query("rollback to pg_hpp_1");
  };
  const auto task = [&](pg::Connection& connection) { return connection.transaction(body); };
  CHECK(failure(db.with_connection(task)) == "statement 3B001");
}

TEST_CASE("pg: a session that the server ends inside a transaction") {
  Database observer;
  Database db;
  Table table(observer);
  const auto body = [&](pg::Connection& connection) -> awaitable<void> {
    co_await connection.query("set local idle_in_transaction_session_timeout = 1");
    co_await insert_one(connection);
    await_end_of(observer, connection.backend_pid());
    co_await insert_one(connection);
  };
  const auto task = [&](pg::Connection& connection) { return connection.transaction(body); };
  CHECK(failure(db.with_connection(task)) == "connection 25P03");
  CHECK(db.select<int>("select 1") == 1);
  CHECK(table.count() == 0);
}

TEST_CASE("pg: a transaction that its body ends is neither called committed nor unchanged") {
  Database db;
  Table table(db);
  const int pid = db.pid().value();
  const auto with = [&](std::string sql, bool nested, bool throws) {
    const auto body = [&](pg::Connection& connection) -> awaitable<void> {
      co_await insert_one(connection);
      co_await connection.query("savepoint one");
      co_await connection.query(sql);
      co_await insert_one(connection);
      if (throws) co_await connection.query("nonsense");
    };
    const auto outer = [&](pg::Connection& connection) -> awaitable<void> { co_await connection.transaction(body); };
    const auto task = [&](pg::Connection& connection) -> awaitable<void> {
      if (nested) {
        co_await connection.transaction(outer);
      } else {
        co_await connection.transaction(body);
      }
    };
    return failure(db.with_connection(task));
  };
  for (const bool nested : {false, true}) {
    for (const bool throws : {false, true}) {
      for (const char* end : {"commit", "END", "rollback", "commit and chain", "ROLLBACK AND CHAIN"}) {
        INFO(end);
        CHECK(with(end, nested, throws) == "commit_unknown");
      }
      CHECK(with("rollback to one", nested, throws) == (throws ? "statement 42601" : "value"));
      CHECK(with("begin", nested, throws) == (throws ? "statement 42601" : "value"));  // a warning
    }
  }
  CHECK(db.pid() == pid);
}

TEST_CASE("pg: the outcomes of a change can be told apart") {
  const auto kind = [](const auto& result) { return result ? -1 : static_cast<int>(result.error().kind); };
  SECTION("by the server") {
    Database db;
    Table table(db);
    (void)unwrap(db.execute("alter table " + table_name + " add unique (n) deferrable initially deferred"));
    const PgClient client(settings(), 1, 1h);
    const auto twice = [](pg::Connection& connection) -> awaitable<int> {
      co_await insert_one(connection);
      co_return co_await insert_one(connection);
    };
    CHECK(kind(client.transaction(twice)) == BackendError::Refused);
    CHECK(table.count() == 0);

    // Each of these made a change before it failed.
    const auto unreadable = [](pg::Connection& connection) -> awaitable<int> {
      const pg::Result result = co_await connection.query("insert into " + table_name + " values (1) returning null");
      co_return result.get<int>(0, 0);
    };
    CHECK(kind(client.call(unreadable)) == BackendError::BadAnswer);
    CHECK(table.count() == 1);
    const auto one_of_two = [](pg::Connection& connection) -> awaitable<int> {
      co_await connection.query("insert into " + table_name + " values (2)");
      co_return co_await insert_one(connection);
    };
    CHECK(kind(client.call(one_of_two)) == BackendError::PartlyDone);
    CHECK(table.count() == 2);
    const auto ended = [](pg::Connection& connection) -> awaitable<int> {
      co_await connection.query("insert into " + table_name + " values (3)");
      co_await connection.query("commit");
      co_return co_await insert_one(connection);
    };
    CHECK(kind(client.transaction(ended)) == BackendError::CommitUnknown);
    CHECK(table.count() == 3);

    // And none of these.
    const auto fails = [](pg::Connection& connection) { return connection.transaction(insert_and_swallow); };
    CHECK(kind(client.call(fails)) == BackendError::Refused);
    CHECK(kind(client.run("select $1", std::string(1, '\0'))) == BackendError::Refused);
    const auto not_found = [](pg::Connection&) -> awaitable<int> {
      throw BackendException(BackendError::NotFound, "no such thing");
      co_return 0;
    };
    CHECK(kind(client.transaction(not_found)) == BackendError::NotFound);
    const auto own = [](pg::Connection&) -> awaitable<int> {
      throw std::invalid_argument("the caller's own");
      co_return 0;
    };
    CHECK(kind(client.transaction(own)) == BackendError::Failed);
  }
  SECTION("by the SQLSTATE") {
    for (const char* sqlstate : {"40003", "08006", "57P01", "40001"}) {
      const bool known = sqlstate == std::string_view("40001");
      FakeServer server;
      server.play([&](FakeServer& self) {
        asio::ip::tcp::socket peer = self.accept_session();
        FakeServer::answer(peer, "INSERT 0 1", 'I', sqlstate);
        FakeServer::answer(peer, "BEGIN", 'T');
        FakeServer::answer(peer, "INSERT 0 1", 'T');
        FakeServer::answer(peer, "COMMIT", 'I', sqlstate);
        FakeServer::read_all(peer);
      });
      {
        const PgClient client(settings(server.conninfo()), 1, 1h);
        CHECK(kind(client.run("insert")) == (known ? BackendError::Refused : BackendError::Unavailable));
        CHECK(kind(client.transaction(insert_one)) == (known ? BackendError::Refused : BackendError::CommitUnknown));
      }
      server.join();
    }
  }
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

TEST_CASE("pg: the last copy of a client may be destroyed on its worker, and by any other thread") {
  Database observer;
  const std::string name = unique_name();
  pg::Settings how = settings();
  how.conninfo += " application_name=" + name;
  auto client = std::make_unique<PgClient>(how, 2, 1h);
  const auto executor_of = [](pg::Connection&) -> awaitable<asio::any_io_executor> {
    co_return co_await asio::this_coro::executor;
  };
  asio::any_io_executor executor = client->call(executor_of).value();
  const std::string sessions = "select count(*) from pg_stat_activity where application_name = $1";
  CHECK(observer.select<int>(sessions, name) == 1);
  SECTION("on the worker") {
    asio::post(std::exchange(executor, {}), [owner = std::move(client)]() mutable { owner.reset(); });
  }
  SECTION("by another thread") {
    executor = {};
    std::thread([owner = std::move(client)]() mutable { owner.reset(); }).join();
  }
  SECTION("by the worker of another bridge") {
    executor = {};
    unwrap(observer.bridge.block_on([&] { client.reset(); }));
  }
  await_state([&] { return observer.select<int>(sessions, name) == 0; });
}

TEST_CASE("pg: a forked child closes what it has inherited, and its parent's sessions go on", "[child]") {
  Database observer;
  auto db = std::make_unique<Database>(2);
  const auto hold_two = [&]() -> awaitable<std::set<int>> {
    const auto a = co_await db->pool.acquire();
    const auto b = co_await db->pool.acquire();
    std::set<int> pids;
    pids.insert(a->backend_pid());
    pids.insert(b->backend_pid());
    co_return pids;
  };
  const auto before = db->bridge.block_on(hold_two);
  for (const bool destroys : {false, true}) {
    // One is idle, the other one runs a statement.
    (void)unwrap(observer.execute("select pg_advisory_lock(4711)"));
    auto call = db->bridge.submit([&]() -> awaitable<int> {
      const auto lease = co_await db->pool.acquire();
      const pg::Result result = co_await lease->query("select 7 from pg_advisory_xact_lock(4711)");
      co_return result.get<int>(0, 0);
    });
    await_statements(observer, db->name, "%pg_advisory_xact_lock%", 1);
    CHECK(in_child_process([&] {
            const std::size_t inherited = descriptors_of_this_process();
            const bool refused = outcome(db->pid()) == worker_dead;
            if (destroys) {
              db.reset();
            } else {
              db->pool.close();
            }
            return refused && descriptors_of_this_process() == inherited - 2 ? 0 : 1;
          }) == 0);
    (void)unwrap(observer.execute("select pg_advisory_unlock(4711)"));
    CHECK(call.join() == 7);
    CHECK(db->bridge.block_on(hold_two) == before.value());
  }
}
