// SPDX-License-Identifier: Apache-2.0
//
// An asynchronous client for one bucket of Amazon S3 or a compatible server, built on curl.hpp. libcurl signs the
// requests (AWS Signature Version 4), OpenSSL computes the hashes, and pugixml reads the answers.

#ifndef RUNTIME_BRIDGE_EXAMPLES_S3_HPP
#define RUNTIME_BRIDGE_EXAMPLES_S3_HPP

#include <openssl/evp.h>

#include <algorithm>
#include <array>
#include <asio/any_io_executor.hpp>
#include <asio/awaitable.hpp>
#include <asio/post.hpp>
#include <asio/use_awaitable.hpp>
#include <cctype>
#include <climits>
#include <cstddef>
#include <cstdint>
#include <ctime>
#include <functional>
#include <map>
#include <memory>
#include <new>
#include <pugixml.hpp>
#include <set>
#include <span>
#include <stdexcept>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "curl.hpp"
#include "pipe.hpp"

namespace s3 {

struct Settings {
  Settings(std::string the_endpoint, std::string the_region, std::string the_bucket, std::string the_key_id,
           std::string the_secret, std::string the_session_token = {}, int the_page_size = 1000)
      : endpoint(std::move(the_endpoint)),
        region(std::move(the_region)),
        bucket(std::move(the_bucket)),
        key_id(std::move(the_key_id)),
        secret(std::move(the_secret)),
        session_token(std::move(the_session_token)),
        page_size(the_page_size) {}

  std::string endpoint;  ///< such as https://s3.eu-central-1.amazonaws.com; it may have a port and a path
  std::string region;
  std::string bucket;
  std::string key_id, secret;
  std::string session_token;  ///< for temporary credentials
  int page_size;              ///< how many keys a list request asks for
};

/// The server did not do what was asked for. (If it sent no response, that is a curl::Error.)
class Error : public std::runtime_error {
 public:
  enum Kind {
    NoSuchObject,
    NoSuchBucket,
    Refused,      ///< by the server, or the request cannot be sent; nothing was changed
    Unavailable,  ///< it may work later
    BadAnswer     ///< not an answer to this request, or not all of it
  };

  Error(Kind kind, long status, const std::string& text, std::string code = {})
      : std::runtime_error(text), kind_(kind), status_(status), code_(std::move(code)) {}

  [[nodiscard]] Kind kind() const noexcept { return kind_; }
  [[nodiscard]] long status() const noexcept { return status_; }  ///< 0: nothing was sent
  [[nodiscard]] const std::string& code() const noexcept {
    return code_;
  }  ///< S3's, such as AccessDenied; may be empty

