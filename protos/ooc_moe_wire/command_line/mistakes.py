"""Turns tyro's messages about mistakes on the command line into errors of one line, in this project's wording.

tyro is the library that parses the command line. It prints such a message in a box, and exits.
"""

from __future__ import annotations

import difflib
import io
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr

from ooc_moe_wire.errors import InvalidRequest

SHELLS = ("bash", "zsh", "fish", "tcsh")
_COMPLETION = {"--tyro-print-completion": 1, "--tyro-write-completion": 2}  # The words that follow: SHELL, or SHELL and PATH.


def asks_tyro(words: Sequence[str]) -> bool:
    """Returns whether the words ask for help or for a completion script, which tyro prints before it exits.

    Raises:
        InvalidRequest: the words ask for a completion script of an unknown shell, or name no file for it.
    """
    first = words[0].replace("_", "-") if words else ""
    if first not in _COMPLETION:
        return "-h" in words or "--help" in words
    if len(words) <= _COMPLETION[first]:
        raise InvalidRequest(f"{first} needs a {'shell' if _COMPLETION[first] == 1 else 'shell and a file'}")
    if words[1] not in SHELLS:
        raise InvalidRequest(f"{first}: {words[1]!r} is not one of {', '.join(SHELLS)}")
    return True


def closest(word: str, known: Iterable[str]) -> str:
    """Returns the text "; did you mean 'NAME'?", with the known name that is most similar to `word`. Returns "" if none is similar."""
    found = difflib.get_close_matches(word, list(known), 1)
    return f"; did you mean {found[0]!r}?" if found else ""


@contextmanager
def one_line_errors() -> Iterator[None]:
    """A context manager for code that runs tyro. When tyro finds a mistake on the command line, raises InvalidRequest with tyro's message.

    Without this, tyro would print the message in a box and exit. The box is not shown; the error has its message in one line.
    """
    said, columns = io.StringIO(), os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = "100000"  # tyro makes the box as wide as the terminal, and would fold the message.
    try:
        with redirect_stderr(said):
            yield
    except SystemExit:
        raise InvalidRequest(_reworded(said.getvalue())) from None
    finally:
        if columns is None:
            del os.environ["COLUMNS"]
        else:
            os.environ["COLUMNS"] = columns


def _sections(box: str) -> list[str]:
    """Splits a message box of tyro into its sections, each as one line of text.

    The sections are divided by horizontal rules of ─, or of - if the output is not UTF-8.
    """
    text = re.sub(r"\x1b\[[0-9;]*m", "", box)
    lines = [line.strip("│ ") for line in text.splitlines() if not line.startswith(("╭", "╰"))]
    sections = [" ".join(section.split()) for section in re.split(r"(?m)^[─-]{3,}$", "\n".join(lines))]
    return sections if "╭" in text else sections[1:]  # Without UTF-8, the title is a section of its own.


def _reworded(box: str) -> str:
    """Returns the message in a box of tyro, in this project's wording."""
    sections = _sections(box)
    message = sections[0]
    if found := re.fullmatch(r"Error parsing (\S+): (.*)", message):
        return f"{_label(found[1])}: {found[2]}"
    if found := re.fullmatch(r"invalid choice (.+) for argument '(\S+)'\. Expected one of \((.*)\)\.", message):
        choices = ", ".join(re.findall("'([^']*)'", found[3]))
        return f"{_label(found[2])}: {found[1]} is not one of {choices}"
    if found := re.match(r"Missing from (.*?): (\S+)", message):
        return f"{found[2]} is required; see `{found[1]} --help`"
    if found := re.fullmatch(r"Missing value for argument '(\S+)'.*", message):
        return f"{found[1]} needs a value"
    if found := re.fullmatch(r"Unrecognized options: (.*)", message):
        word = found[1].partition(", ")[0]
        likely = re.search(r"Perhaps you meant: (--\S+)", sections[1]) if len(sections) > 1 else None
        return f"unknown {'option' if word.startswith('-') else 'argument'} {word}" + (f"; did you mean {likely[1]}?" if likely else "")
    return message


def _label(flag: str) -> str:
    return flag.removeprefix("--").replace("-", "_")
