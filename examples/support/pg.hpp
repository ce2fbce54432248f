// SPDX-License-Identifier: Apache-2.0
//
// PostgreSQL for Asio's coroutines: libpq's non-blocking interface, transactions, cancellation, and a connection pool.
// Needs C++20, standalone Asio >= 1.22.1 and libpq, but no other file of this project.

#ifndef RUNTIME_BRIDGE_EXAMPLES_PG_HPP
#define RUNTIME_BRIDGE_EXAMPLES_PG_HPP

#include <libpq-fe.h>
#include <poll.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <asio/any_io_executor.hpp>
#include <asio/awaitable.hpp>
#include <asio/error.hpp>
#include <asio/ip/address.hpp>
#include <asio/ip/tcp.hpp>
#include <asio/posix/stream_descriptor.hpp>
#include <asio/post.hpp>
#include <asio/redirect_error.hpp>
#include <asio/steady_timer.hpp>
#include <asio/this_coro.hpp>
#include <asio/use_awaitable.hpp>
#include <charconv>
#include <chrono>
#include <concepts>
#include <csignal>
#include <cstddef>
#include <deque>
#include <exception>
#include <functional>
#include <limits>
#include <memory>
#include <mutex>
#include <new>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <string_view>
#include <system_error>
#include <thread>
#include <type_traits>
#include <utility>
#include <vector>

/// *Threads.* Use a connection, a pool, and everything that they give out only on the thread that runs their executor.
/// Coroutines run concurrently there. Nothing blocks that thread except that libpq resolves host names with
/// `getaddrinfo`: if that may be slow, set `hostaddr` in the connection string.
///
/// *Cancellation.* It works as in Asio. A running statement is cancelled at the server, and its end is waited for. If
/// it ended before the cancellation, it returns its result; otherwise it throws `asio::error::operation_aborted` and
/// has changed nothing. If the server does not react within `Settings::cancel_timeout`, the connection is closed, and
/// a statement outside a transaction may have taken effect.
///
/// *Errors* are thrown as `pg::Error`.
///
/// *Time.* `max()` means no limit, zero and less mean now.
namespace pg {

using Clock = std::chrono::steady_clock;
inline constexpr Clock::time_point no_deadline = Clock::time_point::max();

inline Clock::time_point time_after(std::chrono::milliseconds wait) {
  using std::chrono::milliseconds;
  const Clock::time_point now = Clock::now();
  // The sum would overflow, and so would the comparison in nanoseconds.
  if (wait >= std::chrono::floor<milliseconds>(no_deadline - now)) return no_deadline;
  return now + std::max(wait, milliseconds::zero());
}

class Error;

/// Sent by NOTIFY to a session that has executed LISTEN.
struct Notification {
  std::string_view channel, payload;  ///< valid during the callback
  int backend_pid;
};

/// Not an aggregate: g++ 12 destroys temporary aggregates in a `co_await` expression twice.
struct Settings {
  Settings(std::string connection_string = {}) : conninfo(std::move(connection_string)) {}  // NOLINT: implicit

  std::string conninfo;  ///< libpq's connection string; defaults come from PGHOST, PGPORT, PGUSER, ...

  /// For each address of each host; then the next one is tried. The connection string's `connect_timeout` and
  /// PGCONNECT_TIMEOUT take precedence. They are in seconds, and as libpq documents them: 0 is no limit, 1 means 2.
  std::chrono::milliseconds connect_timeout{10'000};

  std::chrono::milliseconds cancel_timeout{2'000};  ///< for the server to cancel a statement or roll back

  /// These get what the server sends unasked, which is dropped without them. They are called during a statement, or
  /// when the connection is acquired from the pool. They must not use the connection. What they throw is dropped.
  std::function<void(const Notification&)> on_notification = {};
  std::function<void(const Error&)> on_notice = {};  ///< warnings, too
};

class Error : public std::runtime_error {
 public:
  enum Kind {
    statement,   ///< The server refused it. The connection can still be used.
    connection,  ///< There is no connection, or it was lost. Whether a statement outside a transaction took effect is
                 ///< unknown.
    commit_unknown,  ///< COMMIT has no answer, or the transaction's body ended the transaction itself: what it changed
                     ///< may have been committed.
    timeout,         ///< There was no connection before the deadline.
    closed,          ///< The pool was closed.
    invalid,         ///< It cannot be sent: a text with a NUL, or a second statement at the same time.
    decode,          ///< The statement has succeeded, but its result has no such value, or not of this type.
  };

  Error(Kind kind, std::string_view text, std::string sqlstate = {}, std::string severity = {})
      : std::runtime_error(text.empty() ? "the connection was closed during the statement" : one_line(text)),
        kind_(kind),
        sqlstate_(std::move(sqlstate)),
        severity_(std::move(severity)) {}

  Error(Kind kind, const PGresult* result)
      : Error(kind, text(result), field(result, PG_DIAG_SQLSTATE), field(result, PG_DIAG_SEVERITY_NONLOCALIZED)) {}

  [[nodiscard]] Kind kind() const noexcept { return kind_; }
  [[nodiscard]] bool connection_lost() const noexcept { return kind_ == connection || kind_ == commit_unknown; }

  /// True if the statement or transaction that failed has changed nothing.
  [[nodiscard]] bool unchanged() const noexcept {
    if (kind_ != statement) return kind_ == invalid || kind_ == timeout || kind_ == closed;
    // Lost connections behind a pooler or inside the server, an unknown completion, and shutdown.
    return !sqlstate_.starts_with("08") && sqlstate_ != "40003" && !sqlstate_.starts_with("57P0");
  }

  [[nodiscard]] const std::string& sqlstate() const noexcept { return sqlstate_; }  ///< empty for an error of libpq
  [[nodiscard]] const std::string& severity() const noexcept { return severity_; }  ///< ERROR, FATAL, PANIC, or empty

 private:
  static std::string field(const PGresult* result, int code) {
    const char* text = PQresultErrorField(result, code);
    return text == nullptr ? std::string() : text;
  }

  /// Not PQresultErrorMessage, which is made for terminals and quotes the statement.
  static std::string text(const PGresult* result) {
    const std::string message = field(result, PG_DIAG_MESSAGE_PRIMARY), detail = field(result, PG_DIAG_MESSAGE_DETAIL);
    if (message.empty()) return PQresultErrorMessage(result);  // an error of libpq, not of the server
    return field(result, PG_DIAG_SEVERITY) + ": " + message + (detail.empty() ? "" : "; ") + detail;
  }

  static std::string one_line(std::string_view text) {
    std::string line;
    for (const char c : text) {
      if (c == '\n') {
        line += "; ";
      } else if (c != '\t') {
        line += c;
      }
    }
    while (line.ends_with("; ")) line.resize(line.size() - 2);
    return line;
  }

  Kind kind_;
  std::string sqlstate_, severity_;
};

/// The value of a `bytea`. Not an aggregate: g++ 12 destroys temporary aggregates in a `co_await` expression twice.
class Bytes {
 public:
  explicit Bytes(std::string bytes) : value(std::move(bytes)) {}
  std::string value;
};

/// Copies of the values of $1, $2, ...: text, numbers or `Bytes`. `std::nullopt` and an empty optional are null.
class Parameters {
 public:
  /// Of a message. The server closes the connection if it gets 1 GiB.
  static constexpr std::size_t max_size = (std::size_t{1} << 30) - (std::size_t{1} << 20);

  template <class... Ts>
  explicit Parameters(const Ts&... values) {
    static_assert(sizeof...(values) <= 65535, "pg: too many parameters");
    values_.reserve(sizeof...(values));
    (add(values), ...);
  }

  /// Queues the statement and its parameters for sending. libpq copies them.
  [[nodiscard]] bool send(PGconn* connection, const std::string& sql) const {
    std::vector<const char*> data;
    std::vector<int> lengths, formats;
    for (const Value& value : values_) {
      data.push_back(value.data ? value.data->c_str() : nullptr);
      lengths.push_back(value.data ? static_cast<int>(value.data->size()) : 0);
      formats.push_back(value.binary ? 1 : 0);
    }
    return PQsendQueryParams(connection, sql.c_str(), static_cast<int>(data.size()), nullptr, data.data(),
                             lengths.data(), formats.data(), 0) == 1;
  }

 private:
  struct Value {
    std::optional<std::string> data;
    bool binary;
  };

  void add(std::nullopt_t) { values_.push_back({std::nullopt, false}); }
  void add(const Bytes& bytes) { add(bytes.value, true); }
  void add(std::string_view text) {
    // libpq would silently cut the text at the NUL.
    if (text.find('\0') != std::string_view::npos)
      throw Error(Error::invalid, "a text with a NUL character, which PostgreSQL does not support; use pg::Bytes");
    add(text, false);
  }
  void add(const std::string& text) { add(std::string_view(text)); }
  void add(const char* text) { add(std::string_view(text)); }

  template <class T>
  requires(std::is_arithmetic_v<T> && !std::same_as<T, char>) void add(T value) {
    if constexpr (std::same_as<T, bool>) {
      add(value ? "t" : "f");
    } else {
      std::string digits(64, '\0');
      digits.resize(static_cast<std::size_t>(std::to_chars(digits.data(), digits.data() + digits.size(), value).ptr -
                                             digits.data()));
      add(digits);
    }
  }

  template <class T>
  void add(const std::optional<T>& value) {
    if (value) {
      add(*value);
    } else {
      add(std::nullopt);
    }
  }

  void add(std::string_view data, bool binary) {
    if ((size_ += data.size()) >= max_size) throw Error(Error::invalid, "parameters of almost 1 GiB or more");
    values_.push_back({std::string(data), binary});
  }

  std::vector<Value> values_;
  std::size_t size_ = 0;
};

/// The result of a statement.
class Result {
 public:
  explicit Result(PGresult* result = nullptr) noexcept : result_(result, PQclear) {}

  [[nodiscard]] int rows() const noexcept { return PQntuples(result_.get()); }
  [[nodiscard]] int columns() const noexcept { return PQnfields(result_.get()); }
  [[nodiscard]] std::string_view command() const { return PQcmdStatus(result_.get()); }  ///< "UPDATE 1"

  /// The number of rows that an INSERT, UPDATE or DELETE changed, or that a SELECT returned.
  [[nodiscard]] long long affected() const {
    const std::string_view text = PQcmdTuples(result_.get());
    return text.empty() ? 0 : number<long long>(text);
  }

  [[nodiscard]] bool is_null(int row, int column) const {
    if (row < 0 || row >= rows() || column < 0 || column >= columns())
      throw Error(Error::decode, "no column " + std::to_string(column) + " of row " + std::to_string(row));
    return PQgetisnull(result_.get(), row, column) != 0;
  }

  /// A value as a `std::string`, number, bool or `Bytes`; use a `std::optional` of these if it may be null.
  template <class T>
  [[nodiscard]] T get(int row, int column) const {
    constexpr auto is_optional = []<class U>(std::type_identity<std::optional<U>>) { return true; };
    if constexpr (std::is_invocable_v<decltype(is_optional), std::type_identity<T>>) {
      if (is_null(row, column)) return std::nullopt;
      return get<typename T::value_type>(row, column);
    } else {
      if (is_null(row, column)) throw Error(Error::decode, "the value is null");
      const std::string_view text(PQgetvalue(result_.get(), row, column),
                                  static_cast<std::size_t>(PQgetlength(result_.get(), row, column)));
      if constexpr (std::same_as<T, std::string>) {
        return std::string(text);
      } else if constexpr (std::same_as<T, Bytes>) {
        constexpr Oid bytea = 17;  // anything else is not escaped
        if (PQftype(result_.get(), column) != bytea) throw Error(Error::decode, "the column is not a bytea");
        return bytes(text);
      } else if constexpr (std::same_as<T, bool>) {
        if (text != "t" && text != "f") throw Error(Error::decode, "not a boolean: " + std::string(text));
        return text == "t";
      } else {
        return number<T>(text);
      }
    }
  }

  [[nodiscard]] const PGresult* native() const noexcept { return result_.get(); }

  [[nodiscard]] bool failed() const noexcept {
    const ExecStatusType status = PQresultStatus(result_.get());
    return status != PGRES_COMMAND_OK && status != PGRES_TUPLES_OK && status != PGRES_EMPTY_QUERY;
  }

 private:
  template <class T>
  static T number(std::string_view text) {
    static_assert(std::is_arithmetic_v<T>, "pg: a value is a std::string, a number, a bool, pg::Bytes, or an optional");
    T value{};
    const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
    if (error != std::errc{} || end != text.data() + text.size())
      throw Error(Error::decode, "not a number of this type: " + std::string(text));
    return value;
  }

  static Bytes bytes(std::string_view text) {
    std::size_t size = 0;
    const std::unique_ptr<unsigned char, void (*)(void*)> decoded(
        PQunescapeBytea(reinterpret_cast<const unsigned char*>(text.data()), &size), PQfreemem);
    if (!decoded) throw std::bad_alloc();
    return Bytes(std::string(reinterpret_cast<const char*>(decoded.get()), size));
  }

  std::unique_ptr<PGresult, void (*)(PGresult*)> result_;
};

/// Sends cancel requests, one at a time, on a thread of its own, because `PQcancel` blocks, and for ever if the server
/// is frozen. The thread runs while there are requests to send. It is never joined, so it owns everything that it uses.
class Canceller : public std::enable_shared_from_this<Canceller> {
  struct Job {
    std::unique_ptr<PGcancel, void (*)(PGcancel*)> cancel;
    std::function<void()> notify;
  };

 public:
  /// A cancel request. After this is destroyed, the thread no longer calls `notify`.
  class Request {
   public:
    /// `notify` is called on the thread, once the server has the request or cannot be reached.
    Request(std::shared_ptr<Canceller> canceller, PGconn* connection, std::function<void()> notify)
        : canceller_(std::move(canceller)),
          job_(std::make_shared<Job>(Job{{PQgetCancel(connection), PQfreeCancel}, std::move(notify)})) {
      canceller_->send(job_);
    }
    Request(const Request&) = delete;
    Request& operator=(const Request&) = delete;
    ~Request() {
      const std::lock_guard lock(canceller_->mutex_);
      std::erase(canceller_->waiting_, job_);
      job_->notify = nullptr;
    }

    /// True if the request will not reach the server any more. A request that is still queued is withdrawn.
    bool over() {
      const std::lock_guard lock(canceller_->mutex_);
      std::erase(canceller_->waiting_, job_);
      return canceller_->sending_ != job_;
    }

   private:
    std::shared_ptr<Canceller> canceller_;
    std::shared_ptr<Job> job_;
  };

 private:
  void send(const std::shared_ptr<Job>& job) {
    const std::lock_guard lock(mutex_);
    if (!running_) std::thread([self = shared_from_this()] { self->run(); }).detach();
    running_ = true;
    waiting_.push_back(job);  // last: if anything above throws, the job must not be sent
  }

  void run() {
    sigset_t all;  // signals are for the program's own threads, and PQcancel may raise SIGPIPE
    sigfillset(&all);
    pthread_sigmask(SIG_BLOCK, &all, nullptr);

    std::unique_lock lock(mutex_);
    while (!waiting_.empty()) {
      sending_ = waiting_.front();
      waiting_.pop_front();
      lock.unlock();
      std::array<char, 256> error{};
      if (sending_->cancel) PQcancel(sending_->cancel.get(), error.data(), static_cast<int>(error.size()));
      lock.lock();
      // Notify under the lock, which ~Request takes: so the connection and its context still exist.
      const auto sent = std::exchange(sending_, nullptr);
      if (!sent->notify) continue;
      try {
        sent->notify();
      } catch (...) {  // no memory; the connection's wait has a timeout
      }
    }
    running_ = false;
  }

  std::mutex mutex_;
  std::deque<std::shared_ptr<Job>> waiting_;
  std::shared_ptr<Job> sending_;
  bool running_ = false;
};

/// A connection. Only one coroutine at a time may use it; a second one gets an error.
class Connection : public std::enable_shared_from_this<Connection> {
 public:
  /// Connects to the first host that accepts.
  static asio::awaitable<std::shared_ptr<Connection>> open(
      asio::any_io_executor executor, Settings settings, Clock::time_point deadline = no_deadline,
      std::shared_ptr<Canceller> canceller = std::make_shared<Canceller>()) {
    auto connection = std::make_shared<Connection>(std::move(executor), std::move(settings), std::move(canceller));
    co_await connection->connect(deadline);
    co_return connection;
  }

  /// Not connected yet: use `open`.
  Connection(asio::any_io_executor executor, Settings settings, std::shared_ptr<Canceller> canceller)
      : settings_(std::move(settings)),
        canceller_(std::move(canceller)),
        io_(std::make_unique<Io>(std::move(executor))) {}

  Connection(const Connection&) = delete;
  Connection& operator=(const Connection&) = delete;
  ~Connection() { close(); }

  /// Runs one statement with the parameters $1, $2, ... It copies its arguments, so they need not outlive the call.
  template <class... Ts>
  asio::awaitable<Result> query(std::string sql, const Ts&... parameters) {
    return run(std::move(sql), Parameters(parameters...), no_deadline, true);
  }

  /// Runs `body(connection)`, which returns an awaitable, between BEGIN and COMMIT. If it throws or is cancelled, the
  /// transaction is rolled back; if that fails, the connection is closed. Inside a transaction, it does the same with a
  /// savepoint. The body must not end the transaction itself: that is an error, of the kind `commit_unknown`. (With g++
  /// 12, do not pass a temporary lambda in a `co_await` expression: g++ 12 would destroy it twice.)
  template <class Body>
  std::invoke_result_t<Body&, Connection&> transaction(Body body) {
    using Value = typename std::invoke_result_t<Body&, Connection&>::value_type;
    std::conditional_t<std::is_void_v<Value>, bool, std::optional<Value>> value{};
    const std::string savepoint = in_transaction() ? "pg_hpp_" + std::to_string(++savepoints_) : std::string();
    const std::string begin = savepoint.empty() ? "begin" : "savepoint " + savepoint;
    co_await query(begin);
    const auto ended = ended_transactions_;
    std::exception_ptr failure;
    try {
      if constexpr (std::is_void_v<Value>) {
        co_await body(*this);
      } else {
        value.emplace(co_await body(*this));
      }
    } catch (...) {
      failure = std::current_exception();
    }
    const bool throws = co_await asio::this_coro::throw_if_cancelled();
    co_await asio::this_coro::throw_if_cancelled(false);
    if (ended_transactions_ != ended)
      failure = std::make_exception_ptr(Error(Error::commit_unknown, "the transaction's body has ended it itself"));
    // Its savepoint is gone, too.
    if (ended_transactions_ == ended || savepoint.empty()) failure = co_await end_transaction(savepoint, failure);
    co_await asio::this_coro::throw_if_cancelled(throws);
    if (failure) std::rethrow_exception(failure);
    if constexpr (!std::is_void_v<Value>) co_return std::move(*value);
  }

  /// True if no statement or transaction is in progress and the connection is not known to be lost.
  [[nodiscard]] bool idle() const noexcept {
    return is_open() && !io_->doomed && PQtransactionStatus(io_->libpq.get()) == PQTRANS_IDLE;
  }

  /// Like `idle`, but also checks whether the server has closed the connection.
  [[nodiscard]] bool usable() {
    if (!idle()) return false;
    while (is_open() && socket_readable()) {
      if (PQconsumeInput(io_->libpq.get()) == 0) close();
      hand_out_notifications();
    }
    return idle();
  }

  [[nodiscard]] bool is_open() const noexcept { return io_ && PQstatus(io_->libpq.get()) == CONNECTION_OK; }
  [[nodiscard]] int backend_pid() const noexcept { return PQbackendPID(io_->libpq.get()); }

  /// How many statements outside transactions, and how many transactions, have succeeded. If it does not grow, nothing
  /// was changed.
  [[nodiscard]] std::size_t completed() const noexcept { return completed_; }

  /// In a forked child, this closes the descriptor and nothing else: libpq would end the parent's session, and Asio
  /// would change the parent's epoll set or wait for its mutexes. What they own is leaked.
  void close() noexcept {
    if (!io_) return;
    if (getpid() == owner_) {
      release_socket();
      io_->libpq.reset();
      return;
    }
    const int inherited = PQsocket(io_->libpq.get());
    if (inherited >= 0) ::close(inherited);
    (void)io_.release();
  }

 private:
  friend class Pool;
  enum class Woken { ready, cancelled, late };

  /// Everything that a forked child must not touch.
  struct Io {
    explicit Io(asio::any_io_executor executor) : socket(executor), wake(executor), libpq(nullptr, PQfinish) {}

    asio::posix::stream_descriptor socket;
    asio::steady_timer wake;  // the coroutine waits for this: it expires at the deadline, and events cancel it
    std::unique_ptr<PGconn, void (*)(PGconn*)> libpq;
    Result result;  // of the current statement: its first error, else its last result
    bool sending = false, awaiting_read = false, awaiting_write = false;
    bool readable = false, event = false;  // events not handled yet
    bool doomed = false;                   // the server has announced that it will close the connection
    int wakes = 0, in_vain = 0;            // of the current statement
    unsigned sockets = 0;                  // counts them: an event of an earlier one may still be queued
  };

  void take_socket() { io_->socket.assign(PQsocket(io_->libpq.get())); }

  // libpq closes the descriptor.
  void release_socket() noexcept {
    if (io_->socket.is_open()) io_->socket.release();
    io_->awaiting_read = io_->awaiting_write = false;
    ++io_->sockets;
  }

  [[nodiscard]] bool socket_readable() const noexcept {
    pollfd server{PQsocket(io_->libpq.get()), POLLIN, 0};
    return poll(&server, 1, 0) > 0;
  }

  [[nodiscard]] bool encrypted() const noexcept {
    PGconn* const libpq = io_->libpq.get();
    return PQsslInUse(libpq) != 0 || PQgssEncInUse(libpq) != 0;
  }

  [[nodiscard]] bool in_transaction() const noexcept {
    const auto status = io_ ? PQtransactionStatus(io_->libpq.get()) : PQTRANS_UNKNOWN;
    return status == PQTRANS_INTRANS || status == PQTRANS_INERROR;
  }

  void notify() {
    io_->event = true;
    io_->wake.cancel();
  }

  void await(asio::posix::descriptor_base::wait_type direction, bool Io::*awaiting) {
    if (std::exchange(io_.get()->*awaiting, true)) return;
    const auto handler = [weak = weak_from_this(), number = io_->sockets, direction, awaiting](std::error_code error) {
      const auto self = weak.lock();
      if (!self || error == asio::error::operation_aborted || number != self->io_->sockets) return;
      self->io_.get()->*awaiting = false;
      if (direction == asio::posix::descriptor_base::wait_read) self->io_->readable = true;
      self->notify();
    };
    io_->socket.async_wait(direction, handler);
  }

  /// Waits for one of the requested events. Cancellation does not make it throw once it has started.
  asio::awaitable<Woken> wait(bool read, bool write, Clock::time_point until, bool heed_cancellation) {
    const auto cancellation = co_await asio::this_coro::cancellation_state;
    const bool looks_again = read && encrypted();
    if (read && !write && !looks_again && until == no_deadline && heed_cancellation) {
      // Only the socket can wake it, so it needs no timer.
      std::error_code error;
      if (cancellation.cancelled() == asio::cancellation_type::none)
        co_await io_->socket.async_wait(asio::posix::descriptor_base::wait_read,
                                        asio::redirect_error(asio::use_awaitable, error));
      if (cancellation.cancelled() != asio::cancellation_type::none) co_return Woken::cancelled;
      // After the context was shut down, every wait ends at once without an error.
      if (++io_->wakes > 16) io_->in_vain = socket_readable() ? 0 : io_->in_vain + 1;
      if (io_->in_vain == 3) co_return Woken::late;
      io_->readable = true;
      co_return Woken::ready;
    }
    if (read) await(asio::posix::descriptor_base::wait_read, &Io::awaiting_read);
    if (write) await(asio::posix::descriptor_base::wait_write, &Io::awaiting_write);
    // The TLS library may get the rest of a record while `collect` looks for it.
    const Clock::time_point look = looks_again ? std::min(until, time_after(std::chrono::milliseconds(100))) : until;
    for (;;) {
      if (heed_cancellation && cancellation.cancelled() != asio::cancellation_type::none) co_return Woken::cancelled;
      if (Clock::now() >= until) co_return Woken::late;
      if (Clock::now() >= look) io_->readable = io_->event = true;
      if (std::exchange(io_->event, false)) co_return Woken::ready;
      io_->wake.expires_at(look);
      std::error_code error;
      co_await io_->wake.async_wait(asio::redirect_error(asio::use_awaitable, error));
      if (!error && Clock::now() < look) co_return Woken::late;  // the context was shut down
    }
  }

  asio::awaitable<void> connect(Clock::time_point deadline) {
    if (settings_.conninfo.find('\0') != std::string::npos)
      throw Error(Error::invalid, "the connection string has a NUL character");
    start(PQconnectStart(settings_.conninfo.c_str()));
    std::string silent;  // about the addresses that did not answer
    while (co_await connect_unless_silent(deadline, silent) == Woken::late) {
      silent += std::string(PQhost(io_->libpq.get())) + ":" + PQport(io_->libpq.get()) + " did not answer in time; ";
      if (Clock::now() >= deadline || !start_without_this_address()) throw Error(Error::timeout, silent);
    }
    take_socket();
    if (PQsetnonblocking(io_->libpq.get(), 1) != 0) throw Error(Error::connection, PQerrorMessage(io_->libpq.get()));
  }

  void start(PGconn* libpq) {
    if (libpq == nullptr) throw std::bad_alloc();
    io_->libpq.reset(libpq);
    PQsetNoticeReceiver(libpq, take_notice, this);
  }

  /// Returns `ready` if there is a connection, `late` if an address took too long.
  asio::awaitable<Woken> connect_unless_silent(Clock::time_point deadline, const std::string& silent) {
    PGconn* const libpq = io_->libpq.get();
    auto next = PQstatus(libpq) == CONNECTION_BAD ? PGRES_POLLING_FAILED : PGRES_POLLING_WRITING;
    const auto limit = next == PGRES_POLLING_FAILED ? settings_.connect_timeout : limit_for_an_address();
    Clock::time_point until;
    std::string address;
    while (next != PGRES_POLLING_OK) {
      if (next == PGRES_POLLING_FAILED) throw Error(Error::connection, silent + PQerrorMessage(libpq));
      const std::string current = std::string(PQhost(libpq)) + " " + PQhostaddr(libpq) + " " + PQport(libpq);
      if (std::exchange(address, current) != current) until = std::min(deadline, time_after(limit));
      take_socket();
      const bool write = next == PGRES_POLLING_WRITING;
      const Woken woken = co_await wait(!write, write, until, true);
      if (woken == Woken::cancelled) throw std::system_error(asio::error::operation_aborted, "pg: connecting");
      release_socket();  // the next step may close the descriptor and open one for the next host
      if (woken == Woken::late) co_return woken;
      next = PQconnectPoll(libpq);
    }
    co_return Woken::ready;
  }

  using Options = std::unique_ptr<PQconninfoOption, void (*)(PQconninfoOption*)>;

  /// What the connection uses: the connection string, the service and the environment together.
  [[nodiscard]] Options options() const {
    Options all(PQconninfo(io_->libpq.get()), PQconninfoFree);
    if (!all) throw std::bad_alloc();
    return all;
  }

  static std::string value(const Options& options, std::string_view keyword) {
    for (const auto* option = options.get(); option->keyword != nullptr; ++option) {
      if (option->keyword == keyword && option->val != nullptr) return option->val;
    }
    return {};
  }

  /// libpq heeds `connect_timeout` only where it blocks.
  [[nodiscard]] std::chrono::milliseconds limit_for_an_address() const {
    const std::string text = value(options(), "connect_timeout");
    if (text.empty()) return settings_.connect_timeout;
    int seconds = 0;
    const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), seconds);
    if (error != std::errc{} || end != text.data() + text.size())
      throw Error(Error::invalid, "connect_timeout is not a number of seconds: " + text);
    return seconds <= 0 ? std::chrono::milliseconds::max() : std::chrono::seconds(std::max(seconds, 2));
  }

