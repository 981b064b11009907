"""Derives seeds from the run's seed and a purpose, so that random draws for one game or bank never change those for another."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager


def derived_seed(seed: int, *purpose: str | int) -> int:
    """Returns a 63-bit seed for a purpose, for example `derived_seed(run_seed, "game", name)`. Equal arguments give equal seeds."""
    text = "\0".join(str(part) for part in (seed, *purpose))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


def evaluation_seed(seed: int, game: str) -> int:
    """Returns the seed of the environments in which a game is evaluated.

    Training never uses this seed. All evaluations of the game in a run use the same seed.
    """
    return derived_seed(seed, "evaluation", game) % 2**31


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Sets torch's global CPU generator to `seed` for as long as the `with` block runs, and restores its state afterwards."""
    import torch  # Imported here only: configurations use the other functions, also where torch is not installed.

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield
