// SPDX-License-Identifier: Apache-2.0
//
// A synchronous, content-addressed object store over asynchronous S3 requests.

#include <runtime_bridge.hpp>
#include <runtime_bridge/streambuf.hpp>

#include <sys/resource.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <asio/awaitable.hpp>
#include <asio/buffer.hpp>
#include <asio/experimental/awaitable_operators.hpp>
#include <asio/steady_timer.hpp>
#include <asio/use_awaitable.hpp>
#include <atomic>
#include <chrono>
#include <csignal>
#include <cstdint>
#include <cstdlib>
#include <exception>
#include <filesystem>
#include <fstream>
#include <functional>
#include <ios>
#include <iostream>
#include <istream>
#include <memory>
#include <ostream>
#include <random>
#include <span>
#include <stdexcept>
#include <string>
#include <string_view>
#include <system_error>
#include <type_traits>
#include <utility>
#include <vector>

#include "support/backends.hpp"
#include "support/curl.hpp"
#include "support/http_benchmark.hpp"
#include "support/pipe.hpp"
#include "support/program.hpp"
#include "support/s3.hpp"
#include "support/shared_client.hpp"

namespace {

using namespace std::chrono_literals;
using asio::awaitable;
using std::chrono::milliseconds;

// ---------------------------------------------------------------------------------------------------------------------
// The backend

/// Describes the exception that is being handled, or rethrows it.
BackendError describe_s3_error() {
  try {
    throw;
  } catch (const s3::Error& e) {
    switch (e.kind()) {
      case s3::Error::NoSuchObject: return {BackendError::NotFound, e.what()};
      case s3::Error::Unavailable: return {BackendError::Unavailable, e.what()};
      case s3::Error::BadAnswer: return {BackendError::BadAnswer, e.what()};
      default: return {BackendError::Refused, e.what()};
    }
  } catch (const curl::Error& e) {
    switch (e.code()) {
      case CURLE_URL_MALFORMAT:
      case CURLE_BAD_FUNCTION_ARGUMENT: return {BackendError::Refused, e.what()};  // nothing was sent
      case CURLE_UNSUPPORTED_PROTOCOL:
      case CURLE_WEIRD_SERVER_REPLY:
      case CURLE_FILESIZE_EXCEEDED: return {BackendError::BadAnswer, e.what()};
      case CURLE_ABORTED_BY_CALLBACK: return {BackendError::Stopped, e.what()};
      case CURLE_OUT_OF_MEMORY: return {BackendError::Failed, e.what()};
      default: return {BackendError::Unavailable, e.what()};
    }
  } catch (const BackendError& e) {
    return e;
  }
}

/// Copies are cheap: they share one bridge and the bucket's connections.
class S3ObjectStore final : public ObjectStore {
 private:
  inline static const std::string folder = "objects/";
  inline static const BackendError corrupt{BackendError::Corrupt, "the content does not match its address"};
  static std::string key(const std::string& address) { return folder + address; }

  static awaitable<std::string> put_stream(s3::Bucket& bucket, const s3::Content& content) {
    std::string address = co_await s3::hash_of(content.open());
    co_await bucket.put(key(address), content, address);
    co_return address;
  }

  static awaitable<std::optional<std::vector<std::string>>> next_page(s3::Bucket& bucket,
                                                                      std::shared_ptr<s3::Bucket::List> list,
                                                                      milliseconds timeout) {
    using namespace asio::experimental::awaitable_operators;
    auto page = bucket.next_page(*list);
    if (timeout == milliseconds::max()) co_return co_await std::move(page);
    asio::steady_timer timer(co_await asio::this_coro::executor, timeout);
    auto limit = timer.async_wait(asio::use_awaitable);
    auto first = co_await (std::move(page) || std::move(limit));
    if (first.index() == 1) throw BackendError{BackendError::TimedOut, "the server did not list in time"};
    co_return std::get<0>(std::move(first));
  }

  // Whoever waits at the other end of the pipe learns how the transfer ended.
  static awaitable<void> download(s3::Bucket& bucket, std::string address, std::shared_ptr<Pipe> pipe) {
    try {
      const std::string hash = co_await bucket.get(key(address), s3::sink_of(pipe));
      if (hash != address) throw BackendError(corrupt);
      pipe->close();
    } catch (...) {
      pipe->close(std::current_exception());
      throw;
    }
  }
  static awaitable<void> upload(s3::Bucket& bucket, std::string address, std::uint64_t size,
                                std::shared_ptr<Pipe> pipe) {
    try {
      co_await bucket.put(key(address), s3::Content(size, s3::source_of(pipe)), address);
      pipe->close();
    } catch (...) {
      pipe->close(std::current_exception());
      throw;
    }
  }

