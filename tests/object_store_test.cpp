// SPDX-License-Identifier: Apache-2.0
//
// examples/s3_object_store.cpp: what its callers learn about what went wrong, and how its copies end.

#include <asio/any_io_executor.hpp>
#include <asio/post.hpp>
#include <asio/steady_timer.hpp>
#include <asio/this_coro.hpp>
#include <asio/use_awaitable.hpp>
#include <atomic>
#include <functional>
#include <future>
#include <istream>
#include <iterator>
#include <memory>
#include <ostream>
#include <stdexcept>
#include <string>
#include <string_view>
#include <thread>
#include <utility>

#include "http_server.hpp"
#include "support.hpp"

// The tests have an Outcome of their own.
#define Outcome BackendOutcome
#define main main_of_the_example
#include "s3_object_store.cpp"
#undef main
#undef Outcome

namespace {

/// A server with one answer for all requests, and a store that uses it.
struct Shop {
  explicit Shop(int status = 200, const std::string& body = {}, const std::string& token = {})
      : server([status, body](Exchange& exchange) -> awaitable<bool> {
          co_await exchange.body();
          co_await exchange.answer(status, body);
          co_return true;
        }),
        store(s3::Settings(server.url(""), "us-east-1", "bucket", "id", "secret", token)) {}

  HttpServer server;
  S3ObjectStore store;
};

std::string error_body(const std::string& code) { return "<Error><Code>" + code + "</Code></Error>"; }

constexpr int no_error = -1;

template <class T>
int kind_of(const BackendOutcome<T>& outcome) {
  return outcome ? no_error : static_cast<int>(outcome.error().kind);
}

}  // namespace

TEST_CASE("object store: what the server says is told apart") {
  CHECK(kind_of(Shop(404, error_body("NoSuchKey")).store.get("a")) == BackendError::NotFound);
  CHECK(kind_of(Shop(404, error_body("NoSuchBucket")).store.get("a")) == BackendError::Refused);
  CHECK(kind_of(Shop(403, error_body("AccessDenied")).store.put("a")) == BackendError::Refused);
  CHECK(kind_of(Shop(501).store.put("a")) == BackendError::Refused);
  CHECK(kind_of(Shop(200, "<html><body>Sign in</body></html>").store.list()) == BackendError::BadAnswer);
  CHECK(kind_of(Shop(200, "<html><body>Sign in</body></html>").store.put("a")) == BackendError::BadAnswer);
  CHECK(kind_of(Shop(200, "another").store.get(s3::Sha256::of("content"))) == BackendError::Corrupt);
  CHECK(kind_of(Shop(200, "content").store.get(s3::Sha256::of("content"))) == no_error);
  CHECK(kind_of(Shop(200).store.has("a")) == no_error);
}

TEST_CASE("object store: a server that cannot answer now, or at all, is unavailable") {
  Shop busy(503, error_body("SlowDown"));
  const auto late = busy.store.put("a");
  CHECK(kind_of(late) == BackendError::Unavailable);
  CHECK(late.error().message == "status 503, SlowDown");
  CHECK(busy.server.requests == 4);
  S3ObjectStore nowhere(s3::Settings("http://127.0.0.1:1", "us-east-1", "bucket", "id", "secret"));
  CHECK(kind_of(nowhere.list()) == BackendError::Unavailable);
}

TEST_CASE("object store: what cannot be sent is refused") {
  Shop injected(200, {}, "token\r\nx-other: header");
  CHECK(kind_of(injected.store.put("a")) == BackendError::Refused);
  CHECK(kind_of(injected.store.remove("a")) == BackendError::Refused);
  CHECK(injected.server.requests == 0);
  S3ObjectStore no_scheme(s3::Settings("localhost", "us-east-1", "bucket", "id", "secret"));
  CHECK(kind_of(no_scheme.put("a")) == BackendError::Refused);
}

TEST_CASE("object store: an exception of the caller's own code reaches the caller") {
  Shop shop(200, "content");
  const auto full = [](std::string_view) -> awaitable<void> {
    throw std::runtime_error("no space left on device");
    co_return;
  };
  const auto written = shop.store.get("a", [&] { return full; });
  CHECK(kind_of(written) == BackendError::Failed);
  CHECK(written.error().message.find("no space left on device") != std::string::npos);

  const auto unreadable = [](std::span<char>) -> awaitable<std::size_t> {
    throw std::runtime_error("input/output error");
    co_return 0;
  };
  const auto read = shop.store.put(s3::Content(3, [&] { return unreadable; }));
  CHECK(kind_of(read) == BackendError::Failed);
  CHECK(read.error().message.find("input/output error") != std::string::npos);

  const auto cannot_open = shop.store.get("a", []() -> curl::Sink { throw std::runtime_error("permission denied"); });
  CHECK(kind_of(cannot_open) == BackendError::Failed);
  CHECK(cannot_open.error().message.find("permission denied") != std::string::npos);
}

