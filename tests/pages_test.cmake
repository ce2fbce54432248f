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

# Calls check(BLOCK) for each block of the page in that language.
function(for_each_block page language check)
  file(READ ${REPOSITORY}/${page} text)
  set(opening "```${language}\n")
  string(LENGTH "${opening}" length)
  string(FIND "${text}" "${opening}" start)
  while(NOT start EQUAL -1)
    math(EXPR start "${start} + ${length}")
    string(SUBSTRING "${text}" ${start} -1 text)
    string(FIND "${text}" "```" end)
    string(SUBSTRING "${text}" 0 ${end} block)
    cmake_language(CALL ${check} "${block}")
    math(EXPR end "${end} + 3")
    string(SUBSTRING "${text}" ${end} -1 text)
    string(FIND "${text}" "${opening}" start)
  endwhile()
endfunction()

function(check_cpp block)
  string(REGEX REPLACE "(^|\n) +" "\\1" lines "${block}")
  string(FIND "${code}" "\n${lines}" position)
  if(position EQUAL -1)
    message(FATAL_ERROR "${page}: this block is not in any compiled file:\n${block}")
  endif()
endfunction()

function(check_console block)
  string(REGEX REPLACE "^\\$ ([^\n]*)\n.*" "\\1" command "${block}")
  string(FIND "${commands}" "\"${command}\"" position)
  if(position EQUAL -1)
    message(FATAL_ERROR "${page}: no test compares the output of: ${command}")
  endif()
endfunction()

file(GLOB pages RELATIVE ${REPOSITORY} ${REPOSITORY}/docs/*.md)
foreach(page IN ITEMS README.md ${pages})
  for_each_block(${page} cpp check_cpp)
  for_each_block(${page} console check_console)
endforeach()
