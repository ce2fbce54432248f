// SPDX-License-Identifier: Apache-2.0
//
// The file of a program that compiles the library's functions once: see README.md.

#include <runtime_bridge/src.hpp>
