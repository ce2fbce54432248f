// SPDX-License-Identifier: Apache-2.0
//
// An asynchronous client for one bucket of Amazon S3 or a compatible server, built on curl.hpp. libcurl signs the
// requests (AWS Signature Version 4), and OpenSSL computes the hashes.

#ifndef RUNTIME_BRIDGE_EXAMPLES_S3_HPP
#define RUNTIME_BRIDGE_EXAMPLES_S3_HPP

#include <openssl/evp.h>

#include <array>
#include <asio/awaitable.hpp>
#include <asio/post.hpp>
#include <asio/use_awaitable.hpp>
#include <charconv>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <new>
#include <stdexcept>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "curl.hpp"

namespace s3 {

struct Settings {
  std::string endpoint;  ///< such as https://s3.eu-central-1.amazonaws.com, without a path
  std::string region;
  std::string bucket;
  std::string key_id, secret;
  std::string session_token = {};  ///< for temporary credentials
  int page_size = 1000;            ///< how many keys a list request asks for
};

/// The server sent an error status. (If it sent no response, that is a curl::Error.)
class Error : public std::runtime_error {
 public:
  Error(long status, const std::string& text) : std::runtime_error(text), status_(status) {}
  [[nodiscard]] long status() const noexcept { return status_; }

 private:
  long status_;
};

/// Content to upload, which may be too large for memory. It may be read more than once, because requests are retried.
struct Content {
  Content(std::uint64_t the_size, std::function<curl::Source()> the_open) : size(the_size), open(std::move(the_open)) {}

  std::uint64_t size;
  std::function<curl::Source()> open;
};

/// Computes a SHA-256.
class Sha256 {
 public:
  Sha256() {
    if (!context_ || EVP_DigestInit_ex(context_.get(), EVP_sha256(), nullptr) != 1) throw std::bad_alloc();
  }

  void update(std::string_view bytes) {
    if (EVP_DigestUpdate(context_.get(), bytes.data(), bytes.size()) != 1) throw std::bad_alloc();
  }

  /// Returns the hash in lower-case hexadecimal. Call it only once.
  [[nodiscard]] std::string finish() {
    std::array<unsigned char, 32> digest{};
    if (EVP_DigestFinal_ex(context_.get(), digest.data(), nullptr) != 1) throw std::bad_alloc();
    std::string text;
    for (const unsigned char byte : digest) {
      text += "0123456789abcdef"[byte / 16];
      text += "0123456789abcdef"[byte % 16];
    }
    return text;
  }

  [[nodiscard]] static std::string of(std::string_view bytes) {
    Sha256 hash;
    hash.update(bytes);
    return hash.finish();
  }

