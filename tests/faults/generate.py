# SPDX-License-Identifier: Apache-2.0
"""Reads a C++ header well enough to find its functions and statements, and makes a fault of each.

All generated faults go into one copy of the header, each behind a switch, so that each test program is compiled once:
the environment variable RUNTIME_BRIDGE_FAULT chooses the one that is on. RUNTIME_BRIDGE_REACHED names a file in which
the program notes the switches that it came past.

It knows the style of this header, not all of C++. What it does not understand it leaves alone, and what does not
compile is dropped by the caller.
"""

import dataclasses
import re

SWITCHES = """
#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>
#include <cstdlib>
#include <new>
#include <type_traits>
namespace switches {
inline const int chosen = std::getenv("RUNTIME_BRIDGE_FAULT") ? std::atoi(std::getenv("RUNTIME_BRIDGE_FAULT")) : -1;
inline unsigned char* const reached = [] {
  const char* const name = std::getenv("RUNTIME_BRIDGE_REACHED");
  const int file = name ? ::open(name, O_RDWR | O_CLOEXEC) : -1;
  if (file == -1) return static_cast<unsigned char*>(nullptr);
  void* const memory = ::mmap(nullptr, 65536, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
  ::close(file);
  return memory == MAP_FAILED ? nullptr : static_cast<unsigned char*>(memory);
}();
inline bool look(int number) noexcept {
  if (reached) __atomic_store_n(reached + number, 1, __ATOMIC_RELAXED);
  return number == chosen;
}
constexpr bool on(int number) noexcept { return std::is_constant_evaluated() ? false : look(number); }
template <class Make>
class Guard {  // a local that does something in its destructor only, unless its fault is on
  using T = std::invoke_result_t<Make&>;
 public:
  Guard(int number, Make make) : made_(!on(number)) { if (made_) ::new (memory_) T(make()); }
  Guard(const Guard&) = delete;
  ~Guard() { if (made_) reinterpret_cast<T*>(memory_)->~T(); }
 private:
  alignas(T) unsigned char memory_[sizeof(T)];
  bool made_;
};
}
"""

TOKEN = re.compile(
    r"""(?P<blank>\s+|//[^\n]*|/\*.*?\*/)
      | (?P<directive>(?:(?<=\n)|\A)\#(?:[^\n\\]|\\.)*)
      | (?P<string>"(?:[^"\\\n]|\\.)*"|'(?:[^'\\\n]|\\.)+')
      | (?P<word>[A-Za-z_]\w*)
      | (?P<number>\d[\w.']*)
      | (?P<sign>\.\.\.|::|->|\+\+|--|<<=|<=>|<<|<=|>=|==|!=|&&|\|\||[-+*/%&|^]=|\[\[|.)""",
    re.VERBOSE | re.DOTALL,
)  # ">>" is two, as it ends templates; so is "]]"


@dataclasses.dataclass
class Token:
    text: str
    begin: int
    end: int
    kind: str


def tokens_of(text):
    """Without comments and directives."""
    found = (Token(m.group(), m.start(), m.end(), m.lastgroup) for m in TOKEN.finditer(text))
    return [t for t in found if t.kind not in ("blank", "directive")]


@dataclasses.dataclass
class Fault:
    number: int
    kind: str  # delete, negate, order, catch
    begin: int  # in the header
    end: int
    line: int
    text: str
    guard: bool = False  # what is deleted is a local with a destructor: mostly a lock
    edits: list = dataclasses.field(default_factory=list)  # (begin, end, text)


OPEN = {"(": ")", "[": "]", "{": "}", "[[": "]"}
LOOSE = {"const", "constexpr", "static", "auto", "using", "typedef", "struct", "class", "enum", "union", "static_assert",
         "constinit", "thread_local", "unsigned", "int", "bool", "char", "long", "void", "double", "template"}  # fmt: skip
ATOMICS = {"load": 0, "store": 1, "exchange": 1, "fetch_add": 1, "fetch_sub": 1, "fetch_or": 1, "fetch_and": 1,
           "compare_exchange_weak": 2, "compare_exchange_strong": 2}  # fmt: skip


