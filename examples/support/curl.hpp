// SPDX-License-Identifier: Apache-2.0
//
// An asynchronous HTTP client: libcurl's multi-socket interface on an Asio executor. Needs Asio >= 1.22.1 and
// libcurl >= 7.75, but no other file of this project.

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

/// *Threads.* Use a client, and everything that it gives out, only on the thread that runs its executor, such as a
/// bridge's worker. There are no locks, and nothing in here blocks that thread.
///
/// *Signals.* libcurl is set not to use signals. With TLS, a lost connection may raise SIGPIPE, so ignore that signal.
namespace curl {

/// Thrown if a transfer gets no response. A response is never an error, whatever its status.
class Error : public std::runtime_error {
 public:
  Error(CURLcode code, const std::string& text) : std::runtime_error(text), code_(code) {}
  [[nodiscard]] CURLcode code() const noexcept { return code_; }

 private:
  CURLcode code_;
};

/// Sets an option of a transfer. libcurl takes the value as a variadic argument, so its type must match exactly.
template <class Value>
requires(std::is_pointer_v<Value> || std::is_same_v<Value, long> ||
         std::is_same_v<Value, curl_off_t>) void set(CURL* easy, CURLoption option, Value value) {
  const CURLcode code = curl_easy_setopt(easy, option, value);
  if (code != CURLE_OK) throw Error(code, curl_easy_strerror(code));
}

/// Gives a request's body: writes the next bytes to `room` and returns how many. 0 means the end.
using Source = std::function<asio::awaitable<std::size_t>(std::span<char> room)>;

/// Takes a response's body. It gets the next piece after it has finished with this one, so a slow sink makes the sender
/// wait, through TCP's flow control.
using Sink = std::function<asio::awaitable<void>(std::string_view piece)>;

/// A source that reads `text`, which must outlive it.
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
  std::string url;                            ///< must be encoded already
  std::vector<std::string> headers = {};      ///< "Name: value"
  std::uint64_t body_size = 0;                ///< total size of what the source gives
  std::function<Source()> open_body = {};     ///< called for each attempt; an empty Source means: do not retry
  std::function<Sink()> open_sink = {};       ///< likewise; it gets the body of a 2xx, else Response does
  std::function<void(CURL*)> configure = {};  ///< sets further options with `set`
};

struct Response {
  long status = 0;
  std::string body = {};               ///< unless it went to a sink
  std::chrono::seconds retry_after{};  ///< the server's Retry-After
};

struct Options {
  std::chrono::milliseconds connect_timeout{10'000};
  std::chrono::seconds stall_timeout{30};         ///< a transfer fails if the server stalls it for this long
  long max_connections = 64;                      ///< further transfers wait in a queue
  std::size_t max_body = std::size_t{16} << 20U;  ///< of a Response's body
  int max_attempts = 4;
  std::chrono::milliseconds first_delay{100};  ///< before the second attempt; doubles each time
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

/// Initialises libcurl once and never cleans up: other parts of the program may use libcurl until it exits.
inline void initialise() {
  static const CURLcode code = curl_global_init(CURL_GLOBAL_DEFAULT);
  if (code != CURLE_OK) throw Error(code, curl_easy_strerror(code));
}

/// Drives one multi handle. libcurl says which descriptors and timeout to wait for, Asio waits for them, and `act`
/// tells libcurl when they are ready.
///
/// libcurl must not be called from its callbacks. So the callbacks only record events and wake coroutines, which resume
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

  /// How long to wait after an attempt. Half of it is random, so that clients do not all retry at the same moment.
  std::chrono::milliseconds delay_after(int attempt) {
    std::chrono::milliseconds delay = options_.first_delay;
    for (int i = 1; i < attempt && delay < options_.max_delay; ++i) delay *= 2;
    delay = std::min(delay, options_.max_delay);
    std::uniform_int_distribution<std::chrono::milliseconds::rep> chance(delay.count() / 2, delay.count());
    return std::chrono::milliseconds(chance(random_));
  }

 private:
  /// A descriptor that libcurl owns. After REMOVE, libcurl may close it and the number may be reused.
  struct Socket {
    Socket(const asio::any_io_executor& executor, curl_socket_t number) : descriptor(executor, number) {}
    Socket(const Socket&) = delete;
    Socket& operator=(const Socket&) = delete;
    ~Socket() { release(); }

    void release() noexcept {
      interest = CURL_POLL_NONE;
      if (descriptor.is_open()) descriptor.release();  // ends the waits; libcurl closes it
    }

    asio::posix::stream_descriptor descriptor;
    int interest = CURL_POLL_NONE;  // CURL_POLL_IN, CURL_POLL_OUT or both
    int waits = CURL_POLL_NONE;     // likewise, for the waits in progress
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

  // If the timer has expired and its handler is queued already, it cannot be cancelled. libcurl checks the time itself,
  // so an extra call does no harm. Zero goes through the queue, too, because libcurl must not be called from here.
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
      // A wait whose handler is queued already keeps the Socket alive, but does nothing, as its `interest` is none.
      if (const auto found = sockets_.extract(number)) found.mapped()->release();
      return;
    }
    std::shared_ptr<Socket>& socket = sockets_[number];
    if (!socket) socket = std::make_shared<Socket>(executor_, number);
    socket->interest = what;
    wait(socket, CURL_POLL_IN);
    wait(socket, CURL_POLL_OUT);
  }

  // The interest may change while a wait is pending. The wait goes on, and its handler checks the interest.
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
  Multi multi_;  // null: closed. Declared last, since its cleanup may call back into this object
};

/// One attempt at a request. Its destructor removes the transfer from libcurl. So the transfer ends with its coroutine,
/// whether that gets a response, throws, is cancelled, or is destroyed with its context.
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
    // Not HTTP/2: libcurl would go on receiving into memory while the transfer is paused.
    set(easy, CURLOPT_HTTP_VERSION, static_cast<long>(CURL_HTTP_VERSION_1_1));
    set(easy, CURLOPT_CONNECTTIMEOUT_MS, static_cast<long>(options.connect_timeout.count()));
    set(easy, CURLOPT_LOW_SPEED_LIMIT, 1L);
    set(easy, CURLOPT_LOW_SPEED_TIME, static_cast<long>(options.stall_timeout.count()));
    set(easy, CURLOPT_WRITEFUNCTION, &Transfer::on_write);
    set(easy, CURLOPT_WRITEDATA, static_cast<void*>(this));
#if LIBCURL_VERSION_NUM >= 0x075700
    // Without this, aborting a transfer during a name look-up blocks until the look-up ends.
    set(easy, CURLOPT_QUICK_EXIT, 1L);
#endif
#if LIBCURL_VERSION_NUM >= 0x075500
    set(easy, CURLOPT_PROTOCOLS_STR, "http,https");
#else
    set(easy, CURLOPT_PROTOCOLS, static_cast<long>(CURLPROTO_HTTP | CURLPROTO_HTTPS));
#endif
    // libcurl resends a request on its own if a reused connection turns out to be dead.
    if (!repeatable) set(easy, CURLOPT_FRESH_CONNECT, 1L);

    if (request.method == "HEAD") {
      set(easy, CURLOPT_NOBODY, 1L);
    } else {
      set(easy, CURLOPT_CUSTOMREQUEST, request.method.c_str());
    }
    // These methods send a Content-Length even if the body is empty.
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

  /// Moves data from the source to libcurl, and from libcurl to the sink, until the response is complete.
  asio::awaitable<Response> run() {
    driver_->add(*this);
    std::string piece;
    while (!over_ || (code_ == CURLE_OK && !received_.empty())) {
      if (!received_.empty()) {
        std::swap(piece, received_);
        received_.clear();
        pause(CURLPAUSE_CONT);  // libcurl may receive the next piece while the sink uses this one
        co_await sink_(piece);
      } else if (hungry_) {
        pause(CURLPAUSE_ALL);  // receiving, too, or a slow source would look like a stalled server
        buffer_.resize(buffer_size);
        buffer_.resize(co_await source_(buffer_));
        taken_ += buffer_.size();
        // libcurl would leave the server waiting for the rest, or send more than the announced size.
        if (taken_ > size_ || (buffer_.empty() && taken_ < size_)) {
          throw Error(CURLE_BAD_FUNCTION_ARGUMENT, "the source gives more or less than the request's body_size");
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

  /// Called by libcurl or the driver when the transfer has ended.
  void finish(CURLcode code, const char* why = nullptr) noexcept {
    if (over_) return;
    over_ = true;
    code_ = code;
    if (why) error_[std::string_view(why).copy(error_.data(), error_.size() - 1)] = '\0';
    wake();
  }

 private:
  static constexpr std::size_t buffer_size = 64 * std::size_t{1024};
  static_assert(buffer_size >= CURL_MAX_WRITE_SIZE,
                "libcurl repeats a refused piece, so it must fit into an empty buffer");

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
        finish(CURLE_FILESIZE_EXCEEDED, "the response is larger than max_body");
      }
      if (over_) return 0;  // a number other than the size ends the transfer
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

  // Only for the coroutine, not for callbacks: this calls libcurl, which may call back.
  void pause(int what) {
    if (over_) return;
    const CURLcode code = curl_easy_pause(easy_.get(), what);
    if (code != CURLE_OK) finish(code);
  }

  void wake() noexcept { wake_.cancel(); }

  // No wake-up is lost, because the coroutine checks its state before it waits, on the thread that wakes it.
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
  std::size_t given_ = 0;    // the part of it that libcurl has taken
  bool hungry_ = false;      // libcurl waits for the source
  std::uint64_t taken_ = 0;  // total from the source
  std::uint64_t size_;       // the expected total
  std::string received_;     // from libcurl to the sink
  Response response_;
  bool over_ = false;
  CURLcode code_ = CURLE_OK;
};

inline int Driver::on_socket(CURL* easy, curl_socket_t number, int what, void* self, void* /*assigned*/) noexcept {
  try {
    static_cast<Driver*>(self)->watch(number, what);
  } catch (const std::exception& e) {
    // Do not return an error: libcurl would then fail all transfers. (A connection that it closes has no Transfer.)
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

/// Whether another attempt may succeed.
inline bool is_passing(CURLcode code) noexcept {
  switch (code) {
    case CURLE_COULDNT_RESOLVE_HOST:
    case CURLE_COULDNT_CONNECT:
    case CURLE_SSL_CONNECT_ERROR:
    case CURLE_OPERATION_TIMEDOUT:
    case CURLE_SEND_ERROR:
    case CURLE_SEND_FAIL_REWIND:  // libcurl tried to resend a body on its own
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

/// An HTTP client that reuses its connections. Copies share them.
///
/// Destroy the last copy on the executor's thread, unless the client was closed.
class Client {
 public:
  explicit Client(asio::any_io_executor executor, Options options = {})
      : driver_(std::make_shared<detail::Driver>(std::move(executor), options)) {}

  /// Returns the response to a request, whatever its status. Throws `Error` if there is none.
  ///
  /// After a 429, a 5xx (except 501) or a lost connection it retries with growing delays, if the request may safely be
  /// repeated: the method is idempotent (not POST or PATCH), and the body and the sink can be opened again. It does not
  /// retry if the server's Retry-After is longer than `max_delay`.
  ///
  /// A source and a sink use at most five buffers of 64 KiB, including libcurl's own. Cancelling or destroying the
  /// coroutine aborts the transfer at once and closes its connection.
  [[nodiscard]] asio::awaitable<Response> fetch(Request request) const {
    return detail::fetch(driver_, std::move(request));
  }

  /// Ends all transfers with an `Error` and closes the connections. Call it on the executor's thread.
  void close() const noexcept { driver_->close(); }

 private:
  std::shared_ptr<detail::Driver> driver_;
};

}  // namespace curl

#endif  // RUNTIME_BRIDGE_EXAMPLES_CURL_HPP
