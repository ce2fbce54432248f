// SPDX-License-Identifier: Apache-2.0
//
// An asynchronous HTTP client: libcurl's multi-socket interface on an Asio executor. Needs Asio >= 1.22.1 and
// libcurl >= 7.75, and nothing else of this project.

#ifndef RUNTIME_BRIDGE_EXAMPLES_CURL_HPP
#define RUNTIME_BRIDGE_EXAMPLES_CURL_HPP

#include <curl/curl.h>

#include <algorithm>
#include <array>
#include <asio/any_io_executor.hpp>
#include <asio/awaitable.hpp>
#include <asio/error.hpp>
#include <asio/posix/stream_descriptor.hpp>
#include <asio/redirect_error.hpp>
#include <asio/steady_timer.hpp>
#include <asio/this_coro.hpp>
#include <asio/use_awaitable.hpp>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <exception>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <random>
#include <set>
#include <span>
#include <stdexcept>
#include <string>
#include <string_view>
#include <system_error>
#include <type_traits>
#include <utility>
#include <vector>

/// *Threads.* A client and all that it does belong to one thread: the one that runs its executor, such as a bridge's
/// worker. No locks, and nothing in here blocks that thread.
///
/// *Signals.* libcurl is told to leave them alone. With TLS a lost connection may raise SIGPIPE: ignore it.
namespace curl {

/// A transfer that came to no answer. An answer is never an error, whatever its status.
class Error : public std::runtime_error {
 public:
  Error(CURLcode code, const std::string& text) : std::runtime_error(text), code_(code) {}
  [[nodiscard]] CURLcode code() const noexcept { return code_; }

 private:
  CURLcode code_;
};

/// Sets an option of a transfer. libcurl takes the value through an ellipsis, so its type must be exactly right.
template <class Value>
requires(std::is_pointer_v<Value> || std::is_same_v<Value, long> ||
         std::is_same_v<Value, curl_off_t>) void set(CURL* easy, CURLoption option, Value value) {
  const CURLcode code = curl_easy_setopt(easy, option, value);
  if (code != CURLE_OK) throw Error(code, curl_easy_strerror(code));
}

/// Where a request's body comes from: puts the next bytes into the room and returns how many; 0 is the end.
using Source = std::function<asio::awaitable<std::size_t>(std::span<char> room)>;

/// Where an answer's body goes to. The next piece comes when this one has been dealt with: a slow sink slows the sender
/// down, by way of TCP.
using Sink = std::function<asio::awaitable<void>(std::string_view piece)>;

/// A source that reads text, which it borrows.
inline Source from_memory(std::string_view text) {
  return [text](std::span<char> room) mutable -> asio::awaitable<std::size_t> {
    const std::size_t size = text.copy(room.data(), room.size());
    text.remove_prefix(size);
    co_return size;
  };
}

struct Request {
  Request(std::string the_method, std::string the_url) : method(std::move(the_method)), url(std::move(the_url)) {}

