from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ooc_moe_server.dram.extents import Extent, Extents

CAPACITY = 64


def check(extents: Extents[str], owned: list[Extent[str]]) -> None:
    tiles = list(extents)
    assert [tile.start for tile in tiles] == [0, *(tile.end for tile in tiles[:-1])]
    assert tiles[-1].end == CAPACITY
    assert [tile for tile in tiles if tile.owner] == sorted(owned, key=lambda extent: extent.start)
    assert extents.free_bytes == CAPACITY - sum(extent.size for extent in owned)
    assert not any(left.owner is None and right.owner is None for left, right in pairwise(tiles)), "holes touch"


@given(st.lists(st.tuples(st.booleans(), st.integers(1, 24), st.integers(0, 99))))
def test_extents_tile_the_space_under_any_sequence_of_allocations_and_frees(steps):
    extents: Extents[str] = Extents(CAPACITY)
    owned: list[Extent[str]] = []
    for allocate, size, pick in steps:
        if allocate:
            holes = [hole.size for hole in extents if hole.owner is None]
            extent = extents.allocate(size, "x")
            assert (extent is None) == (max(holes, default=0) < size)
            if extent:
                owned.append(extent)
        elif owned:
            extents.free(owned.pop(pick % len(owned)))
        check(extents, owned)


@given(st.lists(st.tuples(st.integers(1, 12), st.sampled_from(["free", "moves", "stays"])), min_size=1, max_size=20), st.data())
def test_freeing_a_window_always_makes_the_room_it_promised_and_never_moves_what_must_stay(pieces, data):
    extents: Extents[str] = Extents(CAPACITY)
    owned = [extent for size, owner in pieces if (extent := extents.allocate(size, owner))]
    for extent in [extent for extent in owned if extent.owner == "free"]:
        extents.free(extent)
        owned.remove(extent)
    movable = [extent for extent in owned if extent.owner == "moves"]
    if not movable:
        return
    size = data.draw(st.integers(1, CAPACITY))
    window = extents.window(data.draw(st.sampled_from(movable)), size, lambda owner: owner == "moves")
    if window is None:
        return
    assert all(extent.owner == "moves" for extent in window)
    for extent in window:
        extents.free(extent)
    assert extents.allocate(size, "new") is not None


def test_an_equal_sized_record_takes_exactly_its_victims_place():
    extents: Extents[int] = Extents(40)
    victims = [extents.allocate(10, number) for number in range(4)]
    assert extents.window(victims[2], 10, lambda owner: True) == [victims[2]]


def test_a_larger_record_takes_holes_before_it_takes_neighbours():
    extents: Extents[str] = Extents(40)
    first, victim, hole, _last = (extents.allocate(10, name) for name in ("first", "victim", "hole", "last"))
    extents.free(hole)
    assert extents.window(victim, 20, lambda owner: True) == [victim]
    assert extents.window(victim, 40, lambda owner: owner != "last") is None
    assert {extent.owner for extent in extents.window(victim, 30, lambda owner: owner != "last")} == {"victim", "first"}
    assert first.owner == "first"


def test_an_extent_cannot_be_freed_twice():
    extents: Extents[str] = Extents(40)
    extent = extents.allocate(10, "x")
    extents.free(extent)
    with pytest.raises(AssertionError, match="freed twice"):
        extents.free(extent)
