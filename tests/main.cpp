// SPDX-License-Identifier: Apache-2.0
//
// The main of Catch2 2; version 3 has one of its own.

#define CATCH_CONFIG_MAIN
#include <catch2/catch.hpp>
