// SPDX-License-Identifier: Apache-2.0

#define RUNTIME_BRIDGE_USE_BOOST_ASIO
#include <runtime_bridge/src.hpp>
