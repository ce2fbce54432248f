# SPDX-License-Identifier: Apache-2.0
#
# find_package(runtime_bridge [COMPONENTS asio|boost...]) defines runtime_bridge::runtime_bridge for asio, which is the
# default, and runtime_bridge::boost for boost.

include("${CMAKE_CURRENT_LIST_DIR}/RuntimeBridgeDependencies.cmake")
if(NOT runtime_bridge_FIND_COMPONENTS)
  set(runtime_bridge_FIND_COMPONENTS asio)
  set(runtime_bridge_FIND_REQUIRED_asio TRUE)
endif()
foreach(component IN LISTS runtime_bridge_FIND_COMPONENTS)
  runtime_bridge_find_dependencies(${component})
  if(NOT RUNTIME_BRIDGE_MISSING)
    include("${CMAKE_CURRENT_LIST_DIR}/runtime_bridge-${component}.cmake")
    set(runtime_bridge_${component}_FOUND TRUE)
  elseif(runtime_bridge_FIND_REQUIRED_${component})
    set(runtime_bridge_FOUND FALSE)
    string(APPEND runtime_bridge_NOT_FOUND_MESSAGE "${RUNTIME_BRIDGE_MISSING}")
  endif()
endforeach()
