"""What every part of `ooc-moe bench cache` measures on: a real daemon, banks of equal experts in it, and caches on these banks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from ooc_moe.config.agent import PRESETS, AgentConfig
from ooc_moe.session.daemon import embedded_daemon
from ooc_moe_client.hbm.admission import AdmissionMode
from ooc_moe_client.hbm.cache import ExpertCache
from ooc_moe_client.remote.store import RemoteStore

LAYERS = 2
GAMES = 8
# Room in the daemon's DRAM beyond the experts themselves, for pushes and reads in flight.
SPARE_RECORDS = 16


@dataclass(frozen=True, kw_only=True, slots=True)
class Setting:
    """The settings of one part of the benchmark."""

    size: str
    """The preset whose experts are used."""
    device: torch.device
    rounds: int
    """How many samples each path gets."""
    directory: Path
    """Holds the daemon's data; on the disk to measure."""

    @property
    def config(self) -> AgentConfig:
        """The preset, but with two layers, a pool for each layer, and experts for eight games in one bank."""
        preset = PRESETS[self.size]
        return replace(
            preset, num_layers=LAYERS, num_experts=GAMES * LAYERS * preset.pool_size, routing="pool", pools="per-layer", banks="shared"
        )

    @property
    def working_set(self) -> int:
        """The number of experts that one game uses, over all layers."""
        return LAYERS * self.config.pool_size

    def experts_of(self, game: int) -> list[int]:
        """The experts that game number `game` uses, over all layers."""
        return list(range(game * self.working_set, (game + 1) * self.working_set))

    def synchronize(self) -> None:
        """Waits until the device has done everything that it was told to do."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


class Testbed:
    """A daemon that makes banks of equal experts, each with a cache on it. Trainers on different banks must compute the same."""

    def __init__(self, setting: Setting, store: RemoteStore, stack: ExitStack) -> None:
        self._setting, self._store, self._stack = setting, store, stack

    def cache(self, name: str, *, capacity_experts: int) -> ExpertCache:
        """Makes a bank and a cache on it. The cache is closed when the daemon stops."""
        (spec,) = self._setting.config.bank_specs(name, seed=0)
        self._store.create_bank(spec)
        cache = ExpertCache(
            self._store, spec.name, capacity_experts=capacity_experts, device=self._setting.device, admission=AdmissionMode.ENFORCE
        )
        return self._stack.enter_context(cache)


@contextmanager
def open_testbed(setting: Setting, *, dram_experts: int) -> Iterator[Testbed]:
    """Starts a daemon whose DRAM tier has room for `dram_experts` experts, and stops it at the end."""
    dram_bytes = (dram_experts + SPARE_RECORDS) * setting.config.expert_layout().record_bytes
    with ExitStack() as stack:
        target = stack.enter_context(embedded_daemon(setting.directory / "store", dram_bytes=dram_bytes))
        store = RemoteStore(target, trainer="bench")
        stack.callback(store.close)
        yield Testbed(setting, store, stack)
