// SPDX-License-Identifier: Apache-2.0

#ifndef RUNTIME_BRIDGE_TESTS_OTHER_HPP
#define RUNTIME_BRIDGE_TESTS_OTHER_HPP

#include <runtime_bridge.hpp>
#include <system_error>

// Asio 1.22.1 decides this by what was included before it. Where two units differ, memory is freed in another way than
// it was allocated.
#ifdef ASIO_HAS_STD_ALIGNED_ALLOC
constexpr bool asio_aligns = true;
#else
constexpr bool asio_aligns = false;
#endif

// The other unit's view of the library.
namespace other {

const std::error_category& category();
bool asio_aligns();
runtime_bridge::RuntimeBridge make_bridge();
runtime_bridge::Result<int> call(const runtime_bridge::RuntimeBridge& bridge);

}  // namespace other

#endif  // RUNTIME_BRIDGE_TESTS_OTHER_HPP