 private:
  struct Free {
    void operator()(EVP_MD_CTX* context) const noexcept { EVP_MD_CTX_free(context); }
  };
  std::unique_ptr<EVP_MD_CTX, Free> context_{EVP_MD_CTX_new()};
};

/// Returns the SHA-256 of everything that the source gives.
inline asio::awaitable<std::string> hash_of(curl::Source source) {
  Sha256 hash;
  std::vector<char> room(64 * std::size_t{1024});
  while (const std::size_t size = co_await source(room)) {
    hash.update({room.data(), size});
    co_await asio::post(asio::use_awaitable);  // let other work on this thread run
  }
  co_return hash.finish();
}

/// Returns a sink that adds to the hash what passes through it. The hash must outlive it.
inline curl::Sink hashing(Sha256& hash, curl::Sink sink) {
  if (!sink) return sink;
  return [&hash, sink = std::move(sink)](std::string_view piece) {
    hash.update(piece);
    return sink(piece);
  };
}

/// Percent-encodes the text by AWS's rules, which are stricter than those for URLs.
[[nodiscard]] inline std::string encode(std::string_view text, std::string_view kept = "") {
  const std::string_view unreserved = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-._~";
  std::string encoded;
  for (const char c : text) {
    if (unreserved.find(c) != unreserved.npos || kept.find(c) != kept.npos) {
      encoded += c;
    } else {
      const auto byte = static_cast<unsigned char>(c);
      encoded += '%';
      encoded += "0123456789ABCDEF"[byte / 16];
      encoded += "0123456789ABCDEF"[byte % 16];
    }
  }
  return encoded;
}

/// Returns a request for an object, or for the bucket itself if the key is empty. URLs are path-style, which every
/// server understands.
///
/// `body_hash` is the SHA-256 of the body. The server compares it with the body that it receives.
[[nodiscard]] inline curl::Request request(const Settings& settings, std::string method, std::string_view key,
                                           const std::map<std::string, std::string>& query = {},
                                           std::string body_hash = Sha256::of({})) {
  std::string url = settings.endpoint + '/' + encode(settings.bucket);
  if (!key.empty()) url += '/' + encode(key, "/");
  // The signature is made from the sorted query, in which each name has a "=". libcurl before 8.3 does not sort it.
  std::map<std::string, std::string> sorted;
  for (const auto& [name, value] : query) sorted[encode(name)] = encode(value);
  for (char separator = '?'; const auto& [name, value] : sorted) {
    url.append(1, separator).append(name).append(1, '=').append(value);
    separator = '&';
  }

  curl::Request request(std::move(method), std::move(url));
  // libcurl also signs the headers that are set here. Set the hash, because libcurl does not know that of a streamed
  // body, and S3 requires it as a header.
  request.headers.push_back("x-amz-content-sha256: " + std::move(body_hash));
  if (!settings.session_token.empty()) request.headers.push_back("x-amz-security-token: " + settings.session_token);
  request.configure = [provider = "aws:amz:" + settings.region + ":s3", id = settings.key_id,
                       secret = settings.secret](CURL* easy) {
    curl::set(easy, CURLOPT_AWS_SIGV4, provider.c_str());
    curl::set(easy, CURLOPT_USERNAME, id.c_str());
    curl::set(easy, CURLOPT_PASSWORD, secret.c_str());
  };
  return request;
}

/// Returns the raw text of the first element with this name, or nothing if there is none. Advances `xml` past it.
[[nodiscard]] inline std::string_view next_element(std::string_view& xml, std::string_view name) {
  const std::string open = '<' + std::string(name) + '>';
  const std::string close = "</" + std::string(name) + '>';
  const std::size_t start = xml.find(open);
  const std::size_t end = start == xml.npos ? xml.npos : xml.find(close, start);
  const std::string_view text =
      end == xml.npos ? std::string_view() : xml.substr(start + open.size(), end - start - open.size());
  xml = end == xml.npos ? std::string_view() : xml.substr(end + close.size());
  return text;
}

inline void append_utf8(std::string& text, std::uint32_t code) {
  const auto add = [&](std::uint32_t byte) { text += static_cast<char>(byte); };
  const auto add_rest = [&](unsigned shift) { add(0x80U | ((code >> shift) & 0x3FU)); };
  if (code < 0x80) return add(code);
  if (code < 0x800) {
    add(0xC0U | (code >> 6U));
  } else {
    if (code < 0x10000) {
      add(0xE0U | (code >> 12U));
    } else {
      add(0xF0U | (code >> 18U));
      add_rest(12);
    }
    add_rest(6);
  }
  add_rest(0);
}

/// Replaces XML's character and entity references.
[[nodiscard]] inline std::string unescape(std::string_view xml) {
  static const std::map<std::string_view, char> entities = {
      {"amp", '&'}, {"lt", '<'}, {"gt", '>'}, {"quot", '"'}, {"apos", '\''}};
  std::string text;
  while (!xml.empty()) {
    const std::size_t end = xml.front() == '&' ? xml.find(';') : xml.npos;
    const std::string_view name = end == xml.npos ? std::string_view() : xml.substr(1, end - 1);
    if (const auto entity = entities.find(name); entity != entities.end()) {
      text += entity->second;
    } else if (name.starts_with('#')) {
      const std::size_t prefix = name.starts_with("#x") ? 2 : 1;
      std::uint32_t code = 0;
      std::from_chars(name.data() + prefix, name.data() + name.size(), code, prefix == 2 ? 16 : 10);
      append_utf8(text, code);
    } else {
      text += xml.front();
      xml.remove_prefix(1);
      continue;
    }
    xml.remove_prefix(end + 1);
  }
  return text;
}

/// One response to ListObjectsV2.
struct Page {
  std::vector<std::string> keys;
  std::string next;  ///< the continuation-token for the next page; empty if this is the last one
};

[[nodiscard]] inline Page read_page(std::string_view xml) {
  Page page;
  std::string_view token = xml;
  page.next = unescape(next_element(token, "NextContinuationToken"));
  for (std::string_view contents = next_element(xml, "Contents"); !contents.empty();
       contents = next_element(xml, "Contents")) {
    page.keys.push_back(unescape(next_element(contents, "Key")));
  }
  return page;
}

/// A bucket and its objects. The functions throw s3::Error if the server sends an error status, and curl::Error if
/// there is no response. The bucket must outlive their coroutines.
class Bucket {
 public:
  Bucket(curl::Client client, Settings settings) : client_(std::move(client)), settings_(std::move(settings)) {}

