# SPDX-License-Identifier: Apache-2.0
#
# Checks that COMMAND prints what the README shows below the line "$ SHOWN", apart from the numbers.

execute_process(COMMAND ${COMMAND} OUTPUT_VARIABLE output ERROR_VARIABLE errors RESULT_VARIABLE result)
if(result EQUAL 77)
  message(FATAL_ERROR "skipped: ${errors}")
elseif(NOT result EQUAL 0)
  message(FATAL_ERROR "exited with ${result}:\n${output}${errors}")
endif()

file(READ ${README} readme)
string(FIND "${readme}" "\n$ ${SHOWN}\n" position)
if(position EQUAL -1)
  message(FATAL_ERROR "README.md does not show: $ ${SHOWN}\nIt prints:\n${output}")
endif()
string(SUBSTRING "${readme}" ${position} -1 readme)
string(REGEX REPLACE "^\n[^\n]*\n([^`]*)```.*" "\\1" shown "${readme}")

foreach(text shown output)
  string(REGEX REPLACE " *[0-9]+([.][0-9]+)?" " N" ${text}_words "${${text}}")  # tables align numbers by spaces
endforeach()
if(NOT shown_words STREQUAL output_words)
  message(FATAL_ERROR "README.md shows:\n${shown}\nThe command prints:\n${output}")
endif()
message(STATUS "as README.md shows it:\n${output}")
