"""Command-line options made from dataclasses, and settings that come from flags, the environment, a file or a default.

Both programs (`ooc-moe`, `ooc-moe-server`) use it. The fields of a dataclass are the options, and the docstring below a field is its help:

    hbm_experts: int = 8
    \"""Experts that fit into HBM.\"""          ->  --hbm-experts N   Experts that fit into HBM. [default: 8]

tyro parses the words, prints the help and writes shell completions. This module adds what tyro does not do: lists with commas, sizes such
as 8GiB, an error that is one line, and the knowledge of which options were given.
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import inspect
import io
import json
import os
import re
import textwrap
import tomllib
import types
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import tyro
from tyro.constructors import PrimitiveConstructorSpec

from ooc_moe_wire.errors import InvalidRequest
from ooc_moe_wire.sizes import parse_size

T = TypeVar("T")

_NONE = "none"
_SWITCH = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}
_METAVARS: dict[Any, str] = {int: "N", float: "X", Path: "PATH", str: "NAME"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Flag:
    """How a field is shown, where its name and type do not say it: `field: Annotated[Path, Flag(positional=True)]`."""

    name: str | None = None
    """The flag without its dashes; None: the field's name with dashes."""
    metavar: str | None = None
    aliases: tuple[str, ...] = ()
    positional: bool = False
    default: str | None = None
    """What help shows as the default; None: the field's default."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Option:
    """One option of a command."""

    name: str
    """The field's name."""
    type: Any
    """The field's type, without None and without `tuple[...]`."""
    many: bool
    """Whether the value is a tuple."""
    optional: bool
    """Whether the value may be None."""
    default: Any
    """`dataclasses.MISSING` for a positional argument that must be given."""
    help: str
    shown: Flag
    paired: bool
    """Whether a switch has a --no- form although it is off by default."""

    @property
    def flag(self) -> str:
        """The flag, with its dashes."""
        return "--" + (self.shown.name or self.name.replace("_", "-"))

    @property
    def label(self) -> str:
        """The name that errors use."""
        return self.shown.name or self.name

    @property
    def choices(self) -> tuple[str, ...]:
        """The only words that are accepted; empty where there is no such list."""
        return get_args(self.type) if get_origin(self.type) is Literal else ()

    def read(self, words: Sequence[str]) -> Any:
        """The value of some words. Raises ValueError, without the option's name, for words that are no such value."""
        if self.optional and [word.lower() for word in words] == [_NONE]:
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
        if self.type is int and self.name.endswith("_bytes"):
            return parse_size(word)
        reader, what = _READERS.get(self.type, (self.type, "a value"))
        try:
            return reader(word)
        except (ValueError, KeyError):
            raise ValueError(f"{word!r} is not {what}") from None

    def text(self, value: Any) -> str:
        """A value as a user would write it."""
        if value is None:
            return _NONE
        if isinstance(value, bool):
            return "on" if value else "off"
        return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


