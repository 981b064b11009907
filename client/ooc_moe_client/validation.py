"""Checks of the arguments of fetches and pushes, which every store makes before it sends or stores anything.

All stores share these checks, so a mistake gives the same error in each store.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ooc_moe_client.store import Push
from ooc_moe_wire.errors import InvalidRequest
from ooc_moe_wire.layout import Layout


def check_distinct(bank: str, experts: Sequence[int]) -> None:
    """Raises InvalidRequest when the list of expert ids is empty, or an id is negative or repeated."""
    if not experts:
        raise InvalidRequest(f"bank {bank!r}: experts is empty")
    seen: set[int] = set()
    for expert in experts:
        if expert < 0:
            raise InvalidRequest(f"bank {bank!r}: expert {expert} is negative")
        if expert in seen:
            raise InvalidRequest(f"bank {bank!r}: expert {expert} is repeated")
        seen.add(expert)


def check_known_versions(bank: str, experts: Sequence[int], known_versions: Sequence[int | None] | None) -> None:
    """Raises InvalidRequest when `known_versions` is given and does not have one entry per expert."""
    if known_versions is not None and len(known_versions) != len(experts):
        raise InvalidRequest(f"bank {bank!r}: {len(known_versions)} known_versions for {len(experts)} experts")


def checked_bodies(bank: str, layout: Layout, pushes: Sequence[Push]) -> list[memoryview]:
    """Checks the arguments of a push. Returns the body of each expert to push as flat bytes, without a copy, in order.

    Raises:
        InvalidRequest: there is no push, an expert is repeated, a body has the wrong length, or a tensor, which the message names, holds
            NaN or infinity.
    """
    check_distinct(bank, [push.expert for push in pushes])
    bodies = [np.frombuffer(push.body, dtype=np.uint8).data for push in pushes]
    for push, body in zip(pushes, bodies, strict=True):
        if len(body) != layout.body_bytes:
            raise InvalidRequest(f"bank {bank!r}, expert {push.expert}: body is {len(body)} bytes, the layout has {layout.body_bytes}")
        tensor = layout.nonfinite_tensor(body)
        if tensor is not None:
            raise InvalidRequest(f"bank {bank!r}, expert {push.expert}: tensor {tensor!r} holds NaN or infinity; nothing was pushed")
    return bodies


def check_memory(bank: str, expert: int, memory: memoryview, num_bytes: int) -> None:
    """Raises InvalidRequest when the memory that the caller gave for a fetched expert is not `num_bytes` long."""
    if len(memory) != num_bytes:
        raise InvalidRequest(f"bank {bank!r}, expert {expert}: {len(memory)} bytes of memory for {num_bytes} bytes")
