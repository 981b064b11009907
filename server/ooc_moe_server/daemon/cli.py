"""The command `ooc-moe-server`: flags become a `ServerConfig`, errors become one line and exit code 2.

Without a subcommand it is the daemon; `verify` and `rebuild` look after a data directory whose daemon is stopped.
"""

from __future__ import annotations

import json
import logging
import sqlite3
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, TypeVar

import typer
from humanize import naturalsize
from rich.console import Console
from rich.progress import track

from ooc_moe_server.daemon.config import ServerConfig
from ooc_moe_server.daemon.data_dir import held
from ooc_moe_server.daemon.lifecycle import run
from ooc_moe_server.index.index_thread import store_error
from ooc_moe_server.repair.rebuild import rebuild
from ooc_moe_server.repair.verify import verify
from ooc_moe_wire.errors import InvalidRequest, OocMoeError
from ooc_moe_wire.sizes import parse_size

Item = TypeVar("Item")

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


# "\b" keeps the lines of a paragraph as they are.
HELP = """Keeps the experts of out-of-core trainers in DRAM and in files, and serves them over gRPC.

On the storage host:

\b
    ooc-moe-server --data-dir store --dram-bytes 8GiB --listen 127.0.0.1:50051

On a trainer, and to look on:

\b
    ooc-moe train --store 127.0.0.1:50051 ...
    ooc-moe stats --store 127.0.0.1:50051 --watch

When a data directory may be damaged, with its daemon stopped:

\b
    ooc-moe-server verify store       # reads everything, changes nothing
    ooc-moe-server rebuild store      # a new index from the records

The bound addresses are logged, and written to daemon.json in the data directory. SIGTERM or Ctrl-C drains and exits with 0; an
acknowledged push survives even kill -9. Health and reflection are served: grpcurl shows every call.
"""


VERIFY_HELP = """Reads everything that is committed in DIR, and says what is not as it was written.

Checks the index (each row, their sum, the last commit, SQLite's pages), the manifests of banks and snapshots, and the header and both
sections of every record that a bank or a snapshot refers to. Changes nothing. The daemon must be stopped.

One line for each finding. Exit code 0: clean. 1: damaged. 2: it could not be checked (no store, or in use).
"""

REBUILD_HELP = """Makes the index of DIR anew, from the manifests of banks and snapshots and the header of every record.

For a daemon that refuses to start because its index is damaged, behind, or missing. The old index is moved aside
(index.sqlite.damaged-1, ...), never deleted. What was deleted stays deleted; every expert gets its newest record whose checksums are right,
and a line where that is not the newest there was. The daemon must be stopped.

Exit code 0: everything came back. 1: something is damaged or lost, one line each. 2: it could not be done (no store, or in use).
"""


@app.callback(invoke_without_command=True, help=HELP)
def serve(
    context: typer.Context,
    data_dir: Annotated[
        Path | None, typer.Option(help="Where experts are kept; made if it does not exist. One daemon at a time. [required]", metavar="DIR")
    ] = None,
    dram_bytes: Annotated[
        str, typer.Option(help="Memory of the DRAM tier, allocated in full at the start: 512MiB, 8GiB, ...", metavar="SIZE")
    ] = "1GiB",
    listen: Annotated[
        list[str] | None,
        typer.Option(help="host:port (port 0: any free one) or unix:PATH; may be repeated. [default: 127.0.0.1:50051]", metavar="ADDRESS"),
    ] = None,
    dram_policy: Annotated[
        str, typer.Option(help="Which resident leaves the DRAM tier first: lru, or s3fifo, which lets scans pass.", metavar="POLICY")
    ] = "lru",
    nvme_bytes: Annotated[
        str | None,
        typer.Option(
            help="The most that all records may take in files, snapshots included. [default: what the disk holds]", metavar="SIZE"
        ),
    ] = None,
    bank_bytes: Annotated[
        str | None, typer.Option(help="The most that the records of any one bank may take. [default: no limit]", metavar="SIZE")
    ] = None,
    local: Annotated[bool, typer.Option(help="Let this user's processes on this host read the DRAM tier in place.")] = True,
    insecure: Annotated[bool, typer.Option("--insecure", help="Allow addresses beyond loopback, open to whoever reaches them.")] = False,
    grace: Annotated[float, typer.Option(help="Time that calls under way get to finish after SIGTERM.", metavar="SECONDS")] = 10.0,
) -> None:
    """Runs the daemon until SIGTERM or Ctrl-C."""
    if context.invoked_subcommand:
        if data_dir:
            raise InvalidRequest(f"--data-dir: `{context.invoked_subcommand}` takes its directory as its argument")
        return
    if data_dir is None:
        raise InvalidRequest("--data-dir is missing; see ooc-moe-server --help")
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s", stream=sys.stderr)
    run(
        ServerConfig(
            data_dir=data_dir,
            dram_bytes=_size("dram_bytes", dram_bytes),
            dram_policy=dram_policy,
            nvme_bytes=None if nvme_bytes is None else _size("nvme_bytes", nvme_bytes),
            bank_bytes=None if bank_bytes is None else _size("bank_bytes", bank_bytes),
            local=local,
            listen=tuple(listen) if listen else ("127.0.0.1:50051",),
            insecure=insecure,
            grace_s=grace,
        )
    )


