"""A program with several commands, such as `ooc-moe train`: finds the command that the words name, and runs it, or lists the commands."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Union

import tyro

from ooc_moe_wire.command_line.mistakes import asks_tyro, closest
from ooc_moe_wire.command_line.options import options_of
from ooc_moe_wire.command_line.parsing import Group, Parsed, description_of, parse, tyro_type
from ooc_moe_wire.errors import InvalidRequest


@dataclass(frozen=True, kw_only=True, slots=True)
class Command:
    """One command of a program: its help text, its options, and the function that runs it."""

    description: str
    """The help text. The list of commands shows its first paragraph."""
    groups: Callable[[], Sequence[Group]]
    """Makes the options. It is called only when they are needed."""
    run: Callable[[Parsed], int | None]
    """Runs the command and returns the exit code; None means 0."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Program:
    """A program with several commands: finds the command that the user typed, and runs it.

    The name of a command is one word ("train") or two ("bank ls"). The command named "" runs if the words name no command.
    """

    name: str
    description: str
    commands: Mapping[str, Command]
    topics: Mapping[str, str] = field(default_factory=dict)
    """For commands of two words: the help text of the first word."""
    version: Callable[[], str] | None = None
    """Finds the version that --version prints; None: the program has no such option."""

    def run(self, words: Sequence[str]) -> int:
        """Runs the command that the words name, and returns its exit code.

        Without a command, prints help or a completion script. `words`: what the user typed after the program's name.

        Raises:
            InvalidRequest: the words name an unknown command, or are no valid options of the command.
            SystemExit: the words ask for help or for a completion script, which was printed.
        """
        if self.version is not None and words[:1] == ["--version"]:
            print(f"{self.name} {self.version()}")
            return 0
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
        """Prints the list of commands or a completion script. Raises InvalidRequest for an unknown command or option."""
        topic = words[0] if words and words[0] in self.topics else ""
        rest = words[1:] if topic else words
        hint = f"; `{f'{self.name} {topic}'.strip()} --help` lists the commands"
        if rest and not rest[0].startswith("-"):
            members = [name.removeprefix(topic).split()[0] for name in self.commands if name and name.startswith(topic)]
            raise InvalidRequest(f"unknown command {rest[0]!r}{closest(rest[0], members) or hint}")
        if rest and not asks_tyro(words):
            raise InvalidRequest(f"unknown option {rest[0]}{hint}")
        arguments = list(words) if rest else [*words, "--help"]
        tree = self._tree(with_options=rest[:1] not in ([], ["--help"], ["-h"]))
        tyro.cli(tree, args=arguments, prog=self.name, description=description_of(self.description))
        return 2

    def _tree(self, *, with_options: bool) -> Any:
        """Makes the type from which tyro prints the list of commands or a completion script.

        `with_options`: include the options of all commands. Completion scripts need them; the list of commands is faster without them.
        """
        members = [self._subcommand(name, with_options) for name in self.commands if len(name.split()) == 1]
        for topic, description in self.topics.items():
            below = [self._subcommand(name, with_options) for name in self.commands if name.startswith(f"{topic} ")]
            below.append(Annotated[None, tyro.conf.Suppress])  # A Union of one member would not be a Union.
            members.append(Annotated[Union[tuple(below)], tyro.conf.subcommand(topic, description=description)])  # noqa: UP007
        # With a help text, tyro does not search its own source for one, which takes 0.2 s.
        return Annotated[Union[tuple(members)], tyro.conf.arg(help="Every command has a --help of its own.")]  # noqa: UP007

    def _subcommand(self, name: str, with_options: bool) -> Any:
        command = self.commands[name]
        summary = " ".join(inspect.cleandoc(command.description).partition("\n\n")[0].split())
        return Annotated[tyro_type(command.groups() if with_options else []), tyro.conf.subcommand(name.split()[-1], description=summary)]


def command_of(options: type[Any]) -> Command:
    """Makes a command from a dataclass: its fields become the options, its docstring the help text, and its method `run` is what runs."""
    return Command(
        description=options.__doc__ or "",
        groups=lambda: [Group(title="", options=options_of(options))],
        run=lambda parsed: options(**parsed.values).run(),
    )
