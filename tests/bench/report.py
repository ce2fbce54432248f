# SPDX-License-Identifier: Apache-2.0
"""Turns the results of tests/bench/run into tables and a picture: report.py [--update] RESULTS [ROOT]

Prints the tables of docs/numbers.md and a sentence for the README. --update writes them there, between their marks, and
the picture into docs/calls.svg. All figures are medians over the rounds. ROOT is this repository if it is not given.
"""

import collections
import json
import pathlib
import platform
import re
import statistics
import sys

arguments = [a for a in sys.argv[1:] if a != "--update"]
folder = pathlib.Path(arguments[0])
root = pathlib.Path(arguments[1]) if len(arguments) > 1 else pathlib.Path(__file__).resolve().parents[2]
WAYS = {"bridge": "runtime_bridge", "no_spinning": "runtime_bridge, no spinning", "use_future": "co_spawn + use_future",
        "post_and_promise": "post + co_spawn + std::promise", "tokio": "tokio bridge (Rust)",
        "blocking": "blocking system calls"}
WHATS = {"callable": "a task that returns at once", "reactor": "the same, with a timer on the context",
         "awaitable": "an awaitable that the caller creates", "suspends": "a task that suspends once",
         "echo": "an echo over a Unix socket pair", "timer": "a 1 ms timer"}


def read():
    """{(what, way, callers): {counter: [value of each round]}}"""
    runs = collections.defaultdict(lambda: collections.defaultdict(list))
    context = {"rounds": len(list(folder.glob("bench.*.json")))}
    for file in sorted(folder.glob("*.json")):
        kind = file.name.split(".")[0]
        data = json.loads(file.read_text())
        context.update(data["context"])
        for run in data["benchmarks"]:
            if run.get("error_occurred"):
                sys.exit(f"{file.name}: {run['name']}: {run['error_message']}")
            what, way = run["name"].split("/")[:2]
            what = what if kind == "bench" else f"{kind}/{what}"
            for counter in ("us", "cpu_us", "allocations", "switches"):
                runs[what, way, run["threads"]][counter].append(run[counter])
    tokio = folder / "tokio.txt"
    if tokio.exists():
        text = tokio.read_text()
        for callers, ns in re.findall(r"threads=(\d+) ns_per_call=(\d+)", text):
            runs["callable", "tokio", int(callers)]["us"].append(int(ns) / 1000)
        context["tokio"] = re.findall(r"^(rustc [\d.]+|tokio [\d.]+)", text, re.M)
    return runs, context


runs, context = read()


def median(what, way, callers, counter="us"):
    values = runs.get((what, way, callers), {}).get(counter)
    return statistics.median(values) if values else None


def figure(value, digits=3):
    if value is None:
        return ""
    return f"{value:.{digits}g}" if value < 10 ** digits else f"{value:.0f}"


def machine():
    cpuinfo = pathlib.Path("/proc/cpuinfo").read_text()
    model = re.search(r"^model name\s*: *(.*)", cpuinfo, re.M)
    system = re.search(r'^PRETTY_NAME="?([^"\n]*)', pathlib.Path("/etc/os-release").read_text(), re.M)
    asio = int(context["asio"])
    lines = [("processor", f"{model[1] if model else platform.machine()}, {context['mhz_per_cpu']} MHz"
              + (", in a virtual machine" if re.search(r"^flags.* hypervisor\b", cpuinfo, re.M) else "")),
             ("number of processors", context["num_cpus"]),
             ("system", f"{system[1] if system else platform.system()}, Linux {platform.release()}"),
             ("compiler", f"{context['compiler']}, `-O3` (CMake's `Release`)"),
             ("Asio", f"{asio // 100000}.{asio // 100 % 1000}.{asio % 100}")]
    if context.get("tokio"):
        lines.append(("tokio bridge (Rust)", ", ".join(dict.fromkeys(context["tokio"]))))
    lines += [("rounds", context["rounds"]), ("date", context["date"][:10])]
    return "\n".join(["| measured on | |", "|---|---|"] + [f"| {name} | {value} |" for name, value in lines])


