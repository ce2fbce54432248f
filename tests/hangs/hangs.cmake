# SPDX-License-Identifier: Apache-2.0
#
# Runs one test of the program hangs. MODE says what explains the HANG:
#
#   report  RuntimeBridge::report. It must print what is in expected/HANG.txt, apart from what gdb adds in brackets
#   gdb     tools/gdb/runtime_bridge.py: in the process, which has printed the same report before, and in its core file
#   stack   the same without a report before
#   none    the same for programs that have nothing to show. HANG is not used
#
# In expected/HANG.txt, a line of hangs.cpp is called by the comment at its end. TIME, ID and N stand for what differs
# from run to run.

cmake_minimum_required(VERSION 3.21...3.25)

set(folder ${CMAKE_CURRENT_LIST_DIR})
set(script ${folder}/../../tools/gdb/runtime_bridge.py)

# The text with names for what differs from run to run.
function(normalise result text)
  string(REGEX REPLACE "[0-9]+ ms|[0-9]+[.][0-9] s" "TIME" text "${text}")
  string(REGEX REPLACE "called by thread (0x)?[0-9a-f]+" "called by thread ID" text "${text}")
  string(REGEX REPLACE "thread [0-9]+, LWP [0-9]+" "thread N, LWP N" text "${text}")
  string(REGEX REPLACE "as of [-0-9]+ [:0-9]+ [-+][0-9]+" "as of DATE" text "${text}")
  string(REGEX MATCHALL "hangs[.]cpp:[0-9]+" places "${text}")
  foreach(place IN LISTS places)
    string(REGEX REPLACE ".*:" "" line "${place}")
    execute_process(COMMAND sed -n "${line}s|.*// ||p" ${folder}/hangs.cpp
      OUTPUT_VARIABLE comment OUTPUT_STRIP_TRAILING_WHITESPACE)
    string(REGEX REPLACE "old: [^\n]*${place}([^0-9])" "old: ${comment}\\1" text "${text}")
  endforeach()
  set(${result} "${text}" PARENT_SCOPE)
endfunction()

function(compare what expected text)
  normalise(normal "${text}")
  if(NOT normal STREQUAL expected)
    message(FATAL_ERROR "${what} should say:\n${expected}\nIt says:\n${normal}\nIn full:\n${text}")
  endif()
  message(STATUS "${what}:\n${text}")
endfunction()

# The time, in milliseconds, that the first call of a text is old.
function(first_age result text)
  string(REGEX MATCH " [0-9.]+ m?s old" age "${text}")
  if(age MATCHES "([0-9]+) ms")
    set(${result} ${CMAKE_MATCH_1} PARENT_SCOPE)
  elseif(age MATCHES "([0-9]+)[.]([0-9]) s")
    set(${result} ${CMAKE_MATCH_1}${CMAKE_MATCH_2}00 PARENT_SCOPE)
  else()
    message(FATAL_ERROR "this tells no age:\n${text}")
  endif()
endfunction()

# Runs a command, and gives its output.
function(run result)
  execute_process(COMMAND ${ARGN} OUTPUT_VARIABLE output ERROR_VARIABLE errors RESULT_VARIABLE status TIMEOUT 60)
  if(NOT status EQUAL 0)
    message(FATAL_ERROR "${ARGN}\nended with ${status}:\n${output}${errors}")
  endif()
  set(${result} "${output}" PARENT_SCOPE)
endfunction()

# Runs gdb with these options: some commands, and then the program.
function(run_gdb result)
  find_program(debugger gdb)
  if(NOT debugger)
    message(FATAL_ERROR "skipped: gdb is not installed")
  endif()
  # The heap in one piece makes the core file small. The last command decides on the exit status, which tells nothing.
  execute_process(COMMAND ${debugger} -nx -batch -ex "set debuginfod enabled off" -ex "set print thread-events off"
    -ex "set startup-with-shell off" -ex "set disable-randomization off" -ex "set follow-fork-mode child"
    -ex "set environment MALLOC_ARENA_MAX 1" -ex "source ${script}" ${ARGN}
    OUTPUT_VARIABLE output ERROR_VARIABLE output RESULT_VARIABLE status TIMEOUT 100)
  if(status MATCHES "[^0-9]")
    message(FATAL_ERROR "gdb ended with ${status}:\n${output}")
  endif()
  if(output MATCHES "ptrace: |Could not trace the inferior")
    message(FATAL_ERROR "skipped: gdb may not trace programs here:\n${output}")
  endif()
  set(${result} "${output}" PARENT_SCOPE)
endfunction()

