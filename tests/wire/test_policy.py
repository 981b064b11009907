"""Each policy beside a slow twin: LRU and Belady beside lists, S3-FIFO beside the paper's algorithm written down plainly."""

import itertools
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from ooc_moe_wire.errors import InvalidRequest
from ooc_moe_wire.policy import LRU, S3FIFO, Belady, make_policy


class LRUTwin:
    """Keys, the least recently used first."""

    def __init__(self):
        self.order = []

    def insert(self, key, size):
        self.order.append(key)

    def touch(self, key):
        self.order.append(self.order.pop(self.order.index(key)))

    def rename(self, old, new):
        self.order[self.order.index(old)] = new

    def remove(self, key):
        self.order.remove(key)

    evict = remove

    def victims(self):
        return list(self.order)


class S3FIFOTwin:
    """Two lists of [key, size, uses] and one of ghosts, all with the oldest first."""

    def __init__(self):
        self.small, self.main, self.ghosts = [], [], []

    def insert(self, key, size):
        is_ghost = any(ghost[0] == key for ghost in self.ghosts)
        self.ghosts = [ghost for ghost in self.ghosts if ghost[0] != key]
        (self.main if is_ghost else self.small).append([key, size, 0])

    def find(self, key):
        return next(item for item in self.small + self.main if item[0] == key)

    def touch(self, key):
        item = self.find(key)
        item[2] = min(3, item[2] + 1)

    def rename(self, old, new):
        self.ghosts = [ghost for ghost in self.ghosts if ghost[0] != new]
        self.find(old)[0] = new

    def remove(self, key):
        self.small = [item for item in self.small if item[0] != key]
        self.main = [item for item in self.main if item[0] != key]

    def room(self):
        return sum(size for _, size, _ in self.small + self.main)

    def evict_one(self, pinned=()):
        """One eviction, as in the paper. What is pinned is set aside where it would leave, and put back to its place at the end."""
        room, aside = self.room(), []
        while True:
            from_small = bool(self.small) and 10 * sum(size for _, size, _ in self.small) >= self.room()
            queue = self.small if from_small else self.main
            item = queue.pop(0)
            if item[2] > (1 if from_small else 0):
                item[2] = 0 if from_small else item[2] - 1
                self.main.append(item)
            elif item[0] in pinned:
                aside.append((item, queue))
            else:
                break
        for kept, queue in reversed(aside):
            queue.insert(0, kept)
        if from_small:
            self.ghosts.append(item)
        while 10 * sum(size for _, size, _ in self.ghosts) > 9 * room:
            self.ghosts.pop(0)
        return item[0]

    def victims(self):
        future = S3FIFOTwin()
        future.small, future.main = ([list(item) for item in queue] for queue in (self.small, self.main))
        return [future.evict_one() for _ in self.small + self.main]

    def evict(self, key):
        victims = self.victims()
        assert self.evict_one(pinned=victims[: victims.index(key)]) == key


class BesideItsTwin(RuleBasedStateMachine):
    """Random use by a caller with pins; keys come back after they left."""

    policy_type, twin_type = LRU, LRUTwin

    @initialize()
    def begin(self):
        self.policy, self.twin = self.policy_type(), self.twin_type()
        self.residents, self.names = [], itertools.count(1000)

    @rule(key=st.integers(0, 30), size=st.integers(1, 5))
    def insert(self, key, size):
        if key not in self.residents:
            self.residents.append(key)
            self.policy.insert(key, size)
            self.twin.insert(key, size)

    @precondition(lambda self: self.residents)
    @rule(data=st.data(), times=st.integers(1, 4))
    def touch(self, data, times):
        key = data.draw(st.sampled_from(self.residents))
        for _ in range(times):
            self.policy.touch(key)
            self.twin.touch(key)

    @precondition(lambda self: self.residents)
    @rule(data=st.data())
    def remove(self, data):
        key = data.draw(st.sampled_from(self.residents))
        self.residents.remove(key)
        self.policy.remove(key)
        self.twin.remove(key)

    @precondition(lambda self: self.residents)
    @rule(data=st.data(), fresh=st.booleans())
    def rename(self, data, fresh):
        old = data.draw(st.sampled_from(self.residents))
        new = next(self.names) if fresh else old % 31
        if new not in self.residents:
            self.residents[self.residents.index(old)] = new
            self.policy.rename(old, new)
            self.twin.rename(old, new)

    @precondition(lambda self: self.residents)
    @rule(num_pinned=st.integers(0, 3))
    def evict_the_first_that_is_not_pinned(self, num_pinned):
        victims = list(self.policy.victims())
        victim = victims[min(num_pinned, len(victims) - 1)]
        self.residents.remove(victim)
        self.policy.evict(victim)
        self.twin.evict(victim)

    @invariant()
    def victims_come_in_the_twins_order_and_looking_changes_nothing(self):
        next(self.policy.victims(), None)
        assert list(self.policy.victims()) == list(self.policy.victims()) == self.twin.victims()


