// SPDX-License-Identifier: Apache-2.0
//
// Traces and metrics of a bridge's calls, made from `Options::on_call_end` and `RuntimeBridge::stats`: spans as
// OpenTelemetry's JSON encoding has them, one on each line, and Prometheus' text format. With either of their libraries
// at hand, let `Tracer` and `Metrics` call it instead.

#include <runtime_bridge.hpp>

#include <array>
#include <asio/any_io_executor.hpp>
#include <asio/awaitable.hpp>
#include <asio/post.hpp>
#include <asio/steady_timer.hpp>
#include <asio/this_coro.hpp>
#include <asio/use_awaitable.hpp>
#include <atomic>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <exception>
#include <functional>
#include <iomanip>
#include <iostream>
#include <locale>
#include <mutex>
#include <optional>
#include <random>
#include <sstream>
#include <stdexcept>
#include <string>
#include <string_view>
#include <utility>

namespace {

using runtime_bridge::BridgeError;
using runtime_bridge::CallEnd;
using runtime_bridge::RuntimeBridge;
using runtime_bridge::Stats;
using std::chrono::nanoseconds;

/// How a call has ended, for both: a label's value, and a span's error.type.
std::string_view name_of(BridgeError::Kind kind) {
  switch (kind) {
    case BridgeError::WorkerDead: return "worker_dead";
    case BridgeError::ResponseLost: return "response_lost";
    case BridgeError::TimedOut: return "timed_out";
    case BridgeError::Cancelled: return "cancelled";
    case BridgeError::WouldDeadlock: return "would_deadlock";
    case BridgeError::Overloaded: return "overloaded";
  }
  return "unknown";
}

// ---------------------------------------------------------------------------------------------------------------------
// Spans

/// A JSON string. The text is taken for UTF-8.
std::string json(std::string_view text) {
  std::ostringstream out;
  out << '"' << std::hex << std::setfill('0');
  for (const char c : text) {
    if (c == '"' || c == '\\') {
      out << '\\' << c;
    } else if (static_cast<unsigned char>(c) < 0x20) {
      out << "\\u" << std::setw(4) << static_cast<int>(c);
    } else {
      out << c;
    }
  }
  out << '"';
  return out.str();
}

/// A random number of this many times 8 bytes, in hexadecimal digits.
std::string random_id(int words) {
  thread_local std::mt19937_64 random(std::random_device{}());
  std::ostringstream out;
  out << std::hex << std::setfill('0');
  for (int i = 0; i < words; ++i) out << std::setw(16) << random();
  return out.str();
}

/// What of a span its children need.
struct SpanContext {
  std::string trace_id, span_id;
};

class Tracer {
 public:
  using Clock = std::chrono::system_clock;

  /// `write` gets a line for each span that has ended, from any thread, one at a time.
  explicit Tracer(std::function<void(const std::string& line)> write) : write_(std::move(write)) {}

  /// A span of the program's own. Until it is destroyed, spans that begin on its thread are its children.
  class Span {
   public:
    Span(Tracer& tracer, std::string name)
        : tracer_(tracer), name_(std::move(name)), parent_(current), context_(child_of(parent_)) {
      current = &context_;
    }
    Span(const Span&) = delete;
    Span& operator=(const Span&) = delete;
    ~Span() {
      current = parent_;
      try {
        tracer_.write(context_, parent_, name_, start_, Clock::now(), "[]", "{}");
      } catch (...) {  // a trace is not worth an error
      }
    }

   private:
    Tracer& tracer_;
    std::string name_;
    const SpanContext* parent_;
    SpanContext context_;
    Clock::time_point start_ = Clock::now();
  };

