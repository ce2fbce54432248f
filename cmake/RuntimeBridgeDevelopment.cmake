# SPDX-License-Identifier: Apache-2.0
#
# Compiler flags of this project's own tests and examples: link them with runtime_bridge_warnings. Users of the library
# get none of them.

set(RUNTIME_BRIDGE_SANITIZER "" CACHE STRING "address (with undefined behaviour), thread, or nothing")
set_property(CACHE RUNTIME_BRIDGE_SANITIZER PROPERTY STRINGS "" address thread)

# Flags for all files of a program, including the projects in tests/consumers.
set(RUNTIME_BRIDGE_PROGRAM_FLAGS "")

if(RUNTIME_BRIDGE_SANITIZER STREQUAL "address")
  # No vptr: this check reads memory through a pipe. If no file descriptor is left, it reports a good object as bad.
  set(RUNTIME_BRIDGE_PROGRAM_FLAGS
    -fsanitize=address,undefined,float-cast-overflow -fno-sanitize=vptr -fno-sanitize-recover=all
    -fno-omit-frame-pointer)
  if(CMAKE_CXX_COMPILER_ID STREQUAL "GNU")
    # With these checks, g++ gives false warnings, for example about Catch2's <regex>.
    list(APPEND RUNTIME_BRIDGE_PROGRAM_FLAGS -Wno-maybe-uninitialized)
    # These two take a third of g++'s compile time. They are cheaper with clang, and the leg clang-asan has them.
    list(APPEND RUNTIME_BRIDGE_PROGRAM_FLAGS -fno-sanitize=null,alignment)
  elseif(CMAKE_CXX_COMPILER_ID MATCHES "Clang")
    # clang 14 produces assembly for this check that it cannot assemble for coroutines.
    list(APPEND RUNTIME_BRIDGE_PROGRAM_FLAGS -fno-sanitize=function)
  endif()
elseif(RUNTIME_BRIDGE_SANITIZER STREQUAL "thread")
  set(RUNTIME_BRIDGE_PROGRAM_FLAGS -fsanitize=thread -fno-omit-frame-pointer)
  if(CMAKE_CXX_COMPILER_ID STREQUAL "GNU")
    # g++ warns about the atomic_thread_fence in Asio, which TSan does not support.
    list(APPEND RUNTIME_BRIDGE_PROGRAM_FLAGS -Wno-tsan)
  endif()
elseif(RUNTIME_BRIDGE_SANITIZER)
  message(FATAL_ERROR "RUNTIME_BRIDGE_SANITIZER is \"${RUNTIME_BRIDGE_SANITIZER}\": it must be address, thread or empty")
endif()

# Libraries of the examples, and of the tests of their support headers.
find_package(CLI11 QUIET)
find_package(PostgreSQL QUIET)
find_package(CURL 7.75 QUIET)  # the first version with CURLOPT_AWS_SIGV4
find_package(OpenSSL QUIET COMPONENTS Crypto)
find_package(pugixml QUIET)

# Asio before 1.24 does not detect that clang has coroutines.
function(runtime_bridge_check_coroutines)
  include(CheckCXXSourceCompiles)
  set(CMAKE_REQUIRED_QUIET TRUE)
  set(CMAKE_REQUIRED_LIBRARIES runtime_bridge::asio_headers)
  if(NOT CMAKE_CXX_STANDARD)
    set(CMAKE_CXX_STANDARD 20)
  endif()
  unset(RUNTIME_BRIDGE_ASIO_SEES_COROUTINES CACHE)  # a different Asio may have been chosen since
  check_cxx_source_compiles(
    "#include <asio/detail/config.hpp>\n#ifndef ASIO_HAS_CO_AWAIT\n#error\n#endif\nint main() {}"
    RUNTIME_BRIDGE_ASIO_SEES_COROUTINES)
endfunction()
if(CMAKE_CXX_COMPILER_ID MATCHES "Clang" AND TARGET runtime_bridge::asio_headers)
  runtime_bridge_check_coroutines()
  if(NOT RUNTIME_BRIDGE_ASIO_SEES_COROUTINES)
    list(APPEND RUNTIME_BRIDGE_PROGRAM_FLAGS -DASIO_HAS_CO_AWAIT=1 -DASIO_HAS_STD_COROUTINE=1)
  endif()
endif()

add_library(runtime_bridge_warnings INTERFACE)
target_compile_options(runtime_bridge_warnings INTERFACE
  -Wall -Wextra -Wpedantic -Wshadow -Wconversion -Werror ${RUNTIME_BRIDGE_PROGRAM_FLAGS})
target_link_options(runtime_bridge_warnings INTERFACE ${RUNTIME_BRIDGE_PROGRAM_FLAGS})
if(RUNTIME_BRIDGE_SANITIZER STREQUAL "thread" AND CMAKE_CXX_COMPILER_ID MATCHES "Clang")
  # clang++ links TSan's C++ runtime first. It defines operator new, which would replace the one that a test defines.
  # Nothing else in it is needed, and the driver for C does not link it.
  target_link_options(runtime_bridge_warnings INTERFACE --driver-mode=gcc)
  target_link_libraries(runtime_bridge_warnings INTERFACE ${CMAKE_CXX_IMPLICIT_LINK_LIBRARIES})
endif()