 private:
  Kind kind_;
  long status_;
  std::string code_;
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

/// Opens sources that read the pipe, or sinks that write to it, until a byte has come through it. After that a request
/// cannot be retried.
inline std::function<curl::Source()> source_of(std::shared_ptr<Pipe> pipe) {
  return [pipe = std::move(pipe)] {
    const auto read = [pipe](std::span<char> room) { return pipe->read(room); };
    return pipe->used() ? curl::Source() : read;
  };
}
inline std::function<curl::Sink()> sink_of(std::shared_ptr<Pipe> pipe) {
  return [pipe = std::move(pipe)] {
    const auto write = [pipe](std::string_view piece) { return pipe->write(piece); };
    return pipe->used() ? curl::Sink() : write;
  };
}

/// Percent-encodes all but letters, digits and "-._~", as AWS's signatures need it.
[[nodiscard]] inline std::string encode(const std::string& text) {
  if (text.empty()) return {};  // libcurl takes the size 0 for "up to the NUL"
  if (text.size() > INT_MAX / 4) throw Error(Error::Refused, 0, "a name is too long");
  const std::unique_ptr<char, decltype(&curl_free)> encoded(
      curl_easy_escape(nullptr, text.data(), static_cast<int>(text.size())), &curl_free);
  if (!encoded) throw std::bad_alloc();
  return encoded.get();
}

/// The same for a key, whose slashes remain.
[[nodiscard]] inline std::string encode_key(const std::string& key) {
  std::string encoded = encode(key);
  for (std::size_t at = 0; (at = encoded.find("%2F", at)) != encoded.npos; ++at) encoded.replace(at, 3, "/");
  return encoded;
}

/// Decodes a name in a list that was asked for with encoding-type=url: there a space is a "+".
[[nodiscard]] inline std::string decode(std::string text) {
  std::ranges::replace(text, '+', ' ');
  if (text.empty()) return text;
  int size = 0;
  const std::unique_ptr<char, decltype(&curl_free)> decoded(
      curl_easy_unescape(nullptr, text.data(), static_cast<int>(text.size()), &size), &curl_free);
  if (!decoded) throw std::bad_alloc();
  return {decoded.get(), static_cast<std::size_t>(size)};
}

/// Returns what comes before "/bucket/key" in URLs.
[[nodiscard]] inline std::string base_of(const Settings& settings) {
  std::string base = settings.endpoint;
  while (base.ends_with('/')) base.pop_back();
  const std::size_t host = base.find("://") + 3;
  const std::string_view scheme = std::string_view(base).substr(0, host);
  // Without a scheme, libcurl would send everything unencrypted.
  if ((scheme != "http://" && scheme != "https://") || host == base.size() ||
      base.find_first_of("?#@\\ ", host) != base.npos) {
    throw Error(Error::Refused, 0, "the endpoint is not a URL such as https://host:port: " + settings.endpoint);
  }
  return base;
}

/// Returns the URL with the host for another region, if it is one of Amazon's.
[[nodiscard]] inline std::string in_region(std::string url, const std::string& from, const std::string& to) {
  const std::size_t begin = url.find("://") + 3;
  const std::size_t end = std::min(url.find('/', begin), url.size());
  const std::string host = url.substr(begin, end - begin);
  if (host == "s3.amazonaws.com") return url.replace(begin, host.size(), "s3." + to + ".amazonaws.com");
  const std::size_t label = host.find('.' + from + ".amazonaws.com");
  return label == host.npos ? url : url.replace(begin + label + 1, from.size(), to);
}

[[nodiscard]] inline std::string signature_for(const std::string& region) { return "aws:amz:" + region + ":s3"; }

/// Returns a request for an object, or for the bucket itself if the key is empty. URLs are path-style, which every
/// server understands.
///
/// `body_hash` is the SHA-256 of the body. The server compares it with the body that it receives.
[[nodiscard]] inline curl::Request request(const Settings& settings, std::string method, const std::string& key,
                                           const std::map<std::string, std::string>& query = {},
                                           std::string body_hash = Sha256::of({})) {
  std::string url = base_of(settings) + '/' + encode(settings.bucket);
  if (!key.empty()) url += '/' + encode_key(key);
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
  request.aws_sigv4 = signature_for(settings.region);
  request.user = settings.key_id;
  request.password = settings.secret;
  return request;
}

// ---------------------------------------------------------------------------------------------------------------------
// Answers

/// An XML document. Names are compared without their namespace's prefix, which the server may choose.
class Answer {
 public:
  explicit Answer(std::string_view xml) {
    // A key may consist of spaces.
    const auto result = document_.load_buffer(xml.data(), xml.size(), pugi::parse_default | pugi::parse_ws_pcdata);
    if (result) root_ = document_.document_element();
  }

  /// Whether it is a whole document whose root has this name.
  [[nodiscard]] bool is(std::string_view name) const { return root_ && local_name(root_) == name; }

  [[nodiscard]] pugi::xml_node root() const { return root_; }

  [[nodiscard]] static std::string_view local_name(pugi::xml_node node) {
    const std::string_view name = node.name();
    return name.substr(name.find(':') + 1);
  }
  [[nodiscard]] static pugi::xml_node child(pugi::xml_node node, std::string_view name) {
    return node.find_child([&](pugi::xml_node inner) { return local_name(inner) == name; });
  }
  [[nodiscard]] static std::string text(pugi::xml_node node) {
    std::string text;
    for (const pugi::xml_node part : node.children()) {
      if (part.type() == pugi::node_pcdata || part.type() == pugi::node_cdata) text += part.value();
    }
    return text;
  }
  [[nodiscard]] std::string text(std::string_view name) const { return text(child(root_, name)); }

