// SPDX-License-Identifier: Apache-2.0
//
// A synchronous key-value store, implemented with an asynchronous client. `Client` and the server stand for the library
// and the service that you already have; `RemoteStore` is the part that uses runtime_bridge.

#include <runtime_bridge.hpp>
#include <runtime_bridge/hosted.hpp>

#include <asio/any_io_executor.hpp>
#include <asio/awaitable.hpp>
#include <asio/error.hpp>
#include <asio/ip/tcp.hpp>
#include <asio/use_awaitable.hpp>

#include <algorithm>
#include <array>
#include <atomic>
#include <cerrno>
#include <chrono>
#include <cstddef>
#include <exception>
#include <filesystem>
#include <fstream>
#include <future>
#include <iostream>
#include <set>
#include <stdexcept>
#include <string>
#include <string_view>
#include <system_error>
#include <utility>
#include <vector>

#include "support/key_value_server.hpp"

namespace {

namespace fs = std::filesystem;
using asio::ip::tcp;

// ---------------------------------------------------------------------------------------------------------------------
// The asynchronous client. It needs no locks, because all of it runs on one thread, the bridge's worker.

class Client {
 public:
  Client(asio::any_io_executor executor, tcp::endpoint server)
      : executor_(std::move(executor)), server_(std::move(server)) {}

  // The views may refer to locals of a thread that waits for the call, since no task outlives its call.
  asio::awaitable<void> put(std::string_view key, std::string_view value) {
    co_await exchange(kv::Kind::put, key, value);
  }

  asio::awaitable<std::string> get(std::string_view key) {
    kv::Message reply = co_await exchange(kv::Kind::get, key, {});
    if (reply.kind == kv::Kind::not_found) throw std::out_of_range("no such key: " + std::string(key));
    co_return std::move(reply.value);
  }

 private:
  // Calls from different threads run this concurrently, each with its own connection.
  asio::awaitable<kv::Message> exchange(kv::Kind kind, std::string_view key, std::string_view value) {
    while (!idle_.empty()) {
      tcp::socket connection = std::move(idle_.back());
      idle_.pop_back();
      try {
        co_return co_await exchange(connection, kind, key, value);
      } catch (const std::system_error& e) {
        // The server may have closed it while it was idle. A get and a put may be repeated.
        if (!std::ranges::count(closed_by_peer, e.code())) throw;
      }
    }
    tcp::socket connection(executor_);
    co_await connection.async_connect(server_, asio::use_awaitable);
    connection.set_option(tcp::no_delay(true));
    co_return co_await exchange(connection, kind, key, value);
  }

  asio::awaitable<kv::Message> exchange(tcp::socket& connection, kv::Kind kind, std::string_view key,
                                        std::string_view value) {
    co_await kv::send(connection, kind, key, value);
    kv::Message reply = co_await kv::receive(connection);
    if (reply.kind == kv::Kind::refused) throw kv::ProtocolError("the server refused: " + reply.value);
    if (reply.kind != kv::Kind::done && reply.kind != kv::Kind::not_found)
      throw kv::ProtocolError("invalid reply from the server");
    // Only reuse a connection after success: if anything throws above, it is closed.
    if (idle_.size() < max_idle) idle_.push_back(std::move(connection));
    co_return reply;
  }

  inline static const std::array<std::error_code, 3> closed_by_peer{asio::error::eof, asio::error::connection_reset,
                                                                    asio::error::broken_pipe};
  static constexpr std::size_t max_idle = 8;

  asio::any_io_executor executor_;
  tcp::endpoint server_;
  std::vector<tcp::socket> idle_;
};

// ---------------------------------------------------------------------------------------------------------------------
// The synchronous interface and its implementation

/// The interface that the program uses: synchronous, called from any thread.
class KeyValueStore {
 public:
  virtual ~KeyValueStore() = default;
  virtual void put(std::string_view key, std::string_view value) = 0;
  virtual std::string get(std::string_view key) = 0;
};

/// Implements it with an asynchronous client, whose functions are Asio coroutines.
class RemoteStore final : public KeyValueStore {
 public:
  explicit RemoteStore(const tcp::endpoint& server) : client_(bridge_, server) {}

  // The task runs on the bridge's worker and has ended when call returns, so it may refer to the caller's locals.
  void put(std::string_view key, std::string_view value) override {
    runtime_bridge::unwrap(client_.call([&](Client& client) { return client.put(key, value); }));
  }

  // If the task throws, this call returns an error, and other calls go on. unwrap rethrows the exception.
  runtime_bridge::Result<std::string> try_get(std::string_view key) {
    return client_.call([&](Client& client) { return client.get(key); });
  }
  std::string get(std::string_view key) override { return runtime_bridge::unwrap(try_get(key)); }

