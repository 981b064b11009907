import pytest
from hypothesis import given
from hypothesis import strategies as st

from ooc_moe_wire.sizes import parse_size


@pytest.mark.parametrize(
    ("text", "num_bytes"),
    [
        ("4096", 4096),
        ("0", 0),
        ("1B", 1),
        ("1KiB", 1024),
        ("512MiB", 512 * 1024**2),
        ("8 GiB", 8 * 1024**3),
        ("  8gib ", 8 * 1024**3),
        ("2TiB", 2 * 1024**4),
        ("1kB", 1000),
        ("3MB", 3 * 1000**2),
        ("1GB", 1000**3),
        ("1.5GiB", 3 * 1024**3 // 2),
        ("0.3KiB", 307),
        ("9007199254740993", 9007199254740993),
    ],
)
def test_a_size_is_its_number_times_its_unit(text, num_bytes):
    assert parse_size(text) == num_bytes


@given(st.integers(0, 2**63))
def test_whole_numbers_are_exact(num_bytes):
    assert parse_size(str(num_bytes)) == num_bytes


@pytest.mark.parametrize("text", ["", "GiB", "-1GiB", "1 G", "1XiB", "1e9", "1,5GiB", "1GiB2", ".5GiB", "inf", "nan"])
def test_what_is_not_a_size_is_refused_by_its_text(text):
    with pytest.raises(ValueError, match="is not a size") as caught:
        parse_size(text)
    assert repr(text) in str(caught.value)
