// SPDX-License-Identifier: Apache-2.0
//
// examples/support/s3.hpp. An independent implementation of AWS Signature Version 4 checks what libcurl signs. It is
// itself checked against the examples that AWS publishes.

#include "support/s3.hpp"

#include <openssl/evp.h>
#include <openssl/hmac.h>

#include <algorithm>
#include <map>
#include <optional>
#include <sstream>
#include <string>
#include <vector>

#include "http_server.hpp"
#include "support.hpp"

namespace {

// ---------------------------------------------------------------------------------------------------------------------
// The signature, from "Authenticating Requests: Using the Authorization Header" in the API reference of Amazon S3

std::string hmac(const std::string& key, const std::string& text) {
  std::string digest(32, '\0');
  HMAC(EVP_sha256(), key.data(), static_cast<int>(key.size()), reinterpret_cast<const unsigned char*>(text.data()),
       text.size(), reinterpret_cast<unsigned char*>(digest.data()), nullptr);
  return digest;
}

std::string hex(const std::string& bytes) {
  std::string text;
  for (const char byte : bytes) {
    const auto bits = static_cast<unsigned char>(byte);
    text += "0123456789abcdef"[bits >> 4U];
    text += "0123456789abcdef"[bits & 15U];
  }
  return text;
}

std::string sha256(const std::string& text) {
  std::string digest(32, '\0');
  EVP_Digest(text.data(), text.size(), reinterpret_cast<unsigned char*>(digest.data()), nullptr, EVP_sha256(), nullptr);
  return hex(digest);
}

std::string uri_decode(const std::string& text) {
  std::string decoded;
  for (std::size_t i = 0; i < text.size(); ++i) {
    if (text[i] == '%') {
      decoded += static_cast<char>(std::stoi(text.substr(i + 1, 2), nullptr, 16));
      i += 2;
    } else {
      decoded += text[i];
    }
  }
  return decoded;
}

std::string uri_encode(const std::string& text, bool slash_too) {
  std::string encoded;
  for (const char c : text) {
    if (std::isalnum(static_cast<unsigned char>(c)) || std::strchr("-._~", c) || (c == '/' && !slash_too)) {
      encoded += c;
    } else {
      std::string digits = hex(std::string(1, c));
      std::transform(digits.begin(), digits.end(), digits.begin(), [](unsigned char d) { return std::toupper(d); });
      encoded += '%' + digits;
    }
  }
  return encoded;
}

std::vector<std::string> split(const std::string& text, char separator) {
  std::vector<std::string> parts;
  std::istringstream in(text);
  for (std::string part; std::getline(in, part, separator);) parts.push_back(part);
  return parts;
}

/// The signature that a request should bear. `signed_headers` are names with ';' between them.
std::string signature(const std::string& secret, const std::string& scope, const std::string& method,
                      const std::string& target, const std::string& signed_headers,
                      std::map<std::string, std::string> headers) {
  const std::size_t question = std::min(target.find('?'), target.size());
  std::vector<std::string> query;
  for (const std::string& pair : split(target.substr(std::min(question + 1, target.size())), '&')) {
    const std::size_t equals = std::min(pair.find('='), pair.size());
    const std::string value = pair.substr(std::min(equals + 1, pair.size()));
    query.push_back(uri_encode(uri_decode(pair.substr(0, equals)), true) + '=' + uri_encode(uri_decode(value), true));
  }
  std::sort(query.begin(), query.end());

  std::string canonical = method + '\n' + uri_encode(uri_decode(target.substr(0, question)), false) + '\n';
  for (const std::string& pair : query) canonical += (&pair == query.data() ? "" : "&") + pair;
  canonical += '\n';
  for (const std::string& name : split(signed_headers, ';')) canonical += name + ':' + headers[name] + '\n';
  canonical += '\n' + signed_headers + '\n' + headers["x-amz-content-sha256"];

  std::string key = "AWS4" + secret;
  for (const std::string& part : split(scope, '/')) key = hmac(key, part);
  const std::string to_sign = "AWS4-HMAC-SHA256\n" + headers["x-amz-date"] + '\n' + scope + '\n' + sha256(canonical);
  return hex(hmac(key, to_sign));
}

/// An example from AWS. The account and the date are the same in all.
struct Example {
  std::string method, target;
  std::map<std::string, std::string> headers;
  std::string body, signature;
};
const std::string example_id = "AKIAIOSFODNN7EXAMPLE";
const std::string example_secret = "wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY";
const std::string example_host = "examplebucket.s3.amazonaws.com";
const std::string example_date = "20130524T000000Z";
const std::vector<Example> examples = {
    {"GET",
     "/test.txt",
     {{"range", "bytes=0-9"}},
     "",
     "f0e8bdb87c964420e857bd35b5d6ed310bd44f0170aba48dd91039c6036bdb41"},
    {"PUT",
     "/test%24file.text",
     {{"date", "Fri, 24 May 2013 00:00:00 GMT"}, {"x-amz-storage-class", "REDUCED_REDUNDANCY"}},
     "Welcome to Amazon S3.",
     "98ad721746da40c64f1a55b78f14c238d841ea1380cd77a1b5971af0ece108bd"},
    {"GET", "/?lifecycle", {}, "", "fea454ca298b7da1c68078a5d1bdbfbbe0d65c699e0f91ac7a200a0136783543"},
    {"GET", "/?max-keys=2&prefix=J", {}, "", "34b48302e7b5fa45bde8084f4b7868a86f0a534bc59db6670ed5711ef69dc6f7"}};

// ---------------------------------------------------------------------------------------------------------------------
// A server that checks what AWS checks

constexpr const char* id = "SOMEBODY";
constexpr const char* secret = "a/secret+with:punctuation=";
constexpr const char* region = "eu-test-1";

/// Why a request is refused; empty if it is not.
std::string objection(Exchange& exchange, const std::string& body) {
  const std::string& authorization = exchange.headers["authorization"];
  const auto field = [&](const std::string& name) {
    const std::size_t begin = authorization.find(name + '=');
    if (begin == authorization.npos) return std::string();
    const std::size_t end = authorization.find(',', begin);
    return authorization.substr(begin + name.size() + 1,
                                end == authorization.npos ? end : end - begin - name.size() - 1);
  };
  if (!authorization.starts_with("AWS4-HMAC-SHA256 ")) return "not signed";
  if (exchange.headers["x-amz-content-sha256"] != sha256(body)) return "not the content's hash";
  const std::string date = exchange.headers["x-amz-date"];
  const std::string scope = date.substr(0, 8) + '/' + region + "/s3/aws4_request";
  if (field("Credential") != id + ('/' + scope)) return "not the credential: " + field("Credential");
  const std::vector<std::string> names = split(field("SignedHeaders"), ';');
  for (const auto& [name, value] : exchange.headers) {
    const bool must = name == "host" || name.starts_with("x-amz-");
    if (must && std::count(names.begin(), names.end(), name) != 1) return "not signed: " + name;
  }
  if (!std::is_sorted(names.begin(), names.end())) return "names not sorted";
  const std::string right =
      signature(secret, scope, exchange.method, exchange.target, field("SignedHeaders"), exchange.headers);
  return field("Signature") == right ? "" : "not the signature";
}

/// A bucket in memory.
class FakeS3 {
 public:
  awaitable<bool> operator()(Exchange& exchange) {
    const std::string body = co_await exchange.body();
    last_objection = objection(exchange, body);
    last_headers = exchange.headers;
    targets.push_back(exchange.target);
    const auto [status, text] = last_objection.empty() ? answer(exchange, body) : refusal(403, "SignatureDoesNotMatch");
    const std::string content = text;
    co_await exchange.answer(status, content);
    co_return true;
  }

