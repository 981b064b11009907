"""The commands that only need a storage daemon: `stats`, `bank ...` and `snapshot ...`.

These commands connect to the daemon by `RemoteStore`, and need no torch.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated, Any

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.json_format import MessageToDict
from google.protobuf.message import Message
from rich.live import Live

from ooc_moe.cli.dashboard import print_once, render
from ooc_moe.cli.options import DaemonOptions, JsonOption
from ooc_moe.cli.output import Column, print_records, say
from ooc_moe.display.formats import DASH, format_ago, format_bytes, format_count
from ooc_moe_client.remote.store import RemoteStore
from ooc_moe_client.store import Bank, Snapshot, Tier
from ooc_moe_wire.command_line import Flag
from ooc_moe_wire.errors import InvalidRequest
from ooc_moe_wire.layout import TensorSpec
from ooc_moe_wire.v1 import stats_pb2

# How long to wait for a daemon that does not answer. A dashboard survives a restart of the daemon; other commands fail.
WATCH_PATIENCE_S = 3600.0
PATIENCE_S = 5.0

_INT64 = (FieldDescriptor.CPPTYPE_INT64, FieldDescriptor.CPPTYPE_UINT64)
_WHERE = {Tier.DRAM: "in DRAM", Tier.NVME: "on NVMe", Tier.SEED: "made from the seed when they are fetched"}


@dataclass(frozen=True, kw_only=True)
class ConfirmOption:
    """The option `--yes`, for commands that ask before they delete data."""

    yes: Annotated[bool, Flag(aliases=("-y",))] = False
    """Do not ask for confirmation."""

    def confirm(self, question: str) -> None:
        """Asks `question` on the terminal, unless --yes was given. Exits the program with code 1 if the answer is not yes."""
        if self.yes:
            return
        try:
            answer = input(f"{question} [y/N]: ")
        except EOFError:
            answer = ""
        if answer.strip().lower() not in ("y", "yes"):
            print("aborted", file=sys.stderr)
            raise SystemExit(1)


# Statistics


@dataclass(frozen=True, kw_only=True)
class Stats(DaemonOptions, JsonOption):
    """Show the statistics of the storage daemon: what its memory tiers, its banks of experts and its trainers hold and do.

    With --watch, a dashboard on the terminal that keeps itself up to date; with --json, the same numbers for a program to read:

    $ ooc-moe stats --store storage-host:50051 --watch
    $ ooc-moe stats --json | jq '.total.hits'
    """

    watch: bool = False
    """Update until Ctrl-C. With --json, print one document per line."""
    interval: float = 1.0
    """Seconds between two updates of --watch; at least 0.1."""

    def run(self) -> None:
        """Prints the daemon's statistics once, or again and again with --watch."""
        if not 0.1 <= self.interval <= 3600:
            raise InvalidRequest(f"interval: {self.interval} is not 0.1 to 3600 seconds")
        with _connected(self.target, patience_s=WATCH_PATIENCE_S if self.watch else PATIENCE_S) as daemon:
            if self.watch and not self.as_json:
                _watch(daemon, self.interval)
            elif self.watch:
                for now in daemon.watch_stats(self.interval):
                    print(json.dumps(plain(now)), flush=True)
            elif self.as_json:
                print(json.dumps(plain(daemon.stats()), indent=2))
            else:
                print_once(daemon.stats())


def _watch(daemon: RemoteStore, interval: float) -> None:
    before = daemon.stats()
    with Live(render(before), screen=sys.stdout.isatty(), auto_refresh=False) as live:
        for now in daemon.watch_stats(interval):
            live.update(render(now, before), refresh=True)
            before = now


def plain(stats: stats_pb2.Stats) -> dict[str, Any]:
    """Turns the daemon's statistics into a document for JSON, with the field names of the .proto file. Numbers stay numbers."""
    document: dict[str, Any] = MessageToDict(stats, preserving_proto_field_name=True, always_print_fields_with_no_presence=True)
    _numbers(stats, document)
    return document


def _numbers(message: Message, document: dict[str, Any]) -> None:
    """Replaces, in a message's `document`, the strings as which protobuf's JSON writes 64-bit integers by numbers."""
    for field in message.DESCRIPTOR.fields:
        value, found = getattr(message, field.name), document.get(field.name)
        if found is None:
            continue
        if field.message_type is not None and field.message_type.GetOptions().map_entry:
            for key, each in value.items():
                _numbers(each, found[key])
        elif field.message_type is not None:
            pairs = zip(value, found, strict=True) if isinstance(found, list) else [(value, found)]
            for each, its_document in pairs:
                _numbers(each, its_document)
        elif field.cpp_type in _INT64:
            document[field.name] = [int(each) for each in found] if isinstance(found, list) else int(found)


# Banks


