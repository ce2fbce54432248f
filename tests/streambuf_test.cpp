// SPDX-License-Identifier: Apache-2.0
//
// runtime_bridge/streambuf.hpp: std::istream and std::ostream over asynchronous reads and writes.

#include <runtime_bridge/streambuf.hpp>

#include <malloc.h>

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdlib>
#include <functional>
#include <ios>
#include <iterator>
#include <limits>
#include <new>
#include <numeric>
#include <optional>
#include <random>
#include <sstream>
#include <stdexcept>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "support.hpp"

using runtime_bridge::Shutdown;

namespace {

std::atomic<std::size_t> allocated{0}, most_allocated{0};  // bytes

}  // namespace

// They count. AddressSanitizer has all forms of its own, so all that are used are replaced. (Those for over-aligned
// types are not.)
[[gnu::noinline]] void* operator new(std::size_t size, const std::nothrow_t&) noexcept {
  void* p = std::malloc(size);
  const std::size_t now = allocated += malloc_usable_size(p);
  std::size_t most = most_allocated;
  while (most < now && !most_allocated.compare_exchange_weak(most, now)) {
  }
  return p;
}
[[gnu::noinline]] void* operator new(std::size_t size) {
  if (void* p = operator new(size, std::nothrow)) return p;
  throw std::bad_alloc();
}
[[gnu::noinline]] void* operator new[](std::size_t size) { return operator new(size); }
[[gnu::noinline]] void* operator new[](std::size_t size, const std::nothrow_t&) noexcept {
  return operator new(size, std::nothrow);
}
[[gnu::noinline]] void operator delete(void* p) noexcept {
  allocated -= malloc_usable_size(p);
  std::free(p);
}
[[gnu::noinline]] void operator delete(void* p, std::size_t) noexcept { operator delete(p); }
[[gnu::noinline]] void operator delete(void* p, const std::nothrow_t&) noexcept { operator delete(p); }
[[gnu::noinline]] void operator delete[](void* p) noexcept { operator delete(p); }
[[gnu::noinline]] void operator delete[](void* p, std::size_t) noexcept { operator delete(p); }
[[gnu::noinline]] void operator delete[](void* p, const std::nothrow_t&) noexcept { operator delete(p); }

namespace {

using Socket = asio::local::stream_protocol::socket;
constexpr std::size_t kib = 1024;

/// Copies what fits of the text, and removes it there.
std::size_t take(std::string& text, asio::mutable_buffer room) {
  const std::size_t size = asio::buffer_copy(room, asio::buffer(text));
  text.erase(0, size);
  return size;
}

std::string text_of(asio::const_buffer bytes) { return {static_cast<const char*>(bytes.data()), bytes.size()}; }

/// Gives these pieces, one after the other, and then the end.
class Pieces {
 public:
  explicit Pieces(std::vector<std::string> pieces) : pieces_(std::move(pieces)) {}

  std::size_t operator()(asio::mutable_buffer room) {
    ++reads;
    largest = std::max(largest, room.size());
    if (next_ == pieces_.size()) return 0;
    const std::size_t size = take(pieces_[next_], room);
    if (pieces_[next_].empty()) ++next_;
    return size;
  }

  std::size_t reads = 0;
  std::size_t largest = 0;

 private:
  std::vector<std::string> pieces_;
  std::size_t next_ = 0;
};

/// Takes up to so many bytes at a time.
class Sink {
 public:
  explicit Sink(std::size_t most = std::string::npos) : most_(most) {}

  std::size_t operator()(asio::const_buffer bytes) {
    if (fail) throw std::runtime_error("the disk is full");
    const std::string piece = text_of(bytes).substr(0, most_);
    pieces.push_back(piece);
    return piece.size();
  }
  std::string text() const { return std::accumulate(pieces.begin(), pieces.end(), std::string()); }

  std::vector<std::string> pieces;
  bool fail = false;

