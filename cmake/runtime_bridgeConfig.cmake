# SPDX-License-Identifier: Apache-2.0

include("${CMAKE_CURRENT_LIST_DIR}/RuntimeBridgeDependencies.cmake")
if(RUNTIME_BRIDGE_MISSING)
  set(runtime_bridge_FOUND FALSE)
  set(runtime_bridge_NOT_FOUND_MESSAGE "${RUNTIME_BRIDGE_MISSING}")
  return()
endif()
include("${CMAKE_CURRENT_LIST_DIR}/runtime_bridgeTargets.cmake")