 private:
  pugi::xml_document document_;
  pugi::xml_node root_;  // null: not XML
};

inline bool is_blank(std::string_view text) { return text.find_first_not_of(" \t\r\n") == text.npos; }

/// Whether a response is an error that may pass. Some come with the status 400, or even 200.
[[nodiscard]] inline bool may_pass(const curl::Response& response) {
  static const std::set<std::string> passing = {"BandwidthLimitExceeded",
                                                "InternalError",
                                                "InternalFailure",
                                                "OperationAborted",
                                                "PriorRequestNotComplete",
                                                "RequestLimitExceeded",
                                                "RequestThrottled",
                                                "RequestThrottledException",
                                                "RequestTimeout",
                                                "RequestTimeoutException",
                                                "ServiceUnavailable",
                                                "SlowDown",
                                                "SlowDownRead",
                                                "SlowDownWrite",
                                                "ThrottledException",
                                                "Throttling",
                                                "ThrottlingException",
                                                "TooManyRequests",
                                                "TooManyRequestsException"};
  if (curl::detail::is_passing(response.status)) return true;
  if (response.body.find("Error") == response.body.npos) return false;
  const Answer answer(response.body);
  return answer.is("Error") && passing.contains(answer.text("Code"));
}

[[nodiscard]] inline Error error_of(const curl::Response& response, const std::string& what = {}) {
  const Answer answer(response.body);
  const std::string code = answer.is("Error") ? answer.text("Code") : "";
  std::string text = "status " + std::to_string(response.status);
  const auto append = [&](const char* label, std::string_view part) {
    if (!part.empty()) text.append(", ").append(label).append(part);
  };
  append("", what);
  append("", code);
  if (answer.is("Error")) append("", answer.text("Message"));
  if (response.status != 404) append("the bucket's region is ", response.header("x-amz-bucket-region"));
  append("to ", response.header("location"));
  append("request ", response.header("x-amz-request-id"));

  Error::Kind kind = Error::Refused;
  if (code == "NoSuchKey") {
    kind = Error::NoSuchObject;
  } else if (code == "NoSuchBucket") {
    kind = Error::NoSuchBucket;
  } else if (may_pass(response)) {
    kind = Error::Unavailable;
  } else if (response.status / 100 == 2 && code.empty()) {
    kind = Error::BadAnswer;
  }
  return {kind, response.status, text, code};
}

/// One response to ListObjectsV2.
struct Page {
  std::vector<std::string> keys;
  std::string next;  ///< the continuation-token for the next page; empty if this is the last one
};

[[nodiscard]] inline Page read_page(const curl::Response& response, std::string_view prefix) {
  const Answer answer(response.body);
  if (!answer.is("ListBucketResult")) throw error_of(response, answer.is("Error") ? "" : "not a list of objects");
  const bool is_encoded = answer.text("EncodingType") == "url";
  Page page;
  for (const pugi::xml_node node : answer.root().children()) {
    if (Answer::local_name(node) != "Contents") continue;
    const std::string text = Answer::text(Answer::child(node, "Key"));
    std::string key = is_encoded ? decode(text) : text;
    if (key.empty() || !key.starts_with(prefix)) throw error_of(response, "a list with other keys: " + key);
    page.keys.push_back(std::move(key));
  }
  const std::string truncated = answer.text("IsTruncated");
  page.next = answer.text("NextContinuationToken");
  if (truncated == "false") page.next.clear();
  if (truncated == "true" && page.next.empty()) throw error_of(response, "a list without its rest");
  if (!truncated.empty() && truncated != "true" && truncated != "false") throw error_of(response, "not a list");
  return page;
}

/// A bucket and its objects. The functions throw s3::Error if the server does not do what was asked for, and
/// curl::Error if there is no response. The bucket must outlive their coroutines.
///
/// If the server says that the bucket is in another region, the request is repeated there, and later ones go there at
/// once. If it says that this machine's clock is wrong, later requests have the server's time.
class Bucket {
 public:
  Bucket(asio::any_io_executor executor, Settings settings, curl::Options options = {})
      : client_(std::move(executor), options), settings_(std::move(settings)) {}

  /// Creates the bucket if it does not exist.
  asio::awaitable<void> create() {
    if (co_await bucket_exists()) co_return;
    // Without a location, AWS uses us-east-1; it rejects us-east-1 as an explicit location.
    std::string place;
    if (settings_.region != "us-east-1") {
      place = "<CreateBucketConfiguration><LocationConstraint>" + settings_.region +
              "</LocationConstraint></CreateBucketConfiguration>";
    }
    curl::Request request = s3::request(settings_, "PUT", {}, {}, Sha256::of(place));
    request.body_size = place.size();
    request.open_body = [&] { return curl::from_memory(place); };
    const curl::Response response = co_await send(std::move(request));
    // Somebody was faster, perhaps an earlier attempt whose response was lost.
    if (response.status == 409 && Answer(response.body).text("Code") == "BucketAlreadyOwnedByYou") co_return;
    check_done(response);
  }

