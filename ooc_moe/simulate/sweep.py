"""Replays one trace many times, each time with another HBM capacity, switch interval, policy or prefetch source, and tabulates the results.

The module also reads the values that a person writes: capacities ("16", "25%"), times ("80us") and latencies ("nvme=80us+3GB/s").
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Literal

from ooc_moe.display.formats import DASH, format_seconds_short, format_share_short
from ooc_moe.display.table import Table, markdown_table
from ooc_moe.metrics.provenance import facts
from ooc_moe.metrics.trace import Trace
from ooc_moe.simulate.replay import Latency, Link, Prefetch, Replayed, Setup, replay
from ooc_moe.simulate.synthetic_traces import with_turns
from ooc_moe_wire.errors import InvalidRequest, require_at_least
from ooc_moe_wire.policy import Belady, make_policy
from ooc_moe_wire.sizes import parse_size

DramPolicy = Literal["lru", "s3fifo", "random"]
HbmPolicy = Literal["lru", "s3fifo", "random", "belady"]
_TIME = re.compile(r"\s*(\d+(?:\.\d+)?)\s*(ns|us|ms|s)\s*")
_UNIT_S = {"ns": 1e-9, "us": 1e-6, "ms": 1e-3, "s": 1.0}
HEADINGS = ("switch", "HBM", "policy", "train", "/ Belady", "eval", "stall", "of time", "DRAM", "NVMe", "useful", "late", "wasted")
_ALIGNMENT = "rrl" + "r" * (len(HEADINGS) - 3)
LEGEND = (
    "switch: accesses of a game before the next game's turn, if the trace was reordered. HBM: capacity in experts, and its share of the "
    "trace's experts. train, eval: hit rates on demand. / Belady: the train hit rate divided by that of Belady's optimum. stall: time "
    "spent waiting for loads. of time: its share of stall and compute together. DRAM, NVMe: experts loaded from there. useful, late, "
    "wasted: what became of prefetched experts."
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Sweep:
    """Which replays to make of one trace: each combination of these capacities, policies and switch intervals."""

    hbm: tuple[str, ...] = ("25%", "50%")
    """HBM capacities: numbers of experts, or shares of the trace's experts such as 25%."""
    dram: str | None = None
    """Capacity of DRAM, written the same way; None: room for all experts."""
    policies: tuple[str, ...] = ("lru", "s3fifo", "random", "belady")
    """Eviction policies of HBM."""
    dram_policy: str = "lru"
    """Eviction policy of DRAM."""
    prefetches: tuple[Prefetch, ...] = ()
    """Prefetch sources; each is tried with the first policy other than Belady."""
    switch_every: tuple[int, ...] = ()
    """Accesses of a game before the next game's turn: the trace is reordered for each. Empty: the trace is replayed as it is."""
    latency: Latency = Latency()
    """How long loads and compute take."""
    expert_bytes: int | None = None
    """Bytes of an expert; None: as the trace says."""
    seed: int = 0
    """Seed of the random choices of policies and prefetch sources."""

    def __post_init__(self) -> None:
        if not self.policies:
            raise InvalidRequest("policy: name at least one, for example lru,belady")
        for policy in self.policies:
            if policy != Belady.name:
                _check_policy("policy", policy)
        _check_policy("dram_policy", self.dram_policy)
        for name, texts in (("hbm", self.hbm), ("dram", (self.dram,) if self.dram is not None else ())):
            for text in texts:
                capacity(name, text, 1)
        for every in self.switch_every:
            require_at_least(1, switch_every=every)

    def setups(self, num_experts: int) -> Iterator[Setup]:
        """Yields the settings of each replay of one trace at one switch interval. `num_experts`: the experts in the trace."""
        online = [policy for policy in self.policies if policy != Belady.name]
        prefetches = self.prefetches if online else ()
        dram = None if self.dram is None else capacity("dram", self.dram, num_experts)
        for text in self.hbm:
            common = Setup(
                hbm_experts=capacity("hbm", text, num_experts),
                dram_experts=dram,
                dram_policy=self.dram_policy,
                latency=self.latency,
                seed=self.seed,
            )
            for policy in self.policies:
                yield replace(common, policy=policy)
            for prefetch in prefetches:
                yield replace(common, policy=online[0], prefetch=prefetch)


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """The result of one replay of a sweep, which becomes one row of the table."""

    switch_every: int | None
    """Accesses of a game before the next game's turn; None: the trace was not reordered."""
    num_experts: int
    """The number of different experts in the trace."""
    replayed: Replayed
    wall_s: float
    """Seconds that the replay itself took."""
    of_belady: float | None = None
    """The training hit rate divided by Belady's at the same capacity; None if Belady was not replayed."""


