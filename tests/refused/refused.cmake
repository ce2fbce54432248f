# SPDX-License-Identifier: Apache-2.0
#
# COMMAND compiles something. It must fail with one error of a few lines that matches the regular expression SAYS.

cmake_policy(VERSION 3.21)

execute_process(COMMAND ${COMMAND} RESULT_VARIABLE result ERROR_VARIABLE said OUTPUT_QUIET)
string(REPLACE ";" "," lines "${said}")
string(REGEX REPLACE "\n" ";" lines "${lines}")
set(errors ${lines})
list(FILTER errors INCLUDE REGEX "error: ")
list(LENGTH errors number_of_errors)
list(LENGTH lines number_of_lines)
if(result EQUAL 0)
  message(FATAL_ERROR "it compiles")
elseif(NOT said MATCHES "${SAYS}")
  message(FATAL_ERROR "it does not say ${SAYS}:\n${said}")
elseif(NOT number_of_errors EQUAL 1)
  message(FATAL_ERROR "it says ${number_of_errors} errors:\n${said}")
elseif(number_of_lines GREATER 15)
  message(FATAL_ERROR "it says ${number_of_lines} lines:\n${said}")
endif()
