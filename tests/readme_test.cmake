# SPDX-License-Identifier: Apache-2.0
#
# Checks that the README's first C++ block equals the marked part of examples/quickstart.cpp, and that every other block is
# in one of the files below, apart from indentation.

file(READ ${REPOSITORY}/README.md readme)
file(READ ${REPOSITORY}/examples/quickstart.cpp example)
set(tests "")
foreach(file tests/readme_test.cpp tests/consumers/separate_compilation.cpp examples/interrupt.cpp
    examples/two_callers.cpp
    examples/support/backends.hpp examples/support/pg_backend.hpp examples/support/shared_client.hpp)
  file(READ ${REPOSITORY}/${file} text)
  string(APPEND tests "${text}")
endforeach()
string(REGEX REPLACE "\n +" "\n" tests "${tests}")

if(NOT example MATCHES "// \\[readme\\]\n(.*)// \\[/readme\\]")
  message(FATAL_ERROR "examples/quickstart.cpp has no [readme] marks")
endif()
set(marked "${CMAKE_MATCH_1}")

set(blocks 0)
while(readme MATCHES "```cpp\n([^`]*)```(.*)")
  set(block "${CMAKE_MATCH_1}")
  set(readme "${CMAKE_MATCH_2}")
  if(blocks EQUAL 0)
    if(NOT block STREQUAL marked)
      message(FATAL_ERROR
        "README.md's first block differs from what examples/quickstart.cpp has between its [readme] marks")
    endif()
  else()
    string(REGEX REPLACE "(^|\n) +" "\\1" block "${block}")
    string(FIND "${tests}" "\n${block}" position)
    if(position EQUAL -1)
      message(FATAL_ERROR "this block of README.md is not in any compiled file:\n${block}")
    endif()
  endif()
  math(EXPR blocks "${blocks} + 1")
endwhile()
if(blocks LESS 2)
  message(FATAL_ERROR "README.md has ${blocks} C++ blocks")
endif()
message(STATUS "${blocks} blocks")
