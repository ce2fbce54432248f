// SPDX-License-Identifier: Apache-2.0
//
// examples/support/curl.hpp, against a server in this process that fails on purpose.

#include "support/curl.hpp"

#include <dlfcn.h>
#include <netdb.h>
#include <sys/socket.h>

#include <asio/post.hpp>
#include <atomic>
#include <cstring>
#include <functional>
#include <list>
#include <memory>
#include <optional>
#include <semaphore>

#include "http_server.hpp"
#include "support.hpp"

#if __has_include(<catch2/generators/catch_generators.hpp>)
#include <catch2/generators/catch_generators.hpp>
#endif

namespace {

/// While it exists, look-ups of this name block.
class SlowName {
 public:
  static constexpr const char* name = "slow.test";
  SlowName() { enabled = true; }
  ~SlowName() {
    enabled = false;
    await_state([] { return waiting == 0; });
  }
  static void look_up() {
    ++waiting;
    while (enabled) std::this_thread::sleep_for(1ms);
    --waiting;
  }
  static inline std::atomic<int> waiting = 0;

 private:
  static inline std::atomic<bool> enabled = false;
};

}  // namespace

// Replaces libc's, which libcurl's thread calls.
extern "C" int getaddrinfo(const char* node, const char* service, const addrinfo* hints, addrinfo** result) {
  if (node && std::strcmp(node, SlowName::name) == 0) {
    SlowName::look_up();
    return EAI_FAIL;
  }
  static const auto real = reinterpret_cast<decltype(&getaddrinfo)>(dlsym(RTLD_NEXT, "getaddrinfo"));
  return real(node, service, hints, result);
}

namespace {

constexpr std::size_t mebibyte = std::size_t{1} << 20U;

/// Retries almost at once, unless told otherwise.
curl::Options quick() {
  curl::Options options;
  options.first_delay = 1ms;
  options.max_delay = 10ms;
  return options;
}

/// A bridge and a client on it.
class Http {
 public:
  explicit Http(curl::Options options = quick()) : client(bridge.get_executor(), options) {}
  Http(const Http&) = delete;
  Http& operator=(const Http&) = delete;
  ~Http() {
    (void)bridge.block_on([&] { client.close(); });
  }

  curl::Response fetch(const curl::Request& request) {
    return unwrap(bridge.block_on([&] { return client.fetch(request); }));
  }
  curl::Response get(const std::string& url) { return fetch({"GET", url}); }

  CURLcode failure(const curl::Request& request) {
    try {
      fetch(request);
      return CURLE_OK;
    } catch (const curl::Error& e) {
      return e.code();
    }
  }

  /// Whether a deadline ends the transfer soon after it has passed.
  bool ends_in_time(const curl::Request& request) {
    const auto start = std::chrono::steady_clock::now();
    const auto result = bridge.block_on_for([&] { return client.fetch(request); }, 100ms);
    return !result && result.error() == BridgeError::TimedOut && std::chrono::steady_clock::now() - start < 2s;
  }

  RuntimeBridge bridge;
  curl::Client client;
};

curl::Request upload(const std::string& url, std::string_view text, const std::string& method = "PUT") {
  curl::Request request(method, url);
  request.body_size = text.size();
  request.open_body = [text] { return curl::from_memory(text); };
  return request;
}

/// A body of this size with varying bytes.
std::string pattern(std::size_t size) {
  std::string text(size, '\0');
  for (std::size_t i = 0; i < size; ++i) text[i] = static_cast<char>(i * 2654435761U >> 13U);
  return text;
}

curl::Request download(const std::string& url, std::string& into) {
  curl::Request request("GET", url);
  request.open_sink = [&into] {
    into.clear();
    return [&into](std::string_view piece) -> awaitable<void> {
      into += piece;
      co_return;
    };
  };
  return request;
}

/// Transfers whose sink never returns, or whose source does not after the first byte.
curl::Request stuck_download(const std::string& url) {
  curl::Request request("GET", url);
  request.open_sink = [] { return [](std::string_view) { return park(); }; };
  return request;
}
curl::Request stuck_upload(const std::string& url) {
  curl::Request request("PUT", url);
  request.body_size = 100;
  request.open_body = [] {
    return [given = false](std::span<char> room) mutable -> awaitable<std::size_t> {
      if (std::exchange(given, true)) co_await park();
      room[0] = 'x';
      co_return 1;
    };
  };
  return request;
}

/// A port that neither accepts nor refuses connections: the queue of its listener is full.
class FullPort {
 public:
  FullPort() {
    acceptor_.listen(0);
    const auto address = acceptor_.local_endpoint();
    for (asio::ip::tcp::socket& socket : sockets_) {
      socket.open(asio::ip::tcp::v4());
      socket.non_blocking(true);
      // Asio's connect would wait.
      (void)::connect(socket.native_handle(), address.data(), static_cast<socklen_t>(address.size()));
    }
  }
  [[nodiscard]] std::string url() const {
    return "http://127.0.0.1:" + std::to_string(acceptor_.local_endpoint().port()) + "/";
  }

