"""The options of `ooc-moe bench cache`. Importing this module does not import torch, so that the command's help starts at once."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, get_args

from ooc_moe.bench.option_checks import check_sizes
from ooc_moe.config.agent import PRESETS, Preset
from ooc_moe_wire.command_line import Flag
from ooc_moe_wire.errors import InvalidRequest, require_at_least

if TYPE_CHECKING:
    import torch

DeviceName = Literal["auto", "cpu", "cuda"]
Part = Literal["steady", "oversubscribed", "switch", "bandwidth"]
LAYER_SIZES: tuple[Preset, ...] = ("full", "demo", "tiny")
LAYER_ROUNDS, LAYER_QUICK_ROUNDS = 15, 3
SIZES: tuple[Preset, ...] = ("full", "demo")
ROUNDS, QUICK_ROUNDS = 5, 1


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerBench:
    """The options of the layer benchmark. It measures every combination of a preset in `sizes`, a number of tokens, and a pool size.

    Raises:
        InvalidRequest: a preset is unknown, a number is too small, or the device is not there.
    """

    device: DeviceName = "auto"
    """Device of the experts; auto is cuda if there is one."""
    threads: int = 1
    """Threads of torch."""
    rounds: int = LAYER_ROUNDS
    """Interleaved rounds."""
    sizes: tuple[Preset, ...] = LAYER_SIZES
    """Presets whose expert sizes are measured."""
    tokens: tuple[int, ...] = (512, 4096)
    """Tokens of one call of the layer."""
    pools: tuple[int, ...] = (4, 16)
    """Experts of the layer's pool."""

    def __post_init__(self) -> None:
        check_sizes(self.sizes)
        for size in self.sizes:
            for pool in self.pools:
                if pool < PRESETS[size].top_k:
                    raise InvalidRequest(f"pools: {pool} experts are fewer than top_k {PRESETS[size].top_k}")
        require_at_least(1, threads=self.threads, rounds=self.rounds)
        for tokens in self.tokens:
            require_at_least(1, tokens=tokens)
        assert self.torch_device  # Raises InvalidRequest if torch cannot use the device.

    @property
    def torch_device(self) -> torch.device:
        """The device to measure on, with "auto" resolved to cuda or cpu."""
        from ooc_moe.bench.torch_setup import find_device

        return find_device(self.device)


@dataclass(frozen=True, kw_only=True, slots=True)
class CacheBench:
    """The options of `ooc-moe bench cache`: which parts to measure, and for which presets.

    Each part is measured for each preset in `sizes`.

    Raises:
        InvalidRequest: a preset is unknown, a number is below 1, or the device is not there.
    """

    parts: tuple[Part, ...] = get_args(Part)
    """What to measure. steady: steps of one game; oversubscribed: steps of a game that needs twice the HBM; switch: a switch to another
    game; bandwidth: fetches."""
    device: DeviceName = "auto"
    """Device of the experts; auto is cuda if there is one."""
    threads: int = 1
    """Threads of torch."""
    rounds: int = ROUNDS
    """Interleaved rounds."""
    sizes: tuple[Preset, ...] = SIZES
    """Presets whose expert sizes are measured."""
    data_dir: Annotated[Path, Flag(metavar="DIR")] = Path()
    """A directory on the disk to measure. A new directory is made in it, and removed at the end."""

    def __post_init__(self) -> None:
        check_sizes(self.sizes)
        require_at_least(1, threads=self.threads, rounds=self.rounds)
        assert self.torch_device  # Raises InvalidRequest if torch cannot use the device.

    @property
    def torch_device(self) -> torch.device:
        """The device to measure on, with "auto" resolved to cuda or cpu."""
        from ooc_moe.bench.torch_setup import find_device

        return find_device(self.device)