  /// For `Options::on_call_end`, which runs on the thread that called `block_on`: its current span is the parent. A
  /// submitted call ends on the worker, and so has none.
  void record(const CallEnd& call) {
    const Clock::time_point end = Clock::now();
    const Clock::time_point start = end - std::chrono::duration_cast<Clock::duration>(call.queued + call.ran);

    const std::string_view path = call.where.file_name();
    const std::string line = std::to_string(call.where.line());
    std::string name(call.name);
    if (name.empty()) name = std::string(path.substr(path.rfind('/') + 1)) + ':' + line;  // npos + 1 is 0

    std::string attributes = R"([{"key":"code.file.path","value":{"stringValue":)" + json(path) +
                             R"(}},{"key":"code.line.number","value":{"intValue":")" + line +
                             R"("}},{"key":"runtime_bridge.queued_ns","value":{"intValue":")" +
                             std::to_string(std::chrono::duration_cast<nanoseconds>(call.queued).count()) + "\"}}";
    std::string status = "{}";  // not set, which is what OpenTelemetry wants of a library that has seen no error
    if (call.error) {
      attributes += R"(,{"key":"error.type","value":{"stringValue":)" + json(name_of(*call.error)) + "}}";
      status = R"({"code":2})";
    }
    write(child_of(current), current, name, start, end, attributes + ']', status);
  }

 private:
  static SpanContext child_of(const SpanContext* parent) {
    return {parent ? parent->trace_id : random_id(2), random_id(1)};
  }

  void write(const SpanContext& span, const SpanContext* parent, std::string_view name, Clock::time_point start,
             Clock::time_point end, std::string_view attributes, std::string_view status) {
    const auto unix_nanoseconds = [](Clock::time_point time) {
      return std::to_string(std::chrono::duration_cast<nanoseconds>(time.time_since_epoch()).count());
    };
    std::ostringstream line;
    line << R"({"traceId":")" << span.trace_id << R"(","spanId":")" << span.span_id << '"';
    if (parent) line << R"(,"parentSpanId":")" << parent->span_id << '"';
    line << R"(,"name":)" << json(name) << R"(,"kind":1,"startTimeUnixNano":")" << unix_nanoseconds(start)
         << R"(","endTimeUnixNano":")" << unix_nanoseconds(end) << R"(","attributes":)" << attributes << R"(,"status":)"
         << status << '}';
    const std::lock_guard lock(mutex_);
    write_(line.str());
  }

  inline static thread_local const SpanContext* current = nullptr;

  std::mutex mutex_;
  std::function<void(const std::string&)> write_;
};

// ---------------------------------------------------------------------------------------------------------------------
// Metrics

/// A label's value, in quotes. The text is taken for UTF-8.
std::string label(std::string_view text) {
  std::string out = "\"";
  for (const char c : text) {
    if (c == '\n') {
      out += "\\n";
    } else {
      if (c == '"' || c == '\\') out += '\\';
      out += c;
    }
  }
  return out + '"';
}

std::string seconds(nanoseconds time) {
  std::ostringstream out;
  out.imbue(std::locale::classic());
  out << time.count() / 1'000'000'000 << '.' << std::setw(9) << std::setfill('0') << time.count() % 1'000'000'000;
  std::string text = out.str();
  text.erase(text.find_last_not_of('0') + 1);
  if (text.back() == '.') text.pop_back();
  return text;
}

void write_head(std::ostream& out, std::string_view name, std::string_view type, std::string_view help) {
  out << "# HELP " << name << ' ' << help << "\n# TYPE " << name << ' ' << type << '\n';
}

/// Counts durations. Any number of threads may record while another one writes.
class Histogram {
 public:
  static constexpr std::array<nanoseconds, 5> bounds{std::chrono::microseconds(100), std::chrono::milliseconds(1),
                                                     std::chrono::milliseconds(10), std::chrono::milliseconds(100),
                                                     std::chrono::seconds(1)};

  void record(nanoseconds time) {
    std::size_t bucket = 0;
    while (bucket < bounds.size() && time > bounds.at(bucket)) ++bucket;
    counts_.at(bucket).fetch_add(1, std::memory_order_relaxed);
    sum_.fetch_add(time.count(), std::memory_order_relaxed);
  }

  /// `labels` without braces.
  void write(std::ostream& out, std::string_view name, const std::string& labels) const {
    std::uint64_t total = 0;  // each bucket also counts what is in those before it
    for (std::size_t i = 0; i < counts_.size(); ++i) {
      total += counts_.at(i).load(std::memory_order_relaxed);
      out << name << "_bucket{" << labels << ",le=\"" << (i < bounds.size() ? seconds(bounds.at(i)) : "+Inf") << "\"} "
          << total << '\n';
    }
    out << name << "_sum{" << labels << "} " << seconds(nanoseconds(sum_.load(std::memory_order_relaxed))) << '\n'
        << name << "_count{" << labels << "} " << total << '\n';
  }

 private:
  std::array<std::atomic<std::uint64_t>, bounds.size() + 1> counts_{};  // the last one is for what is above all bounds
  std::atomic<nanoseconds::rep> sum_{0};
};

class Metrics {
 public:
  /// For `Options::on_call_end`.
  void record(const CallEnd& call) {
    duration_.record(std::chrono::duration_cast<nanoseconds>(call.queued + call.ran));
    queued_.record(std::chrono::duration_cast<nanoseconds>(call.queued));
  }

