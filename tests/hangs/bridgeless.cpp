// SPDX-License-Identifier: Apache-2.0
//
// A program that does not use the library, and stops for a debugger.

#include <csignal>

int main() { return std::raise(SIGTRAP); }
