// SPDX-License-Identifier: Apache-2.0
//
// What the support headers need of Asio, standalone or, with RUNTIME_BRIDGE_USE_BOOST_ASIO, Boost's: `asio` names
// either.

#ifndef RUNTIME_BRIDGE_EXAMPLES_ASIO_HPP
#define RUNTIME_BRIDGE_EXAMPLES_ASIO_HPP

#include <version>  // before Asio 1.22.1

#ifdef RUNTIME_BRIDGE_USE_BOOST_ASIO
#include <boost/asio/awaitable.hpp>
namespace asio = boost::asio;
#else
#include <asio/awaitable.hpp>
#endif

#endif  // RUNTIME_BRIDGE_EXAMPLES_ASIO_HPP
