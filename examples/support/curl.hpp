// SPDX-License-Identifier: Apache-2.0
//
// An asynchronous HTTP client: libcurl's multi-socket interface on an Asio executor. Needs Asio >= 1.22.1 and
// libcurl >= 7.75, but no other file of this project.

#ifndef RUNTIME_BRIDGE_EXAMPLES_CURL_HPP
#define RUNTIME_BRIDGE_EXAMPLES_CURL_HPP

#include <curl/curl.h>
#include <sys/socket.h>
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
#include <cctype>
#include <charconv>
#include <chrono>
#include <climits>
#include <cstddef>
#include <cstdint>
#include <exception>
#include <functional>
#include <limits>
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
///
/// *Forks.* A client belongs to the process that made it. If a forked child destroys its copy, that closes the child's
/// descriptors and says nothing to the servers. It leaks the memory, since the parent may have forked at any moment.
///
/// *Durations.* `max()` is no limit, and zero or less is now.
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

struct Response;

struct Request {
  Request(std::string the_method, std::string the_url) : method(std::move(the_method)), url(std::move(the_url)) {}

  std::string method;
  std::string url;                        ///< must be encoded already
  std::vector<std::string> headers = {};  ///< "Name: value"
  std::uint64_t body_size = 0;  ///< total size of what the source gives; an octet-stream, unless headers differ
  std::function<Source()> open_body = {};  ///< called for each attempt; an empty Source means: do not retry
  std::function<Sink()> open_sink = {};    ///< likewise; it gets the body of a 2xx, else Response does
  std::string user = {}, password = {};    ///< with these the request is signed, or else sent with Basic authentication
  std::string aws_sigv4 = {};              ///< how to sign, as in CURLOPT_AWS_SIGV4

  /// Whether a response is a failure that may pass, so that the request is repeated. By default its status decides.
  std::function<bool(const Response&)> may_pass = {};
  /// Sets further options with `set`. Without it, libcurl's handle is used again for other requests, which is faster.
  std::function<void(CURL*)> configure = {};
};

struct Response {
  /// Returns the value of the first header with this name, in any case; empty if there is none.
  [[nodiscard]] std::string_view header(std::string_view name) const;

  long status = 0;
  std::string body = {};               ///< unless it went to a sink
  std::string headers = {};            ///< as they were sent
  std::chrono::seconds retry_after{};  ///< the server's Retry-After, from now
};

struct Options {
  Options() = default;  // not an aggregate: g++ 12 destroys temporary aggregates in a co_await twice

  std::chrono::milliseconds connect_timeout{10'000};
  std::chrono::seconds stall_timeout{30};  ///< a transfer fails if the server stalls it for this long, at least 1 s
  long max_connections = 64;               ///< further transfers wait in a queue
  std::size_t max_body = std::size_t{16} << 20U;  ///< of a Response's body
  int max_attempts = 4;
  std::chrono::milliseconds first_delay{100};  ///< before the second attempt; doubles each time
  std::chrono::milliseconds max_delay{5'000};  ///< a longer Retry-After is respected all the same
};

namespace detail {

/// Waits until somebody cancels the timer, which never expires. No wake-up is lost if the coroutine checks its state
/// before it waits, on the thread that wakes it. Throws if the coroutine itself is cancelled.
inline asio::awaitable<void> wait_until_woken(asio::steady_timer& timer) {
  std::error_code woken;
  co_await timer.async_wait(asio::redirect_error(asio::use_awaitable, woken));
  const asio::cancellation_state cancellation = co_await asio::this_coro::cancellation_state;
  if (cancellation.cancelled() != asio::cancellation_type::none) {
    throw std::system_error(asio::error::operation_aborted);
  }
}

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

using Clock = std::chrono::steady_clock;

/// The time after this duration, which may be any.
template <class Duration>
Clock::time_point after(Duration duration) {
  const Clock::time_point now = Clock::now();
  if (duration <= Duration::zero()) return now;
  const auto longest = std::chrono::duration_cast<std::chrono::hours>(Clock::time_point::max() - now);
  return duration < longest ? now + duration : Clock::time_point::max();
}

inline bool equal_but_for_case(std::string_view a, std::string_view b) noexcept {
  const auto lower = [](char c) { return std::tolower(static_cast<unsigned char>(c)); };
  return std::ranges::equal(a, b, {}, lower, lower);
}

/// Throws if part of the request would end up elsewhere in what is sent, or would be cut off.
inline void check(const Request& request) {
  const auto is_control = [](char c) { return static_cast<unsigned char>(c) < ' ' || c == 127; };
  const auto has_control = [&](const std::string& text) { return std::ranges::any_of(text, is_control); };
  const auto has_space = [&](const std::string& text) { return has_control(text) || text.find(' ') != text.npos; };
  const auto ends_line = [](const std::string& text) { return text.find_first_of({"\r\n\0", 3}) != text.npos; };
  if (request.method.empty() || has_space(request.method)) {
    throw Error(CURLE_BAD_FUNCTION_ARGUMENT, "the method is not a word");
  }
  if (has_space(request.url)) throw Error(CURLE_URL_MALFORMAT, "the URL contains a space or a control character");
  if (std::ranges::any_of(request.headers, ends_line)) {
    throw Error(CURLE_BAD_FUNCTION_ARGUMENT, "a header contains the end of a line, or a NUL");
  }
  for (const std::string* text : {&request.user, &request.password, &request.aws_sigv4}) {
    if (has_control(*text)) throw Error(CURLE_BAD_FUNCTION_ARGUMENT, "the credentials contain a control character");
  }
}

/// Whether the URL's host is this machine. No proxy can help there, whatever the environment says.
inline bool is_loopback(std::string_view url) noexcept {
  const std::size_t scheme = url.find("://");
  if (scheme != url.npos) url.remove_prefix(scheme + 3);
  const std::string_view authority = url.substr(0, url.find_first_of("/?#"));
  const std::string_view host = authority.substr(authority.rfind('@') + 1);
  return host.starts_with("[::1]") || host.starts_with("127.") ||
         equal_but_for_case(host.substr(0, host.find(':')), "localhost");
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
    engine_ = std::make_unique<Engine>(executor_);
    CURLM* multi = engine_->multi.get();
    if (!multi) throw std::bad_alloc();
    curl_multi_setopt(multi, CURLMOPT_SOCKETFUNCTION, &Driver::on_socket);
    curl_multi_setopt(multi, CURLMOPT_SOCKETDATA, this);
    curl_multi_setopt(multi, CURLMOPT_TIMERFUNCTION, &Driver::on_timer);
    curl_multi_setopt(multi, CURLMOPT_TIMERDATA, this);
    curl_multi_setopt(multi, CURLMOPT_MAX_TOTAL_CONNECTIONS, options_.max_connections);
    curl_multi_setopt(multi, CURLMOPT_MAXCONNECTS, options_.max_connections);
  }
  Driver(const Driver&) = delete;
  Driver& operator=(const Driver&) = delete;
  ~Driver() { close(); }

  [[nodiscard]] const asio::any_io_executor& executor() const noexcept { return executor_; }
  [[nodiscard]] const Options& options() const noexcept { return options_; }

  /// Returns a handle whose options are the defaults. A new one costs more than a small request.
  Easy take_easy() {
    Easy easy;
    if (engine_ && !engine_->idle.empty()) {
      easy = std::move(engine_->idle.back());
      engine_->idle.pop_back();
    } else {
      easy.reset(curl_easy_init());
    }
    if (!easy) throw std::bad_alloc();
    set(easy.get(), CURLOPT_OPENSOCKETFUNCTION, &Driver::on_open);
    set(easy.get(), CURLOPT_OPENSOCKETDATA, static_cast<void*>(this));
    set(easy.get(), CURLOPT_CLOSESOCKETFUNCTION, &Driver::on_close);
    set(easy.get(), CURLOPT_CLOSESOCKETDATA, static_cast<void*>(this));
    return easy;
  }
  void give_back(Easy easy) noexcept {
    // After curl_easy_reset, libcurl 8.10 to 8.13 ignores the limit of connections (curl#17052).
    static const unsigned version = curl_version_info(CURLVERSION_NOW)->version_num;
    if (!engine_ || engine_->idle.size() == engine_->idle.capacity() || (version >= 0x080a00 && version < 0x080e00)) {
      return;
    }
    curl_easy_reset(easy.get());
    engine_->idle.push_back(std::move(easy));
  }

  void add(Transfer& transfer);
  void remove(Transfer& transfer) noexcept;
  void close() noexcept;

  /// Whether this is a forked child, which has copies of the parent's connections.
  [[nodiscard]] bool is_forked() const noexcept { return getpid() != owner_; }

  /// How long to wait after an attempt. Half of it is random, so that clients do not all retry at the same moment.
  std::chrono::milliseconds delay_after(int attempt) {
    using std::chrono::milliseconds;
    const milliseconds limit = std::max(options_.max_delay, milliseconds::zero());
    milliseconds delay = std::clamp(options_.first_delay, milliseconds::zero(), limit);
    for (int i = 1; i < attempt && delay < limit; ++i) delay = delay > limit / 2 ? limit : delay * 2;
    std::uniform_int_distribution<milliseconds::rep> chance(delay.count() / 2, delay.count());
    return milliseconds(chance(random_));
  }

 private:
  /// A descriptor that libcurl watches. Asio knows a connection until libcurl closes it, rather than for each request
  /// anew. After REMOVE, libcurl may close any other descriptor, and the number may be reused.
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

  /// What a forked child must not touch: it shares the connections and the executor's epoll set with its parent.
  struct Engine {
    explicit Engine(const asio::any_io_executor& executor) : timer(executor) { idle.reserve(64); }

    asio::steady_timer timer;
    std::map<curl_socket_t, std::shared_ptr<Socket>> sockets;
    std::vector<Easy> idle;
    Multi multi{curl_multi_init()};  // declared last, since its cleanup calls back
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

  static curl_socket_t on_open(void* self, curlsocktype /*purpose*/, curl_sockaddr* address) noexcept {
    try {
      auto& connections = static_cast<Driver*>(self)->connections_;
      const int number = ::socket(address->family, address->socktype | SOCK_CLOEXEC, address->protocol);
      if (number < 0) return CURL_SOCKET_BAD;
      try {
        connections.insert(number);
        return number;
      } catch (const std::exception&) {
        ::close(number);
      }
    } catch (const std::exception&) {
    }
    return CURL_SOCKET_BAD;
  }

  static int on_close(void* self, curl_socket_t number) noexcept {
    auto& driver = *static_cast<Driver*>(self);
    driver.connections_.erase(number);
    driver.forget(number);
    return ::close(number);
  }

  // Zero means through the executor's queue, because libcurl must not be called from its callbacks.
  void set_timer(long milliseconds) {
    due_ = milliseconds > 0 ? after(std::chrono::milliseconds(milliseconds)) : Clock::time_point::max();
    if (milliseconds > 0) return arm();
    if (milliseconds < 0 || turn_ahead_) return;
    asio::post(executor_, [weak = weak_from_this()] {
      const auto self = weak.lock();
      if (!self) return;
      self->turn_ahead_ = false;
      self->act(CURL_SOCKET_TIMEOUT, 0);
    });
    turn_ahead_ = true;
  }

  // libcurl changes its timeout several times a request, and each change of Asio's first timer is a system call. So an
  // earlier wait goes on, and then waits for the rest. It waits for a second at most, because the executor's context
  // does not run out of work before it ends.
  void arm() {
    const Clock::time_point end = std::min(due_, after(std::chrono::seconds(1)));
    if (armed_ <= end) return;
    engine_->timer.expires_at(end);
    engine_->timer.async_wait([weak = weak_from_this()](const std::error_code& error) {
      const auto self = weak.lock();
      if (self && !error) self->on_armed();
    });
    armed_ = end;
  }
  void on_armed() noexcept {
    armed_ = Clock::time_point::max();
    if (!engine_ || due_ == Clock::time_point::max()) return;
    if (Clock::now() >= due_) {
      due_ = Clock::time_point::max();
      return act(CURL_SOCKET_TIMEOUT, 0);
    }
    try {
      arm();
    } catch (const std::exception& e) {
      fail_all(CURLE_OUT_OF_MEMORY, e.what());
    }
  }

  // A wait whose handler is queued already keeps the Socket alive, but does nothing, as its `interest` is none.
  void forget(curl_socket_t number) noexcept {
    if (const auto found = engine_->sockets.extract(number)) found.mapped()->release();
  }

  void watch(curl_socket_t number, int what) {
    if (what == CURL_POLL_REMOVE && !connections_.contains(number)) return forget(number);
    std::shared_ptr<Socket>& socket = engine_->sockets[number];
    if (what == CURL_POLL_REMOVE) {
      // A wait in progress would keep the executor's context from running out of work.
      if (!socket) return;
      socket->interest = CURL_POLL_NONE;
      if (socket->waits != CURL_POLL_NONE) socket->descriptor.cancel();
      return;
    }
    if (!socket) socket = std::make_shared<Socket>(executor_, number);
    socket->interest = what;
    wait(socket, CURL_POLL_IN);
    wait(socket, CURL_POLL_OUT);
  }

  // The interest may change while a wait is pending, or while its handler is queued. Its handler checks the interest.
  void wait(const std::shared_ptr<Socket>& socket, int direction) {
    if (!(socket->interest & direction) || (socket->waits & direction)) return;
    const bool in = direction == CURL_POLL_IN;
    using asio::posix::descriptor_base;
    socket->descriptor.async_wait(in ? descriptor_base::wait_read : descriptor_base::wait_write,
                                  [weak = weak_from_this(), socket, direction, in](const std::error_code& error) {
                                    socket->waits &= ~direction;
                                    const auto self = weak.lock();
                                    if (!self || !(socket->interest & direction)) return;
                                    if (error != asio::error::operation_aborted) {
                                      const int ready = in ? CURL_CSELECT_IN : CURL_CSELECT_OUT;
                                      self->act(socket->descriptor.native_handle(), error ? CURL_CSELECT_ERR : ready);
                                      if (error) return;
                                    }
                                    self->wait(socket, direction);
                                  });
    socket->waits |= direction;
  }

  void act(curl_socket_t socket, int events) noexcept;
  void fail_all(CURLcode code, const char* why) noexcept;

  const pid_t owner_ = getpid();
  asio::any_io_executor executor_;
  Options options_;
  std::minstd_rand random_{std::random_device{}()};
  Clock::time_point due_ = Clock::time_point::max();    // when libcurl wants to be called
  Clock::time_point armed_ = Clock::time_point::max();  // when the timer's wait ends; max: there is none
  bool turn_ahead_ = false;                             // libcurl will be called in any case, soon
  std::set<curl_socket_t> connections_;
  std::set<Transfer*> transfers_;
  std::unique_ptr<Engine> engine_;  // null: closed
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
        easy_(driver_->take_easy()),
        reusable_(!request.configure),
        size_(source_ ? request.body_size : 0) {
    CURL* easy = easy_.get();
    const Options& options = driver_->options();
    set(easy, CURLOPT_PRIVATE, static_cast<void*>(this));
    set(easy, CURLOPT_ERRORBUFFER, error_.data());
    set(easy, CURLOPT_NOSIGNAL, 1L);
    set(easy, CURLOPT_URL, request.url.c_str());
    set(easy, CURLOPT_PATH_AS_IS, 1L);
    // Not HTTP/2: libcurl would go on receiving into memory while the transfer is paused.
    set(easy, CURLOPT_HTTP_VERSION, static_cast<long>(CURL_HTTP_VERSION_1_1));
    // libcurl takes 0 for its own default, and keeps an int.
    set(easy, CURLOPT_CONNECTTIMEOUT_MS, within(options.connect_timeout.count(), INT_MAX));
    if (options.stall_timeout != std::chrono::seconds::max()) {
      set(easy, CURLOPT_LOW_SPEED_LIMIT, 1L);
      set(easy, CURLOPT_LOW_SPEED_TIME, within(options.stall_timeout.count(), USHRT_MAX));
    }
    if (is_loopback(request.url)) set(easy, CURLOPT_PROXY, "");
    set(easy, CURLOPT_HEADERFUNCTION, &Transfer::on_header);
    set(easy, CURLOPT_HEADERDATA, static_cast<void*>(this));
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
    for (const std::string& header : request.headers) append_header(header.c_str());
    if (size_ != 0) {
      // As libcurl's POST, whatever the method is. In front of each body of a PUT it sends an Expect, and waits a
      // second for servers that do not know that. (An empty "Expect:" among the headers would be signed.)
      set(easy, CURLOPT_POST, 1L);
      set(easy, CURLOPT_POSTFIELDSIZE_LARGE, static_cast<curl_off_t>(size_));
      set(easy, CURLOPT_READFUNCTION, &Transfer::on_read);
      set(easy, CURLOPT_READDATA, static_cast<void*>(this));
      const auto is_type = [](std::string_view header) {
        return equal_but_for_case(header.substr(0, header.find_first_of(":;")), "Content-Type");
      };
      if (std::ranges::none_of(request.headers, is_type)) append_header("Content-Type: application/octet-stream");
    } else if (source_ || request.method == "PUT" || request.method == "POST" || request.method == "PATCH") {
      // These methods send a Content-Length even if the body is empty.
      set(easy, CURLOPT_UPLOAD, 1L);
      set(easy, CURLOPT_INFILESIZE_LARGE, curl_off_t{0});
    }
    set(easy, CURLOPT_HTTPHEADER, headers_.get());
    if (!request.user.empty()) set(easy, CURLOPT_USERNAME, request.user.c_str());
    if (!request.password.empty()) set(easy, CURLOPT_PASSWORD, request.password.c_str());
    if (!request.aws_sigv4.empty()) set(easy, CURLOPT_AWS_SIGV4, request.aws_sigv4.c_str());
    if (request.configure) request.configure(easy);
  }
  Transfer(const Transfer&) = delete;
  Transfer& operator=(const Transfer&) = delete;
  ~Transfer() {
    driver_->remove(*this);
    if (reusable_ && over_ && code_ == CURLE_OK) driver_->give_back(std::move(easy_));
  }

  static Transfer* of(CURL* easy) noexcept {
    Transfer* transfer = nullptr;
    curl_easy_getinfo(easy, CURLINFO_PRIVATE, &transfer);
    return transfer;
  }
  [[nodiscard]] CURL* easy() const noexcept { return easy_.get(); }
  [[nodiscard]] bool is_over() const noexcept { return over_; }
  /// For a forked child.
  void leak() noexcept {
    (void)easy_.release();
    (void)headers_.release();
  }

  /// Moves data from the source to libcurl, and from libcurl to the sink, until the response is complete.
  asio::awaitable<Response> run() {
    // Before the request is sent, so that libcurl need not be paused for a small body, nor a server wait for it.
    if (size_ != 0) co_await refill();
    // The whole body is there: libcurl sends it together with the headers.
    if (size_ != 0 && taken_ == size_) set(easy_.get(), CURLOPT_POSTFIELDS, buffer_.data());
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
        co_await refill();
        hungry_ = false;
        pause(CURLPAUSE_CONT);
      } else {
        co_await wait_until_woken(wake_);
      }
    }
    if (code_ != CURLE_OK) throw Error(code_, error_[0] != '\0' ? error_.data() : curl_easy_strerror(code_));
    response_.status = status();
    curl_off_t seconds = 0;  // less than zero for a date that has passed
    curl_easy_getinfo(easy_.get(), CURLINFO_RETRY_AFTER, &seconds);
    const std::string_view text = response_.header("Retry-After");
    if (std::from_chars(text.data(), text.data() + text.size(), seconds).ec == std::errc::result_out_of_range) {
      seconds = std::numeric_limits<curl_off_t>::max();  // where libcurl has 0
    }
    response_.retry_after = std::chrono::seconds(std::max<curl_off_t>(seconds, 0));
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

  static constexpr std::size_t max_headers = 256 * std::size_t{1024};

  template <class Number>
  static long within(Number number, long most) noexcept {
    return static_cast<long>(std::clamp<Number>(number, 1, most));
  }

  void append_header(const char* header) {
    curl_slist* longer = curl_slist_append(headers_.get(), header);
    if (!longer) throw std::bad_alloc();
    (void)headers_.release();
    headers_.reset(longer);
  }

  static std::size_t on_header(const char* data, std::size_t /*one*/, std::size_t size, void* self) noexcept {
    return static_cast<Transfer*>(self)->receive_header({data, size});
  }
  static std::size_t on_write(const char* data, std::size_t /*one*/, std::size_t size, void* self) noexcept {
    return static_cast<Transfer*>(self)->receive({data, size});
  }
  static std::size_t on_read(char* room, std::size_t /*one*/, std::size_t size, void* self) noexcept {
    return static_cast<Transfer*>(self)->give({room, size});
  }

  std::size_t receive_header(std::string_view line) noexcept {
    std::string& headers = response_.headers;
    try {
      if (line.starts_with("HTTP/")) headers.clear();  // what came before was an interim response, or a proxy's
      if (headers.size() + line.size() > max_headers)
        finish(CURLE_FILESIZE_EXCEEDED, "the response's head is too large");
      if (over_) return 0;
      headers += line;
      return line.size();
    } catch (const std::exception& e) {
      finish(CURLE_OUT_OF_MEMORY, e.what());
      return 0;
    }
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
      wake();
      return CURL_READFUNC_PAUSE;
    }
    const std::size_t size = std::string_view(buffer_).substr(given_).copy(room.data(), room.size());
    given_ += size;
    return size;
  }

  asio::awaitable<void> refill() {
    // One more than what is missing, to notice a source that gives more.
    buffer_.resize(static_cast<std::size_t>(std::min<std::uint64_t>(buffer_size, size_ - taken_ + 1)));
    const std::size_t size = co_await source_(buffer_);
    taken_ += size;
    // libcurl would leave the server waiting for the rest, or send more than the announced size.
    if (taken_ > size_ || size == 0 || size > buffer_.size()) {
      throw Error(CURLE_BAD_FUNCTION_ARGUMENT, "the source gives more or less than the request's body_size");
    }
    buffer_.resize(size);
    given_ = 0;
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

  std::shared_ptr<Driver> driver_;
  Source source_;
  Sink sink_;
  asio::steady_timer wake_;
  std::array<char, CURL_ERROR_SIZE> error_{};
  List headers_;
  Easy easy_;
  bool reusable_;
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
  if (!engine_) throw Error(CURLE_ABORTED_BY_CALLBACK, "the client was closed");
  transfers_.insert(&transfer);
  const bool ahead = std::exchange(turn_ahead_, true);  // it is now, rather than through the queue
  const CURLMcode code = curl_multi_add_handle(engine_->multi.get(), transfer.easy());
  turn_ahead_ = ahead;
  if (code != CURLM_OK) throw Error(CURLE_FAILED_INIT, curl_multi_strerror(code));
  act(CURL_SOCKET_TIMEOUT, 0);
}

inline void Driver::remove(Transfer& transfer) noexcept {
  if (!transfers_.contains(&transfer)) return;
  if (!transfer.is_over() && is_forked()) return transfer.leak();
  transfers_.erase(&transfer);
  curl_multi_remove_handle(engine_->multi.get(), transfer.easy());
}

inline void Driver::act(curl_socket_t socket, int events) noexcept {
  if (!engine_) return;
  CURLM* multi = engine_->multi.get();
  int running = 0;
  const CURLMcode code = curl_multi_socket_action(multi, socket, events, &running);
  if (code != CURLM_OK) fail_all(CURLE_FAILED_INIT, curl_multi_strerror(code));
  int left = 0;
  while (const CURLMsg* message = curl_multi_info_read(multi, &left)) {
    if (message->msg == CURLMSG_DONE) Transfer::of(message->easy_handle)->finish(message->data.result);
  }
}

inline void Driver::fail_all(CURLcode code, const char* why) noexcept {
  for (Transfer* transfer : transfers_) transfer->finish(code, why);
}

inline void Driver::close() noexcept {
  if (!engine_) return;
  if (is_forked()) {
    for (const curl_socket_t number : connections_) ::close(number);
    connections_.clear();
    (void)engine_.release();
    return;
  }
  fail_all(CURLE_ABORTED_BY_CALLBACK, "the client was closed");
  while (!transfers_.empty()) remove(**transfers_.begin());
  engine_->multi.reset();
  engine_.reset();
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
inline bool is_passing(long status) noexcept {
  constexpr std::array<long, 6> passing = {408, 429, 500, 502, 503, 504};
  return std::ranges::find(passing, status) != passing.end();
}

inline bool is_idempotent(std::string_view method) noexcept {
  return method == "GET" || method == "HEAD" || method == "PUT" || method == "DELETE" || method == "OPTIONS";
}

inline asio::awaitable<Response> fetch(std::shared_ptr<Driver> driver, Request request) {
  check(request);
  const Options& options = driver->options();
  const bool repeatable = is_idempotent(request.method);
  Source source = request.open_body ? request.open_body() : Source();
  Sink sink = request.open_sink ? request.open_sink() : Sink();
  if (request.open_body && !source) throw Error(CURLE_SEND_FAIL_REWIND, "the body cannot be sent again");
  for (int attempt = 1;; ++attempt) {
    Response response;
    std::optional<Error> error;
    try {
      Transfer transfer(driver, request, repeatable, std::exchange(source, {}), std::exchange(sink, {}));
      response = co_await transfer.run();
    } catch (const Error& e) {
      error = e;
    }
    const auto may_pass = [&] { return request.may_pass ? request.may_pass(response) : is_passing(response.status); };
    bool again = repeatable && attempt < options.max_attempts && (error ? is_passing(error->code()) : may_pass());
    if (again && request.open_body) again = static_cast<bool>(source = request.open_body());
    if (again && request.open_sink) again = static_cast<bool>(sink = request.open_sink());
    if (!again) {
      if (error) throw Error(*error);
      co_return response;
    }
    const auto end = std::max(after(driver->delay_after(attempt)), after(response.retry_after));
    asio::steady_timer timer(driver->executor(), end);
    co_await timer.async_wait(asio::use_awaitable);
  }
}

}  // namespace detail

inline std::string_view Response::header(std::string_view name) const {
  for (std::string_view rest = headers; !rest.empty();) {
    const std::size_t size = std::min(rest.find('\n'), rest.size() - 1) + 1;
    std::string_view line = rest.substr(0, size);
    rest.remove_prefix(size);
    if (line.size() <= name.size() || line[name.size()] != ':') continue;
    if (!detail::equal_but_for_case(line.substr(0, name.size()), name)) continue;
    line.remove_prefix(name.size() + 1);
    const std::size_t begin = line.find_first_not_of(" \t\r\n");
    return begin == line.npos ? std::string_view() : line.substr(begin, line.find_last_not_of(" \t\r\n") + 1 - begin);
  }
  return {};
}

/// An HTTP client that reuses its connections. Copies share them.
///
/// Destroy the last copy on the executor's thread, unless the client was closed.
class Client {
 public:
  explicit Client(asio::any_io_executor executor, Options options = {})
      : driver_(owner(std::make_shared<detail::Driver>(std::move(executor), options))) {}

  /// Returns the response to a request, whatever its status. Throws `Error` if there is none.
  ///
  /// After a 408, 429, 500, 502, 503, 504 or a lost connection it retries with growing delays, if the request may
  /// safely be repeated: the method is idempotent (not POST or PATCH), and the body and the sink can be opened again.
  /// It waits as long as the server's Retry-After says, so give calls a deadline.
  ///
  /// A source and a sink use at most five buffers of 64 KiB, including libcurl's own. Cancelling or destroying the
  /// coroutine aborts the transfer at once and closes its connection.
  [[nodiscard]] asio::awaitable<Response> fetch(Request request) const {
    return detail::fetch(driver_->shared_from_this(), std::move(request));
  }

  /// Ends all transfers with an `Error` and closes the connections. Call it on the executor's thread.
  void close() const noexcept { driver_->close(); }

 private:
  // The transfers share the driver, but not this. In a forked child they never end.
  static std::shared_ptr<detail::Driver> owner(const std::shared_ptr<detail::Driver>& driver) {
    return {driver.get(), [driver](detail::Driver*) {
              if (driver->is_forked()) driver->close();
            }};
  }

  std::shared_ptr<detail::Driver> driver_;
};

}  // namespace curl

#endif  // RUNTIME_BRIDGE_EXAMPLES_CURL_HPP