def run(
    trace: Trace,
    sweep: Sweep,
    *,
    begin: Callable[[str, int], object] = lambda description, accesses: None,
    advance: Callable[[int], object] = lambda accesses: None,
) -> list[Row]:
    """Makes all replays of a sweep, one after another, and returns their results.

    Args:
        trace: the trace to replay.
        sweep: which replays to make.
        begin: called before each replay with its description and its number of accesses.
        advance: called during a replay with the number of accesses done since the last call.

    Raises:
        InvalidRequest: a capacity, policy or interval is not possible, or the trace is empty.
    """
    if not len(trace.keys_A):
        raise InvalidRequest(f"trace: {trace.info.source} recorded no access")
    if sweep.expert_bytes is not None:
        trace = replace(trace, info=replace(trace.info, expert_bytes=sweep.expert_bytes))
    num_experts = trace.num_experts
    setups = list(sweep.setups(num_experts))
    rows: list[Row] = []
    for every in sweep.switch_every or (None,):
        played = trace if every is None else with_turns(trace, every)
        found = []
        for setup in setups:
            begin(f"HBM {setup.hbm_experts}, {setup.policy}, prefetch {setup.prefetch.source}", len(played.keys_A))
            began = time.perf_counter()
            replayed = replay(played, setup, progress=advance)
            found.append(Row(switch_every=every, num_experts=num_experts, replayed=replayed, wall_s=time.perf_counter() - began))
        rows += _with_belady(found)
    return rows


def _with_belady(rows: Sequence[Row]) -> list[Row]:
    """Returns the rows of one switch interval with `of_belady` filled in: the training hit rate divided by that of Belady's optimum."""
    best = {row.replayed.setup.hbm_experts: row.replayed.training.hit_rate for row in rows if row.replayed.setup.policy == Belady.name}
    return [replace(row, of_belady=_ratio(row, best.get(row.replayed.setup.hbm_experts))) for row in rows]


def _ratio(row: Row, best: float | None) -> float | None:
    return row.replayed.training.hit_rate / best if best else None


def table(trace: Trace, rows: Sequence[Row]) -> Table:
    """Makes the table of a sweep's results: a row for each replay, and a section for each interval and capacity."""
    sections = [index for index in range(1, len(rows)) if _group(rows[index]) != _group(rows[index - 1])]
    return Table(_title(trace), HEADINGS, [_cells(row) for row in rows], caption=LEGEND, alignment=_ALIGNMENT, sections=sections)


def markdown(trace: Trace, rows: Sequence[Row], *, command: str) -> str:
    """Writes a sweep's results as a page in Markdown: the command, the machine, the time taken, and the table."""
    num_accesses, wall_s = len(trace.keys_A) * len(rows), sum(row.wall_s for row in rows)
    lines = ["# ooc-moe simulate", "", f"{_title(trace)}. {LEGEND}", ""]
    lines += [f"- {name}: {value}" for name, value in facts(Path(), command=command).items()]
    lines += [f"- replayed: {num_accesses:,} accesses in {wall_s:.0f} s, {num_accesses / wall_s / 1e6:.2f} million a second", ""]
    timed = [(*_cells(row), f"{row.wall_s:.1f} s") for row in rows]
    lines += [markdown_table(Table("", (*HEADINGS, "replay took"), timed, alignment=f"{_ALIGNMENT}r")), ""]
    return "\n".join(lines)


def _title(trace: Trace) -> str:
    spans = trace.spans()
    switches = sum(before.game != after.game for before, after in pairwise(spans))
    games = len({span.game for span in spans})
    return f"{len(trace.keys_A):,} accesses to {trace.num_experts:,} experts, {games} games, {switches:,} switches"