 private:
  asio::io_context context_;
  asio::ip::tcp::acceptor acceptor_ = [this] {
    asio::ip::tcp::acceptor acceptor(context_, asio::ip::tcp::v4());
    acceptor.bind({asio::ip::address_v4::loopback(), 0});
    return acceptor;
  }();
  std::array<asio::ip::tcp::socket, 4> sockets_{asio::ip::tcp::socket(context_), asio::ip::tcp::socket(context_),
                                                asio::ip::tcp::socket(context_), asio::ip::tcp::socket(context_)};
};

awaitable<bool> hello(Exchange& exchange) {
  co_await exchange.answer(200, "hello");
  co_return true;
}

awaitable<bool> never(Exchange& exchange) {
  co_await exchange.silence();
  co_return false;
}

/// Fails the given number of times, and then answers "hello".
class Flaky {
 public:
  enum How { with_503, with_501, by_hanging_up, by_hanging_up_half_way };
  Flaky(How how, int times) : how_(how), times_(times) {}

  awaitable<bool> operator()(Exchange& exchange) {
    last_body = co_await exchange.body();
    if (times_-- <= 0) co_return co_await hello(exchange);
    switch (how_) {
      case with_503: co_await exchange.answer(503, "not now"); co_return true;
      case with_501: co_await exchange.answer(501, "never"); co_return true;
      case by_hanging_up: break;
      case by_hanging_up_half_way: co_await exchange.write("HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhe"); break;
    }
    co_return false;
  }

  std::string last_body;  // to be read after the answer has come

 private:
  How how_;
  int times_;
};

HttpServer::Handler handler(Flaky& flaky) {
  return [&flaky](Exchange& exchange) { return flaky(exchange); };
}

}  // namespace

// ---------------------------------------------------------------------------------------------------------------------
// Requests and answers

TEST_CASE("curl: the request arrives as it was made, and the status is a value") {
  std::string seen;
  HttpServer server([&](Exchange& exchange) -> awaitable<bool> {
    const std::string body = co_await exchange.body();
    seen = exchange.method + ' ' + exchange.target + ' ' + exchange.headers["x-colour"] + ' ' +
           exchange.headers["content-length"] + ' ' + body;
    co_await exchange.answer(exchange.target == "/gone" ? 404 : 201, "made");
    co_return true;
  });
  Http http;
  curl::Request put = upload(server.url("/a/../b%20c?x=1&y=%2B"), "text");
  put.headers = {"X-Colour: blue"};
  const curl::Response made = http.fetch(put);
  CHECK(made.status == 201);
  CHECK(made.body == "made");
  CHECK(seen == "PUT /a/../b%20c?x=1&y=%2B blue 4 text");
  CHECK(http.get(server.url("/gone")).status == 404);
  CHECK(seen == "GET /gone   ");
  CHECK(http.fetch({"HEAD", server.url()}).body.empty());
  CHECK(seen == "HEAD /   ");
  CHECK(http.fetch({"DELETE", server.url()}).body == "made");
  CHECK(seen == "DELETE /   ");
  CHECK(http.fetch({"POST", server.url()}).body == "made");
  CHECK(seen == "POST /  0 ");
  CHECK(http.fetch(upload(server.url(), "", "PUT")).body == "made");
  CHECK(seen == "PUT /  0 ");
  CHECK(server.connections == 2);  // one of them for the POST, see below
}

TEST_CASE("curl: an answer in chunks") {
  HttpServer server([](Exchange& exchange) -> awaitable<bool> {
    co_await exchange.write("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n");
    co_await exchange.write("6\r\n world\r\n0\r\n\r\n");
    co_return true;
  });
  Http http;
  std::string text;
  CHECK(http.get(server.url()).body == "hello world");
  CHECK(http.fetch(download(server.url(), text)).body.empty());
  CHECK(text == "hello world");
}

TEST_CASE("curl: large bodies in both directions at once") {
  const std::string large = pattern(24 * mebibyte);
  std::string arrived;
  HttpServer server([&](Exchange& exchange) -> awaitable<bool> {
    arrived = co_await exchange.body();
    co_await exchange.answer(200, large);
    co_return true;
  });
  Http http;
  std::string back;
  curl::Request request = download(server.url(), back);
  request.method = "PUT";
  request.body_size = large.size();
  request.open_body = [&] { return curl::from_memory(large); };
  CHECK(http.fetch(request).status == 200);
  CHECK(arrived == large);
  CHECK(back == large);
}

TEST_CASE("curl: the body of an error response bypasses the sink, and bodies in memory have a limit") {
  HttpServer server([](Exchange& exchange) -> awaitable<bool> {
    co_await exchange.answer(exchange.target == "/gone" ? 404 : 200, std::string(1000, 'x'));
    co_return true;
  });
  std::string text;
  curl::Options options = quick();
  options.max_body = 999;
  CHECK(Http(options).failure({"GET", server.url()}) == CURLE_FILESIZE_EXCEEDED);
  CHECK(Http(options).fetch(download(server.url(), text)).body.empty());
  CHECK(text.size() == 1000);
  options.max_body = 1000;
  CHECK(Http(options).fetch(download(server.url("/gone"), text)).body.size() == 1000);
  CHECK(text.empty());
}

