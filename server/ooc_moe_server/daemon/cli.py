"""The command `ooc-moe-server`: turns settings into a `ServerConfig` and runs the daemon. Errors are printed in one line, with exit code 2.

The subcommands `verify` and `rebuild` check and repair a data directory instead; its daemon must be stopped.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import sqlite3
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, TypeVar

# Not through ooc_moe.display, which has formats and progress bars of its own: the daemon may not import ooc_moe.
from humanize import naturalsize
from rich.console import Console
from rich.progress import track

from ooc_moe_server.daemon.config import ServerConfig
from ooc_moe_server.daemon.data_dir import held
from ooc_moe_server.daemon.lifecycle import run
from ooc_moe_server.index.index_thread import store_error
from ooc_moe_server.repair.rebuild import rebuild
from ooc_moe_server.repair.verify import verify
from ooc_moe_wire.command_line import (
    Command,
    Flag,
    Group,
    Parsed,
    Program,
    Setting,
    command_of,
    from_environment,
    from_file,
    options_of,
    with_defaults,
    with_metavars,
)
from ooc_moe_wire.errors import InvalidRequest, OocMoeError

Item = TypeVar("Item")
PREFIX = "OOC_MOE_SERVER_"

SERVE_HELP = """Keeps the experts of out-of-core trainers in DRAM and in files, and serves them over gRPC.

On the storage host:

$ ooc-moe-server --data-dir store --dram-bytes 8GiB --listen 127.0.0.1:50051

On a trainer, and to see what the daemon does:

$ ooc-moe train --store 127.0.0.1:50051 ...
$ ooc-moe stats --store 127.0.0.1:50051 --watch

When a data directory may be damaged, with its daemon stopped:

$ ooc-moe-server verify store       # reads everything, changes nothing
$ ooc-moe-server rebuild store      # makes a new index from the records

The bound addresses are logged, and written to daemon.json in the data directory. SIGTERM or Ctrl-C drains and exits with 0. An
acknowledged push survives even kill -9. Health and reflection are served: grpcurl shows every call.