 private:
  std::size_t most_;
};

std::string pattern(std::size_t size) {
  std::string text(size, '\0');
  std::generate(text.begin(), text.end(),
                [engine = std::minstd_rand()]() mutable { return static_cast<char>(engine()); });
  return text;
}

struct Broken : std::runtime_error {
  using std::runtime_error::runtime_error;
};

/// The outcome that a stream tells.
template <class Stream>
Outcome outcome_of(const Stream& stream) {
  if (!stream.error()) return succeeded;
  return {true, stream.error()->kind(), stream.error()->cause()};
}

/// A pair of connected sockets.
struct Pair {
  explicit Pair(const RuntimeBridge& bridge) : a(bridge.get_executor()), b(bridge.get_executor()) {
    asio::local::connect_pair(a, b);
  }
  Socket a, b;
};

auto reading(Socket& socket) {
  return [&socket](asio::mutable_buffer room) { return socket.async_read_some(room, asio::deferred); };
}
auto writing(Socket& socket) {
  return [&socket](asio::const_buffer bytes) { return asio::async_write(socket, bytes, asio::deferred); };
}

/// A deadline may pass before the call has started: repeats with a longer one until it has not.
template <class Attempt>
void with_deadline(Attempt attempt) {
  for (auto limit = 5ms; !attempt(limit); limit *= 2) {
  }
}

}  // namespace

// ---------------------------------------------------------------------------------------------------------------------
// Reading

TEST_CASE("istream: lines, words and characters") {
  RuntimeBridge bridge;
  Pieces pieces({"fir", "st\nsecond li", "ne\n12 ", "3", "4 word", "\nx"});
  runtime_bridge::istream in(bridge, std::ref(pieces));
  std::string line, word;
  CHECK(std::getline(in, line));
  CHECK(line == "first");
  CHECK(std::getline(in, line));
  CHECK(line == "second line");
  int a = 0, b = 0;
  CHECK(in >> a >> b >> word);
  CHECK(a == 12);
  CHECK(b == 34);
  CHECK(word == "word");
  CHECK(in.get() == '\n');
  CHECK(in.get() == 'x');
  CHECK(in.get() == EOF);
  CHECK(in.eof());
  CHECK_FALSE(in.bad());
  CHECK(outcome_of(in) == succeeded);
}

TEST_CASE("istream: every byte, whatever the sizes of the pieces, the buffer and the reads") {
  RuntimeBridge bridge;
  const std::string text = pattern(3000);
  for (const std::size_t piece : {1U, 7U, 100U, 3000U}) {
    for (const std::size_t buffer : {0U, 1U, 8U, 100U, 5000U}) {
      for (const std::size_t size : {1U, 8U, 99U, 2000U, 4000U}) {
        std::vector<std::string> pieces;
        for (std::size_t at = 0; at < text.size(); at += piece) pieces.push_back(text.substr(at, piece));
        Pieces source(pieces);
        runtime_bridge::istream in(bridge, std::ref(source), 1h, buffer);
        std::string read, room(size, '\0');
        while (in.read(room.data(), std::ssize(room)) || in.gcount() != 0) {
          read.append(room, 0, static_cast<std::size_t>(in.gcount()));
          if (read.size() % 3 == 0 && in.peek() != EOF) read += static_cast<char>(in.get());
        }
        CAPTURE(piece, buffer, size);
        CHECK((read == text));
        CHECK(in.eof());
      }
    }
  }
}

TEST_CASE("istream: an iterator reads all, and a stream can be copied into another") {
  RuntimeBridge bridge;
  const std::string text = pattern(1000);
  runtime_bridge::istream in(bridge, Pieces({text, text}), 1h, 64);
  CHECK((std::string(std::istreambuf_iterator<char>(in), {}) == text + text));
  std::ostringstream copy;
  runtime_bridge::istream again(bridge, Pieces({text, text}), 1h, 64);
  copy << again.rdbuf();
  CHECK((copy.str() == text + text));
}

