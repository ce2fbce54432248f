// SPDX-License-Identifier: Apache-2.0
//
// What a program with storage is written against: synchronous, called from any thread.

#ifndef RUNTIME_BRIDGE_EXAMPLES_BACKENDS_HPP
#define RUNTIME_BRIDGE_EXAMPLES_BACKENDS_HPP

#include <runtime_bridge.hpp>

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>
#include <version>

#ifdef __cpp_lib_expected
#include <expected>
#else
#include <tl/expected.hpp>
#endif

struct BackendError {
  enum Kind {
    Refused,      ///< The server said no: nothing was changed.
    NotFound,     ///< There is no such thing.
    Corrupt,      ///< It is not what was put.
    Unavailable,  ///< The server is not there, or went away. As after the following two, a change may have been made or
                  ///< not.
    TimedOut,     ///< It took too long.
    Stopped,      ///< The backend is being shut down.
  } kind = Stopped;
  std::string message = {};
};

#ifdef __cpp_lib_expected
template <class T>
using Outcome = std::expected<T, BackendError>;
using Failure = std::unexpected<BackendError>;
#else
template <class T>
using Outcome = tl::expected<T, BackendError>;
using Failure = tl::unexpected<BackendError>;
#endif

// [readme]
/// What the bridge says of a call becomes the backend's own kind of error.
template <class T>
Outcome<T> flatten(runtime_bridge::Result<Outcome<T>> result) {
  if (result) return *std::move(result);
  const bool late = result.error() == runtime_bridge::BridgeError::TimedOut;
  return Failure({late ? BackendError::TimedOut : BackendError::Stopped, result.error().message()});
}
// [/readme]

/// References: names with values. What changes something returns whether it did.
class RefBackend {
 public:
  virtual ~RefBackend() = default;
  virtual Outcome<std::optional<std::string>> get(const std::string& name) = 0;
  virtual Outcome<bool> set(const std::string& name, const std::string& value) = 0;
  /// Sets it if its value is the expected one; without an expected one, if it does not exist.
  virtual Outcome<bool> compare_and_set(const std::string& name, const std::optional<std::string>& expected,
                                        const std::string& value) = 0;
  virtual Outcome<bool> remove(const std::string& name) = 0;
  /// The names that begin with the prefix, sorted.
  virtual Outcome<std::vector<std::string>> list(const std::string& prefix) = 0;
};

/// What was appended in one go. Its number tells its place in the log: 1, 2, 3, ... in the order of the commits.
struct Batch {
  enum Mark { Done, Undone, Discarded };  ///< as in an editor: what was undone can be redone, until the next append

  std::int64_t number = 0;
  std::string transaction_id = {};
  std::vector<std::string> operations = {};
  Mark mark = Done;
};

/// A log of operations that grows by batches, and in which batches are marked as undone.
class OpLogBackend {
 public:
  virtual ~OpLogBackend() = default;
  /// Appends a batch, and returns its number. With the id of a batch that is in the log it appends nothing and returns
  /// that one's number: after an error just call it again. What is undone at the time is discarded.
  virtual Outcome<std::int64_t> append(const std::vector<std::string>& operations,
                                       const std::string& transaction_id) = 0;
  /// The last batches, newest first.
  virtual Outcome<std::vector<Batch>> recent(int count) = 0;
  /// Marks the newest batch that is done as undone, and returns its number, if there is one. Not to be repeated
  /// blindly: look at `recent` first if the outcome is unknown. The same goes for `redo`.
  virtual Outcome<std::optional<std::int64_t>> undo() = 0;
  /// Marks as done the batch that was undone last.
  virtual Outcome<std::optional<std::int64_t>> redo() = 0;
};

/// Objects under the SHA-256 of their content, in hexadecimal.
class ObjectStore {
 public:
  virtual ~ObjectStore() = default;
  virtual Outcome<std::string> put(std::string_view content) = 0;
  virtual Outcome<std::string> get(const std::string& address) = 0;
  virtual Outcome<bool> has(const std::string& address) = 0;
  virtual Outcome<std::vector<std::string>> list() = 0;
  virtual Outcome<void> remove(const std::string& address) = 0;
};

#endif  // RUNTIME_BRIDGE_EXAMPLES_BACKENDS_HPP
