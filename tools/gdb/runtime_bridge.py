# SPDX-License-Identifier: Apache-2.0
#
# For gdb: prints what RuntimeBridge::report prints, of a stopped process or of a core file.
#
#   (gdb) source tools/gdb/runtime_bridge.py
#   (gdb) runtime-bridge calls
#
# It only reads memory, and calls no function of the program. The program must have been compiled with -g (optimised or
# not) and use libstdc++. Each line is one of the report, followed by gdb's names for the thread:
#
#   storage#1: 1 call in flight; the worker has been busy for 3.2 s: some task computes or blocks [worker: thread 2, LWP 78]
#     running, 3.2 s old: main.cpp:12 "get key", called by thread 140051 "main" [caller: thread 1, LWP 77]
#
# So `thread apply 2 backtrace` shows what that worker is doing.
#
# A core file does not tell when it was written. Its own date is taken for that, or the date that is given:
#
#   (gdb) runtime-bridge calls 2026-11-26 19:30:00+00:00

import datetime
import os
import re
import sys
import time

import gdb

NAMESPACE = "runtime_bridge::v0_2::detail"

# std::chrono::steady_clock::time_point::max(): a call without a deadline.
NO_DEADLINE = 2**63 - 1

BUSY_AFTER = 50_000_000  # as in CallRegistry::describe_worker

# In the order of runtime_bridge::State.
QUEUED, WAITING, RUNNING, CANCELLING = range(4)
STATES = ("queued", "waiting for its turn", "running", "cancelling")


class Problem(Exception):
    """Why there is nothing to print."""


# ---- Reading memory


def address(value):
    return int(value.address)


def number(value):
    """What an integer, an enumerator, an atomic, a time or the id of a thread holds: all are one number in memory."""
    data = gdb.selected_inferior().read_memory(address(value), value.type.sizeof)
    return int.from_bytes(bytes(data), sys.byteorder, signed=True)


def read_bytes(start, length):
    # A length that is garbage must not make gdb read gigabytes.
    return bytes(gdb.selected_inferior().read_memory(start, min(length, 1 << 20))) if length > 0 else b""


def printable(text):
    """Bytes as the report prints them: as they are, control characters escaped."""
    escaped = re.sub(rb"[\x00-\x1f\x7f]", lambda match: b"\\x%02x" % match[0][0], text)
    return escaped.decode("utf-8", "backslashreplace")


def quoted(text):
    return f' "{printable(text)}"' if text else ""


def string(value):
    """A std::string of libstdc++. Some compilers leave its members to the debugging information of libstdc++."""
    pointer = gdb.lookup_type("unsigned long").pointer()
    words = gdb.Value(address(value)).cast(pointer)
    start = int(words[0])
    is_old_abi = value.type.sizeof == pointer.sizeof
    length = int(gdb.Value(start).cast(pointer)[-3]) if is_old_abi else int(words[1])
    return read_bytes(start, length)


def c_string(value):
    start = int(value)
    text = b""
    while start and b"\0" not in text and len(text) < 4096:
        try:
            text += read_bytes(start + len(text), 64)
        except gdb.MemoryError:  # the last bytes before memory that is not mapped, or literals that a core leaves out
            try:
                text += read_bytes(start + len(text), 1)
            except gdb.MemoryError:
                return text or b"?"
    return text.split(b"\0")[0]


def location(value):
    """The file and the line of a SourceLocation, which is std::source_location or the library's own."""
    fields = [field.name for field in value.type.strip_typedefs().fields()]
    if "file_" in fields:
        return c_string(value["file_"]), int(value["line_"])
    implementation = value["_M_impl"] if "_M_impl" in fields else value["__ptr_"]
    return c_string(implementation["_M_file_name"]), int(implementation["_M_line"])


def nodes(head):
    """The addresses in a list, without its head. A process may have been stopped while it changed the list."""
    kind = head.type.unqualified().pointer()
    seen = {address(head)}
    node = int(head["next_"])
    while node not in seen:
        seen.add(node)
        yield node
        node = int(gdb.Value(node).cast(kind)["next_"])