TEST_CASE("istream: a large read goes straight to its destination") {
  RuntimeBridge bridge;
  std::string text = pattern(1000), room(500, '\0');
  std::vector<const void*> destinations;
  const auto read = [&](asio::mutable_buffer to) {
    destinations.push_back(to.data());
    return take(text, to);
  };
  runtime_bridge::istream in(bridge, read, 1h, 100);
  CHECK(in.get() == static_cast<unsigned char>(pattern(1000)[0]));
  CHECK(in.read(room.data(), std::ssize(room)));
  CHECK((room == pattern(1000).substr(1, 500)));
  REQUIRE(destinations.size() == 2);
  CHECK(destinations[1] == room.data() + 99);
  // Not a byte of the buffer, which are older.
  CHECK(in.unget().fail());
  in.clear();
  CHECK(in.get() == static_cast<unsigned char>(pattern(1000)[501]));
  CHECK(in.unget());
  CHECK(in.get() == static_cast<unsigned char>(pattern(1000)[501]));
}

TEST_CASE("istream: the end is zero or eof, and a later read asks again") {
  RuntimeBridge bridge;
  std::string text = "abc";
  bool by_exception = false;
  const auto read = [&](asio::mutable_buffer room) {
    const std::size_t size = take(text, room);
    if (size == 0 && by_exception) throw AsioError(asio::error::eof);
    return size;
  };
  for (const bool large : {false, true}) {
    for (by_exception = false;; by_exception = true) {
      CAPTURE(large, by_exception);
      text = "abc";
      runtime_bridge::istream in(bridge, read, 1h, large ? 2 : 100);
      in.exceptions(std::ios::badbit);
      std::string room(10, '\0');
      CHECK_FALSE(in.read(room.data(), 10));
      CHECK(in.gcount() == 3);
      CHECK(in.rdstate() == (std::ios::eofbit | std::ios::failbit));
      CHECK(outcome_of(in) == succeeded);
      text = "d";
      in.clear();
      CHECK(in.get() == 'd');
      if (by_exception) break;
    }
  }
}

TEST_CASE("istream: awaitables and operations") {
  RuntimeBridge bridge;
  Pair pair(bridge);
  std::string text = "awaitable";
  const auto coroutine = [&](asio::mutable_buffer room) -> awaitable<std::size_t> {
    co_await asio::post(use_awaitable);
    co_return take(text, room);
  };
  runtime_bridge::istream from_coroutine(bridge, coroutine);
  std::string word;
  CHECK(from_coroutine >> word);
  CHECK(word == "awaitable");

  asio::write(pair.a, asio::buffer(std::string("operation\n")));
  pair.a.close();
  runtime_bridge::istream from_socket(bridge, reading(pair.b));
  CHECK(std::getline(from_socket, word));
  CHECK(word == "operation");
  CHECK_FALSE(std::getline(from_socket, word));
  CHECK(from_socket.eof());
  CHECK(outcome_of(from_socket) == succeeded);
}

// ---------------------------------------------------------------------------------------------------------------------
// Errors of reads

TEST_CASE("istream: bytes before an error are delivered, and badbit is set after them") {
  RuntimeBridge bridge;
  std::string text = "12 abc";
  const auto read = [&](asio::mutable_buffer room) {
    if (text.empty()) throw Broken("the cable is cut");
    return take(text, room);
  };
  runtime_bridge::istream in(bridge, read);
  int number = 0;
  std::string word;
  CHECK(in >> number);
  CHECK(number == 12);
  in >> word;
  CHECK(in.bad());
  CHECK_FALSE(in.eof());
  CHECK(word == "abc");
  CHECK(outcome_of(in) == threw("the cable is cut"));
  CHECK_THROWS_AS(std::rethrow_exception(in.error()->cause()), Broken);

  in.clear();
  in.exceptions(std::ios::badbit);
  for (int attempt = 0; attempt < 2; ++attempt) {
    in.clear();
    CHECK_THROWS_AS(in.get(), Broken);
    CHECK(in.bad());
    in.clear();
    CHECK_THROWS_AS(in >> number, Broken);
    in.clear();
    CHECK_THROWS_AS(std::getline(in, word), Broken);
    in.clear();
    CHECK_THROWS_AS(in.ignore(3), Broken);
  }
  text = "34 ";
  in.clear();
  CHECK(in >> number);
  CHECK(number == 34);
  CHECK(outcome_of(in) == succeeded);
  CHECK(in.get() == ' ');
  CHECK_THROWS_AS(*std::istreambuf_iterator<char>(in), Broken);
}

