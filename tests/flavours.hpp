// SPDX-License-Identifier: Apache-2.0
//
// What the files of flavours_test know of each other. Each has a flavour of the header: standalone Asio or Boost.Asio,
// with tl::expected or std::expected.

#ifndef RUNTIME_BRIDGE_TESTS_FLAVOURS_HPP
#define RUNTIME_BRIDGE_TESTS_FLAVOURS_HPP

#include <functional>
#include <memory>
#include <runtime_bridge.hpp>
#include <variant>

/// A bridge of some flavour.
class Peer {
 public:
  Peer() = default;
  Peer(const Peer&) = delete;
  Peer& operator=(const Peer&) = delete;
  virtual ~Peer() = default;

  /// Calls the function in a task.
  virtual std::variant<int, runtime_bridge::BridgeError> call(const std::function<int()>& function) const = 0;
};

#endif  // RUNTIME_BRIDGE_TESTS_FLAVOURS_HPP
