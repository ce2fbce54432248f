# SPDX-License-Identifier: Apache-2.0
#
# Checks the code blocks of README.md and of the pages in docs/. Each C++ block must be in one of the files below, which
# are compiled, apart from indentation. The command of each console block must be one whose output
# tests/examples/CMakeLists.txt compares with the page.

file(GLOB files RELATIVE ${REPOSITORY} ${REPOSITORY}/examples/*.cpp ${REPOSITORY}/examples/support/*.hpp)
list(APPEND files tests/readme_test.cpp tests/migrating_test.cpp tests/examples/migrating_mysql.cpp
  tests/consumers/separate_compilation.cpp)
set(code "")
foreach(file IN LISTS files)
  file(READ ${REPOSITORY}/${file} text)
  string(APPEND code "\n${text}")
endforeach()
string(REGEX REPLACE "\n +" "\n" code "${code}")

file(READ ${REPOSITORY}/tests/examples/CMakeLists.txt commands)
string(REPLACE "\\\"" "\"" commands "${commands}")

function(expect_in text part problem)
  string(FIND "${text}" "${part}" position)
  if(position EQUAL -1)
    message(FATAL_ERROR "${page}: ${problem}")
  endif()
endfunction()

include(${CMAKE_CURRENT_LIST_DIR}/blocks.cmake)
file(GLOB pages RELATIVE ${REPOSITORY} ${REPOSITORY}/docs/*.md)
foreach(page IN ITEMS README.md ${pages})
  find_blocks(${REPOSITORY}/${page} cpp)
  foreach(block IN LISTS blocks)
    string(REGEX REPLACE "(^|\n) +" "\\1" lines "${${block}}")
    expect_in("${code}" "\n${lines}" "this block is not in any compiled file:\n${${block}}")
  endforeach()
  find_blocks(${REPOSITORY}/${page} console)
  foreach(block IN LISTS blocks)
    string(REGEX REPLACE "^\\$ ([^\n]*)\n.*" "\\1" command "${${block}}")
    expect_in("${commands}" "\"${command}\"" "no test compares the output of: ${command}")
  endforeach()
endforeach()
