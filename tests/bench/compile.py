#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Measures what calls cost to compile, with g++ -O2: tests/bench/compile.py [ROUNDS]

The first call in a file is measured on top of including the header, once header-only and once with
RUNTIME_BRIDGE_SEPARATE_COMPILATION. Further calls are measured with 20 of them. Times are medians of processor time;
object code is all sections that are loaded. tests/bench/run prints this, too.
"""
import os
import pathlib
import resource
import statistics
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).resolve().parents[2]
FURTHER = 20
TASKS = {
    "a coroutine lambda": "[x]() -> asio::awaitable<int> {{ co_return x + {n} + co_await coroutine({n}); }}",
    "a lambda that calls a function": "[x] {{ return function(x + {n}); }}",
}
SEPARATE = "-DRUNTIME_BRIDGE_SEPARATE_COMPILATION"


def source(task, call, number):
    """A file with `number` functions, each with a task of its own. Without `call` the task is called here."""
    lines = ["#include <runtime_bridge.hpp>", "int function(int);", "asio::awaitable<int> coroutine(int);"]
    for n in range(number):
        expression = TASKS[task].format(n=n) if task else ""
        if call:
            lines.append(f"void f{n}(runtime_bridge::RuntimeBridge& b, int x) {{ (void)b.{call}({expression}); }}")
        elif task:
            lines.append(f"auto f{n}(int x) {{ auto task = {expression}; return task; }}\n"
                         f"auto g{n}(int x) {{ return f{n}(x)(); }}")
    return "\n".join(lines) + "\n"


class Unit:
    def __init__(self, folder, name, text, *flags):
        self.file, self.object = folder / f"{name}.cpp", folder / f"{name}.o"
        self.file.write_text(text)
        self.command = ["g++", "-std=c++20", "-O2", f"-I{ROOT / 'include'}", *flags, "-c", self.file, "-o", self.object]
        self.times = []

    def compile(self):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run(self.command, check=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        self.times.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)

    def seconds(self):
        return statistics.median(self.times)

    def bytes(self):
        sections = subprocess.run(["size", "-A", self.object], check=True, capture_output=True, text=True).stdout
        loaded = (".text", ".rodata", ".data", ".eh_frame", ".gcc_except_table")
        return sum(int(line.split()[1]) for line in sections.splitlines() if line.startswith(loaded))


def main(rounds):
    with tempfile.TemporaryDirectory() as folder:
        units = {}

        def unit(name, text, *flags):
            units[name] = Unit(pathlib.Path(folder), f"unit{len(units)}", text, *flags)

        unit("header", source(None, None, 0))
        for task in TASKS:
            unit((task, "first"), source(task, "block_on", 1))
            unit((task, "separate"), source(task, "block_on", 1), SEPARATE)
            for call in (None, "block_on", "submit"):
                for number in (1, 1 + FURTHER):
                    unit((task, call, number), source(task, call, number), SEPARATE)
        for _ in range(rounds):
            for u in units.values():
                u.compile()

        for task in TASKS:
            first, separate = (units[task, kind].seconds() - units["header"].seconds() for kind in ("first", "separate"))

            def further(call):
                one, many = units[task, call, 1], units[task, call, 1 + FURTHER]
                return (f"{max(0, 1000 * (many.seconds() - one.seconds()) / FURTHER):.0f} ms and "
                        f"{(many.bytes() - one.bytes()) / FURTHER / 1000:.2f} kB of object code")

            print(f"- `block_on` of {task} (g++ -O2): the first in a file takes {first:.2f} s to compile on top of the "
                  f"header, or {separate:.2f} s with `RUNTIME_BRIDGE_SEPARATE_COMPILATION`. Each further one takes "
                  f"{further('block_on')}; a further `submit` takes {further('submit')}. Such a lambda alone takes "
                  f"{further(None)}.")


if __name__ == "__main__":
    if len(sys.argv) > 2 or not all(a.isdigit() and int(a) for a in sys.argv[1:]):
        sys.exit(__doc__)
    os.environ["LC_ALL"] = "C"
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 3)
