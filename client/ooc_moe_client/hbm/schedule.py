"""`Schedule`: the announced order in which experts will be used, and the trainer's position in it.

    uses       (0, 1)  (2, 3)  (0, 1)  (4,)
                       ^ the next use

From the schedule the cache learns which experts to evict last and which to fetch ahead. The trainer may deviate from the schedule. When it
asks for exactly the experts of the next or a later use, the position moves behind that use. When it asks for at least one expert of the
next use, the position moves behind the next use. When it asks for anything else, the position stays.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ooc_moe_client.store import Sections

_STRIDE = 1 << 32  # Between the numbers of two uses. The experts of one use are told apart by their ids, which are smaller.


@dataclass(frozen=True, slots=True)
class Use:
    """One step of a schedule: experts that are needed at the same time. With `sections` ALL they are updated, with PARAMETERS only read."""

    experts: tuple[int, ...]
    sections: Sections = Sections.ALL


class Schedule:
    """The uses (steps that need certain experts) in the order announced, and the number of the next use. Not thread-safe."""

    def __init__(self, uses: Iterable[Use] = ()) -> None:
        self._uses = list(uses)
        self._at = 0  # the number of the next use
        self._uses_of: defaultdict[int, list[int]] = defaultdict(list)  # by expert: the numbers of its uses, ascending
        self._same: defaultdict[tuple[int, ...], list[int]] = defaultdict(list)  # by experts: the numbers of their uses, ascending
        for number, use in enumerate(self._uses):
            self._same[use.experts].append(number)
            for expert in use.experts:
                self._uses_of[expert].append(number)

    @property
    def experts(self) -> Iterable[int]:
        """All experts that the schedule names, in past and in coming uses."""
        return self._uses_of.keys()

    @property
    def num_left(self) -> int:
        """The number of uses that are still to come."""
        return len(self._uses) - self._at

    def advance(self, experts: Sequence[int]) -> bool:
        """Moves the trainer's position in the schedule on, because these experts are asked for now, in one call.

        Returns True when the next uses of all other experts are the same as before. Returns False when some of these next uses have
        changed, because uses were skipped or the schedule has ended.
        """
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
        """A number that says when the expert is used next: the later the use, the higher. No two experts share a number.

        None: no use is known.
        """
        number = self._next(expert)
        return None if number is None else number * _STRIDE + expert

    def end_of_near_future(self, num_experts: int) -> int:
        """The end of the near future, as a number to compare with `next_use`: an expert with a lower number is needed soon.

        The near future is the next use, and as many of the uses after it as need at most `num_experts` different experts together.
        """
        used: set[int] = set()
        for number in range(self._at, len(self._uses)):
            used.update(self._uses[number].experts)
            if len(used) > num_experts:
                return max(number, self._at + 1) * _STRIDE
        return len(self._uses) * _STRIDE

    def next_sections(self, expert: int) -> Sections | None:
        """Which sections the expert's next use needs. None: no use is known."""
        number = self._next(expert)
        return None if number is None else self._uses[number].sections

    def updated_within(self, expert: int, num_experts: int) -> bool:
        """Whether the expert will be updated before a cache of `num_experts` slots has to evict it.

        That is so when the uses up to the expert's update need at most `num_experts` different experts.
        """
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
    """The first of these ascending numbers that is at least `least`. None: all are below it."""
    index = bisect_left(numbers, least)
    return numbers[index] if index < len(numbers) else None