  std::string last_objection;
  std::map<std::string, std::string> last_headers;
  std::vector<std::string> targets;
  std::string bucket_body;

 private:
  using Answer = std::pair<int, std::string>;
  static Answer refusal(int status, const std::string& code) {
    return {status, "<Error><Code>" + code + "</Code><Message>a &lt;message&gt;</Message></Error>"};
  }

  Answer answer(Exchange& exchange, const std::string& body) {
    const std::size_t question = std::min(exchange.target.find('?'), exchange.target.size());
    const std::string path = uri_decode(exchange.target.substr(0, question));
    const std::string root = "/my bucket";
    if (path == root) {
      if (exchange.method == "HEAD") return {made_ ? 200 : 404, ""};
      if (exchange.method == "GET") return list(exchange.target.substr(question + 1));
      made_ = true;
      bucket_body = body;
      return {200, ""};
    }
    const std::string key = path.substr(root.size() + 1);
    if (exchange.method == "PUT") objects_[key] = body;
    if (exchange.method == "DELETE") return {204, (objects_.erase(key), "")};
    if (!objects_.contains(key)) return refusal(404, "NoSuchKey");
    return {200, exchange.method == "GET" ? objects_[key] : ""};
  }

  static std::string escape(const std::string& text) {
    std::string escaped;
    for (const char c : text) {
      escaped += c == '&' ? "&amp;" : c == '<' ? "&lt;" : c == '"' ? "&quot;" : c == '\r' ? "&#13;" : std::string(1, c);
    }
    return escaped;
  }

