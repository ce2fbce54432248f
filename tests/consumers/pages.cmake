# SPDX-License-Identifier: Apache-2.0
#
# Types what README.md and packaging/README.md say, in a project that has only main.cpp, the repository or its headers in
# third_party/, and the installed library. A part of run.cmake.

foreach(dir IN LISTS ASIO EXPECTED)
  if(NOT dir STREQUAL "/usr/include")
    message("skipped: the pages take Asio and tl::expected from the system")
    return()
  endif()
endforeach()
if(NOT COMPILER_ID STREQUAL "GNU" OR NOT PKG_CONFIG OR NOT MESON)
  message("skipped: g++, pkg-config or meson is missing")
  return()
endif()

include(${here}/../blocks.cmake)

function(begin_project name)
  set(project ${work}/${name})
  file(MAKE_DIRECTORY ${project}/third_party ${project}/subprojects)
  file(WRITE ${project}/main.cpp "#include <runtime_bridge.hpp>\nint main() { return RUNTIME_BRIDGE_VERSION_MAJOR; }\n")
  set(project ${project} PARENT_SCOPE)
endfunction()

set(ENV{CXX} ${COMPILER})
set(ENV{CMAKE_PREFIX_PATH} ${prefix})
set(ENV{PKG_CONFIG_PATH} ${prefix}/share/pkgconfig)

# Instead of the repository's address.
set(from_here -DFETCHCONTENT_SOURCE_DIR_RUNTIME_BRIDGE=${REPOSITORY})
foreach(page IN ITEMS README packaging/README)
  find_blocks(${REPOSITORY}/${page}.md cmake)
  if(NOT blocks)
    message(FATAL_ERROR "${page}.md has no CMake block")
  endif()
  foreach(block IN LISTS blocks)
    begin_project(${page}-${block})
    file(CREATE_LINK ${REPOSITORY} ${project}/third_party/runtime_bridge SYMBOLIC)
    file(WRITE ${project}/CMakeLists.txt "cmake_minimum_required(VERSION 3.21)\nproject(main LANGUAGES CXX)\n"
      "add_executable(main main.cpp)\n${${block}}")
    run(${CMAKE_COMMAND} -S ${project} -B ${project}/build --no-warn-unused-cli ${from_here})
    run(${CMAKE_COMMAND} --build ${project}/build)
    run(${project}/build/main)
  endforeach()
endforeach()

# The commands that compile main.cpp.
find_blocks(${REPOSITORY}/packaging/README.md sh)
set(compiled 0)
foreach(block IN LISTS blocks)
  if(${block} MATCHES "^g\\+\\+ ")
    math(EXPR compiled "${compiled} + 1")
    begin_project(command-${block})
    if(NOT ${block} MATCHES "pkg-config")
      file(COPY ${REPOSITORY}/include/runtime_bridge.hpp DESTINATION ${project}/third_party)
    endif()
    run(sh -c "cd ${project} && ${${block}}./a.out")
  endif()
endforeach()
if(NOT compiled EQUAL 2)
  message(FATAL_ERROR "packaging/README.md has ${compiled} commands that compile")
endif()

# The wrap file does not download what is there already.
begin_project(meson)
file(CREATE_LINK ${REPOSITORY} ${project}/subprojects/runtime_bridge SYMBOLIC)
find_blocks(${REPOSITORY}/packaging/README.md ini)
file(WRITE ${project}/subprojects/runtime_bridge.wrap "${block_1}")
find_blocks(${REPOSITORY}/packaging/README.md meson)
file(WRITE ${project}/meson.build "${block_1}")
run(${MESON} setup ${project}/build ${project} --wrap-mode=forcefallback)
run(${MESON} compile -C ${project}/build)
run(${project}/build/main)
