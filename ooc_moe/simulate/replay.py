"""Replays a trace (a sequence of accesses to experts) in simulated HBM, DRAM and NVMe, and counts hits, loads and waiting times.

The eviction policies are those of the trainer's cache and of the daemon (ooc_moe_wire.policy).

    replayed = replay(trace, Setup(hbm_experts=16, policy="lru", prefetch=Prefetch(source="perfect")))
    replayed.training.hit_rate, replayed.training.stall_s

The model:

- Every access computes for `compute_s`. If HBM does not hold the expert (a miss), the access first waits until the expert is loaded from
  DRAM, or from NVMe through DRAM. Nothing else is loaded meanwhile. In the beginning all experts are on NVMe.
- HBM and DRAM take in every expert that they miss, and evict by their policies. As in the trainer, each bank has an equal share of HBM, and
  all banks share DRAM.
- When the game switches, a prefetch source may name experts. They are loaded one after another, in parallel with compute. A load on demand
  goes first and delays them. A prefetch evicts neither an expert that this game has asked for nor an unused prefetched one.
- An access to an expert whose prefetch is not complete counts as a miss, and the prefetch as late.

Not modelled:

- Write-back, which is assumed to overlap with compute.
- The accesses of the backward pass and of the optimizer to the same experts, and several misses in one call to the store.
- The trainer's schedule (the announced order of coming uses). A trainer tells its cache beforehand which experts an update or an acting
  step will use; the cache then evicts the expert whose next use is farthest away, and fetches ahead. Where a game does not fit into HBM, a
  trainer therefore has far more hits than LRU has here (simulate.md has both).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import numpy as np

from ooc_moe.metrics.trace import Span, Trace
from ooc_moe_wire.errors import InvalidRequest, require_at_least
from ooc_moe_wire.policy import Belady, EvictionPolicy, make_policy

Source = Literal["none", "perfect", "detector", "random"]
SOURCES: tuple[Source, ...] = get_args(Source)
PIECE_ACCESSES = 1 << 18
"""Accesses between two calls of `progress`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Link:
    """How fast experts are loaded over the connection from one tier to the next: a fixed latency, and a time for an expert's bytes."""

    latency_s: float
    bytes_per_s: float

    def seconds(self, num_bytes: int) -> float:
        """How many seconds it takes to load `num_bytes` over this link."""
        return self.latency_s + num_bytes / self.bytes_per_s


@dataclass(frozen=True, kw_only=True, slots=True)
class Latency:
    """The times that a replay assumes for loads and for compute. Defaults: PCIe 4 from pinned memory, and one NVMe disk."""

    dram: Link = Link(latency_s=20e-6, bytes_per_s=12e9)
    """The time of a load from DRAM to HBM."""
    nvme: Link = Link(latency_s=80e-6, bytes_per_s=3e9)
    """The time of a load from NVMe to DRAM. An expert that is on NVMe only needs both loads."""
    compute_s: float = 100e-6
    """Seconds of compute for each access."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Prefetch:
    """Which experts a replay prefetches when the game switches: `source` says what names the experts.

    A game's experts are those that it uses anywhere in the trace, the most used first. The values of `source`:

    - "none": no prefetching.
    - "perfect" names the new game's experts at the switch.
    - "detector" names the new game's experts `delay` accesses after the switch, or with probability 1 - `accuracy` another game's.
    - "random" names the experts of a random game at the switch.
    """

    source: Source = "none"
    delay: int = 100
    """Accesses until the detector notices a switch."""
    accuracy: float = 0.95
    """Probability that the detector names the right game."""
    experts_max: int | None = None
    """The most experts named at a switch; None: as many as HBM holds."""

    def __post_init__(self) -> None:
        if self.source not in SOURCES:
            raise InvalidRequest(f"prefetch: {self.source!r} is not one of {', '.join(SOURCES)}")
        require_at_least(0, detect_after=self.delay)
        if not 0 <= self.accuracy <= 1:
            raise InvalidRequest(f"detect_accuracy: {self.accuracy} is not between 0 and 1")


@dataclass(frozen=True, kw_only=True, slots=True)
class Setup:
    """The settings of one replay: sizes of the tiers, eviction policies, prefetching and times."""

    hbm_experts: int
    """Capacity of HBM, in experts."""
    policy: str = "lru"
    """Eviction policy of HBM. "belady" is the optimum of a cache that knows the future and does not prefetch."""
    dram_experts: int | None = None
    """Capacity of DRAM, in experts; None: room for all."""
    dram_policy: str = "lru"
    """Eviction policy of DRAM."""
    latency: Latency = Latency()
    prefetch: Prefetch = Prefetch()
    seed: int = 0
    """Seed of the prefetch source's random choices."""


