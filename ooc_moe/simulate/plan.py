"""What a run will ask of its tiers, before it runs: bytes per tier, bytes per switch, stalls beside compute; and whether it is worth it.

    ooc-moe plan --config full --gpu-bytes 80GB --dram-bytes 64GB --nvme-bytes 1TB --steps-per-s 2000

Bytes are arithmetic on the configuration. Loads within an update are counted by replaying its order of experts (acting by LRU, which the
future is hidden from; learning by Belady, for replayed routing tells the cache its next uses). Not predicted: activations, the caching
allocator's slack, and how much of a load hides behind the compute: stalls are given as if none did, and if all that can did.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import humanize
import numpy as np
from rich.box import SIMPLE_HEAD
from rich.table import Table

from ooc_moe.config.agent import AgentConfig
from ooc_moe.config.run import RunConfig
from ooc_moe.metrics.trace import Mark, Trace, TraceInfo
from ooc_moe.simulate.replay import Setup, replay
from ooc_moe_wire.errors import InvalidRequest
from ooc_moe_wire.layout import BankSpec

PROBE_BYTES = 256 << 20


@dataclass(frozen=True, kw_only=True, slots=True)
class Rates:
    """Seconds that one expert takes between HBM and where it is; `seed` is its first touch, when the daemon makes its initial value."""

    dram: float
    nvme: float
    seed: float
    push: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """The prediction. Bytes and experts are of the whole run at its end, when every game was learned once."""

    num_games: int
    num_experts: int
    """Owned by games; whole banks with token routing."""
    working_set: int
    """Experts of one game: its own and those it borrows."""
    borrowed: int
    """Of these, older games' experts that it only reads, at the most."""
    expert_bytes: int
    hbm_experts: int
    hbm_bytes: int
    """The slab."""
    gradient_bytes: int
    dense_bytes: int
    """Parameters of all games; gradients and moments of the one in training."""
    dram_bytes: int
    dram_bytes_for_all: int
    nvme_bytes: int
    nvme_spare_bytes: int
    """Versions that the last checkpoint still holds while new ones are written (copy on write)."""
    switch_bytes_in: int
    switch_bytes_out: int
    switch_s: dict[str, float]
    """Loading a working set, by the tier that it comes from, with nothing hidden."""
    loads_per_update: int
    update_compute_s: float | None
    update_load_s: float
    game_compute_s: float | None
    findings: tuple[str, ...]
    """What will not work, or is not worth it; empty when neither."""

    @property
    def update_stall_s(self) -> tuple[float, float]:
        """The least and the most: with all loads behind the compute that can be, and with none."""
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
    """Predicts a run.

    Args:
        config: the run.
        rates: what moving an expert takes.
        gpu_bytes: of the trainer's device; None: not judged.
        dram_bytes: of the daemon; None: as configured.
        nvme_bytes: of the daemon's disk; None: not judged.
        steps_per_s: environment steps a second, acting and learning together, with every expert resident.

    Raises:
        InvalidRequest: a size or a speed is not above 0.
    """
    for name, value in (("gpu_bytes", gpu_bytes), ("dram_bytes", dram_bytes), ("nvme_bytes", nvme_bytes), ("steps_per_s", steps_per_s)):
        if value is not None and value <= 0:
            raise InvalidRequest(f"{name}: {value} is not above 0")
    agent, games = config.agent, list(dict.fromkeys(config.games))
    layout = agent.expert_layout()
    capacity = agent.hbm_experts // agent.num_banks * agent.num_banks
    owned = agent.pools_per_game * agent.pool_size if agent.routing == "pool" else agent.num_experts * agent.num_banks
    shared = min(agent.shared_experts, (len(games) - 1) * agent.pool_size)
    borrowed = agent.pools_per_game * shared
    working_set = owned + borrowed
    num_experts = len(games) * owned if agent.routing == "pool" else owned
    bytes_in = owned * layout.body_bytes + borrowed * layout.parameter_bytes
    dram_bytes = agent.dram_bytes if dram_bytes is None else dram_bytes
    loads = _loads_per_update(config, capacity, shared)
    compute_s = None if steps_per_s is None else config.steps_per_update / steps_per_s
    made = Plan(
        num_games=len(games),
        num_experts=num_experts,
        working_set=working_set,
        borrowed=borrowed,
        expert_bytes=layout.body_bytes,
        hbm_experts=capacity,
        hbm_bytes=capacity * layout.body_bytes,
        gradient_bytes=owned * layout.parameter_bytes,
        dense_bytes=_dense_bytes(agent, len(games)),
        dram_bytes=dram_bytes,
        dram_bytes_for_all=num_experts * layout.record_bytes,
        nvme_bytes=num_experts * layout.record_bytes,
        nvme_spare_bytes=owned * layout.record_bytes,
        switch_bytes_in=bytes_in,
        switch_bytes_out=min(owned, capacity) * layout.body_bytes,
        switch_s={tier: bytes_in / layout.body_bytes * getattr(rates, tier) for tier in ("dram", "nvme", "seed")},
        loads_per_update=loads,
        update_compute_s=compute_s,
        update_load_s=loads * (rates.dram if dram_bytes >= working_set * layout.record_bytes else rates.nvme),
        game_compute_s=None if compute_s is None else compute_s * config.updates_per_game,
        findings=(),
    )
    return _judged(made, gpu_bytes, nvme_bytes)