# What gdb says about a program that has nothing to show.
function(expect_in_gdb words)
  run_gdb(output -ex run -ex "runtime-bridge calls" -ex kill --args ${ARGN})
  string(FIND "${output}" "\nruntime_bridge: ${words}\n" position)
  if(position EQUAL -1)
    message(FATAL_ERROR "gdb should say of ${ARGN}:\nruntime_bridge: ${words}\nIt says:\n${output}")
  endif()
endfunction()

if(MODE STREQUAL "none")
  expect_in_gdb("0 bridges" ${PROGRAM} none stop)
  expect_in_gdb("the program has no runtime_bridge::v0_2::detail::CallRegistry: it does not use this version of the library"
    ${BRIDGELESS})
  run(ignored ${STRIP} -g -o ${PROGRAM}.without-g ${PROGRAM})
  expect_in_gdb("the program has no debugging information about its bridges: compile it with -g"
    ${PROGRAM}.without-g lost stop)
  run(ignored ${STRIP} -s -o ${PROGRAM}.stripped ${PROGRAM})
  expect_in_gdb("the program has no symbols: gdb needs one that is not stripped, compiled with -g"
    ${PROGRAM}.stripped lost stop)
  file(REMOVE ${PROGRAM}.without-g ${PROGRAM}.stripped)
  run_gdb(output -ex "runtime-bridge calls" ${PROGRAM})
  if(NOT output STREQUAL "runtime_bridge: there is no process and no core file\n")
    message(FATAL_ERROR "without a process gdb says:\n${output}")
  endif()
  return()
endif()

file(READ ${folder}/expected/${HANG}.txt expected)
string(REGEX REPLACE " [[][^\n]*" "" expected_report "${expected}")
if(MODE STREQUAL "report")
  run(report ${PROGRAM} ${HANG} report)
  compare("the report" "${expected_report}" "${report}")
  return()
endif()

set(arguments ${HANG} report stop)
if(MODE STREQUAL "stack")
  set(arguments ${HANG} stop)
endif()
set(core ${PROGRAM}.${HANG}.${MODE}.core)
run_gdb(output -ex run -ex "echo ==live\\n" -ex "runtime-bridge calls" -ex "echo ==end\\n" -ex "generate-core-file ${core}"
  -ex kill --args ${PROGRAM} ${arguments})
if(NOT output MATCHES "(.*)==live\n(.*)==end\n")
  message(FATAL_ERROR "gdb says:\n${output}")
endif()
set(before "${CMAKE_MATCH_1}")
set(live "${CMAKE_MATCH_2}")
if(MODE STREQUAL "gdb")
  string(REGEX MATCH "runtime_bridge: [0-9]+ bridges?\n([^\n]+\n)*" report "${before}")
  compare("the report" "${expected_report}" "${report}")
endif()
compare("gdb" "${expected}" "${live}")

# A core file has no names of threads, and a date instead of a clock.
string(REGEX REPLACE "called by thread ID \"[^\"]*\"" "called by thread ID" expected "${expected}")
string(REGEX REPLACE "(bridges?)\n" "\\1; ages and deadlines are as of DATE, SOURCE\n" expected "${expected}")
string(REPLACE SOURCE "the date of the core file" expected_of_core "${expected}")
string(REPLACE SOURCE "the given date" expected_an_hour_later "${expected}")
file(TIMESTAMP ${core} date "%s" UTC)
math(EXPR later "${date} + 3600")
run_gdb(output -ex "echo ==core\\n" -ex "runtime-bridge calls" -ex "echo ==later\\n" -ex "runtime-bridge calls ${later}"
  -ex "echo ==end\\n" ${PROGRAM} ${core})
file(REMOVE ${core})
if(NOT output MATCHES "==core\n(.*)==later\n(.*)==end\n")
  message(FATAL_ERROR "gdb says of the core file:\n${output}")
endif()
set(of_core "${CMAKE_MATCH_1}")
set(an_hour_later "${CMAKE_MATCH_2}")
compare("gdb with the core file" "${expected_of_core}" "${of_core}")
compare("gdb with a date" "${expected_an_hour_later}" "${an_hour_later}")

# The core file was written after gdb had looked at the process, and within the time that a test may take. Ages are cut
# to tenths of a second, and dates to seconds.
first_age(age "${live}")
first_age(age_of_core "${of_core}")
first_age(age_later "${an_hour_later}")
math(EXPR least "${age} - 100")
math(EXPR most "${age} + 120000")
math(EXPR least_later "${age_of_core} + 3600000 - 1100")
math(EXPR most_later "${age_of_core} + 3600000 + 100")
if(age_of_core LESS least OR age_of_core GREATER most OR age_later LESS least_later OR age_later GREATER most_later)
  message(FATAL_ERROR "the first call is ${age} ms old in the process, ${age_of_core} ms in the core file written at "
    "${date}, and ${age_later} ms at ${later}")
endif()