@dataclass(slots=True)
class Counts:
    """What a replay counted: accesses, hits, loads, times, and what became of prefetches.

    A replay has one such object for all its training and another for all its evaluation. `compute_s` and `stall_s` are seconds of computing
    and of waiting for experts.
    """

    accesses: int = 0
    hits: int = 0
    from_dram: int = 0
    """Loads of experts that DRAM held, on demand and by prefetch."""
    from_nvme: int = 0
    """Loads of experts that only NVMe held, on demand and by prefetch."""
    compute_s: float = 0.0
    stall_s: float = 0.0
    prefetched: int = 0
    """Experts that the prefetch source named and HBM did not hold. Each of them becomes useful, late, wasted or cancelled."""
    useful: int = 0
    """Prefetched experts that were in HBM when the game asked for them."""
    late: int = 0
    """Prefetched experts that the game asked for before they were loaded."""
    wasted: int = 0
    """Prefetched experts that were loaded, but not asked for before they were evicted or the game switched."""
    cancelled: int = 0
    """Prefetched experts that were not loaded: there was no slot that this game did not need, or no time before the next switch."""

    @property
    def hit_rate(self) -> float:
        """The share of accesses that were hits. NaN if there were no accesses."""
        return self.hits / self.accesses if self.accesses else float("nan")


@dataclass(frozen=True, slots=True)
class Replayed:
    """The result of a replay: its settings, and what it counted in training and in evaluation."""

    setup: Setup
    training: Counts = field(default_factory=Counts)
    evaluation: Counts = field(default_factory=Counts)


def replay(trace: Trace, setup: Setup, *, progress: Callable[[int], object] = lambda accesses: None) -> Replayed:
    """Replays a whole trace through tiers of given sizes, and counts hits, loads and times.

    Args:
        trace: the accesses to experts, in order.
        setup: sizes of the tiers, eviction policies, prefetching and times.
        progress: called now and then with the number of accesses done since the last call.

    Raises:
        InvalidRequest: no policy has the name given; HBM has fewer slots than there are banks; or prefetching is combined with the policy
            Belady.
    """
    run = _Replay(trace, setup)
    game = ""
    for span in trace.spans():
        switched = span.game != game
        game = span.game
        run.play(span, switched, progress)
    return run.replayed


class _Tier:
    """A simulated tier: its number of slots for experts, and the policy that chooses which expert to evict from them."""

    def __init__(self, policy: EvictionPolicy[int], capacity: int) -> None:
        self.policy, self.capacity, self.used = policy, capacity, 0

    def admit(self, key: int, keep: Collection[int] = ()) -> int | None:
        """Puts an expert, given by its key, into a slot. Returns the key that was evicted for it, if any.

        Keys in `keep` are not evicted. They must not fill all slots.
        """
        victim = None
        if self.used == self.capacity:
            victims = self.policy.victims()
            victim = next(victims) if not keep else next(candidate for candidate in victims if candidate not in keep)
            self.policy.evict(victim)
            self.used -= 1
        self.policy.insert(key)
        self.used += 1
        return victim


class _Prefetching:
    """The state of the prefetches after one switch of the game.

    One prefetch is loading, until the time `ready_at`. The others wait, and have no slot yet.
    """

    def __init__(self, named: Sequence[int], asked: set[int]) -> None:
        self.waiting = dict.fromkeys(named, True)
        self.loading: int | None = None
        self.ready_at = 0.0
        self.unused: set[int] = set()  # Keys that are loading or loaded, and that the game has not asked for.
        self.asked = asked  # Keys that the game has asked for since the switch.

    @property
    def idle(self) -> bool:
        """Whether there is nothing left to do: no prefetch waits or loads, and every prefetched expert was used or evicted."""
        return not (self.waiting or self.unused)


