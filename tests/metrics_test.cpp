// SPDX-License-Identifier: Apache-2.0
//
// The formats of examples/metrics.cpp. tests/examples/metrics.cmake reads what the program prints.

// NOLINTBEGIN(bugprone-suspicious-include,readability-identifier-naming): the program is one file, with a main().
#define main metrics_main
#include "metrics.cpp"
#undef main
// NOLINTEND(bugprone-suspicious-include,readability-identifier-naming)

#include <algorithm>
#include <array>
#include <map>
#include <regex>
#include <string>
#include <vector>

#include "support.hpp"

namespace {

/// The value of each sample in a text of Prometheus' format, by its name and labels. Checks the grammar: each line is a
/// comment or a sample, and the samples of a family follow its HELP and TYPE.
std::map<std::string, double> samples_of(const std::string& text) {
  static const std::regex help(R"(# HELP ([a-zA-Z_:][a-zA-Z0-9_:]*) (?:[^\\]|\\\\|\\n)*)");
  static const std::regex type(R"(# TYPE ([a-zA-Z_:][a-zA-Z0-9_:]*) (counter|gauge|histogram))");
  static const std::regex sample(R"(([a-zA-Z_:][a-zA-Z0-9_:]*)(\{[a-zA-Z_][a-zA-Z0-9_]*="(?:[^"\\]|\\[\\"n])*")"
                                 R"((?:,[a-zA-Z_][a-zA-Z0-9_]*="(?:[^"\\]|\\[\\"n])*")*\})? ([0-9]+(?:\.[0-9]+)?))");
  std::map<std::string, double> samples;
  std::string family;
  std::istringstream lines(text);
  for (std::string line; std::getline(lines, line);) {
    INFO(line);
    std::smatch match;
    if (std::regex_match(line, match, help)) {
      family = match[1];
    } else if (std::regex_match(line, match, type)) {
      CHECK(match[1] == family);
    } else {
      REQUIRE(std::regex_match(line, match, sample));
      const std::string name = match[1];
      CHECK((name == family || name == family + "_bucket" || name == family + "_sum" || name == family + "_count"));
      CHECK(samples.emplace(name + match[2].str(), std::stod(match[3])).second);
    }
  }
  CHECK(text.ends_with('\n'));
  return samples;
}

std::string text_of(const Metrics& metrics, const std::string& bridge, const Stats& stats) {
  std::ostringstream out;
  metrics.write(out, bridge, stats);
  return out.str();
}

CallEnd call_of(nanoseconds queued, nanoseconds ran) {
  CallEnd call{runtime_bridge::SourceLocation::current()};
  call.queued = queued;
  call.ran = ran;
  return call;
}

/// The value of a string in a span, which no other key's text contains.
std::string field(const std::string& span, const std::string& key) {
  std::smatch match;
  return std::regex_search(span, match, std::regex("\"" + key + "\":\"([^\"]*)\"")) ? match[1].str() : "none";
}

}  // namespace

TEST_CASE("metrics: buckets are cumulative, and a bound belongs to its bucket") {
  Metrics metrics;
  metrics.record(call_of(0ns, 100us));
  metrics.record(call_of(1ns, 100us));
  metrics.record(call_of(10ms, 90ms));
  metrics.record(call_of(0ns, 7s));
  const auto samples = samples_of(text_of(metrics, "b", {}));
  const std::string name = "runtime_bridge_call_duration_seconds";
  std::vector<double> counts;
  for (const char* bound : {"0.0001", "0.001", "0.01", "0.1", "1", "+Inf"}) {
    counts.push_back(samples.at(name + R"(_bucket{bridge="b",le=")" + bound + "\"}"));
  }
  CHECK(counts == std::vector<double>{1, 2, 2, 3, 3, 4});
  CHECK(samples.at(name + R"(_count{bridge="b"})") == 4);
  CHECK(samples.at(name + R"(_sum{bridge="b"})") == 7.100200001);
  CHECK(samples.at(R"(runtime_bridge_call_queued_seconds_bucket{bridge="b",le="0.0001"})") == 3);
  CHECK(samples.at(R"(runtime_bridge_call_queued_seconds_sum{bridge="b"})") == 0.010000001);
}

