// SPDX-License-Identifier: Apache-2.0
//
// Includes the header for both kinds of Asio.

#include <runtime_bridge.hpp>
#ifdef RUNTIME_BRIDGE_USE_BOOST_ASIO
#undef RUNTIME_BRIDGE_USE_BOOST_ASIO
#else
#define RUNTIME_BRIDGE_USE_BOOST_ASIO
#endif
#include <runtime_bridge.hpp>