@dataclass(frozen=True, kw_only=True)
class BankList(DaemonOptions, JsonOption):
    """List the banks (named sets of experts) of a daemon.

    $ ooc-moe bank ls --store storage-host:50051
    $ ooc-moe bank ls | grep first/
    """

    def run(self) -> None:
        """Prints the list of banks."""
        with _connected(self.target) as daemon:
            banks = daemon.list_banks()
        columns = (
            Column("bank", "bank"),
            Column("num_experts", "experts", format_count, right=True),
            Column("num_written", "written", format_count, right=True),
            Column("written_bytes", "bytes", format_bytes, right=True),
            Column("record_bytes", "record", format_bytes, right=True),
            Column("writer", "writer", lambda writer: writer or DASH),
            Column("created_unix_ms", "created", format_ago),
        )
        print_records(columns, [_bank_record(bank) for bank in banks], as_json=self.as_json, empty="no banks")


@dataclass(frozen=True, kw_only=True)
class BankShow(DaemonOptions, JsonOption):
    """Show one bank: its experts' tensors, and in which tiers its experts are.

    $ ooc-moe bank show first/experts
    """

    name: Annotated[str, Flag(positional=True, metavar="BANK")]
    """Name of the bank."""

    def run(self) -> None:
        """Prints what the daemon knows of the bank, and its experts' tensors."""
        with _connected(self.target) as daemon:
            bank = daemon.get_bank(self.name)
            tiers = Counter(tier for expert in daemon.list_experts(self.name) for tier in expert.tiers)
        layout = bank.spec.layout
        sections = (("parameters", layout.parameters), ("optimizer", layout.optimizer))
        tensors = [_tensor_record(tensor, section) for section, members in sections for tensor in members]
        if self.as_json:
            where = {tier.name.lower(): tiers[tier] for tier in _WHERE}
            print(json.dumps(_bank_record(bank) | {"tiers": where, "tensors": tensors}, indent=2))
            return
        facts = _bank_facts(bank, tiers)
        width = max(len(label) for label, _ in facts)
        for label, value in facts:
            print(f"{label.ljust(width)}  {value}")
        print()
        columns = (
            Column("tensor", "tensor"),
            Column("shape", "shape", lambda shape: " x ".join(map(str, shape))),
            Column("dtype", "dtype"),
            Column("bytes", "bytes", format_bytes, right=True),
            Column("section", "section"),
            Column("initializer", "initial value"),
        )
        print_records(columns, tensors)


@dataclass(frozen=True, kw_only=True)
class BankRemove(DaemonOptions, ConfirmOption):
    """Remove a bank: its experts, and its part of every snapshot.

    $ ooc-moe bank rm first/experts
    """

    name: Annotated[str, Flag(positional=True, metavar="BANK")]
    """Name of the bank."""

    def run(self) -> None:
        """Asks for confirmation, and removes the bank."""
        with _connected(self.target) as daemon:
            bank = daemon.get_bank(self.name)
            self.confirm(f"Remove bank {self.name} with {bank.num_written} written experts, also from all snapshots?")
            daemon.delete_bank(self.name)
        say(f"removed {self.name}")


@dataclass(frozen=True, kw_only=True)
class BankFork(DaemonOptions):
    """Make a new bank that begins with the experts of another bank, without copying their bytes.

    The new bank has the experts alone, for `ooc-moe train --from-bank`. `ooc-moe branch` takes a run's dense parameters, too.

    $ ooc-moe bank fork first/experts second/experts --snapshot 3
    """

    source: Annotated[str, Flag(positional=True, metavar="SOURCE")]
    """The bank to begin with."""
    name: Annotated[str, Flag(positional=True, metavar="NEW")]
    """Name of the new bank."""
    snapshot: Annotated[int | None, Flag(metavar="ID")] = None
    """Fork the bank as it was in this snapshot; by default as it is now."""

    def run(self) -> None:
        """Makes the new bank, and prints how many experts it has."""
        with _connected(self.target) as daemon:
            bank = daemon.fork_bank(self.source, self.name, snapshot_id=self.snapshot)
        say(f"made {bank.spec.name} with {bank.spec.num_experts} experts, {bank.num_written} of them written")


def _bank_record(bank: Bank) -> dict[str, Any]:
    return {
        "bank": bank.spec.name,
        "num_experts": bank.spec.num_experts,
        "num_written": bank.num_written,
        "written_bytes": bank.num_written * bank.record_bytes,
        "record_bytes": bank.record_bytes,
        "seed": bank.spec.seed,
        "newest_version": bank.newest_version,
        "writer": bank.writer_id or None,
        "forked_from": bank.forked_from or None,
        "created_unix_ms": bank.created_unix_ms,
    }


def _tensor_record(tensor: TensorSpec, section: str) -> dict[str, Any]:
    initializer = tensor.initializer
    return {
        "tensor": tensor.name,
        "shape": list(tensor.shape),
        "dtype": tensor.dtype,
        "bytes": tensor.num_bytes,
        "section": section,
        "initializer": f"{initializer.algorithm} {initializer.value:g}" if initializer.value else initializer.algorithm,
    }


