"""Seeds that are derived from the run's seed and a purpose, so that the draws for one game or bank never shift those for another."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager


def derived_seed(seed: int, *purpose: str | int) -> int:
    """Returns a 63-bit seed for a purpose, for example `derived_seed(run_seed, "game", name)`. Equal arguments give equal seeds."""
    text = "\0".join(str(part) for part in (seed, *purpose))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


def evaluation_seed(seed: int, game: str) -> int:
    """Returns the seed of the environments that evaluation uses: never used in training, and the same after every phase."""
    return derived_seed(seed, "evaluation", game) % 2**31


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Runs its body with torch's global CPU generator at `seed`, and puts the generator back afterwards."""
    import torch  # Imported here only: configurations use the other functions, also where torch is not installed.

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield
