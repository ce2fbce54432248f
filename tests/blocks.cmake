# SPDX-License-Identifier: Apache-2.0
#
# find_blocks(FILE LANGUAGE) sets block_1, block_2, ... to the Markdown file's code blocks in that language, which may
# contain backquotes, and `blocks` to the list of these names.

function(find_blocks file language)
  file(READ ${file} text)
  set(opening "```${language}\n")
  string(LENGTH "${opening}" length)
  set(names "")
  set(number 0)
  string(FIND "${text}" "${opening}" start)
  while(NOT start EQUAL -1)
    math(EXPR start "${start} + ${length}")
    string(SUBSTRING "${text}" ${start} -1 text)
    string(FIND "${text}" "```" end)
    string(SUBSTRING "${text}" 0 ${end} block)
    math(EXPR number "${number} + 1")
    set(block_${number} "${block}" PARENT_SCOPE)
    list(APPEND names block_${number})
    math(EXPR end "${end} + 3")
    string(SUBSTRING "${text}" ${end} -1 text)
    string(FIND "${text}" "${opening}" start)
  endwhile()
  set(blocks "${names}" PARENT_SCOPE)
endfunction()
