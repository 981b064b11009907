"""Chooses torch's device and its number of threads, for the benchmarks of the cache and the learner."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from ooc_moe_wire.errors import InvalidRequest


def find_device(name: str) -> torch.device:
    """Returns the torch device called `name`; "auto" is the GPU where there is one, and the CPU otherwise.

    Raises:
        InvalidRequest: the name is not auto, cpu or cuda, or it is cuda and there is no GPU.
    """
    has_gpu = torch.cuda.is_available()
    if name not in ("auto", "cpu", "cuda") or (name == "cuda" and not has_gpu):
        raise InvalidRequest(f"device: {name!r} is not one of auto, cpu, cuda" if has_gpu else f"device: {name!r} is not one of auto, cpu")
    return torch.device(("cuda" if has_gpu else "cpu") if name == "auto" else name)


@contextmanager
def torch_threads(threads: int) -> Iterator[None]:
    """Lets torch use `threads` threads inside the block. Afterwards it uses as many as before."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)