A flag overrides the environment (OOC_MOE_SERVER_ and the option's name in capitals), the environment overrides the file of --config, and
the file overrides the defaults. ooc-moe-server --version prints the version.
"""


@dataclass(frozen=True, kw_only=True)
class FileOption:
    """Declares the option `--config`, which names a file that settings are read from. A `ServerConfig` therefore has no such field."""

    config: Annotated[Path | None, Flag(metavar="FILE")] = None
    """TOML or JSON file with settings; its keys are the names of the options with underscores."""


@cache
def serve_groups() -> tuple[Group, ...]:
    """Returns the options of `ooc-moe-server` when it runs the daemon (without `verify` or `rebuild`), as one group for the parser."""
    settings = with_defaults(options_of(ServerConfig, paired=True), {"data_dir": None})
    settings = with_metavars(settings, {"data_dir": "DIR", "listen": "ADDRESS", "grace_s": "SECONDS"})
    settings = tuple(
        dataclasses.replace(option, shown=dataclasses.replace(option.shown, default="1GiB")) if option.name == "dram_bytes" else option
        for option in settings
    )
    return (Group(title="", options=(*settings, *options_of(FileOption))),)


def server_config(parsed: Parsed, environ: Mapping[str, str]) -> ServerConfig:
    """Makes the daemon's configuration from the parsed flags, the environment and the file that `--config` names.

    A flag overrides the environment, which overrides the file of `--config`, which overrides the defaults.

    Raises:
        InvalidRequest: a setting is unknown or invalid, or no data directory was named.
    """
    options = [option for option in serve_groups()[0].options if option.name != "config"]
    given: dict[str, Setting] = {} if parsed.values["config"] is None else from_file(options, parsed.values["config"])
    given |= from_environment(options, environ, PREFIX)
    given |= {name: Setting(value=parsed.values[name], source="flag") for name in parsed.given if name != "config"}
    if "data_dir" not in given:
        raise InvalidRequest("--data-dir is required; see `ooc-moe-server --help`")
    return ServerConfig(**{name: setting.value for name, setting in given.items()})


def serve(parsed: Parsed) -> None:
    """Runs the daemon until SIGTERM or Ctrl-C, with the settings of the parsed command line."""
    config = server_config(parsed, os.environ)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s", stream=sys.stderr)
    run(config)


@dataclass(frozen=True, kw_only=True)
class Verify:
    """Check every record and the index of the data directory of a stopped daemon, and change nothing.

    Checks the index (each row, the sum of all rows, the last commit, SQLite's pages), the manifests of banks and snapshots, and the
    header and both sections of every record that a bank or a snapshot refers to.

    $ ooc-moe-server verify store

    Prints one line for each finding. Exit code 0: clean. 1: damaged. 2: it could not be checked (no store, or in use).
    """

    data_dir: Annotated[Path, Flag(positional=True, metavar="DIR")]
    """The data directory."""
    as_json: Annotated[bool, Flag(name="json")] = False
    """Print one JSON object, for programs."""

    def run(self) -> int:
        """Checks the data directory, and prints what was found. Returns the exit code."""
        logging.basicConfig(level=logging.ERROR, format="%(message)s", stream=sys.stderr)
        with _held(self.data_dir):
            result = verify(self.data_dir, _track)
        if self.as_json:
            print(json.dumps(result.to_json()))
        else:
            for line in (*result.findings, *(f"note: {note}" for note in result.notes)):
                print(line)
            verdict = "clean" if result.is_clean else f"{len(result.findings)} findings"
            size = naturalsize(result.num_bytes, binary=True)
            print(f"{verdict}: {result.num_banks} banks, {result.num_snapshots} snapshots, {result.num_records} records of {size}")
        return 0 if result.is_clean else 1


@dataclass(frozen=True, kw_only=True)
class Rebuild:
    """Make the index of a stopped daemon's data directory anew, from the manifests and the header of every record.

    For a daemon that refuses to start because its index is damaged or missing, or lacks commits. The old index is moved aside
    (index.sqlite.damaged-1, ...), never deleted. What was deleted stays deleted. Every expert gets its newest record whose checksums are
    right; a line is printed if that is not the newest record there was.

    $ ooc-moe-server rebuild store

    Exit code 0: everything came back. 1: something is damaged or lost, one line each. 2: it could not be done (no store, or in use).
    """

    data_dir: Annotated[Path, Flag(positional=True, metavar="DIR")]
    """The data directory."""

    def run(self) -> int:
        """Makes the index anew, and prints what could not be recovered. Returns the exit code."""
        logging.basicConfig(level=logging.ERROR, format="%(message)s", stream=sys.stderr)
        with _held(self.data_dir):
            result = rebuild(self.data_dir, _track)
        for line in (*result.damage, *(f"note: {note}" for note in result.notes)):
            print(line)
        print(
            f"rebuilt, {'whole' if result.is_whole else 'with damage'}: {result.num_banks} banks, {result.num_experts} written experts, "
            f"{result.num_snapshots} snapshots, {naturalsize(result.num_bytes, binary=True)} verified"
        )
        return 0 if result.is_whole else 1


PROGRAM = Program(
    name="ooc-moe-server",
    description=SERVE_HELP,
    version=lambda: version("ooc-moe"),
    commands={
        "": Command(description=SERVE_HELP, groups=serve_groups, run=serve),
        "verify": command_of(Verify),
        "rebuild": command_of(Rebuild),
    },
)


def main() -> None:
    """Runs the command line of this process (`sys.argv`), and exits with its exit code. The entry point of the console script."""
    try:
        code = PROGRAM.run(sys.argv[1:])
    except OocMoeError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    raise SystemExit(code)


@contextmanager
def _held(path: Path) -> Iterator[None]:
    """Locks an existing data directory while the context is open.

    An error of the disk or of SQLite is raised as an OocMoeError of one line.
    """
    if not (path / "FORMAT").exists():  # `data_dir.held` would make a new data directory.
        raise InvalidRequest(f"{path} is no data directory of a daemon: it has no file FORMAT")
    with held(path):
        try:
            yield
        except (OSError, sqlite3.Error) as error:
            raise store_error(error, what=str(path)) from error


def _track(items: Iterable[Item], what: str, total: int) -> Iterable[Item]:
    """Yields the items unchanged. Meanwhile shows a progress bar labelled `what`, up to `total`, if standard error is a terminal."""
    console = Console(stderr=True)
    return track(items, what, total, console=console, transient=True, disable=not console.is_terminal)


if __name__ == "__main__":
    main()