  /// Starts again without the address that libpq is connecting to; false if there is no other. libpq gets all that are
  /// left, because `target_session_attrs` may need the whole list.
  bool start_without_this_address() {
    PGconn* const libpq = io_->libpq.get();
    const Options all = options();
    const auto split = [&](std::string_view keyword) {
      std::istringstream list(value(all, keyword) + ",");
      std::vector<std::string> parts;
      for (std::string part; std::getline(list, part, ',');) parts.push_back(part);
      return parts;
    };
    const auto names = split("host"), addresses = split("hostaddr"), ports = split("port");
    const auto at = [](const std::vector<std::string>& list, std::size_t i) {
      return list[std::min(i, list.size() - 1)];  // one port may be for all hosts
    };
    std::string kept_names, kept_addresses, kept_ports;
    const auto keep = [&](const std::string& name, const std::string& address, const std::string& port) {
      kept_names += name + ",", kept_addresses += address + ",", kept_ports += port + ",";
    };
    const std::string this_name = PQhost(libpq), this_address = PQhostaddr(libpq), this_port = PQport(libpq);
    bool found = false;
    for (std::size_t i = 0; i < std::max(names.size(), addresses.size()); ++i) {
      const std::string name = at(names, i), address = at(addresses, i), port = at(ports, i);
      const bool same_host = address.empty() ? name.empty() || name == this_name : address == this_address;
      if (!same_host || (!port.empty() && port != this_port)) {
        keep(name, address, port);
        continue;
      }
      found = true;
      if (!address.empty() || name.empty() || this_address.empty()) continue;
      std::error_code error;  // the name may have other addresses
      asio::ip::tcp::resolver resolver(io_->wake.get_executor());
      for (const auto& entry : resolver.resolve(name, port, error)) {
        const auto other = entry.endpoint().address();
        if (other != asio::ip::make_address(this_address, error)) keep(name, other.to_string(), port);
      }
    }
    if (!found || kept_ports.empty()) return false;
    for (std::string* list : {&kept_names, &kept_addresses, &kept_ports}) list->pop_back();  // the last comma

    std::vector<const char*> keywords, values;
    for (const auto* option = all.get(); option->keyword != nullptr; ++option) {
      const std::string_view keyword = option->keyword;
      keywords.push_back(option->keyword);
      values.push_back(keyword == "host"       ? kept_names.c_str()
                       : keyword == "hostaddr" ? kept_addresses.c_str()
                       : keyword == "port"     ? kept_ports.c_str()
                                               : option->val);
    }
    keywords.push_back(nullptr);
    values.push_back(nullptr);
    start(PQconnectStartParams(keywords.data(), values.data(), 0));
    return true;
  }

