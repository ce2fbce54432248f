// SPDX-License-Identifier: Apache-2.0
//
// examples/support/s3.hpp. An independent implementation of AWS Signature Version 4 checks what libcurl signs. It is
// itself checked against the examples that AWS publishes.

#include "support/s3.hpp"

#include <openssl/evp.h>
#include <openssl/hmac.h>
#include <sys/resource.h>
#include <runtime_bridge/streambuf.hpp>

#include <algorithm>
#include <atomic>
#include <map>
#include <optional>
#include <runtime_bridge/hosted.hpp>
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
  explicit FakeS3(bool made = true) : made_(made) {}

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

  bool made_;
  std::map<std::string, std::string> objects_;
};

/// A server that knows the answers beforehand.
class Script {
 public:
  struct Line {
    int status = 200;
    std::string body = {}, headers = {};
  };
  static constexpr int raw = -1;  // the body is all that is sent

  /// The last line is the answer to all further requests.
  explicit Script(std::vector<Line> lines) : lines_(std::move(lines)) {}

  awaitable<bool> operator()(Exchange& exchange) {
    const std::string body = co_await exchange.body();
    requests.push_back(exchange.method + ' ' + exchange.target);
    headers = exchange.headers;
    objections.push_back(objection(exchange, body));
    const Line line = lines_.size() > 1 ? lines_.front() : lines_.back();
    if (lines_.size() > 1) lines_.erase(lines_.begin());
    if (line.status == raw) {
      co_await exchange.write(line.body);
      co_return false;
    }
    co_await exchange.answer(line.status, line.body, line.headers);
    co_return true;
  }

  std::vector<std::string> requests, objections;
  std::map<std::string, std::string> headers;  // of the last request

 private:
  std::vector<Line> lines_;
};

/// A bridge and a bucket on it.
class Store {
 public:
  template <class Server>
  explicit Store(Server& s3, std::string token = {})
      : server([&s3](Exchange& exchange) { return s3(exchange); }),
        settings{server.url(""), region, "my bucket", id, secret, std::move(token), 3},
        hosted(bridge, settings, options()) {}

  template <class Task>
  auto run(Task task) {
    return unwrap(bridge.block_on(task));
  }
  void put(const std::string& key, const std::string& text) {
    const s3::Content content(text.size(), [&] { return curl::from_memory(text); });
    run([&] { return bucket.put(key, content, sha256(text)); });
  }
  /// The error of a task; none is a failure.
  template <class Task>
  s3::Error error(Task task) {
    try {
      (void)unwrap(bridge.block_on(task));
    } catch (const s3::Error& e) {
      return e;
    }
    return {s3::Error::Refused, -1, "no error"};
  }
  s3::Error error_of_list() {
    return error([&] { return bucket.list("p/"); });
  }
  s3::Error error_of_get() {
    return error([&] { return bucket.get("key"); });
  }
  s3::Error error_of_put() {
    const s3::Content content(4, [] { return curl::from_memory("text"); });
    return error([&]() -> awaitable<int> {
      co_await bucket.put("key", content, sha256("text"));
      co_return 0;
    });
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
    options.first_delay = options.max_delay = 1ms;
    return options;
  }