  /// What an HTTP server would answer to a scrape, with the content type "text/plain; version=0.0.4".
  ///
  /// Calls have labels for what is known in advance only: each name, or line, of a call would be a time series. With
  /// several bridges, write each head once, and below it the lines of all.
  void write(std::ostream& out, std::string_view bridge, const Stats& stats) const {
    const std::string labels = "bridge=" + label(bridge);
    const std::array<std::pair<std::string_view, std::uint64_t>, 7> outcomes{
        {{"value", stats.values},
         {name_of(BridgeError::WorkerDead), stats.worker_dead},
         {name_of(BridgeError::ResponseLost), stats.response_lost},
         {name_of(BridgeError::TimedOut), stats.timed_out},
         {name_of(BridgeError::Cancelled), stats.cancelled},
         {name_of(BridgeError::WouldDeadlock), stats.would_deadlock},
         {name_of(BridgeError::Overloaded), stats.overloaded}}};
    write_head(out, "runtime_bridge_calls_total", "counter", "Calls that have ended or were refused.");
    for (const auto& [outcome, count] : outcomes) {
      out << "runtime_bridge_calls_total{" << labels << ",outcome=" << label(outcome) << "} " << count << '\n';
    }
    write_head(out, "runtime_bridge_calls_in_flight", "gauge", "Calls that have not ended.");
    out << "runtime_bridge_calls_in_flight{" << labels << "} " << stats.in_flight << '\n';
    write_head(out, "runtime_bridge_calls_in_flight_max", "gauge", "Most calls in flight at the same time.");
    out << "runtime_bridge_calls_in_flight_max{" << labels << "} " << stats.most_in_flight << '\n';
    write_head(out, "runtime_bridge_call_duration_seconds", "histogram", "From a call to its end.");
    duration_.write(out, "runtime_bridge_call_duration_seconds", labels);
    write_head(out, "runtime_bridge_call_queued_seconds", "histogram",
               "From a call to the start of its task. Long if the worker is busy.");
    queued_.write(out, "runtime_bridge_call_queued_seconds", labels);
  }

 private:
  Histogram duration_, queued_;
};

// ---------------------------------------------------------------------------------------------------------------------
// The program

asio::awaitable<void> pause_for(std::chrono::milliseconds time) {
  asio::steady_timer timer(co_await asio::this_coro::executor, time);
  co_await timer.async_wait(asio::use_awaitable);
}

asio::awaitable<std::string> user(int id) {
  co_await pause_for(std::chrono::milliseconds(2));
  if (id != 42) throw std::out_of_range("no such user");
  co_return "Ada";
}

void run() {
  Tracer tracer([](const std::string& line) { std::cout << line << '\n'; });
  Metrics metrics;
  runtime_bridge::Options options;
  options.thread_name = "users";
  options.on_call_end = [&](const CallEnd& call) {
    metrics.record(call);
    tracer.record(call);
  };
  const RuntimeBridge bridge(options);  // declared last: its calls use the others until they end

  {
    const Tracer::Span request(tracer, "GET /users/42");
    (void)bridge.block_on([] { return user(42); });
    (void)bridge.block_on(runtime_bridge::named("count users", [] { return 1; }));
  }
  {
    const Tracer::Span request(tracer, "GET /users/43");
    (void)bridge.block_on([] { return user(43); });
  }
  {
    const Tracer::Span request(tracer, "GET /report");
    (void)bridge.block_on_for([] { return pause_for(std::chrono::hours(1)); }, std::chrono::milliseconds(20));
  }
  const auto background =
      bridge.submit(runtime_bridge::named("refresh", [] { return pause_for(std::chrono::hours(1)); }));
  std::cout << '\n';
  metrics.write(std::cout, options.thread_name, bridge.stats());
  std::cout << '\n';
}  // cancels the refresh

}  // namespace

int main(int argc, char** argv) {
  try {
    if (argc > 1) {
      const bool help = std::string_view(argv[1]) == "--help";
      if (!help) std::cerr << "metrics: unknown option " << argv[1] << '\n';
      (help ? std::cout : std::cerr) << "usage: metrics\nPrints the spans of some calls, and the metrics of all.\n";
      return help ? 0 : 2;
    }
    run();
    return 0;
  } catch (const std::exception& e) {
    std::cerr << "metrics: " << e.what() << '\n';
    return 1;
  }
}
