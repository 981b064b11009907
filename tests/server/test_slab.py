import mmap

import pytest

from ooc_moe_server.slab import Slab, supports_direct_io

SIZE = 8192


def record(letter: bytes) -> memoryview:
    """Aligned memory full of a letter."""
    memory = mmap.mmap(-1, SIZE)
    memory.write(letter * SIZE)
    return memoryview(memory)


@pytest.fixture(params=[True, False], ids=["direct", "buffered"])
def direct(request, tmp_path):
    if request.param and not supports_direct_io(tmp_path):
        pytest.skip("this file system has no O_DIRECT")
    return request.param


def grown(path, direct, used=()):
    slab = Slab(path, SIZE, direct=direct, used=used)
    slab.added(slab.extend())
    return slab


def test_what_was_written_to_a_slot_is_read_from_it_after_a_reopen(tmp_path, direct):
    slab = grown(tmp_path / "a.slab", direct)
    slots = [slab.take() for _ in range(3)]
    for slot, letter in zip(slots, (b"a", b"b", b"c"), strict=True):
        slab.write(slot, record(letter))
    slab.sync()
    slab.close()
    again, into = Slab(tmp_path / "a.slab", SIZE, direct=direct, used=slots), record(b"-")
    again.read(slots[1], into)
    assert bytes(into) == b"b" * SIZE


def test_slots_in_use_are_not_given_out_after_a_reopen(tmp_path):
    slab = grown(tmp_path / "a.slab", False)
    count = slab.num_slots
    slab.close()
    again = Slab(tmp_path / "a.slab", SIZE, direct=False, used=[0, 2])
    assert [again.take() for _ in range(count - 2)] == [1, *range(3, count)]
    assert again.take() is None


def test_the_lowest_free_slot_is_taken_first(tmp_path):
    slab = grown(tmp_path / "a.slab", False)
    for _ in range(4):
        slab.take()
    slab.give_back(2)
    slab.give_back(1)
    assert [slab.take(), slab.take()] == [1, 2]


def test_reading_past_the_end_of_a_cut_file_is_an_error_and_its_slots_stay_used(tmp_path):
    path = tmp_path / "a.slab"
    grown(path, False).close()
    with path.open("r+b") as file:
        file.truncate(SIZE + 100)
    slab = Slab(path, SIZE, direct=False, used=[0, 1, 5])
    with pytest.raises(OSError, match="before the end of slot 1"):
        slab.read(1, record(b"-"))
    assert slab.num_slots == 6
