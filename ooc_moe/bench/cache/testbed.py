"""What every part of `ooc-moe bench cache` measures on: a real daemon, banks with equal experts in it, and a cache on each bank."""

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
    """The settings of one part of the cache benchmark: which preset, on which device, how many rounds, and where the daemon's data is."""

    size: str
    """The name of the preset whose experts are used."""
    device: torch.device
    rounds: int
    """How many times each benchmark case (path) is timed."""
    directory: Path
    """Holds the daemon's data. It must be on the disk to measure."""

    @property
    def config(self) -> AgentConfig:
        """The preset's configuration, but with two layers, a pool (the experts that one game may use) for each layer, and experts for eight
        games in one bank."""
        preset = PRESETS[self.size]
        return replace(
            preset, num_layers=LAYERS, num_experts=GAMES * LAYERS * preset.pool_size, routing="pool", pools="per-layer", banks="shared"
        )

    @property
    def working_set(self) -> int:
        """The number of experts that one game uses in all layers together."""
        return LAYERS * self.config.pool_size

    def experts_of(self, game: int) -> list[int]:
        """Returns the ids of the experts that game number `game` uses in all layers together."""
        return list(range(game * self.working_set, (game + 1) * self.working_set))

    def synchronize(self) -> None:
        """Waits until the device has done everything that it was told to do."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


class Testbed:
    """Makes banks (stores of experts) in a running daemon, each with a cache on it. All banks start with the same initial values.

    Because of that, trainers that do the same steps on different banks must have the same losses.
    """

    def __init__(self, setting: Setting, store: RemoteStore, stack: ExitStack) -> None:
        self._setting, self._store, self._stack = setting, store, stack

    def cache(self, name: str, *, capacity_experts: int) -> ExpertCache:
        """Makes a bank whose name contains `name`, and a cache of its experts with `capacity_experts` slots.

        The cache is closed when the daemon stops.
        """
        (spec,) = self._setting.config.bank_specs(name, seed=0)
        self._store.create_bank(spec)
        cache = ExpertCache(
            self._store, spec.name, capacity_experts=capacity_experts, device=self._setting.device, admission=AdmissionMode.ENFORCE
        )
        return self._stack.enter_context(cache)


@contextmanager
def open_testbed(setting: Setting, *, dram_experts: int) -> Iterator[Testbed]:
    """Starts a daemon whose DRAM tier has room for `dram_experts` experts, yields a Testbed on it, and stops the daemon at the end."""
    dram_bytes = (dram_experts + SPARE_RECORDS) * setting.config.expert_layout().record_bytes
    with ExitStack() as stack:
        target = stack.enter_context(embedded_daemon(setting.directory / "store", dram_bytes=dram_bytes))
        store = RemoteStore(target, trainer="bench")
        stack.callback(store.close)
        yield Testbed(setting, store, stack)
