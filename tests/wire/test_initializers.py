"""Golden values: what a bank named years ago must still begin with. A failure here is never repaired by changing the values."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ooc_moe_wire.errors import InvalidRequest
from ooc_moe_wire.initializers import Initializer, initialize

MASK = (1 << 64) - 1


def philox_4x64_10(counter: list[int], key: list[int]) -> list[int]:
    """The slow twin: Salmon et al. 2011, section 3.3, in Python's integers."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        low, high = 0xD2E7470EE14C6C93 * c0, 0xCA5A826395121157 * c2
        c0, c1, c2, c3 = (high >> 64) ^ c1 ^ k0, high & MASK, (low >> 64) ^ c3 ^ k1, low & MASK
        k0, k1 = (k0 + 0x9E3779B97F4A7C15) & MASK, (k1 + 0xBB67AE8584CAA73B) & MASK
    return [c0, c1, c2, c3]


def slow_uniform(count: int, bound: float, *, seed: int, expert: int, tensor: int) -> list[np.float32]:
    halves = []
    for block in range(-(-count // 8)):
        for word in philox_4x64_10([block + 1, 0, 0, tensor], [seed, expert]):
            halves += [word & 0xFFFFFFFF, word >> 32]
    return [np.float32((half >> 8) * 2.0**-23 - 1.0) * np.float32(bound) for half in halves[:count]]


def uniform(count: int, bound: float, *, seed: int, expert: int, tensor: int) -> np.ndarray:
    out = np.full(count, np.nan, dtype=np.float32)
    initialize(out, Initializer("uniform_v1", bound), seed=seed, expert=expert, tensor=tensor)
    return out


def bits(values: np.ndarray) -> list[int]:
    return [int(word) for word in values.view(np.uint32)]


def test_the_twin_agrees_with_the_published_answers():
    assert philox_4x64_10([0] * 4, [0] * 2) == [0x16554D9ECA36314C, 0xDB20FE9D672D0FDC, 0xD7E772CEE186176B, 0x7E68B68AEC7BA23B]
    assert philox_4x64_10([MASK] * 4, [MASK] * 2) == [0x87B092C3013FE90B, 0x438C3C67BE8D0224, 0x9CC7D7C69CD777B6, 0xA09CAEBF594F0BA0]


@pytest.mark.parametrize(
    ("where", "golden"),
    [
        ({"bound": 1.0, "seed": 0, "expert": 0, "tensor": 0}, [0xBF6E3650, 0xBF7A168C, 0x3E654628, 0xBF0453AA, 0xBE89BF48]),
        (
            {"bound": 0.125, "seed": 1234567890123456789, "expert": 255, "tensor": 3},
            [0xBDE9FAB8, 0x3A4EA300, 0x3DBDBCDC, 0xBD8008C8, 0xBD858CE0],
        ),
        (
            {"bound": 0.1, "seed": 2**64 - 1, "expert": 2**40 - 1, "tensor": 12},
            [0x3C5774C0, 0xBDAFC35F, 0xBD24A0A7, 0x3DC21B8F, 0x3C96675A],
        ),
    ],
)
def test_uniform_v1_keeps_its_golden_bits(where, golden):
    assert bits(uniform(5, **where)) == golden


@given(
    count=st.integers(1, 40),
    bound=st.floats(0, 100, width=32),
    seed=st.integers(0, MASK),
    expert=st.integers(0, 2**40),
    tensor=st.integers(0, 100),
)
def test_uniform_v1_equals_its_slow_twin(count, bound, seed, expert, tensor):
    where = {"seed": seed, "expert": expert, "tensor": tensor}
    assert bits(uniform(count, bound, **where)) == bits(np.array(slow_uniform(count, bound, **where), dtype=np.float32))


def test_a_longer_tensor_begins_with_the_shorter_ones_values():
    where = {"seed": 7, "expert": 1, "tensor": 0}
    assert bits(uniform(1001, 1.0, **where))[:13] == bits(uniform(13, 1.0, **where))


def test_seed_expert_and_tensor_each_change_the_values():
    places = [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (2**63, 0, 0), (2**63 + 1, 0, 0), (MASK, 0, 0)]
    drawn = [tuple(bits(uniform(4, 1.0, seed=seed, expert=expert, tensor=tensor))) for seed, expert, tensor in places]
    assert len(set(drawn)) == len(places)


def test_uniform_v1_covers_its_interval_evenly():
    values = uniform(100_000, 0.5, seed=3, expert=4, tensor=5)
    assert values.min() >= -0.5
    assert values.max() < 0.5
    counts, _ = np.histogram(values, bins=10, range=(-0.5, 0.5))
    assert np.abs(counts - 10_000).max() < 500


@pytest.mark.parametrize(("algorithm", "expected"), [("zeros_v1", 0), ("constant_v1", 3)])
def test_zeros_and_constants_fill_any_shape(algorithm, expected):
    out = np.full((3, 4), 9, dtype=np.int64)
    initialize(out, Initializer(algorithm, 3.0), seed=0, expert=0, tensor=0)
    assert (out == expected).all()


def test_a_value_is_held_as_the_float32_that_the_wire_carries():
    assert Initializer("constant_v1", 0.1) == Initializer("constant_v1", float(np.float32(0.1)))


@pytest.mark.parametrize(
    ("algorithm", "value", "named"),
    [
        ("normal_v1", 1.0, "initializer.algorithm: 'normal_v1'"),
        ("uniform_v1", float("nan"), "initializer.value: nan"),
        ("constant_v1", float("inf"), "initializer.value: inf"),
        ("constant_v1", 1e39, "initializer.value: 1e\\+39"),
    ],
)
def test_an_initializer_that_means_nothing_is_refused(algorithm, value, named):
    with pytest.raises(InvalidRequest, match=named):
        Initializer(algorithm, value)