TEST_CASE("istream: what a failed read() had read comes again") {
  RuntimeBridge bridge;
  for (const std::size_t buffer : {1U, 4U, 8U, 100U}) {
    CAPTURE(buffer);
    std::string text;
    bool cut = true;
    std::size_t given = 0;
    const auto read = [&](asio::mutable_buffer room) {
      if (cut && given == 15) throw Broken("the cable is cut");
      const std::size_t size = take(text, asio::buffer(room, std::min<std::size_t>(5, 15 - given)));
      given += size;
      return size;
    };
    text = "0123456789abcdefghij";
    runtime_bridge::istream in(bridge, read, 1h, buffer);
    std::string room(18, '\0');
    CHECK(in.get() == '0');
    for (int attempt = 0; attempt < 3; ++attempt) {
      CHECK_FALSE(in.read(room.data(), 18));
      CHECK(in.gcount() == 0);
      CHECK(in.rdstate() == std::ios::badbit);  // not eofbit: it is not the end
      in.clear();
    }
    CHECK(in.peek() == '1');
    CHECK(in.rdbuf()->in_avail() == 14);
    cut = false;
    given = 0;
    CHECK(in.read(room.data(), 18));
    CHECK(room == "123456789abcdefghi");
    CHECK(in.get() == 'j');
  }
}

TEST_CASE("istream: a read that gives more than it had room for") {
  RuntimeBridge bridge;
  runtime_bridge::istream in(bridge, [](asio::mutable_buffer room) { return room.size() + 1; });
  CHECK(in.get() == EOF);
  CHECK(in.bad());
  CHECK_FALSE(in.eof());
  CHECK(outcome_of(in) == threw("runtime_bridge: more bytes than there is room for"));
  runtime_bridge::istream negative(bridge, [](asio::mutable_buffer) { return -1; });
  CHECK(negative.get() == EOF);
  CHECK(negative.bad());
}

TEST_CASE("istream: each read has the deadline, and is cancelled") {
  RuntimeBridge bridge;
  with_deadline([&](auto limit) {
    std::string text = "abc";
    bool cancelled = false;
    const auto read = [&](asio::mutable_buffer room) -> awaitable<std::size_t> {
      if (!text.empty()) co_return take(text, room);
      const SetsFlag ended{cancelled};
      co_await park();
      co_return 0;
    };
    runtime_bridge::istream in(bridge, read, limit);
    std::string word;
    in >> word;
    CHECK(in.bad());
    CHECK_FALSE(in.eof());
    REQUIRE(in.error());
    CHECK(*in.error() == BridgeError::TimedOut);
    CHECK(bridge.in_flight() == 0);
    if (!in.error()->cause()) return false;
    CHECK(word == "abc");
    CHECK(cancelled);
    CHECK(code_of<AsioError>(in.error()->cause()) == asio::error::operation_aborted);
    // It goes on where it was.
    text = "def";
    in.clear();
    in >> word;
    CHECK(in.bad());
    if (word.empty()) return false;
    CHECK(word == "def");
    in.clear();
    in.exceptions(std::ios::badbit);
    CHECK_THROWS_AS(in.get(), std::system_error);
    return true;
  });
}

TEST_CASE("istream: no limit is none, and zero is now") {
  RuntimeBridge bridge;
  for (const auto none : {std::chrono::hours::max(), std::chrono::hours(1)}) {
    runtime_bridge::istream in(bridge, Pieces({"abc"}), none);
    CHECK(in.get() == 'a');
  }
  runtime_bridge::istream endless(bridge, Pieces({"abc"}), std::chrono::nanoseconds::max());
  CHECK(endless.get() == 'a');
  runtime_bridge::istream seconds(bridge, Pieces({"abc"}), std::chrono::duration<double>(0.5e9));
  CHECK(seconds.get() == 'a');
  Pieces pieces({"abc"});
  runtime_bridge::istream now(bridge, std::ref(pieces), 0s);
  CHECK(now.get() == EOF);
  CHECK(now.error() == BridgeError(BridgeError::TimedOut));
  CHECK(pieces.reads == 0);
}

