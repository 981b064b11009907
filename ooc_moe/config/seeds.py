"""Seeds that depend on what they are for, so that nothing drawn for one game or bank shifts what another one draws."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager


def derived_seed(seed: int, *purpose: str | int) -> int:
    """A 63-bit seed for a purpose, for example `derived_seed(run_seed, "game", name)`: equal arguments, equal seed."""
    text = "\0".join(str(part) for part in (seed, *purpose))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


def evaluation_seed(seed: int, game: str) -> int:
    """Of the environments that a run of this seed is evaluated in: held out from training, the same after every phase."""
    return derived_seed(seed, "evaluation", game) % 2**31


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Runs its body with torch's global CPU generator at `seed`, and puts the generator back afterwards."""
    import torch  # Only here: configurations need the seeds alone, also where there is no torch.

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield
