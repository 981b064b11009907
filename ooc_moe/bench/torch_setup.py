"""Chooses torch's device and its number of threads, for the benchmarks of the cache and the learner."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from ooc_moe.session.session import check_device


def find_device(name: str) -> torch.device:
    """Returns the torch device called `name`; "auto" is the GPU where there is one, and the CPU otherwise.

    Raises:
        InvalidRequest: the name is neither auto nor a device that torch can use here.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    check_device(name)
    return torch.device(name)


@contextmanager
def torch_threads(threads: int) -> Iterator[None]:
    """Lets torch use `threads` threads inside the block. Afterwards it uses as many as before."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)