  HttpServer server;
  s3::Settings settings;
  RuntimeBridge bridge;
  runtime_bridge::Hosted<s3::Bucket> hosted;
  s3::Bucket& bucket = *unwrap(hosted.call([](s3::Bucket& b) { return &b; }));
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
    // The Content-Type of our own requests is signed, and AWS's have none.
    std::unique_ptr<curl_slist, decltype(&curl_slist_free_all)> headers(nullptr, &curl_slist_free_all);
    for (const std::string& header : request.headers) {
      headers.reset(curl_slist_append(headers.release(), header.c_str()));
    }
    request.configure = [&](CURL* easy) {
      curl::set(easy, CURLOPT_CONNECT_TO, list.get());
      curl::set(easy, CURLOPT_HTTPHEADER, headers.get());
      if (request.body_size != 0) curl::set(easy, CURLOPT_UPLOAD, 1L);
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
  for (const std::string key :
       {"plain", "a/b//c/", "with space", "a+b=c&d?e#f", "~tilde-_.", "per%cent%20", "\xC3\xA4\xE2\x82\xAC",
        "a/../b/./c", ".", "..", "/", "//a//", "a\r\nb", "\x01\x7F", "%2F", "'(quoted)!*'", "@:$,;[]\"<>|\\^`{}"}) {
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
  FakeS3 s3(false);
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
    CHECK(e.kind() == s3::Error::NoSuchObject);
    CHECK(e.code() == "NoSuchKey");
    CHECK(e.status() == 404);
    CHECK(std::string(e.what()) == "status 404, NoSuchKey, a <message>");
  }
}

TEST_CASE("s3: the hash of a stream is that of its bytes") {
  const std::string text(200'000, 'x');
  CHECK(s3::Sha256::of("abc") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
  CHECK(unwrap(RuntimeBridge().block_on([&] { return s3::hash_of(curl::from_memory(text)); })) == sha256(text));
}

// ---------------------------------------------------------------------------------------------------------------------
// Answers that are not what was asked for

namespace {

std::string error_xml(const std::string& code, const std::string& further = {}) {
  return "<?xml version=\"1.0\" encoding=\"UTF-8\"?>\n<Error><Code>" + code + "</Code>" + further + "</Error>";
}

std::string list_xml(const std::string& inner) { return "<ListBucketResult>" + inner + "</ListBucketResult>"; }

}  // namespace

TEST_CASE("s3: lists in all forms of XML") {
  const auto keys_in = [](const std::string& xml) {
    Script script({{200, xml}});
    Store store(script);
    return store.run([&] { return store.bucket.list("p/"); });
  };
  using Keys = std::vector<std::string>;
  CHECK(keys_in(list_xml(
            "<Contents >\n <Size>1</Size> <Key\t>p/1</Key >\n</Contents><Contents><Key>p/2</Key></Contents>")) ==
        Keys{"p/1", "p/2"});
  CHECK(
      keys_in("<?xml version='1.0'?><!-- c --><s3:ListBucketResult xmlns:s3='http://s3.amazonaws.com/doc/2006-03-01/'>"
              "<s3:IsTruncated>false</s3:IsTruncated><s3:Contents a='b'><s3:Key>p/1</s3:Key></s3:Contents>"
              "</s3:ListBucketResult>") == Keys{"p/1"});
  CHECK(keys_in(list_xml("<Contents><Key>p/<![CDATA[<&>]]>&lt;<!-- c -->&#x1F600;&amp;amp;</Key></Contents>")) ==
        Keys{"p/<&><\xF0\x9F\x98\x80&amp;"});
  CHECK(keys_in(list_xml("<Contents><Owner/><Key>p/ </Key><StorageClass/></Contents>")) == Keys{"p/ "});
  CHECK(
      keys_in(list_xml("<Name/><Prefix>p/</Prefix><IsTruncated>false</IsTruncated><NextContinuationToken/>")).empty());
  CHECK(keys_in("<ListBucketResult/>").empty());
  CHECK(keys_in(list_xml("<EncodingType>url</EncodingType>"
                         "<Contents><Key>p/a+b%2B%01%25%C3%A4</Key></Contents>")) == Keys{"p/a b+\x01%\xC3\xA4"});
  CHECK(keys_in(list_xml("<Contents><Key>p/a+b%2B</Key></Contents>")) == Keys{"p/a+b%2B"});
  // What follows the last part is not asked for.
  CHECK(keys_in(list_xml("<IsTruncated>false</IsTruncated><NextContinuationToken>t</NextContinuationToken>")).empty());
}

TEST_CASE("s3: what is not a whole list is an error") {
  const std::string key = "<Contents><Key>p/1</Key></Contents>";
  const std::string more = "<IsTruncated>true</IsTruncated><NextContinuationToken>t</NextContinuationToken>";
  for (const std::string& answer :
       {std::string(), std::string("OK"), std::string("{\"keys\": []}"),
        std::string("<html><body>Sign in</body></html>"), std::string("<!DOCTYPE html><html><br></html>"),
        list_xml(key).substr(0, 60), "<ListBucketResult>" + key, std::string("<ListAllMyBucketsResult/>"),
        list_xml("<Contents/>"), list_xml("<Contents><Key/></Contents>"),
        list_xml("<Contents><Key>q/1</Key></Contents>"), list_xml(key + "<IsTruncated>true</IsTruncated>"),
        list_xml(key + "<IsTruncated>perhaps</IsTruncated>"),
        list_xml(key + "<IsTruncated>true</IsTruncated><NextContinuationToken/>"), list_xml(key + more)}) {
    CAPTURE(answer);
    Script script({{200, answer}});
    Store store(script);
    CHECK(store.error_of_list().kind() == s3::Error::BadAnswer);
    CHECK(script.requests.size() <= 2);  // the last says that there is more, and says it again
  }
  Script script({{200, list_xml(key + more)},
                 {200, list_xml(key + "<NextContinuationToken>u</NextContinuationToken>")},
                 {200, list_xml(key + more)}});
  Store store(script);
  CHECK(store.error_of_list().kind() == s3::Error::BadAnswer);
  CHECK(script.requests.size() == 3);
}

TEST_CASE("s3: an error in an answer with the status 200") {
  Script failed({{200, error_xml("AccessDenied")}});
  CHECK(Store(failed).error_of_list().kind() == s3::Error::Refused);
  CHECK(Store(failed).error_of_put().kind() == s3::Error::Refused);
  CHECK(failed.requests.size() == 2);
  Script passing({{200, error_xml("InternalError")}, {200, {}}});
  CHECK(std::string(Store(passing).error_of_put().what()) == "no error");
  CHECK(passing.requests.size() == 2);
  Script portal({{200, "<html><head/></html>"}});
  CHECK(Store(portal).error_of_put().kind() == s3::Error::BadAnswer);
}

TEST_CASE("s3: content that is not whole is an error") {
  Script part({{206, "te"}});
  CHECK(Store(part).error_of_get().kind() == s3::Error::BadAnswer);
  Script none({Script::Line{204}});
  CHECK(Store(none).error_of_get().kind() == s3::Error::BadAnswer);
  Script endless({{Script::raw, "HTTP/1.1 200 OK\r\n\r\ntext"}});
  CHECK(Store(endless).error_of_get().kind() == s3::Error::BadAnswer);
  Script cut({{Script::raw, "HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\ntext"}});
  CHECK_THROWS_AS(Store(cut).error_of_get(), curl::Error);
  CHECK(cut.requests.size() == 4);
  Script cut_chunk({{Script::raw, "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\ntext"}});
  CHECK_THROWS_AS(Store(cut_chunk).error_of_get(), curl::Error);
  Script not_modified({Script::Line{304}});
  CHECK(Store(not_modified).error_of_get().kind() == s3::Error::Refused);
  Script impossible({{416, error_xml("InvalidRange")}});
  CHECK(Store(impossible).error_of_get().kind() == s3::Error::Refused);
  // What the object contains does not matter.
  Script object({{200, error_xml("InternalError")}});
  Store store(object);
  CHECK(store.run([&] { return store.bucket.get("key"); }) == error_xml("InternalError"));
}

// ---------------------------------------------------------------------------------------------------------------------
// Errors

TEST_CASE("s3: a missing object is not a missing bucket") {
  Script no_key({{404, error_xml("NoSuchKey")}});
  CHECK(Store(no_key).error_of_get().kind() == s3::Error::NoSuchObject);
  Script no_bucket({{404, error_xml("NoSuchBucket")}});
  CHECK(Store(no_bucket).error_of_get().kind() == s3::Error::NoSuchBucket);
  CHECK(Store(no_bucket).error_of_list().kind() == s3::Error::NoSuchBucket);
  CHECK(Store(no_bucket).error_of_put().kind() == s3::Error::NoSuchBucket);
  Script no_page({{404, "<html>Not Found</html>"}});
  CHECK(Store(no_page).error_of_get().kind() == s3::Error::Refused);

  const auto exists = [](std::vector<Script::Line> lines) {
    Script script(std::move(lines));
    Store store(script);
    bool found = false;
    const s3::Error error = store.error([&]() -> awaitable<int> {
      found = co_await store.bucket.exists("key");
      co_return 0;
    });
    return std::string(error.what()) == "no error"   ? found ? "yes" : "no"
           : error.kind() == s3::Error::NoSuchBucket ? "no bucket"
                                                     : "error";
  };
  CHECK(exists({{200}}) == std::string("yes"));
  CHECK(exists({{404}, {200}}) == std::string("no"));
  CHECK(exists({{404}, {404}}) == std::string("no bucket"));
  CHECK(exists({{404}, {403}}) == std::string("error"));
  CHECK(exists({{403}}) == std::string("error"));
}

TEST_CASE("s3: removing what does not exist is no error, if the bucket does") {
  const auto error_of_remove = [](const std::string& code) {
    Script script({{404, error_xml(code)}});
    Store store(script);
    return store.error([&]() -> awaitable<int> {
      co_await store.bucket.remove("key");
      co_return 0;
    });
  };
  CHECK(std::string(error_of_remove("NoSuchKey").what()) == "no error");
  CHECK(error_of_remove("NoSuchBucket").kind() == s3::Error::NoSuchBucket);
}

TEST_CASE("s3: errors that may pass are retried, and then the server is unavailable") {
  for (const Script::Line& line :
       {Script::Line{400, error_xml("RequestTimeout")}, Script::Line{503, error_xml("SlowDown")},
        Script::Line{500, error_xml("InternalError")}, Script::Line{429}, Script::Line{408},
        Script::Line{400, error_xml("ThrottlingException")}, Script::Line{409, error_xml("OperationAborted")}}) {
    CAPTURE(line.status, line.body);
    Script once({line, {200}});
    CHECK(std::string(Store(once).error_of_put().what()) == "no error");
    CHECK(once.requests.size() == 2);
    Script always({line});
    CHECK(Store(always).error_of_get().kind() == s3::Error::Unavailable);
    CHECK(always.requests.size() == 4);
  }
  for (const Script::Line& line :
       {Script::Line{403, error_xml("AccessDenied")}, Script::Line{400, error_xml("InvalidArgument")},
        Script::Line{501, error_xml("NotImplemented")}, Script::Line{505},
        Script::Line{412, error_xml("PreconditionFailed")}}) {
    CAPTURE(line.status, line.body);
    Script script({line});
    CHECK(Store(script).error_of_put().kind() == s3::Error::Refused);
    CHECK(script.requests.size() == 1);
  }
}

TEST_CASE("s3: the message names the request, for the server's support") {
  Script script({{403, {}, "x-amz-request-id: 4442587FB7D0A2F9\r\n"}});
  CHECK(std::string(Store(script).error_of_get().what()) == "status 403, request 4442587FB7D0A2F9");
}

TEST_CASE("s3: create does not mind another that was faster") {
  Script script({{404}, {409, error_xml("BucketAlreadyOwnedByYou")}});
  Store store(script);
  store.run([&] { return store.bucket.create(); });
  Script other({{404}, {409, error_xml("BucketAlreadyExists")}});
  Store of_others(other);
  CHECK(of_others
            .error([&]() -> awaitable<int> {
              co_await of_others.bucket.create();
              co_return 0;
            })
            .kind() == s3::Error::Refused);
}

// ---------------------------------------------------------------------------------------------------------------------
// Other regions

TEST_CASE("s3: a bucket in another region is found, and later requests go there at once") {
  const std::string header = "x-amz-bucket-region: " + std::string(region) + "\r\n";
  for (const Script::Line& line :
       {Script::Line{301, error_xml("PermanentRedirect"), header}, Script::Line{301, {}, header},
        Script::Line{400, {}, header},
        Script::Line{400, error_xml("AuthorizationHeaderMalformed", "<Region>" + std::string(region) + "</Region>")}}) {
    Script script({line, {200}});
    Store store(script);
    s3::Settings settings = store.settings;
    settings.region = "eu-test-2";
    store.run([&]() -> awaitable<void> {
      s3::Bucket elsewhere(store.bridge.get_executor(), settings, Store::options());
      const s3::Content content(4, [] { return curl::from_memory("text"); });
      co_await elsewhere.put("key", content, sha256("text"));
      const bool exists = co_await elsewhere.exists("key");
      if (!exists) throw std::runtime_error("it is not there");
    });
    REQUIRE(script.requests.size() == 3);
    CHECK_FALSE(script.objections[0].empty());
    CHECK(script.objections[1].empty());
    CHECK(script.objections[2].empty());
  }
}

TEST_CASE("s3: the hosts of other regions") {
  CHECK(s3::in_region("https://s3.eu-central-1.amazonaws.com/b/k", "eu-central-1", "us-west-2") ==
        "https://s3.us-west-2.amazonaws.com/b/k");
  CHECK(s3::in_region("https://s3.dualstack.eu-central-1.amazonaws.com", "eu-central-1", "us-west-2") ==
        "https://s3.dualstack.us-west-2.amazonaws.com");
  CHECK(s3::in_region("https://s3.amazonaws.com", "us-east-1", "us-west-2") == "https://s3.us-west-2.amazonaws.com");
  CHECK(s3::in_region("http://minio:9000/a.us-east-1.amazonaws.com", "us-east-1", "us-west-2") ==
        "http://minio:9000/a.us-east-1.amazonaws.com");
}

TEST_CASE("s3: a redirect to another place is followed, and signed anew") {
  Script script({{307, error_xml("TemporaryRedirect"), "Location: /elsewhere/my%20bucket/k%2Bey\r\n"}, {200}});
  Store store(script);
  CHECK(std::string(store.error_of_put().what()) == "no error");
  CHECK(script.requests == std::vector<std::string>{"PUT /my%20bucket/key", "PUT /elsewhere/my%20bucket/k%2Bey"});
  CHECK(script.objections == std::vector<std::string>{"", ""});
  CHECK(script.headers["content-length"] == "4");
}

TEST_CASE("s3: a redirect that cannot be followed is an error that says where to") {
  const std::string here = "x-amz-bucket-region: " + std::string(region) + "\r\n";
  Script same({{301, error_xml("PermanentRedirect"), here}});
  CHECK(std::string(Store(same).error_of_get().what()) ==
        "status 301, PermanentRedirect, the bucket's region is eu-test-1");
  CHECK(same.requests.size() == 1);
  Script circle({{307, {}, "Location: /my%20bucket/key\r\n"}});
  const s3::Error error = Store(circle).error_of_get();
  CHECK(error.kind() == s3::Error::Refused);
  CHECK(std::string(error.what()) == "status 307, to /my%20bucket/key");
  CHECK(circle.requests.size() == 6);
  Script file({{307, {}, "Location: file:///etc/hostname\r\n"}});
  CHECK(Store(file).error_of_get().status() == 307);
  Script strange({{301, {}, "x-amz-bucket-region: a:b/c\r\n"}});
  CHECK(Store(strange).error_of_get().status() == 301);
  CHECK(strange.requests.size() == 1);
}

TEST_CASE("s3: a wrong clock is corrected") {
  const std::string skewed = error_xml("RequestTimeTooSkewed");
  Script script({{403, skewed, "Date: Fri, 24 May 2030 00:00:00 GMT\r\n"}, {200}});
  Store store(script);
  CHECK(std::string(store.error_of_put().what()) == "no error");
  CHECK(script.headers["x-amz-date"].starts_with("20300524T0000"));
  CHECK(std::string(store.error_of_put().what()) == "no error");
  CHECK(script.headers["x-amz-date"].starts_with("20300524T0000"));
  CHECK(script.objections == std::vector<std::string>{"", "", ""});
  Script no_date({{403, skewed}});
  CHECK(Store(no_date).error_of_put().kind() == s3::Error::Refused);
  CHECK(no_date.requests.size() == 1);
}

// ---------------------------------------------------------------------------------------------------------------------
// Settings and keys

TEST_CASE("s3: endpoints") {
  const auto url = [](const std::string& endpoint) {
    return s3::request({endpoint, region, "b", id, secret}, "GET", "k/%").url;
  };
  CHECK(url("https://host") == "https://host/b/k/%25");
  CHECK(url("http://host:9000/") == "http://host:9000/b/k/%25");
  CHECK(url("http://[::1]:9000//") == "http://[::1]:9000/b/k/%25");
  CHECK(url("http://host/a%20path/") == "http://host/a%20path/b/k/%25");
  for (const char* wrong : {"", "host", "host:9000", "ftp://host", "http://", "https:///", "http://user@host",
                            "http://host?a=b", "http://host/#a", "http://host /"}) {
    CAPTURE(wrong);
    CHECK_THROWS_AS(url(wrong), s3::Error);
  }

  FakeS3 s3;
  Store store(s3);
  s3::Settings settings = store.settings;
  settings.endpoint += '/';
  CHECK(store.fetch(s3::request(settings, "HEAD", "")) == 200);
  settings.region.clear();
  const auto nowhere = [&]() -> awaitable<int> {
    s3::Bucket bucket(store.bridge.get_executor(), settings);
    co_await bucket.list("");
    co_return 0;
  };
  CHECK(store.error(nowhere).kind() == s3::Error::Refused);
}

TEST_CASE("s3: an empty key is refused, and is not a request for the bucket") {
  FakeS3 s3;
  Store store(s3);
  for (const std::string& key : {std::string(), std::string("a\0b", 3)}) {
    const s3::Content content(0, [] { return curl::from_memory(""); });
    CHECK(store.error([&] { return store.bucket.get(key); }).status() == 0);
    CHECK(store.error([&] { return store.bucket.exists(key); }).status() == 0);
    CHECK(store
              .error([&]() -> awaitable<int> {
                co_await store.bucket.remove(key);
                co_return 0;
              })
              .status() == 0);
    CHECK(store
              .error([&]() -> awaitable<int> {
                co_await store.bucket.put(key, content, sha256(""));
                co_return 0;
              })
              .status() == 0);
  }
  CHECK(s3.targets.empty());
}

// ---------------------------------------------------------------------------------------------------------------------
// Streams

namespace {

constexpr std::size_t mebibyte = std::size_t{1} << 20U;
constexpr std::size_t large = 64 * mebibyte;

/// A server with one large object, of which it keeps nothing in memory: this block again and again.
struct LargeObject {
  awaitable<bool> operator()(Exchange& exchange) {
    if (exchange.method == "PUT") {
      co_await exchange.invite();
      s3::Sha256 hash;
      while (received < exchange.length()) {
        const std::string piece = co_await exchange.some();
        hash.update(piece);
        received += piece.size();
      }
      hash_matches = exchange.headers["x-amz-content-sha256"] == hash.finish();
      co_await exchange.answer(hash_matches ? 200 : 400);
    } else {
      co_await exchange.write("HTTP/1.1 200 OK\r\nContent-Length: " + std::to_string(large) + "\r\n\r\n");
      while (sent < large) {
        co_await exchange.write(block.substr(0, large - sent));
        sent += std::min(block.size(), large - sent);
      }
    }
    co_return true;
  }

  const std::string block = [] {
    std::string text(65'521, '\0');
    for (std::size_t i = 0; i < text.size(); ++i) text[i] = static_cast<char>(i * i % 251);
    return text;
  }();
  bool hash_matches = false;
  std::atomic<std::size_t> received{0}, sent{0};
};

/// The peak memory use of this process.
std::size_t peak_memory() {
  rusage usage{};
  getrusage(RUSAGE_SELF, &usage);
  return static_cast<std::size_t>(usage.ru_maxrss) * 1024;
}
#ifdef SANITIZED
constexpr std::size_t memory_limit = 1024 * mebibyte;  // they keep freed memory
#else
constexpr std::size_t memory_limit = 16 * mebibyte;
#endif

auto reading(Pipe& pipe) {
  return [&pipe](asio::mutable_buffer room) { return pipe.read({static_cast<char*>(room.data()), room.size()}); };
}
auto writing(Pipe& pipe) {
  return [&pipe](asio::const_buffer bytes) {
    return pipe.write({static_cast<const char*>(bytes.data()), bytes.size()});
  };
}

}  // namespace

TEST_CASE("s3: 64 MiB through a std::ostream and a std::istream, with bounded memory") {
  LargeObject object;
  Store store(object);
  s3::Sha256 hash;
  for (std::size_t size = 0; size < large; size += object.block.size()) {
    hash.update(std::string_view(object.block).substr(0, large - size));
  }
  const std::size_t before = peak_memory();

  const auto up = std::make_shared<Pipe>(store.bridge.get_executor());
  auto upload = store.bridge.submit(
      [&, text = hash.finish()] { return store.bucket.put("key", s3::Content(large, s3::source_of(up)), text); });
  {
    runtime_bridge::ostream out(store.bridge, writing(*up), 1min);
    for (std::size_t size = 0; size < large; size += object.block.size()) {
      const std::string_view part = std::string_view(object.block).substr(0, large - size);
      out.write(part.data(), std::ssize(part));
    }
    CHECK(out.flush());
  }
  unwrap(upload.join());
  CHECK(object.received == large);
  CHECK(object.hash_matches);

  const auto down = std::make_shared<Pipe>(store.bridge.get_executor());
  auto download = store.bridge.submit([&]() -> awaitable<void> {
    co_await store.bucket.get("key", s3::sink_of(down));
    down->close();
  });
  // Nobody reads yet: the server must wait, too. (On a very slow machine it may only seem so.)
  std::size_t stalled = 0;
  do {
    stalled = object.sent;
    std::this_thread::sleep_for(200ms);
  } while (object.sent == 0 || object.sent != stalled);
  CHECK(object.sent < 16 * mebibyte);  // most of it in the kernel's socket buffers
  runtime_bridge::istream in(store.bridge, reading(*down), 1min);
  std::size_t received = 0, differences = 0;
  std::string room(10'000, '\0');
  while (in.read(room.data(), std::ssize(room)) || in.gcount() != 0) {
    for (std::size_t i = 0; i < static_cast<std::size_t>(in.gcount()); ++i) {
      if (room[i] != object.block[received++ % object.block.size()]) ++differences;
    }
  }
  CHECK_FALSE(in.error());
  unwrap(download.join());
  CHECK(received == large);
  CHECK(differences == 0);
  CHECK(peak_memory() - before < memory_limit);
}

TEST_CASE("s3: a std::ostream to a server that does not read fails by its deadline, with bounded memory") {
  const auto silent = [](const Exchange& exchange) -> awaitable<bool> {
    asio::steady_timer timer(co_await asio::this_coro::executor, 24h);
    co_await timer.async_wait(use_awaitable);
    co_return exchange.method.empty();
  };
  Store store(silent);
  const auto pipe = std::make_shared<Pipe>(store.bridge.get_executor());
  auto upload = store.bridge.submit(
      [&] { return store.bucket.put("key", s3::Content(large, s3::source_of(pipe)), sha256("other")); });
  runtime_bridge::ostream out(store.bridge, writing(*pipe), 500ms);
  const std::string block(65536, 'x');
  std::size_t written = 0;
  while (out.write(block.data(), std::ssize(block))) written += block.size();
  CHECK(*out.error() == BridgeError::TimedOut);
  CHECK(written < 16 * mebibyte);
  // The transfer waits for more. Its handle ends it.
  CHECK(store.bridge.in_flight() == 1);
  upload.request_stop();
  CHECK(outcome(upload.join()) == BridgeError::Cancelled);
}

TEST_CASE("s3: a stream tells the error of its transfer, which is retried until the first byte") {
  Script missing({{404, error_xml("NoSuchKey")}});
  Store store(missing);
  const auto down = std::make_shared<Pipe>(store.bridge.get_executor());
  const auto get = [&]() -> awaitable<void> {
    try {
      co_await store.bucket.get("key", s3::sink_of(down));
      down->close();
    } catch (...) {
      down->close(std::current_exception());
    }
  };
  auto download = store.bridge.submit(get);
  runtime_bridge::istream in(store.bridge, reading(*down), 1min);
  CHECK(in.get() == EOF);
  CHECK(in.bad());
  CHECK_FALSE(in.eof());
  CHECK_THROWS_AS(std::rethrow_exception(in.error()->cause()), s3::Error);
  unwrap(download.join());

  Script later({{503, error_xml("SlowDown")}, {200, "content"}});
  Store other(later);
  const auto pipe = std::make_shared<Pipe>(other.bridge.get_executor());
  auto second = other.bridge.submit([&]() -> awaitable<void> {
    co_await other.bucket.get("key", s3::sink_of(pipe));
    pipe->close();
  });
  runtime_bridge::istream content(other.bridge, reading(*pipe), 1min);
  CHECK(std::string(std::istreambuf_iterator<char>(content), {}) == "content");
  unwrap(second.join());

  // What was given to a stream cannot be sent again, neither after a redirect nor after an error.
  for (const Script::Line& line :
       {Script::Line{503, error_xml("SlowDown")}, Script::Line{307, {}, "Location: /elsewhere/my%20bucket/key\r\n"}}) {
    Script refusing({line, {200}});
    Store third(refusing);
    const auto up = std::make_shared<Pipe>(third.bridge.get_executor());
    auto upload =
        third.bridge.submit([&] { return third.bucket.put("key", s3::Content(4, s3::source_of(up)), sha256("text")); });
    runtime_bridge::ostream out(third.bridge, writing(*up), 1min);
    out << "text" << std::flush;
    CHECK_FALSE(upload.join().has_value());
    CHECK(refusing.requests.size() == 1);
  }
}