def _bank_facts(bank: Bank, tiers: Counter[Tier]) -> list[tuple[str, str]]:
    parameters, optimizer = map(format_bytes, (bank.spec.layout.parameter_bytes, bank.spec.layout.optimizer_bytes))
    facts = [
        ("bank", bank.spec.name),
        ("experts", f"{bank.spec.num_experts:,}, {bank.num_written:,} of them written"),
        ("seed", str(bank.spec.seed)),
        ("record", f"{format_bytes(bank.record_bytes)}: parameters {parameters}, optimizer {optimizer}"),
        ("where", ", ".join(f"{tiers[tier]:,} {where}" for tier, where in _WHERE.items() if tiers[tier]) or DASH),
        ("newest version", str(bank.newest_version)),
        ("writer", bank.writer_id or "none"),
        ("created", format_ago(bank.created_unix_ms)),
    ]
    return facts + ([("forked from", bank.forked_from)] if bank.forked_from else [])


# Snapshots


@dataclass(frozen=True, kw_only=True)
class SnapshotList(DaemonOptions, JsonOption):
    """List the snapshots (kept states of banks) of a daemon, newest first.

    $ ooc-moe snapshot ls --bank first/experts
    """

    bank: str = ""
    """List only the snapshots of this bank."""

    def run(self) -> None:
        """Prints the list of snapshots."""
        with _connected(self.target) as daemon:
            if self.bank:
                daemon.get_bank(self.bank)  # Refuses an unknown name, for which the list would be empty.
            snapshots = daemon.list_snapshots(self.bank)
        columns = (
            Column("id", "id", right=True),
            Column("name", "name"),
            Column("banks", "banks", ",".join),
            Column("num_experts", "experts", format_count, right=True),
            Column("bytes", "refers to", format_bytes, right=True),
            Column("created_unix_ms", "created", format_ago),
        )
        print_records(columns, [_snapshot_record(snapshot) for snapshot in snapshots], as_json=self.as_json, empty="no snapshots")


@dataclass(frozen=True, kw_only=True)
class SnapshotCreate(DaemonOptions):
    """Make a snapshot of banks: keep their present state, so that they can be brought back to it. Nothing is copied.

    $ ooc-moe snapshot create first/experts --name before-the-experiment
    $ ooc-moe snapshot create first/layer0,first/layer1
    """

    banks: Annotated[tuple[str, ...], Flag(positional=True, metavar="BANK")]
    """The banks that the snapshot holds, all at the same point in time."""
    name: str = ""
    """Name of the snapshot; by default snapshot-ID."""

    def run(self) -> None:
        """Makes the snapshot, and prints its id."""
        with _connected(self.target) as daemon:
            _report("created", daemon.create_snapshot(list(self.banks), name=self.name))


@dataclass(frozen=True, kw_only=True)
class SnapshotRestore(DaemonOptions, ConfirmOption):
    """Bring the banks of a snapshot back to its state. What they hold now is lost unless another snapshot has it.

    Only the experts are restored. `ooc-moe train --resume --checkpoint` takes a run back with its dense parameters, too.

    $ ooc-moe snapshot restore 3
    """

    snapshot_id: Annotated[int, Flag(positional=True, metavar="ID")]
    """The snapshot's id."""

    def run(self) -> None:
        """Asks for confirmation, and restores the snapshot."""
        with _connected(self.target) as daemon:
            self.confirm(f"Bring the banks of snapshot {self.snapshot_id} back to it?")
            _report("restored", daemon.restore_snapshot(self.snapshot_id))


@dataclass(frozen=True, kw_only=True)
class SnapshotRemove(DaemonOptions, ConfirmOption):
    """Remove a snapshot. The banks stay as they are.

    $ ooc-moe snapshot rm 3
    """

    snapshot_id: Annotated[int, Flag(positional=True, metavar="ID")]
    """The snapshot's id."""

    def run(self) -> None:
        """Asks for confirmation, and removes the snapshot."""
        with _connected(self.target) as daemon:
            self.confirm(f"Remove snapshot {self.snapshot_id}?")
            daemon.delete_snapshot(self.snapshot_id)
        say(f"removed snapshot {self.snapshot_id}")


def _snapshot_record(snapshot: Snapshot) -> dict[str, Any]:
    return {
        "id": snapshot.id,
        "name": snapshot.name,
        "banks": list(snapshot.banks),
        "num_experts": snapshot.num_experts,
        "bytes": snapshot.bytes,
        "created_unix_ms": snapshot.created_unix_ms,
    }


def _report(verb: str, snapshot: Snapshot) -> None:
    say(f"{verb} snapshot {snapshot.id} ({snapshot.name}) of {', '.join(snapshot.banks)}: {snapshot.num_experts} experts")


@contextmanager
def _connected(target: str, *, patience_s: float = PATIENCE_S) -> Iterator[RemoteStore]:
    store = RemoteStore(target, patience_s=patience_s)
    try:
        yield store
    finally:
        store.close()
