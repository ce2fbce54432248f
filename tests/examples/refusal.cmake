# SPDX-License-Identifier: Apache-2.0
#
# Checks that COMMAND exits with STATUS and prints one line of errors that matches WORDS, perhaps followed by its usage,
# and no other output.

execute_process(COMMAND ${COMMAND} OUTPUT_VARIABLE output ERROR_VARIABLE errors RESULT_VARIABLE result)
if(NOT result EQUAL STATUS OR NOT errors MATCHES "^${WORDS}\n" OR NOT output STREQUAL "")
  message(FATAL_ERROR "exited with ${result}, not ${STATUS}; it printed:\n${output}${errors}instead of:\n${WORDS}")
endif()
