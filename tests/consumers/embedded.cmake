# SPDX-License-Identifier: Apache-2.0
#
# Nothing but the library itself may come along with it.

get_property(targets DIRECTORY ${runtime_bridge_SOURCE_DIR} PROPERTY BUILDSYSTEM_TARGETS)
if(NOT targets STREQUAL "runtime_bridge")
  message(FATAL_ERROR "the library brought targets of its own: ${targets}")
endif()
if(DEFINED BUILD_TESTING OR DEFINED CACHE{BUILD_TESTING})
  message(FATAL_ERROR "the library defined BUILD_TESTING")
endif()
