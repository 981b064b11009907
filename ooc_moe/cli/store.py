"""The commands that ask a storage daemon: stats, bank ..., snapshot ...

Everything goes through `RemoteStore`; nothing here needs torch.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated

import typer
from google.protobuf.json_format import MessageToDict
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from ooc_moe.cli.dashboard import render
from ooc_moe.display.formats import DASH, format_ago, format_bytes
from ooc_moe_client.remote.store import RemoteStore
from ooc_moe_client.store import Bank, Snapshot, Tier
from ooc_moe_wire.errors import InvalidRequest
from ooc_moe_wire.v1 import stats_pb2

_WHERE = {Tier.DRAM: "in DRAM", Tier.NVME: "on NVMe", Tier.SEED: "made from the seed when asked for"}
# A dashboard outlives a restart of the daemon; a command should not hang on one that is away.
WATCH_PATIENCE_S = 3600.0
PATIENCE_S = 5.0

bank_app = typer.Typer(no_args_is_help=True, help="List, show, remove and fork banks of experts.", rich_markup_mode="rich")
snapshot_app = typer.Typer(no_args_is_help=True, help="List, create, restore and remove snapshots of banks.", rich_markup_mode="rich")

StoreOption = Annotated[
    str, typer.Option("--store", help="The storage daemon: HOST:PORT or unix:PATH.", metavar="ADDRESS", envvar="OOC_MOE_STORE")
]
YesOption = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")]
DEFAULT_STORE = "127.0.0.1:50051"


def stats(
    store: StoreOption = DEFAULT_STORE,
    watch: Annotated[bool, typer.Option("--watch", help="Keep showing, until Ctrl-C.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document; with --watch, one per line.")] = False,
    interval: Annotated[float, typer.Option(help="Seconds between updates of --watch; at least 0.1.")] = 1.0,
) -> None:
    """Show what the daemon's tiers, banks and trainers are doing.

    A dashboard beside a training run, and the same numbers for a program (64-bit counters are strings, as protobuf's JSON has them):

    \b
    $ ooc-moe stats --store storage-host:50051 --watch
    $ ooc-moe stats --json | jq '.total.hits'
    """
    if not 0.1 <= interval <= 3600:
        raise InvalidRequest(f"interval: {interval} is not 0.1 to 3600 seconds")
    with _connected(store, patience_s=WATCH_PATIENCE_S if watch else PATIENCE_S) as daemon:
        if not watch:
            _show(daemon.stats(), as_json=as_json)
        elif as_json:
            for now in daemon.watch_stats(interval):
                print(json.dumps(_plain(now)), flush=True)
        else:
            _watch(daemon, interval)


def _show(now: stats_pb2.Stats, *, as_json: bool) -> None:
    if as_json:
        print(json.dumps(_plain(now), indent=2))
    else:
        Console().print(render(now))


def _watch(daemon: RemoteStore, interval: float) -> None:
    before = daemon.stats()
    with Live(render(before), screen=sys.stdout.isatty(), auto_refresh=False) as live:
        for now in daemon.watch_stats(interval):
            live.update(render(now, before), refresh=True)
            before = now


def _plain(now: stats_pb2.Stats) -> dict[str, object]:
    return MessageToDict(now, preserving_proto_field_name=True, always_print_fields_with_no_presence=True)


@bank_app.command(name="ls")
def bank_ls(store: StoreOption = DEFAULT_STORE) -> None:
    """List the banks of a daemon.

    \b
    $ ooc-moe bank ls --store storage-host:50051
    """
    with _connected(store) as daemon:
        banks = daemon.list_banks()
    table = _table("bank", "experts", "written", "bytes", "record", "writer", "created")
    for bank in banks:
        table.add_row(
            bank.spec.name,
            f"{bank.spec.num_experts:,}",
            f"{bank.num_written:,}",
            format_bytes(bank.num_written * bank.record_bytes),
            format_bytes(bank.record_bytes),
            Text(bank.writer_id or DASH),
            format_ago(bank.created_unix_ms),
        )
    Console().print(table if banks else "no banks")


@bank_app.command(name="show")
def bank_show(name: Annotated[str, typer.Argument(help="The bank's name.")], store: StoreOption = DEFAULT_STORE) -> None:
    """Show one bank: its experts' layout, and where they are.

    \b
    $ ooc-moe bank show first/experts
    """
    with _connected(store) as daemon:
        bank = daemon.get_bank(name)
        tiers = Counter(tier for expert in daemon.list_experts(name) for tier in expert.tiers)
    console = Console()
    facts = Table(box=None, show_header=False, pad_edge=False)
    for label, value in _bank_facts(bank, tiers):
        facts.add_row(Text(label, style="dim"), Text(value))
    tensors = _table("tensor", "shape", "dtype", "bytes", "section", "begins as")
    for section, members in (("parameters", bank.spec.layout.parameters), ("optimizer", bank.spec.layout.optimizer)):
        for tensor in members:
            shape = " x ".join(map(str, tensor.shape))
            begins = (
                f"{tensor.initializer.algorithm} {tensor.initializer.value:g}" if tensor.initializer.value else tensor.initializer.algorithm
            )
            tensors.add_row(tensor.name, shape, tensor.dtype, format_bytes(tensor.num_bytes), section, begins)
    console.print(facts, tensors, sep="\n")


@bank_app.command(name="rm")
def bank_rm(
    name: Annotated[str, typer.Argument(help="The bank's name.")], store: StoreOption = DEFAULT_STORE, yes: YesOption = False
) -> None:
    """Remove a bank: its experts, and its part of every snapshot.

    \b
    $ ooc-moe bank rm first/experts
    """
    with _connected(store) as daemon:
        bank = daemon.get_bank(name)
        _confirm(f"Remove bank {name} with {bank.num_written} written experts, also from all snapshots?", yes)
        daemon.delete_bank(name)
    Console().print(f"removed {name}", soft_wrap=True)


@bank_app.command(name="fork")
def bank_fork(
    source: Annotated[str, typer.Argument(help="The bank to begin from.")],
    name: Annotated[str, typer.Argument(help="The new bank.")],
    snapshot: Annotated[int | None, typer.Option(help="Begin from this snapshot of it, not from its present state.", metavar="ID")] = None,
    store: StoreOption = DEFAULT_STORE,
) -> None:
    """Make a new bank from another one, without copying its bytes.

    The experts alone, for `ooc-moe train --from-bank`; `ooc-moe branch` takes a run's dense parameters too.

    \b
    $ ooc-moe bank fork first/experts second/experts --snapshot 3
    """
    with _connected(store) as daemon:
        bank = daemon.fork_bank(source, name, snapshot_id=snapshot)
    Console().print(f"made {bank.spec.name} with {bank.spec.num_experts} experts, {bank.num_written} of them written", soft_wrap=True)


@snapshot_app.command(name="ls")
def snapshot_ls(
    bank: Annotated[str, typer.Option(help="Of this bank only.", metavar="NAME")] = "", store: StoreOption = DEFAULT_STORE
) -> None:
    """List snapshots, newest first.

    \b
    $ ooc-moe snapshot ls --bank first/experts
    """
    with _connected(store) as daemon:
        if bank:
            daemon.get_bank(bank)  # So that a name mistyped is said to be unknown.
        snapshots = daemon.list_snapshots(bank)
    table = _table("id", "name", "banks", "experts", "refers to", "created")
    for snapshot in snapshots:
        table.add_row(
            str(snapshot.id),
            Text(snapshot.name),
            ", ".join(snapshot.banks),
            f"{snapshot.num_experts:,}",
            format_bytes(snapshot.bytes),
            format_ago(snapshot.created_unix_ms),
        )
    Console().print(table if snapshots else "no snapshots")


@snapshot_app.command(name="create")
def snapshot_create(
    banks: Annotated[list[str], typer.Argument(help="The banks it holds, in one cut.")],
    name: Annotated[str, typer.Option(help="snapshot-ID if not given.")] = "",
    store: StoreOption = DEFAULT_STORE,
) -> None:
    """Keep the present state of banks; nothing is copied.

    \b
    $ ooc-moe snapshot create first/experts --name before-the-experiment
    """
    with _connected(store) as daemon:
        _done("created", daemon.create_snapshot(banks, name=name))


@snapshot_app.command(name="restore")
def snapshot_restore(
    snapshot_id: Annotated[int, typer.Argument(help="The snapshot's id.", metavar="ID")],
    store: StoreOption = DEFAULT_STORE,
    yes: YesOption = False,
) -> None:
    """Bring the banks of a snapshot back to it; what they hold now is lost unless another snapshot has it.

    The experts alone: `ooc-moe train --resume --checkpoint` takes a run back, with its dense parameters.

    \b
    $ ooc-moe snapshot restore 3
    """
    with _connected(store) as daemon:
        _confirm(f"Bring the banks of snapshot {snapshot_id} back to it?", yes)
        _done("restored", daemon.restore_snapshot(snapshot_id))


@snapshot_app.command(name="rm")
def snapshot_rm(
    snapshot_id: Annotated[int, typer.Argument(help="The snapshot's id.", metavar="ID")],
    store: StoreOption = DEFAULT_STORE,
    yes: YesOption = False,
) -> None:
    """Remove a snapshot.

    \b
    $ ooc-moe snapshot rm 3
    """
    with _connected(store) as daemon:
        _confirm(f"Remove snapshot {snapshot_id}?", yes)
        daemon.delete_snapshot(snapshot_id)
    Console().print(f"removed snapshot {snapshot_id}")


@contextmanager
def _connected(target: str, *, patience_s: float = PATIENCE_S) -> Iterator[RemoteStore]:
    store = RemoteStore(target, patience_s=patience_s)
    try:
        yield store
    finally:
        store.close()


def _confirm(question: str, yes: bool) -> None:
    if not yes:
        typer.confirm(question, abort=True)


def _done(verb: str, snapshot: Snapshot) -> None:
    banks = ", ".join(snapshot.banks)
    Console().print(
        f"{verb} snapshot {snapshot.id} ({snapshot.name}) of {banks}: {snapshot.num_experts} experts", soft_wrap=True, markup=False
    )


def _bank_facts(bank: Bank, tiers: Counter[Tier]) -> list[tuple[str, str]]:
    parameters, optimizer = map(format_bytes, (bank.spec.layout.parameter_bytes, bank.spec.layout.optimizer_bytes))
    facts = [
        ("bank", bank.spec.name),
        ("experts", f"{bank.spec.num_experts:,}, {bank.num_written:,} of them written"),
        ("seed", str(bank.spec.seed)),
        ("record", f"{format_bytes(bank.record_bytes)}: parameters {parameters}, optimizer {optimizer}"),
        ("where", ", ".join(f"{tiers[tier]:,} {where}" for tier, where in _WHERE.items() if tiers[tier]) or DASH),
        ("newest version", str(bank.newest_version)),
        ("writer", bank.writer_id or "nobody"),
        ("created", format_ago(bank.created_unix_ms)),
    ]
    return facts + ([("forked from", bank.forked_from)] if bank.forked_from else [])


def _table(first: str, *others: str) -> Table:
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    table.add_column(first, overflow="fold", justify="right" if first == "id" else "left")
    for name in others:
        table.add_column(
            name, justify="right" if name in ("experts", "written", "bytes", "record", "refers to") else "left", overflow="fold"
        )
    return table