  /// Keeps libpq from printing notices. A server that shuts down announces this in a notice.
  static void take_notice(void* connection, const PGresult* result) {
    auto* const self = static_cast<Connection*>(connection);
    try {
      const Error notice(Error::statement, result);
      if (notice.severity() == "FATAL" || notice.severity() == "PANIC") self->io_->doomed = true;
      if (self->settings_.on_notice) self->settings_.on_notice(notice);
    } catch (...) {  // must not reach libpq, which is in C
    }
  }

  void hand_out_notifications() {
    while (PGnotify* const next = io_->libpq ? PQnotifies(io_->libpq.get()) : nullptr) {
      const std::unique_ptr<PGnotify, void (*)(void*)> notification(next, PQfreemem);
      try {
        if (settings_.on_notification) settings_.on_notification({next->relname, next->extra, next->be_pid});
      } catch (...) {
      }
    }
  }

  asio::awaitable<Result> run(std::string sql, Parameters parameters, Clock::time_point until, bool heed_cancellation) {
    // Otherwise, after a cancellation, every co_await would throw while the statement still runs.
    const bool throws = co_await asio::this_coro::throw_if_cancelled();
    co_await asio::this_coro::throw_if_cancelled(false);
    const bool in_transaction_before = in_transaction();
    bool sent = false, cancelled = false;
    std::exception_ptr failure;
    try {
      send(sql, parameters);
      sent = true;
      const Woken woken = co_await settle(until, heed_cancellation);
      cancelled = woken == Woken::cancelled;
      if (cancelled) co_await interrupt();
      if (woken == Woken::late) close();
    } catch (...) {
      failure = std::current_exception();
      if (sent) close();
    }
    co_await asio::this_coro::throw_if_cancelled(throws);
    if (failure) std::rethrow_exception(failure);

    Result result = std::exchange(io_->result, Result());
    const bool broken = PQstatus(io_->libpq.get()) != CONNECTION_OK;
    if (broken) close();
    if (!broken) {
      if (in_transaction_before && ends_transaction(sql, result)) ++ended_transactions_;
      if (!result.failed() && !in_transaction() && result.command() != "ROLLBACK") ++completed_;
      if (!result.failed()) co_return result;
    }
    const Error error(broken ? Error::connection : Error::statement, result.native());
    if (cancelled && (broken || error.sqlstate() == "57014"))
      throw std::system_error(asio::error::operation_aborted, "pg: the statement was cancelled");
    throw Error(error);
  }

  /// True if the statement has ended the transaction that it was in, even if it began another one (AND CHAIN).
  [[nodiscard]] bool ends_transaction(std::string_view sql, const Result& result) const {
    if (!in_transaction() || result.command() == "COMMIT") return true;
    constexpr std::string_view chain = "chain";  // the other command with this tag is ROLLBACK TO
    const auto same = [](char a, char b) { return (a | 0x20) == b; };
    return result.command() == "ROLLBACK" &&
           std::search(sql.begin(), sql.end(), chain.begin(), chain.end(), same) != sql.end();
  }

  void send(const std::string& sql, const Parameters& parameters) {
    PGconn* const libpq = io_ ? io_->libpq.get() : nullptr;
    if (libpq == nullptr) throw Error(Error::connection, "the connection is closed");
    if (sql.find('\0') != std::string::npos) throw Error(Error::invalid, "the statement has a NUL character");
    if (sql.size() >= Parameters::max_size) throw Error(Error::invalid, "a statement of almost 1 GiB or more");
    if (!parameters.send(libpq, sql))
      throw Error(is_open() ? Error::invalid : Error::connection, PQerrorMessage(libpq));
    io_->result = Result();
    io_->sending = true;
    io_->wakes = io_->in_vain = 0;
  }

  /// Waits until the server has finished the statement.
  asio::awaitable<Woken> settle(Clock::time_point until, bool heed_cancellation) {
    for (Woken woken = Woken::ready;;) {
      if (collect()) co_return Woken::ready;
      if (woken != Woken::ready) co_return woken;
      // Read while sending, too: the server may not read on until its own output has been read.
      woken = co_await wait(true, io_->sending, until, heed_cancellation);
    }
  }

