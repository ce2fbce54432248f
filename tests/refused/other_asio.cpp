// SPDX-License-Identifier: Apache-2.0
//
// Gives a bridge on Boost.Asio an awaitable of standalone Asio, or the other way round.

#include <runtime_bridge.hpp>
#ifdef RUNTIME_BRIDGE_USE_BOOST_ASIO
#include <asio/awaitable.hpp>
asio::awaitable<int> task();
#else
#include <boost/asio/awaitable.hpp>
boost::asio::awaitable<int> task();
#endif

int main() { (void)runtime_bridge::RuntimeBridge().block_on(task()); }