def _judged(made: Plan, gpu_bytes: int | None, nvme_bytes: int | None) -> Plan:
    findings = []
    beside = made.gradient_bytes + made.dense_bytes
    if gpu_bytes is not None:
        room = (gpu_bytes - beside) // made.expert_bytes
        if room < 1:
            findings.append(f"will not work: gradients and dense parameters alone need {beside:,} bytes of the GPU's {gpu_bytes:,}")
        elif made.num_experts <= room:
            findings.append(
                f"not worth it: all {made.num_experts} experts fit into HBM; keep them there with --hbm-experts {made.num_experts}"
            )
        elif made.hbm_experts > room:
            findings.append(f"will not work: HBM has room for {room} experts beside gradients and dense parameters, not {made.hbm_experts}")
        elif made.hbm_experts < made.working_set <= room:
            findings.append(f"HBM is too small for a game, but the GPU is not: give --hbm-experts {room}")
    elif made.num_experts <= made.hbm_experts:
        findings.append(f"not worth it: all {made.num_experts} experts fit into the HBM configured ({made.hbm_experts})")
    if nvme_bytes is not None and made.nvme_bytes + made.nvme_spare_bytes > nvme_bytes:
        findings.append(f"will not work: NVMe needs {made.nvme_bytes + made.nvme_spare_bytes:,} bytes, there are {nvme_bytes:,}")
    if made.loads_per_update:
        cost = "" if made.update_compute_s is None else f", {made.update_stall_s[0]:.3g} to {made.update_stall_s[1]:.3g} s of stall beside "
        cost += "" if made.update_compute_s is None else f"{made.update_compute_s:.3g} s of compute"
        findings.append(
            f"slow: a game's {made.working_set} experts do not fit into HBM's {made.hbm_experts}; "
            f"each update loads {made.loads_per_update} again{cost}"
        )
    return replace(made, findings=tuple(findings))


def _dense_bytes(agent: AgentConfig, num_games: int) -> int:
    """float32 parameters of all games; a gradient and two moments for those of one game and the stem."""
    everything, one = (replace(agent, num_games=count).estimate_params().dense for count in (num_games, 1))
    return 4 * everything + 12 * one