TEST_CASE("streams: cannot seek") {
  RuntimeBridge bridge;
  runtime_bridge::istream in(bridge, Pieces({"abc"}));
  CHECK(in.get() == 'a');
  CHECK(in.tellg() == std::streampos(-1));
  in.seekg(0);
  CHECK(in.rdstate() == std::ios::failbit);
  in.clear();
  in.seekg(0, std::ios::end);
  CHECK(in.rdstate() == std::ios::failbit);
  in.clear();
  CHECK(in.get() == 'b');

  Sink sink;
  runtime_bridge::ostream out(bridge, std::ref(sink));
  out << "abc";
  CHECK(out.tellp() == std::streampos(-1));
  out.seekp(1);
  CHECK(out.rdstate() == std::ios::failbit);
  out.clear();
  out << "def" << std::flush;
  CHECK(sink.text() == "abcdef");
}

TEST_CASE("streams: diagnosis shows the line that made the stream") {
  RuntimeBridge bridge;
  runtime_bridge::CallInfo info;
  const auto look = [&] { info = bridge.calls().at(0); };
  const auto read = [&](asio::mutable_buffer) {
    look();
    return 0;
  };
  const auto line = __LINE__ + 1;
  runtime_bridge::istream in(bridge, read);
  CHECK(in.get() == EOF);
  CHECK(info.where.line() == line);
  CHECK(std::string(info.where.file_name()) == __FILE__);

  runtime_bridge::ostream out(bridge, [&](asio::const_buffer) { look(); });
  out << 'x' << std::flush;
  CHECK(info.where.line() == line + 5);
}

// ---------------------------------------------------------------------------------------------------------------------
// Writing

TEST_CASE("ostream: what is written arrives in order, when the buffer is full, at a flush and at the end") {
  RuntimeBridge bridge;
  Sink sink;
  {
    runtime_bridge::ostream out(bridge, std::ref(sink), 1h, 8);
    out << "1234567" << '8';
    CHECK(sink.pieces.empty());
    out << '9';
    CHECK(sink.pieces == std::vector<std::string>{"12345678"});
    CHECK(out.flush());
    CHECK(sink.pieces == std::vector<std::string>{"12345678", "9"});
    CHECK(out.flush());
    CHECK(sink.pieces.size() == 2);  // nothing to write
    out << 12 << ' ' << 3.5 << std::endl;
    CHECK(sink.text() == "12345678912 3.5\n");
    out << "rest";
  }
  CHECK(sink.text() == "12345678912 3.5\nrest");
}

TEST_CASE("ostream: every byte, whatever the sizes of the pieces, the buffer and the writes") {
  RuntimeBridge bridge;
  const std::string text = pattern(3000);
  for (const std::size_t most : {1U, 7U, 100U, 3000U}) {
    for (const std::size_t buffer : {0U, 1U, 8U, 100U, 5000U}) {
      for (const std::size_t size : {1U, 8U, 99U, 2000U, 4000U}) {
        CAPTURE(most, buffer, size);
        Sink sink(most);
        {
          runtime_bridge::ostream out(bridge, std::ref(sink), 1h, buffer);
          for (std::size_t at = 0; at < text.size();) {
            const std::string part = text.substr(at, size);
            at += part.size();
            out.write(part.data(), std::ssize(part));
            if (at % 3 == 0 && at < text.size()) out.put(text[at++]);
          }
          CHECK(out.good());
        }
        CHECK((sink.text() == text));
      }
    }
  }
}

TEST_CASE("ostream: a large write is made from its place, after what was buffered") {
  RuntimeBridge bridge;
  const std::string text = pattern(500);
  std::vector<const void*> places;
  std::string written;
  const auto write = [&](asio::const_buffer bytes) {
    places.push_back(bytes.data());
    written += text_of(bytes);
  };
  runtime_bridge::ostream out(bridge, write, 1h, 100);
  out << "ab";
  out.write(text.data(), std::ssize(text));
  CHECK((written == "ab" + text));
  REQUIRE(places.size() == 2);
  CHECK(places[1] == text.data());
  out << "cd" << std::flush;
  CHECK((written == "ab" + text + "cd"));
}

