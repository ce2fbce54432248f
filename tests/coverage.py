#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Reports which lines and branches of the header the tests have run, and why they have not run the others.

  tests/coverage.py BUILD   of all programs in this folder, compiled with g++ --coverage and run

A line counts as covered if any program has run it in any instance of its template. So does a branch: those that the
instances of a line have are matched by their order, among instances that have as many. Left out are the two ways that
a call may end in, by return or by an exception; and what a process did that ended by a signal or, but for
`in_child_process` in tests/support.hpp, by _exit.

A line that the tests cannot cover is marked in the header, with the reason, by a comment above it:

  // Not covered: why.          the line may be uncovered, and its branches too
  // Branch not covered: why.   some of its branches may be

It is an error if other lines or branches are uncovered, and if a mark gives no reason. That a marked line is covered is
none, because some are covered by luck. A branch of a line that was not run needs no mark of its own.
"""
import collections
import json
import pathlib
import re
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent
HEADER = ROOT / "include/runtime_bridge.hpp"
MARK = re.compile(r"// (Not|Branch not) covered: ?(.*)")


def decisions(branches):
    """The branches without those of calls that may throw: gcov marks the exception's, and its twin is beside it."""
    kept = []
    twins = 0  # of exceptions whose twin comes after them
    for branch in branches:
        if branch["throw"]:
            if kept and kept[-1]["fallthrough"]:
                kept.pop()
            else:
                twins += 1
        elif twins and branch["fallthrough"]:
            twins -= 1
        else:
            kept.append(branch)
    return [branch["count"] for branch in kept]


def gather(build):
    """The counts of each line, and of each branch by (line, number of branches in the instance)."""
    programs = sorted(pathlib.Path(build).rglob("*.gcda"))
    if not programs:
        sys.exit(f"coverage.py: {build} has no counts: was it compiled with --coverage, and run?")
    lines = collections.Counter()
    branches = {}
    gcov = ["gcov", "--branch-probabilities", "--json-format", "--stdout", *map(str, programs)]
    with subprocess.Popen(gcov, stdout=subprocess.PIPE) as output:
        for document in map(json.loads, output.stdout):
            for file in document["files"]:
                if pathlib.Path(document["current_working_directory"], file["file"]) != HEADER:
                    continue
                for line in file["lines"]:
                    number = line["line_number"]
                    lines[number] += line["count"]
                    counts = decisions(line["branches"])
                    before = branches.setdefault((number, len(counts)), [0] * len(counts))
                    branches[number, len(counts)] = [a + b for a, b in zip(before, counts)]
    if output.returncode:
        sys.exit("coverage.py: gcov failed")
    return lines, branches


def main(build):
    header = [line.strip() for line in HEADER.read_text().split("\n")]
    lines, branches = gather(build)
    uncovered = {number for number, count in lines.items() if count == 0}
    untaken = collections.Counter()
    for (number, _), counts in branches.items():
        if number not in uncovered and 0 in counts:
            untaken[number] += counts.count(0)

    def what(number):
        if number in uncovered:
            return "not run"
        return f"{untaken[number]} branch{'' if untaken[number] == 1 else 'es'} never taken" if untaken[number] else "covered"

    errors = []
    unexplained = uncovered | set(untaken)
    print("Marked as not covered:")
    for number, line in enumerate(header, 1):
        mark = MARK.fullmatch(line)
        if not mark:
            continue
        kind, why = mark.groups()
        while header[number].startswith("//"):
            number += 1
        number += 1  # the first line after the comment
        if not why:
            errors.append(f"{number}: the mark gives no reason")
        if kind == "Branch not" and number in uncovered:
            continue
        unexplained.discard(number)
        print(f"  {number}: {what(number)}: {why}")
    for number in sorted(unexplained):
        errors.append(f"{number}: {what(number)}, and no mark says why: {header[number - 1]}")

    all_branches = [count for counts in branches.values() for count in counts]
    print(f"Lines: {len(lines) - len(uncovered)} of {len(lines)}. "
          f"Branches: {sum(map(bool, all_branches))} of {len(all_branches)}.")
    for error in errors:
        print(f"error: {error}", file=sys.stderr)
    return 1 if errors else 0


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    sys.exit(main(sys.argv[1]))