TEST_CASE("curl: a source that gives too little or too much is an error at once") {
  HttpServer server([](Exchange& exchange) -> awaitable<bool> {
    co_await exchange.body();
    co_await exchange.answer(200);
    co_return true;
  });
  Http http;
  for (const std::uint64_t announced : {0U, 3U, 5U, 200'000U}) {
    curl::Request request = upload(server.url(), "text");
    request.body_size = announced;
    CHECK(http.failure(request) == (announced == 0 ? CURLE_OK : CURLE_BAD_FUNCTION_ARGUMENT));
  }
}

TEST_CASE("curl: an exception from a source or a sink ends the transfer and reaches the caller") {
  HttpServer server(hello);
  Http http;
  curl::Request request("GET", server.url());
  request.open_sink = [] {
    return [](std::string_view) -> awaitable<void> {
      throw std::domain_error("full");
      co_return;
    };
  };
  CHECK_THROWS_AS(http.fetch(request), std::domain_error);
  CHECK(http.get(server.url()).body == "hello");
}

TEST_CASE("curl: what would end a line, or be cut off, is refused and not sent") {
  HttpServer server(hello);
  Http http;
  const auto with_header = [&](std::string header) {
    curl::Request request("GET", server.url());
    request.headers.push_back(std::move(header));
    return http.failure(request);
  };
  CHECK(with_header("X-A: b\r\nX-C: d") == CURLE_BAD_FUNCTION_ARGUMENT);
  CHECK(with_header("X-A: b\n") == CURLE_BAD_FUNCTION_ARGUMENT);
  CHECK(with_header(std::string("X-A: b\0c", 8)) == CURLE_BAD_FUNCTION_ARGUMENT);
  CHECK(with_header("X-A: \xC3\xA4\tb") == CURLE_OK);
  for (const std::string& target : {std::string("/a b"), std::string("/a\r\nb"), std::string("/a\0b", 4)}) {
    CHECK(http.failure({"GET", server.url(target)}) == CURLE_URL_MALFORMAT);
  }
  CHECK(http.failure({"GET /other HTTP/1.1\r\nX-A:", server.url()}) == CURLE_BAD_FUNCTION_ARGUMENT);
  CHECK(http.failure({"", server.url()}) == CURLE_BAD_FUNCTION_ARGUMENT);
  curl::Request request("GET", server.url());
  request.user = std::string("a\0b", 3);
  CHECK(http.failure(request) == CURLE_BAD_FUNCTION_ARGUMENT);
  CHECK(server.requests == 1);
}

TEST_CASE("curl: the headers of the response, but not those of an interim one") {
  HttpServer server([](Exchange& exchange) -> awaitable<bool> {
    co_await exchange.write("HTTP/1.1 103 Early Hints\r\nX-Colour: red\r\n\r\n");
    co_await exchange.answer(200, "hello", "X-COLOUR-Two: green\r\nx-colour:  blue \r\nX-Empty:\r\nX-Colour: grey\r\n");
    co_return true;
  });
  const curl::Response response = Http().get(server.url());
  CHECK(response.body == "hello");
  CHECK(response.header("X-Colour") == "blue");
  CHECK(response.header("x-colour-two") == "green");
  CHECK(response.header("x-empty").empty());
  CHECK(response.header("x-col").empty());
}

TEST_CASE("curl: a head without end is an error") {
  HttpServer server([](Exchange& exchange) -> awaitable<bool> {
    co_await exchange.write("HTTP/1.1 200 OK\r\n");
    const std::string header = "X-A: " + std::string(1000, 'x') + "\r\n";
    for (;;) co_await exchange.write(header);
  });
  CHECK(Http().failure({"GET", server.url()}) == CURLE_FILESIZE_EXCEEDED);
}

TEST_CASE("curl: a small body is sent at once, a large one if the server wants it", "[timing]") {
  std::string expect;
  HttpServer server([&](Exchange& exchange) -> awaitable<bool> {
    expect = exchange.headers["expect"];
    if (exchange.target == "/unwilling") {
      co_await exchange.answer(403, "no", "Connection: close\r\n");
      co_return false;
    }
    if (exchange.length() <= mebibyte) exchange.headers.erase("expect");  // does not know it
    co_await exchange.body();
    co_return co_await hello(exchange);
  });
  Http http;
  const std::string large = pattern(mebibyte + 1);
  const auto start = std::chrono::steady_clock::now();
  CHECK(http.fetch(upload(server.url(), std::string_view(large).substr(1))).status == 200);
  CHECK(std::chrono::steady_clock::now() - start < 900ms);
  CHECK(expect.empty());
  CHECK(http.fetch(upload(server.url(), large)).status == 200);
  CHECK(expect == "100-continue");
  CHECK(http.fetch(upload(server.url("/unwilling"), large)).status == 403);
}

TEST_CASE("curl: a server that does not know Expect gets the body without it") {
  std::string arrived;
  HttpServer server([&](Exchange& exchange) -> awaitable<bool> {
    if (exchange.headers.contains("expect")) {
      co_await exchange.answer(417, "what?");
      co_return true;
    }
    arrived = co_await exchange.body();
    co_return co_await hello(exchange);
  });
  const std::string large = pattern(2 * mebibyte);
  CHECK(Http().fetch(upload(server.url(), large)).status == 200);
  CHECK(arrived == large);
  CHECK(server.requests == 2);
}

// ---------------------------------------------------------------------------------------------------------------------
// Connections

TEST_CASE("curl: connections are reused") {
  HttpServer server(hello);
  Http http;
  for (int i = 0; i < 50; ++i) REQUIRE(http.get(server.url()).body == "hello");
  CHECK(server.connections == 1);
}

TEST_CASE("curl: a request leaves nothing behind for the next one") {
  std::string seen;
  HttpServer server([&](Exchange& exchange) -> awaitable<bool> {
    co_await exchange.body();
    seen.clear();
    for (const auto& [name, value] : exchange.headers) {
      if (name != "host") seen += name + '=' + value + ' ';
    }
    co_await exchange.answer(200, exchange.method, "Set-Cookie: a=b\r\n");
    co_return true;
  });
  Http http;
  curl::Request special = upload(server.url(), "text");
  special.headers = {"X-Colour: blue"};
  special.user = "somebody";
  special.password = "secret";
  CHECK(http.fetch(special).body == "PUT");
  CHECK(seen ==
        "accept=*/* authorization=Basic c29tZWJvZHk6c2VjcmV0 content-length=4 "
        "content-type=application/octet-stream x-colour=blue ");
  special.configure = [](CURL* easy) { curl::set(easy, CURLOPT_COOKIEFILE, ""); };
  CHECK(http.fetch(special).body == "PUT");
  CHECK(http.get(server.url()).body == "GET");
  CHECK(seen == "accept=*/* ");
  CHECK(http.fetch({"HEAD", server.url()}).body.empty());
  CHECK(http.get(server.url()).body == "GET");
  CHECK(seen == "accept=*/* ");
  CHECK(server.connections == 1);
}

TEST_CASE("curl: a connection that the server has closed while it was idle does not matter") {
  HttpServer server([](Exchange& exchange) -> awaitable<bool> {
    const std::string body = co_await exchange.body();
    co_await exchange.answer(200, body);
    co_return false;
  });
  curl::Options options = quick();
  options.max_attempts = 1;
  Http http(options);
  for (const char* method : {"GET", "PUT", "POST", "DELETE", "PUT"}) {
    CHECK(http.fetch(upload(server.url(), "text", method)).body == "text");
    await_state([&] { return server.open == 0; });
  }
}

TEST_CASE("curl: a connection that the server closes when the request comes is replaced") {
  HttpServer server([first = true](Exchange& exchange) mutable -> awaitable<bool> {
    const std::string body = co_await exchange.body();
    if (exchange.target == "/second" && std::exchange(first, false)) co_return false;
    co_await exchange.answer(200, body);
    co_return true;
  });
  curl::Options options = quick();
  options.max_attempts = 1;
  Http http(options);
  CHECK(http.fetch(upload(server.url("/first"), "text")).body == "text");
  CHECK(http.fetch(upload(server.url("/second"), "text")).body == "text");
  CHECK(server.connections == 2);
}

TEST_CASE("curl: the environment's proxy is not asked for this machine") {
  HttpServer server(hello);
  curl::Options options = quick();
  options.max_attempts = 1;
  setenv("http_proxy", "http://127.0.0.1:1", 1);
  const std::string port = server.host().substr(server.host().find(':'));
  CHECK(Http(options).failure({"GET", server.url()}) == CURLE_OK);
  // Where a name has two addresses, and one refuses, the other is tried.
  CHECK(Http(options).failure({"GET", "http://LOCALHOST" + port + "/"}) == CURLE_OK);
  CHECK(Http(options).failure({"GET", "http://somewhere.test/"}) == CURLE_COULDNT_CONNECT);
  unsetenv("http_proxy");
  CHECK(curl::detail::is_loopback("http://[::1]:80/"));
  CHECK(curl::detail::is_loopback("https://127.1.2.3"));
  CHECK_FALSE(curl::detail::is_loopback("https://a.test/?x=@localhost"));
  CHECK_FALSE(curl::detail::is_loopback("http://localhost.test"));
}

TEST_CASE("curl: works when the numbers of closed sockets are reused") {
  HttpServer server([](Exchange& exchange) -> awaitable<bool> {
    co_await exchange.answer(200, "hello", "Connection: close\r\n");
    co_return false;
  });
  Http http;
  for (int round = 0; round < 50; ++round) {
    std::list<runtime_bridge::JoinHandle<curl::Response>> calls;
    for (int i = 0; i < 8; ++i) {
      calls.push_back(http.bridge.submit([&] { return http.client.fetch({"GET", server.url()}); }));
    }
    for (auto& call : calls) REQUIRE(unwrap(call.join()).body == "hello");
  }
  CHECK(server.connections == 400);
}

TEST_CASE("curl: many transfers share few connections, and time in the queue does not count as connect time") {
  HttpServer server([](Exchange& exchange) -> awaitable<bool> {
    asio::steady_timer timer(exchange.socket.get_executor(), 20ms);
    co_await timer.async_wait(use_awaitable);
    co_return co_await hello(exchange);
  });
  curl::Options options = quick();
  options.max_connections = 4;
  options.connect_timeout = 100ms;
  Http http(options);
  std::list<runtime_bridge::JoinHandle<curl::Response>> calls;
  for (int i = 0; i < 100; ++i) {
    calls.push_back(http.bridge.submit([&] { return http.client.fetch({"GET", server.url()}); }));
  }
  // Some leave the queue; the others are served all the same.
  for (int i = 0; i < 10; ++i) calls.pop_back();
  for (auto& call : calls) REQUIRE(unwrap(call.join()).body == "hello");
  CHECK(server.most_open == 4);
}

TEST_CASE("curl: a host that refuses, and one that does not answer") {
  curl::Options options = quick();
  options.connect_timeout = 100ms;
  options.max_attempts = 1;
  Http http(options);
  const FullPort full;
  CHECK(http.failure({"GET", full.url()}) == CURLE_OPERATION_TIMEDOUT);
  CHECK(http.failure({"GET", "http://127.0.0.1:1/"}) == CURLE_COULDNT_CONNECT);
  CHECK(http.failure({"GET", "file:///etc/hostname"}) == CURLE_UNSUPPORTED_PROTOCOL);
}

TEST_CASE("curl: a stalled server times out, a slow source or sink does not", "[slow]") {
  HttpServer server([](Exchange& exchange) -> awaitable<bool> {
    co_await exchange.body();
    if (exchange.target == "/") co_return co_await hello(exchange);
    co_await exchange.write("HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhe");
    co_return co_await never(exchange);
  });
  curl::Options options = quick();
  options.stall_timeout = 1s;
  options.max_attempts = 1;
  Http http(options);
  CHECK(http.failure({"GET", server.url("/stall")}) == CURLE_OPERATION_TIMEDOUT);

  const auto slowly = []() -> awaitable<void> {
    asio::steady_timer timer(co_await asio::this_coro::executor, 3s);
    co_await timer.async_wait(use_awaitable);
  };
  curl::Request request("PUT", server.url());
  request.body_size = 1;
  request.open_body = [&] {
    return [&](std::span<char> room) -> awaitable<std::size_t> {
      co_await slowly();
      room[0] = 'x';
      co_return 1;
    };
  };
  request.open_sink = [&] { return [&](std::string_view) { return slowly(); }; };
  CHECK(http.failure(request) == CURLE_OK);
}

// ---------------------------------------------------------------------------------------------------------------------
// Bounded memory

TEST_CASE("curl: a server that does not read pauses the source") {
  constexpr std::size_t size = 128 * mebibyte;
  std::atomic<std::size_t> given = 0, read = 0, most = 0;
  std::binary_semaphore go_on(0);
  HttpServer server([&](Exchange& exchange) -> awaitable<bool> {
    co_await exchange.invite();
    go_on.acquire();
    while (read < size) {
      const std::string piece = co_await exchange.some();
      read += piece.size();
    }
    co_return co_await hello(exchange);
  });
  Http http;
  curl::Request request("PUT", server.url());
  request.body_size = size;
  request.open_body = [&] {
    return [&](std::span<char> room) -> awaitable<std::size_t> {
      most = std::max<std::size_t>(most, room.size());
      given += room.size();
      co_return room.size();
    };
  };
  auto call = http.bridge.submit([&] { return http.client.fetch(request); });
  std::size_t before = 0;
  do {  // until the transfer stands still; on a very slow machine it may only seem so, and the test is less strict
    before = given;
    std::this_thread::sleep_for(200ms);
  } while (given == 0 || given != before);
  CHECK(given < 16 * mebibyte);  // most of it in the kernel's socket buffers
  go_on.release();
  CHECK(unwrap(call.join()).body == "hello");
  CHECK(given == size);
  CHECK(read == size);
  CHECK(most <= 65536);
}

TEST_CASE("curl: a sink that does not take more pauses the server") {
  constexpr std::size_t size = 128 * mebibyte;
  std::atomic<std::size_t> sent = 0, taken = 0, most = 0;
  HttpServer server([&](Exchange& exchange) -> awaitable<bool> {
    const std::string piece(65536, 'x');
    co_await exchange.write("HTTP/1.1 200 OK\r\nContent-Length: " + std::to_string(size) + "\r\n\r\n");
    while (sent < size) {
      co_await exchange.write(piece);
      sent += piece.size();
    }
    co_return true;
  });
  Http http;
  asio::steady_timer gate(http.bridge.get_executor(), 24h);
  curl::Request request("GET", server.url());
  request.open_sink = [&] {
    return [&](std::string_view piece) -> awaitable<void> {
      most = std::max<std::size_t>(most, piece.size());
      std::error_code opened;
      co_await gate.async_wait(asio::redirect_error(use_awaitable, opened));
      taken += piece.size();
    };
  };
  auto call = http.bridge.submit([&] { return http.client.fetch(request); });
  std::size_t before = 0;
  do {
    before = sent;
    std::this_thread::sleep_for(200ms);
  } while (sent == 0 || sent != before);
  CHECK(sent < 16 * mebibyte);
  CHECK(taken == 0);
  // The worker is not blocked meanwhile.
  CHECK(http.bridge.block_on_for([] { return 1; }, 1s) == 1);
  unwrap(http.bridge.block_on([&] { gate.expires_after(0s); }));
  CHECK(unwrap(call.join()).status == 200);
  CHECK(taken == size);
  CHECK(most <= 65536);
}

// ---------------------------------------------------------------------------------------------------------------------
// Retries

TEST_CASE("curl: idempotent requests are retried") {
  const auto how = GENERATE(Flaky::with_503, Flaky::by_hanging_up, Flaky::by_hanging_up_half_way);
  const std::string method = GENERATE("GET", "PUT", "DELETE");
  Flaky flaky(how, 3);
  HttpServer server(handler(flaky));
  Http http;
  std::string text;
  curl::Request request = upload(server.url(), "text", method);
  request.open_sink = download(server.url(), text).open_sink;
  CHECK(http.fetch(request).status == 200);
  CHECK(text == "hello");  // and not "hehehello"
  CHECK(flaky.last_body == "text");
  CHECK(server.requests == 4);
}

TEST_CASE("curl: after max_attempts the last failure is the result") {
  Flaky flaky(Flaky::with_503, 1000);
  HttpServer server(handler(flaky));
  const curl::Response response = Http().get(server.url());
  CHECK(response.status == 503);
  CHECK(response.body == "not now");
  CHECK(server.requests == 4);

  Flaky gone(Flaky::by_hanging_up, 1000);
  HttpServer other(handler(gone));
  CHECK(Http().failure({"GET", other.url()}) == CURLE_GOT_NOTHING);
  CHECK(other.requests == 4);
}

TEST_CASE("curl: requests that are not idempotent, and permanent errors, are not retried") {
  Http http;
  Flaky busy(Flaky::with_503, 1000);
  HttpServer busy_server(handler(busy));
  CHECK(http.fetch(upload(busy_server.url(), "text", "POST")).status == 503);
  CHECK(http.fetch(upload(busy_server.url(), "text", "PATCH")).status == 503);
  CHECK(busy_server.requests == 2);

  Flaky gone(Flaky::by_hanging_up, 1000);
  HttpServer gone_server(handler(gone));
  CHECK(http.failure({"POST", gone_server.url()}) == CURLE_GOT_NOTHING);
  CHECK(gone_server.requests == 1);

  Flaky cannot(Flaky::with_501, 1000);
  HttpServer cannot_server(handler(cannot));
  CHECK(http.get(cannot_server.url()).status == 501);
  CHECK(cannot_server.requests == 1);
}

TEST_CASE("curl: libcurl itself does not resend a POST when a reused connection is dead") {
  std::atomic<int> posts = 0;
  HttpServer server([&](Exchange& exchange) -> awaitable<bool> {
    if (exchange.method == "GET") co_return co_await hello(exchange);
    ++posts;
    co_return false;
  });
  Http http;
  CHECK(http.get(server.url()).body == "hello");
  CHECK(http.failure({"POST", server.url()}) == CURLE_GOT_NOTHING);
  CHECK(posts == 1);
}

TEST_CASE("curl: a request whose body or sink cannot be reopened is not retried") {
  const bool body = GENERATE(true, false);
  Flaky flaky(Flaky::by_hanging_up_half_way, 1000);
  HttpServer server(handler(flaky));
  bool first = true;
  std::string text;
  curl::Request request = upload(server.url(), "text");
  request.open_sink = download(server.url(), text).open_sink;
  if (body) {
    request.open_body = [&] { return std::exchange(first, false) ? curl::from_memory("text") : curl::Source(); };
  } else {
    request.open_sink = [&, open = request.open_sink] { return std::exchange(first, false) ? open() : curl::Sink(); };
  }
  CHECK(Http().failure(request) == CURLE_PARTIAL_FILE);
  CHECK(server.requests == 1);
}

TEST_CASE("curl: the statuses of failures that may pass are retried, and no others") {
  std::atomic<int> status = 0;
  std::atomic<bool> failed = false;
  HttpServer server([&](Exchange& exchange) -> awaitable<bool> {
    if (!failed.exchange(true)) {
      co_await exchange.answer(status);
      co_return true;
    }
    co_return co_await hello(exchange);
  });
  Http http;
  for (const int passing : {408, 429, 500, 502, 503, 504}) {
    status = passing;
    failed = false;
    CHECK(http.get(server.url()).status == 200);
  }
  for (const int lasting : {400, 403, 404, 409, 412, 501, 505}) {
    status = lasting;
    failed = false;
    CHECK(http.get(server.url()).status == lasting);
  }
  // The caller may know more.
  curl::Request request("GET", server.url());
  request.may_pass = [](const curl::Response& response) { return response.status == 409; };
  status = 409;
  failed = false;
  CHECK(http.fetch(request).status == 200);
  status = 503;
  failed = false;
  CHECK(http.fetch(request).status == 503);
}

TEST_CASE("curl: a Retry-After of any length is respected, as far as the deadline permits", "[timing]") {
  std::string after;  // empty: an answer
  HttpServer server([&](Exchange& exchange) -> awaitable<bool> {
    if (after.empty()) co_return co_await hello(exchange);
    const std::string header = "Retry-After: " + after + "\r\n";
    if (after.size() < 3 || after.find("GMT") != after.npos) after.clear();
    co_await exchange.answer(503, {}, header);
    co_return true;
  });
  const auto date = [](std::time_t time) {
    std::array<char, 64> text{};
    std::strftime(text.data(), text.size(), "%a, %d %b %Y %H:%M:%S GMT", std::gmtime(&time));
    return std::string(text.data());
  };
  Http http;  // its max_delay is 10 ms
  const auto time_of_get = [&] {
    const auto start = std::chrono::steady_clock::now();
    CHECK(http.get(server.url()).status == 200);
    return std::chrono::steady_clock::now() - start;
  };
  after = "1";
  CHECK(time_of_get() >= 1s);
  CHECK(server.requests == 2);
  after = date(std::time(nullptr) + 3);
  CHECK(time_of_get() >= 1s);
  after = date(std::time(nullptr) - 1000);
  CHECK(time_of_get() < 1s);
  CHECK(server.requests == 6);
  for (const char* long_time : {"1000", "99999999999999999999", "9223372036854775807"}) {
    CAPTURE(long_time);
    after = long_time;
    const int before = server.requests;
    CHECK(http.ends_in_time({"GET", server.url()}));
    CHECK(server.requests == before + 1);
  }
}

TEST_CASE("curl: retry delays grow up to a limit, with jitter") {
  asio::io_context context;
  curl::Options options;
  options.first_delay = 100ms;
  options.max_delay = 1s;
  auto driver = std::make_shared<curl::detail::Driver>(context.get_executor(), options);
  std::array<std::chrono::milliseconds, 3> least{1h, 1h, 1h}, most{};
  for (int i = 0; i < 1000; ++i) {
    for (const std::size_t k : {0U, 1U, 2U}) {
      const auto delay = driver->delay_after(std::array{1, 2, 100}[k]);
      least[k] = std::min(least[k], delay);
      most[k] = std::max(most[k], delay);
    }
  }
  CHECK((least[0] >= 50ms && least[0] < 60ms && most[0] > 90ms && most[0] <= 100ms));
  CHECK((least[1] >= 100ms && least[1] < 120ms && most[1] > 180ms && most[1] <= 200ms));
  CHECK((least[2] >= 500ms && least[2] < 600ms && most[2] > 900ms && most[2] <= 1s));
}

TEST_CASE("curl: durations of any length") {
  Flaky flaky(Flaky::with_503, 1);
  HttpServer server(handler(flaky));
  const FullPort full;
  curl::Options options;
  options.connect_timeout = std::chrono::milliseconds::max();
  options.stall_timeout = std::chrono::seconds::max();
  options.first_delay = options.max_delay = std::chrono::milliseconds::max();
  {
    Http http(options);
    CHECK(http.ends_in_time({"GET", server.url()}));  // to try again
    CHECK(http.get(server.url()).status == 200);
    CHECK(http.ends_in_time({"GET", full.url()}));  // for a connection
  }
  options.connect_timeout = std::chrono::milliseconds(std::int64_t{1} << 32U);  // not cut down to none
  options.stall_timeout = std::chrono::seconds::max() - 1s;
  CHECK(Http(options).get(server.url()).status == 200);
  CHECK(Http(options).ends_in_time({"GET", full.url()}));

  for (const std::chrono::milliseconds now : {0ms, -1ms, std::chrono::milliseconds::min()}) {
    Flaky again(Flaky::with_503, 2);
    HttpServer other(handler(again));
    options.first_delay = options.max_delay = now;
    options.connect_timeout = 10s;
    options.stall_timeout = std::chrono::duration_cast<std::chrono::seconds>(now);
    CHECK(Http(options).get(other.url()).status == 200);
    options.connect_timeout = now;
    options.max_attempts = 3;
    CHECK(Http(options).failure({"GET", full.url()}) == CURLE_OPERATION_TIMEDOUT);
  }

  asio::io_context context;
  options.first_delay = 1ms;
  options.max_delay = std::chrono::milliseconds::max();
  auto driver = std::make_shared<curl::detail::Driver>(context.get_executor(), options);
  CHECK(driver->delay_after(1000) >= std::chrono::milliseconds::max() / 2);
}

// ---------------------------------------------------------------------------------------------------------------------
// Transfers that are cut short

TEST_CASE("curl: a deadline aborts a transfer in every state and closes its connection", "[timing]") {
  HttpServer silent(never);
  HttpServer server(hello);
  HttpServer reader([](Exchange& exchange) -> awaitable<bool> {
    co_await exchange.body();
    co_return true;
  });
  Flaky busy(Flaky::with_503, 1000);
  HttpServer busy_server(handler(busy));
  const FullPort full;
  const SlowName slow;
  const std::size_t before = descriptors_of_this_process();
  {
    curl::Options options;
    options.first_delay = options.max_delay = 1h;
    Http http(options);
    CHECK(http.ends_in_time({"GET", silent.url()}));         // for an answer
    CHECK(http.ends_in_time(stuck_download(server.url())));  // for the sink
    CHECK(http.ends_in_time(stuck_upload(reader.url())));    // for the source
    CHECK(http.ends_in_time({"GET", full.url()}));           // for a connection
    CHECK(http.ends_in_time({"GET", busy_server.url()}));    // to try again
    CHECK(http.ends_in_time({"GET", std::string("http://") + SlowName::name + "/"}));
    CHECK(SlowName::waiting == 1);
    await_state([&] { return silent.open == 0 && reader.open == 0; });
    CHECK(http.get(server.url()).body == "hello");
  }
  await_state([&] { return server.open == 0 && busy_server.open == 0; });
  CHECK(descriptors_of_this_process() <= before + 1);  // one end of a socket pair belongs to the look-up thread
}

TEST_CASE("curl: a deadline aborts a transfer in a coroutine that does not throw when it is cancelled") {
  HttpServer silent(never);
  Http http;
  const auto task = [&]() -> awaitable<long> {
    co_await asio::this_coro::throw_if_cancelled(false);
    const curl::Response response = co_await http.client.fetch(curl::Request("GET", silent.url()));
    co_return response.status;
  };
  const auto result = http.bridge.block_on_for(task, 100ms);
  REQUIRE_FALSE(result);
  CHECK(result.error() == BridgeError::TimedOut);
  await_state([&] { return silent.open == 0; });
}

TEST_CASE("curl: a stop ends the wait before a retry") {
  Flaky busy(Flaky::with_503, 1000);
  HttpServer server(handler(busy));
  curl::Options options;
  options.first_delay = options.max_delay = 1h;
  Http http(options);
  auto call = http.bridge.submit([&] { return http.client.fetch({"GET", server.url()}); });
  await_state([&] { return server.requests == 1; });
  call.request_stop();
  const auto result = call.join();
  REQUIRE_FALSE(result);
  CHECK(result.error() == BridgeError::Cancelled);
  CHECK(server.requests == 1);
}

TEST_CASE("curl: close fails the transfers in flight and all later ones") {
  HttpServer silent(never);
  HttpServer server(hello);
  Http http;
  std::list<runtime_bridge::JoinHandle<curl::Response>> calls;
  for (const curl::Request& request : {curl::Request("GET", silent.url()), stuck_upload(server.url())}) {
    calls.push_back(http.bridge.submit([&, request] { return http.client.fetch(request); }));
  }
  await_state([&] { return silent.requests == 1 && server.connections == 1; });
  unwrap(http.bridge.block_on([&] { http.client.close(); }));
  CHECK(outcome(calls.front().join()) == threw("the client was closed"));
  calls.pop_front();
  await_state([&] { return silent.open == 0 && server.open == 0; });
  CHECK(http.failure({"GET", server.url()}) == CURLE_ABORTED_BY_CALLBACK);
}

TEST_CASE("curl: a bridge may be destroyed with transfers in any state, and all descriptors are closed") {
  HttpServer silent(never);
  HttpServer server(hello);
  Flaky busy(Flaky::with_503, 1000000);
  HttpServer busy_server(handler(busy));
  const FullPort full;
  const std::size_t before = descriptors_of_this_process();
  for (int round = 0; round < 20; ++round) {
    std::list<runtime_bridge::JoinHandle<curl::Response>> calls;
    const int requests = busy_server.requests;
    {
      RuntimeBridge bridge;
      curl::Options options;
      options.max_connections = 6;
      options.first_delay = options.max_delay = 1h;
      const curl::Client client(bridge.get_executor(), options);
      for (const curl::Request& request :
           {curl::Request("GET", silent.url()), stuck_download(server.url()), stuck_upload(server.url()),
            curl::Request("GET", full.url()), curl::Request("GET", busy_server.url()),
            curl::Request("GET", silent.url()), curl::Request("GET", server.url())}) {
        // Each task has a copy of the client.
        calls.push_back(bridge.submit([client, request] { return client.fetch(request); }));
      }
      if (round % 2 == 0) await_state([&] { return silent.open == 2 && busy_server.requests > requests; });
    }
    for (auto& call : calls) {
      const Outcome result = outcome(call.join());
      REQUIRE((result == response_lost || result == succeeded || result == worker_dead));
    }
    await_state([&] { return silent.open == 0 && server.open == 0 && busy_server.open == 0; });
  }
  CHECK(descriptors_of_this_process() == before);
}

TEST_CASE("curl: a context whose transfers have ended runs out of work", "[timing]") {
  HttpServer server([](Exchange& exchange) -> awaitable<bool> {
    asio::steady_timer timer(exchange.socket.get_executor(),
                             300ms);  // longer than libcurl's timer for a second address
    co_await timer.async_wait(use_awaitable);
    co_return co_await hello(exchange);
  });
  asio::io_context context(1);
  curl::Options options;
  options.stall_timeout = std::chrono::seconds::max();  // or libcurl would want to be called in a second
  const curl::Client client(context.get_executor(), options);
  curl::Request request("GET", server.url());
  request.configure = [](CURL* easy) { curl::set(easy, CURLOPT_TIMEOUT_MS, 60'000L); };  // a timer that is not needed
  long status = 0;
  const auto task = [&]() -> awaitable<void> {
    const curl::Response response = co_await client.fetch(request);
    status = response.status;
  };
  asio::co_spawn(context, task, asio::detached);
  const auto start = std::chrono::steady_clock::now();
  context.run();
  CHECK(status == 200);
  CHECK(std::chrono::steady_clock::now() - start < 5s);
  client.close();
}

// ---------------------------------------------------------------------------------------------------------------------
// Forks

#ifndef SANITIZED_BY_CLANG_TSAN
namespace {

/// How many descriptors of this process are connections to the server.
std::size_t connections_to(const HttpServer& server) {
  std::size_t number = 0;
  for (const auto& entry : std::filesystem::directory_iterator("/proc/self/fd")) {
    sockaddr_in peer{};
    socklen_t size = sizeof peer;
    const int descriptor = std::stoi(entry.path().filename());
    if (getpeername(descriptor, reinterpret_cast<sockaddr*>(&peer), &size) != 0) continue;
    number += server.host().ends_with(':' + std::to_string(ntohs(peer.sin_port))) ? 1U : 0U;
  }
  return number;
}

}  // namespace

TEST_CASE("curl: a forked child closes its copies and leaves its parent's transfers alone", "[child]") {
  std::binary_semaphore go_on(0);
  HttpServer slow([&](Exchange& exchange) -> awaitable<bool> {
    go_on.acquire();
    co_return co_await hello(exchange);
  });
  HttpServer server(hello);
  auto http = std::make_unique<Http>();
  CHECK(http->get(server.url()).body == "hello");  // an idle connection
  auto call = http->bridge.submit([&] { return http->client.fetch(curl::Request("GET", slow.url())); });
  await_state([&] { return slow.requests == 1; });
  unwrap(http->bridge.block_on([] {}));  // the worker has come back from libcurl
  CHECK(connections_to(server) == 1);
  CHECK(in_child_process([&] {
          if (connections_to(server) != 1 || connections_to(slow) != 1) return 1;
          http.reset();
          return connections_to(server) == 0 && connections_to(slow) == 0 ? 0 : 2;
        }) == 0);
  go_on.release();
  CHECK(unwrap(call.join()).body == "hello");
  CHECK(http->get(server.url()).body == "hello");
  CHECK(server.connections == 1);
  CHECK(slow.connections == 1);
}
#endif