  Answer list(const std::string& query) {
    std::map<std::string, std::string> parameters;
    for (const std::string& pair : split(query, '&')) {
      const std::size_t equals = pair.find('=');
      parameters[pair.substr(0, equals)] = uri_decode(pair.substr(equals + 1));
    }
    if (parameters["list-type"] != "2") return refusal(400, "InvalidArgument");
    // A token is the last key with characters that need escaping.
    const std::string mark = "+/= &<";
    const std::string token = parameters["continuation-token"];
    if (!token.empty() && !token.ends_with(mark)) return refusal(400, "InvalidArgument");
    std::string xml = "<?xml version=\"1.0\"?><ListBucketResult><Name>my bucket</Name>", next, last;
    int left = std::stoi(parameters["max-keys"]);
    for (const auto& [key, content] : objects_) {
      if (!key.starts_with(parameters["prefix"]) || (!token.empty() && key + mark <= token)) continue;
      if (left-- == 0) next = last + mark;
      if (left < 0) continue;
      xml += "<Contents><Key>" + escape(key) + "</Key><Size>" + std::to_string(content.size()) + "</Size></Contents>";
      last = key;
    }
    if (!next.empty()) xml += "<NextContinuationToken>" + escape(next) + "</NextContinuationToken>";
    return {200, xml + "</ListBucketResult>"};
  }

  bool made_ = false;
  std::map<std::string, std::string> objects_;
};

/// A bridge and a bucket on it.
class Store {
 public:
  explicit Store(FakeS3& s3, std::string token = {})
      : server([&s3](Exchange& exchange) { return s3(exchange); }),
        settings{server.url(""), region, "my bucket", id, secret, std::move(token), 3},
        bucket(curl::Client(bridge.get_executor(), options()), settings) {}
  Store(const Store&) = delete;
  Store& operator=(const Store&) = delete;
  ~Store() {
    (void)bridge.block_on([&] { bucket.close(); });
  }

  template <class Task>
  auto run(Task task) {
    return unwrap(bridge.block_on(task));
  }
  void put(const std::string& key, const std::string& text) {
    const s3::Content content(text.size(), [&] { return curl::from_memory(text); });
    run([&] { return bucket.put(key, content, sha256(text)); });
  }
  long fetch(const curl::Request& request) {
    return run([&]() -> awaitable<long> {
      const curl::Client client(bridge.get_executor());
      const curl::Response response = co_await client.fetch(request);
      co_return response.status;
    });
  }

  static curl::Options options() {
    curl::Options options;
    options.max_body = 1000;
    return options;
  }

  HttpServer server;
  s3::Settings settings;
  RuntimeBridge bridge;
  s3::Bucket bucket;
};

}  // namespace

