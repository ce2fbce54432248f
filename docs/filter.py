#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""What Doxygen reads instead of a file: `filter.py FILE` prints the file with as many lines, written for Doxygen.

In headers: no `detail` namespaces, no inline namespaces, the types that callers know, and a comment for each special
member function that has none. In Markdown: headings have the anchors that GitHub gives them, links between pages lead to
these, and a link to a file that is no page becomes the file's path. A link that leads nowhere is left to Doxygen, which
warns."""

import pathlib
import re
import sys

ROOT = pathlib.Path(__file__).resolve().parents[1]

sys.dont_write_bytecode = True  # nothing beside the sources
sys.path.insert(0, str(ROOT / "tests"))
from links import slug  # noqa: E402

# Types of `detail` in the declarations of public names, and what users call them.
PUBLIC_TYPES = {
    r"detail::TaskValue<detail::InvocationOf<detail::Unnamed<F>, Args\.\.\.>>": "TaskValue<std::invoke_result_t<F, Args...>>",
    r"detail::TaskValue<": "TaskValue<",
    r"detail::StopToken": "std::stop_token",
    r"detail::Expected<": "std::expected<",
    r"detail::net::": "asio::",
}
SPECIAL_MEMBERS = {
    r"(\w+)\(\1&&\)": "Moves.",
    r"(\w+)& operator=\(\1(&&)?( \w+)?\)": "Moves, and gives up what was there before.",
}


# What is no part of the reference: implementation; inline namespaces; specialisations for std; deduction guides, which
# only say that the obvious arguments are taken; friend classes; functions that are deleted for a better error message.
HIDDEN = re.compile(
    r"""^namespace\ (\w*detail)\ {\n .*? ^}\ \ //\ namespace\ \1$
      | ^inline\ namespace\ .*?$ | ^}\ \ //\ namespace\ (?:v\d+_\d+|RUNTIME_BRIDGE_FLAVOUR)$
      | ^template\ <>\nstruct\ std::.*?$ | ^\ *friend\ class\ \w+;$
      | ^template\ <[^\n]*>\n(?:\w+\([^;{]*\)\ ->\ [^;{]*; | \ *requires[^\n]*\n[^;{]*=\ delete;)""",
    re.M | re.S | re.X)


def header(text):
    text = HIDDEN.sub(lambda match: "\n" * match[0].count("\n"), text)
    documented = False
    for line in text.split("\n"):
        if not line.lstrip().startswith("//"):
            line = re.sub(r"\[\[\w+(::\w+)?\]\] ?", "", line)
            for pattern, name in PUBLIC_TYPES.items():
                line = re.sub(pattern, name, line)
            for pattern, comment in SPECIAL_MEMBERS.items():
                if not documented and re.match(rf" *{pattern}", line):
                    line = f"/** {comment} */ {line}"
        documented = line.lstrip().startswith("///")
        yield line


def page_id(path):
    return "page-" + path.relative_to(ROOT).with_suffix("").as_posix().replace("/", "-").lower()


def is_page(path):
    return path.suffix == ".md" and (path.parent == ROOT / "docs" or path == ROOT / "README.md")


CODE_AND_LINKS = r"(^ *```.*?^ *```$|`[^`]*`|\]\([^)]*\)|https?://\S*)"


def escaped(part):
    """A part of a page. What Doxygen would take for a command is escaped, except in code and links."""
    if re.fullmatch(CODE_AND_LINKS, part, flags=re.M | re.S):
        return part
    return re.sub(r"(?<!&)([@#%\\])(?=\w)", r"\\\1", part)


def nowhere(target):
    """Makes Doxygen warn."""
    return f"@ref {slug(target)}"


def markdown(path, text):
    def link(match):
        text, target = match[1], match[2]
        if re.match(r"[a-z]+:", target):
            return match[0]
        name, _, anchor = target.partition("#")
        file = (path.parent / name).resolve() if name else path
        if not file.exists():
            return nowhere(target)
        if not is_page(file):
            shown = file.relative_to(ROOT).as_posix()
            return text if name in text or shown in text else f"{text} (`{shown}`)"
        if file == ROOT / "README.md" and not anchor:
            return f"[{text}](@ref index)"
        return f"[{text}](@ref {page_id(file)}{'-' * bool(anchor)}{anchor})"

    def image(match):
        file = (path.parent / match[2]).resolve()
        return f"![{match[1]}]({file.relative_to(ROOT)})" if file.exists() else nowhere(match[2])

    text = "".join(escaped(part) for part in re.split(CODE_AND_LINKS, text, flags=re.M | re.S))
    fence = False
    after_title = False
    for line in text.split("\n"):
        if line.lstrip().startswith("```"):
            fence = not fence
        elif after_title and not line:
            line = "[TOC]"
        elif not fence:
            if match := re.match(r"(#+) +(.*)", line):
                anchor = page_id(path) + ("" if match[1] == "#" else "-" + slug(match[2]))
                # Doxygen would show the tags that it makes of Markdown in a heading with an anchor.
                line = f"{match[1]} {match[2].replace('`', '').replace('<', '&lt;')} {{#{anchor}}}"
            else:
                line = re.sub(r"!\[([^]]*)\]\(([^)\s]+)\)", image, line)
                line = re.sub(r"(?<!!)\[([^]]*)\]\(([^)\s]+)\)", link, line)
        after_title = line.startswith("# ") and not fence
        yield line


def main():
    path = pathlib.Path(sys.argv[1]).resolve()
    text = path.read_text()
    print("\n".join(markdown(path, text) if path.suffix == ".md" else header(text)), end="")


if __name__ == "__main__":
    main()
