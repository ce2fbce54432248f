# SPDX-License-Identifier: Apache-2.0
#
# Checks the C++ blocks of README.md and of the pages in docs/: each must be in one of the files below, which are
# compiled, apart from indentation. The README's first block must equal the marked part of examples/quickstart.cpp.

file(GLOB files RELATIVE ${REPOSITORY} ${REPOSITORY}/examples/*.cpp ${REPOSITORY}/examples/support/*.hpp)
list(APPEND files tests/readme_test.cpp tests/migrating_test.cpp tests/examples/migrating_mysql.cpp
  tests/consumers/separate_compilation.cpp)
set(code "")
foreach(file IN LISTS files)
  file(READ ${REPOSITORY}/${file} text)
  string(APPEND code "\n${text}")
endforeach()
string(REGEX REPLACE "\n +" "\n" code "${code}")

file(READ ${REPOSITORY}/examples/quickstart.cpp example)
if(NOT example MATCHES "// \\[readme\\]\n(.*)// \\[/readme\\]")
  message(FATAL_ERROR "examples/quickstart.cpp has no [readme] marks")
endif()
set(first "${CMAKE_MATCH_1}")

file(GLOB pages RELATIVE ${REPOSITORY} ${REPOSITORY}/docs/*.md)
foreach(page IN ITEMS README.md ${pages})
  file(READ ${REPOSITORY}/${page} text)
  set(number 0)
  string(FIND "${text}" "```cpp\n" start)
  while(NOT start EQUAL -1)
    math(EXPR start "${start} + 7")
    string(SUBSTRING "${text}" ${start} -1 text)
    string(FIND "${text}" "```" end)
    string(SUBSTRING "${text}" 0 ${end} block)
    math(EXPR end "${end} + 3")
    string(SUBSTRING "${text}" ${end} -1 text)
    math(EXPR number "${number} + 1")
    if(page STREQUAL "README.md" AND number EQUAL 1 AND NOT block STREQUAL first)
      message(FATAL_ERROR
        "README.md's first block differs from what examples/quickstart.cpp has between its [readme] marks")
    endif()
    string(REGEX REPLACE "(^|\n) +" "\\1" block "${block}")
    string(FIND "${code}" "\n${block}" position)
    if(position EQUAL -1)
      message(FATAL_ERROR "${page}: C++ block ${number} is not in any compiled file:\n${block}")
    endif()
    string(FIND "${text}" "```cpp\n" start)
  endwhile()
  message(STATUS "${page}: ${number} blocks")
endforeach()
