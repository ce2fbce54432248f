# SPDX-License-Identifier: Apache-2.0
#
# Finds what the library is built on, both for the build and for the installed package.

# The project that includes this file may require an older CMake.
cmake_policy(VERSION 3.21)

# runtime_bridge_find(<name> TITLE <what it is> TARGETS <target>... PACKAGE <its CMake package> [<version>]
#                     HEADER <path> APT <package> [REPOSITORY <url> TAG <tag>] [MINIMUM <macro of HEADER> <value>]
#                     [UNLESS <macro of <version>>])
#
# Defines the target runtime_bridge::<name>_headers. Uses the first that exists of: a target of the project;
# RUNTIME_BRIDGE_<NAME>_INCLUDE_DIR; the dependency's CMake package; the system's headers; the repository, if there is
# one and RUNTIME_BRIDGE_FETCH_DEPENDENCIES is on. If it is not installed and the compiler defines the macro UNLESS, the
# dependency is not needed, and nothing is downloaded.
function(runtime_bridge_find name)
  cmake_parse_arguments(PARSE_ARGV 1 arg "" "TITLE;HEADER;APT;REPOSITORY;TAG;UNLESS" "TARGETS;PACKAGE;MINIMUM")
  string(TOUPPER "RUNTIME_BRIDGE_${name}_INCLUDE_DIR" dir)

  if(TARGET runtime_bridge::${name}_headers)
    return()
  endif()
  foreach(place IN ITEMS project package)
    if(place STREQUAL "package" AND NOT ${dir})
      find_package(${arg_PACKAGE} CONFIG QUIET)
    endif()
    foreach(target IN LISTS arg_TARGETS)
      if(TARGET ${target})
        add_library(runtime_bridge::${name}_headers INTERFACE IMPORTED)
        target_link_libraries(runtime_bridge::${name}_headers INTERFACE ${target})
        return()
      endif()
    endforeach()
  endforeach()

  find_path(${dir} NAMES ${arg_HEADER} DOC "The folder that has ${arg_HEADER}")
  set(found "${${dir}}")
  set(problem "")
  if(NOT found)
    set(problem "it was not found")
  elseif(NOT EXISTS "${found}/${arg_HEADER}")
    set(problem "${dir} is ${found}, which has no ${arg_HEADER}")
  elseif(arg_MINIMUM)
    list(POP_FRONT arg_MINIMUM macro)
    file(STRINGS "${found}/${arg_HEADER}" version REGEX "define ${macro} ")
    string(REGEX REPLACE ".*define ${macro} ([0-9]+).*" "\\1" version "0${version}")
    if(version LESS arg_MINIMUM)
      set(problem "the one in ${found} is too old (${macro} ${version}, ${arg_MINIMUM} is needed)")
    endif()
  endif()

  if(problem AND arg_UNLESS)
    include(CheckCXXSourceCompiles)
    set(CMAKE_REQUIRED_QUIET TRUE)
    check_cxx_source_compiles("#include <version>\n#ifndef ${arg_UNLESS}\n#error\n#endif\nint main() {}"
      RUNTIME_BRIDGE_HAS_${arg_UNLESS}_${CMAKE_CXX_STANDARD})
    if(RUNTIME_BRIDGE_HAS_${arg_UNLESS}_${CMAKE_CXX_STANDARD})
      add_library(runtime_bridge::${name}_headers INTERFACE IMPORTED)
      return()
    endif()
  endif()

  list(GET arg_PACKAGE 0 package)
  if(problem AND arg_REPOSITORY AND RUNTIME_BRIDGE_FETCH_DEPENDENCIES)
    include(FetchContent)
    # Only the headers are needed. A SOURCE_SUBDIR without CMakeLists.txt keeps the dependency from being built.
    FetchContent_Declare(${package}
      GIT_REPOSITORY ${arg_REPOSITORY} GIT_TAG ${arg_TAG} GIT_SHALLOW TRUE SOURCE_SUBDIR include)
    FetchContent_MakeAvailable(${package})
    find_path(fetched NAMES ${arg_HEADER} PATHS "${${package}_SOURCE_DIR}" PATH_SUFFIXES asio/include include
      NO_DEFAULT_PATH NO_CMAKE_FIND_ROOT_PATH NO_CACHE)
    if(fetched)
      set(found "${fetched}")
      set(problem "")
    else()
      set(problem "what was fetched to ${${package}_SOURCE_DIR} has no ${arg_HEADER}")
    endif()
  endif()

  if(NOT problem)
    add_library(runtime_bridge::${name}_headers INTERFACE IMPORTED)
    target_include_directories(runtime_bridge::${name}_headers INTERFACE "${found}")
    return()
  endif()
  list(GET arg_TARGETS 0 target)
  string(APPEND RUNTIME_BRIDGE_MISSING
    "runtime_bridge needs ${arg_TITLE}, and ${problem}. Any of these helps:\n"
    "  apt install ${arg_APT}\n"
    "  a target ${target} that the project makes before it adds or finds runtime_bridge\n"
    "  -D${dir}=<the folder that has ${arg_HEADER}>\n")
  if(arg_REPOSITORY)
    string(APPEND RUNTIME_BRIDGE_MISSING
      "  -DRUNTIME_BRIDGE_FETCH_DEPENDENCIES=ON, which downloads ${arg_TAG} of ${arg_REPOSITORY}\n")
  endif()
  if(arg_UNLESS)
    string(APPEND RUNTIME_BRIDGE_MISSING
      "  -DCMAKE_CXX_STANDARD=23, if the compiler then has ${arg_UNLESS} (g++ 12 has)\n")
  endif()
  set(RUNTIME_BRIDGE_MISSING "${RUNTIME_BRIDGE_MISSING}" PARENT_SCOPE)
