"""Reads the settings of a training run from flags, the environment, a file and a preset, and makes a `RunConfig` of them.

A setting that several sources give comes from the first of them in this order:

    flag  >  environment OOC_MOE_*  >  file (--config)  >  preset (the agent's sizes)  >  default

Every field of `RunConfig`, `AgentConfig` and `PPOConfig` is an option, whose name is the field's name. No two of them share a name.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Final

from ooc_moe.config.agent import PRESETS, AgentConfig, Preset
from ooc_moe.config.run import PPOConfig, RunConfig
from ooc_moe.metrics.log import CONFIG_FILE
from ooc_moe_wire.command_line import (
    Flag,
    Group,
    Option,
    Parsed,
    Setting,
    from_environment,
    from_file,
    options_of,
    with_defaults,
    with_metavars,
)
from ooc_moe_wire.errors import InvalidRequest

PREFIX = "OOC_MOE_"
# Variables with the prefix that are not settings of a run: those of the daemon, and credentials.
OTHER_VARIABLES = ("OOC_MOE_SERVER_", "OOC_MOE_TOKEN")
DEFAULT_PRESET: Final = "demo"
_DETECTOR = ("recognise", "exemplars_per_game", "detect_unknown", "belief_smoothing", "belief_switch_at")
GAMES_REQUIRED = "--games is required, for example --games krull,road_runner. `ooc-moe games` lists them."


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """The options of `train` that are not fields of `RunConfig`, `AgentConfig` or `PPOConfig`."""

    preset: Preset = DEFAULT_PRESET
    """Preset of the agent's sizes; other flags override single sizes."""
    config: Annotated[Path | None, Flag(metavar="FILE")] = None
    """File with settings: TOML, or the config.json of a run (or that run's directory)."""
    name: str | None = None
    """Name of the run: its directory is runs/NAME. By default made of the preset and the time."""
    resume: bool = False
    """Continue from the last checkpoint of the run that --name or --run-dir names."""
    checkpoint: str | None = None
    """With --resume: continue from this checkpoint of the run instead, and drop what came after it."""
    quiet: bool = False
    """Print nothing but errors."""


def configurable() -> tuple[Option, ...]:
    """Returns the options of `train` that a file or the environment may set, too: the preset, and all fields of the configurations."""
    preset = tuple(option for option in options_of(RunOptions) if option.name == "preset")
    return (*preset, *(option for group in run_groups()[1:] for option in group.options))


@cache
def run_groups() -> tuple[Group, ...]:
    """Returns all options of `train`, in the groups of its help text."""
    run = options_of(RunConfig, skip=("agent", "ppo"), paired=True)
    run = with_defaults(run, {"run_dir": None, "games": ()})
    run = with_metavars(run, {"run_dir": "DIR", "store": "ADDRESS", "trace": "FILE", "from_bank": "BANK"})
    return (
        Group(title="", options=options_of(RunOptions)),
        Group(title="Run", options=tuple(option for option in run if option.name not in _DETECTOR)),
        Group(title="Agent", options=with_defaults(options_of(AgentConfig, paired=True), dataclasses.asdict(PRESETS[DEFAULT_PRESET]))),
        Group(title="Learning", options=options_of(PPOConfig, paired=True)),
        Group(title="Game recognition", options=tuple(option for option in run if option.name in _DETECTOR)),
    )


def settings_of(parsed: Parsed, environ: Mapping[str, str]) -> dict[str, Setting]:
    """Returns the value of every option in `configurable`, and its source: flag, environment, file, preset or default.

    Args:
        parsed: the options of the command line.
        environ: the environment variables.

    Raises:
        InvalidRequest: the file or the environment names an unknown setting, or has an invalid value.
    """
    options = configurable()
    given: dict[str, Setting] = {}
    if parsed.values["config"] is not None:
        given |= from_file(options, _config_file(parsed.values["config"]), tables=("agent", "ppo"))
    given |= from_environment(options, environ, PREFIX, ignored=OTHER_VARIABLES)
    names = {option.name for option in options}
    given |= {name: Setting(value=parsed.values[name], source="flag") for name in parsed.given if name in names}
    defaults = {option.name: Setting(value=option.default, source="default") for option in options}
    preset = given.get("preset", defaults["preset"])
    sizes = {
        each.name: Setting(value=getattr(PRESETS[preset.value], each.name), source=f"preset {preset.value}")
        for each in dataclasses.fields(AgentConfig)
    }
    return _with_run_dir(defaults | sizes | given, parsed)


def _config_file(path: Path) -> Path:
    return path / CONFIG_FILE if path.is_dir() else path


def _with_run_dir(settings: dict[str, Setting], parsed: Parsed) -> dict[str, Setting]:
    """Returns the settings with the run's directory filled in.

    It is the directory of --name if that is given; else that of --run-dir, the environment or the file; else a new one that is named after
    the preset and the time.
    """
    name, found = parsed.values["name"], settings["run_dir"]
    if name is not None:
        if found.source == "flag":
            raise InvalidRequest(f"name: {name!r} and run_dir: {found.value} are two directories; give one of them")
        return settings | {"run_dir": Setting(value=directory_of(name), source="flag")}
    if found.value is None:
        new = directory_of(f"{settings['preset'].value}-{time.strftime('%Y%m%d-%H%M%S')}")
        return settings | {"run_dir": Setting(value=new, source="default")}
    return settings


def directory_of(name: str) -> Path:
    """Returns the directory of the run with this name: runs/NAME. Raises InvalidRequest if the name is not a single part of a path."""
    if Path(name).parts != (name,) or name == "..":
        raise InvalidRequest(f"name: {name!r} is not the name of one directory below runs; --run-dir takes a path")
    return Path("runs") / name


def run_config(settings: Mapping[str, Setting]) -> RunConfig:
    """Makes the configuration of a run from its settings. Raises InvalidRequest if no game is given, or a value is invalid."""
    if not settings["games"].value:
        raise InvalidRequest(GAMES_REQUIRED)
    run = _values(RunConfig, settings)
    if run["trace"] is not None:
        run["trace"] = str(Path(run["trace"]).absolute())
    return RunConfig(agent=AgentConfig(**_values(AgentConfig, settings)), ppo=PPOConfig(**_values(PPOConfig, settings)), **run)


def _values(config: type[Any], settings: Mapping[str, Setting]) -> dict[str, Any]:
    return {each.name: settings[each.name].value for each in dataclasses.fields(config) if each.name in settings}


def sources(settings: Mapping[str, Setting]) -> list[dict[str, Any]]:
    """Returns a record with the name, value and source of each setting, for `ooc-moe config show`, in the order of the options."""
    return [
        {"setting": option.name, "value": _plain(settings[option.name].value), "source": settings[option.name].source}
        for option in configurable()
    ]


def _plain(value: Any) -> Any:
    """Converts the value of a setting to a type that JSON has."""
    if isinstance(value, Path):
        return str(value)
    return list(value) if isinstance(value, Sequence) and not isinstance(value, str) else value