  /// `hash` must be the SHA-256 of the content, or the server rejects the request.
  asio::awaitable<void> put(std::string key, Content content, std::string hash) {
    curl::Request request = object("PUT", key, std::move(hash));
    request.body_size = content.size;
    request.open_body = std::move(content.open);
    const curl::Response response = co_await send(std::move(request));
    check_done(response);
  }

  /// Returns the content, however long it is.
  asio::awaitable<std::string> get(std::string key) {
    std::string content;
    const auto append = [&](std::string_view piece) -> asio::awaitable<void> {
      content += piece;
      co_return;
    };
    curl::Request request = object("GET", key);
    request.open_sink = [&] {
      content.clear();  // each attempt starts from the beginning
      return append;
    };
    const curl::Response response = co_await send(std::move(request));
    check_content(response);
    co_return content;
  }

  /// Writes the content to the sink and returns its SHA-256.
  asio::awaitable<std::string> get(std::string key, std::function<curl::Sink()> open_sink) {
    Sha256 hash;
    curl::Request request = object("GET", key);
    request.open_sink = [&] {
      hash = {};  // each attempt starts from the beginning
      return hashing(hash, open_sink());
    };
    const curl::Response response = co_await send(std::move(request));
    check_content(response);
    co_return hash.finish();
  }

  asio::awaitable<bool> exists(std::string key) {
    curl::Response response = co_await send(object("HEAD", key));
    if (response.status != 404) {
      check(response);
      co_return true;
    }
    // The response to a HEAD has no body, so it does not say what is missing.
    const bool in_bucket = co_await bucket_exists();
    if (!in_bucket) throw Error(Error::NoSuchBucket, 404, "status 404, the bucket does not exist");
    co_return false;
  }

  /// Removes an object. It is not an error if the object does not exist.
  asio::awaitable<void> remove(std::string key) {
    const curl::Response response = co_await send(object("DELETE", key));
    if (response.status == 404 && Answer(response.body).text("Code") == "NoSuchKey") co_return;
    check_done(response);
  }

  /// How far a list of the keys that start with a prefix has come.
  struct List {
    std::string prefix{};
    std::set<std::string> tokens{};
    std::string next{};  // a token; empty at the beginning
    bool is_complete = false;
  };

  /// Returns the next keys of the list, or nothing after the last.
  asio::awaitable<std::optional<std::vector<std::string>>> next_page(List& list) {
    if (list.is_complete) co_return std::nullopt;
    // With the encoding, keys may contain what XML cannot.
    std::map<std::string, std::string> query = {{"encoding-type", "url"},
                                                {"list-type", "2"},
                                                {"max-keys", std::to_string(settings_.page_size)},
                                                {"prefix", list.prefix}};
    if (!list.next.empty()) query["continuation-token"] = list.next;
    const curl::Response response = co_await send(request(settings_, "GET", {}, query));
    check(response);
    Page page = read_page(response, list.prefix);
    list.is_complete = page.next.empty();
    if (!list.is_complete && !list.tokens.insert(page.next).second) {
      throw error_of(response, "the same part of the list again");
    }
    list.next = std::move(page.next);
    co_return std::move(page.keys);
  }

  /// Returns all keys that start with the prefix.
  asio::awaitable<std::vector<std::string>> list(std::string prefix) {
    List list{std::move(prefix)};
    std::vector<std::string> keys;
    for (;;) {
      const std::optional<std::vector<std::string>> page = co_await next_page(list);
      if (!page) co_return keys;
      keys.insert(keys.end(), page->begin(), page->end());
    }
  }

 private:
  static constexpr int max_redirects = 5;

  static void check(const curl::Response& response) {
    if (response.status / 100 != 2) throw error_of(response);
  }

  /// For requests whose answer has no body.
  static void check_done(const curl::Response& response) {
    check(response);
    if (is_blank(response.body)) return;
    throw error_of(response, Answer(response.body).is("Error") ? "" : "an answer to something else");
  }

  static void check_content(const curl::Response& response) {
    check(response);
    if (response.status != 200) throw error_of(response, "not the whole content");
    // Otherwise the content ends with the connection, and a lost connection looks the same.
    if (response.header("content-length").empty() && response.header("transfer-encoding").empty()) {
      throw error_of(response, "content whose end is not known");
    }
  }

