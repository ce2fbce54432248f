// SPDX-License-Identifier: Apache-2.0
//
// What a program that uses Boost.Redis has to compile once.

#include <boost/redis/src.hpp>
