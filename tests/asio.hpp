// SPDX-License-Identifier: Apache-2.0
//
// The header, and what tests use of Asio: standalone Asio, or Boost.Asio if RUNTIME_BRIDGE_USE_BOOST_ASIO is defined.
// Below this file all tests say `asio`, `AsioError`, `ErrorCode` and `ASIO_VERSION` for both.

#ifndef RUNTIME_BRIDGE_TESTS_ASIO_HPP
#define RUNTIME_BRIDGE_TESTS_ASIO_HPP

#include <runtime_bridge.hpp>

#include <system_error>

#ifdef RUNTIME_BRIDGE_USE_BOOST_ASIO
// NOLINTNEXTLINE(bugprone-macro-parentheses)
#define ASIO(header) <boost/asio/header>
#define ASIO_VERSION BOOST_ASIO_VERSION
#ifdef BOOST_ASIO_HAS_STD_ALIGNED_ALLOC
#define ASIO_HAS_STD_ALIGNED_ALLOC
#endif
#else
// NOLINTNEXTLINE(bugprone-macro-parentheses)
#define ASIO(header) <asio/header>
#endif

// It puts spaces around the slashes.
// clang-format off
#include ASIO(any_io_executor.hpp)
#include ASIO(bind_cancellation_slot.hpp)
#include ASIO(bind_executor.hpp)
#include ASIO(buffer.hpp)
#include ASIO(co_spawn.hpp)
#include ASIO(detached.hpp)
#include ASIO(dispatch.hpp)
#include ASIO(error.hpp)
#include ASIO(executor_work_guard.hpp)
#include ASIO(experimental/awaitable_operators.hpp)
#include ASIO(experimental/channel.hpp)
#include ASIO(experimental/channel_error.hpp)
#include ASIO(experimental/concurrent_channel.hpp)
#include ASIO(experimental/parallel_group.hpp)
#include ASIO(ip/icmp.hpp)
#include ASIO(ip/tcp.hpp)
#include ASIO(ip/udp.hpp)
#include ASIO(local/connect_pair.hpp)
#include ASIO(local/stream_protocol.hpp)
#include ASIO(multiple_exceptions.hpp)
#include ASIO(post.hpp)
#include ASIO(read.hpp)
#include ASIO(signal_set.hpp)
#include ASIO(steady_timer.hpp)
#include ASIO(strand.hpp)
#include ASIO(this_coro.hpp)
#include ASIO(thread_pool.hpp)
#include ASIO(use_future.hpp)
#include ASIO(write.hpp)
#if ASIO_VERSION < 102400
#include ASIO(experimental/as_tuple.hpp)
#include ASIO(experimental/deferred.hpp)
namespace asio {
using experimental::as_tuple_t;
using experimental::deferred;
}  // namespace asio
#else
#include ASIO(as_tuple.hpp)
#include ASIO(deferred.hpp)
#endif
#if ASIO_VERSION >= 103400
#include ASIO(cancel_after.hpp)
#include ASIO(cancel_at.hpp)
#endif
// With clang it requires a return value from a coroutine that returns void.
#ifndef __clang__
#include ASIO(experimental/coro.hpp)
#include ASIO(experimental/use_coro.hpp)
#endif
// clang-format on

#ifdef RUNTIME_BRIDGE_USE_BOOST_ASIO
namespace asio = boost::asio;
using AsioError = boost::system::system_error;
using ErrorCode = boost::system::error_code;
#else
using AsioError = std::system_error;
using ErrorCode = std::error_code;
#endif

#endif  // RUNTIME_BRIDGE_TESTS_ASIO_HPP
