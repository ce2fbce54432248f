#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Checks that what the Markdown files of this repository refer to is there: the targets of links and images, their
headings, and each path in backquotes that begins with one of the project's folders."""

import pathlib
import re
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parents[1]
FOLDERS = "cmake|docs|examples|include|packaging|tests|tools"


def prose(page):
    """The text of a page without its code blocks."""
    return re.sub(r"^```.*?^```", "", page.read_text(), flags=re.M | re.S)


def slug(title):
    """The anchor that GitHub gives to a heading."""
    words = re.sub(r"[^\w\- ]", "", re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", title).lower())
    return words.strip().replace(" ", "-")


def anchors(page):
    return {slug(title) for title in re.findall(r"^#+ +(.*)$", prose(page), re.M)}


def missing(page):
    text = prose(page)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = page.parent / path if path else page
        if not file.exists():
            yield f"a link to {target}, which is not there"
        elif anchor and file.suffix == ".md" and anchor not in anchors(file):
            yield f"a link to {target}, which has no such heading"
    for path in re.findall(rf"`((?:{FOLDERS})/[\w./-]*)`", text):
        if not (ROOT / path).exists():
            yield f"{path}, which is not there"


def main():
    listed = subprocess.run(["git", "ls-files", "*.md"], cwd=ROOT, check=True, capture_output=True, text=True)
    wrong = [f"{name}: {what}" for name in listed.stdout.split() for what in missing(ROOT / name)]
    print("\n".join(wrong), end="\n" if wrong else "")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
