"""`Schedule`: the uses of experts that are still to come, told in advance, and how far one has got.

It is advice: a use that shares an expert with the next one is taken for it; one that nobody foretold leaves the schedule where it is, one
that comes out of turn moves it on. Knows nothing of slots or fetches.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ooc_moe_client.store import Sections

_STRIDE = 1 << 32  # Between the numbers of two uses; experts of one use are told apart by their ids, which are below.


@dataclass(frozen=True, slots=True)
class Use:
    """Experts that are needed at the same moment. ALL: they are updated, too."""

    experts: tuple[int, ...]
    sections: Sections = Sections.ALL


class Schedule:
    """The order of uses, and the next of them. Not thread-safe."""

    def __init__(self, uses: Iterable[Use] = ()) -> None:
        self._uses = list(uses)
        self._at = 0  # the next use
        self._uses_of: defaultdict[int, list[int]] = defaultdict(list)  # by expert, ascending
        self._same: defaultdict[tuple[int, ...], list[int]] = defaultdict(list)  # by what is used, ascending
        for number, use in enumerate(self._uses):
            self._same[use.experts].append(number)
            for expert in use.experts:
                self._uses_of[expert].append(number)

    @property
    def experts(self) -> Iterable[int]:
        """All that it names, those that are over included."""
        return self._uses_of.keys()

    @property
    def num_left(self) -> int:
        """Uses still to come."""
        return len(self._uses) - self._at

    def advance(self, experts: Sequence[int]) -> bool:
        """These are used now, in one call. False where others' next uses are not as they were: some were skipped, or it is the end."""
        if not self.num_left:
            return True
        number = _first(self._same.get(tuple(experts), ()), self._at)
        if number is None:
            if not any(expert in self._uses[self._at].experts for expert in experts):
                return True
            number = self._at
        in_turn = number == self._at
        self._at = number + 1
        return in_turn and self.num_left > 0

    def next_use(self, expert: int) -> int | None:
        """When the expert is used next: a number that grows with time, and is no other expert's. None where no use is known."""
        number = self._next(expert)
        return None if number is None else number * _STRIDE + expert

    def soon(self, num_experts: int) -> int:
        """Where the next uses, one at least, of up to `num_experts` different experts end: what is in them has a lower `next_use`."""
        used: set[int] = set()
        for number in range(self._at, len(self._uses)):
            used.update(self._uses[number].experts)
            if len(used) > num_experts:
                return max(number, self._at + 1) * _STRIDE
        return len(self._uses) * _STRIDE

    def next_sections(self, expert: int) -> Sections | None:
        """What its next use needs."""
        number = self._next(expert)
        return None if number is None else self._uses[number].sections

    def updated_within(self, expert: int, num_experts: int) -> bool:
        """Whether it is updated before more than `num_experts` different experts are used: so many slots keep it until then."""
        if expert not in self._uses_of:
            return False
        used = {expert}
        for number in range(self._at, len(self._uses)):
            use = self._uses[number]
            used.update(use.experts)
            if len(used) > num_experts:
                return False
            if use.sections is Sections.ALL and expert in use.experts:
                return True
        return False

    def _next(self, expert: int) -> int | None:
        return _first(self._uses_of.get(expert, ()), self._at)


def _first(numbers: Sequence[int], least: int) -> int | None:
    """The first of ascending numbers that is not below `least`."""
    index = bisect_left(numbers, least)
    return numbers[index] if index < len(numbers) else None