  /// Why a stream failed.
  static Outcome<void> failure(const runtime_bridge::BridgeError& error) {
    using Result = runtime_bridge::Result<Outcome<void>>;
    return flatten<void>(Result(Result::unexpected_type(error)));
  }

 public:
  explicit S3ObjectStore(const s3::Settings& settings) : bucket_(milliseconds::max(), settings) {}

  // The task has ended when block_on returns, so it may refer to the caller's locals. The address is computed on the
  // caller's thread, so that hashing does not delay other calls on the worker.
  Outcome<std::string> put(std::string_view content) override {
    const std::string address = s3::Sha256::of(content);
    const auto open = [&] { return curl::from_memory(content); };
    const auto put = [&](s3::Bucket& bucket) { return bucket.put(key(address), {content.size(), open}, address); };
    if (const Outcome<void> done = bucket_.call(put); !done) return Failure(done.error());
    return address;
  }
  Outcome<std::string> get(const std::string& address) override {
    Outcome<std::string> content = bucket_.call([&](s3::Bucket& bucket) { return bucket.get(key(address)); });
    return content && s3::Sha256::of(*content) != address ? Failure(corrupt) : content;
  }
  Outcome<bool> has(const std::string& address) override {
    return bucket_.call([&](s3::Bucket& bucket) { return bucket.exists(key(address)); });
  }
  /// The timeout is for each of the requests that a long list takes.
  Outcome<std::vector<std::string>> list() override {
    const auto list = std::make_shared<s3::Bucket::List>(s3::Bucket::List{folder});
    const auto next = [list, timeout = bucket_.timeout()](s3::Bucket& b) { return next_page(b, list, timeout); };
    std::vector<std::string> addresses;
    try {
      for (const std::vector<std::string>& keys : bucket_.range(next)) {
        for (const std::string& key : keys) addresses.push_back(key.substr(folder.size()));
      }
    } catch (const std::system_error& e) {
      if (e.code().category() != make_error_code(runtime_bridge::BridgeError::WorkerDead).category()) throw;
      const auto kind = static_cast<runtime_bridge::BridgeError::Kind>(e.code().value());
      return Failure(failure(kind).error());
    } catch (...) {
      return Failure(describe_s3_error());
    }
    return addresses;
  }
  Outcome<void> remove(const std::string& address) override {
    return bucket_.call([&](s3::Bucket& bucket) { return bucket.remove(key(address)); });
  }

  /// For content that is too large for memory. It is read twice: the first time to compute its address.
  Outcome<std::string> put(const s3::Content& content) {
    return bucket_.call([&](s3::Bucket& bucket) { return put_stream(bucket, content); });
  }
  /// If the content is corrupt, this is only known after the sink has received all of it.
  Outcome<void> get(const std::string& address, const std::function<curl::Sink()>& open_sink) {
    const auto hash = bucket_.call([&](s3::Bucket& bucket) { return bucket.get(key(address), open_sink); });
    if (!hash) return Failure(hash.error());
    return *hash == address ? Outcome<void>() : Failure(corrupt);
  }

  /// Gives `use` the content as a stream, while it arrives. If it is corrupt, the stream ends with an error. If `use`
  /// leaves some of it, the transfer is aborted. The timeout is for each read.
  Outcome<void> read(const std::string& address, const std::function<void(std::istream&)>& use) {
    const auto pipe = std::make_shared<Pipe>(bucket_.bridge().get_executor());
    auto transfer = bucket_.submit([=](s3::Bucket& bucket) { return download(bucket, address, pipe); });
    const auto read = [&](asio::mutable_buffer to) { return pipe->read({static_cast<char*>(to.data()), to.size()}); };
    runtime_bridge::istream in(bucket_.bridge(), read, bucket_.timeout());
    use(in);
    if (!in.error()) return {};
    if (*in.error() != runtime_bridge::BridgeError::ResponseLost) return failure(*in.error());
    return flatten(transfer.join());
  }
  /// Stores what `use` writes to a stream, while it writes. S3 needs the address and the size first.
  Outcome<void> write(const std::string& address, std::uint64_t size, const std::function<void(std::ostream&)>& use) {
    const auto pipe = std::make_shared<Pipe>(bucket_.bridge().get_executor());
    auto transfer = bucket_.submit([=](s3::Bucket& bucket) { return upload(bucket, address, size, pipe); });
    const auto write = [&](asio::const_buffer bytes) {
      return pipe->write({static_cast<const char*>(bytes.data()), bytes.size()});
    };
    runtime_bridge::ostream out(bucket_.bridge(), write, bucket_.timeout());
    use(out);
    out.flush();
    if (out.error() && *out.error() != runtime_bridge::BridgeError::ResponseLost) return failure(*out.error());
    // If something is missing, the transfer would wait for it.
    (void)bucket_.bridge().block_on([&] { pipe->close(); });
    if (!transfer.wait_for(bucket_.timeout())) return failure(runtime_bridge::BridgeError::TimedOut);
    Outcome<void> done = flatten(transfer.join());
    return done && out.error() ? failure(*out.error()) : done;
  }
  Outcome<void> create_bucket() {
    return bucket_.call([](s3::Bucket& bucket) { return bucket.create(); });
  }