  /// Sends and receives what is possible without waiting. True if the statement has ended.
  bool collect() {
    PGconn* const libpq = io_->libpq.get();
    if (io_->sending) io_->sending = PQflush(libpq) == 1;  // reading reports a failure
    if (!std::exchange(io_->readable, false)) return take_results();
    if (!encrypted()) {
      PQconsumeInput(libpq);
      return take_results();
    }
    // The socket does not tell what is inside the TLS library: up to the rest of a record of 16 KiB. libpq takes 8 KiB
    // or more at a time, so two attempts after the socket was empty take all.
    for (int left = 2; left > 0; --left) {
      if (socket_readable()) left = 3;
      PQconsumeInput(libpq);
      if (take_results()) return true;
    }
    return false;
  }

  /// True if the statement has ended.
  bool take_results() {
    PGconn* const libpq = io_->libpq.get();
    const bool broken = !is_open();
    if (broken) release_socket();  // libpq has closed it
    while (broken || PQisBusy(libpq) == 0) {
      Result result(PQgetResult(libpq));
      const ExecStatusType status = PQresultStatus(result.native());
      if (result.native() == nullptr) {
        hand_out_notifications();
        return true;
      }
      if (status == PGRES_COPY_IN || status == PGRES_COPY_OUT || status == PGRES_COPY_BOTH)
        throw Error(Error::connection, "COPY is not supported; the connection is closed");
      if (io_->result.native() == nullptr || !io_->result.failed()) io_->result = std::move(result);
    }
    hand_out_notifications();
    return false;
  }

