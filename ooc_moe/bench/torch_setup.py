"""The device that a benchmark of the trainer's side runs on."""

from __future__ import annotations

import torch

from ooc_moe_wire.errors import InvalidRequest


def device_of(name: str) -> torch.device:
    """`auto` is the GPU where there is one. Raises InvalidRequest for another name, or a device that is not here."""
    has_gpu = torch.cuda.is_available()
    if name not in ("auto", "cpu", "cuda") or (name == "cuda" and not has_gpu):
        raise InvalidRequest(f"device: {name!r} is not auto, or a device that is here")
    return torch.device(("cuda" if has_gpu else "cpu") if name == "auto" else name)