def object_of(node, kind):
    """The object whose base class ListNode is at this address."""
    base = next(field for field in kind.fields() if field.is_base_class and field.name.endswith("ListNode"))
    return gdb.Value(node - base.bitpos // 8).cast(kind.pointer()).dereference()


# ---- Threads


class Threads:
    """gdb's threads, by what pthread_self() is in them."""

    def __init__(self):
        self.threads = {}
        for thread in gdb.selected_inferior().threads():
            handle = self.handle(thread)
            if handle:
                self.threads[handle] = thread

    @staticmethod
    def handle(thread):
        try:
            return int.from_bytes(thread.handle()[:8], sys.byteorder)
        except (AttributeError, NotImplementedError, RuntimeError, gdb.error):
            pass  # gdb has no libthread_db for this program
        for register in ("fs_base", "tpidr"):
            try:
                return int(on_thread(thread, lambda: gdb.newest_frame().read_register(register)))
            except (ValueError, gdb.error):
                pass
        return None

    def find(self, handle):
        return self.threads.get(handle % 2**64)


def on_thread(thread, function):
    before = gdb.selected_thread()
    frame = gdb.selected_frame() if before else None
    try:
        thread.switch()
        return function()
    finally:
        if before:
            before.switch()
            frame.select()


def label(role, thread):
    return f" [{role}: thread {thread.num}, LWP {thread.ptid[1]}]" if thread else ""


def name_of(thread):
    """The system's name of a thread. A core file has none."""
    return thread.name.encode() if thread and thread.name else b""


def is_in_handler(thread):
    """Whether a worker runs a handler, and not only its loop. None if its stack does not tell."""

    def look():
        found = False
        frame = gdb.newest_frame()
        for _ in range(10_000):
            name = frame.name() or ""
            if name.startswith("runtime_bridge::") and name.endswith("::Worker::run"):
                return found
            if "SpinPolicy" in name:  # it stays awake, but has nothing to do
                return False
            # Asio calls all handlers through functions of this name.
            if "asio::" in name and name.endswith("::do_complete"):
                found = True
            frame = frame.older()
            if frame is None:
                return None
        return None

    try:
        return on_thread(thread, look)
    except gdb.error:
        return None


# ---- Bridges and calls


class Call:
    def __init__(self, record):
        asked = number(record["asked_"])
        self.state = CANCELLING if asked else number(record["state_"])
        self.over = number(record["over_"]) != 0
        self.file, self.line = location(record["where_"])
        self.name = string(record["name_"])
        self.start = number(record["start_"])
        self.deadline = number(record["deadline_"])
        self.caller = number(record["caller_"]) % 2**64

    def describe(self, now, threads):
        state = STATES[self.state] if self.state in range(len(STATES)) else "?"
        place = f"{printable(self.file)}:{self.line}" if self.line else "place unknown"
        text = f"  {state}, {seconds(max(now - self.start, 0))} old: {place}{quoted(self.name)}"
        thread = threads.find(self.caller) if self.caller else None
        text += f", called by thread {self.caller}{quoted(name_of(thread))}" if self.caller else ", submitted"
        if self.deadline != NO_DEADLINE and self.deadline > now:
            text += f", deadline in {seconds(self.deadline - now)}"
        elif self.deadline != NO_DEADLINE:
            text += f", deadline passed {seconds(now - self.deadline)} ago"
        return text + label("caller", thread)


class Bridge:
    def __init__(self, registry, call_type):
        node = registry["node_"].referenced_value()
        heartbeat = registry["heartbeat_"].referenced_value()
        self.title = self.title_of(node)
        self.worker = number(node["worker_"]) % 2**64
        other = node["waits_for_"]
        self.waits_for = self.title_of(other.dereference()) if int(other) else None
        self.busy_since = number(heartbeat["busy_since_"])  # 0: nobody has told
        self.watched = number(heartbeat["watched_"]) != 0
        self.asked_at = number(registry["asked_at_"])  # 0: it has answered
        self.closed = number(registry["closed_"]) != 0
        self.max_in_flight = int(registry["max_in_flight_"])
        calls = (Call(object_of(node, call_type)) for node in nodes(registry["calls_"]))
        self.calls = [call for call in calls if not call.over]

    @staticmethod
    def title_of(node):
        # A reference to the std::string in the options.
        return f"{printable(string(node['name_'].referenced_value()))}#{int(node['number_'])}"

    def times(self):
        """The times that the process has noted."""
        return [self.busy_since, self.asked_at] + [call.start for call in self.calls]

    def describe(self, now, threads):
        count = len(self.calls)
        thread = threads.find(self.worker) if self.worker else None
        text = f"{self.title}: {count} {'call' if count == 1 else 'calls'} in flight; " + self.describe_worker(now, thread)
        if self.closed and self.worker:
            text += "; the bridge is being shut down"
        waiting = sum(call.state == WAITING for call in self.calls)
        if waiting:
            text += f"; {waiting} {'call waits' if waiting == 1 else 'calls wait'}"
            text += f" for one of the {self.max_in_flight} that run (max_in_flight)"
        return "\n".join([text + label("worker", thread)] + [call.describe(now, threads) for call in self.calls])

    def describe_worker(self, now, thread):
        if not self.worker:
            return "the worker has ended" if self.closed else "the worker has not started"
        told = self.busy_since or self.asked_at
        busy = max(now - told, 0) if told else 0
        if self.waits_for:
            how_long = seconds(busy) if told else "an unknown time"
            return f"the worker has been waiting for {self.waits_for} for {how_long}"
        if busy > BUSY_AFTER:
            return f"the worker has been busy for {seconds(busy)}: some task computes or blocks"
        if self.busy_since:
            return "the worker is running"
        if not self.watched:
            # The program tells only of the starts of tasks, until it has a timer or a socket. The stack tells the rest.
            in_handler = is_in_handler(thread) if thread else None
            if in_handler:
                return "the worker has been busy for an unknown time: some task computes or blocks"
            if in_handler is None:
                return "the worker may be idle or busy: its stack does not tell"
        if any(call.state in (RUNNING, CANCELLING) for call in self.calls):
            return "the worker is idle: what the tasks wait for has not happened"
        return "the worker is idle"


def seconds(nanoseconds):
    """As the report: milliseconds, or tenths of a second."""
    ms = nanoseconds // 1_000_000
    return f"{ms} ms" if ms < 1000 else f"{ms // 1000}.{ms % 1000 // 100} s"


def statics(name):
    """The static members of CallRegistry with this name: one for each module that does not share its symbols."""
    found = {}
    for objfile in gdb.objfiles():
        full_name = f"{NAMESPACE}::CallRegistry::{name}"
        symbol = objfile.lookup_global_symbol(full_name) or objfile.lookup_static_symbol(full_name)
        if symbol is None:
            continue
        value = symbol.value()
        # gdb takes the symbol of the program for that of a library, even if they are two.
        if address(value) in found:
            value = own_static(objfile, name, value)
        found[address(value)] = value
    return list(found.values())


def own_static(objfile, name, value):
    """What the symbol table of a module itself has for a static member; `value` if it has none."""
    mangled = "_ZN" + "".join(f"{len(part)}{part}" for part in f"{NAMESPACE}::CallRegistry::{name}".split("::")) + "E"
    try:
        symbols = gdb.execute(f'maint print msymbols -objfile "{objfile.filename}"', to_string=True)
    except gdb.error:
        return value
    match = re.search(rf"(0x[0-9a-f]+) {mangled} ", symbols)
    return gdb.Value(int(match[1], 16)).cast(value.type.pointer()).dereference() if match else value


def has_symbol(name):
    """Whether the program has a symbol of this name, with debugging information or without."""
    try:
        gdb.parse_and_eval(f"&'{name}'")
        return True
    except gdb.error:
        return False


def read_bridges():
    heads = statics("bridges")
    try:
        registry_type = gdb.lookup_type(f"{NAMESPACE}::CallRegistry")
        call_type = gdb.lookup_type(f"{NAMESPACE}::CallRecord")
    except gdb.error:
        registry_type = call_type = None
    if not heads or registry_type is None:
        if heads or has_symbol(f"{NAMESPACE}::CallRegistry::bridges"):
            raise Problem("the program has no debugging information about its bridges: compile it with -g")
        if not has_symbol("main"):
            raise Problem("the program has no symbols: gdb needs one that is not stripped, compiled with -g")
        raise Problem(f"the program has no {NAMESPACE}::CallRegistry: it does not use this version of the library")
    bridges = []
    starts = {address(head) for head in heads}
    for head in heads:
        for node in nodes(head):
            if node in starts:  # the copy of a module that shares the symbols of another one
                break
            registry = object_of(node, registry_type)
            fork_counter = registry["fork_counter_"].referenced_value()
            # As in CallRegistry::for_each_bridge: the worker of a fork's parent is not in this process.
            if number(fork_counter["made_at_"]) == number(fork_counter["forks_"].referenced_value()):
                bridges.append(Bridge(registry, call_type))
    return bridges


# ---- The time


def core_file():
    """The path of the core file that gdb reads; None for a process."""
    match = re.search(r"core[^\n]*:\n\s*[`'\"‘](.*)['\"’], ", gdb.execute("info files", to_string=True))
    return match[1] if match else None


def is_local_process():
    connection = getattr(gdb.selected_inferior(), "connection", None)
    return connection is None or connection.type == "native"


def now_and_source(bridges, given):
    """The steady clock's time, and what it was taken from, if that is not the clock itself."""
    latest = max((time_ for bridge in bridges for time_ in bridge.times()), default=0)
    core = core_file()
    if core is None and is_local_process() and not given:
        return time.clock_gettime_ns(time.CLOCK_MONOTONIC), None
    date, source = None, "the last thing that a bridge has noted, as the time of the stop is not known"
    if given:
        date, source = parse_date(given), "the given date"
    elif core is not None:
        try:
            date, source = os.stat(core).st_mtime_ns, "the date of the core file"
        except OSError:
            pass
    offset = next(filter(None, (number(value) for value in statics("system_minus_steady"))), None)
    if date is None or offset is None:
        return latest, source if date is None else "the last thing that a bridge has noted"
    shown = time.strftime("%Y-%m-%d %H:%M:%S %z", time.localtime(date / 1e9))
    if date - offset < latest - 1_000_000_000:
        return latest, f"the last thing that a bridge has noted, as {shown} ({source}) was before that"
    return max(date - offset, latest), f"{shown}, {source}"


def parse_date(text):
    """Nanoseconds since 1970 of an ISO date, or of seconds since 1970."""
    try:
        if re.fullmatch(r"@?[0-9]+(\.[0-9]+)?", text):
            return int(float(text.lstrip("@")) * 1e9)
        return int(datetime.datetime.fromisoformat(text).timestamp() * 1e9)
    except ValueError:
        raise Problem(f"'{text}' is not a date: write it as 2026-11-26 19:30:00, or as seconds since 1970") from None


# ---- Commands


def report(date):
    if not gdb.selected_inferior().threads():
        raise Problem("there is no process and no core file")
    bridges = read_bridges()
    now, source = now_and_source(bridges, date)
    count = len(bridges)
    text = f"runtime_bridge: {count} {'bridge' if count == 1 else 'bridges'}"
    if source and bridges:
        text += f"; ages and deadlines are as of {source}"
    threads = Threads()
    return "\n".join([text] + [bridge.describe(now, threads) for bridge in bridges]) + "\n"


class RuntimeBridgeCommand(gdb.Command):
    """Commands about the bridges of the library runtime_bridge."""

    def __init__(self):
        super().__init__("runtime-bridge", gdb.COMMAND_STATUS, prefix=True)


class CallsCommand(gdb.Command):
    """Print all bridges, their workers and their calls, as RuntimeBridge::report does.

    Usage: runtime-bridge calls [DATE]

    DATE is when a core file was written, if its own date is not that: 2026-11-26 19:30:00, or seconds since 1970."""

    def __init__(self):
        super().__init__("runtime-bridge calls", gdb.COMMAND_STATUS)

    def invoke(self, argument, from_tty):
        try:
            gdb.write(report(argument.strip().strip("'\"")))
        except Problem as problem:
            raise gdb.GdbError(f"runtime_bridge: {problem}") from None
        except gdb.MemoryError as error:
            raise gdb.GdbError(
                f"runtime_bridge: {error}: the core file is not complete, or the process was stopped in the middle of a change"
            ) from None
        except gdb.error as error:
            raise gdb.GdbError(f"runtime_bridge: the debugging information is not what this script expects: {error}") from None


RuntimeBridgeCommand()
CallsCommand()