TEST_CASE("metrics: calls are counted by outcome") {
  Stats stats;
  stats.values = 1;
  stats.worker_dead = 2;
  stats.response_lost = 3;
  stats.timed_out = 4;
  stats.cancelled = 5;
  stats.would_deadlock = 6;
  stats.overloaded = std::uint64_t{1} << 60;
  stats.in_flight = 8;
  stats.most_in_flight = 9;
  const std::string text = text_of(Metrics(), "b", stats);
  const auto samples = samples_of(text);
  const auto calls = [&](const std::string& outcome) {
    return samples.at(R"(runtime_bridge_calls_total{bridge="b",outcome=")" + outcome + "\"}");
  };
  CHECK(calls("value") == 1);
  CHECK(calls("worker_dead") == 2);
  CHECK(calls("response_lost") == 3);
  CHECK(calls("timed_out") == 4);
  CHECK(calls("cancelled") == 5);
  CHECK(calls("would_deadlock") == 6);
  CHECK(text.find(R"(outcome="overloaded"} 1152921504606846976)") != std::string::npos);
  CHECK(samples.at(R"(runtime_bridge_calls_in_flight{bridge="b"})") == 8);
  CHECK(samples.at(R"(runtime_bridge_calls_in_flight_max{bridge="b"})") == 9);
}

TEST_CASE("metrics: labels and JSON strings are escaped") {
  CHECK(label("a\\b \"c\"\n{d}") == R"("a\\b \"c\"\n{d}")");
  CHECK(json("a\\b \"c\"\n\x1f\t\xc3\xa4") == "\"a\\\\b \\\"c\\\"\\u000a\\u001f\\u0009\xc3\xa4\"");
  (void)samples_of(text_of(Metrics(), "a\\b \"c\"\n{d}", {}));
}

TEST_CASE("metrics: seconds are written without a rounding error") {
  CHECK(seconds(0ns) == "0");
  CHECK(seconds(1ns) == "0.000000001");
  CHECK(seconds(1s) == "1");
  CHECK(seconds(10s) == "10");
  CHECK(seconds(123456789012340ns) == "123456.78901234");
}

TEST_CASE("metrics: each call of the caller's span is its child, whatever thread and outcome") {
  std::vector<std::string> spans;
  Tracer tracer([&](const std::string& line) { spans.push_back(line); });
  Options options;
  options.on_call_end = [&](const CallEnd& call) { tracer.record(call); };
  RuntimeBridge bridge(options);
  std::array<std::future<bool>, 4> callers;
  for (auto& caller : callers) {
    caller = std::async(std::launch::async, [&] {
      bool all = true;
      for (int i = 0; i < 50; ++i) {
        const Tracer::Span outer(tracer, "outer");
        const Tracer::Span inner(tracer, "inner");
        all = !bridge.block_on_for([] { return park(); }, 0ns) && bridge.block_on([] {}) && all;
      }
      return all;
    });
  }
  for (auto& caller : callers) CHECK(caller.get());
  REQUIRE(spans.size() == 4 * 50 * 4);

  std::map<std::string, std::string> names, traces, parents;
  for (const std::string& span : spans) {
    const std::string id = field(span, "spanId");
    CHECK(names.emplace(id, field(span, "name")).second);
    traces[id] = field(span, "traceId");
    parents[id] = field(span, "parentSpanId");
  }
  std::map<std::string, int> children;
  for (const auto& [id, parent] : parents) {
    if (names.at(id) == "outer") {
      CHECK(parent == "none");
      continue;
    }
    CHECK(traces.at(id) == traces.at(parent));
    CHECK(names.at(parent) == (names.at(id) == "inner" ? "outer" : "inner"));
    ++children[parent];
  }
  CHECK(std::ranges::all_of(
      children, [&](const auto& child) { return child.second == (names.at(child.first) == "outer" ? 1 : 2); }));
}

TEST_CASE("metrics: a submitted call begins a trace, and its span lasts as long as the call") {
  std::vector<std::string> spans;
  Tracer tracer([&](const std::string& line) { spans.push_back(line); });
  Options options;
  options.on_call_end = [&](const CallEnd& call) { tracer.record(call); };
  RuntimeBridge bridge(options);
  {
    const Tracer::Span span(tracer, "span");
    unwrap(bridge.submit(runtime_bridge::named("in \"the\" background", [] { return pause_for(20ms); })).join());
  }
  REQUIRE(spans.size() == 2);
  CHECK(field(spans[0], "parentSpanId") == "none");
  CHECK(field(spans[0], "traceId").size() == 32);
  CHECK(field(spans[0], "spanId").size() == 16);
  CHECK(field(spans[0], "traceId") != field(spans[1], "traceId"));
  CHECK(spans[0].find(R"("name":"in \"the\" background")") != std::string::npos);
  const auto nanoseconds_of = [&](const char* key) { return std::stoll(field(spans[0], key)); };
  CHECK(nanoseconds_of("endTimeUnixNano") - nanoseconds_of("startTimeUnixNano") >= 20'000'000);
}
