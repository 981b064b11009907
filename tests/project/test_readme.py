"""What the README tells people to type exists, and so do the files it points to."""

import re
import shlex
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
PAGES = {name: (ROOT / name).read_text() for name in ("README.md", "deploy/README.md", "Makefile")}
TOP = "protos|server|client|ooc_moe|tests|deploy"


def code(page: str) -> list[str]:
    """The lines of a page that are code: fenced or indented; a line continued with a backslash is one line."""
    lines, fenced = [], False
    for line in page.replace("\\\n", " ").splitlines():
        if line.startswith("```"):
            fenced = not fenced
        elif fenced or line.startswith(("    ", "\t")):
            lines.append(line.strip())
    return lines


def commands() -> list[list[str]]:
    """Every `ooc-moe ...` line of the README, the deployment page and the Makefile, as words."""
    found = [re.search(r"(?:^(?:\$ )?|/)(ooc-moe(?:-server)?\s.*)", line) for page in PAGES.values() for line in code(page)]
    return [shlex.split(match[1], comments=True) for match in found if match]


@cache
def help_of(*words: str) -> str:
    """What `--help` prints, wide enough that no flag is cut."""
    env = {"COLUMNS": "300", "TERM": "dumb", "PATH": "/usr/bin:/bin"}
    program = [Path(sys.executable).parent / words[0], *words[1:], "--help"]
    return subprocess.run(program, check=True, capture_output=True, text=True, env=env).stdout


def subcommand(words: list[str]) -> list[str]:
    """The leading words that are no flags and no values: `ooc-moe bank ls`, `ooc-moe-server`."""
    leading = [words[0]]
    for word in words[1:]:
        if not re.fullmatch(r"[a-z]+", word) or f" {word} " not in help_of(*leading):
            break
        leading.append(word)
    return leading


def test_both_commands_stand_in_the_first_25_lines():
    beginning = README.splitlines()[:25]
    for command in ("make demo", "make test"):
        assert any(line.strip().startswith(command) for line in beginning)


def test_every_make_target_that_is_named_exists():
    targets = re.findall(r"^([a-z]+):", PAGES["Makefile"], flags=re.MULTILINE)
    written = [line for page in PAGES.values() for line in code(page)] + re.findall(r"`(make [^`]*)`", README)
    named = {match[1] for line in written if (match := re.match(r"make ([a-z]+)", line))}
    assert named >= {"demo", "test"}
    assert named <= set(targets)


@pytest.mark.parametrize("page", ["README.md", "deploy/README.md", "CHANGELOG.md"])
def test_every_file_that_is_pointed_to_exists(page):
    named = re.findall(rf"(?<![\w/.-])((?:{TOP})/[\w./-]*\w)", (ROOT / page).read_text())
    assert [path for path in named if not (ROOT / path).exists()] == []


def test_every_flag_that_is_shown_is_known():
    shown = commands()
    assert any(words[:2] == ["ooc-moe", "train"] for words in shown)
    assert any(words[0] == "ooc-moe-server" for words in shown)
    unknown = [
        (" ".join(subcommand(words)), word)
        for words in shown
        for word in words
        if word.startswith("--") and not re.search(rf"{word.partition('=')[0]}\b", help_of(*subcommand(words)))
    ]
    assert unknown == []


def test_the_licence_of_ale_py_is_told():
    assert re.search(r"ale-py[^.]*GPL-2\.0", README)