  /// A copy whose calls have this timeout.
  [[nodiscard]] S3ObjectStore with_timeout(milliseconds timeout) const {
    S3ObjectStore copy = *this;
    copy.bucket_.set_timeout(timeout);
    return copy;
  }

 private:
  SharedClient<s3::Bucket, describe_s3_error> bucket_;
};

// ---------------------------------------------------------------------------------------------------------------------
// The program

/// The peak memory use of this process, in KiB.
long peak_memory() {
  rusage usage{};
  getrusage(RUSAGE_SELF, &usage);
  return usage.ru_maxrss;
}

void small_objects(S3ObjectStore store) {
  std::array<std::string, 40> addresses;
  const auto content = [](std::size_t i) { return std::string(i * 1000, static_cast<char>(i)); };
  const auto listed = [&] {
    const std::vector<std::string> list = need(store.list());
    return std::ranges::count_if(addresses, [&](auto& address) { return std::ranges::count(list, address) == 1; });
  };
  const auto for_each = [&](const char* what, auto function) {
    const auto start = std::chrono::steady_clock::now();
    std::atomic<std::size_t> next = 0;
    from_threads(4, [&](int) {
      for (std::size_t i = next++; i < addresses.size(); i = next++) function(i);
    });
    std::cout << what << ": " << addresses.size() << " objects from 4 threads in " << since(start).count() << " ms\n";
  };
  for_each("put", [&](std::size_t i) { addresses[i] = need(store.put(content(i))); });
  for_each("get and compare",
           [&](std::size_t i) { check(need(store.get(addresses[i])) == content(i), "an object has changed"); });
  check(need(store.has(addresses[7])) && listed() == std::ssize(addresses), "an object is missing");
  for_each("remove", [&](std::size_t i) { need(store.remove(addresses[i])); });
  check(!need(store.has(addresses[7])) && listed() == 0, "an object is still there");
  std::cout << "get of a removed object: " << store.get(addresses[7]).error().message << '\n';
}

/// Checks what has been used since the peak was `before`, and says what for.
void check_memory(const std::string& what, long before, long limit) {
  const long growth = (peak_memory() - before) / 1024;
  std::cout << what << "; memory use grew by " << growth << " MiB\n";
  check(growth <= limit, "memory use grew by more than the limit");
}

/// The same bytes each time. Their number does not divide any buffer's size.
std::string random_block(unsigned seed) {
  std::string block(65'521, '\0');
  std::ranges::generate(block, [engine = std::minstd_rand(seed)]() mutable { return static_cast<char>(engine()); });
  return block;
}

/// Gives the same bytes each time, so that the content need not be kept in memory.
curl::Source generator(std::size_t size) {
  return
      [block = random_block(1), size, sent = std::size_t{0}](std::span<char> room) mutable -> awaitable<std::size_t> {
        const std::string_view rest = std::string_view(block).substr(sent % block.size());
        const std::size_t n = rest.substr(0, size - sent).copy(room.data(), room.size());
        sent += n;
        co_return n;
      };
}

/// A temporary file.
struct RemovedFile {
  explicit RemovedFile(const std::string& prefix)
      : name(std::filesystem::temp_directory_path() / (prefix + '.' + std::to_string(getpid()))) {}
  RemovedFile(const RemovedFile&) = delete;
  RemovedFile& operator=(const RemovedFile&) = delete;
  ~RemovedFile() {
    std::error_code ignored;
    std::filesystem::remove(name, ignored);
  }

  const std::filesystem::path name;
};

void large_object(S3ObjectStore store, long memory_limit) {
  constexpr std::size_t size = std::size_t{64} << 20U;
  const long before = peak_memory();
  const std::string address = need(store.put(s3::Content(size, [] { return generator(size); })));
  std::size_t received = 0;
  const auto count = [&](std::string_view piece) -> awaitable<void> { co_return void(received += piece.size()); };
  need(store.get(address, [&] { return count; }));
  check(received == size, "the large object has the wrong size");
  check_memory("streamed: 64 MiB up and down", before, memory_limit);

  const auto slowly = [&](std::string_view piece) -> awaitable<void> {
    received += piece.size();
    asio::steady_timer timer(co_await asio::this_coro::executor, 10ms);
    co_await timer.async_wait(asio::use_awaitable);
  };
  const auto start = std::chrono::steady_clock::now();
  received = 0;
  const Outcome<void> late = store.with_timeout(250ms).get(address, [&] { return slowly; });
  const auto time = since(start);
  check(!late && late.error().kind == BackendError::TimedOut && time < 1s, "the deadline was missed");
  std::cout << "deadline of 250 ms: TimedOut after " << time.count() << " ms and " << received / 1024 << " KiB\n";
  need(store.remove(address));
}

/// The functions that fill and read a stream know nothing of S3, nor of coroutines.
void large_file(S3ObjectStore store, long memory_limit) {
  constexpr std::size_t size = std::size_t{64} << 20U;
  const RemovedFile path("runtime_bridge_s3_object_store");
  const std::string block = random_block(2);
  s3::Sha256 hash;
  {
    std::ofstream file(path.name, std::ios::binary);
    for (std::size_t written = 0; written < size; written += block.size()) {
      const std::string_view part = std::string_view(block).substr(0, size - written);
      file.write(part.data(), std::ssize(part));
      hash.update(part);
    }
    check(static_cast<bool>(file.flush()), "the file cannot be written");
  }
  const std::string address = hash.finish();
  const long before = peak_memory();
  need(store.write(address, size,
                   [&](std::ostream& out) { out << std::ifstream(path.name, std::ios::binary).rdbuf(); }));
  bool same = false;
  need(store.read(address, [&](std::istream& in) {
    std::ifstream file(path.name, std::ios::binary);
    std::string expected(10'000, '\0'), received(expected.size(), '\0');
    do {
      file.read(expected.data(), std::ssize(expected));
      in.read(received.data(), std::ssize(received));
      same = expected == received && file.gcount() == in.gcount();
    } while (same && in);
    same = same && in.eof();
  }));
  check(same, "the file has changed");
  check_memory("a file of 64 MiB through a std::ostream and back through a std::istream", before, memory_limit);
  need(store.remove(address));
}

void run(CLI::App& app, int count, char** arguments) {
  app.description(
      "Stores objects in an S3 bucket from four threads, reads, lists and removes them, streams a large one, and\n"
      "aborts a transfer by a deadline. It creates the bucket if necessary, and removes what it has stored.\n\n"
      "To start a server for it: examples/serve s3. (That is s3rver 3.7.1, which checks the form of a request but not\n"
      "its signature, and ignores If-None-Match.)");
  s3::Settings settings{"http://127.0.0.1:4568", "us-east-1", "runtime-bridge", "S3RVER", "S3RVER"};
  if (const char* region = std::getenv("AWS_DEFAULT_REGION")) settings.region = region;
  long memory = 16;
  const auto add = [&](const char* name, auto& value, const char* meaning) {
    return app.add_option(name, value, meaning)->capture_default_str();
  };
  add("--endpoint", settings.endpoint, "the server")->envname("AWS_ENDPOINT_URL");
  add("--region", settings.region, "its region")->envname("AWS_REGION");
  add("--bucket", settings.bucket, "the bucket");
  add("--key-id", settings.key_id, "the access key ID")->envname("AWS_ACCESS_KEY_ID");
  add("--secret", settings.secret, "the secret access key, which signs the requests")->envname("AWS_SECRET_ACCESS_KEY");
  add("--session-token", settings.session_token, "the session token of temporary credentials")
      ->envname("AWS_SESSION_TOKEN");
  add("--memory", memory, "how much memory the large object may use, in MiB")->check(CLI::Range(0, 1024));
  bool measure = false;
  app.add_flag("--benchmark", measure, "measure small requests, with: examples/serve nginx");
  int rounds = 9;
  add("--rounds", rounds, "how often to measure")->check(CLI::Range(1, 1000));
  app.parse(count, arguments);

  std::signal(SIGPIPE, SIG_IGN);  // required by curl.hpp
  if (measure) return http_benchmark::run(settings.endpoint, rounds);
  S3ObjectStore store(settings);
  need_server(store.create_bucket(), "S3 server at " + settings.endpoint, "s3");
  small_objects(store);
  large_object(store, memory);
  large_file(store, memory);
}

}  // namespace

int main(int argc, char** argv) {
  return run_program("s3_object_store", [&](CLI::App& app) { run(app, argc, argv); });
}