class S3FIFOBesideItsTwin(BesideItsTwin):
    policy_type, twin_type = S3FIFO, S3FIFOTwin


TestLRUBesideItsTwin = BesideItsTwin.TestCase
TestS3FIFOBesideItsTwin = S3FIFOBesideItsTwin.TestCase


def run(policy, trace, capacity) -> list[bool]:
    """Whether each access was a hit."""
    residents, hits = set(), []
    for key in trace:
        hits.append(key in residents)
        if key in residents:
            policy.touch(key)
            continue
        if len(residents) == capacity:
            victim = next(policy.victims())
            policy.evict(victim)
            residents.remove(victim)
        policy.insert(key)
        residents.add(key)
    return hits


def most_hits(trace, capacity) -> int:
    """Of any policy at all: every choice is tried, all states at once."""
    states = {frozenset(): 0}  # The most hits so far, by what is resident.
    for key in trace:
        following = {}
        for residents, hits in states.items():
            if key in residents:
                choices, gain = [residents], 1
            elif len(residents) < capacity:
                choices, gain = [residents | {key}], 0
            else:
                choices, gain = [residents - {victim} | {key} for victim in residents], 0
            for choice in choices:
                following[choice] = max(following.get(choice, 0), hits + gain)
        states = following
    return max(states.values())


@given(st.lists(st.integers(0, 5), min_size=1, max_size=30), st.integers(1, 4))
def test_no_policy_at_all_beats_belady(trace, capacity):
    assert sum(run(Belady(trace), trace, capacity)) == most_hits(trace, capacity)


@given(st.lists(st.integers(0, 5), min_size=1, max_size=30))
def test_beladys_victims_come_in_order_of_their_next_use_the_furthest_first(trace):
    policy = Belady(trace)
    seen = set()
    for position, key in enumerate(trace):
        (policy.touch if key in seen else policy.insert)(key)
        seen.add(key)
        rest = trace[position + 1 :]
        distances = [rest.index(victim) if victim in rest else len(trace) for victim in policy.victims()]
        assert len(distances) == len(seen)
        assert distances == sorted(distances, reverse=True)


def test_beladys_notes_stay_small_however_long_the_trace():
    trace = [0, 1] * 5000
    policy = Belady(trace)
    run(policy, trace, 2)
    assert len(policy._furthest) < 200


def test_a_scan_used_once_passes_a_tenth_of_s3_fifo_and_flushes_lru():
    hot, scan = list(range(20)), list(range(1000, 1200))
    trace = hot * 5 + scan + hot
    for policy, kept in ((LRU(), 0), (S3FIFO(), 20)):
        assert sum(run(policy, trace, 30)[-20:]) == kept


def test_s3_fifo_remembers_what_left_its_small_queue_not_long_ago():
    policy = S3FIFO()
    run(policy, range(12), 10)  # 0 and 1 left.
    policy.insert(0)
    policy.insert(100)
    order = list(policy.victims())
    assert order.index(0) > order.index(11)  # It is in the main queue, 100 at the end of the small one.
    assert order[-2:] == [100, 0]


def test_s3_fifo_remembers_no_more_ghosts_than_its_main_queue_holds():
    policy = S3FIFO()
    run(policy, range(1000), 10)
    assert list(policy._ghosts) == list(range(981, 990))


def test_a_long_run_with_pins_ahead_stays_quick():
    """A hundred pinned keys at the front are passed over by every eviction, and no more than passed over."""
    policy, rng = S3FIFO(), random.Random(1)
    residents = list(range(200))
    for key in residents:
        policy.insert(key)
    pinned = set(range(100))
    for key in range(200, 1200):
        policy.touch(rng.choice(residents))
        victim = next(victim for victim in policy.victims() if victim not in pinned)
        policy.evict(victim)
        residents.remove(victim)
        policy.insert(key)
        residents.append(key)
    assert pinned <= set(residents)
    assert set(policy.victims()) == set(residents)


@pytest.mark.parametrize("policy", [LRU, S3FIFO, lambda: Belady([3])], ids=["lru", "s3fifo", "belady"])
@pytest.mark.parametrize("operation", ["touch", "remove", "evict"])
def test_a_key_that_is_not_resident_is_an_error(policy, operation):
    with pytest.raises(KeyError):
        getattr(policy(), operation)(3)


def test_policies_are_made_by_name_and_know_theirs():
    for name in ("lru", "s3fifo"):
        assert make_policy(name).name == name
    assert make_policy("lru") is not make_policy("lru")
    with pytest.raises(InvalidRequest, match="policy: 'fifo' is not one of lru, s3fifo"):
        make_policy("fifo")
