#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Reports which lines and branches of the header the tests have run, and why they have not run the others.

  tests/coverage.py BUILD   of all programs in this folder, compiled with g++ --coverage and run

A line counts as covered if any program has run it in any instance of its template. So does a branch: those that the
instances of a line have are matched by their order, among instances that have as many. Left out are the two ways that
a call may end in, by return or by an exception; and what a process did that ended by a signal or, but for
`in_child_process` in tests/support.hpp, by _exit.

tests/coverage.txt explains what is not covered, by the text of the source:

  a line of the header, or several that follow each other, so many that they are found there once only
    1 line, 2 branches: why

It is an error if more lines or branches of them are not covered than that says, and if the lines are not in the header
any more. That they are covered is none, for with some that is a matter of luck. A branch of a line that was not run
needs no words of its own.
"""
import collections
import json
import pathlib
import re
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent
HEADER = ROOT / "include/runtime_bridge.hpp"
EXPLANATIONS = ROOT / "tests/coverage.txt"


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


def read_explanations():
    """Of each: the lines of source, how many lines and branches of them may be uncovered, and why."""
    blocks = re.split(r"\n\s*\n", re.sub(r"(?m)^#.*\n", "", EXPLANATIONS.read_text()).strip())
    for block in filter(None, blocks):
        source = [line.strip() for line in block.split("\n") if not line.startswith("  ")]
        text = " ".join(line.strip() for line in block.split("\n") if line.startswith("  "))
        match = re.fullmatch(r"(?:(\d+) lines?)?(?:, )?(?:(\d+) branch(?:es)?)?: (.+)", text)
        if not match:
            sys.exit(f"coverage.py: no explanation such as '1 line, 2 branches: why': {block}")
        yield source, int(match[1] or 0), int(match[2] or 0), match[3]


def main(build):
    header = [line.strip() for line in HEADER.read_text().split("\n")]
    lines, branches = gather(build)
    uncovered = {number for number, count in lines.items() if count == 0}
    untaken = collections.Counter()
    for (number, _), counts in branches.items():
        if number not in uncovered and 0 in counts:
            untaken[number] += counts.count(0)

    def amount(number_of_lines, number_of_branches):
        counted = [(number_of_lines, "line", "lines"), (number_of_branches, "branch", "branches")]
        return ", ".join(f"{n} {one if n == 1 else many}" for n, one, many in counted if n) or "nothing"

    errors = []
    unexplained = uncovered | set(untaken)
    print("Not covered, of what may not be:")
    for source, lines_allowed, branches_allowed, why in read_explanations():
        places = [i for i in range(len(header)) if header[i:i + len(source)] == source]
        if len(places) != 1:
            errors.append(f"tests/coverage.txt: {len(places)} places in the header read: {' / '.join(source)}")
            continue
        numbers = range(places[0] + 1, places[0] + 1 + len(source))
        unexplained.difference_update(numbers)
        lines_found = len(uncovered.intersection(numbers))
        branches_found = sum(untaken[n] for n in numbers)
        print(f"  {numbers[0]}: {source[0]}{' ...' if len(source) > 1 else ''}")
        print(f"      {amount(lines_found, branches_found)} of {amount(lines_allowed, branches_allowed)}: {why}")
        if lines_found > lines_allowed or branches_found > branches_allowed:
            errors.append(f"{numbers[0]}: more is not covered than tests/coverage.txt explains: {source[0]}")
    for number in sorted(unexplained):
        what = "not run" if number in uncovered else f"{amount(0, untaken[number])} never taken"
        errors.append(f"{number}: {what}, and tests/coverage.txt does not say why: {header[number - 1]}")

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
