"""Options that several commands share. A command inherits the dataclasses whose options it has."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Annotated

from ooc_moe.config.run import PlaneName
from ooc_moe_wire.command_line import Flag

DEFAULT_STORE = "127.0.0.1:50051"
STORE_VARIABLE = "OOC_MOE_STORE"


@dataclass(frozen=True, kw_only=True)
class DaemonOptions:
    """The option that names the daemon to ask."""

    store: Annotated[str | None, Flag(metavar="ADDRESS", default=f"{STORE_VARIABLE}, or {DEFAULT_STORE}")] = None
    """Address of the storage daemon: HOST:PORT or unix:PATH."""

    @property
    def target(self) -> str:
        """The daemon's address: from the flag, else from the environment variable, else the default."""
        return self.store or os.environ.get(STORE_VARIABLE) or DEFAULT_STORE


@dataclass(frozen=True, kw_only=True)
class JsonOption:
    """The option for output that programs read."""

    as_json: Annotated[bool, Flag(name="json")] = False
    """Print one JSON document, with numbers as numbers."""


@dataclass(frozen=True, kw_only=True)
class OldRunOptions:
    """The option for a run whose daemon has a new address."""

    store: Annotated[str | None, Flag(metavar="ADDRESS")] = None
    """New address of the daemon, if it moved since the run was made."""


@dataclass(frozen=True, kw_only=True)
class PlaneOption:
    """The option that chooses how experts travel between the daemon and an existing run."""

    plane: PlaneName | None = None
    """How experts travel: over the connection, through memory shared with a daemon on this host, or local where possible. By default as in
    the run."""
