# SPDX-License-Identifier: Apache-2.0
#
# A project that embeds the library must get no other targets and no BUILD_TESTING.

get_property(targets DIRECTORY ${runtime_bridge_SOURCE_DIR} PROPERTY BUILDSYSTEM_TARGETS)
if(NOT targets STREQUAL "runtime_bridge;runtime_bridge_boost")
  message(FATAL_ERROR "the library brought targets of its own: ${targets}")
endif()
if(DEFINED BUILD_TESTING OR DEFINED CACHE{BUILD_TESTING})
  message(FATAL_ERROR "the library defined BUILD_TESTING")
endif()