def _group(row: Row) -> tuple[int | None, int]:
    return row.switch_every, row.replayed.setup.hbm_experts


def _cells(row: Row) -> tuple[str, ...]:
    setup, training, evaluation = row.replayed.setup, row.replayed.training, row.replayed.evaluation
    stall_s = training.stall_s + evaluation.stall_s
    share = stall_s / (stall_s + training.compute_s + evaluation.compute_s or 1.0)
    prefetching = setup.prefetch.source != "none"
    fates = [f"{getattr(training, name) + getattr(evaluation, name):,}" if prefetching else DASH for name in ("useful", "late", "wasted")]
    return (
        DASH if row.switch_every is None else f"{row.switch_every:,}",
        f"{setup.hbm_experts:,} ({format_share_short(setup.hbm_experts / row.num_experts, digits=0)})",
        f"{setup.policy} + {setup.prefetch.source}" if prefetching else setup.policy,
        format_share_short(training.hit_rate, digits=2),
        f"{row.of_belady:.3f}" if row.of_belady is not None else DASH,
        format_share_short(evaluation.hit_rate, digits=2),
        format_seconds_short(stall_s),
        format_share_short(share),
        f"{training.from_dram + evaluation.from_dram:,}",
        f"{training.from_nvme + evaluation.from_nvme:,}",
        *fates,
    )


# Parsing


def capacity(name: str, text: str, num_experts: int) -> int:
    """Reads a capacity from text and returns it in experts: the text is a number, or a share such as 25% of `num_experts`.

    The result is at least 1. Raises InvalidRequest, beginning with `name`, if the text is neither.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(%?)\s*", text)
    if match is None or (not match[2] and "." in match[1]) or float(match[1]) == 0:
        raise InvalidRequest(f"{name}: {text!r} is not a number of experts; write for example 16 or 25%")
    return max(1, round(num_experts * float(match[1]) / 100)) if match[2] else int(match[1])


def seconds(name: str, text: str) -> float:
    """Reads a time such as "80us" and returns it in seconds. Raises InvalidRequest, beginning with `name`, if the text is not a time."""
    match = _TIME.fullmatch(text)
    if match is None:
        raise InvalidRequest(f"{name}: {text!r} is not a time; write for example 80us, 1.5ms or 2s")
    return float(match[1]) * _UNIT_S[match[2]]


def latency(text: str) -> Latency:
    """Reads the latency and bandwidth of loads from text such as "nvme=80us+3GB/s,dram=20us".

    What the text leaves out is as in `Latency()`. Raises InvalidRequest if the text has another form.
    """
    default = Latency()
    links = {"dram": default.dram, "nvme": default.nvme}
    for word in text.split(","):
        tier, equals, cost = word.partition("=")
        wait, plus, rate = cost.partition("+")
        if equals and tier.strip() not in links:
            raise InvalidRequest(f"latency: tier {tier.strip()!r} is not one of {', '.join(links)}")
        if not equals or (plus and not rate.strip().endswith("/s")):
            raise InvalidRequest(
                f"latency: {word!r} is not tier=latency or tier=latency+bandwidth; write for example nvme=80us+3GB/s,dram=20us"
            )
        usual = links[tier.strip()].bytes_per_s
        links[tier.strip()] = Link(latency_s=seconds("latency", wait), bytes_per_s=_bandwidth(rate.strip()) if plus else usual)
    return Latency(dram=links["dram"], nvme=links["nvme"])


def _bandwidth(text: str) -> int:
    try:
        found = parse_size(text.removesuffix("/s"))
    except ValueError as error:
        raise InvalidRequest(f"latency: {text!r} is not a bandwidth; write for example 3GB/s") from error
    if not found:
        raise InvalidRequest(f"latency: {text!r} moves no bytes, so a load would never end")
    return found


def _check_policy(name: str, policy: str) -> None:
    try:
        make_policy(policy)
    except InvalidRequest as error:
        reason = str(error).removeprefix("policy: ")
        raise InvalidRequest(f"{name}: {reason}{', belady' if name == 'policy' else ''}") from error