  /// Asks the server to cancel the statement. Waits until the statement and the request have both ended, because a late
  /// request would cancel the next statement. Closes the connection if this takes too long.
  asio::awaitable<void> interrupt() {
    const Clock::time_point until = time_after(settings_.cancel_timeout);
    const auto notify = [weak = weak_from_this(), executor = io_->wake.get_executor()] {
      asio::post(executor, [weak] {
        if (const auto self = weak.lock()) self->notify();
      });
    };
    for (bool ended = false; !ended;) {
      // The server ignores a request that it gets before the statement. So it is repeated.
      Canceller::Request request(canceller_, io_->libpq.get(), notify);
      const Clock::time_point again = std::min(until, time_after(std::chrono::milliseconds(100)));
      ended = co_await settle(again, false) == Woken::ready;
      Woken woken = Woken::ready;
      while (woken == Woken::ready && !request.over()) woken = co_await wait(false, false, until, false);
      ended = ended || collect();
      if (woken == Woken::late || (!ended && Clock::now() >= until)) {
        close();
        break;
      }
    }
  }

  /// Ends the transaction, or the part since the savepoint. Returns the exception that the caller must throw, or null.
  asio::awaitable<std::exception_ptr> end_transaction(const std::string& savepoint, std::exception_ptr failure) {
    const auto cancellation = co_await asio::this_coro::cancellation_state;
    if (!failure && cancellation.cancelled() != asio::cancellation_type::none)
      failure = std::make_exception_ptr(std::system_error(asio::error::operation_aborted, "pg: transaction"));
    if (!failure) failure = co_await commit(savepoint);
    if (!failure || !is_open() || PQtransactionStatus(io_->libpq.get()) == PQTRANS_IDLE) co_return failure;
    try {
      const Clock::time_point until = time_after(settings_.cancel_timeout);
      const std::string to = savepoint.empty() ? "" : " to savepoint " + savepoint;
      co_await run("rollback" + to, Parameters(), until, false);
      if (!savepoint.empty()) co_await run("release savepoint " + savepoint, Parameters(), until, false);
    } catch (...) {
      close();
    }
    co_return failure;
  }

  asio::awaitable<std::exception_ptr> commit(const std::string& savepoint) {
    try {
      const std::string sql = savepoint.empty() ? "commit" : "release savepoint " + savepoint;
      const Result result = co_await run(sql, Parameters(), no_deadline, true);
      if (result.command() == "ROLLBACK")
        throw Error(Error::statement, "rolled back at COMMIT, because a statement in the transaction had failed");
    } catch (const std::exception& e) {
      const auto* const error = dynamic_cast<const Error*>(&e);
      if (!savepoint.empty() || (is_open() && (error == nullptr || error->unchanged())))
        co_return std::current_exception();
      co_return std::make_exception_ptr(Error(Error::commit_unknown, std::string("during COMMIT: ") + e.what()));
    }
    co_return nullptr;
  }

