# SPDX-License-Identifier: Apache-2.0
#
# The README's first code block is the heart of the main example, to the letter.

file(READ ${REPOSITORY}/README.md readme)
file(READ ${REPOSITORY}/examples/quickstart.cpp example)
if(NOT readme MATCHES "```cpp\n([^`]*)```")
  message(FATAL_ERROR "README.md has no C++ code block")
endif()
set(block "${CMAKE_MATCH_1}")
if(NOT example MATCHES "// \\[readme\\]\n(.*)// \\[/readme\\]")
  message(FATAL_ERROR "examples/quickstart.cpp has no [readme] marks")
endif()
if(NOT block STREQUAL CMAKE_MATCH_1)
  message(FATAL_ERROR "README.md's first code block differs from what examples/quickstart.cpp has between [readme] marks")
endif()