  /// A request for an object. Without a key it would be one for the bucket, such as: delete it.
  [[nodiscard]] curl::Request object(std::string method, const std::string& key,
                                     std::string body_hash = Sha256::of({})) const {
    if (key.empty()) throw Error(Error::Refused, 0, "the key is empty");
    if (key.find('\0') != key.npos) throw Error(Error::Refused, 0, "the key contains a NUL");
    return request(settings_, std::move(method), key, {}, std::move(body_hash));
  }

  asio::awaitable<bool> bucket_exists() {
    const curl::Response response = co_await send(request(settings_, "HEAD", {}));
    if (response.status != 404) check(response);
    co_return response.status != 404;
  }

  /// Sends the request, again after each redirect.
  asio::awaitable<curl::Response> send(curl::Request request) {
    if (settings_.region.empty()) throw Error(Error::Refused, 0, "the region is empty");
    request.may_pass = may_pass;
    set_date(request);
    for (int again = 0;; ++again) {
      curl::Response response = co_await client_.fetch(request);
      if (again == max_redirects || (!redirect(request, response) && !correct_clock(request, response))) {
        co_return response;
      }
    }
  }

  bool redirect(curl::Request& request, const curl::Response& response) {
    constexpr std::array<long, 6> statuses = {301, 302, 307, 308, 400, 403};
    if (std::ranges::find(statuses, response.status) == statuses.end()) return false;
    std::string region(response.header("x-amz-bucket-region"));
    if (region.empty()) region = Answer(response.body).text("Region");
    const auto is_plain = [](unsigned char c) { return std::isalnum(c) || c == '-'; };
    if (!region.empty() && region.size() < 64 && std::ranges::all_of(region, is_plain) &&
        request.aws_sigv4 != signature_for(region)) {
      // Another request may have changed the settings meanwhile.
      const std::string from = request.aws_sigv4.substr(8, request.aws_sigv4.size() - 11);
      request.url = in_region(std::move(request.url), from, region);
      request.aws_sigv4 = signature_for(region);
      settings_.endpoint = in_region(std::move(settings_.endpoint), settings_.region, region);
      settings_.region = region;
      return true;
    }
    const std::string location(response.header("location"));
    if (response.status >= 400 || location.empty()) return false;
    return resolve(request.url, location);
  }

  /// Follows a location, but not from https to http. The signature is made anew.
  static bool resolve(std::string& url, const std::string& location) {
    const std::unique_ptr<CURLU, decltype(&curl_url_cleanup)> parts(curl_url(), &curl_url_cleanup);
    char* text = nullptr;
    if (!parts || curl_url_set(parts.get(), CURLUPART_URL, url.c_str(), CURLU_PATH_AS_IS) != CURLUE_OK ||
        curl_url_set(parts.get(), CURLUPART_URL, location.c_str(), CURLU_PATH_AS_IS) != CURLUE_OK ||
        curl_url_get(parts.get(), CURLUPART_URL, &text, 0) != CURLUE_OK) {
      return false;
    }
    const std::unique_ptr<char, decltype(&curl_free)> owner(text, &curl_free);
    const std::string_view target = text;
    if (!target.starts_with("https://") && !(target.starts_with("http://") && url.starts_with("http://"))) return false;
    url = target;
    return true;
  }

  /// S3 refuses requests whose time is wrong by more than a quarter of an hour.
  bool correct_clock(curl::Request& request, const curl::Response& response) {
    if (response.status != 403 || Answer(response.body).text("Code") != "RequestTimeTooSkewed") return false;
    const std::string date(response.header("date"));
    const std::time_t server = date.empty() ? -1 : curl_getdate(date.c_str(), nullptr);
    if (server == -1) return false;
    clock_offset_ = server - std::time(nullptr);
    set_date(request);
    return true;
  }

  void set_date(curl::Request& request) const {
    if (clock_offset_ == 0) return;
    const std::time_t now = std::time(nullptr) + clock_offset_;
    std::tm parts{};
    std::array<char, 32> text{};
    if (!gmtime_r(&now, &parts)) return;
    (void)std::strftime(text.data(), text.size(), "%Y%m%dT%H%M%SZ", &parts);
    std::erase_if(request.headers, [](const std::string& header) { return header.starts_with("x-amz-date:"); });
    request.headers.push_back(std::string("x-amz-date: ") + text.data());
  }

  curl::Client client_;
  Settings settings_;
  std::time_t clock_offset_ = 0;  // the server's time minus ours, if it minds
};

}  // namespace s3

#endif  // RUNTIME_BRIDGE_EXAMPLES_S3_HPP
