"""Replays a trace through HBM, DRAM and NVMe, with the policy classes that the product runs (ooc_moe_wire.policy).

    replayed = replay(trace, Setup(hbm_experts=16, policy="lru", prefetch=Prefetch(source="perfect")))
    replayed.training.hit_rate, replayed.training.stall_s

The model. Every access computes for `compute_s`; one that HBM does not hold waits first until its expert is loaded, alone: from DRAM, or
from NVMe through DRAM, where all experts lie in the beginning. HBM and DRAM take in every miss and evict by their policies. As in the
trainer, each bank has an equal share of HBM and all share the DRAM. At a switch of the game a prefetch source may name experts, which are
then loaded one after another behind the compute; demand goes first and delays them. They never push out what this game has asked for, nor
each other. One that is asked for before it is there is late, and a miss.

Left out: write-back (assumed to keep up behind the compute), the second looks of backward and optimizer, several misses in one call to the
store, and the trainer's schedule: what an update or a step of acting announces is evicted by its next use and fetched ahead. Where a game
does not fit into HBM, a trainer therefore hits far more often than LRU does here (simulate.md has both). Knows nothing of files and tables.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ooc_moe.metrics.trace import Span, Trace
from ooc_moe_wire.errors import InvalidRequest
from ooc_moe_wire.policy import Belady, EvictionPolicy, make_policy

SOURCES = ("none", "perfect", "detector", "random")
PIECE_ACCESSES = 1 << 18
"""Accesses between two signs of progress."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Link:
    """What a load costs: `latency_s` once, and its bytes at `bytes_per_s`."""

    latency_s: float
    bytes_per_s: float

    def seconds(self, num_bytes: int) -> float:
        """To load so many bytes."""
        return self.latency_s + num_bytes / self.bytes_per_s