  const Settings settings_;
  const std::shared_ptr<Canceller> canceller_;
  const pid_t owner_ = getpid();
  std::size_t savepoints_ = 0, ended_transactions_ = 0, completed_ = 0;
  std::unique_ptr<Io> io_;
};

/// A pool of connections, which are opened when they are needed. Use it on the executor's thread only: before
/// destroying it elsewhere, `close` it there. (In a program that uses runtime_bridge, make it a `Hosted<pg::Pool>`.)
///
/// The session's state (SET, LISTEN, advisory locks) is not reset when a connection goes back to the pool.
class Pool {
  struct Waiter;

  struct State {
    /// Gives the right to one connection to the waiter that has waited longest.
    void pass_on() noexcept {
      if (waiters.empty()) {
        ++free;
        return;
      }
      Waiter& next = *waiters.front();
      waiters.pop_front();
      next.granted = true;
      next.timer.cancel();
    }

    asio::any_io_executor executor;
    Settings settings;
    std::size_t free;
    std::shared_ptr<Canceller> canceller = std::make_shared<Canceller>();
    std::vector<std::shared_ptr<Connection>> idle = {};  // never more than there are unused rights
    std::vector<std::weak_ptr<Connection>> all = {};     // for a forked child, which has no use for them
    std::deque<Waiter*> waiters = {};
    pid_t owner = getpid();
    bool closed = false;
  };

  /// A place in the queue.
  struct Waiter {
    Waiter(State& s, Clock::time_point deadline) : state(s), timer(s.executor, deadline) { s.waiters.push_back(this); }
    Waiter(const Waiter&) = delete;
    Waiter& operator=(const Waiter&) = delete;
    // If the right was given to a coroutine that was then cancelled or destroyed, pass it on.
    ~Waiter() {
      if (granted) state.pass_on();
      std::erase(state.waiters, this);
    }

    State& state;
    asio::steady_timer timer;
    bool granted = false;
  };

  /// The right to one connection.
  class Permit {
   public:
    explicit Permit(std::shared_ptr<State> state) noexcept : state_(std::move(state)) {}
    Permit(Permit&&) noexcept = default;
    Permit& operator=(Permit&&) = delete;
    ~Permit() {
      if (state_) state_->pass_on();
    }

    State* operator->() const noexcept { return state_.get(); }

   private:
    std::shared_ptr<State> state_;
  };

 public:
  /// A borrowed connection. The destructor gives it back if it is idle, and closes it if not.
  class Lease {
   public:
    Lease(Permit permit, std::shared_ptr<Connection> connection) noexcept
        : permit_(std::move(permit)), connection_(std::move(connection)) {}
    Lease(Lease&&) noexcept = default;
    Lease& operator=(Lease&&) = delete;
    ~Lease() {
      if (connection_ && connection_->idle() && !permit_->closed) permit_->idle.push_back(std::move(connection_));
    }

    Connection& operator*() const noexcept { return *connection_; }
    Connection* operator->() const noexcept { return connection_.get(); }

   private:
    Permit permit_;  // destroyed last, so that the next owner finds the connection
    std::shared_ptr<Connection> connection_;
  };

  Pool(asio::any_io_executor executor, Settings settings, std::size_t size)
      : state_(std::make_shared<State>(State{std::move(executor), std::move(settings), size})) {
    if (size == 0) throw std::invalid_argument("pg: a pool of no connections");
    state_->idle.reserve(size);  // so that giving a connection back cannot throw
  }
  Pool(const Pool&) = delete;
  Pool& operator=(const Pool&) = delete;
  ~Pool() { close(); }

  /// Waits for a connection, in order of arrival, and opens one if none is idle. The deadline applies to both.
  [[nodiscard]] asio::awaitable<Lease> acquire(Clock::time_point deadline = no_deadline) const {
    return acquire_from(state_, deadline);
  }

  /// Closes idle connections now and borrowed ones when they come back. Waiting callers get an error. May be called
  /// again. In a forked child, closes the descriptors of all connections, which stay usable in the parent.
  void close() noexcept {
    if (getpid() != state_->owner) {
      for (const auto& connection : state_->all) {
        if (const auto inherited = connection.lock()) inherited->close();
      }
      return;
    }
    state_->closed = true;
    state_->idle.clear();
    for (Waiter* waiter : std::exchange(state_->waiters, {})) waiter->timer.cancel();
  }

 private:
  static asio::awaitable<Lease> acquire_from(std::shared_ptr<State> state, Clock::time_point deadline) {
    Permit permit = co_await take_turn(state, deadline);
    while (!permit->idle.empty()) {
      auto connection = std::move(permit->idle.back());
      permit->idle.pop_back();
      if (connection->usable()) co_return Lease(std::move(permit), std::move(connection));
    }
    auto connection = std::make_shared<Connection>(state->executor, state->settings, state->canceller);
    std::erase_if(state->all, [](const auto& other) { return other.expired(); });
    state->all.push_back(connection);
    co_await connection->connect(deadline);
    if (state->closed) throw Error(Error::closed, "the pool was closed");
    co_return Lease(std::move(permit), std::move(connection));
  }

  static asio::awaitable<Permit> take_turn(std::shared_ptr<State> state, Clock::time_point deadline) {
    if (state->closed) throw Error(Error::closed, "the pool is closed");
    if (state->free != 0) {
      --state->free;
      co_return Permit(std::move(state));
    }
    Waiter self(*state, deadline);
    std::error_code waited;  // operation_aborted after a cancellation, pass_on or close
    co_await self.timer.async_wait(asio::redirect_error(asio::use_awaitable, waited));
    if (std::exchange(self.granted, false)) co_return Permit(std::move(state));
    if (state->closed) throw Error(Error::closed, "the pool was closed");
    if (waited) throw std::system_error(waited, "pg: waiting for a connection");
    throw Error(Error::timeout, "no connection became free in time");
  }

  std::shared_ptr<State> state_;
};

}  // namespace pg

#endif
