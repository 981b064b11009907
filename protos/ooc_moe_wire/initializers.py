"""Initial values of experts. They are the same on every machine and in every version of this package.

They are computed with exact float32 arithmetic from the output words of the random generator Philox 4x64-10 (Salmon et al. 2011, "Parallel
random numbers: as easy as 1, 2, 3"). numpy's own distributions are not used, because their streams may change between versions of numpy.
`tests/wire/test_initializers.py` compares the results with stored ("golden") values. An algorithm never changes; a new one gets a new name.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ooc_moe_wire.errors import InvalidRequest


@dataclass(frozen=True, slots=True)
class Initializer:
    """How a tensor's initial values are made: an algorithm and its parameter `value`.

    The algorithms are `zeros_v1`, `constant_v1` (each element is `value`) and `uniform_v1` (random, uniform on [-value, value)). The
    constructor rounds `value` to float32, because messages carry float32: so client and daemon have equal initializers.
    """

    algorithm: str = "zeros_v1"
    value: float = 0.0

    def __post_init__(self) -> None:
        if self.algorithm not in ("zeros_v1", "constant_v1", "uniform_v1"):
            raise InvalidRequest(f"initializer.algorithm: {self.algorithm!r} is not one of zeros_v1, constant_v1, uniform_v1")
        with np.errstate(over="ignore"):
            value = float(np.float32(self.value))
        if not np.isfinite(value):
            raise InvalidRequest(f"initializer.value: {self.value} is not a finite float32")
        object.__setattr__(self, "value", value)


def initialize(out: NDArray[np.generic], initializer: Initializer, *, seed: int, expert: int, tensor: int) -> None:
    """Fills a tensor with its initial values. The values depend on nothing but the arguments.

    Args:
        out: the tensor, a C-contiguous array that is written in place. `uniform_v1` needs float32.
        initializer: the algorithm and its value.
        seed: the bank's seed, 64 bits.
        expert: the expert's id in its bank.
        tensor: the tensor's index among all tensors of the expert, parameters first.
    """
    if initializer.algorithm == "uniform_v1":
        out.reshape(-1)[:] = _uniform(out.size, np.float32(initializer.value), seed=seed, expert=expert, tensor=tensor)
    else:
        out[...] = initializer.value if initializer.algorithm == "constant_v1" else 0


def _uniform(count: int, bound: np.float32, *, seed: int, expert: int, tensor: int) -> NDArray[np.float32]:
    """Makes `count` random floats, uniform on [-bound, bound), from the key (seed, expert) and the tensor's index.

    Each is made of the top 24 bits of a 32-bit word: an exact number on [-1, 1), times `bound`.
    """
    key = np.array([seed, expert], dtype=np.uint64)  # A plain list would be converted through float64, where seeds beyond 2^53 collide.
    words = np.random.Philox(key=key, counter=[0, 0, 0, tensor]).random_raw((count + 1) // 2)
    halves = words.astype("<u8").view("<u4")[:count]
    unit = (halves >> np.uint32(8)).astype(np.float32) * np.float32(2.0**-23) - np.float32(1.0)
    return unit * bound
