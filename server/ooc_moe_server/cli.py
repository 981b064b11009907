"""The command `ooc-moe-server`: flags become a `ServerConfig`, errors become one line and exit code 2."""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import Annotated

import typer

from ooc_moe_server.app import run
from ooc_moe_server.config import ServerConfig
from ooc_moe_wire.errors import InvalidRequest, OocMoeError
from ooc_moe_wire.sizes import parse_size

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

The bound addresses are logged, and written to daemon.json in the data directory. SIGTERM or Ctrl-C drains and exits with 0; an
acknowledged push survives even kill -9. Health and reflection are served: grpcurl shows every call.
"""


@app.command(help=HELP)
def serve(
    data_dir: Annotated[Path, typer.Option(help="Where experts are kept; made if it does not exist. One daemon at a time.", metavar="DIR")],
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


def main() -> None:
    """The console script."""
    try:
        app()
    except OocMoeError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None


def _size(field: str, text: str) -> int:
    try:
        return parse_size(text)
    except ValueError as error:
        raise InvalidRequest(f"{field}: {error}") from error


if __name__ == "__main__":
    main()