  std::string method;
  std::string url;                            ///< sent as it is: encode it
  std::vector<std::string> headers = {};      ///< "Name: value"
  std::uint64_t body_size = 0;                ///< what the source gives in all
  std::function<Source()> open_body = {};     ///< called for each attempt; null from it: there can be no other
  std::function<Sink()> open_sink = {};       ///< the same; gets the body if the status is 2xx, else Response does
  std::function<void(CURL*)> configure = {};  ///< sets further options, by `set`
};

struct Response {
  long status = 0;
  std::string body = {};               ///< what did not go to a sink
  std::chrono::seconds retry_after{};  ///< what the server asks for
};

struct Options {
  std::chrono::milliseconds connect_timeout{10'000};
  std::chrono::seconds stall_timeout{30};  ///< not a byte for so long, through the server's fault, ends a transfer
  long max_connections = 64;               ///< further transfers queue
  std::size_t max_body = std::size_t{16} << 20U;  ///< of a Response
  int max_attempts = 4;
  std::chrono::milliseconds first_delay{100};  ///< before the second attempt; doubles with each
  std::chrono::milliseconds max_delay{5'000};
};

namespace detail {

class Transfer;

template <auto function>
struct Calls {
  template <class Handle>
  void operator()(Handle* handle) const noexcept {
    function(handle);
  }
};
using Easy = std::unique_ptr<CURL, Calls<curl_easy_cleanup>>;
using Multi = std::unique_ptr<CURLM, Calls<curl_multi_cleanup>>;
using List = std::unique_ptr<curl_slist, Calls<curl_slist_free_all>>;

/// Once, and for good: other parts of the program may be using libcurl until its very end.
inline void initialise() {
  static const CURLcode code = curl_global_init(CURL_GLOBAL_DEFAULT);
  if (code != CURLE_OK) throw Error(code, curl_easy_strerror(code));
}

/// Drives one multi handle. libcurl names the descriptors and the time to wait for; Asio waits; `act` tells libcurl.
///
/// libcurl must not be called while it calls back. So the callbacks only take notes, and wake coroutines, which go on
/// later, from the executor's queue.
class Driver : public std::enable_shared_from_this<Driver> {
 public:
  Driver(asio::any_io_executor executor, Options options) : executor_(std::move(executor)), options_(options) {
    initialise();
    multi_.reset(curl_multi_init());
    if (!multi_) throw std::bad_alloc();
    curl_multi_setopt(multi_.get(), CURLMOPT_SOCKETFUNCTION, &Driver::on_socket);
    curl_multi_setopt(multi_.get(), CURLMOPT_SOCKETDATA, this);
    curl_multi_setopt(multi_.get(), CURLMOPT_TIMERFUNCTION, &Driver::on_timer);
    curl_multi_setopt(multi_.get(), CURLMOPT_TIMERDATA, this);
    curl_multi_setopt(multi_.get(), CURLMOPT_MAX_TOTAL_CONNECTIONS, options_.max_connections);
    curl_multi_setopt(multi_.get(), CURLMOPT_MAXCONNECTS, options_.max_connections);
  }
  Driver(const Driver&) = delete;
  Driver& operator=(const Driver&) = delete;
  ~Driver() { close(); }

  [[nodiscard]] const asio::any_io_executor& executor() const noexcept { return executor_; }
  [[nodiscard]] const Options& options() const noexcept { return options_; }

  void add(Transfer& transfer);
  void remove(Transfer& transfer) noexcept;
  void close() noexcept;

  /// How long to wait after an attempt. Half of it is chance, lest all clients come back at the same moment.
  std::chrono::milliseconds delay_after(int attempt) {
    std::chrono::milliseconds delay = options_.first_delay;
    for (int i = 1; i < attempt && delay < options_.max_delay; ++i) delay *= 2;
    delay = std::min(delay, options_.max_delay);
    std::uniform_int_distribution<std::chrono::milliseconds::rep> chance(delay.count() / 2, delay.count());
    return std::chrono::milliseconds(chance(random_));
  }

 private:
  /// A descriptor of libcurl's. It may be closed, and its number used for another, as soon as libcurl has said REMOVE.
  struct Socket {
    Socket(const asio::any_io_executor& executor, curl_socket_t number) : descriptor(executor, number) {}
    Socket(const Socket&) = delete;
    Socket& operator=(const Socket&) = delete;
    ~Socket() { release(); }

    void release() noexcept {
      interest = CURL_POLL_NONE;
      if (descriptor.is_open()) descriptor.release();  // which ends the waits, and leaves the closing to libcurl
    }

    asio::posix::stream_descriptor descriptor;
    int interest = CURL_POLL_NONE;  // CURL_POLL_IN, CURL_POLL_OUT or both
    int waits = CURL_POLL_NONE;     // likewise: what is being waited for
  };

  static int on_socket(CURL* easy, curl_socket_t number, int what, void* self, void* /*assigned*/) noexcept;

  static int on_timer(CURLM* /*multi*/, long milliseconds, void* self) noexcept {
    auto& driver = *static_cast<Driver*>(self);
    try {
      driver.set_timer(milliseconds);
    } catch (const std::exception& e) {
      driver.fail_all(CURLE_OUT_OF_MEMORY, e.what());
    }
    return 0;
  }

  // A timer that has gone off and waits in the queue cannot be taken back. libcurl looks at the clock itself, so one
  // call too many does no harm. Zero goes through the queue like any other time, never straight back into libcurl.
  void set_timer(long milliseconds) {
    timer_.cancel();
    if (milliseconds < 0) return;
    timer_.expires_after(std::chrono::milliseconds(milliseconds));
    timer_.async_wait([weak = weak_from_this()](const std::error_code& error) {
      const auto self = weak.lock();
      if (self && !error) self->act(CURL_SOCKET_TIMEOUT, 0);
    });
  }

  void watch(curl_socket_t number, int what) {
    if (what == CURL_POLL_REMOVE) {
      // A wait that is over already and queued still has the socket, but finds nothing of interest.
      if (const auto found = sockets_.extract(number)) found.mapped()->release();
      return;
    }
    std::shared_ptr<Socket>& socket = sockets_[number];
    if (!socket) socket = std::make_shared<Socket>(executor_, number);
    socket->interest = what;
    wait(socket, CURL_POLL_IN);
    wait(socket, CURL_POLL_OUT);
  }

  // Interest may come and go while a wait is pending: the wait stays, and what it finds is looked at when it ends.
  void wait(const std::shared_ptr<Socket>& socket, int direction) {
    if (!(socket->interest & direction) || (socket->waits & direction)) return;
    const bool in = direction == CURL_POLL_IN;
    using asio::posix::descriptor_base;
    socket->descriptor.async_wait(
        in ? descriptor_base::wait_read : descriptor_base::wait_write,
        [weak = weak_from_this(), socket, direction, in](const std::error_code& error) {
          socket->waits &= ~direction;
          const auto self = weak.lock();
          if (!self || error == asio::error::operation_aborted || !(socket->interest & direction)) return;
          const int ready = in ? CURL_CSELECT_IN : CURL_CSELECT_OUT;
          self->act(socket->descriptor.native_handle(), error ? CURL_CSELECT_ERR : ready);
          if (!error) self->wait(socket, direction);
        });
    socket->waits |= direction;
  }

  void act(curl_socket_t socket, int events) noexcept;
  void fail_all(CURLcode code, const char* why) noexcept;

  asio::any_io_executor executor_;
  Options options_;
  std::minstd_rand random_{std::random_device{}()};
  asio::steady_timer timer_{executor_};
  std::map<curl_socket_t, std::shared_ptr<Socket>> sockets_;
  std::set<Transfer*> transfers_;
  Multi multi_;  // null: closed. Declared last, since to clean it up may call back
};

/// One attempt at a request. It is libcurl's as long as this object lives, so that a coroutine which ends in whatever
/// way (an answer, an exception, a cancellation, its destruction with its context) takes the transfer with it.
class Transfer {
 public:
  Transfer(std::shared_ptr<Driver> driver, const Request& request, bool repeatable, Source source, Sink sink)
      : driver_(std::move(driver)),
        source_(std::move(source)),
        sink_(std::move(sink)),
        wake_(driver_->executor(), asio::steady_timer::time_point::max()),
        size_(source_ ? request.body_size : 0) {
    if (!easy_) throw std::bad_alloc();
    CURL* easy = easy_.get();
    const Options& options = driver_->options();
    set(easy, CURLOPT_PRIVATE, static_cast<void*>(this));
    set(easy, CURLOPT_ERRORBUFFER, error_.data());
    set(easy, CURLOPT_NOSIGNAL, 1L);
    set(easy, CURLOPT_URL, request.url.c_str());
    set(easy, CURLOPT_PATH_AS_IS, 1L);
    // For HTTP/2, libcurl would go on receiving into memory while the transfer is paused.
    set(easy, CURLOPT_HTTP_VERSION, static_cast<long>(CURL_HTTP_VERSION_1_1));
    set(easy, CURLOPT_CONNECTTIMEOUT_MS, static_cast<long>(options.connect_timeout.count()));
    set(easy, CURLOPT_LOW_SPEED_LIMIT, 1L);
    set(easy, CURLOPT_LOW_SPEED_TIME, static_cast<long>(options.stall_timeout.count()));
    set(easy, CURLOPT_WRITEFUNCTION, &Transfer::on_write);
    set(easy, CURLOPT_WRITEDATA, static_cast<void*>(this));
#if LIBCURL_VERSION_NUM >= 0x075700
    // Otherwise to abort a transfer that is looking up a name blocks until the look-up is over.
    set(easy, CURLOPT_QUICK_EXIT, 1L);
#endif
#if LIBCURL_VERSION_NUM >= 0x075500
    set(easy, CURLOPT_PROTOCOLS_STR, "http,https");
#else
    set(easy, CURLOPT_PROTOCOLS, static_cast<long>(CURLPROTO_HTTP | CURLPROTO_HTTPS));
#endif
    // libcurl sends a request again by itself if a connection that it had kept turns out to be dead.
    if (!repeatable) set(easy, CURLOPT_FRESH_CONNECT, 1L);

    if (request.method == "HEAD") {
      set(easy, CURLOPT_NOBODY, 1L);
    } else {
      set(easy, CURLOPT_CUSTOMREQUEST, request.method.c_str());
    }
    // These have a body even if it is empty, and say so.
    if (source_ || request.method == "PUT" || request.method == "POST" || request.method == "PATCH") {
      set(easy, CURLOPT_UPLOAD, 1L);
      set(easy, CURLOPT_INFILESIZE_LARGE, static_cast<curl_off_t>(size_));
      set(easy, CURLOPT_READFUNCTION, &Transfer::on_read);
      set(easy, CURLOPT_READDATA, static_cast<void*>(this));
    }
    for (const std::string& header : request.headers) {
      curl_slist* longer = curl_slist_append(headers_.get(), header.c_str());
      if (!longer) throw std::bad_alloc();
      (void)headers_.release();
      headers_.reset(longer);
    }
    set(easy, CURLOPT_HTTPHEADER, headers_.get());
    if (request.configure) request.configure(easy);
  }
  Transfer(const Transfer&) = delete;
  Transfer& operator=(const Transfer&) = delete;
  ~Transfer() { driver_->remove(*this); }

  static Transfer* of(CURL* easy) noexcept {
    Transfer* transfer = nullptr;
    curl_easy_getinfo(easy, CURLINFO_PRIVATE, &transfer);
    return transfer;
  }
  [[nodiscard]] CURL* easy() const noexcept { return easy_.get(); }

  /// Feeds libcurl from the source, and the sink from libcurl, until the answer is complete.
  asio::awaitable<Response> run() {
    driver_->add(*this);
    std::string piece;
    while (!over_ || (code_ == CURLE_OK && !received_.empty())) {
      if (!received_.empty()) {
        std::swap(piece, received_);
        received_.clear();
        pause(CURLPAUSE_CONT);  // libcurl receives the next piece while the sink is busy with this one
        co_await sink_(piece);
      } else if (hungry_) {
        pause(CURLPAUSE_ALL);  // receiving too: else a slow source would be taken for a stalled server
        buffer_.resize(buffer_size);
        buffer_.resize(co_await source_(buffer_));
        taken_ += buffer_.size();
        // libcurl would leave the server waiting for the rest, or send more than it has announced.
        if (taken_ > size_ || (buffer_.empty() && taken_ < size_)) {
          throw Error(CURLE_BAD_FUNCTION_ARGUMENT, "the source does not give as much as the request's body_size");
        }
        hungry_ = false;
        pause(CURLPAUSE_CONT);
      } else {
        co_await wait();
      }
    }
    if (code_ != CURLE_OK) throw Error(code_, error_[0] != '\0' ? error_.data() : curl_easy_strerror(code_));
    response_.status = status();
    curl_off_t seconds = 0;
    curl_easy_getinfo(easy_.get(), CURLINFO_RETRY_AFTER, &seconds);
    response_.retry_after = std::chrono::seconds(seconds);
    co_return std::move(response_);
  }

  /// The end, from libcurl or from the driver.
  void finish(CURLcode code, const char* why = nullptr) noexcept {
    if (over_) return;
    over_ = true;
    code_ = code;
    if (why) error_[std::string_view(why).copy(error_.data(), error_.size() - 1)] = '\0';
    wake();
  }

 private:
  static constexpr std::size_t buffer_size = 64 * std::size_t{1024};
  static_assert(buffer_size >= CURL_MAX_WRITE_SIZE, "a piece that is refused comes again whole");

  static std::size_t on_write(const char* data, std::size_t /*one*/, std::size_t size, void* self) noexcept {
    return static_cast<Transfer*>(self)->receive({data, size});
  }
  static std::size_t on_read(char* room, std::size_t /*one*/, std::size_t size, void* self) noexcept {
    return static_cast<Transfer*>(self)->give({room, size});
  }

  std::size_t receive(std::string_view data) noexcept {
    const bool to_sink = sink_ && status() / 100 == 2;
    std::string& destination = to_sink ? received_ : response_.body;
    if (to_sink && received_.size() + data.size() > buffer_size) return CURL_WRITEFUNC_PAUSE;
    try {
      if (!to_sink && destination.size() + data.size() > driver_->options().max_body) {
        finish(CURLE_FILESIZE_EXCEEDED, "the answer is longer than what is kept in memory");
      }
      if (over_) return 0;  // any other number than the size ends the transfer
      destination.append(data);
    } catch (const std::exception& e) {
      finish(CURLE_OUT_OF_MEMORY, e.what());
      return 0;
    }
    if (to_sink) wake();
    return data.size();
  }

  std::size_t give(std::span<char> room) noexcept {
    if (over_) return CURL_READFUNC_ABORT;
    if (given_ == buffer_.size()) {
      if (taken_ == size_) return 0;
      hungry_ = true;
      buffer_.clear();
      given_ = 0;
      wake();
      return CURL_READFUNC_PAUSE;
    }
    const std::size_t size = std::string_view(buffer_).substr(given_).copy(room.data(), room.size());
    given_ += size;
    return size;
  }

  [[nodiscard]] long status() const noexcept {
    long status = 0;
    curl_easy_getinfo(easy_.get(), CURLINFO_RESPONSE_CODE, &status);
    return status;
  }

  // For the coroutine alone, never in a callback: this goes into libcurl, which may then call back.
  void pause(int what) {
    if (over_) return;
    const CURLcode code = curl_easy_pause(easy_.get(), what);
    if (code != CURLE_OK) finish(code);
  }

  void wake() noexcept { wake_.cancel(); }

  // What is waited for is looked at before, on the same thread: no waking is lost.
  asio::awaitable<void> wait() {
    std::error_code woken;
    co_await wake_.async_wait(asio::redirect_error(asio::use_awaitable, woken));
    const asio::cancellation_state cancellation = co_await asio::this_coro::cancellation_state;
    if (cancellation.cancelled() != asio::cancellation_type::none) {
      throw std::system_error(asio::error::operation_aborted);
    }
  }

  std::shared_ptr<Driver> driver_;
  Source source_;
  Sink sink_;
  asio::steady_timer wake_;
  std::array<char, CURL_ERROR_SIZE> error_{};
  List headers_;
  Easy easy_{curl_easy_init()};
  std::string buffer_;       // from the source to libcurl
  std::size_t given_ = 0;    // how much of it libcurl has
  bool hungry_ = false;      // libcurl waits for the source
  std::uint64_t taken_ = 0;  // from the source, in all
  std::uint64_t size_;       // what it should come to
  std::string received_;     // from libcurl to the sink
  Response response_;
  bool over_ = false;
  CURLcode code_ = CURLE_OK;
};

inline int Driver::on_socket(CURL* easy, curl_socket_t number, int what, void* self, void* /*assigned*/) noexcept {
  try {
    static_cast<Driver*>(self)->watch(number, what);
  } catch (const std::exception& e) {
    // libcurl would give up all transfers for good if it were told so. (Its own closing ones have no Transfer.)
    if (Transfer* transfer = Transfer::of(easy)) transfer->finish(CURLE_FAILED_INIT, e.what());
  }
  return 0;
}

inline void Driver::add(Transfer& transfer) {
  if (!multi_) throw Error(CURLE_ABORTED_BY_CALLBACK, "the client was closed");
  transfers_.insert(&transfer);
  const CURLMcode code = curl_multi_add_handle(multi_.get(), transfer.easy());
  if (code != CURLM_OK) throw Error(CURLE_FAILED_INIT, curl_multi_strerror(code));
}

inline void Driver::remove(Transfer& transfer) noexcept {
  if (transfers_.erase(&transfer) != 0) curl_multi_remove_handle(multi_.get(), transfer.easy());
}

inline void Driver::act(curl_socket_t socket, int events) noexcept {
  if (!multi_) return;
  int running = 0;
  const CURLMcode code = curl_multi_socket_action(multi_.get(), socket, events, &running);
  if (code != CURLM_OK) fail_all(CURLE_FAILED_INIT, curl_multi_strerror(code));
  int left = 0;
  while (const CURLMsg* message = curl_multi_info_read(multi_.get(), &left)) {
    if (message->msg == CURLMSG_DONE) Transfer::of(message->easy_handle)->finish(message->data.result);
  }
}

inline void Driver::fail_all(CURLcode code, const char* why) noexcept {
  for (Transfer* transfer : transfers_) transfer->finish(code, why);
}

inline void Driver::close() noexcept {
  fail_all(CURLE_ABORTED_BY_CALLBACK, "the client was closed");
  while (!transfers_.empty()) remove(**transfers_.begin());
  multi_.reset();
  for (const auto& [number, socket] : sockets_) socket->release();
  sockets_.clear();
  timer_.cancel();
}

/// Whether the next attempt may fare better.
inline bool is_passing(CURLcode code) noexcept {
  switch (code) {
    case CURLE_COULDNT_RESOLVE_HOST:
    case CURLE_COULDNT_CONNECT:
    case CURLE_SSL_CONNECT_ERROR:
    case CURLE_OPERATION_TIMEDOUT:
    case CURLE_SEND_ERROR:
    case CURLE_SEND_FAIL_REWIND:  // libcurl wanted to send a body again by itself
    case CURLE_RECV_ERROR:
    case CURLE_GOT_NOTHING:
    case CURLE_PARTIAL_FILE: return true;
    default: return false;
  }
}
inline bool is_passing(long status) noexcept { return status == 429 || (status >= 500 && status != 501); }

inline bool is_idempotent(std::string_view method) noexcept {
  return method == "GET" || method == "HEAD" || method == "PUT" || method == "DELETE" || method == "OPTIONS";
}

inline asio::awaitable<Response> fetch(std::shared_ptr<Driver> driver, Request request) {
  const Options& options = driver->options();
  const bool repeatable = is_idempotent(request.method);
  Source source = request.open_body ? request.open_body() : Source();
  Sink sink = request.open_sink ? request.open_sink() : Sink();
  for (int attempt = 1;; ++attempt) {
    Response response;
    std::optional<Error> error;
    try {
      Transfer transfer(driver, request, repeatable, std::exchange(source, {}), std::exchange(sink, {}));
      response = co_await transfer.run();
    } catch (const Error& e) {
      error = e;
    }
    bool again = repeatable && attempt < options.max_attempts && response.retry_after <= options.max_delay &&
                 (error ? is_passing(error->code()) : is_passing(response.status));
    if (again && request.open_body) again = static_cast<bool>(source = request.open_body());
    if (again && request.open_sink) again = static_cast<bool>(sink = request.open_sink());
    if (!again) {
      if (error) throw Error(*error);
      co_return response;
    }
    const std::chrono::milliseconds delay = driver->delay_after(attempt);
    asio::steady_timer timer(driver->executor(), std::max<std::chrono::milliseconds>(delay, response.retry_after));
    co_await timer.async_wait(asio::use_awaitable);
  }
}

}  // namespace detail

/// An HTTP client that keeps its connections. Copies share them.
///
/// Its last copy must be destroyed on the executor's thread, unless it was closed.
class Client {
 public:
  explicit Client(asio::any_io_executor executor, Options options = {})
      : driver_(std::make_shared<detail::Driver>(std::move(executor), options)) {}

  /// The answer to a request, whatever its status; throws `Error` if there is none.
  ///
  /// After a 429, a 5xx or a lost connection it tries again, with growing delays, if nothing can be done twice by that:
  /// the method is idempotent (not POST or PATCH), and the body and the sink can be opened again. A server that asks
  /// for more than `max_delay` is not asked again.
  ///
  /// A source and a sink take at most five buffers of 64 KiB, libcurl's included. To cancel it
  /// (or to destroy it) aborts the transfer at once, and closes its connection.
  [[nodiscard]] asio::awaitable<Response> fetch(Request request) const {
    return detail::fetch(driver_, std::move(request));
  }

  /// Aborts the transfers, each with an `Error`, and closes the connections. For the executor's thread.
  void close() const noexcept { driver_->close(); }

 private:
  std::shared_ptr<detail::Driver> driver_;
};

}  // namespace curl

#endif  // RUNTIME_BRIDGE_EXAMPLES_CURL_HPP