TEST_CASE("s3: the checker of signatures agrees with AWS's examples") {
  for (const Example& example : examples) {
    std::map<std::string, std::string> headers = example.headers;
    headers["host"] = example_host;
    headers["x-amz-date"] = example_date;
    headers["x-amz-content-sha256"] = sha256(example.body);
    std::string names;
    for (const auto& [name, value] : headers) names += (names.empty() ? "" : ";") + name;
    CHECK(signature(example_secret, "20130524/us-east-1/s3/aws4_request", example.method, example.target, names,
                    headers) == example.signature);
  }
}

TEST_CASE("s3: libcurl signs AWS's examples as AWS does") {
  for (const Example& example : examples) {
    std::string authorization;
    HttpServer server([&](Exchange& exchange) -> awaitable<bool> {
      co_await exchange.body();
      authorization = exchange.headers["authorization"];
      co_await exchange.answer(200);
      co_return true;
    });
    const s3::Settings settings{"http://" + example_host, "us-east-1", "", example_id, example_secret};
    curl::Request request = s3::request(settings, example.method, "", {}, sha256(example.body));
    // There the host name contains the bucket. One example has a parameter without a value, which AWS signs with an
    // "=", so s3::request always writes one.
    request.url = "http://" + example_host + (example.target == "/?lifecycle" ? "/?lifecycle=" : example.target);
    for (const auto& [name, value] : example.headers)
      request.headers.push_back(std::string(name).append(": ").append(value));
    request.headers.push_back("x-amz-date: " + example_date);
    request.body_size = example.body.size();
    if (!example.body.empty()) request.open_body = [&] { return curl::from_memory(example.body); };
    const std::string elsewhere = "::" + server.host();
    const std::unique_ptr<curl_slist, decltype(&curl_slist_free_all)> list(
        curl_slist_append(nullptr, elsewhere.c_str()), &curl_slist_free_all);
    request.configure = [&, sign = request.configure](CURL* easy) {
      sign(easy);
      curl::set(easy, CURLOPT_CONNECT_TO, list.get());
    };
    RuntimeBridge bridge;
    const auto task = [&]() -> awaitable<long> {
      const curl::Client client(bridge.get_executor());
      const curl::Response response = co_await client.fetch(request);
      co_return response.status;
    };
    CHECK(unwrap(bridge.block_on(task)) == 200);
    CHECK(authorization.substr(authorization.find("Signature=") + 10) == example.signature);
  }
}

TEST_CASE("s3: requests for keys of all kinds have a valid signature") {
  FakeS3 s3;
  Store store(s3);
  for (const std::string key : {"plain", "a/b//c/", "with space", "a+b=c&d?e#f", "~tilde-_.", "per%cent%20",
                                "\xC3\xA4\xE2\x82\xAC", "a/../b/./c", "'(quoted)!*'", "@:$,;[]\"<>|\\^`{}"}) {
    CAPTURE(key);
    store.put(key, "content of " + key);
    CHECK(uri_decode(s3.targets.back()) == "/my bucket/" + key);
    CHECK(store.run([&] { return store.bucket.get(key); }) == "content of " + key);
    CHECK(store.run([&] { return store.bucket.exists(key); }));
    store.run([&] { return store.bucket.remove(key); });
    CHECK_FALSE(store.run([&] { return store.bucket.exists(key); }));
    CHECK(s3.last_objection.empty());
  }
}

TEST_CASE("s3: get returns an object whole, or streams it and returns its hash") {
  FakeS3 s3;
  Store store(s3);
  const std::string text(5000, 'x');  // more than max_body
  store.put("key", text);
  CHECK(store.run([&] { return store.bucket.get("key"); }) == text);
  std::string streamed;
  const auto append = [&](std::string_view piece) -> awaitable<void> {
    streamed += piece;
    co_return;
  };
  CHECK(store.run([&] { return store.bucket.get("key", [&] { return append; }); }) == sha256(text));
  CHECK(streamed == text);
}