TEST_CASE("ostream: after an error nothing is written any more, and nothing is dropped without an error") {
  RuntimeBridge bridge;
  Sink sink;
  {
    runtime_bridge::ostream out(bridge, std::ref(sink), 1h, 8);
    out << "abc" << std::flush << "def";
    sink.fail = true;
    CHECK(out.good());
    out.flush();
    CHECK(out.rdstate() == std::ios::badbit);
    CHECK(outcome_of(out) == threw("the disk is full"));
    sink.fail = false;
    out.clear();
    CHECK(out.flush().bad());
    out.clear();
    CHECK((out << 'x').bad());
    out.clear();
    CHECK((out << "text").bad());
    out.clear();
    CHECK(out.write("much more text", 14).bad());
    out.clear();
    CHECK((out << 12).bad());
    CHECK(outcome_of(out) == threw("the disk is full"));
    out.clear();
    out.exceptions(std::ios::badbit);
    CHECK_THROWS_WITH(out.flush(), "the disk is full");
    out.clear();
    CHECK_THROWS_WITH(out << "text", "the disk is full");
    out.clear();
    CHECK_THROWS_WITH(out.put('c'), "the disk is full");
    out.clear();
  }
  CHECK(sink.text() == "abc");
}

TEST_CASE("ostream: an error sets badbit, whichever function meets it") {
  RuntimeBridge bridge;
  const auto write = [](asio::const_buffer) { throw Broken("the cable is cut"); };
  const auto check = [&](auto use) {
    runtime_bridge::ostream out(bridge, write, 1h, 2);
    use(out);
    CHECK(out.bad());
    CHECK(outcome_of(out) == threw("the cable is cut"));
    runtime_bridge::ostream throwing(bridge, write, 1h, 2);
    throwing.exceptions(std::ios::badbit);
    CHECK_THROWS_AS(use(throwing), Broken);
    CHECK(throwing.bad());
  };
  check([](std::ostream& out) { out << "text"; });
  check([](std::ostream& out) { out << std::string("text"); });
  check([](std::ostream& out) { out << 'a' << 'b' << 'c'; });
  check([](std::ostream& out) { out << 1234567; });
  check([](std::ostream& out) { out << 1.25; });
  check([](std::ostream& out) { out.write("text", 4); });
  check([](std::ostream& out) { out.put('a').put('b').put('c'); });
  check([](std::ostream& out) { (out << 'a').flush(); });
  check([](std::ostream& out) { out << std::endl; });
  // Nothing leaves the destructor.
  runtime_bridge::ostream(bridge, write) << "text";
}

TEST_CASE("ostream: a write that writes nothing, or too much, is an error and no endless loop") {
  RuntimeBridge bridge;
  runtime_bridge::ostream nothing(bridge, [](asio::const_buffer) { return std::size_t{0}; });
  nothing << "text" << std::flush;
  CHECK(nothing.bad());
  CHECK(outcome_of(nothing) == threw("runtime_bridge: the write of a stream has written nothing"));
  runtime_bridge::ostream much(bridge, [](asio::const_buffer bytes) { return bytes.size() + 1; });
  much << "text" << std::flush;
  CHECK(much.bad());
  runtime_bridge::ostream negative(bridge, [](asio::const_buffer) { return -1; });
  negative << "text" << std::flush;
  CHECK(negative.bad());
}

TEST_CASE("ostream: each write has the deadline, and is cancelled") {
  RuntimeBridge bridge;
  with_deadline([&](auto limit) {
    Pair pair(bridge);
    runtime_bridge::ostream out(bridge, writing(pair.a), limit);
    const std::string text = pattern(1024 * kib);  // more than a socket takes when nobody reads
    out.write(text.data(), std::ssize(text));
    CHECK(out.bad());
    REQUIRE(out.error());
    CHECK(*out.error() == BridgeError::TimedOut);
    if (!out.error()->cause()) return false;
    CHECK(code_of<AsioError>(out.error()->cause()) == asio::error::operation_aborted);
    return true;
  });
}