 private:
  runtime_bridge::RuntimeBridge bridge_;   // owns one worker thread, which runs an io_context
  runtime_bridge::Hosted<Client> client_;  // made on the worker, used there and destroyed there
};

void look_up(RemoteStore& store, std::string_view key) {
  if (const auto value = store.try_get(key)) {
    std::cout << key << ": " << value->size() << " bytes\n";
  } else {
    std::cout << value.error().message() << '\n';  // runtime_bridge: the task threw: no such key: lost
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// The program

constexpr const char* usage =
    "usage: quickstart [FILE | DIRECTORY]...\n"
    "Stores the files, and the files in the directories, in a key-value server on loopback from four threads, reads\n"
    "them back and compares. By default it stores runtime_bridge's own include/ and README.md.\n";

struct File {
  std::string key, bytes;
};

File read_file(const fs::path& path) {
  File file{path.string(), {}};
  std::ifstream in(path, std::ios::binary);
  if (!in) throw std::system_error(errno, std::generic_category(), file.key);
  std::array<char, 65536> chunk{};
  while (in.read(chunk.data(), chunk.size()) || in.gcount() != 0) {
    file.bytes.append(chunk.data(), static_cast<std::size_t>(in.gcount()));
    if (file.bytes.size() > kv::max_value) throw std::runtime_error(file.key + ": too large for a value");
  }
  if (in.bad()) throw std::runtime_error(file.key + ": cannot be read");
  return file;
}

std::vector<File> read_files(const std::vector<fs::path>& paths) {
  std::set<fs::path> found;
  for (const fs::path& path : paths) {
    if (fs::is_directory(path)) {
      for (const auto& entry : fs::recursive_directory_iterator(path)) {
        if (entry.is_regular_file()) found.insert(entry.path());
      }
    } else if (fs::is_regular_file(path)) {
      found.insert(path);
    } else {
      const char* problem = fs::exists(path) ? "neither a file nor a directory" : "no such file or directory";
      throw std::runtime_error(path.string() + ": " + problem);
    }
  }
  if (found.empty()) throw std::runtime_error("no files to store");
  std::vector<File> files;
  for (const fs::path& path : found) files.push_back(read_file(path));
  return files;
}

/// Calls the function once for each file, from four threads, and returns the elapsed seconds.
template <class Function>
double from_four_threads(const std::vector<File>& files, Function function) {
  const auto start = std::chrono::steady_clock::now();
  std::atomic<std::size_t> next = 0;
  const auto work = [&] {
    for (std::size_t i = next++; i < files.size(); i = next++) function(files[i]);
  };
  std::array<std::future<void>, 4> threads;
  for (auto& thread : threads) thread = std::async(std::launch::async, work);
  for (auto& thread : threads) thread.get();
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

void run(const std::vector<File>& files) {
  const kv::Server server;
  RemoteStore store(server.endpoint());
  std::cout.precision(3);

  std::size_t bytes = 0;
  for (const File& file : files) bytes += file.bytes.size();
  std::cout << "server: " << server.endpoint() << "\nfiles: " << files.size() << ", " << bytes << " bytes\n";

  const double put = from_four_threads(files, [&](const File& file) { store.put(file.key, file.bytes); });
  std::cout << "puts: " << files.size() << " from 4 threads in " << put << " s\n";

  const double get = from_four_threads(files, [&](const File& file) {
    if (store.get(file.key) != file.bytes) throw std::runtime_error(file.key + ": the stored value differs");
  });
  std::cout << "gets: " << files.size() << " from 4 threads in " << get << " s, contents identical\n";

  std::cout << "a get that fails, and the next one, which works:\n";
  look_up(store, "lost");
  look_up(store, files.front().key);
}

}  // namespace

int main(int argc, char** argv) {
  try {
    std::vector<fs::path> paths;
    for (int i = 1; i < argc; ++i) {
      const std::string_view argument = argv[i];
      if (argument == "--help") {
        std::cout << usage;
        return 0;
      }
      if (argument.starts_with('-')) {
        std::cerr << "quickstart: unknown option " << argument << '\n' << usage;
        return 2;
      }
      paths.emplace_back(argument);
    }
    if (paths.empty()) {
      // __FILE__ may be relative to the folder in which the compiler ran.
      const fs::path project = fs::path(__FILE__).parent_path().parent_path();
      if (!fs::exists(project / "include"))
        throw std::runtime_error("the default files are not there: name files to store");
      paths = {project / "include", project / "README.md"};
    }
    run(read_files(paths));
    return 0;
  } catch (const std::exception& e) {
    std::cerr << "quickstart: " << e.what() << '\n';
    return 1;
  }
}