def rows():
    for what, name in WHATS.items():
        for callers in (1, 2, 8, 64):
            if median(what, "bridge", callers) is not None:
                yield what, callers, f"| {name} | {callers} |"
                name = ""


def ratio(what, callers, a, b):
    first, second = median(what, a, callers), median(what, b, callers)
    return figure(first / second, 2) if first and second else "?"


def times():
    lines = ["| us per call | callers | " + " | ".join(WAYS.values()) + " |", "|---|" + "---:|" * (len(WAYS) + 1)]
    for what, callers, head in rows():
        lines.append(f"{head} " + " | ".join(figure(median(what, way, callers)) for way in WAYS) + " |")
    compared = [f"`co_spawn` with `use_future` takes {ratio('callable', 1, 'use_future', 'bridge')}, "
                f"{ratio('callable', 8, 'use_future', 'bridge')} and {ratio('callable', 64, 'use_future', 'bridge')} times "
                f"as long as runtime_bridge"]
    if median("callable", "tokio", 1):
        compared.append(f"the tokio bridge (Rust) {ratio('callable', 1, 'tokio', 'bridge')}, "
                        f"{ratio('callable', 8, 'tokio', 'bridge')} and {ratio('callable', 64, 'tokio', 'bridge')} times")
    return "\n".join(lines + [
        "",
        f"- With 1, 8 and 64 callers, {', and '.join(compared)}.",
        f"- With one caller, the echo takes {ratio('echo', 1, 'bridge', 'blocking')} times as long as with blocking "
        f"system calls; with eight, {ratio('echo', 8, 'bridge', 'blocking')} times.",
        f"- A message from one thread to another and back takes {figure(median('floor', 'futex', 1))} us if the threads "
        f"sleep while they wait, and {figure(median('floor', 'spinning', 1))} us if they spin. Every call to another "
        f"thread includes such a round trip.",
        f"- If 10000 tasks are submitted at once, each takes {figure(median('submit', 'bridge', 1))} us."])


def costs():
    lines = ["| per call | callers | CPU time in us | CPU time with co_spawn + use_future | allocations | context switches |",
             "|---|" + "---:|" * 5]
    for what, callers, head in rows():
        cells = [figure(median(what, way, callers, "cpu_us")) for way in ("bridge", "use_future")]
        cells += [figure(median(what, "bridge", callers, counter), 2) for counter in ("allocations", "switches")]
        lines.append(f"{head} " + " | ".join(cells) + " |")
    cache = {size: [figure(median(f"cache_{size}/callable", "bridge", callers, "allocations"), 2) for callers in (1, 8)]
             for size in (8, 32)}
    return "\n".join(lines + [
        "",
        f"- With `ASIO_RECYCLING_ALLOCATOR_CACHE_SIZE=8` and one caller, a call makes {cache[8][0]} allocations; with 32 "
        f"and eight callers, {cache[32][1]}.",
        f"- A bridge takes {context['bridge_bytes']} bytes, and {context['worker_bytes']} bytes on the heap. A call takes "
        f"{context['call_bytes']} bytes on the caller's stack."])


def compiling():
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
            f"headers, mostly `<future>` and `<stop_token>`.\n" + (folder / "compile.txt").read_text().rstrip())


def for_readme():
    def both(way):
        return [figure(median("callable", way, callers)) for callers in (1, 8)]

    (one, eight), (one_future, eight_future) = both("bridge"), both("use_future")
    return ("\n".join([
        f"A call of a task that returns at once costs {one} us with one caller, and {eight} us with eight; `co_spawn` with",
        f"`use_future` costs {one_future} and {eight_future} us. (Elapsed time, divided by the number of calls: with eight callers, each",
        "waits about eight times as long.)"]))


def picture():
    """Bars on a linear axis. A frame and a white ground of its own, so that it can be read on a dark page, too."""
    colours = {"bridge": "#1d4ed8", "no_spinning": "#93c5fd", "use_future": "#f59e0b", "post_and_promise": "#a8a29e",
               "tokio": "#b45309"}
    floors = [("both threads sleep", median("floor", "futex", 1)),
              ("both threads spin", median("floor", "spinning", 1))]
    groups = [(f"{callers} caller{'s' if callers > 1 else ''}",
               [(WAYS[way], median("callable", way, callers), colour) for way, colour in colours.items()])
              for callers in (1, 8, 64)]
    groups.append(("For comparison: a message to another thread and back", [(n, v, "#a8a29e") for n, v in floors]))
    groups = [(title, [bar for bar in bars if bar[1] is not None]) for title, bars in groups]
    longest = max(bar[1] for _, bars in groups for bar in bars)
    step = next(s for s in (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 10 ** 6) if longest / s <= 7)

    left, right, top, y = 268, 690, 78, 78
    scale = (right - left) / longest
    drawn = []
    for title, bars in groups:
        drawn.append(f'<text x="24" y="{y + 15}" font-weight="600">{title}</text>')
        y += 24
        for name, value, colour in bars:
            strong = ' font-weight="600"' if name == "runtime_bridge" else ""
            drawn.append(f'<text x="{left - 10}" y="{y + 14}" text-anchor="end"{strong}>{name}</text>'
                         f'<rect x="{left}" y="{y + 1}" width="{max(scale * value, 1):.1f}" height="17" fill="{colour}"/>'
                         f'<text x="{left + scale * value + 7:.1f}" y="{y + 14}"{strong}>{figure(value)}</text>')
            y += 22
        y += 12
    grid = [f'<line x1="{left + scale * x:.1f}" y1="{top}" x2="{left + scale * x:.1f}" y2="{y}" stroke="#e5e7eb"/>'
            f'<text x="{left + scale * x:.1f}" y="{y + 18}" text-anchor="middle" fill="#4b5563">{x}</text>'
            for x in range(0, int(longest) + 1, step)]
    note = (f"Shorter is better. Medians of {context['rounds']} rounds on {context['num_cpus']} processors, "
            f"{context['date'][:10]}")
    return "\n".join([
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 760 {y + 60}" width="760" height="{y + 60}" role="img"'
        ' aria-labelledby="title" font-family="system-ui, -apple-system, \'Segoe UI\', Helvetica, Arial, sans-serif"'
        ' font-size="14" fill="#111827">',
        '<title id="title">Time of a call of a task that returns at once, in microseconds</title>',
        f'<rect x="1" y="1" width="758" height="{y + 58}" rx="10" fill="#ffffff" stroke="#9ca3af" stroke-width="1.5"/>',
        '<text x="24" y="35" font-size="18" font-weight="600">Time of a call of a task that returns at once</text>',
        f'<text x="24" y="58" fill="#4b5563">{note}</text>',
        *grid, *drawn,
        f'<text x="{(left + right) / 2:.0f}" y="{y + 42}" text-anchor="middle" fill="#4b5563">'
        'microseconds per call (elapsed time, divided by the calls of all callers)</text>',
        "</svg>", ""])


def write(page, blocks):
    """Replaces what is between the marks of each block."""
    text = page.read_text()
    for name, block in blocks.items():
        begin, end = f"<!-- {name} -->\n", f"<!-- /{name} -->\n"
        if text.count(begin) != 1 or text.count(end) != 1:
            sys.exit(f"{page}: the marks {begin.strip()} and {end.strip()} must be there once")
        before, rest = text.split(begin)
        text = before + begin + block + "\n" + end + rest.split(end)[1]
    page.write_text(text)


numbers = {"machine": machine(), "times": times(), "costs": costs(), "compile times": compiling()}
print("\n\n".join(numbers.values()), f"For the README: {for_readme()}", sep="\n\n")
if "--update" in sys.argv:
    write(root / "docs/numbers.md", {f"tests/bench/run: {name}": block for name, block in numbers.items()})
    write(root / "README.md", {"tests/bench/run": for_readme()})
    (root / "docs/calls.svg").write_text(picture())