  /// Creates the bucket if it does not exist.
  asio::awaitable<void> create() {
    if (co_await exists({})) co_return;
    // Without a location, AWS uses us-east-1; it rejects us-east-1 as an explicit location.
    std::string place;
    if (settings_.region != "us-east-1") {
      place = "<CreateBucketConfiguration><LocationConstraint>" + settings_.region +
              "</LocationConstraint></CreateBucketConfiguration>";
    }
    Content content(place.size(), [&] { return curl::from_memory(place); });
    co_await put({}, std::move(content), Sha256::of(place));
  }

  /// `hash` must be the SHA-256 of the content, or the server rejects the request.
  asio::awaitable<void> put(std::string key, Content content, std::string hash) {
    curl::Request request = s3::request(settings_, "PUT", key, {}, std::move(hash));
    request.body_size = content.size;
    request.open_body = std::move(content.open);
    co_await answer(std::move(request));
  }

  /// Returns the content, however long it is.
  asio::awaitable<std::string> get(std::string key) {
    std::string content;
    const auto append = [&](std::string_view piece) -> asio::awaitable<void> {
      content += piece;
      co_return;
    };
    curl::Request request = s3::request(settings_, "GET", key);
    request.open_sink = [&] {
      content.clear();  // each attempt starts from the beginning
      return append;
    };
    co_await answer(std::move(request));
    co_return content;
  }

  /// Writes the content to the sink and returns its SHA-256.
  asio::awaitable<std::string> get(std::string key, std::function<curl::Sink()> open_sink) {
    Sha256 hash;
    curl::Request request = s3::request(settings_, "GET", key);
    request.open_sink = [&] {
      hash = {};  // each attempt starts from the beginning
      return hashing(hash, open_sink());
    };
    co_await answer(std::move(request));
    co_return hash.finish();
  }

  asio::awaitable<bool> exists(std::string key) {
    const curl::Response response = co_await client_.fetch(request(settings_, "HEAD", key));
    if (response.status != 404) check(response);
    co_return response.status != 404;
  }

  /// Removes an object. It is not an error if the object does not exist.
  asio::awaitable<void> remove(std::string key) { co_await answer(request(settings_, "DELETE", key)); }

  /// Returns all keys that start with the prefix.
  asio::awaitable<std::vector<std::string>> list(std::string prefix) {
    std::vector<std::string> keys;
    std::map<std::string, std::string> query = {
        {"list-type", "2"}, {"max-keys", std::to_string(settings_.page_size)}, {"prefix", prefix}};
    do {
      const std::string xml = co_await answer(request(settings_, "GET", "", query));
      Page page = read_page(xml);
      keys.insert(keys.end(), page.keys.begin(), page.keys.end());
      query["continuation-token"] = page.next;
    } while (!query["continuation-token"].empty());
    co_return keys;
  }

  /// Aborts all requests and closes the connections. Call it on the executor's thread.
  void close() noexcept { client_.close(); }

 private:
  static void check(const curl::Response& response) {
    if (response.status / 100 == 2) return;
    std::string text = "status " + std::to_string(response.status);
    for (const char* name : {"Code", "Message"}) {
      std::string_view xml = response.body;
      if (const std::string_view part = next_element(xml, name); !part.empty()) text += ", " + unescape(part);
    }
    throw Error(response.status, text);
  }

  asio::awaitable<std::string> answer(curl::Request request) {
    curl::Response response = co_await client_.fetch(std::move(request));
    check(response);
    co_return std::move(response.body);
  }

  curl::Client client_;
  Settings settings_;
};

}  // namespace s3

#endif  // RUNTIME_BRIDGE_EXAMPLES_S3_HPP