TEST_CASE("object store: contents as streams") {
  std::string stored;
  HttpServer server([&](Exchange& exchange) -> awaitable<bool> {
    const std::string body = co_await exchange.body();
    if (exchange.method == "PUT") stored = body;
    const std::string content = exchange.method == "GET" ? stored : "";
    co_await exchange.answer(200, content);
    co_return true;
  });
  S3ObjectStore store(s3::Settings(server.url(""), "us-east-1", "bucket", "id", "secret"));
  const std::string content(300'000, 'x'), address = s3::Sha256::of(content);
  std::string got;
  const auto keep = [&](std::istream& in) { got.assign(std::istreambuf_iterator<char>(in), {}); };
  CHECK(kind_of(store.write(address, content.size(), [&](std::ostream& out) { out << content; })) == no_error);
  CHECK((stored == content));
  CHECK(kind_of(store.read(address, keep)) == no_error);
  CHECK((got == content));
  CHECK(kind_of(store.write(s3::Sha256::of(""), 0, [](std::ostream&) {})) == no_error);
  CHECK(kind_of(store.read(s3::Sha256::of(""), keep)) == no_error);
  CHECK(got.empty());

  // Less or more than announced.
  CHECK(kind_of(store.write(address, 10, [](std::ostream& out) { out << "12345"; })) != no_error);
  CHECK(kind_of(store.write(address, 10, [](std::ostream& out) { out << "12345678901"; })) != no_error);
  CHECK(kind_of(store.write(address, 10, [](std::ostream& out) { out << "1234567890" << std::flush << '1'; })) !=
        no_error);
  // Only the beginning is wanted.
  stored = content;
  CHECK(kind_of(store.read(address, [](std::istream& in) { CHECK(in.get() == 'x'); })) == no_error);
  CHECK(kind_of(store.read(address, [](std::istream&) {})) == no_error);

  // At the end it turns out to be something else.
  const auto read_on = [&](std::istream& in) {
    std::getline(in, got);
    CHECK(in.bad());
    CHECK_FALSE(in.eof());
  };
  CHECK(kind_of(store.read(s3::Sha256::of("other"), read_on)) == BackendError::Corrupt);
  CHECK((got == content));
  CHECK(kind_of(Shop(404, error_body("NoSuchKey")).store.read("a", read_on)) == BackendError::NotFound);
  CHECK(kind_of(Shop(403, error_body("AccessDenied")).store.write("a", 4, [](std::ostream& out) { out << "text"; })) ==
        BackendError::Refused);
  CHECK(kind_of(S3ObjectStore(s3::Settings("http://127.0.0.1:1", "us-east-1", "bucket", "id", "secret"))
                    .write("a", 4, [](std::ostream& out) { out << "text"; })) == BackendError::Unavailable);
}

TEST_CASE("object store: the deadline of a stream is for each read and write") {
  HttpServer server([](Exchange& exchange) -> awaitable<bool> {
    if (exchange.method == "GET") co_await exchange.write("HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nbeginning\n");
    co_await exchange.silence();
    co_return false;
  });
  const S3ObjectStore store(s3::Settings(server.url(""), "us-east-1", "bucket", "id", "secret"));
  std::string line;
  const auto read = [&](std::istream& in) {
    std::getline(in, line);
    CHECK((line.empty() || line == "beginning"));  // on a busy machine the deadline may be earlier
    CHECK(in.get() == EOF);
    CHECK(in.bad());
  };
  CHECK(kind_of(store.with_timeout(300ms).read("a", read)) == BackendError::TimedOut);
  const auto write = [](std::ostream& out) { out << "text"; };
  CHECK(kind_of(store.with_timeout(300ms).write("a", 4, write)) == BackendError::TimedOut);
}

TEST_CASE("object store: a deadline, also while the server asks for patience") {
  HttpServer server([](Exchange& exchange) -> awaitable<bool> {
    co_await exchange.answer(503, {}, "Retry-After: 3600\r\n");
    co_return true;
  });
  const S3ObjectStore store(s3::Settings(server.url(""), "us-east-1", "bucket", "id", "secret"));
  CHECK(kind_of(store.with_timeout(100ms).list()) == BackendError::TimedOut);
  CHECK(server.requests == 1);
}

TEST_CASE("object store: a call that a task of the same store makes would wait for itself") {
  Shop shop(200, "content");
  int nested = no_error;
  const auto call_again = [&](std::string_view) -> awaitable<void> {
    nested = kind_of(shop.store.has("b"));
    co_return;
  };
  CHECK(kind_of(shop.store.get(s3::Sha256::of("content"), [&] { return call_again; })) == no_error);
  CHECK(nested == BackendError::WrongThread);
}

TEST_CASE("object store: after a shut-down") {
  runtime_bridge::RuntimeBridge bridge;
  bridge.shutdown(runtime_bridge::Shutdown::drain);
  const auto task = []() -> awaitable<BackendOutcome<int>> { co_return 1; };
  CHECK(kind_of(flatten(bridge.block_on(task))) == BackendError::Stopped);
}

TEST_CASE("object store: the last copy may be destroyed anywhere, and before or after other things") {
  auto shop = std::make_unique<Shop>(200, "content");
  const std::string address = s3::Sha256::of("content");
  auto last = std::make_unique<S3ObjectStore>(shop->store);
  CHECK(kind_of(last->get(address)) == no_error);
  SECTION("after the server, with a connection to it") {
    shop.reset();
    last.reset();
  }
  SECTION("by another thread") {
    shop.reset();
    std::thread([&] { last.reset(); }).join();
  }
  SECTION("by its worker") {
    asio::any_io_executor executor;
    const auto learn_executor = [&](std::string_view) -> awaitable<void> {
      executor = co_await asio::this_coro::executor;
    };
    CHECK(kind_of(last->get(address, [&] { return learn_executor; })) == no_error);
    shop.reset();
    std::promise<void> destroyed;
    asio::post(std::exchange(executor, {}), [&, owner = std::move(last)]() mutable {
      owner.reset();
      destroyed.set_value();
    });
    destroyed.get_future().get();
  }
  SECTION("by another store's worker") {
    shop.reset();
    Shop other(200, "content");
    const auto drop = [&](std::string_view) -> awaitable<void> {
      last.reset();
      co_return;
    };
    CHECK(kind_of(other.store.get(address, [&] { return drop; })) == no_error);
    CHECK(last == nullptr);
  }
}

namespace {

/// What becomes of a `Ticking` and its task.
struct Life {
  std::thread::id worker{}, destroyed{};
  std::atomic<bool> ended{false};
};

/// A client whose task in the background ends a while after it was asked to, and must not be cut off.
class Ticking {
 public:
  Ticking(Bridge bridge, Life& life) : bridge_(std::move(bridge)), life_(life) {
    life.worker = std::this_thread::get_id();
    bridge_->submit(run(bridge_, stop_, life)).detach();
  }
  Ticking(const Ticking&) = delete;
  Ticking& operator=(const Ticking&) = delete;
  ~Ticking() {
    life_.destroyed = std::this_thread::get_id();
    *stop_ = true;
  }

  awaitable<asio::any_io_executor> executor() { co_return co_await asio::this_coro::executor; }

 private:
  static awaitable<void> run([[maybe_unused]] Bridge bridge, std::shared_ptr<bool> stop, Life& life) {
    asio::steady_timer timer(co_await asio::this_coro::executor);
    for (int left = 10; left != 0; left -= *stop ? 1 : 0) {
      timer.expires_after(10ms);
      co_await timer.async_wait(asio::use_awaitable);
    }
    life.ended = true;
  }

  Bridge bridge_;
  Life& life_;
  std::shared_ptr<bool> stop_ = std::make_shared<bool>(false);
};

BackendError describe_none() { throw; }

}  // namespace

TEST_CASE("shared client: destroyed on the worker, and its task in the background ends in peace") {
  using Client = SharedClient<Ticking, describe_none>;
  Life life;
  auto client = std::make_unique<Client>(1h, life);
  SECTION("by its owner, who waits for the task") {
    const Client copy = *client;
    client.reset();
    CHECK(copy.call([](Ticking& ticking) { return ticking.executor(); }).has_value());
    CHECK_FALSE(life.ended);
  }
  SECTION("by the worker") {
    asio::any_io_executor executor = client->call([](Ticking& ticking) { return ticking.executor(); }).value();
    asio::post(std::exchange(executor, {}), [owner = std::move(client)]() mutable { owner.reset(); });
    await_state([&] { return life.ended.load(); });
  }
  CHECK(life.ended);
  CHECK(life.destroyed == life.worker);
  CHECK(life.worker != std::this_thread::get_id());
}

TEST_CASE("object store: in a forked child every call is an error, and the parent goes on", "[child]") {
  Shop shop(200, "content");
  const std::string address = s3::Sha256::of("content");
  CHECK(kind_of(shop.store.get(address)) == no_error);
  CHECK(in_child_process([&] {
          S3ObjectStore copy = shop.store;
          return kind_of(copy.get(address)) == BackendError::Stopped ? 0 : 1;
        }) == 0);
  CHECK(kind_of(shop.store.get(address)) == no_error);
  CHECK(shop.server.connections == 1);
}
