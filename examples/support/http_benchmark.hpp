// SPDX-License-Identifier: Apache-2.0
//
// Compares curl.hpp, called through the bridge, with the simplest blocking client: one libcurl handle for each thread,
// used again for each request. The server answers anybody, such as that of examples/serve nginx.

#ifndef RUNTIME_BRIDGE_EXAMPLES_HTTP_BENCHMARK_HPP
#define RUNTIME_BRIDGE_EXAMPLES_HTTP_BENCHMARK_HPP

#include <runtime_bridge.hpp>
#include <runtime_bridge/hosted.hpp>

#include <curl/curl.h>

#include <algorithm>
#include <chrono>
#include <cstddef>
#include <iomanip>
#include <iostream>
#include <map>
#include <memory>
#include <stdexcept>
#include <string>
#include <string_view>
#include <thread>
#include <tuple>
#include <utility>
#include <vector>

#include "support/curl.hpp"
#include "support/program.hpp"

namespace http_benchmark {

constexpr std::size_t size = 4096;

/// One thread's client.
class Blocking {
 public:
  Blocking(bool put, const std::string& url, std::string_view body) {
    if (!easy_) throw std::bad_alloc();
    CURL* easy = easy_.get();
    curl::set(easy, CURLOPT_URL, url.c_str());
    curl::set(easy, CURLOPT_PROXY, "");
    curl::set(easy, CURLOPT_NOSIGNAL, 1L);
    curl::set(easy, CURLOPT_WRITEFUNCTION, &Blocking::on_write);
    curl::set(easy, CURLOPT_WRITEDATA, static_cast<void*>(&received_));
    if (!put) return;
    curl::set(easy, CURLOPT_POST, 1L);
    curl::set(easy, CURLOPT_POSTFIELDS, body.data());
    curl::set(easy, CURLOPT_POSTFIELDSIZE, static_cast<long>(body.size()));
    curl::set(easy, CURLOPT_CUSTOMREQUEST, "PUT");
  }

  std::size_t operator()() {
    received_.clear();
    check(curl_easy_perform(easy_.get()) == CURLE_OK, "a blocking request has failed");
    return received_.size();
  }

 private:
  static std::size_t on_write(const char* data, std::size_t /*one*/, std::size_t count, void* received) noexcept {
    static_cast<std::string*>(received)->append(data, count);
    return count;
  }

  curl::detail::Easy easy_{curl_easy_init()};
  std::string received_;
};

inline void run(const std::string& endpoint, int rounds) {
  const std::string url = endpoint + "/benchmark/object";
  const std::string body(size, 'x');
  const runtime_bridge::RuntimeBridge bridge;
  const runtime_bridge::Hosted<curl::Client> client(bridge);

  const auto request_for = [&](bool put) {
    curl::Request request(put ? "PUT" : "GET", url);
    if (put) {
      request.body_size = body.size();
      request.open_body = [&] { return curl::from_memory(body); };
    }
    return request;
  };
  const auto bridged = [&](bool put) {
    const auto fetch = [&](const curl::Client& http) { return http.fetch(request_for(put)); };
    const curl::Response response = runtime_bridge::unwrap(client.call(fetch));
    check(response.status / 100 == 2, "status " + std::to_string(response.status) + " for " + url);
    return response.body.size();
  };
  // The time for each call, when this many threads make calls.
  const auto measure = [&](bool put, bool blocking, int callers) {
    const int calls = (put ? 400 : 1600) / callers;
    std::chrono::steady_clock::time_point start, end;
    std::vector<std::unique_ptr<Blocking>> handles;
    for (int i = 0; i < callers; ++i) handles.push_back(std::make_unique<Blocking>(put, url, body));
    const auto call = [&](int caller) {
      const std::size_t received = blocking ? (*handles[static_cast<std::size_t>(caller)])() : bridged(put);
      check(received == (put ? 0 : size), "an answer has the wrong size");
    };
    from_threads(callers, [&](int caller) {
      for (int i = 0; i < 20; ++i) call(caller);  // connect
    });
    start = std::chrono::steady_clock::now();
    from_threads(callers, [&](int caller) {
      for (int i = 0; i < calls; ++i) call(caller);
    });
    end = std::chrono::steady_clock::now();
    return std::chrono::duration<double, std::micro>(end - start).count() / (calls * callers);
  };

  std::map<std::tuple<bool, int, bool, bool>, std::vector<double>> times;
  bridged(true);  // creates the object
  for (int round = 0; round < rounds; ++round) {
    for (const bool awake : {false, true}) {
      const auto keep = awake ? std::make_unique<SpinningThreads>() : nullptr;
      for (const bool put : {false, true}) {
        for (const int callers : {1, 8}) {
          for (const bool blocking : {round % 2 == 0, round % 2 != 0}) {
            times[{put, callers, awake, blocking}].push_back(measure(put, blocking, callers));
          }
        }
      }
    }
  }
  std::cout << "4 KiB over loopback; medians of " << rounds << " rounds, in us for each call; "
            << std::thread::hardware_concurrency() << " processors\n"
            << "               processors may sleep          processors kept awake\n"
            << "               bridge  blocking  ratio       bridge  blocking  ratio\n"
            << std::fixed;
  for (const bool put : {false, true}) {
    for (const int callers : {1, 8}) {
      std::cout << (put ? "PUT" : "GET") << ", " << callers << (callers == 1 ? " caller " : " callers");
      for (const bool awake : {false, true}) {
        const double ours = median(times[{put, callers, awake, false}]);
        const double theirs = median(times[{put, callers, awake, true}]);
        std::cout << (awake ? "      " : " ") << std::setprecision(1) << std::setw(7) << ours << std::setw(10) << theirs
                  << std::setprecision(2) << std::setw(7) << ours / theirs;
      }
      std::cout << '\n';
    }
  }
}

}  // namespace http_benchmark

#endif  // RUNTIME_BRIDGE_EXAMPLES_HTTP_BENCHMARK_HPP
