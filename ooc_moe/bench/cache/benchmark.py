"""`ooc-moe bench cache --parts steady,oversubscribed,switch,bandwidth`: what training through the cache and a real daemon costs.

training.py measures the parts steady and oversubscribed, switch.py the part switch, and bandwidth.py the part bandwidth. A part times
several ways to do the same work (called paths): our own and a baseline, in the same interleaved rounds (harness.py). All parts run on any
device.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console

from ooc_moe.bench.cache.bandwidth import BANDWIDTH_PATHS, bandwidth
from ooc_moe.bench.cache.options import CacheBench
from ooc_moe.bench.cache.results import Row
from ooc_moe.bench.cache.switch import SWITCH_PATHS, switch
from ooc_moe.bench.cache.testbed import Setting
from ooc_moe.bench.cache.training import OVERSUBSCRIBED_PATHS, STEADY_PATHS, oversubscribed, steady
from ooc_moe.bench.store import peers_disk
from ooc_moe.bench.torch_setup import torch_threads
from ooc_moe.display.progress import passing_bar
from ooc_moe.metrics import provenance

# By name: the function that measures the part, and how many paths it has.
PARTS: dict[str, tuple[Callable[[Setting, Callable[[], None]], list[Row]], int]] = {
    "steady": (steady, STEADY_PATHS),
    "oversubscribed": (oversubscribed, OVERSUBSCRIBED_PATHS),
    "switch": (switch, SWITCH_PATHS),
    "bandwidth": (bandwidth, BANDWIDTH_PATHS),
}


def run(bench: CacheBench, console: Console) -> list[Row]:
    """Measures all parts and returns the rows of the result table; draws a progress bar on `console`.

    Raises:
        InvalidRequest: the file system of `data_dir` has no O_DIRECT.
        WrongBytes: a benchmark case did not move, or did not compute, what it was asked to. Its speed would be meaningless.
    """
    bench.data_dir.mkdir(parents=True, exist_ok=True)
    rows: list[Row] = []
    with torch_threads(bench.threads), passing_bar(console) as progress:
        total = len(bench.sizes) * (bench.rounds + 1) * sum(PARTS[part][1] for part in bench.parts)
        task = progress.add_task("", total=total)
        for part in bench.parts:
            for size in bench.sizes:
                progress.update(task, description=f"{part}, {size}")
                rows += _measure_part(bench, part, size, lambda: progress.advance(task))
    return rows


def _measure_part(bench: CacheBench, part: str, size: str, on_run: Callable[[], None]) -> list[Row]:
    with tempfile.TemporaryDirectory(prefix="bench-", dir=bench.data_dir) as directory:
        peers_disk.check_direct_io(Path(directory))
        setting = Setting(size=size, device=bench.torch_device, rounds=bench.rounds, directory=Path(directory))
        return PARTS[part][0](setting, on_run)


def facts(bench: CacheBench, *, command: str) -> dict[str, str]:
    """Returns the lines above the result table, by name, so that a reader can judge and repeat the measurement.

    They are the command, the commit, the machine, the versions, the device, and the number of rounds.
    """
    device = torch.cuda.get_device_name(bench.torch_device) if bench.torch_device.type == "cuda" else "cpu"
    return provenance.facts(bench.data_dir, command=command) | {
        "torch": torch.__version__,
        "device": f"{device}, {bench.threads} thread{'s' if bench.threads > 1 else ''}, float32",
        "rounds": f"{bench.rounds}, interleaved",
    }