TEST_CASE("ostream: a lost connection is an error with its cause") {
  RuntimeBridge bridge;
  Pair pair(bridge);
  pair.b.close();
  runtime_bridge::ostream out(bridge, writing(pair.a));
  out << "text" << std::flush;
  CHECK(out.bad());
  CHECK(*out.error() == BridgeError::ResponseLost);
  CHECK(code_of<AsioError>(out.error()->cause()) == asio::error::broken_pipe);
}

// ---------------------------------------------------------------------------------------------------------------------
// The bridge

TEST_CASE("streams: on the bridge's own worker they fail and do not hang") {
  RuntimeBridge bridge;
  Pieces pieces({"abc"});
  Sink sink;
  runtime_bridge::istream in(bridge, std::ref(pieces));
  CHECK(bridge.block_on([&] {
    runtime_bridge::ostream out(bridge, std::ref(sink));
    out << "text" << std::flush;
    return in.get() == EOF && in.bad() && *in.error() == BridgeError::WouldDeadlock && out.bad() &&
           *out.error() == BridgeError::WouldDeadlock;
  }) == true);
  CHECK(pieces.reads == 0);
  CHECK(sink.pieces.empty());
  in.clear();
  CHECK(in.get() == 'a');
}

TEST_CASE("streams: when the bridge is shut down or gone") {
  for (const bool gone : {false, true}) {
    std::optional<RuntimeBridge> bridge(std::in_place);
    Pieces pieces({"abc"});
    Sink sink;
    runtime_bridge::istream in(*bridge, std::ref(pieces), 1h, 2);
    runtime_bridge::ostream out(*bridge, std::ref(sink));
    CHECK(in.get() == 'a');
    out << "text";
    if (gone) {
      bridge.reset();
    } else {
      bridge->shutdown(Shutdown::drain);
    }
    CHECK(in.get() == 'b');
    CHECK(in.get() == EOF);
    CHECK(in.bad());
    CHECK(outcome_of(in) == worker_dead);
    CHECK(out.flush().bad());
    CHECK(outcome_of(out) == worker_dead);
    CHECK(sink.pieces.empty());
  }
}

TEST_CASE("streams: a shutdown ends the reads and writes in flight") {
  for (const bool destroys : {false, true}) {
    std::optional<RuntimeBridge> bridge(std::in_place);
    const auto wait_forever = [](auto) -> awaitable<std::size_t> {
      co_await park();
      co_return 1;
    };
    Outcome read, written;
    jthread reader([&] {
      runtime_bridge::istream in(*bridge, wait_forever);
      in.get();
      read = outcome_of(in);
      read.returned = in.bad();
    });
    jthread writer([&] {
      runtime_bridge::ostream out(*bridge, wait_forever);
      out << "text" << std::flush;
      written = outcome_of(out);
      written.returned = out.bad();
    });
    await_calls(*bridge, 2);
    if (destroys) {
      bridge.reset();
    } else {
      bridge->shutdown(Shutdown::cancel);
    }
    reader.join();
    writer.join();
    CHECK(read == (destroys ? BridgeError::ResponseLost : BridgeError::Cancelled));
    CHECK(read.returned);
    CHECK(written == (destroys ? BridgeError::ResponseLost : BridgeError::Cancelled));
    CHECK(written.returned);
  }
}

TEST_CASE("streams: in a forked child they fail, and what is buffered is not written twice", "[child]") {
  RuntimeBridge bridge;
  Pair pair(bridge);
  {
    runtime_bridge::istream in(bridge, reading(pair.b));
    auto out = std::make_unique<runtime_bridge::ostream<decltype(writing(pair.a))>>(bridge, writing(pair.a));
    *out << "once";
    CHECK(in_child_process([&] {
            if (in.get() != EOF || !in.bad() || *in.error() != BridgeError::WorkerDead) return 1;
            out.reset();
            return 0;
          }) == 0);
    out.reset();
    pair.a.close();
    CHECK(std::string(std::istreambuf_iterator<char>(in), {}) == "once");
  }
}

