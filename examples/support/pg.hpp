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
/// has changed nothing. If the server does not react within `Settings::cancel_timeout`, the connection is closed.
///
/// *Errors* are thrown as `pg::Error`. A missing value, or one of another type than requested, is a standard exception.
namespace pg {

using Clock = std::chrono::steady_clock;
inline constexpr Clock::time_point no_deadline = Clock::time_point::max();

struct Settings {
  std::string conninfo;  ///< libpq's connection string; defaults come from PGHOST, PGPORT, PGUSER, ...
  std::chrono::milliseconds connect_timeout{10'000};  ///< for all hosts together
  std::chrono::milliseconds cancel_timeout{2'000};    ///< for the server to cancel a statement or roll back
};

class Error : public std::runtime_error {
 public:
  enum Kind {
    statement,   ///< The server refused it. The connection can still be used.
    connection,  ///< There is no connection, or it was lost. Whether a statement outside a transaction took effect is
                 ///< unknown.
    commit_unknown,  ///< The connection was lost during COMMIT: the whole transaction took effect, or none of it.
    timeout,         ///< There was no connection before the deadline.
    closed,          ///< The pool was closed.
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
  template <class... Ts>
  explicit Parameters(const Ts&... values) {
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
      throw std::invalid_argument("pg: text with a NUL character, which PostgreSQL does not support; use pg::Bytes");
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
    if (data.size() >= std::size_t{1} << 30) throw std::length_error("pg: a parameter of 1 GiB or more");
    values_.push_back({std::string(data), binary});
  }

  std::vector<Value> values_;
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
      throw std::out_of_range("pg: no column " + std::to_string(column) + " of row " + std::to_string(row));
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
      if (is_null(row, column)) throw std::invalid_argument("pg: the value is null");
      const std::string_view text(PQgetvalue(result_.get(), row, column),
                                  static_cast<std::size_t>(PQgetlength(result_.get(), row, column)));
      if constexpr (std::same_as<T, std::string>) {
        return std::string(text);
      } else if constexpr (std::same_as<T, Bytes>) {
        return bytes(text);
      } else if constexpr (std::same_as<T, bool>) {
        if (text != "t" && text != "f") throw std::invalid_argument("pg: not a boolean: " + std::string(text));
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
      throw std::invalid_argument("pg: not a number of this type: " + std::string(text));
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
  struct Private {};

 public:
  /// Connects to the first host that accepts.
  static asio::awaitable<std::shared_ptr<Connection>> open(
      asio::any_io_executor executor, Settings settings, Clock::time_point deadline = no_deadline,
      std::shared_ptr<Canceller> canceller = std::make_shared<Canceller>()) {
    auto connection = std::make_shared<Connection>(Private(), std::move(executor), std::move(settings), canceller);
    co_await connection->connect(deadline);
    co_return connection;
  }

  Connection(Private, asio::any_io_executor executor, Settings settings, std::shared_ptr<Canceller> canceller)
      : settings_(std::move(settings)),
        canceller_(std::move(canceller)),
        io_(std::make_unique<Io>(std::move(executor))) {}

  Connection(const Connection&) = delete;
  Connection& operator=(const Connection&) = delete;

  ~Connection() {
    // After a fork, the connection and the executor belong to the parent. Closing the connection here would end it
    // there.
    if (getpid() != owner_) (void)io_.release();
  }

  /// Runs one statement with the parameters $1, $2, ... It copies its arguments, so they need not outlive the call.
  template <class... Ts>
  asio::awaitable<Result> query(std::string sql, const Ts&... parameters) {
    return run(std::move(sql), Parameters(parameters...), no_deadline, true);
  }

  /// Runs `body(connection)`, which returns an awaitable, between BEGIN and COMMIT. If it throws or is cancelled, the
  /// transaction is rolled back; if that fails, the connection is closed. (With g++ 12, do not pass a temporary lambda
  /// in a `co_await` expression: g++ 12 would destroy it twice.)
  template <class Body>
  std::invoke_result_t<Body&, Connection&> transaction(Body body) {
    using Value = typename std::invoke_result_t<Body&, Connection&>::value_type;
    std::conditional_t<std::is_void_v<Value>, bool, std::optional<Value>> value{};
    co_await query("begin");
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
    failure = co_await end_transaction(failure);
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
    pollfd server{PQsocket(io_->libpq.get()), POLLIN, 0};
    while (is_open() && poll(&server, 1, 0) > 0) {
      if (PQconsumeInput(io_->libpq.get()) == 0) close();
      while (PGnotify* notification = is_open() ? PQnotifies(io_->libpq.get()) : nullptr) PQfreemem(notification);
    }
    return idle();
  }

  [[nodiscard]] bool is_open() const noexcept { return PQstatus(io_->libpq.get()) == CONNECTION_OK; }
  [[nodiscard]] int backend_pid() const noexcept { return PQbackendPID(io_->libpq.get()); }

  void close() noexcept {
    release_socket();
    io_->libpq.reset();
  }

 private:
  enum class Woken { ready, cancelled, late };

  /// Everything that a forked child must not touch.
  struct Io {
    explicit Io(asio::any_io_executor executor) : socket(executor), wake(executor), libpq(nullptr, PQfinish) {}
    Io(const Io&) = delete;
    Io& operator=(const Io&) = delete;
    // libpq closes the descriptor.
    ~Io() {
      if (socket.is_open()) socket.release();
    }

    asio::posix::stream_descriptor socket;
    asio::steady_timer wake;  // the coroutine waits for this: it expires at the deadline, and events cancel it
    std::unique_ptr<PGconn, void (*)(PGconn*)> libpq;
    Result result;  // of the current statement: its first error, else its last result
    bool sending = false, awaiting_read = false, awaiting_write = false;
    bool readable = false, event = false;  // events not handled yet
    bool doomed = false;                   // the server has announced that it will close the connection
  };

  void take_socket() { io_->socket.assign(PQsocket(io_->libpq.get())); }

  void release_socket() noexcept {
    if (io_->socket.is_open()) io_->socket.release();
    io_->awaiting_read = io_->awaiting_write = false;
  }

  void notify() {
    io_->event = true;
    io_->wake.cancel();
  }

  void await(asio::posix::descriptor_base::wait_type direction, bool Io::*awaiting) {
    if (std::exchange(io_.get()->*awaiting, true)) return;
    io_->socket.async_wait(direction, [weak = weak_from_this(), direction, awaiting](const std::error_code& error) {
      const auto self = weak.lock();
      if (!self || error == asio::error::operation_aborted) return;
      self->io_.get()->*awaiting = false;
      if (direction == asio::posix::descriptor_base::wait_read) self->io_->readable = true;
      self->notify();
    });
  }

  /// Waits for one of the requested events. Cancellation does not make it throw once it has started.
  asio::awaitable<Woken> wait(bool read, bool write, Clock::time_point until, bool heed_cancellation) {
    if (read) await(asio::posix::descriptor_base::wait_read, &Io::awaiting_read);
    if (write) await(asio::posix::descriptor_base::wait_write, &Io::awaiting_write);
    const auto cancellation = co_await asio::this_coro::cancellation_state;
    for (;;) {
      if (heed_cancellation && cancellation.cancelled() != asio::cancellation_type::none) co_return Woken::cancelled;
      if (Clock::now() >= until) co_return Woken::late;
      if (std::exchange(io_->event, false)) co_return Woken::ready;
      io_->wake.expires_at(until);
      std::error_code error;
      co_await io_->wake.async_wait(asio::redirect_error(asio::use_awaitable, error));
      // After the context was shut down, every wait ends at once without an error.
      if (!error && Clock::now() < until) co_return Woken::late;
    }
  }

  asio::awaitable<void> connect(Clock::time_point deadline) {
    deadline = std::min(deadline, Clock::now() + settings_.connect_timeout);
    PGconn* const libpq = PQconnectStart(settings_.conninfo.c_str());
    if (libpq == nullptr) throw std::bad_alloc();
    io_->libpq.reset(libpq);
    PQsetNoticeReceiver(libpq, take_notice, io_.get());

    auto next = PQstatus(libpq) == CONNECTION_BAD ? PGRES_POLLING_FAILED : PGRES_POLLING_WRITING;
    while (next != PGRES_POLLING_OK) {
      if (next == PGRES_POLLING_FAILED) throw Error(Error::connection, PQerrorMessage(libpq));
      take_socket();
      const bool write = next == PGRES_POLLING_WRITING;
      const Woken woken = co_await wait(!write, write, deadline, true);
      if (woken == Woken::cancelled) throw std::system_error(asio::error::operation_aborted, "pg: connecting");
      if (woken == Woken::late) throw Error(Error::timeout, "the server did not answer in time");
      release_socket();  // the next step may close the descriptor and open one for the next host
      next = PQconnectPoll(libpq);
    }
    take_socket();
    if (PQsetnonblocking(libpq, 1) != 0) throw Error(Error::connection, PQerrorMessage(libpq));
  }

  /// Keeps libpq from printing notices. A server that shuts down announces this in a notice.
  static void take_notice(void* io, const PGresult* notice) {
    const char* severity = PQresultErrorField(notice, PG_DIAG_SEVERITY_NONLOCALIZED);
    if (severity != nullptr && (severity == std::string_view("FATAL") || severity == std::string_view("PANIC")))
      static_cast<Io*>(io)->doomed = true;
  }

  asio::awaitable<Result> run(std::string sql, Parameters parameters, Clock::time_point until, bool heed_cancellation) {
    // Otherwise, after a cancellation, every co_await would throw while the statement still runs.
    const bool throws = co_await asio::this_coro::throw_if_cancelled();
    co_await asio::this_coro::throw_if_cancelled(false);
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
    if (!broken && !result.failed()) co_return result;
    const Error error(broken ? Error::connection : Error::statement, result.native());
    if (cancelled && (broken || error.sqlstate() == "57014"))
      throw std::system_error(asio::error::operation_aborted, "pg: the statement was cancelled");
    throw Error(error);
  }

  void send(const std::string& sql, const Parameters& parameters) {
    PGconn* const libpq = io_->libpq.get();
    if (libpq == nullptr) throw Error(Error::connection, "the connection is closed");
    if (!parameters.send(libpq, sql))
      throw Error(is_open() ? Error::statement : Error::connection, PQerrorMessage(libpq));
    io_->result = Result();
    io_->sending = true;
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
    if (std::exchange(io_->readable, false)) PQconsumeInput(libpq);
    const bool broken = !is_open();
    if (broken) release_socket();  // libpq has closed it
    while (broken || PQisBusy(libpq) == 0) {
      Result result(PQgetResult(libpq));
      if (result.native() == nullptr) return true;
      const ExecStatusType status = PQresultStatus(result.native());
      if (status == PGRES_COPY_IN || status == PGRES_COPY_OUT || status == PGRES_COPY_BOTH)
        throw Error(Error::connection, "COPY is not supported; the connection is closed");
      if (io_->result.native() == nullptr || !io_->result.failed()) io_->result = std::move(result);
    }
    return false;
  }

  /// Asks the server to cancel the statement. Waits until the statement and the request have both ended, because a late
  /// request would cancel the next statement. Closes the connection if this takes too long.
  asio::awaitable<void> interrupt() {
    const Clock::time_point until = Clock::now() + settings_.cancel_timeout;
    Canceller::Request request(canceller_, io_->libpq.get(),
                               [weak = weak_from_this(), executor = io_->wake.get_executor()] {
                                 asio::post(executor, [weak] {
                                   if (const auto self = weak.lock()) self->notify();
                                 });
                               });
    Woken woken = co_await settle(until, false);
    while (woken == Woken::ready && !request.over()) woken = co_await wait(false, false, until, false);
    if (woken == Woken::late) close();
  }

  /// Returns the exception that the caller must throw, or null.
  asio::awaitable<std::exception_ptr> end_transaction(std::exception_ptr failure) {
    const auto cancellation = co_await asio::this_coro::cancellation_state;
    if (!failure && cancellation.cancelled() != asio::cancellation_type::none)
      failure = std::make_exception_ptr(std::system_error(asio::error::operation_aborted, "pg: transaction"));
    try {
      if (failure) {
        if (is_open()) co_await run("rollback", Parameters(), Clock::now() + settings_.cancel_timeout, false);
      } else {
        const Result result = co_await run("commit", Parameters(), no_deadline, true);
        if (result.command() != "COMMIT")
          throw Error(Error::statement, "rolled back at COMMIT, because a statement in the transaction had failed");
      }
    } catch (const std::exception& e) {
      if (failure) {
        close();
      } else if (is_open()) {
        failure = std::current_exception();
      } else {
        failure = std::make_exception_ptr(Error(Error::commit_unknown, std::string("during COMMIT: ") + e.what()));
      }
    }
    co_return failure;
  }

  const Settings settings_;
  const std::shared_ptr<Canceller> canceller_;
  const pid_t owner_ = getpid();
  std::unique_ptr<Io> io_;
};

/// A pool of connections, which are opened when they are needed. Use it on the executor's thread only: before
/// destroying it elsewhere, `close` it there. (In a program that uses runtime_bridge, declare it after the bridge.)
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
  /// again.
  void close() noexcept {
    if (getpid() != state_->owner) return;  // after a fork, the pool belongs to the parent
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
    auto connection = co_await Connection::open(state->executor, state->settings, deadline, state->canceller);
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
