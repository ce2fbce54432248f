// SPDX-License-Identifier: Apache-2.0
//
// For programs that define RUNTIME_BRIDGE_SEPARATE_COMPILATION in all their files: include this in one of them, before
// runtime_bridge.hpp. That file compiles what does not depend on tasks, and the others compile faster.

#if !defined(RUNTIME_BRIDGE_SEPARATE_COMPILATION)
#error "runtime_bridge/src.hpp is for programs that define RUNTIME_BRIDGE_SEPARATE_COMPILATION in all their files"
#elif defined(RUNTIME_BRIDGE_HPP)
#error "include runtime_bridge/src.hpp before runtime_bridge.hpp, or in a file of its own"
#endif

#define RUNTIME_BRIDGE_SOURCE
#include "../runtime_bridge.hpp"
