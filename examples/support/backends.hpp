// SPDX-License-Identifier: Apache-2.0
//
// The interfaces that a program with storage uses: synchronous, called from any thread.

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
    // Nothing was changed.
    Refused,      ///< The server refused the request, or the request cannot be sent.
    NotFound,     ///< The object does not exist.
    WrongThread,  ///< The call would wait for itself: it was made by a task of the same backend.
    // A change may or may not have been made.
    PartlyDone,     ///< Something was refused after earlier statements of the same call had taken effect.
    Corrupt,        ///< The object's content is not what was stored.
    BadAnswer,      ///< The server answered, but not what was asked for.
    Unavailable,    ///< The server could not be reached, or the connection was lost.
    CommitUnknown,  ///< The connection was lost during COMMIT: the whole transaction took effect, or none of it.
    TimedOut,       ///< The call took too long.
    Stopped,        ///< The backend is being shut down.
    Failed,         ///< Something on this side failed: a callback of the caller, memory, a thread.
  } kind = Failed;
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

/// Turns the bridge's errors into the backend's own.
template <class T>
Outcome<T> flatten(runtime_bridge::Result<Outcome<T>> result) {
  using runtime_bridge::BridgeError;
  if (result) return *std::move(result);
  const BridgeError& error = result.error();
  BackendError::Kind kind = error.cause() ? BackendError::Failed : BackendError::Stopped;
  if (error == BridgeError::TimedOut) kind = BackendError::TimedOut;
  if (error == BridgeError::WouldDeadlock) kind = BackendError::WrongThread;
  return Failure({kind, error.message()});
}

/// References: names with values. Functions that change something return whether they did.
class RefBackend {
 public:
  virtual ~RefBackend() = default;
  virtual Outcome<std::optional<std::string>> get(const std::string& name) = 0;
  virtual Outcome<bool> set(const std::string& name, const std::string& value) = 0;
  /// Sets the reference if it has the expected value, or, with no expected value, if it does not exist.
  virtual Outcome<bool> compare_and_set(const std::string& name, const std::optional<std::string>& expected,
                                        const std::string& value) = 0;
  virtual Outcome<bool> remove(const std::string& name) = 0;
  /// The names that start with the prefix, sorted.
  virtual Outcome<std::vector<std::string>> list(const std::string& prefix) = 0;
};

/// The operations of one append. Batches are numbered 1, 2, 3, ... in commit order.
struct Batch {
  enum Mark { Done, Undone, Discarded };  ///< as in an editor: an undone batch can be redone until the next append

  std::int64_t number = 0;
  std::string transaction_id = {};
  std::vector<std::string> operations = {};
  Mark mark = Done;
};

/// A log of operations. Batches are appended to it, and can be marked as undone.
class OpLogBackend {
 public:
  virtual ~OpLogBackend() = default;
  /// Appends a batch and returns its number. Undone batches are discarded. If the log already has a batch with this id,
  /// it appends nothing and returns that batch's number, so after an error just call it again.
  virtual Outcome<std::int64_t> append(const std::vector<std::string>& operations,
                                       const std::string& transaction_id) = 0;
  /// The last batches, newest first.
  virtual Outcome<std::vector<Batch>> recent(int count) = 0;
  /// Marks the newest done batch as undone and returns its number, or nothing if there is none. If the outcome is
  /// unknown, look at `recent` before you call this again. The same applies to `redo`.
  virtual Outcome<std::optional<std::int64_t>> undo() = 0;
  /// Marks the batch that was undone last as done.
  virtual Outcome<std::optional<std::int64_t>> redo() = 0;
};

/// Objects. Each one's address is the SHA-256 of its content, in hexadecimal.
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
