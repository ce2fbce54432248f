# SPDX-License-Identifier: Apache-2.0
#
# How this project's own tests and examples are compiled: link them with runtime_bridge_warnings. None of it reaches a
# user of the library.

set(RUNTIME_BRIDGE_SANITIZER "" CACHE STRING "address (with undefined behaviour), thread, or nothing")
set_property(CACHE RUNTIME_BRIDGE_SANITIZER PROPERTY STRINGS "" address thread)

# What all of a program must be compiled with, the consumers in tests/ included.
set(RUNTIME_BRIDGE_PROGRAM_FLAGS "")

if(RUNTIME_BRIDGE_SANITIZER STREQUAL "address")
  # Without vptr: it reads memory through a pipe, and takes the object for a bad one where no descriptor is left.
  set(RUNTIME_BRIDGE_PROGRAM_FLAGS
    -fsanitize=address,undefined,float-cast-overflow -fno-sanitize=vptr -fno-sanitize-recover=all
    -fno-omit-frame-pointer)
  if(CMAKE_CXX_COMPILER_ID STREQUAL "GNU")
    # Beside these checks g++ sees ghosts, in Catch2's <regex> for one.
    list(APPEND RUNTIME_BRIDGE_PROGRAM_FLAGS -Wno-maybe-uninitialized)
    # These two would take a third of the time that g++ needs. Clang has them cheaper, and in the matrix.
    list(APPEND RUNTIME_BRIDGE_PROGRAM_FLAGS -fno-sanitize=null,alignment)
  elseif(CMAKE_CXX_COMPILER_ID MATCHES "Clang")
    # clang 14 cannot assemble a coroutine that carries this check's marks.
    list(APPEND RUNTIME_BRIDGE_PROGRAM_FLAGS -fno-sanitize=function)
  endif()
elseif(RUNTIME_BRIDGE_SANITIZER STREQUAL "thread")
  set(RUNTIME_BRIDGE_PROGRAM_FLAGS -fsanitize=thread -fno-omit-frame-pointer)
  if(CMAKE_CXX_COMPILER_ID STREQUAL "GNU")
    # Asio has an atomic_thread_fence, about which g++ warns that it is not understood.
    list(APPEND RUNTIME_BRIDGE_PROGRAM_FLAGS -Wno-tsan)
  endif()
elseif(RUNTIME_BRIDGE_SANITIZER)
  message(FATAL_ERROR "RUNTIME_BRIDGE_SANITIZER is \"${RUNTIME_BRIDGE_SANITIZER}\": it must be address, thread or empty")
endif()

# The clients of the examples, and of the tests of their support headers.
find_package(PostgreSQL QUIET)
find_package(CURL 7.75 QUIET)  # the first with CURLOPT_AWS_SIGV4
find_package(OpenSSL QUIET COMPONENTS Crypto)

# Before 1.24 Asio does not see that clang has coroutines.
function(runtime_bridge_check_coroutines)
  include(CheckCXXSourceCompiles)
  set(CMAKE_REQUIRED_QUIET TRUE)
  set(CMAKE_REQUIRED_LIBRARIES runtime_bridge::asio)
  if(NOT CMAKE_CXX_STANDARD)
    set(CMAKE_CXX_STANDARD 20)
  endif()
  unset(RUNTIME_BRIDGE_ASIO_SEES_COROUTINES CACHE)  # the Asio may be another one by now
  check_cxx_source_compiles(
    "#include <asio/detail/config.hpp>\n#ifndef ASIO_HAS_CO_AWAIT\n#error\n#endif\nint main() {}"
    RUNTIME_BRIDGE_ASIO_SEES_COROUTINES)
endfunction()
if(CMAKE_CXX_COMPILER_ID MATCHES "Clang")
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
  # clang's runtime for C++ defines operator new and is first on the line: it would take the place of what a test
  # defines. Nothing else in it is used, and what drives C leaves it out.
  target_link_options(runtime_bridge_warnings INTERFACE --driver-mode=gcc)
  target_link_libraries(runtime_bridge_warnings INTERFACE ${CMAKE_CXX_IMPLICIT_LINK_LIBRARIES})
endif()
