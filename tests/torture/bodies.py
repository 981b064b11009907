"""Bodies that show where they come from, so that a torn body is recognised: any fetched body either equals one that was sent, or is torn.

A body begins with its tag (bank, expert, push); the rest are random numbers drawn from the tag. Initial values have no tag; they come from
the bank's seed.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import numpy as np

from ooc_moe_wire.initializers import Initializer
from ooc_moe_wire.layout import BankSpec, Layout, TensorSpec

_MARK = 86028121.0  # Above any initial value.


class Tag(NamedTuple):
    """Names the content of a body: its bank (by seed), its expert and the number of the push; number 0 is the initial value."""

    bank: int
    expert: int
    number: int


def layout_of(num_bytes: int) -> Layout:
    """Returns a layout of one tensor in each section, of about `num_bytes` together. The sections have different padding."""
    floats = max(8, num_bytes // 8)
    parameters = (TensorSpec(name="w", shape=(floats,), initializer=Initializer("uniform_v1", 0.5)),)
    return Layout(parameters=parameters, optimizer=(TensorSpec(name="m", shape=(floats,)),))


def spec_of(name: str, layout: Layout, tag_bank: int, num_experts: int) -> BankSpec:
    """Returns the spec of a bank whose initial bodies come from the seed `tag_bank`, the bank's number in tags."""
    return BankSpec(name=name, num_experts=num_experts, layout=layout, seed=tag_bank)


def body_of(layout: Layout, tag: Tag) -> bytes:
    """Returns the body that a tag names. The same tag gives the same bytes."""
    if tag.number == 0:
        return _initial(layout, tag.bank, tag.expert)
    random = np.random.Generator(np.random.Philox(key=np.array([tag.bank << 32 | tag.expert, tag.number], dtype=np.uint64)))
    floats = random.random(layout.body_bytes // 4, dtype=np.float32)
    floats[:4] = (_MARK, *tag)
    return floats.tobytes()


def tag_of(layout: Layout, bank: int, expert: int, body: bytes | bytearray | memoryview) -> Tag:
    """Returns the tag of a fetched body, or of its parameter section, and checks all its bytes.

    A body without a tag must be the initial value of expert `expert` in the bank with seed `bank`.

    Raises:
        AssertionError: the body was never sent: it is torn or mixed.
    """
    mark, *fields = np.frombuffer(body, dtype=np.float32, count=4)
    tag = Tag(*map(int, fields)) if mark == np.float32(_MARK) else Tag(bank, expert, 0)
    assert body_of(layout, tag)[: len(body)] == bytes(body), f"expert {expert}: the body is torn; it begins as {tag}"
    return tag


@lru_cache(maxsize=4096)
def _initial(layout: Layout, seed: int, expert: int) -> bytes:
    body = bytearray(layout.body_bytes)
    layout.initialize(body, seed=seed, expert=expert)
    return bytes(body)
