"""The command `ooc-moe-server`: flags become a `ServerConfig`, errors become one line and exit code 2."""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import Annotated

import click
import typer

from ooc_moe_server.app import run
from ooc_moe_server.config import ServerConfig
from ooc_moe_wire.errors import OocMoeError
from ooc_moe_wire.sizes import parse_size

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


@app.command()
def serve(
    data_dir: Annotated[Path, typer.Option(help="Where experts are kept; made if it does not exist. One daemon at a time.")],
    dram_bytes: Annotated[
        str, typer.Option(help="Memory of the DRAM tier, allocated in full at the start: 512MiB, 8GiB, ...", metavar="SIZE")
    ] = "1GiB",
    listen: Annotated[
        list[str] | None,
        typer.Option(help="An address: host:port (port 0: any free one) or unix:PATH. May be repeated. [default: 127.0.0.1:50051]"),
    ] = None,
    insecure: Annotated[bool, typer.Option("--insecure", help="Allow addresses beyond loopback, open to whoever reaches them.")] = False,
    grace: Annotated[float, typer.Option(help="Seconds that calls under way get to finish after SIGTERM.")] = 10.0,
) -> None:
    """Keeps the experts of out-of-core trainers in DRAM and in files, and serves them over gRPC.

    On the storage host:

        ooc-moe-server --data-dir /var/lib/ooc-moe --dram-bytes 8GiB --listen 127.0.0.1:50051

    On a trainer:  ooc-moe train --store 127.0.0.1:50051 ...   and to look on:  ooc-moe stats --store 127.0.0.1:50051 --watch

    The bound addresses are logged, and written to DATA_DIR/daemon.json. SIGTERM or Ctrl-C drains and exits with 0; an
    acknowledged push survives even kill -9. Health and reflection are served: try grpcurl.
    """
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s", stream=sys.stderr)
    run(
        ServerConfig(
            data_dir=data_dir,
            dram_bytes=_size(dram_bytes),
            listen=tuple(listen) if listen else ("127.0.0.1:50051",),
            insecure=insecure,
            grace_s=grace,
        )
    )


def main() -> None:
    """The console script."""
    try:
        app(standalone_mode=False)
    except click.ClickException as error:
        _refuse(error.format_message())
    except (OocMoeError, ValueError) as error:
        _refuse(str(error))


def _size(text: str) -> int:
    try:
        return parse_size(text)
    except ValueError as error:
        raise click.BadParameter(f"--dram-bytes: {error}") from error


def _refuse(message: str) -> None:
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)


if __name__ == "__main__":
    main()
