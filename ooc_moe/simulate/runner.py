"""Many replays of one trace, side by side: every HBM capacity and switch interval, by every policy and prefetch source; and their table.

The words of the command line are understood here: capacities ("16", "25%"), times ("80us"), links ("80us+3GB/s").
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import humanize
from rich.box import SIMPLE_HEAD
from rich.table import Table

from ooc_moe.metrics.provenance import facts
from ooc_moe.metrics.trace import Trace
from ooc_moe.simulate.replay import Latency, Link, Prefetch, Replayed, Setup, replay
from ooc_moe.simulate.synthetic_traces import with_turns
from ooc_moe_wire.errors import InvalidRequest
from ooc_moe_wire.policy import Belady, make_policy
from ooc_moe_wire.sizes import parse_size

_TIME = re.compile(r"\s*(\d+(?:\.\d+)?)\s*(ns|us|ms|s)\s*")
_UNIT_S = {"ns": 1e-9, "us": 1e-6, "ms": 1e-3, "s": 1.0}
HEADINGS = ("switch", "HBM", "policy", "train", "/ Belady", "eval", "stall", "of time", "DRAM", "NVMe", "useful", "late", "wasted")
LEGEND = (
    "switch: accesses between switches of the game, where dealt out anew. HBM: experts (share of those in the trace). train, eval: demand "
    "hit rates. / Belady: train beside the optimum's. stall: time waited, and its share of the whole. DRAM, NVMe: experts loaded from "
    "there. useful, late, wasted: prefetched experts."
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Study:
    """What to replay a trace with. `hbm` and `dram` are capacities in words."""

    hbm: tuple[str, ...] = ("25%", "50%")
    dram: str | None = None
    policies: tuple[str, ...] = ("lru", "s3fifo", "random", "belady")
    dram_policy: str = "lru"
    prefetches: tuple[Prefetch, ...] = ()
    """Tried with the first policy that is not Belady."""
    switch_every: tuple[int, ...] = ()
    """Turns in accesses; none: the trace as it is."""
    latency: Latency = Latency()
    expert_bytes: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.policies:
            raise InvalidRequest("policy: name at least one, for example lru,belady")
        for policy in self.policies:
            if policy != Belady.name:
                _check_policy("policy", policy)
        _check_policy("dram_policy", self.dram_policy)
        for name, words in (("hbm", self.hbm), ("dram", (self.dram,) if self.dram is not None else ())):
            for word in words:
                capacity(name, word, 1)
        for every in self.switch_every:
            if every < 1:
                raise InvalidRequest(f"switch_every: {every} accesses are less than one")

    def setups(self, num_experts: int) -> Iterator[Setup]:
        """Every replay of a trace with so many experts."""
        online = [policy for policy in self.policies if policy != Belady.name]
        ahead = self.prefetches if online else ()
        dram = None if self.dram is None else capacity("dram", self.dram, num_experts)
        for word in self.hbm:
            common = Setup(
                hbm_experts=capacity("hbm", word, num_experts),
                dram_experts=dram,
                dram_policy=self.dram_policy,
                latency=self.latency,
                seed=self.seed,
            )
            for policy in self.policies:
                yield replace(common, policy=policy)
            for prefetch in ahead:
                yield replace(common, policy=online[0], prefetch=prefetch)


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One replay. `switch_every` is None for the trace as it was recorded; `of_belady` None where Belady was not asked for."""

    switch_every: int | None
    num_experts: int
    replayed: Replayed
    wall_s: float
    of_belady: float | None = None


def run(
    trace: Trace,
    study: Study,
    *,
    begin: Callable[[str, int], object] = lambda what, accesses: None,
    advance: Callable[[int], object] = lambda accesses: None,
) -> list[Row]:
    """All replays of a study, in order. `begin` is told of each one, `advance` of the accesses done.

    Raises:
        InvalidRequest: an impossible capacity, policy or interval; an empty trace.
    """
    if not len(trace.keys_A):
        raise InvalidRequest(f"trace: {trace.info.source} recorded no access")
    if study.expert_bytes is not None:
        trace = replace(trace, info=replace(trace.info, expert_bytes=study.expert_bytes))
    num_experts = trace.num_experts
    setups = list(study.setups(num_experts))
    rows: list[Row] = []
    for every in study.switch_every or (None,):
        played = trace if every is None else with_turns(trace, every)
        found = []
        for setup in setups:
            begin(f"HBM {setup.hbm_experts}, {setup.policy}, prefetch {setup.prefetch.source}", len(played.keys_A))
            began = time.perf_counter()
            replayed = replay(played, setup, progress=advance)
            found.append(Row(switch_every=every, num_experts=num_experts, replayed=replayed, wall_s=time.perf_counter() - began))
        rows += _beside_belady(found)
    return rows