@dataclass(frozen=True, kw_only=True, slots=True)
class Latency:
    """The time that things take. Defaults: PCIe 4 from pinned memory, one NVMe disk."""

    dram: Link = Link(latency_s=20e-6, bytes_per_s=12e9)
    nvme: Link = Link(latency_s=80e-6, bytes_per_s=3e9)
    """To DRAM; an expert from NVMe pays both."""
    compute_s: float = 100e-6
    """Of one access."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Prefetch:
    """Who names the experts of the game that was switched to, and when.

    "perfect" names them at the switch; "detector" `delay` accesses later, and with a chance of 1 - `accuracy` those of another game;
    "random" at the switch those of any game. A game's experts are those that the trace has it use, the most used first.
    """

    source: str = "none"
    delay: int = 100
    accuracy: float = 0.95
    experts_max: int | None = None
    """The most experts named; None: as many as HBM holds."""

    def __post_init__(self) -> None:
        if self.source not in SOURCES:
            raise InvalidRequest(f"prefetch: {self.source!r} is not one of {', '.join(SOURCES)}")
        if self.delay < 0:
            raise InvalidRequest(f"detect_after: {self.delay} accesses are less than none")
        if not 0 <= self.accuracy <= 1:
            raise InvalidRequest(f"detect_accuracy: {self.accuracy} is not between 0 and 1")


@dataclass(frozen=True, kw_only=True, slots=True)
class Setup:
    """What to replay with."""

    hbm_experts: int
    policy: str = "lru"
    """Of HBM; beside the online ones "belady", the optimum for one that is told the future but may not prefetch."""
    dram_experts: int | None = None
    """None: room for all."""
    dram_policy: str = "lru"
    latency: Latency = Latency()
    prefetch: Prefetch = Prefetch()
    seed: int = 0


@dataclass(slots=True)
class Counts:
    """What happened in training, or in evaluation."""

    accesses: int = 0
    hits: int = 0
    from_dram: int = 0
    from_nvme: int = 0
    """Loads, on demand and by prefetch."""
    compute_s: float = 0.0
    stall_s: float = 0.0
    prefetched: int = 0
    useful: int = 0
    late: int = 0
    wasted: int = 0
    """Loaded, but not asked for before the next switch, or evicted before that."""
    cancelled: int = 0
    """Not loaded, for want of a slot that this game did not need, or of time before the next switch."""

    @property
    def hit_rate(self) -> float:
        """Hits per access; NaN where there were none."""
        return self.hits / self.accesses if self.accesses else float("nan")


@dataclass(frozen=True, slots=True)
class Replayed:
    """What a replay found."""

    setup: Setup
    training: Counts = field(default_factory=Counts)
    evaluation: Counts = field(default_factory=Counts)


def replay(trace: Trace, setup: Setup, *, progress: Callable[[int], object] = lambda accesses: None) -> Replayed:
    """Plays the whole trace. `progress` is told how many accesses were done since it was last told.

    Raises:
        InvalidRequest: no such policy; fewer slots than banks; prefetching with Belady.
    """
    run = _Replay(trace, setup)
    game = ""
    for span in trace.spans():
        switched = span.game != game
        game = span.game
        run.play(span, switched, progress)
    return run.replayed


class _Tier:
    """Slots that a policy fills and empties."""

    def __init__(self, policy: EvictionPolicy[int], capacity: int) -> None:
        self.policy, self.capacity, self.used = policy, capacity, 0

    def admit(self, key: int, keep: Collection[int] = ()) -> int | None:
        """Takes in a key; the one that left for it, if any. The caller sees to it that not all slots hold what is to be kept."""
        victim = None
        if self.used == self.capacity:
            victims = self.policy.victims()
            victim = next(victims) if not keep else next(candidate for candidate in victims if candidate not in keep)
            self.policy.evict(victim)
            self.used -= 1
        self.policy.insert(key)
        self.used += 1
        return victim


class _Ahead:
    """Prefetches under way: one loads, until `ready_at`; the others wait, without a slot."""

    def __init__(self, named: Sequence[int], asked: set[int]) -> None:
        self.waiting = dict.fromkeys(named, True)
        self.loading: int | None = None
        self.ready_at = 0.0
        self.unused: set[int] = set()  # Loading or loaded.
        self.asked = asked  # Since the switch.

    @property
    def idle(self) -> bool:
        """Nothing is left to come, or to be used."""
        return not (self.waiting or self.unused)


class _Replay:
    """One replay in progress."""

    def __init__(self, trace: Trace, setup: Setup) -> None:
        self.replayed = Replayed(setup)
        self._trace, self._setup = trace, setup
        self._rng = np.random.default_rng(setup.seed)
        num_banks, expert_bytes = trace.info.num_banks, trace.info.expert_bytes
        if setup.hbm_experts < num_banks:
            raise InvalidRequest(f"hbm: {setup.hbm_experts} experts are less than one for each of {num_banks} banks")
        if setup.dram_experts is not None and setup.dram_experts < 1:
            raise InvalidRequest(f"dram: {setup.dram_experts} experts; give at least 1")
        if setup.policy == Belady.name and setup.prefetch.source != "none":
            raise InvalidRequest("prefetch: Belady is the optimum without prefetching; it takes no prefetches")
        num_keys = int(trace.keys_A.max(initial=0)) + 1
        self._hbm = [_Tier(_policy(setup, trace, bank), setup.hbm_experts // num_banks) for bank in range(num_banks)]
        self._tiers = (self._hbm * (num_keys // num_banks + 1))[:num_keys]  # By key.
        self._touches = [tier.policy.touch for tier in self._tiers]
        self._dram = _Tier(make_policy(setup.dram_policy), num_keys if setup.dram_experts is None else setup.dram_experts)
        self._dram_s = setup.latency.dram.seconds(expert_bytes)
        self._nvme_s = self._dram_s + setup.latency.nvme.seconds(expert_bytes)
        self._pools = _pools(trace) if setup.prefetch.source != "none" else {}

    def play(self, span: Span, switched: bool, progress: Callable[[int], object]) -> None:
        """One span: after a switch perhaps with a prefetch, the rest as demand comes."""
        self._counts = counts = self.replayed.evaluation if span.evaluating else self.replayed.training
        counts.accesses += span.stop - span.start
        counts.compute_s += (span.stop - span.start) * self._setup.latency.compute_s
        prefetch, done = self._setup.prefetch, span.start
        if switched and prefetch.source != "none":
            fires = min(span.stop, span.start + (prefetch.delay if prefetch.source == "detector" else 0))
            before = self._trace.keys_A[span.start : fires].tolist()
            self._on_demand(before)
            rest = self._trace.keys_A[fires : span.stop]
            done = fires + self._with_prefetch(rest.tolist(), self._named(span.game), set(before)) if len(rest) else fires
            progress(done - span.start)
        for start in range(done, span.stop, PIECE_ACCESSES):
            keys = self._trace.keys_A[start : min(start + PIECE_ACCESSES, span.stop)].tolist()
            self._on_demand(keys)
            progress(len(keys))

    def _on_demand(self, keys: Sequence[int]) -> None:
        """The hot loop: a hit costs a touch, a miss a load and perhaps an eviction."""
        touches, tiers = self._touches, self._tiers
        misses, stall_s = 0, 0.0
        for key in keys:
            try:
                touches[key](key)
            except KeyError:  # Not resident.
                misses += 1
                stall_s += self._load_s(key)
                tiers[key].admit(key)
        self._counts.hits += len(keys) - misses
        self._counts.stall_s += stall_s

    def _with_prefetch(self, keys: Sequence[int], named: Sequence[int], asked: set[int]) -> int:
        """Goes on until every prefetched expert was used, or to the end; the number of accesses done."""
        counts, now = self._counts, 0.0
        ahead = _Ahead(self._limited(named), asked)
        counts.prefetched += len(ahead.waiting)
        for done, key in enumerate(keys):
            self._advance(ahead, now)
            if ahead.idle:
                return done
            wait_s = 0.0
            if key == ahead.loading:
                counts.late += 1
                wait_s = ahead.ready_at - now
                self._touches[key](key)
                ahead.loading = None
            elif self._is_resident(key):
                counts.hits += 1
                counts.useful += key in ahead.unused
            else:
                counts.late += ahead.waiting.pop(key, False)
                wait_s = self._load_s(key)
                victim = self._tiers[key].admit(key, keep=() if ahead.loading is None else (ahead.loading,))
                counts.wasted += victim in ahead.unused
                ahead.unused.discard(victim)
                ahead.ready_at += wait_s
            ahead.unused.discard(key)
            asked.add(key)
            counts.stall_s += wait_s
            now += wait_s + self._setup.latency.compute_s
        counts.wasted += len(ahead.unused)
        counts.cancelled += len(ahead.waiting)
        return len(keys)

    def _advance(self, ahead: _Ahead, now: float) -> None:
        """Lets what waits be loaded, one after another, until `now`."""
        while ahead.loading is None or ahead.ready_at <= now:
            ahead.loading = None
            if not ahead.waiting:
                return
            key = next(iter(ahead.waiting))
            if self._claim(key, ahead):
                del ahead.waiting[key]
                ahead.loading = key
                ahead.unused.add(key)
                ahead.ready_at += self._load_s(key)
            else:
                tier = self._tiers[key]
                elsewhere = {other: True for other in ahead.waiting if self._tiers[other] is not tier}
                self._counts.cancelled += len(ahead.waiting) - len(elsewhere)
                ahead.waiting = elsewhere

    def _claim(self, key: int, ahead: _Ahead) -> bool:
        """A slot for a prefetch, if one is free or holds what this game has not asked for; one is left to demand."""
        tier = self._tiers[key]
        if tier.capacity == 1:
            return False
        keep = ahead.asked | ahead.unused
        if tier.used == tier.capacity and keep.issuperset(tier.policy.victims()):
            return False
        tier.admit(key, keep=keep)
        return True

    def _limited(self, named: Sequence[int]) -> list[int]:
        limit = self._setup.prefetch.experts_max
        return [key for key in named[: self._setup.hbm_experts if limit is None else limit] if not self._is_resident(key)]

    def _is_resident(self, key: int) -> bool:
        try:
            self._touches[key](key)
        except KeyError:
            return False
        return True

    def _named(self, game: str) -> list[int]:
        """What the source says when it sees `game`."""
        source, others = self._setup.prefetch.source, [name for name in self._pools if name != game]
        if source == "random":
            return self._pools[list(self._pools)[int(self._rng.integers(len(self._pools)))]]
        if source == "detector" and others and self._rng.random() >= self._setup.prefetch.accuracy:
            return self._pools[others[int(self._rng.integers(len(others)))]]
        return self._pools[game]

    def _load_s(self, key: int) -> float:
        """Loads an expert from where it is, and counts it; the seconds that it takes."""
        try:
            self._dram.policy.touch(key)
        except KeyError:
            self._dram.admit(key)
            self._counts.from_nvme += 1
            return self._nvme_s
        self._counts.from_dram += 1
        return self._dram_s


def _policy(setup: Setup, trace: Trace, bank: int) -> EvictionPolicy[Any]:
    if setup.policy != Belady.name:
        return make_policy(setup.policy)
    keys_A = trace.keys_A
    return Belady(keys_A[keys_A % trace.info.num_banks == bank].tolist())


def _pools(trace: Trace) -> dict[str, list[int]]:
    """The experts of each game, the most used first."""
    used: dict[str, np.ndarray[Any, Any]] = {}
    num_keys = int(trace.keys_A.max(initial=0)) + 1
    for span in trace.spans():
        counts = np.bincount(trace.keys_A[span.start : span.stop], minlength=num_keys)
        used[span.game] = used.get(span.game, 0) + counts
    return {game: np.argsort(-counts, kind="stable")[: np.count_nonzero(counts)].tolist() for game, counts in used.items()}
