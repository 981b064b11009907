import errno
import mmap
import os

import pytest

from ooc_moe_server.nvme import slab as slab_module
from ooc_moe_server.nvme.slab import Slab, supports_direct_io

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


def grow(slab: Slab) -> range:
    slots = slab.begin_extend()
    slab.end_extend(slots, slab.extend(slots))
    return slots


def grown(path, direct, used=()):
    slab = Slab(path, SIZE, direct=direct, used=used)
    grow(slab)
    return slab


def trim(slab: Slab) -> list[int]:
    surplus = slab.begin_punch()
    slab.punch(surplus)
    slab.end_punch(surplus, None)
    return surplus


def disk_bytes(path) -> int:
    return path.stat().st_blocks * 512


def test_what_was_written_to_a_slot_is_read_from_it_after_a_reopen(tmp_path, direct):
    slab = grown(tmp_path / "a.slab", direct)
    slots = [slab.allocate() for _ in range(3)]
    for slot, letter in zip(slots, (b"a", b"b", b"c"), strict=True):
        slab.write(slot, record(letter))
    slab.sync()
    slab.close()
    again, into = Slab(tmp_path / "a.slab", SIZE, direct=direct, used=slots), record(b"-")
    again.read(slots[1], into)
    assert bytes(into) == b"b" * SIZE


def test_slots_in_use_are_not_given_out_after_a_reopen_and_free_ones_only_once_they_have_disk(tmp_path):
    slab = grown(tmp_path / "a.slab", False)
    count = slab.num_slots
    slab.close()
    again = Slab(tmp_path / "a.slab", SIZE, direct=False, used=[0, 2])
    assert again.allocate() is None
    assert [grow(again), grow(again)] == [range(1, 2), range(3, count)]
    assert [again.allocate() for _ in range(count - 2)] == [1, *range(3, count)]
    assert again.allocate() is None
    assert grow(again).start == count


def test_the_lowest_free_slot_is_taken_first(tmp_path):
    slab = grown(tmp_path / "a.slab", False)
    for _ in range(4):
        slab.allocate()
    slab.free(2)
    slab.free(1)
    assert [slab.allocate(), slab.allocate()] == [1, 2]


def test_reading_past_the_end_of_a_cut_file_is_an_error_and_its_slots_stay_used(tmp_path):
    path = tmp_path / "a.slab"
    grown(path, False).close()
    with path.open("r+b") as file:
        file.truncate(SIZE + 100)
    slab = Slab(path, SIZE, direct=False, used=[0, 1, 5])
    with pytest.raises(OSError, match="before the end of slot 1"):
        slab.read(1, record(b"-"))
    assert slab.num_slots == 6


def test_reads_and_writes_that_come_short_are_carried_on(tmp_path, monkeypatch):
    slab = grown(tmp_path / "a.slab", False)
    real_write, real_read = os.pwritev, os.preadv
    monkeypatch.setattr(os, "pwritev", lambda fd, buffers, offset: real_write(fd, [buffers[0][:3000]], offset))
    slab.write(1, record(b"x"))
    monkeypatch.setattr(os, "preadv", lambda fd, buffers, offset: real_read(fd, [buffers[0][:3000]], offset))
    slab.read(1, into := record(b"-"))
    assert bytes(into) == b"x" * SIZE


def test_a_write_that_gets_nowhere_is_an_error(tmp_path, monkeypatch):
    slab = grown(tmp_path / "a.slab", False)
    monkeypatch.setattr(os, "pwritev", lambda fd, buffers, offset: 0)
    with pytest.raises(OSError, match="slot 1") as caught:
        slab.write(1, record(b"x"))
    assert caught.value.errno == errno.EIO


def test_free_slots_beyond_the_reserve_lose_their_disk_and_get_it_again_before_they_are_used(tmp_path, monkeypatch):
    monkeypatch.setattr(slab_module, "RESERVE_BYTES", 4 * SIZE)
    path = tmp_path / "a.slab"
    slab = grown(path, False)
    count = slab.num_slots
    taken = [slab.allocate() for _ in range(count)]
    for slot in taken:
        slab.write(slot, record(b"x"))
    slab.sync()
    before = disk_bytes(path)
    for slot in taken[2:]:
        slab.free(slot)
    assert trim(slab) == taken[6:]  # Two are in use, four are kept.
    assert disk_bytes(path) == 6 * SIZE < before
    assert path.stat().st_size == count * SIZE  # The numbers of the slots stay.
    assert [slab.allocate() for _ in range(5)] == [*taken[2:6], None]
    assert grow(slab).start == 6
    assert disk_bytes(path) > 6 * SIZE
    assert slab.allocate() == 6
    slab.read(0, into := record(b"-"))
    assert bytes(into) == b"x" * SIZE


def test_a_slot_being_punched_cannot_be_taken(tmp_path, monkeypatch):
    monkeypatch.setattr(slab_module, "RESERVE_BYTES", 0)
    slab = grown(tmp_path / "a.slab", False)
    count = slab.num_slots
    assert len(slab.begin_punch()) == count
    assert slab.allocate() is None
    assert grow(slab).start == count


def test_the_disk_of_a_former_runs_free_slots_is_given_back_but_for_the_reserve(tmp_path, monkeypatch):
    monkeypatch.setattr(slab_module, "RESERVE_BYTES", 4 * SIZE)
    path = tmp_path / "a.slab"
    grown(path, False).close()
    slab = Slab(path, SIZE, direct=False, used=[7])
    trim(slab)
    assert disk_bytes(path) == 5 * SIZE


def test_where_files_cannot_be_punched_freed_slots_are_used_again_all_the_same(tmp_path, monkeypatch):
    monkeypatch.setattr(slab_module, "RESERVE_BYTES", 0)
    slab = grown(tmp_path / "a.slab", False)
    count, surplus = slab.num_slots, slab.begin_punch()
    slab.end_punch(surplus, OSError(errno.EOPNOTSUPP, "not supported"))
    assert slab.begin_punch() == []
    grow(slab)
    assert slab.allocate() == 0
    assert slab.num_slots == count


def test_a_condemned_slot_is_never_given_out_again_but_its_disk_is(tmp_path):
    path = tmp_path / "a.slab"
    slab = grown(path, False)
    count = slab.num_slots
    for _ in range(count):
        slab.allocate()
    slab.condemn(0)
    assert trim(slab) == [0]
    assert disk_bytes(path) == (count - 1) * SIZE
    assert grow(slab).start == count


def test_when_the_disk_has_no_room_for_many_slots_one_is_asked_for_and_the_others_stay_as_they_were(tmp_path, monkeypatch):
    slab = Slab(tmp_path / "a.slab", SIZE, direct=False)
    real = os.posix_fallocate

    def room_for_one(fd, offset, size):
        if size > SIZE:
            raise OSError(errno.ENOSPC, "full")
        real(fd, offset, size)

    monkeypatch.setattr(os, "posix_fallocate", room_for_one)
    grow(slab)
    assert [slab.allocate(), slab.allocate()] == [0, None]
    grow(slab)
    assert slab.allocate() == 1