TEST_CASE("streams: 64 MiB through a socket with bounded memory", "[slow]") {
  RuntimeBridge bridge;
  constexpr std::size_t size = 1024 * kib * 64;
  const std::string block = pattern(65'521);  // does not divide any buffer's size
  for (const bool coroutines : {false, true}) {
    Pair pair(bridge);
    std::size_t largest = 0;
    const auto note = [&](std::size_t asked) { largest = std::max(largest, asked); };
    const auto write_coroutine = [&](asio::const_buffer bytes) -> awaitable<void> {
      note(bytes.size());
      co_await asio::async_write(pair.a, bytes, use_awaitable);
    };
    const auto read_coroutine = [&](asio::mutable_buffer room) -> awaitable<std::size_t> {
      note(room.size());
      const std::size_t read = co_await pair.b.async_read_some(room, use_awaitable);
      co_return read;
    };
    const std::size_t before = allocated;
    most_allocated = before;
    bool written = false;
    jthread writer([&] {
      const auto write_all = [&](auto write) {
        runtime_bridge::ostream out(bridge, write);
        std::size_t left = size;
        // Some of it in small pieces, through the buffer.
        for (int i = 0; i < 100'000; ++i) out.put(block[static_cast<std::size_t>(i) % block.size()]);
        left -= 100'000;
        for (std::size_t at = 100'000 % block.size(); left != 0; at = 0) {
          const std::size_t part = std::min(block.size() - at, left);
          out.write(block.data() + at, static_cast<std::streamsize>(part));
          left -= part;
        }
        written = static_cast<bool>(out.flush());
      };
      coroutines ? write_all(write_coroutine) : write_all(writing(pair.a));
      pair.a.shutdown(Socket::shutdown_send);
    });
    std::size_t received = 0, differences = 0;
    const auto read_all = [&](auto read) {
      runtime_bridge::istream in(bridge, read);
      std::vector<char> room(10'000);
      while (in.read(room.data(), std::ssize(room)) || in.gcount() != 0) {
        for (std::size_t i = 0; i < static_cast<std::size_t>(in.gcount()); ++i) {
          if (room[i] != block[received++ % block.size()]) ++differences;
        }
      }
      CHECK(outcome_of(in) == succeeded);
    };
    coroutines ? read_all(read_coroutine) : read_all(reading(pair.b));
    writer.join();
    CHECK(written);
    CHECK(received == size);
    CHECK(differences == 0);
    CHECK(largest <= 64 * kib);
    CHECK(most_allocated - before < 200 * kib);
  }
}

TEST_CASE("streams: a shutdown at any moment of a transfer", "[race]") {
  std::minstd_rand random(1);
  for (int round = 0; round < 1000; ++round) {
    std::optional<RuntimeBridge> bridge(std::in_place);
    const RuntimeBridge kept = bridge->share();  // so that the sockets may be destroyed
    Pair pair(*bridge);
    std::atomic<int> ready{0}, wrong{0};
    std::atomic<std::size_t> received{0};
    const auto ends_well = [&](const auto& stream) {
      if (!stream.bad() || !stream.error()) ++wrong;
    };
    const auto read = [&](asio::mutable_buffer room) -> awaitable<std::size_t> {
      const std::size_t size = co_await pair.b.async_read_some(room, use_awaitable);
      co_return size;
    };
    std::thread reader([&] {
      runtime_bridge::istream in(kept, read, 1h, 100);
      ++ready;
      int expected = 0;
      for (int c = in.get(); c != EOF; c = in.get()) {
        if (c != expected++ % 251) ++wrong;
        ++received;
      }
      ends_well(in);
    });
    std::thread writer([&] {
      runtime_bridge::ostream out(kept, writing(pair.a), 1h, 100);
      ++ready;
      for (int i = 0; out.put(static_cast<char>(i % 251)); ++i) {
      }
      ends_well(out);
    });
    await_state([&] { return ready == 2; });
    const std::size_t goal = random() % 2000;
    await_state([&] { return received >= goal; });
    switch (round % 3) {
      case 0: bridge->shutdown(Shutdown::cancel); break;
      case 1: bridge->shutdown(Shutdown::drain, 0s); break;
      default: bridge.reset();
    }
    reader.join();
    writer.join();
    REQUIRE(wrong == 0);
  }
}