DataDir = Annotated[Path, typer.Argument(help="The data directory of a daemon that is stopped.", metavar="DIR")]


@app.command(name="verify", help=VERIFY_HELP, short_help="Check every record and the index of a stopped daemon.")
def verify_command(
    data_dir: DataDir, as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object, for programs.")] = False
) -> None:
    """Runs verify.py."""
    logging.basicConfig(level=logging.ERROR, format="%(message)s", stream=sys.stderr)
    with _held(data_dir):
        result = verify(data_dir, _track)
    if as_json:
        print(json.dumps(result.to_json()))
    else:
        for line in (*result.findings, *(f"note: {note}" for note in result.notes)):
            print(line)
        verdict = "clean" if result.is_clean else f"{len(result.findings)} findings"
        size = naturalsize(result.num_bytes, binary=True)
        print(f"{verdict}: {result.num_banks} banks, {result.num_snapshots} snapshots, {result.num_records} records of {size}")
    raise typer.Exit(0 if result.is_clean else 1)


@app.command(name="rebuild", help=REBUILD_HELP, short_help="Make a lost or damaged index anew from the records.")
def rebuild_command(data_dir: DataDir) -> None:
    """Runs rebuild.py."""
    logging.basicConfig(level=logging.ERROR, format="%(message)s", stream=sys.stderr)
    with _held(data_dir):
        result = rebuild(data_dir, _track)
    for line in (*result.damage, *(f"note: {note}" for note in result.notes)):
        print(line)
    print(
        f"rebuilt, {'whole' if result.is_whole else 'with damage'}: {result.num_banks} banks, {result.num_experts} written experts, "
        f"{result.num_snapshots} snapshots, {naturalsize(result.num_bytes, binary=True)} verified"
    )
    raise typer.Exit(0 if result.is_whole else 1)


def main() -> None:
    """The console script."""
    try:
        app()
    except OocMoeError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None


@contextmanager
def _held(path: Path) -> Iterator[None]:
    """Holds a data directory that exists; what the disk refuses becomes one line."""
    if not (path / "FORMAT").exists():  # `data_dir.held` would make one.
        raise InvalidRequest(f"{path} is no data directory of a daemon: it has no file FORMAT")
    with held(path):
        try:
            yield
        except (OSError, sqlite3.Error) as error:
            raise store_error(error, what=str(path)) from error


def _track(items: Iterable[Item], what: str, total: int) -> Iterable[Item]:
    """A progress bar where somebody looks."""
    console = Console(stderr=True)
    return track(items, what, total, console=console, transient=True, disable=not console.is_terminal)


def _size(field: str, text: str) -> int:
    try:
        return parse_size(text)
    except ValueError as error:
        raise InvalidRequest(f"{field}: {error}") from error


if __name__ == "__main__":
    main()
