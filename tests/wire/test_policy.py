import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from ooc_moe_wire.policy import LRU


class LRUBesideItsTwin(RuleBasedStateMachine):
    """The twin is a list, the least recently used first."""

    def __init__(self):
        super().__init__()
        self.lru = LRU[int]()
        self.twin: list[int] = []

    def resident(self, data) -> int:
        return data.draw(st.sampled_from(self.twin))

    @rule(key=st.integers(0, 1000))
    def insert(self, key):
        if key not in self.twin:
            self.lru.insert(key)
            self.twin.append(key)

    @precondition(lambda self: self.twin)
    @rule(data=st.data())
    def touch(self, data):
        key = self.resident(data)
        self.lru.touch(key)
        self.twin.append(self.twin.pop(self.twin.index(key)))

    @precondition(lambda self: self.twin)
    @rule(data=st.data())
    def remove(self, data):
        key = self.resident(data)
        self.lru.remove(key)
        self.twin.remove(key)

    @invariant()
    def victims_come_in_the_twins_order(self):
        assert list(self.lru.victims()) == self.twin


TestLRUBesideItsTwin = LRUBesideItsTwin.TestCase


@pytest.mark.parametrize("operation", ["touch", "remove"])
def test_a_key_that_is_not_resident_is_an_error(operation):
    with pytest.raises(KeyError):
        getattr(LRU[int](), operation)(3)
