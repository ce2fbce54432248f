# SPDX-License-Identifier: Apache-2.0
#
# Checks that what PROGRAM (examples/metrics) prints are spans and metrics: JSON on each line of a span, parents that
# are there, an error's status, and metrics that agree with the spans.

execute_process(COMMAND ${PROGRAM} OUTPUT_VARIABLE output ERROR_VARIABLE errors RESULT_VARIABLE result)
if(NOT result EQUAL 0)
  message(FATAL_ERROR "exited with ${result}:\n${output}${errors}")
endif()

function(expect what actual expected)
  if(NOT actual STREQUAL expected)
    message(FATAL_ERROR "${what}: \"${actual}\", not \"${expected}\", in:\n${output}")
  endif()
endfunction()

# CMake's lists do not take brackets well, so the lines are cut off one by one. string(JSON) fails if a line is no JSON.
set(rest "${output}")
set(requests "")
while(rest MATCHES "^([^\n]*)\n(.*)$")
  set(line "${CMAKE_MATCH_1}")
  set(rest "${CMAKE_MATCH_2}")
  if(line MATCHES "^{")
    string(JSON name GET "${line}" name)
    string(JSON span GET "${line}" spanId)
    string(JSON trace GET "${line}" traceId)
    string(JSON parent ERROR_VARIABLE no_parent GET "${line}" parentSpanId)
    string(JSON attributes LENGTH "${line}" attributes)
    string(JSON status ERROR_VARIABLE no_error GET "${line}" status code)
    if(name MATCHES "^GET ")
      expect("the parent of ${name}" "${no_parent}" "member 'parentSpanId' not found")
      string(APPEND requests "${name}=${children}\n")
      expect("the parent of the children of ${name}" "${last_parent}" "${span}/${trace}")
      set(children "")
    else()
      string(JSON path GET "${line}" attributes 0 value stringValue)
      string(JSON number GET "${line}" attributes 1 value intValue)
      if(NOT path MATCHES "examples/metrics.cpp$" OR NOT number MATCHES "^[0-9]+$")
        message(FATAL_ERROR "${name} comes from ${path}:${number}")
      endif()
      set(outcome value)
      if(NOT no_error)
        expect("the status of ${name}" "${status}" 2)
        string(JSON outcome GET "${line}" attributes 3 value stringValue)
      endif()
      string(REGEX REPLACE ":[0-9]+$" ":N" name "${name}")
      string(APPEND children " ${name} ${outcome}")
      set(last_parent "${parent}/${trace}")
    endif()
  elseif(line MATCHES "^runtime_bridge_(calls_total.*outcome=|calls_in_flight{|call_duration_seconds_count)")
    if(NOT line MATCHES " 0$")
      string(APPEND metrics "${line}\n")
    endif()
  endif()
endwhile()

expect("the requests" "${requests}" "GET /users/42= metrics.cpp:N value count users value
GET /users/43= metrics.cpp:N response_lost
GET /report= metrics.cpp:N timed_out
")
expect("the last span" "${children}" " refresh cancelled")
expect("the metrics" "${metrics}" "runtime_bridge_calls_total{bridge=\"users\",outcome=\"value\"} 2
runtime_bridge_calls_total{bridge=\"users\",outcome=\"response_lost\"} 1
runtime_bridge_calls_total{bridge=\"users\",outcome=\"timed_out\"} 1
runtime_bridge_calls_in_flight{bridge=\"users\"} 1
runtime_bridge_call_duration_seconds_count{bridge=\"users\"} 4
")