class _Replay:
    """A replay in progress: the simulated tiers and the counters, to which `play` adds one span after another."""

    def __init__(self, trace: Trace, setup: Setup) -> None:
        self.replayed = Replayed(setup)
        self._trace, self._setup = trace, setup
        self._rng = np.random.default_rng(setup.seed)
        num_banks, expert_bytes = trace.info.num_banks, trace.info.expert_bytes
        if setup.hbm_experts < num_banks:
            raise InvalidRequest(f"hbm: {setup.hbm_experts} experts are less than one for each of {num_banks} banks")
        require_at_least(1, dram=setup.dram_experts)
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
        """Does the accesses of one span: a stretch of the trace in which one game is trained, or evaluated.

        If the game has switched, the first accesses go together with prefetches, until no prefetched expert is unused. `progress` is called
        with the number of accesses done since its last call.
        """
        self._counts = counts = self.replayed.evaluation if span.evaluating else self.replayed.training
        counts.accesses += span.stop - span.start
        counts.compute_s += (span.stop - span.start) * self._setup.latency.compute_s
        prefetch, done = self._setup.prefetch, span.start
        if switched and prefetch.source != "none":
            begin = min(span.stop, span.start + (prefetch.delay if prefetch.source == "detector" else 0))
            before = self._trace.keys_A[span.start : begin].tolist()
            self._on_demand(before)
            rest = self._trace.keys_A[begin : span.stop]
            done = begin + self._with_prefetch(rest.tolist(), self._named(span.game), set(before)) if len(rest) else begin
            progress(done - span.start)
        for start in range(done, span.stop, PIECE_ACCESSES):
            keys = self._trace.keys_A[start : min(start + PIECE_ACCESSES, span.stop)].tolist()
            self._on_demand(keys)
            progress(len(keys))

    def _on_demand(self, keys: Sequence[int]) -> None:
        """Does accesses without prefetches: each miss loads its expert. A replay spends nearly all its time in this loop."""
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
        """Does accesses together with prefetches, until every prefetched expert was used or evicted, or to the end of `keys`.

        Args:
            keys: the accesses.
            named: the experts that the prefetch source names, in order.
            asked: the experts that the game has asked for since the switch; they are not evicted by a prefetch.

        Returns:
            The number of accesses that were done.
        """
        counts, now = self._counts, 0.0
        prefetching = _Prefetching(self._limited(named), asked)
        counts.prefetched += len(prefetching.waiting)
        for done, key in enumerate(keys):
            self._advance(prefetching, now)
            if prefetching.idle:
                return done
            wait_s = 0.0
            if key == prefetching.loading:
                counts.late += 1
                wait_s = prefetching.ready_at - now
                self._touches[key](key)
                prefetching.loading = None
            elif self._is_resident(key):
                counts.hits += 1
                counts.useful += key in prefetching.unused
            else:
                counts.late += prefetching.waiting.pop(key, False)
                wait_s = self._load_s(key)
                victim = self._tiers[key].admit(key, keep=() if prefetching.loading is None else (prefetching.loading,))
                counts.wasted += victim in prefetching.unused
                prefetching.unused.discard(victim)
                prefetching.ready_at += wait_s
            prefetching.unused.discard(key)
            asked.add(key)
            counts.stall_s += wait_s
            now += wait_s + self._setup.latency.compute_s
        counts.wasted += len(prefetching.unused)
        counts.cancelled += len(prefetching.waiting)
        return len(keys)

    def _advance(self, prefetching: _Prefetching, now: float) -> None:
        """Brings the prefetches up to the time `now`: loads those that wait, one after another."""
        while prefetching.loading is None or prefetching.ready_at <= now:
            prefetching.loading = None
            if not prefetching.waiting:
                return
            key = next(iter(prefetching.waiting))
            if self._claim(key, prefetching):
                del prefetching.waiting[key]
                prefetching.loading = key
                prefetching.unused.add(key)
                prefetching.ready_at += self._load_s(key)
            else:
                tier = self._tiers[key]
                elsewhere = {other: True for other in prefetching.waiting if self._tiers[other] is not tier}
                self._counts.cancelled += len(prefetching.waiting) - len(elsewhere)
                prefetching.waiting = elsewhere

    def _claim(self, key: int, prefetching: _Prefetching) -> bool:
        """Gives a slot in HBM to an expert that is to be prefetched, if a slot is free or an expert may be evicted. Returns whether it did.

        An expert may be evicted unless this game has asked for it, or it was prefetched and is unused. If HBM has only one slot, prefetches
        get none.
        """
        tier = self._tiers[key]
        if tier.capacity == 1:
            return False
        keep = prefetching.asked | prefetching.unused
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
        """The experts that the prefetch source names when `game` begins. They may be another game's: sources can be wrong."""
        source, others = self._setup.prefetch.source, [name for name in self._pools if name != game]
        if source == "random":
            return self._pools[list(self._pools)[int(self._rng.integers(len(self._pools)))]]
        if source == "detector" and others and self._rng.random() >= self._setup.prefetch.accuracy:
            return self._pools[others[int(self._rng.integers(len(others)))]]
        return self._pools[game]

    def _load_s(self, key: int) -> float:
        """Loads an expert into HBM from DRAM, or from NVMe through DRAM. Counts the load, and returns the seconds that it takes."""
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
    """Finds the experts that each game uses anywhere in the trace: game -> keys, the most used first."""
    used: dict[str, np.ndarray[Any, Any]] = {}
    num_keys = int(trace.keys_A.max(initial=0)) + 1
    for span in trace.spans():
        counts = np.bincount(trace.keys_A[span.start : span.stop], minlength=num_keys)
        used[span.game] = used.get(span.game, 0) + counts
    return {game: np.argsort(-counts, kind="stable")[: np.count_nonzero(counts)].tolist() for game, counts in used.items()}
