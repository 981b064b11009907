"""The commands `train`, which trains a new run or continues one, and `config show`, which shows the settings that `train` would use."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

from rich.console import Console

from ooc_moe.cli.options import JsonOption
from ooc_moe.cli.output import Column, print_records, say
from ooc_moe.cli.settings import directory_of, run_config, run_groups, settings_of, sources
from ooc_moe.session.interrupts import INTERRUPTED_EXIT
from ooc_moe_wire.command_line import Command, Group, Parsed, Setting, options_of
from ooc_moe_wire.errors import InvalidRequest

# A resumed run continues with its own configuration. Only these options have a meaning for it.
RESUME_OPTIONS = ("resume", "checkpoint", "run_dir", "name", "store", "plane", "quiet", "as_json")

TRAIN_HELP = """Learn games one after another, evaluate after each game, and write a report.

Three Atari games, with a storage daemon that the run starts and stops itself:

$ ooc-moe train --games krull,road_runner,crazy_climber --name first

The same against a daemon elsewhere. Ctrl-C saves the run, --resume continues it:

$ ooc-moe train --games krull,road_runner --store host:50051 --name second
$ ooc-moe train --resume --name second

Back to the end of the first game, and on from there (to keep what came after it, see ooc-moe branch):

$ ooc-moe train --resume --name second --checkpoint 0-krull

Settings from a file, the same run once more, and one setting from the environment:

$ ooc-moe train --config run.toml --seed 1
$ ooc-moe train --config runs/first/config.json --name again
$ OOC_MOE_HBM_EXPERTS=16 ooc-moe train --games krull

A flag overrides the environment (OOC_MOE_ and the option's name in capitals), the environment overrides the file, and the file overrides
the preset and the defaults. With --resume, the run's own configuration is used instead. ooc-moe config show prints what would be used.
Agent sizes below are those of the preset demo. A list is written a,b,c; the word none unsets an option that may be unset.
"""

SHOW_HELP = """Show the settings that train would use with the same flags, and where each value comes from.

$ ooc-moe config show --games krull --preset full --hbm-experts 16
$ ooc-moe config show --config run.toml --json
"""


def train(parsed: Parsed) -> int:
    """Carries out the command `train`: trains a new run, or resumes one. Returns the exit code."""
    from ooc_moe.run import train as training

    console = Console(quiet=parsed.values["quiet"])
    try:
        if parsed.values["resume"]:
            _refuse_ignored(parsed)
            values = parsed.values
            training.resume(
                _resumed_dir(values),
                console,
                store=values["store"] if "store" in parsed.given else None,
                plane=values["plane"] if "plane" in parsed.given else None,
                name=values["checkpoint"],
            )
        else:
            if parsed.values["checkpoint"] is not None:
                name = parsed.values["checkpoint"]
                raise InvalidRequest(f"checkpoint: {name!r} needs --resume; ooc-moe branch begins another run from it")
            training.train(run_config(settings_of(parsed, os.environ)), console)
    except training.Interrupted as stop:
        console.print(str(stop), soft_wrap=True, markup=False, highlight=False)
        return INTERRUPTED_EXIT
    return 0


def _resumed_dir(values: dict[str, Any]) -> Path:
    name, run_dir = values["name"], values["run_dir"]
    if name is not None and run_dir is not None:
        raise InvalidRequest(f"name: {name!r} and run_dir: {run_dir} are two directories; give one of them")
    if name is None and run_dir is None:
        raise InvalidRequest("resume: give the run's --name or --run-dir")
    return Path(run_dir) if name is None else directory_of(name)


def _refuse_ignored(parsed: Parsed) -> None:
    """Raises InvalidRequest if a flag was given that a resumed run would ignore."""
    for name in parsed.given:
        if name not in RESUME_OPTIONS:
            raise InvalidRequest(f"resume: a run continues with its own configuration; leave out --{name.replace('_', '-')}")


def show(parsed: Parsed) -> int:
    """Carries out the command `config show`: prints the settings that `train` would use with the same flags. Returns the exit code.

    Invalid settings raise the same errors as in `train`.
    """
    settings = _resumed_settings(parsed) if parsed.values["resume"] else settings_of(parsed, os.environ)
    if settings["games"].value:
        run_config(settings)
    columns = (Column("setting", "setting"), Column("value", "value", _text), Column("source", "from"))
    print_records(columns, sources(settings), as_json=parsed.values["as_json"])
    if not settings["games"].value and not parsed.values["as_json"]:
        say("train also needs --games")
    return 0


def _resumed_settings(parsed: Parsed) -> dict[str, Setting]:
    """Returns the settings of a resumed run: those of its config.json, and the flags that may override them."""
    _refuse_ignored(parsed)
    file = parsed.values | {"config": _resumed_dir(parsed.values)}
    return settings_of(dataclasses.replace(parsed, values=file), {})


def _text(value: Any) -> str:
    """Writes the value of a setting as it is written on the command line."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "on" if value else "off"
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)


def _show_groups() -> list[Group]:
    first, *others = run_groups()
    return [dataclasses.replace(first, options=(*first.options, *options_of(JsonOption))), *others]


TRAIN = Command(description=TRAIN_HELP, groups=run_groups, run=train)
CONFIG_SHOW = Command(description=SHOW_HELP, groups=_show_groups, run=show)
