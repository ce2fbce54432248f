# SPDX-License-Identifier: Apache-2.0
#
# COMMAND leaves with STATUS, and its errors are one line that matches WORDS (or begins with it, before its usage).

execute_process(COMMAND ${COMMAND} OUTPUT_VARIABLE output ERROR_VARIABLE errors RESULT_VARIABLE result)
if(NOT result EQUAL STATUS OR NOT errors MATCHES "^${WORDS}\n" OR NOT output STREQUAL "")
  message(FATAL_ERROR "left with ${result}, not ${STATUS}; it said:\n${output}${errors}instead of:\n${WORDS}")
endif()
