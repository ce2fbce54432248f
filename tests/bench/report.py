# SPDX-License-Identifier: Apache-2.0
"""Turns the results of tests/bench/run into a table and a picture. All figures are medians over its rounds."""

import collections
import json
import pathlib
import re
import statistics
import sys

folder = pathlib.Path(sys.argv[-1])
root = pathlib.Path(__file__).parents[2]
WAYS = {"bridge": "runtime_bridge", "parking": "no spinning", "use_future": "use_future", "by_hand": "by hand",
        "seed": "Rust crate", "native": "blocking"}


def read():
    """{(what, way, callers): {counter: [value of each round]}}"""
    runs = collections.defaultdict(lambda: collections.defaultdict(list))
    context = {}
    for file in sorted(folder.glob("*.json")):
        kind = file.name.split(".")[0]
        data = json.loads(file.read_text())
        context = data["context"]
        for run in data["benchmarks"]:
            if run.get("error_occurred"):
                sys.exit(f"{file.name}: {run['name']}: {run['error_message']}")
            what, way = run["name"].split("/")[:2]
            what = what if kind == "bench" else f"{kind}/{what}"
            for counter in ("us", "cpu_us", "allocations", "switches"):
                runs[what, way, run["threads"]][counter].append(run[counter])
    seed = folder / "seed.txt"
    if seed.exists():
        for callers, ns in re.findall(r"seed threads=(\d+) ns_per_call=(\d+)", seed.read_text()):
            runs["callable", "seed", int(callers)]["us"].append(int(ns) / 1000)
    return runs, context


runs, context = read()


def median(what, way, callers, counter="us"):
    values = runs.get((what, way, callers), {}).get(counter)
    return statistics.median(values) if values else None


def figure(value, digits=3):
    if value is None:
        return ""
    return f"{value:.{digits}g}" if value < 10 ** digits else f"{value:.0f}"


def table():
    rows = [("a task that returns at once", "callable"), ("the same, with the context's reactor in use", "reactor"),
            ("an awaitable that the caller creates", "awaitable"), ("a task that suspends once", "suspends"),
            ("an echo over a Unix socket pair", "echo"), ("a 1 ms timer", "timer")]
    lines = ["| call | callers | " + " | ".join(WAYS.values()) + " | CPU | allocations | switches |",
             "|---|" + "---:|" * (len(WAYS) + 4)]
    for name, what in rows:
        for callers in (1, 2, 8, 64):
            if median(what, "bridge", callers) is None:
                continue
            cells = [figure(median(what, way, callers)) for way in WAYS]
            cpu = " / ".join(figure(median(what, way, callers, "cpu_us")) for way in ("bridge", "use_future"))
            rest = [figure(median(what, "bridge", callers, counter), 2) for counter in ("allocations", "switches")]
            lines.append(f"| {name} | {callers} | " + " | ".join(cells + [cpu] + rest) + " |")
            name = ""
    return "\n".join(lines)


def includes():
    lines = collections.defaultdict(dict)
    seconds = collections.defaultdict(list)
    for unit, kind, value in (line.split() for line in (folder / "include.txt").read_text().splitlines()):
        if kind == "lines":
            lines[unit] = int(value)
        else:
            seconds[unit].append(float(value))
    asio, std, both = (statistics.median(seconds[unit]) for unit in ("asio_only", "with_std", "with_bridge"))
    return (f"- A file that only includes the header has {lines['with_bridge']} lines and compiles in {both:.2f} s. With "
            f"the Asio headers alone it has {lines['asio_only']} lines and takes {asio:.2f} s. That is "
            f"{100 * (both / asio - 1):.0f} % more; {100 * (std / asio - 1):.0f} percentage points of it come from standard "
            f"headers, mostly `<future>` and `<stop_token>`.")


