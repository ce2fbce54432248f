// SPDX-License-Identifier: Apache-2.0
//
// A synchronous key-value store, implemented with an asynchronous client. `Client` and `Server` stand for the library
// and the service that you already have; `RemoteStore` is the part that uses runtime_bridge.

#include <runtime_bridge.hpp>

#include <asio/awaitable.hpp>
#include <asio/buffer.hpp>
#include <asio/co_spawn.hpp>
#include <asio/detached.hpp>
#include <asio/io_context.hpp>
#include <asio/ip/tcp.hpp>
#include <asio/read.hpp>
#include <asio/use_awaitable.hpp>
#include <asio/write.hpp>

#include <arpa/inet.h>

#include <array>
#include <atomic>
#include <cerrno>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <exception>
#include <filesystem>
#include <fstream>
#include <future>
#include <iostream>
#include <map>
#include <set>
#include <stdexcept>
#include <string>
#include <string_view>
#include <system_error>
#include <thread>
#include <utility>
#include <vector>

namespace {

namespace fs = std::filesystem;
using asio::ip::tcp;

// ---------------------------------------------------------------------------------------------------------------------
// The protocol. A message is three 32-bit numbers in network order (kind, length of the key, length of the value), then
// the key, then the value. Each request gets one message as its reply, on the same connection.

enum class Kind : std::uint32_t { put = 1, get, done, not_found, refused };

constexpr std::size_t max_key = 4096;
constexpr std::size_t max_value = std::size_t{64} * 1024 * 1024;

struct Message {
  Kind kind;
  std::string key, value;
};

struct ProtocolError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// Both sides call this before they send and when they receive: a length must fit into 32 bits, and a length that the
// peer merely claims must not make us allocate too much.
void check_lengths(std::size_t key, std::size_t value) {
  const auto check = [](const std::string& what, std::size_t length, std::size_t limit) {
    if (length <= limit) return;
    throw ProtocolError(what + " of " + std::to_string(length) + " bytes exceeds the limit of " +
                        std::to_string(limit));
  };
  check("a key", key, max_key);
  check("a value", value, max_value);
}

asio::awaitable<void> send(tcp::socket& socket, Kind kind, std::string_view key, std::string_view value) {
  check_lengths(key.size(), value.size());
  const std::array<std::uint32_t, 3> head{htonl(static_cast<std::uint32_t>(kind)),
                                          htonl(static_cast<std::uint32_t>(key.size())),
                                          htonl(static_cast<std::uint32_t>(value.size()))};
  const std::array<asio::const_buffer, 3> message{asio::buffer(head), asio::buffer(key), asio::buffer(value)};
  co_await asio::async_write(socket, message, asio::use_awaitable);
}

asio::awaitable<Message> receive(tcp::socket& socket) {
  std::array<std::uint32_t, 3> head{};
  co_await asio::async_read(socket, asio::buffer(head), asio::use_awaitable);
  check_lengths(ntohl(head[1]), ntohl(head[2]));
  Message message{Kind{ntohl(head[0])}, std::string(ntohl(head[1]), '\0'), std::string(ntohl(head[2]), '\0')};
  const std::array<asio::mutable_buffer, 2> body{asio::buffer(message.key), asio::buffer(message.value)};
  co_await asio::async_read(socket, body, asio::use_awaitable);
  co_return message;
}

// ---------------------------------------------------------------------------------------------------------------------
// The asynchronous client. It needs no locks, because all of it runs on one thread, the bridge's worker.

class Client {
 public:
  Client(asio::any_io_executor executor, tcp::endpoint server)
      : executor_(std::move(executor)), server_(std::move(server)) {}

  // The views may refer to locals of a thread that waits in block_on, since no task outlives its call.
  asio::awaitable<void> put(std::string_view key, std::string_view value) { co_await exchange(Kind::put, key, value); }

  asio::awaitable<std::string> get(std::string_view key) {
    Message reply = co_await exchange(Kind::get, key, {});
    if (reply.kind == Kind::not_found) throw std::out_of_range("no such key: " + std::string(key));
    co_return std::move(reply.value);
  }

  void close() { idle_.clear(); }