TEST_CASE("s3: temporary credentials are sent and signed") {
  FakeS3 s3;
  Store store(s3, "a/token+with=all");
  store.put("key", "text");
  CHECK(s3.last_headers["x-amz-security-token"] == "a/token+with=all");
  CHECK(s3.last_objection.empty());
}

TEST_CASE("s3: list returns the keys of all pages") {
  FakeS3 s3;
  Store store(s3);
  const std::vector<std::string> keys = {"p/&amp;", "p/1 2", "p/<3>", "p/\"4\"", "p/\r5", "p/6", "p/\xC3\xA4"};
  for (const std::string& key : keys) store.put(key, "");
  store.put("other", "");
  std::vector<std::string> sorted = keys;
  std::sort(sorted.begin(), sorted.end());
  s3.targets.clear();
  CHECK(store.run([&] { return store.bucket.list("p/"); }) == sorted);
  CHECK(s3.targets.size() == 3);
  CHECK(store.run([&] { return store.bucket.list(""); }).size() == 8);
  CHECK(store.run([&] { return store.bucket.list("none/"); }).empty());
}

TEST_CASE("s3: create makes the bucket in its region, once") {
  FakeS3 s3;
  Store store(s3);
  store.run([&] { return store.bucket.create(); });
  CHECK(s3.bucket_body.find("<LocationConstraint>eu-test-1</LocationConstraint>") != std::string::npos);
  CHECK(s3.targets.size() == 2);
  store.run([&] { return store.bucket.create(); });
  CHECK(s3.targets.size() == 3);
}

TEST_CASE("s3: the server refuses requests with another signature") {
  FakeS3 s3;
  Store store(s3);
  curl::Request request =
      s3::request(store.settings, "GET", "", {{"prefix", "a b"}, {"list-type", "2"}, {"max-keys", "1"}});
  CHECK(request.url.ends_with("/my%20bucket?list-type=2&max-keys=1&prefix=a%20b"));
  CHECK(store.fetch(request) == 200);

#if LIBCURL_VERSION_NUM < 0x080300
  curl::Request unsorted = request;
  unsorted.url = store.settings.endpoint + "/my%20bucket?prefix=a%20b&list-type=2&max-keys=1";
  CHECK(store.fetch(unsorted) == 403);
#endif
  curl::Request unhashed = request;
  unhashed.headers.clear();
  CHECK(store.fetch(unhashed) == 403);

  s3::Settings wrong = store.settings;
  wrong.secret += 'x';
  CHECK(store.fetch(s3::request(wrong, "HEAD", "")) == 403);
  wrong = store.settings;
  wrong.region = "eu-test-2";
  CHECK(store.fetch(s3::request(wrong, "HEAD", "")) == 403);
}

TEST_CASE("s3: a refusal is an error with the server's status and message") {
  FakeS3 s3;
  Store store(s3);
  try {
    store.run([&] { return store.bucket.get("missing"); });
    FAIL("no error");
  } catch (const s3::Error& e) {
    CHECK(e.status() == 404);
    CHECK(std::string(e.what()) == "status 404, NoSuchKey, a <message>");
  }
}

TEST_CASE("s3: XML escapes") {
  CHECK(s3::unescape("a&amp;&lt;&gt;&quot;&apos;b") == "a&<>\"'b");
  CHECK(s3::unescape("&#65;&#x42;&#xe4;&#x20AC;&#x1F600;") == "AB\xC3\xA4\xE2\x82\xAC\xF0\x9F\x98\x80");
  CHECK(s3::unescape("& &; &other; &amp") == "& &; &other; &amp");
  CHECK(s3::unescape("&amp;lt;") == "&lt;");
}

TEST_CASE("s3: the hash of a stream is that of its bytes") {
  const std::string text(200'000, 'x');
  CHECK(s3::Sha256::of("abc") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
  CHECK(unwrap(RuntimeBridge().block_on([&] { return s3::hash_of(curl::from_memory(text)); })) == sha256(text));
}