class Header:
    """`faults`, and `scopes`: (qualified name, begin, end) of each class and function."""

    def __init__(self, text):
        self.text, self.tokens = text, tokens_of(text)
        self.faults, self.scopes = [], []
        self.partner = self.match()
        self.declarations(0, len(self.tokens), "")
        self.orders()

    def match(self):
        """The index of the token that closes what each opens."""
        partner, stack = {}, []
        for i, token in enumerate(self.tokens):
            if token.text in OPEN:
                stack.append(i)
                if token.text == "[[":
                    stack.append(i)
            elif stack and token.text == OPEN[self.tokens[stack[-1]].text]:
                partner[stack.pop()] = i
        return partner

    def at(self, i):
        return self.tokens[i].text if 0 <= i < len(self.tokens) else ""

    def find(self, i, end, *texts):
        """The first of these tokens, but not inside of brackets; `end` if there is none."""
        while i < end and self.at(i) not in texts:
            i = self.partner.get(i, i) + 1
        return min(i, end)

    def source(self, i, end):
        return self.text[self.tokens[i].begin : self.tokens[end - 1].end]

    # Declarations of namespaces and classes ---------------------------------------------------------------------------

    def template_end(self, i):
        """Past `template <...>`."""
        while self.at(i) == "template":
            depth, i = 0, i + 1
            while True:
                depth += {"<": 1, ">": -1}.get(self.at(i), 0)
                i = self.partner.get(i, i) + 1
                if depth == 0:
                    break
        return i

    def declarations(self, i, end, scope):
        while i < end:
            begin = i
            i = self.template_end(i)
            if self.at(i) in ("public", "private", "protected") and self.at(i + 1) == ":":
                i += 2
                continue
            if re.fullmatch(r"[A-Z_]{5,}", self.at(i)) and self.at(i + 1) == "(":  # a macro
                i = self.partner[i + 1] + 1
                continue
            stop = self.find(i, end, ";", "{")
            if stop == end:
                return
            head = [t.text for t in self.tokens[i:stop]]
            equals = self.find(i, stop, "=")
            if "operator" in head:
                equals = stop
            if self.at(stop) == ";":
                self.expression(i, stop)
                i = stop + 1
            elif head[:1] in (["namespace"], ["extern"]) or head[:2] == ["inline", "namespace"]:
                self.declarations(stop + 1, self.partner[stop], scope)
                i = self.partner[stop] + 1
            elif equals < stop or "concept" in head or head[:1] == ["enum"]:
                i = self.find(i, end, ";")
                self.expression(begin, i)
                i += 1
            elif any(word in head for word in ("class", "struct", "union")) and self.find(i, stop, "(") == stop:
                words = [w for w in head[: head.index(":")] if w != "final"] if ":" in head else head
                names = [w for w in words if re.match(r"[A-Za-z_]", w) and w not in ("class", "struct", "union", "final")]
                if "<" in words:
                    names = [words[words.index("<") - 1]]
                name = (scope + "::" if scope else "") + (names[-1] if names else "?")
                close = self.partner[stop]
                self.scopes.append((name, self.tokens[begin].begin, self.tokens[close].end))
                self.declarations(stop + 1, close, name)
                i = self.find(close, end, ";") + 1
            elif (parameters := self.parameters(i, stop)) < stop:
                # A member that is initialised with braces is not the body.
                while self.at(stop - 1) not in (")", "const", "noexcept", "override", "final", "]", "try") and (
                        ":" in head and self.at(self.partner[stop] + 1) in (",", "{")):  # fmt: skip
                    stop = self.find(self.partner[stop] + 1, end, "{")
                name = ""
                first = parameters - 1
                if "operator" in head:
                    first = i + head.index("operator")
                    name = "".join(self.at(k) for k in range(first, parameters))
                else:
                    name = self.at(first)
                    if self.at(first - 1) == "~":
                        first -= 1
                        name = "~" + name
                while self.at(first - 1) == "::":
                    first -= 2
                    name = self.at(first) + "::" + name
                close = self.partner[stop]
                name = (scope + "::" if scope else "") + name
                self.scopes.append((name, self.tokens[begin].begin, self.tokens[close].end))
                if "consteval" not in head:
                    returned = [t.text for t in self.tokens[i:first]]
                    self.body(stop, "bool" in returned)
                i = close + 1
                if self.at(i) == "catch":
                    i = self.partner[self.find(i, end, "{")] + 1
            else:
                close = self.partner[stop]  # a variable that is initialised with braces
                i = self.find(close, end, ";") + 1

    def parameters(self, i, stop):
        """The parenthesis that opens a function's parameters."""
        i = self.find(i, stop, "(")
        if self.at(i - 1) == "operator":
            i = self.find(i + 2, stop, "(")
        while i < stop and self.at(i - 1) in ("requires", "noexcept", "alignas", "decltype", "explicit"):
            i = self.find(i + 1, stop, "(")
        return i

    # Statements -------------------------------------------------------------------------------------------------------

    def body(self, open_brace, returns_bool=False):
        self.function = (open_brace, self.partner[open_brace])
        outer = getattr(self, "returns_bool", False)
        self.returns_bool = returns_bool
        self.block(open_brace + 1, self.partner[open_brace], False)
        self.returns_bool = outer

    def block(self, i, end, more):
        """The statements from `i` to `end`. `more` tells that others follow."""
        while i < end:
            i = self.statement(i, end, more)

    def statement(self, i, end, more):
        """Returns where the next begins."""
        text = self.at(i)
        if text == "{":
            close = self.partner[i]
            self.block(i + 1, close, more or close + 1 < end)
            return close + 1
        if text in ("if", "while", "switch", "for"):
            compile_time = self.at(i + 1) == "constexpr"
            paren = i + 2 if compile_time else i + 1
            close = self.partner[paren]
            first, last = paren + 1, close
            if text == "for":
                first = self.find(first, close, ";") + 1
                if first <= close:
                    last = self.find(first, close, ";")
                    if first < last:
                        self.negate(first, last)
                self.expression(paren + 1, close)
            elif not compile_time:
                semicolon = self.find(first, close, ";")
                if semicolon < close:
                    first = semicolon + 1
                if text != "switch":
                    self.negate(first, last)
                self.expression(paren + 1, close)
            branch_end = self.extent(close + 1, end)
            has_else = text == "if" and self.at(branch_end) == "else"
            after = self.extent(branch_end + 1, end) if has_else else branch_end
            # What returns in an `else` or a compile-time choice may be all that returns.
            follows = (more or after < end) and not compile_time
            self.statement(close + 1, branch_end, follows or text in ("while", "for"))
            if has_else:
                self.statement(branch_end + 1, after, follows)
            return after
        if text == "do":
            after_body = self.extent(i + 1, end)
            self.statement(i + 1, after_body, True)
            paren = after_body + 1  # past `while`
            self.negate(paren + 1, self.partner[paren])
            return self.partner[paren] + 2
        if text == "try":
            close = self.partner[i + 1]
            after = self.extent(i, end)
            self.block(i + 2, close, more or after < end)
            i = close + 1
            while i < after:
                brace = self.partner[i + 1] + 1
                self.drop_catch(i, brace)
                self.block(brace + 1, self.partner[brace], more or after < end)
                i = self.partner[brace] + 1
            return after
        if text in ("case", "default"):
            return self.find(i, end, ":") + 1
        if text in ("struct", "class"):
            brace = self.find(i, end, "{", ";")
            if self.at(brace) == "{":
                function = self.function
                self.declarations(brace + 1, self.partner[brace], "local")
                self.function = function
            return self.find(brace, end, ";") + 1
        stop = self.find(i, end, ";")
        if stop > i:
            if text in ("return", "throw", "co_return"):
                deletable = stop == i + 1 or more or stop + 1 < end
                if deletable:
                    self.delete(i, stop)
                literal = self.at(i + 1) in ("true", "false")
                if text == "return" and self.returns_bool and stop > i + 1 and not (deletable and literal):
                    self.negate(i + 1, stop)
            elif text in ("static_assert", "using", "typedef", "template", "asm", "goto", "[[", "assert") or re.search(r"::assert_|^assert_", text + self.at(i + 1) + self.at(i + 2)):
                return stop + 1
            elif self.is_declaration(i, stop):
                self.delete_guard(i, stop)
            else:
                self.delete(i, stop)
            self.expression(i, stop)
        return stop + 1

    def extent(self, i, end):
        """Where the statement ends that begins at `i`."""
        text = self.at(i)
        if text == "{":
            return self.partner[i] + 1
        if text in ("if", "while", "switch", "for"):
            paren = i + 2 if self.at(i + 1) == "constexpr" else i + 1
            i = self.extent(self.partner[paren] + 1, end)
            return self.extent(i + 1, end) if text == "if" and self.at(i) == "else" else i
        if text == "do":
            return self.partner[self.extent(i + 1, end) + 1] + 2
        if text == "try":
            i = self.partner[i + 1] + 1
            while self.at(i) == "catch":
                i = self.partner[self.partner[i + 1] + 1] + 1
            return i
        return self.find(i, end, ";") + 1

    def is_declaration(self, i, stop):
        if self.at(i) in LOOSE:
            return True
        if self.tokens[i].kind != "word":
            return False
        while i < stop and (self.tokens[i].kind == "word" or self.at(i) in ("::", "<", ">", "*", "&", "&&")):
            if self.at(i) in ("*", "&", "&&", ">") and self.tokens[i + 1].kind == "word" and self.at(i + 2) in ("=", "(", "{", ";"):
                return True
            if self.tokens[i].kind == "word" and self.tokens[i + 1].kind == "word" and self.at(i) not in (
                    "co_await", "delete", "new", "throw", "operator"):  # fmt: skip
                return True
            if self.at(i) == "<":
                i = self.past_angles(i, stop)
                if i is None:
                    return False
                if self.tokens[i].kind == "word":
                    return True
                continue
            i += 1
        return False

    def past_angles(self, i, stop):
        depth = 0
        while i < stop:
            depth += {"<": 1, ">": -1}.get(self.at(i), 0)
            i = self.partner.get(i, i) + 1
            if depth == 0:
                return i
        return None

    def expression(self, i, end):
        """The bodies of the lambdas in it."""
        while i < end:
            if self.at(i) == "{" and i in self.partner:
                k = i - 1
                while self.tokens[k].kind == "word" or self.at(k) in ("::", "->", "*", "&", "<", ">"):
                    k -= 1  # mutable, noexcept, the type that it returns
                before = self.at(k)
                is_lambda = before == "]" and self.at(k - 1) != "]" or before == ")" and self.at(self.opener(k) - 1) == "]"
                if is_lambda:
                    function, outer = getattr(self, "function", None), getattr(self, "returns_bool", False)
                    self.body(i, False)
                    self.function, self.returns_bool = function, outer
                    i = self.partner[i]
            i += 1

    def opener(self, close):
        return next(k for k in range(close, -1, -1) if self.partner.get(k) == close)

    # Faults -----------------------------------------------------------------------------------------------------------

    def add(self, kind, i, end, guard=False):
        begin, stop = self.tokens[i].begin, self.tokens[end - 1].end
        line = self.text.count("\n", 0, begin) + 1
        text = re.sub(r"\s+", " ", re.sub(r"//[^\n]*", "", self.text[begin:stop]))
        fault = Fault(len(self.faults) + 1, kind, begin, stop, line, text, guard)
        self.faults.append(fault)
        return fault

    def delete(self, i, stop):
        fault = self.add("delete", i, stop + 1)
        fault.edits = [(fault.begin, fault.begin, f"{{ if (!::switches::on({fault.number})) "), (fault.end, fault.end, " }")]

    def delete_guard(self, i, stop):
        """A local variable that is not mentioned again."""
        if self.at(i) == "static" or self.at(i) in ("using", "typedef", "template"):
            return
        k = i
        name = None
        while k < stop:
            if self.tokens[k].kind == "word" and self.at(k + 1) in (";", "(", "{", "=") and k > i:
                name = k
                break
            k = self.past_angles(k, stop) if self.at(k) == "<" else k + 1
            if k is None:
                return
        if name is None or self.at(name - 1) in ("::", ".", "->", "&"):
            return
        last = self.function[1]
        if any(t.text == self.at(name) for t in self.tokens[stop:last]):
            return
        first = i + 1 if self.at(i) == "const" else i
        kind = self.source(first, name)
        opener = self.at(name + 1)
        if opener == "=":
            result, made = "" if kind == "auto" else f" -> {kind}", ""
            begin_value = self.tokens[name + 2].begin
            tail = "; }"
        else:
            result, made = "", kind
            begin_value = self.tokens[name + 1].begin
            tail = "(); }" if opener == ";" else "; }"
        fault = self.add("delete", i, stop + 1, guard=True)
        fault.edits = [
            (fault.begin, begin_value, f"const ::switches::Guard {self.at(name)}({fault.number}, [&](){result} {{ return {made}"),
            (self.tokens[stop].begin, self.tokens[stop].begin, tail + ")"),
        ]

    def negate(self, i, end):
        equals = self.find(i, end, "=")
        fault = self.add("negate", i, end)
        if equals < end and self.is_declaration(i, end):
            fault.edits = [(fault.end, fault.end, f"; ::switches::on({fault.number}) != static_cast<bool>({self.at(equals - 1)})")]
        else:
            fault.edits = [(fault.begin, fault.begin, f"(::switches::on({fault.number}) != static_cast<bool>("), (fault.end, fault.end, "))")]

    def drop_catch(self, i, brace):
        fault = self.add("catch", i, brace)
        fault.edits = [(self.tokens[brace].end, self.tokens[brace].end, f" if (::switches::on({fault.number})) throw;")]

    def orders(self):
        inside = sorted((begin, end) for name, begin, end in self.scopes)
        for i, token in enumerate(self.tokens):
            if token.text in ("memory_order_acquire", "memory_order_release", "memory_order_acq_rel", "memory_order_seq_cst"):
                fault = self.add("order", i - 2, i + 1)
                fault.edits = [(fault.begin, fault.end,
                                f"(::switches::on({fault.number}) ? ::std::memory_order_relaxed : ::std::{token.text})")]  # fmt: skip
            elif token.text in ATOMICS and self.at(i - 1) in (".", "->") and self.at(i + 1) == "(":
                close = self.partner[i + 1]
                if any("memory_order" in t.text for t in self.tokens[i + 2 : close]):
                    continue
                if not any(begin <= token.begin < end for begin, end in inside):
                    continue
                fault = self.add("order", i, close + 1)
                order = f"(::switches::on({fault.number}) ? ::std::memory_order_relaxed : ::std::memory_order_seq_cst)"
                where = self.tokens[close].begin
                fault.edits = [(where, where, order if ATOMICS[token.text] == 0 else ", " + order)]

    def with_switches(self, faults):
        """The header with these faults, its lines numbered as they were."""
        edits = []
        for fault in faults:
            for k, (begin, end, text) in enumerate(fault.edits):
                opens = k == 0 and fault.edits[-1] is not fault.edits[0] or begin != end
                # At one place what closes comes first, the inner before the outer; then what opens.
                edits.append((begin, 1 if opens else 0, fault.number if opens else -fault.number, end, text))
        edits.sort()
        parts, position = [], 0
        for begin, _, _, end, text in edits:
            if begin < position:
                raise ValueError("faults overlap")
            parts += [self.text[position:begin], text]
            position = end
        return f"{SWITCHES}#line 1\n" + "".join(parts) + self.text[position:]