def _loads_per_update(config: RunConfig, capacity: int, shared: int) -> int:
    """Loads of an update in the middle of a game whose pools borrow `shared`: what comes again though it was there before."""
    agent, ppo = config.agent, config.ppo
    own = [_pool(agent, layer) for layer in range(agent.num_layers)]
    layers = [pool + _borrowed(agent, layer, shared) for layer, pool in enumerate(own)]
    forward = [key for pool in layers for key in pool]
    backward = [key for pool in reversed(layers) for key in pool]
    updates = sorted({key for pool in own for key in pool}, key=lambda key: (key % agent.num_banks, key))
    segments = ppo.num_envs * ppo.rollout_steps // agent.context
    num_minibatches = ppo.epochs * -(-segments // ppo.minibatch_segments)
    num_acts = ppo.rollout_steps + ppo.rollout_steps // agent.context  # One more for the value at each segment's end.
    asked = {"lru": forward * num_acts, "belady": (forward + backward + updates) * num_minibatches}
    info = TraceInfo(source="plan", num_banks=agent.num_banks, expert_bytes=1)
    misses = 0
    for policy, keys in asked.items():
        trace = Trace(info=info, keys_A=np.array(keys, dtype=np.uint32), marks=(Mark(0, "", False),))
        counts = replay(trace, Setup(hbm_experts=capacity, policy=policy)).training
        misses += counts.accesses - counts.hits - len(set(forward))
    return misses


def _pool(agent: AgentConfig, layer: int) -> list[int]:
    """The first game's experts in a layer, numbered as in a trace; all of its tokens together ask for nearly every one of them."""
    bank = layer % agent.num_banks
    if agent.routing == "token":
        return [expert * agent.num_banks + bank for expert in range(agent.num_experts)]
    pool = layer % agent.pools_per_game if agent.num_banks == 1 else 0
    return [(pool * agent.pool_size + expert) * agent.num_banks + bank for expert in range(agent.pool_size)]


def _borrowed(agent: AgentConfig, layer: int, shared: int) -> list[int]:
    """Experts that other games own in that layer; which ones makes no difference to how often they come."""
    first = agent.pools_per_game * agent.pool_size + layer % agent.pools_per_game * shared
    return [(first + expert) * agent.num_banks + layer % agent.num_banks for expert in range(shared)]


def table(made: Plan, rates: Rates) -> Table:
    """For a terminal."""
    shown = Table("", "predicted", "", box=SIMPLE_HEAD)
    shown.columns[1].justify = "right"
    size = partial(humanize.naturalsize, binary=True)
    rows = [
        (
            "experts",
            f"{made.num_experts:,}",
            f"{made.num_games} games of {made.working_set - made.borrowed}, {size(made.expert_bytes)} each with its moments",
        ),
        *([("a game's working set", f"{made.working_set:,}", f"{made.borrowed} of them borrowed, to read")] if made.borrowed else []),
        ("HBM", size(made.hbm_bytes + made.gradient_bytes + made.dense_bytes), _hbm_parts(made, size) + "; activations come on top"),
        ("DRAM", size(made.dram_bytes), f"{size(made.dram_bytes_for_all)} would hold all"),
        (
            "NVMe",
            size(made.nvme_bytes + made.nvme_spare_bytes),
            f"of it {size(made.nvme_spare_bytes)} for versions that a checkpoint keeps",
        ),
        ("a switch moves", size(made.switch_bytes_in), f"in, and {size(made.switch_bytes_out)} out"),
        *(
            (f"a switch takes, from {tier}", f"{taken:.3g} s", f"{getattr(rates, tier) * 1e3:.3g} ms an expert; nothing hidden")
            for tier, taken in made.switch_s.items()
        ),
        ("loads in an update", f"{made.loads_per_update:,}", "after the first; 0 when HBM holds a game"),
    ]
    least, most = made.update_stall_s
    rows.append(("stall in an update", f"{least:.3g} to {most:.3g} s", "all hidden that can be, and none"))
    if made.update_compute_s is not None and made.game_compute_s is not None:
        share = most / (most + made.update_compute_s)
        rows.append(("compute in an update", f"{made.update_compute_s:.3g} s", f"stalled at most {share:.1%} of the time"))
        slowest = max(made.switch_s.values())
        rows.append(
            ("compute in a game", f"{made.game_compute_s:.3g} s", f"a switch is at most {slowest / made.game_compute_s:.2%} of that")
        )
    for row in rows:
        shown.add_row(*row)
    return shown


def _hbm_parts(made: Plan, size: Callable[[int], str]) -> str:
    return f"{made.hbm_experts} experts {size(made.hbm_bytes)}, gradients {size(made.gradient_bytes)}, dense {size(made.dense_bytes)}"


# Measuring


def measure(agent: AgentConfig, data_dir: Path, *, device: str = "cpu") -> Rates:
    """Seconds an expert takes, a pool in each call, through a daemon of its own below `data_dir`: some seconds, and 2 GiB of disk at most.

    Raises:
        InvalidRequest: the experts are too large to be probed so.
    """
    from ooc_moe.session.daemon import embedded_daemon
    from ooc_moe_client.hbm.cache import ExpertCache
    from ooc_moe_client.remote.store import RemoteStore

    layout = agent.expert_layout()
    batch = min(agent.choices, PROBE_BYTES // layout.record_bytes)
    if batch < 1:
        raise InvalidRequest(f"measure: experts of {layout.record_bytes:,} bytes are too large for the probe; give --latency instead")
    waves = [list(range(start, start + batch)) for start in range(0, 8 * batch, batch)]
    with (
        tempfile.TemporaryDirectory(dir=data_dir, prefix="ooc-moe-probe-") as directory,
        # DRAM holds half: reading all in turn finds none there, reading the last few again finds all.
        embedded_daemon(Path(directory) / "store", dram_bytes=4 * batch * layout.record_bytes) as target,
        closing(RemoteStore(target)) as store,
    ):
        store.create_bank(BankSpec(name="probe", num_experts=8 * batch, layout=layout, seed=0))
        with ExpertCache(store, "probe", capacity_experts=batch, device=device) as cache:

            def read(times: int, asked: list[list[int]]) -> None:
                for wave in asked * times:
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
