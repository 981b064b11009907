"""Predicts a run before it starts: bytes in each tier, bytes that a switch moves, and stalls; and warns if the run will not fit or needs no
paging of experts.

    ooc-moe plan --preset full --gpu-bytes 80GB --dram-bytes 64GB --nvme-bytes 1TB --steps-per-s 2000

Bytes are computed from the configuration. How many experts an update loads into HBM is counted in a simulated cache, which gets the
update's accesses to experts in their order:

- For acting (playing) the cache evicts by LRU, because nobody can know which expert a player will need next.
- For learning it evicts by Belady's optimum, because the experts of each token were recorded while playing, so all next uses are known.

Two things are not predicted: the memory of activations and of the allocator, and how much of a load overlaps with compute. Stalls are
therefore given as a range, from "all loads overlap as far as they can" to "no load overlaps".
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from ooc_moe.config.agent import AgentConfig
from ooc_moe.config.run import RunConfig
from ooc_moe.display.formats import format_bytes, format_seconds_short, format_share
from ooc_moe.display.table import Table
from ooc_moe.metrics.trace import Mark, Trace, TraceInfo
from ooc_moe.simulate.replay import Setup, replay
from ooc_moe_wire.errors import InvalidRequest
from ooc_moe_wire.layout import BankSpec

PROBE_BYTES = 256 << 20
"""The most bytes that `measure` reads in one call."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Rates:
    """How long it takes to move one expert into HBM from each place where an expert may be, and from HBM to the daemon, in seconds."""

    dram: float
    """Seconds to fetch an expert from the daemon's DRAM."""
    nvme: float
    """Seconds to fetch an expert from the daemon's NVMe."""
    seed: float
    """Seconds to fetch an expert that was never written, for which the daemon computes the initial value."""
    push: float
    """Seconds to write an expert from HBM back to the daemon."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """What `plan` predicts of a run: sizes, loads, times, and findings.

    Sizes are those at the end of the run, when every game was learned once.
    """

    num_games: int
    num_experts: int
    """Experts that games own; with token routing, all experts of the banks."""
    working_set: int
    """Experts that one game uses: its own and the ones it borrows."""
    borrowed: int
    """How many experts of the working set belong to older games, at most. A game reads them and does not change them."""
    expert_bytes: int
    """Bytes of one expert in HBM: parameters and optimizer moments."""
    hbm_experts: int
    """How many experts HBM has room for."""
    hbm_bytes: int
    """Bytes of HBM for these experts."""
    gradient_bytes: int
    """Bytes of the gradients of one game's own experts."""
    dense_bytes: int
    """Bytes of the dense part on the GPU: parameters for all games; gradients and moments for the game in training."""
    dram_bytes: int
    """Capacity of the daemon's DRAM tier."""
    dram_bytes_for_all: int
    """The bytes of DRAM that would hold every expert."""
    nvme_bytes: int
    """Bytes of all experts on NVMe, each once."""
    nvme_spare_bytes: int
    """Bytes of older versions on NVMe: the last checkpoint keeps them while the run writes new ones (copy on write)."""
    switch_bytes_in: int
    """Bytes that a switch to another game loads into HBM."""
    switch_bytes_out: int
    """Bytes that a switch to another game writes back from HBM."""
    switch_s: dict[str, float]
    """Seconds to load a working set if no load overlaps with compute, by the tier that holds it."""
    loads_per_update: int
    """How many experts an update loads again after HBM evicted them: 0 if HBM has room for the working set."""
    update_compute_s: float | None
    """Seconds of acting and learning in an update, without loads; None if the speed was not given."""
    update_load_s: float
    """Seconds that the repeated loads of an update take."""
    game_compute_s: float | None
    """Seconds of acting and learning in all updates of one game, without loads; None if the speed was not given."""
    findings: tuple[str, ...]
    """Sentences on why the run will not work, will be slow, or needs no paging of experts; empty if nothing speaks against it."""

    @property
    def update_stall_s(self) -> tuple[float, float]:
        """How long an update waits for experts, in seconds: (if loads overlap with compute as far as they can, if no load does)."""
        return max(0.0, self.update_load_s - (self.update_compute_s or 0.0)), self.update_load_s


def plan(
    config: RunConfig,
    rates: Rates,
    *,
    gpu_bytes: int | None = None,
    dram_bytes: int | None = None,
    nvme_bytes: int | None = None,
    steps_per_s: float | None = None,
) -> Plan:
    """Predicts what a run will demand of its memory tiers (bytes in each, loads of experts, stalls), and what speaks against the run.

    Args:
        config: the configuration of the run.
        rates: seconds to move one expert between tiers.
        gpu_bytes: memory of the trainer's device; None: the plan does not judge whether it is enough.
        dram_bytes: memory of the daemon's DRAM tier; None: as the configuration says.
        nvme_bytes: size of the daemon's disk; None: the plan does not judge whether it is enough.
        steps_per_s: environment steps a second, acting and learning together, with every expert in HBM; None: no compute times.

    Raises:
        InvalidRequest: a size or a speed is not above 0.
    """
    for name, value in (("gpu_bytes", gpu_bytes), ("dram_bytes", dram_bytes), ("nvme_bytes", nvme_bytes), ("steps_per_s", steps_per_s)):
        if value is not None and value <= 0:
            raise InvalidRequest(f"{name}: {value} is not above 0")
    predicted = _predicted(config, rates, config.agent.dram_bytes if dram_bytes is None else dram_bytes, steps_per_s)
    findings = (_hbm_finding(predicted, gpu_bytes), _nvme_finding(predicted, nvme_bytes), _loads_finding(predicted))
    return replace(predicted, findings=tuple(finding for finding in findings if finding is not None))


def _predicted(config: RunConfig, rates: Rates, dram_bytes: int, steps_per_s: float | None) -> Plan:
    """Predicts all figures of the plan, but leaves its findings empty."""
    agent, num_games = config.agent, len(set(config.games))
    layout = agent.expert_layout()
    capacity = agent.hbm_experts // agent.num_banks * agent.num_banks
    owned = agent.pools_per_game * agent.pool_size if agent.routing == "pool" else agent.num_experts * agent.num_banks
    shared = min(agent.shared_experts, (num_games - 1) * agent.pool_size)
    borrowed = agent.pools_per_game * shared
    num_experts = num_games * owned if agent.routing == "pool" else owned
    bytes_in = owned * layout.body_bytes + borrowed * layout.parameter_bytes
    loads = _loads_per_update(config, capacity, shared)
    fits_dram = dram_bytes >= (owned + borrowed) * layout.record_bytes
    compute_s = None if steps_per_s is None else config.steps_per_update / steps_per_s
    return Plan(
        num_games=num_games,
        num_experts=num_experts,
        working_set=owned + borrowed,
        borrowed=borrowed,
        expert_bytes=layout.body_bytes,
        hbm_experts=capacity,
        hbm_bytes=capacity * layout.body_bytes,
        gradient_bytes=owned * layout.parameter_bytes,
        dense_bytes=_dense_bytes(agent, num_games),
        dram_bytes=dram_bytes,
        dram_bytes_for_all=num_experts * layout.record_bytes,
        nvme_bytes=num_experts * layout.record_bytes,
        nvme_spare_bytes=owned * layout.record_bytes,
        switch_bytes_in=bytes_in,
        switch_bytes_out=min(owned, capacity) * layout.body_bytes,
        switch_s={tier: bytes_in / layout.body_bytes * getattr(rates, tier) for tier in ("dram", "nvme", "seed")},
        loads_per_update=loads,
        update_compute_s=compute_s,
        update_load_s=loads * (rates.dram if fits_dram else rates.nvme),
        game_compute_s=None if compute_s is None else compute_s * config.updates_per_game,
        findings=(),
    )


def _hbm_finding(plan: Plan, gpu_bytes: int | None) -> str | None:
    if gpu_bytes is None:
        if plan.num_experts <= plan.hbm_experts:
            return f"not worth it: all {plan.num_experts} experts fit into the HBM configured ({plan.hbm_experts})"
        return None
    other_bytes = plan.gradient_bytes + plan.dense_bytes
    room = (gpu_bytes - other_bytes) // plan.expert_bytes
    if room < 1:
        return f"will not work: gradients and dense parameters alone need {other_bytes:,} bytes of the GPU's {gpu_bytes:,}"
    if plan.num_experts <= room:
        return f"not worth it: all {plan.num_experts} experts fit into HBM; keep them there with --hbm-experts {plan.num_experts}"
    if plan.hbm_experts > room:
        return f"will not work: HBM has room for {room} experts beside gradients and dense parameters, not {plan.hbm_experts}"
    if plan.hbm_experts < plan.working_set <= room:
        return f"HBM is configured too small for a game, although the GPU has room: give --hbm-experts {room}"
    return None


def _nvme_finding(plan: Plan, nvme_bytes: int | None) -> str | None:
    needed = plan.nvme_bytes + plan.nvme_spare_bytes
    if nvme_bytes is None or needed <= nvme_bytes:
        return None
    return f"will not work: the run needs {needed:,} bytes of NVMe, and there are {nvme_bytes:,}"


