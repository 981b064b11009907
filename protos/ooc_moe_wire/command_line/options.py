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
    """How the command line shows an option, where the field's name and type do not say enough.

    Use it as an annotation: `field: Annotated[Path, Flag(positional=True)]`.
    """

    name: str | None = None
    """The flag without its leading dashes; None: made from the field's name."""
    metavar: str | None = None
    """The placeholder for the value in the help, such as N or PATH; None: chosen by the type."""
    aliases: tuple[str, ...] = ()
    """Further flags for the same option, with their dashes."""
    positional: bool = False
    """Whether the user gives the value alone, without a flag before it."""
    default: str | None = None
    """The default that the help shows; None: the field's default."""
    is_size: bool = False
    """Whether the value is a number of bytes, written like 8MiB. Fields named *_bytes are sizes without it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Option:
    """One option of a command, made from a field of a dataclass: its flag, its help, and how words become its value."""

    name: str
    """The name of the field."""
    type: Any
    """The type of the field without None; if the field is a tuple, the type of its items."""
    many: bool
    """Whether the value is a tuple, written with commas or as several words."""
    optional: bool
    """Whether the value may be None."""
    default: Any
    """The default value; `dataclasses.MISSING` if the option must be given."""
    help: str
    shown: Flag
    paired: bool
    """Whether a switch (an option of type bool) has a second form, --no-NAME."""

    @property
    def flag(self) -> str:
        """The flag that the user types, with its leading dashes."""
        return "--" + (self.shown.name or self.name.replace("_", "-"))

    @property
    def label(self) -> str:
        """The option's name in error messages."""
        return self.shown.name or self.name

    @property
    def choices(self) -> tuple[str, ...]:
        """The allowed words, if the type is a Literal; otherwise empty."""
        return get_args(self.type) if get_origin(self.type) is Literal else ()

    @property
    def is_size(self) -> bool:
        """Whether the value is a number of bytes, written like 8MiB."""
        return self.type is int and (self.name.endswith("_bytes") or self.shown.is_size)

    @property
    def metavar(self) -> str:
        """The placeholder for the value in the help, such as N or PATH."""
        word = self.shown.metavar or "|".join(self.choices) or ("SIZE" if self.is_size else _METAVARS[self.type])
        if self.many and self.shown.metavar is None:
            return {"N": "N,N,...", "NAME": "A,B,..."}.get(word, f"{word},...")
        return word

    def read(self, words: Sequence[str]) -> Any:
        """Converts the words that the user typed for this option to its value.

        Raises ValueError if they are no valid value. The message does not name the option.
        """
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
        """Converts a value to the text that a user would type for it."""
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
    """Makes one option from each field of a dataclass: first from its own fields, then from those of its base classes.

    Args:
        config: the dataclass.
        skip: names of fields that do not become options.
        paired: give every switch (a bool) a --no- form too; otherwise only switches that are on by default have one.
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
    """Returns in which class of a dataclass's method resolution order a field is declared; 0: in the dataclass itself."""
    return next(depth for depth, each in enumerate(config.__mro__) if name in inspect.get_annotations(each))


def _field_docs(config: type[Any]) -> dict[str, str]:
    """Reads the docstring below each field of a dataclass and of its base classes, from their source code. Returns them by field name."""
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
    """Returns the options with new default values. `defaults` gives them by field name; other options stay as they are."""
    return tuple(dataclasses.replace(option, default=defaults.get(option.name, option.default)) for option in options)


def with_metavars(options: Iterable[Option], metavars: Mapping[str, str]) -> tuple[Option, ...]:
    """Returns the options with new placeholders (N, PATH, ...) in the help. `metavars` gives them by field name; other options stay."""
    return tuple(
        dataclasses.replace(option, shown=dataclasses.replace(option.shown, metavar=metavars.get(option.name, option.shown.metavar)))
        for option in options
    )