def words():
    def ratio(what, callers, a, b, counter="us"):
        first, second = median(what, a, callers, counter), median(what, b, callers, counter)
        return figure(first / second, 2) if first and second else "?"

    cache = {size: [figure(median(f"cache_{size}/callable", "bridge", callers, "allocations"), 2) for callers in (1, 8)]
             for size in (8, 32)}
    spinning, futex = median("floor", "spinning", 1), median("floor", "futex", 1)
    return "\n".join([
        f"- A message from one thread to another and back takes {figure(futex)} us if the threads sleep while they wait, "
        f"and {figure(spinning)} us if they spin. Every call to another thread includes such a round trip.",
        f"- If 10000 tasks are submitted at once, each takes {figure(median('submit', 'bridge', 1))} us.",
        f"- With 1, 8 and 64 callers, `use_future` takes {ratio('callable', 1, 'use_future', 'bridge')}, "
        f"{ratio('callable', 8, 'use_future', 'bridge')} and {ratio('callable', 64, 'use_future', 'bridge')} times as "
        f"long as runtime_bridge, and the Rust crate {ratio('callable', 1, 'seed', 'bridge')}, "
        f"{ratio('callable', 8, 'seed', 'bridge')} and {ratio('callable', 64, 'seed', 'bridge')} times.",
        f"- With one caller, the echo takes {ratio('echo', 1, 'bridge', 'native')} times as long as with blocking calls.",
        f"- With `ASIO_RECYCLING_ALLOCATOR_CACHE_SIZE=8` and one caller, a call makes {cache[8][0]} allocations; with 32 "
        f"and eight callers, {cache[32][1]}.",
        f"- A bridge takes {context['bridge_bytes']} bytes, and {context['worker_bytes']} bytes on the heap. A call takes "
        f"{context['call_bytes']} bytes on the caller's stack.",
        includes(),
        (folder / "compile.txt").read_text().rstrip()])


def picture():
    colours = {"bridge": "#2563eb", "parking": "#93c5fd", "use_future": "#f59e0b", "by_hand": "#9ca3af", "seed": "#b45309"}
    bars, y = [], 44
    floors = [(name, median("floor", way, 1)) for way, name in (("spinning", "spinning floor"), ("futex", "sleeping floor"))]
    calls = [median("callable", way, callers) or 0 for way in colours for callers in (1, 8, 64)]
    longest = max(calls + [value for _, value in floors])

    def bar(name, value, colour):
        nonlocal y
        width = 430 * value / longest
        bars.append(f'<text x="150" y="{y + 12}" text-anchor="end">{name}</text>'
                    f'<rect x="158" y="{y}" width="{width:.1f}" height="16" fill="{colour}"/>'
                    f'<text x="{164 + width:.1f}" y="{y + 12}">{figure(value)}</text>')
        y += 20

    for callers in (1, 8, 64):
        bars.append(f'<text x="12" y="{y + 12}" font-weight="bold">{callers} caller{"s" if callers > 1 else ""}</text>')
        y += 20
        for way, colour in colours.items():
            value = median("callable", way, callers)
            if value is not None:
                bar(WAYS[way], value, colour)
        if callers == 1:
            for name, value in floors:
                bar(name, value, "#d1d5db")
        y += 8
    return (f'<svg xmlns="http://www.w3.org/2000/svg" width="680" height="{y + 8}" font-family="sans-serif" font-size="12">'
            f'<rect width="100%" height="100%" fill="white"/>'
            f'<text x="12" y="24" font-size="14">Microseconds per call of a task that returns at once</text>'
            + "".join(bars) + "</svg>\n")


text = table() + "\n\n" + words() + "\n"
print(text)
if "--update" in sys.argv:
    (root / "tests/bench/calls.svg").write_text(picture())
    readme = root / "README.md"
    before, rest = readme.read_text().split("<!-- tests/bench/run -->\n")
    after = rest.split("<!-- /tests/bench/run -->\n")[1]
    readme.write_text(f"{before}<!-- tests/bench/run -->\n{text}<!-- /tests/bench/run -->\n{after}")