 private:
  // Calls from different threads run this concurrently, each with its own connection.
  asio::awaitable<Message> exchange(Kind kind, std::string_view key, std::string_view value) {
    tcp::socket connection(executor_);
    if (idle_.empty()) {
      co_await connection.async_connect(server_, asio::use_awaitable);
      connection.set_option(tcp::no_delay(true));
    } else {
      connection = std::move(idle_.back());
      idle_.pop_back();
    }
    co_await send(connection, kind, key, value);
    Message reply = co_await receive(connection);
    if (reply.kind == Kind::refused) throw ProtocolError("the server refused: " + reply.value);
    if (reply.kind != Kind::done && reply.kind != Kind::not_found) throw ProtocolError("invalid reply from the server");
    // Only reuse a connection after success: if anything throws above, it is closed.
    if (idle_.size() < max_idle) idle_.push_back(std::move(connection));
    co_return reply;
  }

  static constexpr std::size_t max_idle = 8;

  asio::any_io_executor executor_;
  tcp::endpoint server_;
  std::vector<tcp::socket> idle_;
};

// ---------------------------------------------------------------------------------------------------------------------
// The synchronous interface and its implementation

// [readme]
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
  explicit RemoteStore(const tcp::endpoint& server) : client_(bridge_.get_executor(), server) {}
  ~RemoteStore() override {
    (void)bridge_.block_on([&] { client_.close(); });
  }

  // The task runs on the bridge's worker and has ended when block_on returns, so it may refer to the caller's locals.
  void put(std::string_view key, std::string_view value) override {
    runtime_bridge::unwrap(bridge_.block_on([&] { return client_.put(key, value); }));
  }

  // If the task throws, this call returns an error, and other calls go on. unwrap rethrows the exception.
  runtime_bridge::Result<std::string> try_get(std::string_view key) {
    return bridge_.block_on([&] { return client_.get(key); });
  }
  std::string get(std::string_view key) override { return runtime_bridge::unwrap(try_get(key)); }

 private:
  runtime_bridge::RuntimeBridge bridge_;  // owns one worker thread, which runs an io_context
  Client client_;                         // declared last: its sockets must be destroyed before the bridge
};

void look_up(RemoteStore& store, std::string_view key) {
  if (const auto value = store.try_get(key)) {
    std::cout << key << ": " << value->size() << " bytes\n";
  } else {
    std::cout << value.error().message() << '\n';  // runtime_bridge: the task threw: no such key: lost
  }
}
// [/readme]

// ---------------------------------------------------------------------------------------------------------------------
// The server. It runs in this process, on its own thread and context, and is reached through a socket.

class Server {
 public:
  Server() {
    tcp::acceptor acceptor(context_, {asio::ip::address_v4::loopback(), 0});
    endpoint_ = acceptor.local_endpoint();
    asio::co_spawn(context_, accept(std::move(acceptor)), asio::detached);
    thread_ = std::thread([this] { context_.run(); });
  }
  ~Server() {
    context_.stop();
    thread_.join();
  }

  [[nodiscard]] tcp::endpoint endpoint() const { return endpoint_; }

 private:
  // The coroutine owns the acceptor. If accepting fails, the acceptor closes, so clients get an error and do not wait.
  asio::awaitable<void> accept(tcp::acceptor acceptor) {
    for (;;) {
      tcp::socket peer = co_await acceptor.async_accept(asio::use_awaitable);
      asio::co_spawn(context_, serve(std::move(peer)), asio::detached);
    }
  }

  // Throws when the peer disconnects. Returns after a refusal, because the rest of the stream cannot be parsed.
  asio::awaitable<void> serve(tcp::socket peer) {
    peer.set_option(tcp::no_delay(true));
    for (Message reply{}; reply.kind != Kind::refused;) {
      try {
        Message request = co_await receive(peer);
        reply = answer(request);
      } catch (const ProtocolError& e) {
        reply = {Kind::refused, {}, e.what()};
      }
      co_await send(peer, reply.kind, reply.key, reply.value);
    }
  }

  // The reply needs a copy of the value: another connection may replace the stored one while the reply is sent.
  Message answer(Message& request) {
    if (request.kind == Kind::put) {
      values_[std::move(request.key)] = std::move(request.value);
      return {Kind::done, {}, {}};
    }
    if (request.kind != Kind::get) throw ProtocolError("an unknown kind of request");
    const auto found = values_.find(request.key);
    if (found == values_.end()) return {Kind::not_found, {}, {}};
    return {Kind::done, {}, found->second};
  }

  std::map<std::string, std::string> values_;
  asio::io_context context_{1};
  tcp::endpoint endpoint_;
  std::thread thread_;
};

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
    if (file.bytes.size() > max_value) throw std::runtime_error(file.key + ": too large for a value");
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
  const Server server;
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
