"""Reads settings (values of options) from environment variables and files. Values are written as on the command line."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ooc_moe_wire.command_line.mistakes import closest
from ooc_moe_wire.command_line.options import NONE, Option
from ooc_moe_wire.errors import InvalidRequest


@dataclass(frozen=True, kw_only=True, slots=True)
class Setting:
    """The value of an option, and where it was set.

    The source is, for example, "flag", "environment OOC_MOE_SEED", "file run.toml", "preset demo" or "default".
    """

    value: Any
    source: str


def from_environment(
    options: Iterable[Option], environ: Mapping[str, str], prefix: str, *, ignored: tuple[str, ...] = ()
) -> dict[str, Setting]:
    """Reads settings from environment variables. A variable's name is the prefix and the option's field name in capitals: OOC_MOE_SEED.

    Returns the settings by field name.

    Args:
        options: the options that may be set.
        environ: all environment variables.
        prefix: the prefix of the variables' names, for example "OOC_MOE_".
        ignored: longer prefixes; variables that begin with one of them are no settings, and are skipped.

    Raises:
        InvalidRequest: a variable with the prefix matches no option, or its text is no valid value.
    """
    named = {prefix + option.name.upper(): option for option in options}
    found = {key: text for key, text in environ.items() if key.startswith(prefix) and (key in named or not key.startswith(ignored))}
    _refuse_unknown("environment", "variable", found, named)
    return {
        named[key].name: Setting(value=_read(named[key], [text], f"environment {key}"), source=f"environment {key}")
        for key, text in found.items()
    }


def from_file(options: Iterable[Option], path: Path, *, tables: tuple[str, ...] = ()) -> dict[str, Setting]:
    """Reads settings from a JSON file (*.json) or a TOML file (any other name). The file's keys are the field names of options.

    Returns the settings by field name.

    Args:
        options: the options that may be set.
        path: the file.
        tables: names of tables in the file that may hold settings too, such as [agent].

    Raises:
        InvalidRequest: the file cannot be read, a key matches no option, or a value is not valid.
    """
    named = {option.name: option for option in options}
    found: dict[str, Any] = {}
    for key, value in _document(path).items():
        found |= value if key in tables and isinstance(value, dict) else {key: value}
    _refuse_unknown(str(path), "key", found, named)
    source = f"file {path}"
    return {key: Setting(value=_read(named[key], _words_of(value), source), source=source) for key, value in found.items()}


def _document(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text()
        document = json.loads(text) if path.suffix == ".json" else tomllib.loads(text)
    except (OSError, ValueError) as error:
        raise InvalidRequest(f"config: {path} cannot be read: {getattr(error, 'strerror', None) or error}") from error
    if not isinstance(document, dict):
        raise InvalidRequest(f"config: {path} is not a table of settings")
    return document


def _words_of(value: Any) -> list[str]:
    """Converts a value from a file to the words that a user would type for it."""
    if isinstance(value, list):
        return [word for each in value for word in _words_of(each)]
    return [NONE if value is None else str(value)]


def _read(option: Option, words: Sequence[str], source: str) -> Any:
    try:
        return option.read(words) if words else ()
    except ValueError as error:
        raise InvalidRequest(f"{option.label}: {error} ({source})") from error


def _refuse_unknown(where: str, what: str, found: Iterable[str], known: Iterable[str]) -> None:
    known = list(known)
    unknown = [f"unknown {what} {key!r}{closest(key, known)}" for key in found if key not in known]
    if unknown:
        raise InvalidRequest(f"{where}: {', '.join(unknown)}")
