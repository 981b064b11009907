"""`ooc-moe bench cache --parts steady,oversubscribed,switch,bandwidth`: what training through the cache and a real daemon costs.

Each part is a file of its own (cache_training.py, cache_switch.py, cache_bandwidth.py); their paths run in interleaved rounds (harness.py),
the baseline and ours in the same ones. All of it runs on any device.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from ooc_moe.bench.cache.bandwidth import BANDWIDTH_PATHS, bandwidth
from ooc_moe.bench.cache.results import Row
from ooc_moe.bench.cache.switch import SWITCH_PATHS, switch
from ooc_moe.bench.cache.trainer import Setting
from ooc_moe.bench.cache.training import OVERSUBSCRIBED_PATHS, STEADY_PATHS, oversubscribed, steady
from ooc_moe.bench.store import peers_disk
from ooc_moe.bench.torch_setup import device_of
from ooc_moe.config.agent import PRESETS
from ooc_moe.metrics import provenance as machine
from ooc_moe_wire.errors import InvalidRequest

SIZES = ("full", "demo")
ROUNDS, QUICK_ROUNDS = 5, 1
# By name: what measures it, and in how many paths.
PARTS: dict[str, tuple[Callable[[Setting, Callable[[], None]], list[Row]], int]] = {
    "steady": (steady, STEADY_PATHS),
    "oversubscribed": (oversubscribed, OVERSUBSCRIBED_PATHS),
    "switch": (switch, SWITCH_PATHS),
    "bandwidth": (bandwidth, BANDWIDTH_PATHS),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class CacheBench:
    """What to measure: each part with experts of each preset's size.

    Raises:
        InvalidRequest: for a preset, a number or a device that cannot be.
    """

    parts: tuple[str, ...] = tuple(PARTS)
    sizes: tuple[str, ...] = SIZES
    device: str = "auto"
    threads: int = 1
    rounds: int = ROUNDS
    data_dir: Path = Path()  # On the disk to measure; a directory is made in it, and removed.

    def __post_init__(self) -> None:
        for size in self.sizes:
            if size not in PRESETS:
                raise InvalidRequest(f"sizes: {size!r} is not one of {', '.join(PRESETS)}")
        for name, value in (("threads", self.threads), ("rounds", self.rounds)):
            if value < 1:
                raise InvalidRequest(f"{name}: {value} is not at least 1")
        device_of(self.device)

    @property
    def on(self) -> torch.device:
        """The device to measure on."""
        return device_of(self.device)


def run(bench: CacheBench, console: Console) -> list[Row]:
    """Measures. A progress bar is drawn on `console`.

    Raises:
        InvalidRequest: the disk cannot be measured.
        WrongBytes: something was not moved, or not computed, as it is meant to be.
    """
    bench.data_dir.mkdir(parents=True, exist_ok=True)
    threads = torch.get_num_threads()
    torch.set_num_threads(bench.threads)
    rows: list[Row] = []
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    try:
        with Progress(*columns, console=console, transient=True) as progress:
            total = len(bench.sizes) * (bench.rounds + 1) * sum(PARTS[part][1] for part in bench.parts)
            task = progress.add_task("", total=total)
            for part in bench.parts:
                for size in bench.sizes:
                    progress.update(task, description=f"{part}, {size}")
                    rows += _measured(bench, part, size, lambda: progress.advance(task))
    finally:
        torch.set_num_threads(threads)
    return rows


def _measured(bench: CacheBench, part: str, size: str, on_run: Callable[[], None]) -> list[Row]:
    with tempfile.TemporaryDirectory(prefix="bench-", dir=bench.data_dir) as directory:
        peers_disk.check_direct_io(Path(directory))
        setting = Setting(size=size, device=bench.on, rounds=bench.rounds, directory=Path(directory))
        return PARTS[part][0](setting, on_run)


def facts(bench: CacheBench, *, command: str) -> dict[str, str]:
    """What a reader needs to judge or repeat the results."""
    on = torch.cuda.get_device_name(bench.on) if bench.on.type == "cuda" else "cpu"
    return machine.facts(bench.data_dir, command=command) | {
        "torch": torch.__version__,
        "device": f"{on}, {bench.threads} thread{'s' if bench.threads > 1 else ''}, float32",
        "rounds": f"{bench.rounds}, interleaved",
    }