endfunction()

# runtime_bridge_find_dependencies(<component>...)
#
# Finds what these components need: asio (the target runtime_bridge::runtime_bridge) and boost (runtime_bridge::boost).
# Sets RUNTIME_BRIDGE_MISSING to a message that says what is missing and how to get it, or to nothing.
function(runtime_bridge_find_dependencies)
  set(RUNTIME_BRIDGE_MISSING "")

  find_package(Threads QUIET)
  if(NOT Threads_FOUND)
    string(APPEND RUNTIME_BRIDGE_MISSING "runtime_bridge needs POSIX threads, and CMake's FindThreads found none.\n")
  endif()

  foreach(component IN LISTS ARGV)
    if(component STREQUAL "asio")
      runtime_bridge_find(asio
        TITLE "standalone Asio 1.22.1 or newer"
        TARGETS asio::asio asio
        PACKAGE asio
        HEADER asio/version.hpp
        MINIMUM ASIO_VERSION 102201
        APT libasio-dev
        REPOSITORY https://github.com/chriskohlhoff/asio.git
        TAG asio-1-30-2)
    elseif(component STREQUAL "boost")
      runtime_bridge_find(boost
        TITLE "Boost 1.81 or newer"
        TARGETS Boost::headers Boost::boost
        PACKAGE Boost 1.81
        HEADER boost/version.hpp
        MINIMUM BOOST_VERSION 108100
        APT "libboost-dev (libboost1.81-dev on Debian 12)")
    else()
      string(APPEND RUNTIME_BRIDGE_MISSING
        "runtime_bridge has no component \"${component}\". Its components are: asio, boost\n")
    endif()
  endforeach()

  runtime_bridge_find(expected
    TITLE "tl::expected, as there is no std::expected"
    TARGETS tl::expected tl-expected
    PACKAGE tl-expected
    HEADER tl/expected.hpp
    UNLESS __cpp_lib_expected
    APT libexpected-dev
    REPOSITORY https://github.com/TartanLlama/expected.git
    TAG v1.1.0)

  set(RUNTIME_BRIDGE_MISSING "${RUNTIME_BRIDGE_MISSING}" PARENT_SCOPE)
endfunction()
