"""The pages that people read, taken apart: their commands, their links, their blocks of code; and the help of the commands they name."""

from __future__ import annotations

import contextlib
import io
import os
import re
import shlex
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from unittest import mock

from ooc_moe.cli import main as trainer_cli
from ooc_moe_server.daemon import cli as daemon_cli

ROOT = Path(__file__).parents[2]
DOCS = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").glob("*.md"))
# All pages by their path in the repository. The changelog and the kept results (tests/bench/results) tell of the past: their commands are
# not checked, and a kept result is never edited when a file moves.
PAGES = {name: (ROOT / name).read_text() for name in ("README.md", "CONTRIBUTING.md", "deploy/README.md", "Makefile", *DOCS)}
MAIN = {"ooc-moe": trainer_cli.main, "ooc-moe-server": daemon_cli.main}


def code(page: str) -> list[str]:
    """The lines of a page that are code: fenced or indented; a line continued with a backslash is one line."""
    lines, fenced = [], False
    for line in page.replace("\\\n", " ").splitlines():
        if line.lstrip().startswith("```"):
            fenced = not fenced
        elif fenced or line.startswith(("    ", "\t")):
            lines.append(line.strip())
    return lines


def blocks(page: str, language: str) -> list[str]:
    """The fenced blocks in a language; "" are the blocks that name none: shell commands."""
    found: list[str] = []
    fence: str | None = None  # The language of the block that is open.
    for line in page.splitlines(keepends=True):
        if not line.startswith("```"):
            if fence == language:
                found[-1] += line
        elif fence is not None:
            fence = None
        else:
            fence = line.strip("`\n")
            if fence == language:
                found.append("")
    return found


def commands(page: str) -> list[list[str]]:
    """Every `ooc-moe ...` line of a page's code, as words, without what follows a pipe."""
    found = [re.search(r"(?:^(?:\$ )?|/)(ooc-moe(?:-server)?\s.*)", line) for line in code(page)]
    lines = [shlex.split(match[1], comments=True) for match in found if match]
    return [words[: words.index("|")] if "|" in words else words for words in lines]


def links(page: str) -> Iterator[str]:
    """The targets of a page's links and pictures."""
    for match in re.finditer(r"\]\(([^)\s]+)\)", page):
        yield match[1]


def anchors(page: str) -> set[str]:
    """The anchors of a page's headings, as GitHub and MkDocs both make them."""
    headings = re.findall(r"^#+ (.*)$", page, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@cache
def help_of(*words: str) -> str | None:
    """What `--help` prints, wide enough that no flag is cut; None when there is no such command."""
    out, environment = io.StringIO(), {"COLUMNS": "300", "TERM": "dumb"}
    arguments = mock.patch.object(sys, "argv", [*words, "--help"])
    with arguments, mock.patch.dict(os.environ, environment), contextlib.redirect_stdout(out), contextlib.redirect_stderr(io.StringIO()):
        try:
            MAIN[words[0]]()
        except SystemExit as end:
            if end.code:
                return None
    return out.getvalue()


def subcommand(words: list[str]) -> list[str]:
    """The leading words that name the command and not its arguments: `ooc-moe bank ls`, `ooc-moe-server verify`.

    A word belongs to the command when the help changes with it.
    """
    leading = words[:1]
    for word in words[1:]:
        if not re.fullmatch(r"[a-z]+", word) or help_of(*leading, word) in (None, help_of(*leading)):
            break
        leading.append(word)
    return leading


def unknown_flags(page: str) -> list[tuple[str, str]]:
    """(command, flag) of every flag on the page that its command does not have."""
    return [
        (" ".join(command), flag)
        for words in commands(page)
        for command in [subcommand(words)]
        for flag in (word.partition("=")[0] for word in words if word.startswith("--"))
        if not re.search(rf"(?<![\w-]){flag}(?![\w-])", help_of(*command) or "")
    ]