def _loads_finding(plan: Plan) -> str | None:
    if not plan.loads_per_update:
        return None
    text = (
        f"slow: a game's {plan.working_set} experts do not fit into HBM's {plan.hbm_experts}; "
        f"each update loads {plan.loads_per_update} experts again"
    )
    if plan.update_compute_s is None:
        return text
    stall = " to ".join(format_seconds_short(seconds) for seconds in plan.update_stall_s)
    return f"{text}, and stalls for {stall} beside {format_seconds_short(plan.update_compute_s)} of compute"


def _dense_bytes(agent: AgentConfig, num_games: int) -> int:
    """The bytes of the dense part of the agent, all that is not in experts.

    They are the float32 parameters of all games, and a gradient and two moments for the parameters of one game and of the stem.
    """
    everything, one = (replace(agent, num_games=count).estimate_params().dense for count in (num_games, 1))
    return 4 * everything + 12 * one


def _loads_per_update(config: RunConfig, capacity: int, shared: int) -> int:
    """Counts the loads of one update that are repeated: the expert was loaded before in this update, and HBM has evicted it since.

    Args:
        config: the configuration of the run.
        capacity: how many experts HBM holds.
        shared: how many experts of older games each pool borrows.
    """
    agent, ppo = config.agent, config.ppo
    own = [_pool(agent, layer) for layer in range(agent.num_layers)]
    layers = [pool + _borrowed(agent, layer, shared) for layer, pool in enumerate(own)]
    forward = [key for pool in layers for key in pool]
    backward = [key for pool in reversed(layers) for key in pool]
    updates = sorted({key for pool in own for key in pool}, key=lambda key: (key % agent.num_banks, key))
    segments = ppo.num_envs * ppo.rollout_steps // agent.context
    num_minibatches = ppo.epochs * -(-segments // ppo.minibatch_segments)
    num_acts = ppo.rollout_steps + ppo.rollout_steps // agent.context  # One more for the value at each segment's end.
    keys_by_policy = {"lru": forward * num_acts, "belady": (forward + backward + updates) * num_minibatches}
    info = TraceInfo(source="plan", num_banks=agent.num_banks, expert_bytes=1)
    misses = 0
    for policy, keys in keys_by_policy.items():
        trace = Trace(info=info, keys_A=np.array(keys, dtype=np.uint32), marks=(Mark(0, "", False),))
        counts = replay(trace, Setup(hbm_experts=capacity, policy=policy)).training
        misses += counts.accesses - counts.hits - len(set(forward))
    return misses


def _pool(agent: AgentConfig, layer: int) -> list[int]:
    """The experts that the first game owns in a layer, as keys of a trace (numbers). An update is assumed to use them all."""
    bank = layer % agent.num_banks
    if agent.routing == "token":
        return [expert * agent.num_banks + bank for expert in range(agent.num_experts)]
    pool = layer % agent.pools_per_game if agent.num_banks == 1 else 0
    return [(pool * agent.pool_size + expert) * agent.num_banks + bank for expert in range(agent.pool_size)]


def _borrowed(agent: AgentConfig, layer: int, shared: int) -> list[int]:
    """The `shared` experts that the game borrows in a layer, as keys of a trace. Which ones does not matter: all are used equally often."""
    first = agent.pools_per_game * agent.pool_size + layer % agent.pools_per_game * shared
    return [(first + expert) * agent.num_banks + layer % agent.num_banks for expert in range(shared)]


def table(plan: Plan, rates: Rates) -> Table:
    """Makes a table of a plan: in each row a quantity, its predicted value and a remark."""
    return Table("", ("", "predicted", ""), [*_size_rows(plan), *_switch_rows(plan, rates), *_update_rows(plan)], alignment="lrl")


def _size_rows(plan: Plan) -> list[tuple[str, str, str]]:
    own = plan.working_set - plan.borrowed
    hbm_parts = (
        f"{plan.hbm_experts} experts {format_bytes(plan.hbm_bytes)}, gradients {format_bytes(plan.gradient_bytes)}, "
        f"dense {format_bytes(plan.dense_bytes)}; activations come on top"
    )
    spare = format_bytes(plan.nvme_spare_bytes)
    rows = [
        ("experts", f"{plan.num_experts:,}", f"{plan.num_games} games of {own}, {format_bytes(plan.expert_bytes)} each with its moments"),
        ("HBM", format_bytes(plan.hbm_bytes + plan.gradient_bytes + plan.dense_bytes), hbm_parts),
        ("DRAM", format_bytes(plan.dram_bytes), f"{format_bytes(plan.dram_bytes_for_all)} would hold all experts"),
        ("NVMe", format_bytes(plan.nvme_bytes + plan.nvme_spare_bytes), f"{spare} of it for older versions that a checkpoint keeps"),
    ]
    if plan.borrowed:
        rows.insert(1, ("a game's working set", f"{plan.working_set:,}", f"{plan.borrowed} of them borrowed, to read only"))
    return rows


def _switch_rows(plan: Plan, rates: Rates) -> list[tuple[str, str, str]]:
    rows = [("a switch moves", format_bytes(plan.switch_bytes_in), f"in, and {format_bytes(plan.switch_bytes_out)} out")]
    for tier, seconds in plan.switch_s.items():
        an_expert = format_seconds_short(getattr(rates, tier))
        rows.append((f"a switch takes, from {tier}", format_seconds_short(seconds), f"{an_expert} an expert; no overlap"))
    return rows


def _update_rows(plan: Plan) -> list[tuple[str, str, str]]:
    least, most = plan.update_stall_s
    stall = f"{format_seconds_short(least)} to {format_seconds_short(most)}"
    rows = [
        ("repeated loads in an update", f"{plan.loads_per_update:,}", "0 if HBM holds a game's experts"),
        ("stall in an update", stall, "with as much overlap as possible, and with none"),
    ]
    if plan.update_compute_s is not None and plan.game_compute_s is not None:
        stalled = most / (most + plan.update_compute_s)
        switching = max(plan.switch_s.values()) / plan.game_compute_s
        compute, remark = format_seconds_short(plan.update_compute_s), f"stalled at most {format_share(stalled)} of the time"
        rows.append(("compute in an update", compute, remark))
        compute, remark = format_seconds_short(plan.game_compute_s), f"a switch takes at most {format_share(switching, digits=2)} of that"
        rows.append(("compute in a game", compute, remark))
    return rows


# Measuring


def measure(agent: AgentConfig, data_dir: Path, *, device: str = "cpu") -> Rates:
    """Measures how long one expert takes between HBM and each other tier. Starts a daemon; takes some seconds and at most 2 GiB of disk.

    Args:
        agent: the configuration whose experts are measured; it also decides how many are moved in one call.
        data_dir: a directory on the disk to be measured. The daemon keeps its data in this directory meanwhile.
        device: the device that stands for HBM: the GPU, or the CPU's memory.

    Raises:
        InvalidRequest: the device cannot be used, or one expert is larger than the probe reads in a call.
    """
    from ooc_moe.session.daemon import embedded_daemon
    from ooc_moe.session.session import check_device
    from ooc_moe_client.hbm.cache import ExpertCache
    from ooc_moe_client.remote.store import RemoteStore

    check_device(device)
    layout = agent.expert_layout()
    batch = min(agent.choices, PROBE_BYTES // layout.record_bytes)
    if batch < 1:
        raise InvalidRequest(f"measure: experts of {layout.record_bytes:,} bytes are too large for the probe; give --latency instead")
    waves = [list(range(start, start + batch)) for start in range(0, 8 * batch, batch)]
    with (
        tempfile.TemporaryDirectory(dir=data_dir, prefix="ooc-moe-probe-") as directory,
        # DRAM holds half of the probe. Reading the whole probe in a cycle always misses DRAM; reading the last two waves again always hits.
        embedded_daemon(Path(directory) / "store", dram_bytes=4 * batch * layout.record_bytes) as target,
        closing(RemoteStore(target)) as store,
    ):
        store.create_bank(BankSpec(name="probe", num_experts=8 * batch, layout=layout, seed=0))
        with ExpertCache(store, "probe", capacity_experts=batch, device=device) as cache:

            def read(times: int, chosen: list[list[int]]) -> None:
                for wave in chosen * times:
                    with cache.reading(wave):
                        pass

            def write() -> None:
                with cache.updating(waves[-1]):
                    pass
                cache.flush()

            seed = _timed(lambda: read(1, waves)) / len(waves)
            for wave in waves:
                with cache.updating(wave):
                    pass
            cache.flush()
            nvme = _timed(lambda: read(2, waves)) / (2 * len(waves))
            dram = _timed(lambda: read(4, waves[-2:])) / 8
            push = _timed(write)
    return Rates(dram=dram / batch, nvme=nvme / batch, seed=seed / batch, push=push / batch)


def _timed(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began
