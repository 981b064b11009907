"""Makes options from the fields of a dataclass.

Each field is an option: the field's name with dashes is the flag, its type decides which words are valid values, and the docstring below
the field is the help.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import textwrap
import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from ooc_moe_wire.sizes import parse_size

NONE = "none"
"""The word that sets an option to None, if its type allows None."""
_SWITCH = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}
_METAVARS: dict[Any, str] = {int: "N", float: "X", Path: "PATH", str: "NAME"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Flag:
    """How a field becomes an option, if its name and type do not say enough: `field: Annotated[Path, Flag(positional=True)]`."""

    name: str | None = None
    """The flag without its leading dashes; None: the field's name."""
    metavar: str | None = None
    """The placeholder for the value in the help; None: it follows from the type."""
    aliases: tuple[str, ...] = ()
    """Other flags of the option, with their dashes."""
    positional: bool = False
    """Whether the value is given without a flag."""
    default: str | None = None
    """The default that the help shows; None: the field's default."""
    is_size: bool = False
    """Whether the value is a number of bytes, written like 8MiB. Fields named *_bytes are sizes without it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Option:
    """One option of a command, made from a field."""

    name: str
    """The name of the field."""
    type: Any
    """The type of the field, or of the items of its tuple; without None."""
    many: bool
    """Whether the value is a tuple."""
    optional: bool
    """Whether the value may be None."""
    default: Any
    """The default value; `dataclasses.MISSING` if the option must be given."""
    help: str
    shown: Flag
    paired: bool
    """Whether a switch has a second form, --no-NAME."""

    @property
    def flag(self) -> str:
        """The flag, with its leading dashes."""
        return "--" + (self.shown.name or self.name.replace("_", "-"))

    @property
    def label(self) -> str:
        """The name that errors use."""
        return self.shown.name or self.name

    @property
    def choices(self) -> tuple[str, ...]:
        """The words that are valid values; empty if the type is not a Literal."""
        return get_args(self.type) if get_origin(self.type) is Literal else ()

    @property
    def is_size(self) -> bool:
        """Whether the value is a number of bytes, written like 8MiB."""
        return self.type is int and (self.name.endswith("_bytes") or self.shown.is_size)

    @property
    def metavar(self) -> str:
        """The placeholder for the value in the help."""
        word = self.shown.metavar or "|".join(self.choices) or ("SIZE" if self.is_size else _METAVARS[self.type])
        if self.many and self.shown.metavar is None:
            return {"N": "N,N,...", "NAME": "A,B,..."}.get(word, f"{word},...")
        return word

    def read(self, words: Sequence[str]) -> Any:
        """Converts words to a value. Raises ValueError if they are no valid value; the message does not name the option."""
        if self.optional and [word.lower() for word in words] == [NONE]:
            return None
        if self.many:
            parts = [part.strip() for word in words for part in word.split(",")]
            if not all(parts):
                raise ValueError(f"{','.join(words)!r} is not a list of names with commas between (one is empty)")
            return tuple(self._read_one(part) for part in parts)
        return self._read_one(words[0])

    def _read_one(self, word: str) -> Any:
        if self.choices:
            if word not in self.choices:
                raise ValueError(f"{word!r} is not one of {', '.join(self.choices)}")
            return word
        if self.is_size:
            return parse_size(word)
        reader, what = _READERS.get(self.type, (self.type, "a value"))
        try:
            return reader(word)
        except (ValueError, KeyError):
            raise ValueError(f"{word!r} is not {what}") from None

    def text(self, value: Any) -> str:
        """Writes a value as a user would write it on the command line."""
        if value is None:
            return NONE
        if isinstance(value, bool):
            return "on" if value else "off"
        return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


_READERS: dict[Any, tuple[Callable[[str], Any], str]] = {
    int: (int, "a whole number"),
    float: (float, "a number"),
    bool: (lambda word: _SWITCH[word.lower()], "true or false"),
}


def options_of(config: type[Any], *, skip: Iterable[str] = (), paired: bool = False) -> tuple[Option, ...]:
    """Makes the options of a dataclass: first of its own fields, then of the fields of its bases.

    Args:
        config: the dataclass.
        skip: names of fields that do not become options.
        paired: give every switch a --no- form; otherwise only switches that are on by default have one.
    """
    hints, docs, options = get_type_hints(config, include_extras=True), _field_docs(config), []
    own_first = sorted(dataclasses.fields(config), key=lambda each: _depth(config, each.name))
    for each in own_first:
        if each.name in skip:
            continue
        hint, shown = hints[each.name], Flag()
        if get_origin(hint) is Annotated:
            hint, *extras = get_args(hint)
            shown = next((extra for extra in extras if isinstance(extra, Flag)), shown)
        members = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
        (bare,) = (member for member in members if member is not type(None))
        many = get_origin(bare) is tuple
        options.append(
            Option(
                name=each.name,
                type=get_args(bare)[0] if many else bare,
                many=many,
                optional=type(None) in members,
                default=each.default,
                help=docs.get(each.name, ""),
                shown=shown,
                paired=paired or each.default is True,
            )
        )
    return tuple(options)


def _depth(config: type[Any], name: str) -> int:
    """Returns how many steps up in the bases of a dataclass a field is declared; 0 for a field of its own."""
    return next(depth for depth, each in enumerate(config.__mro__) if name in inspect.get_annotations(each))


def _field_docs(config: type[Any]) -> dict[str, str]:
    """Reads the docstrings below the fields of a dataclass and of its bases, each as one line, from the source code."""
    docs: dict[str, str] = {}
    for each in reversed(config.__mro__):
        if dataclasses.is_dataclass(each):
            (definition,) = ast.parse(textwrap.dedent(inspect.getsource(each))).body
            assert isinstance(definition, ast.ClassDef)
            for statement, following in pairwise(definition.body):
                match statement, following:
                    case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(text))):
                        docs[name] = " ".join(text.split())
    return docs


def with_defaults(options: Iterable[Option], defaults: Mapping[str, Any]) -> tuple[Option, ...]:
    """Returns the options, with new defaults for those that `defaults` names."""
    return tuple(dataclasses.replace(option, default=defaults.get(option.name, option.default)) for option in options)


def with_metavars(options: Iterable[Option], metavars: Mapping[str, str]) -> tuple[Option, ...]:
    """Returns the options, with new placeholders in the help for those that `metavars` names."""
    return tuple(
        dataclasses.replace(option, shown=dataclasses.replace(option.shown, metavar=metavars.get(option.name, option.shown.metavar)))
        for option in options
    )
