# SPDX-License-Identifier: Apache-2.0
#
# Checks that COMMAND prints what README.md, or a page in docs/, shows below the line "$ SHOWN", apart from the numbers.

execute_process(COMMAND ${COMMAND} OUTPUT_VARIABLE output ERROR_VARIABLE errors RESULT_VARIABLE result)
if(result EQUAL 77)
  message(FATAL_ERROR "skipped: ${errors}")
elseif(NOT result EQUAL 0)
  message(FATAL_ERROR "exited with ${result}:\n${output}${errors}")
endif()

file(GLOB pages ${REPOSITORY}/README.md ${REPOSITORY}/docs/*.md)
foreach(page IN LISTS pages)
  file(READ ${page} text)
  string(FIND "${text}" "\n$ ${SHOWN}\n" position)
  if(NOT position EQUAL -1)
    break()
  endif()
endforeach()
if(position EQUAL -1)
  message(FATAL_ERROR "no page shows: $ ${SHOWN}\nIt prints:\n${output}")
endif()
string(SUBSTRING "${text}" ${position} -1 text)
string(REGEX REPLACE "^\n[^\n]*\n([^`]*)```.*" "\\1" shown "${text}")

foreach(text shown output)
  string(REGEX REPLACE " *[0-9]+([.][0-9]+)?" " N" ${text}_words "${${text}}")  # tables align numbers by spaces
endforeach()
if(NOT shown_words STREQUAL output_words)
  message(FATAL_ERROR "${page} shows:\n${shown}\nThe command prints:\n${output}")
endif()
message(STATUS "as ${page} shows it:\n${output}")