def _beside_belady(rows: Sequence[Row]) -> list[Row]:
    best = {row.replayed.setup.hbm_experts: row.replayed.training.hit_rate for row in rows if row.replayed.setup.policy == Belady.name}
    return [replace(row, of_belady=_ratio(row, best.get(row.replayed.setup.hbm_experts))) for row in rows]


def _ratio(row: Row, best: float | None) -> float | None:
    return row.replayed.training.hit_rate / best if best else None


def table(trace: Trace, rows: Sequence[Row]) -> Table:
    """For a terminal."""
    shown = Table(*HEADINGS, box=SIMPLE_HEAD, title=_title(trace), title_justify="left", caption=LEGEND, caption_justify="left")
    for index, row in enumerate(rows):
        shown.add_row(*_cells(row), end_section=index + 1 < len(rows) and _group(row) != _group(rows[index + 1]))
    for column in [*shown.columns[:2], *shown.columns[3:]]:
        column.justify = "right"
    return shown


def markdown(trace: Trace, rows: Sequence[Row], *, command: str) -> str:
    """For a file: what ran on what, the table, and how long it took."""
    num_accesses, wall_s = len(trace.keys_A) * len(rows), sum(row.wall_s for row in rows)
    lines = ["# ooc-moe simulate", "", f"{_title(trace)}. {LEGEND}", ""]
    lines += [f"- {name}: {value}" for name, value in facts(Path(), command=command).items()]
    lines += [f"- replayed: {num_accesses:,} accesses in {wall_s:.0f} s, {num_accesses / wall_s / 1e6:.2f} million a second", ""]
    headings = (*HEADINGS, "replay took")
    lines += [f"| {' | '.join(headings)} |", "|---:|---:|---|" + "---:|" * (len(headings) - 3)]
    lines += [f"| {' | '.join((*_cells(row), f'{row.wall_s:.1f} s'))} |" for row in rows]
    return "\n".join([*lines, ""])


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
    ahead = setup.prefetch.source != "none"
    fates = [f"{getattr(training, name) + getattr(evaluation, name):,}" if ahead else "–" for name in ("useful", "late", "wasted")]
    return (
        "–" if row.switch_every is None else f"{row.switch_every:,}",
        f"{setup.hbm_experts:,} ({setup.hbm_experts / row.num_experts:.0%})",
        f"{setup.policy} + {setup.prefetch.source}" if ahead else setup.policy,
        _percent(training.hit_rate),
        f"{row.of_belady:.3f}" if row.of_belady is not None else "–",
        _percent(evaluation.hit_rate),
        f"{stall_s:,.3g} s" if stall_s < 1000 else f"{humanize.intcomma(round(stall_s))} s",
        f"{share:.1%}",
        f"{training.from_dram + evaluation.from_dram:,}",
        f"{training.from_nvme + evaluation.from_nvme:,}",
        *fates,
    )


def _percent(rate: float) -> str:
    return f"{rate:.2%}" if rate == rate else "–"


# Words


def capacity(name: str, text: str, num_experts: int) -> int:
    """Experts: a number, or a share such as 25% of `num_experts` (at least one). Raises InvalidRequest."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(%?)\s*", text)
    if match is None or (not match[2] and "." in match[1]) or float(match[1]) == 0:
        raise InvalidRequest(f"{name}: {text!r} is not a number of experts; write for example 16 or 25%")
    return max(1, round(num_experts * float(match[1]) / 100)) if match[2] else int(match[1])


def seconds(name: str, text: str) -> float:
    """A time such as 80us. Raises InvalidRequest."""
    match = _TIME.fullmatch(text)
    if match is None:
        raise InvalidRequest(f"{name}: {text!r} is not a time; write for example 80us, 1.5ms or 2s")
    return float(match[1]) * _UNIT_S[match[2]]


def latency(text: str) -> Latency:
    """Reads latencies by tier, "nvme=80us+3GB/s,dram=20us". What is not given is as in the default. Raises InvalidRequest."""
    default = Latency()
    links = {"dram": default.dram, "nvme": default.nvme}
    for word in text.split(","):
        tier, _, cost = word.partition("=")
        wait, plus, rate = cost.partition("+")
        if tier.strip() not in links or (plus and not rate.strip().endswith("/s")):
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
        raise InvalidRequest(f"latency: {text!r} would never end")
    return found


def _check_policy(name: str, policy: str) -> None:
    try:
        make_policy(policy)
    except InvalidRequest as error:
        said = str(error).removeprefix("policy: ")
        raise InvalidRequest(f"{name}: {said}{', belady' if name == 'policy' else ''}") from error
