"""Options made from dataclasses: what words, files and variables say, and how a mistake is named."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import pytest

from ooc_moe_wire.command_line import (
    Flag,
    Group,
    Parsed,
    Program,
    Setting,
    command_of,
    from_environment,
    from_file,
    options_of,
    parse,
    with_defaults,
)
from ooc_moe_wire.errors import InvalidRequest


@dataclass(frozen=True, kw_only=True)
class Common:
    """The last options."""

    as_json: Annotated[bool, Flag(name="json")] = False
    """Print JSON."""


@dataclass(frozen=True, kw_only=True)
class Options(Common):
    """Try everything.

    $ tool try x
    """

    file: Annotated[Path, Flag(positional=True, metavar="FILE")]
    """A file,
    in two lines."""
    mode: Literal["fast", "slow"] | None = None
    """A choice."""
    num: int = 3
    """A number."""
    size_bytes: int | None = None
    """A size."""
    rate: float = 0.5
    """A rate."""
    names: tuple[str, ...] = ()
    """Names."""
    sizes: tuple[int, ...] = (1, 2)
    """Numbers."""
    grow: bool = True
    """A switch that is on."""
    quiet: Annotated[bool, Flag(aliases=("-q",))] = False
    """A switch that is off."""

    def run(self) -> int:
        """Prints itself."""
        print(self)
        return 7


@dataclass(frozen=True, kw_only=True)
class Other:
    """Do something else."""

    def run(self) -> None:
        """Does nothing."""


OPTIONS = options_of(Options)
PROGRAM = Program(
    name="tool",
    description="A tool.\n\n$ tool try x",
    commands={"try": command_of(Options), "sub one": command_of(Other), "sub two": command_of(Other)},
    topics={"sub": "Below."},
    version=lambda: "1.2.3",
)


def parsed(*words: str) -> Parsed:
    return parse([Group(title="", options=OPTIONS)], words, prog="tool try", description="Try.")


def options(*words: str) -> Options:
    return parsed(*words).part(Options)


def test_options_come_with_their_docstrings_and_those_of_a_base_come_last():
    assert [option.name for option in OPTIONS][:2] == ["file", "mode"]
    assert (OPTIONS[-1].name, OPTIONS[-1].flag, OPTIONS[0].help) == ("as_json", "--json", "A file, in two lines.")


def test_words_become_values():
    assert options("x") == Options(file=Path("x"))
    words = "x --mode slow --num -4 --size-bytes 8KiB --rate 1e3 --names a,b --sizes 5 --no-grow -q --json"
    assert options(*words.split()) == Options(
        file=Path("x"),
        mode="slow",
        num=-4,
        size_bytes=8192,
        rate=1000.0,
        names=("a", "b"),
        sizes=(5,),
        grow=False,
        quiet=True,
        as_json=True,
    )


def test_none_unsets_an_option_that_may_be_unset():
    assert options("x", "--mode", "none", "--size-bytes", "None") == Options(file=Path("x"))
    with pytest.raises(InvalidRequest, match="num: 'none' is not a whole number"):
        options("x", "--num", "none")


def test_a_list_that_is_given_again_goes_on():
    assert options("x", "--names", "a", "--num", "1", "--names=b,c", "--sizes", "1").names == ("a", "b", "c")


@pytest.mark.parametrize(
    "words", ["--names a b -q --names c --num -1", "--names=a b --names c", "--names a,b --num 2 --names=c", "--names a --names b c"]
)
def test_a_list_without_arguments_after_it_may_be_several_words(words: str):
    group = Group(title="", options=tuple(option for option in OPTIONS if option.name != "file"))
    assert parse([group], words.split(), prog="tool", description="").values["names"] == ("a", "b", "c")


def test_a_list_may_hold_sizes():
    @dataclass(frozen=True, kw_only=True)
    class Sized:
        sizes: Annotated[tuple[int, ...], Flag(is_size=True)] = ()

    (sizes,) = options_of(Sized)
    assert (sizes.metavar, sizes.read(["1KiB,7"])) == ("SIZE,...", (1024, 7))


@pytest.mark.parametrize(("words", "value"), [("", None), ("--grow", True), ("--no-grow", False)])
def test_a_paired_switch_may_be_neither_on_nor_off(words: str, value: bool | None):
    grow = with_defaults((option for option in OPTIONS if option.name == "grow"), {"grow": None})
    assert parse([Group(title="", options=grow)], words.split(), prog="tool", description="").values == {"grow": value}


def test_what_was_given_is_known_in_order_and_by_field():
    assert parsed("x", "--num=3", "--no-grow", "-q", "--size_bytes", "1", "--num", "4", "--json").given == (
        "num",
        "grow",
        "quiet",
        "size_bytes",
        "as_json",
    )


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("x --num y", "num: 'y' is not a whole number"),
        ("x --rate y", "rate: 'y' is not a number"),
        ("x --size-bytes y", "size_bytes: 'y' is not a size; write for example 512MiB, 8GiB or 4096"),
        ("x --mode y", "mode: 'y' is not one of fast, slow, none"),
        ("x --sizes 1,y", "sizes: 'y' is not a whole number"),
        ("x --names a,,b", "names: 'a,,b' is not a list of names with commas between (one is empty)"),
        ("x --nmes a", "unknown option --nmes; did you mean --names?"),
        ("x --zzzzzzz", "unknown option --zzzzzzz"),
        ("x --quiet y", "unknown argument y"),
        ("x y", "unknown argument y"),
        ("x --num", "--num needs a value"),
        ("", "FILE is required; see `tool try --help`"),
    ],
)
@pytest.mark.parametrize("columns", ["40", "200"])
@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_a_mistake_is_one_line_in_our_words(
    words: str, said: str, columns: str, encoding: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    with (tmp_path / "out").open("w", encoding=encoding) as out:
        monkeypatch.setattr(sys, "stdout", out)
        with pytest.raises(InvalidRequest) as error:
            parsed(*words.split())
    assert str(error.value) == said


def test_a_program_runs_its_commands_and_names_what_is_unknown(capsys: pytest.CaptureFixture[str]):
    assert PROGRAM.run(["try", "x"]) == 7
    assert PROGRAM.run(["sub", "two"]) == 0
    capsys.readouterr()
    for words, said in (
        (["tri"], "unknown command 'tri'; did you mean 'try'?"),
        (["sub", "three"], "unknown command 'three'; `tool sub --help` lists the commands"),
        (["--json"], "unknown option --json; `tool --help` lists the commands"),
        (["--json", "try"], "unknown option --json; `tool --help` lists the commands"),
        (["sub", "--x"], "unknown option --x; `tool sub --help` lists the commands"),
        (["sub", "--version"], "unknown option --version; `tool sub --help` lists the commands"),
        (["--tyro-bogus"], "unknown option --tyro-bogus; `tool --help` lists the commands"),
        (["try", "x", "--tyro-bogus"], "unknown option --tyro-bogus"),
        (["--tyro-print-completion", "dos"], "--tyro-print-completion: 'dos' is not one of bash, zsh, fish, tcsh"),
        (["try", "--tyro-print-completion", "dos"], "--tyro-print-completion: 'dos' is not one of bash, zsh, fish, tcsh"),
        (["--tyro-print-completion"], "--tyro-print-completion needs a shell"),
        (["--tyro-write-completion", "bash"], "--tyro-write-completion needs a shell and a file"),
    ):
        with pytest.raises(InvalidRequest) as error:
            PROGRAM.run(words)
        assert str(error.value) == said
        assert capsys.readouterr() == ("", "")


def test_a_program_prints_its_version(capsys: pytest.CaptureFixture[str]):
    assert PROGRAM.run(["--version"]) == 0
    assert capsys.readouterr().out == "tool 1.2.3\n"


@pytest.mark.parametrize("words", [[], ["--help"], ["sub"], ["sub", "-h"], ["try", "--help"]])
def test_help_ends_the_program(words: list[str], capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as end:
        PROGRAM.run(words)
    assert end.value.code == 0
    out = capsys.readouterr().out
    assert ("--size-bytes SIZE" if words[:1] == ["try"] else "one" if words[:1] == ["sub"] else "Try everything.") in out


def test_variables_and_files_are_read_like_words(tmp_path: Path):
    environ = {"TOOL_NUM": "4", "TOOL_GROW": "no", "TOOL_SIZES": "7,8", "TOOL_OTHER_X": "1", "HOME": "/"}
    assert from_environment(OPTIONS, environ, "TOOL_", ignored=("TOOL_OTHER_",)) == {
        "num": Setting(value=4, source="environment TOOL_NUM"),
        "grow": Setting(value=False, source="environment TOOL_GROW"),
        "sizes": Setting(value=(7, 8), source="environment TOOL_SIZES"),
    }
    toml, source = tmp_path / "s.toml", f"file {tmp_path / 's.toml'}"
    toml.write_text('names = []\nsizes = [7]\nrate = 2\nquiet = true\nsize_bytes = "1KiB"\n[part]\nmode = "fast"')
    assert from_file(OPTIONS, toml, tables=("part",)) == {
        "names": Setting(value=(), source=source),
        "sizes": Setting(value=(7,), source=source),
        "rate": Setting(value=2.0, source=source),
        "quiet": Setting(value=True, source=source),
        "size_bytes": Setting(value=1024, source=source),
        "mode": Setting(value="fast", source=source),
    }
    (tmp_path / "s.json").write_text('{"mode": null, "sizes": [1, 2]}')
    assert {name: setting.value for name, setting in from_file(OPTIONS, tmp_path / "s.json").items()} == {"mode": None, "sizes": (1, 2)}


@pytest.mark.parametrize("text", ["[1]", "{", ""])
def test_a_file_that_is_no_table_of_settings_is_named(tmp_path: Path, text: str):
    (tmp_path / "s.json").write_text(text)
    with pytest.raises(InvalidRequest, match=r"config: .*s\.json"):
        from_file(OPTIONS, tmp_path / "s.json")
