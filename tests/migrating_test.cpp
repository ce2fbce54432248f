// SPDX-License-Identifier: Apache-2.0
//
// Compiles and runs the code of docs/migrating.md, except that for Boost.MySQL (tests/examples/migrating_mysql.cpp).

#include <runtime_bridge/hosted.hpp>

#include <chrono>
#include <functional>
#include <memory>
#include <stdexcept>
#include <string>
#include <thread>

#include "support.hpp"

using namespace runtime_bridge;

namespace {

struct Client {
  awaitable<std::string> get(std::string key) {
    if (key == "slow") co_await park();
    if (key.empty()) throw std::invalid_argument("no key");
    co_await asio::post(use_awaitable);
    co_return "value of " + key;
  }
};

namespace before {

class Store {
 public:
  Store() : thread_([this] { context_.run(); }) {}
  ~Store() {
    context_.stop();
    thread_.join();
  }
  std::string get(const std::string& key) { return asio::co_spawn(context_, client_.get(key), asio::use_future).get(); }

 private:
  asio::io_context context_;
  asio::executor_work_guard<asio::io_context::executor_type> work_{context_.get_executor()};
  Client client_;
  std::thread thread_;
};

}  // namespace before

namespace after {

class Store {
 public:
  std::string get(const std::string& key) {
    return unwrap(client_.call([&](Client& client) { return client.get(key); }));
  }

 private:
  runtime_bridge::RuntimeBridge bridge_;
  runtime_bridge::Hosted<Client> client_{bridge_};  // made, used and destroyed on the worker
};

}  // namespace after

}  // namespace

TEMPLATE_TEST_CASE("migrating: a store, before and after", "", before::Store, after::Store) {
  TestType store;
  CHECK(store.get("a") == "value of a");
  CHECK_THROWS_AS(store.get(""), std::invalid_argument);
}

TEST_CASE("migrating: errors are values") {
  RuntimeBridge bridge;
  Client client;
  const std::string key = "slow";
  bool timed_out = false;
  const auto use_the_cache = [&timed_out] { timed_out = true; };

  auto value = bridge.block_on_for([&] { return client.get(key); }, std::chrono::milliseconds(200));
  if (!value && value.error() == BridgeError::TimedOut) use_the_cache();  // the task was cancelled, and has ended

  CHECK(timed_out);
}

TEST_CASE("migrating: from Rust") {
  Client client;
  const std::string key = "a";

  auto bridge = std::make_shared<const RuntimeBridge>();
  Result<std::string> value = bridge->block_on([&] { return client.get(key); });
  if (!value && value.error() == BridgeError::ResponseLost) throw std::runtime_error(value.error().message());

  CHECK(value == "value of a");
  auto named = RuntimeBridge::with_thread_name("storage");
  CHECK(named.block_on([] { return 7; }) == 7);
  CHECK(RuntimeBridge::create().has_value());
  CHECK(bridge->share().block_on([] { return 7; }) == 7);
  CHECK(bridge->block_on([] { throw std::runtime_error("lost"); }).error().cause());
}

TEST_CASE("migrating: an inner task") {
  RuntimeBridge bridge;
  Client client;
  const auto task = [&]() -> awaitable<std::string> {
    auto executor = co_await asio::this_coro::executor;
    co_return co_await asio::co_spawn(executor, client.get("a"), use_awaitable);
  };
  CHECK(bridge.block_on(task) == "value of a");
}
