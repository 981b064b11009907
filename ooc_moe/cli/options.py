"""The options that several commands share, as dataclasses. A command has the options of a dataclass by inheriting from it."""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass
from typing import Annotated

from ooc_moe.config.run import RunConfig
from ooc_moe_wire.command_line import Flag, Option, options_of

DEFAULT_STORE = "127.0.0.1:50051"
STORE_VARIABLE = "OOC_MOE_STORE"


@dataclass(frozen=True, kw_only=True)
class DaemonOptions:
    """The option `--store`, for commands that connect to a storage daemon."""

    store: Annotated[str | None, Flag(metavar="ADDRESS", default=f"{STORE_VARIABLE}, or {DEFAULT_STORE}")] = None
    """Address of the storage daemon: HOST:PORT or unix:PATH."""

    @property
    def target(self) -> str:
        """The address of the daemon: that of --store, else that in the environment variable OOC_MOE_STORE, else the default."""
        return self.store or os.environ.get(STORE_VARIABLE) or DEFAULT_STORE


@dataclass(frozen=True, kw_only=True)
class JsonOption:
    """The option `--json`, for commands whose output programs may read."""

    as_json: Annotated[bool, Flag(name="json")] = False
    """Print one JSON document, with numbers as numbers."""


@dataclass(frozen=True, kw_only=True)
class OldRunOptions:
    """The option `--store` of commands on an existing run. It is for a run whose storage daemon has got a new address."""

    store: Annotated[str | None, Flag(metavar="ADDRESS")] = None
    """New address of the daemon, if it moved since the run was made."""


def options_of_run(*names: str) -> tuple[Option, ...]:
    """Returns options of `train` for a command on an existing run. An option that is not given is None: the run's own value holds."""
    found = {option.name: option for option in options_of(RunConfig, skip=("agent", "ppo"), paired=True)}
    return tuple(
        dataclasses.replace(found[name], default=None, shown=dataclasses.replace(found[name].shown, default="as in the run"))
        for name in names
    )