_READERS: dict[Any, tuple[Callable[[str], Any], str]] = {
    int: (int, "a whole number"),
    float: (float, "a number"),
    bool: (lambda word: _SWITCH[word.lower()], "true or false"),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Group:
    """Options that help shows together, under a title."""

    title: str
    """Empty for the options that need no title."""
    options: tuple[Option, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Parsed:
    """What some words say."""

    values: dict[str, Any]
    """The value of every option, by its field's name."""
    given: tuple[str, ...]
    """The fields whose options the words name, in their order."""

    def part(self, config: type[T]) -> T:
        """The values as one of the dataclasses that the options were made from."""
        return config(**{each.name: self.values[each.name] for each in dataclasses.fields(config)})  # type: ignore[arg-type]


@dataclass(frozen=True, kw_only=True, slots=True)
class Setting:
    """A value and where it comes from: "flag", "environment OOC_MOE_SEED", "file run.toml", "preset demo" or "default"."""

    value: Any
    source: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Command:
    """A command: its help, its options, and the function that runs it."""

    description: str
    """The help. Its first line is the summary in the list of commands."""
    groups: Callable[[], Sequence[Group]]
    run: Callable[[Parsed], int | None]
    """Returns the exit code; None is 0."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Program:
    """Commands under one name. A command's name is one word, or two ("bank ls"); "" is what runs where no command is named."""

    name: str
    description: str
    commands: Mapping[str, Command]
    topics: Mapping[str, str] = field(default_factory=dict)
    """What help says of the first word of a command of two."""

    def run(self, words: Sequence[str]) -> int:
        """Runs a command and returns its exit code.

        Raises:
            InvalidRequest: the words name no command, or are not what the command takes.
            SystemExit: help or a completion script was printed.
        """
        name = self._command_of(words)
        if name is None:
            return self._list(words)
        command = self.commands[name]
        rest = words[len(name.split()) :]
        parsed = parse(command.groups(), rest, prog=f"{self.name} {name}".strip(), description=command.description)
        return command.run(parsed) or 0

    def _command_of(self, words: Sequence[str]) -> str | None:
        for name in (" ".join(words[:2]), words[0] if words else ""):
            if name in self.commands and name:
                return name
        return "" if "" in self.commands and (not words or words[0].startswith("-")) else None

    def _list(self, words: Sequence[str]) -> int:
        """Prints help or a completion script. Raises InvalidRequest for a word that is no command."""
        topic = words[0] if words and words[0] in self.topics else ""
        rest = words[1:] if topic else words
        if rest and not rest[0].startswith("-"):
            members = [name.removeprefix(topic).split()[0] for name in self.commands if name and name.startswith(topic)]
            prog = f"{self.name} {topic}".strip()
            raise InvalidRequest(f"unknown command {rest[0]!r}{closest(rest[0], members)}; `{prog} --help` lists the commands")
        arguments = list(words) if rest else [*words, "--help"]
        tree = self._tree(with_options=rest[:1] not in ([], ["--help"], ["-h"]))
        tyro.cli(tree, args=arguments, prog=self.name, description=_description(self.description))
        return 2

    def _tree(self, *, with_options: bool) -> Any:
        """All commands, for tyro. Completion scripts need their options; the list of commands is made faster without them."""
        members = [self._subcommand(name, with_options) for name in self.commands if len(name.split()) == 1]
        for topic, description in self.topics.items():
            below = [self._subcommand(name, with_options) for name in self.commands if name.startswith(f"{topic} ")]
            below.append(Annotated[None, tyro.conf.Suppress])  # A Union of one member would not be a Union.
            members.append(Annotated[Union[tuple(below)], tyro.conf.subcommand(topic, description=description)])  # noqa: UP007
        return Union[tuple(members)]  # noqa: UP007

    def _subcommand(self, name: str, with_options: bool) -> Any:
        command = self.commands[name]
        summary = " ".join(inspect.cleandoc(command.description).partition("\n\n")[0].split())
        return Annotated[_tyro_type(command.groups() if with_options else []), tyro.conf.subcommand(name.split()[-1], description=summary)]


def command_of(options: type[Any]) -> Command:
    """The command of a dataclass: its fields are the options, its docstring is the help, its method `run` runs it."""
    return Command(
        description=options.__doc__ or "",
        groups=lambda: [Group(title="", options=options_of(options))],
        run=lambda parsed: options(**parsed.values).run(),
    )


def options_of(config: type[Any], *, skip: Iterable[str] = (), paired: bool = False) -> tuple[Option, ...]:
    """The options of a dataclass: its own fields in their order, then those of its bases.

    Args:
        config: the dataclass.
        skip: fields that are no options.
        paired: whether every switch has a --no- form; otherwise only those that are on by default.
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
    """How far up in the bases of a dataclass a field is declared; 0 for its own."""
    return next(depth for depth, each in enumerate(config.__mro__) if name in inspect.get_annotations(each))


def with_defaults(options: Iterable[Option], defaults: Mapping[str, Any]) -> tuple[Option, ...]:
    """The options with other defaults, for those that are named."""
    return tuple(dataclasses.replace(option, default=defaults.get(option.name, option.default)) for option in options)


def with_metavars(options: Iterable[Option], metavars: Mapping[str, str]) -> tuple[Option, ...]:
    """The options with other placeholders for their values in the help, for those that are named."""
    return tuple(
        dataclasses.replace(option, shown=dataclasses.replace(option.shown, metavar=metavars.get(option.name, option.shown.metavar)))
        for option in options
    )


def _field_docs(config: type[Any]) -> dict[str, str]:
    """The docstrings below the fields of a dataclass and of its bases, each as one line."""
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


def parse(groups: Sequence[Group], words: Sequence[str], *, prog: str, description: str) -> Parsed:
    """Reads the words of one command.

    Raises:
        InvalidRequest: a word that is no option, or no value of its option; the message is one line.
        SystemExit: help or a completion script was printed.
    """
    options = [option for group in groups for option in group.options]
    words = _joined(options, words)
    arguments: dict[str, Any] = {"args": words, "prog": prog, "description": _description(description)}
    if any(word in ("-h", "--help") or word.startswith("--tyro-") for word in words):
        tyro.cli(_tyro_type(groups), **arguments)
    with _one_line_errors():
        made = tyro.cli(_tyro_type(groups), **arguments)
    values: dict[str, Any] = {}
    for index, group in enumerate(groups):
        members = getattr(made, f"group{index}") if group.title else made
        values |= {option.name: getattr(members, option.name) for option in group.options}
    return Parsed(values=values, given=tuple(dict.fromkeys(option.name for option in _named(options, words) if option)))


def _named(options: Sequence[Option], words: Sequence[str]) -> Iterator[Option | None]:
    """For each word, the option that it names, or None."""
    flags = {flag: option for option in options for flag in (option.flag, *option.shown.aliases)}
    flags |= {f"--no-{option.flag[2:]}": option for option in options if option.type is bool}
    for word in words:
        yield flags.get(word.partition("=")[0].replace("_", "-")) if word.startswith("-") else None


def _joined(options: Sequence[Option], words: Sequence[str]) -> list[str]:
    """The words, with the values of a list that is given several times put together: --games a --games b is --games a,b."""
    joined: list[str] = []
    places: dict[str, int] = {}
    following = iter(range(len(words)))
    named = list(_named(options, words))
    for index in following:
        word, option = words[index], named[index]
        if option is None or not option.many or ("=" not in word and index + 1 == len(words)):
            joined.append(word)
            continue
        value = word.partition("=")[2] if "=" in word else words[next(following)]
        if option.name in places:
            joined[places[option.name]] += f",{value}"
        else:
            joined += [option.flag, value]
            places[option.name] = len(joined) - 1
    return joined


def _description(text: str) -> str:
    """The help of a command for tyro, which keeps the lines of a paragraph apart only where they begin with a sign such as $."""
    return inspect.cleandoc(text)


def _tyro_type(groups: Sequence[Group]) -> Any:
    """A dataclass that tyro can read: the options of the untitled group as fields, every other group as a dataclass of its own."""
    has_positional = any(option.shown.positional for group in groups for option in group.options)
    members: list[tuple[str, Any, Any]] = []
    for index, group in enumerate(groups):
        fields = [_tyro_field(option, several=not has_positional) for option in group.options]
        if not group.title:
            members += fields
            continue
        section = dataclasses.make_dataclass(f"Group{index}", fields)
        section.__doc__ = ""
        members.append((f"group{index}", Annotated[section, tyro.conf.arg(name=group.title)], field(default_factory=section)))
    return dataclasses.make_dataclass("Options", members)


def _tyro_field(option: Option, *, several: bool) -> tuple[str, Any, Any]:
    """An option as a field of a dataclass for tyro. `several`: a list may be several words, since no positional argument can follow it."""
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
        return option.name, annotation, field(default=option.default)
    spec: PrimitiveConstructorSpec[Any] = PrimitiveConstructorSpec(
        nargs="*" if option.many and several else 1,
        metavar=_metavar(option),
        instance_from_str=option.read,
        is_instance=lambda value: True,
        str_from_instance=lambda value: [option.text(value)],
        choices=None if option.many or not option.choices else (*option.choices, *([_NONE] if option.optional else [])),
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


def _metavar(option: Option) -> str:
    is_size = option.type is int and option.name.endswith("_bytes")
    word = option.shown.metavar or "|".join(option.choices) or ("SIZE" if is_size else _METAVARS[option.type])
    if option.many and option.shown.metavar is None:
        return {"N": "N,N,...", "NAME": "A,B,..."}.get(word, f"{word},...")
    return word


@contextmanager
def _one_line_errors() -> Iterator[None]:
    """Turns the box that tyro prints about a mistake into an InvalidRequest of one line."""
    said, columns = io.StringIO(), os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = "100000"  # The box is as wide as the terminal, and its lines would be cut.
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
    """The parts of a box that tyro printed, each as one line. Rules of ─, or of - where the output is not UTF-8, part them."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", box)
    lines = [line.strip("│ ") for line in text.splitlines() if not line.startswith(("╭", "╰"))]
    sections = [" ".join(section.split()) for section in re.split(r"(?m)^[─-]{3,}$", "\n".join(lines))]
    return sections if "╭" in text else sections[1:]  # Without UTF-8, the title is a section of its own.


def _reworded(box: str) -> str:
    """The message of a box, in the words of our other errors."""
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


def closest(word: str, known: Iterable[str]) -> str:
    """What an error adds about a name that is unknown: the known name that is most like it, if one is."""
    found = difflib.get_close_matches(word, list(known), 1)
    return f"; did you mean {found[0]!r}?" if found else ""


def from_environment(
    options: Iterable[Option], environ: Mapping[str, str], prefix: str, *, ignored: tuple[str, ...] = ()
) -> dict[str, Setting]:
    """The settings of the variables PREFIX + field name in capitals.

    Args:
        options: which fields there are.
        environ: all variables.
        prefix: for example "OOC_MOE_".
        ignored: beginnings of the names of variables that belong to something else.

    Raises:
        InvalidRequest: a variable with the prefix matches no field, or its text is not a value of its field.
    """
    named = {prefix + option.name.upper(): option for option in options}
    found = {key: text for key, text in environ.items() if key.startswith(prefix) and (key in named or not key.startswith(ignored))}
    _refuse_unknown("environment", "variable", found, named)
    return {
        named[key].name: Setting(value=_read(named[key], [text], f"environment {key}"), source=f"environment {key}")
        for key, text in found.items()
    }


def from_file(options: Iterable[Option], path: Path, *, tables: tuple[str, ...] = ()) -> dict[str, Setting]:
    """The settings of a TOML or JSON file. Fields stand at its top; those of the tables that are named may stand there.

    Raises:
        InvalidRequest: the file cannot be read, has a key that is no field, or a value that is none of its field.
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
    """A value of a file as words on the command line."""
    if isinstance(value, list):
        return [word for each in value for word in _words_of(each)]
    return [_NONE if value is None else str(value)]


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
