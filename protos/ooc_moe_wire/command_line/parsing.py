"""Parses the words that follow a command's name on the command line, with the library tyro.

`tyro_type` makes a dataclass from the options, which tyro can parse. `parse` runs tyro, and converts its result to the values of the
options.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, TypeVar

import tyro
from tyro.constructors import PrimitiveConstructorSpec

from ooc_moe_wire.command_line.mistakes import asks_tyro, one_line_errors
from ooc_moe_wire.command_line.options import NONE, Option
from ooc_moe_wire.errors import InvalidRequest

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True, slots=True)
class Group:
    """Options that the help shows together under one title."""

    title: str
    """The title; empty for options without a title."""
    options: tuple[Option, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Parsed:
    """The result of parsing the command line: the values of all options, and which options the user gave."""

    values: dict[str, Any]
    """The value of every option, by the name of its field."""
    given: tuple[str, ...]
    """The field names of the options that the user gave, in the order of their flags."""

    def part(self, config: type[T]) -> T:
        """Makes an object of the dataclass `config` from the values. Its fields must be among the options."""
        return config(**{each.name: self.values[each.name] for each in dataclasses.fields(config)})  # type: ignore[arg-type]


def parse(groups: Sequence[Group], words: Sequence[str], *, prog: str, description: str) -> Parsed:
    """Parses the words that follow a command's name, and returns the values of the options.

    Args:
        groups: the options of the command.
        words: what the user typed after the command's name.
        prog: the program's and the command's name, for the help and the errors.
        description: the help text of the command.

    Raises:
        InvalidRequest: a word is no option, or no valid value of its option. The message is one line.
        SystemExit: the words ask for help or for a completion script, which was printed.
    """
    options = [option for group in groups for option in group.options]
    words = _joined(options, words, several=not has_positional(options))
    arguments: dict[str, Any] = {"args": words, "prog": prog, "description": description_of(description)}
    if asks_tyro(words):
        tyro.cli(tyro_type(groups), **arguments)
    with one_line_errors():
        made = tyro.cli(tyro_type(groups), **arguments)
    given = tuple(dict.fromkeys(option.name for option in _named(options, words) if option))
    values: dict[str, Any] = {}
    for index, group in enumerate(groups):
        members = getattr(made, f"group{index}") if group.title else made
        values |= {option.name: getattr(members, option.name) for option in group.options}
    for option in options:
        if option.many and option.default is dataclasses.MISSING and not values[option.name]:
            raise InvalidRequest(f"{option.metavar} is required; see `{prog} --help`")  # For tyro, no words are a list too.
        if option.type is bool and option.default is None and option.name not in given:
            values[option.name] = None  # tyro has no switch that is neither on nor off.
    return Parsed(values=values, given=given)


def _named(options: Sequence[Option], words: Sequence[str]) -> Iterator[Option | None]:
    """Yields one item for each word: the option whose flag the word is, or None if the word is no flag."""
    flags = {flag: option for option in options for flag in (option.flag, *option.shown.aliases)}
    flags |= {f"--no-{option.flag[2:]}": option for option in options if option.type is bool}
    for word in words:
        yield flags.get(word.partition("=")[0].replace("_", "-")) if word.startswith("-") else None


def _joined(options: Sequence[Option], words: Sequence[str], *, several: bool) -> list[str]:
    """Joins the values of each option that takes a list into one word: --games a b --games c becomes --games a,b,c.

    `several`: all words up to the next flag belong to a list; otherwise only the first word does.
    """
    joined: list[list[str]] = []  # Words, and the values of a list as one item, which grows.
    values: dict[str, list[str]] = {}
    current: list[str] | None = None
    for word, option in zip(words, _named(options, words), strict=True):
        if option is not None and option.many:
            if option.name not in values:
                values[option.name] = []
                joined += [[option.flag], values[option.name]]
            current = values[option.name]
            if "=" in word:
                current.append(word.partition("=")[2])
                current = current if several else None
        elif current is None or option is not None or word.startswith("--"):
            joined.append([word])
            current = None
        else:
            current.append(word)
            current = current if several else None
    return [",".join(each) for each in joined if each]


def description_of(text: str) -> str:
    """Returns a command's help text without its indentation.

    When tyro prints the text, it joins the lines of a paragraph, but begins a new line for a line such as "$ ...".
    """
    return inspect.cleandoc(text)


def has_positional(options: Sequence[Option]) -> bool:
    """Returns whether any option is positional (given without a flag).

    If so, the value of a list option must be one word, because further words are positional arguments.
    """
    return any(option.shown.positional for option in options)


def tyro_type(groups: Sequence[Group]) -> Any:
    """Makes a dataclass from the options, which tyro can parse.

    Options in a group without a title become its fields; each group with a title becomes a nested dataclass.
    """
    several = not has_positional([option for group in groups for option in group.options])
    members: list[tuple[str, Any, Any]] = []
    for index, group in enumerate(groups):
        fields = [_tyro_field(option, several=several) for option in group.options]
        if not group.title:
            members += fields
            continue
        section = dataclasses.make_dataclass(f"Group{index}", fields)
        section.__doc__ = ""
        members.append((f"group{index}", Annotated[section, tyro.conf.arg(name=group.title)], field(default_factory=section)))
    return dataclasses.make_dataclass("Options", members)


def _tyro_field(option: Option, *, several: bool) -> tuple[str, Any, Any]:
    """Converts an option to a field of the dataclass for tyro: its name, its annotated type and its default.

    `several`: the value of a list option may be several words.
    """
    several = several or option.shown.positional
    hint = f"[default: {option.shown.default or option.text(option.default)}]"
    if option.default in (None, (), "") and option.shown.default is None:
        hint = ""
    shown = tyro.conf.arg(
        name=option.flag[2:],
        help=option.help,
        help_behavior_hint="" if option.type is bool and not option.paired else hint,
        aliases=option.shown.aliases or None,
        prefix_name=False,
    )
    if option.type is bool:
        annotation = Annotated[bool, shown] if option.paired else Annotated[bool, tyro.conf.FlagCreatePairsOff, shown]
        return option.name, annotation, field(default=bool(option.default))
    spec: PrimitiveConstructorSpec[Any] = PrimitiveConstructorSpec(
        nargs="*" if option.many and several else 1,
        metavar=option.metavar,
        instance_from_str=option.read,
        is_instance=lambda value: True,
        str_from_instance=lambda value: [option.text(value)],
        choices=None if option.many or not option.choices else (*option.choices, *([NONE] if option.optional else [])),
    )
    if not option.shown.positional:
        return option.name, Annotated[object, spec, shown], field(default=option.default)
    annotation = Annotated[
        object,
        tyro.conf.Positional,
        spec,
        tyro.conf.arg(help=option.help, help_behavior_hint=None if option.default is dataclasses.MISSING else ""),
    ]
    return option.name, annotation, field(default=tyro.MISSING if option.default is dataclasses.MISSING else option.default)
