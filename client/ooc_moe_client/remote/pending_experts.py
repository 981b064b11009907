"""`PendingExperts`: the experts of one fetch that have not come yet, and the checks of each expert that comes.

It serves fetches by gRPC messages and fetches through shared memory.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import cast

from ooc_moe_client.remote.read_floor import ReadFloor
from ooc_moe_client.store import Fetched, Priority, Sections, Tier
from ooc_moe_client.validation import check_memory
from ooc_moe_wire.codec import HOLDS_NONE, Checksums, compare
from ooc_moe_wire.errors import CorruptRecord, Internal, OocMoeError
from ooc_moe_wire.layout import Layout
from ooc_moe_wire.v1 import expert_pb2

_TIERS = {tier.value: tier for tier in Tier}


class PendingExperts:
    """The experts of one fetch that have not come yet, and where their bytes go. Each call to the daemon reports here what came.

    `ExpertStore.fetch` documents the arguments.

    Attributes:
        experts: the experts that have neither come nor failed, each with the version that the caller has (or None).
        error: the error of the first expert that failed; None when none has.
    """

    def __init__(
        self,
        bank: str,
        layout: Layout,
        experts: Sequence[int],
        *,
        into: Callable[[int], memoryview],
        sections: Sections,
        priority: Priority,
        known_versions: Sequence[int | None] | None,
        read_floor: ReadFloor,
    ) -> None:
        self.bank = bank
        self.layout = layout
        self.sections = sections
        self.num_bytes = sections.num_bytes(layout)  # of each expert
        self.experts: dict[int, int | None] = dict(zip(experts, known_versions or [None] * len(experts), strict=True))
        self.error: OocMoeError | None = None
        self._into = into
        self._priority = priority
        self._sends_known_versions = known_versions is not None
        self._read_floor = read_floor
        self._floors: dict[int, int] = {}  # by expert: the read floor when the present call was opened

    def request(self, num_experts_max: int | None = None) -> expert_pb2.FetchExpertsRequest:
        """Makes the message that asks for the missing experts, at most `num_experts_max` of them (None: all).

        Make it just before the call is opened: it also notes which versions the call must not fall below (see read_floor.py).
        """
        asked = dict(itertools.islice(self.experts.items(), num_experts_max))
        self._floors = self._read_floor.of(self.bank, asked)
        known_versions = [HOLDS_NONE if version is None else version for version in asked.values()]
        return expert_pb2.FetchExpertsRequest(
            bank=self.bank,
            experts=list(asked),
            sections=cast(expert_pb2.Sections.ValueType, self.sections.value),
            known_versions=known_versions if self._sends_known_versions else [],
            priority=cast(expert_pb2.Priority.ValueType, self._priority.value),
        )

    def what(self, expert: int) -> str:
        """The bank and the expert as text, for error messages."""
        return f"bank {self.bank!r}, expert {expert}"

    def check_wanted(self, expert: int) -> None:
        """Raises Internal when the daemon sends an expert that was not asked for, or that has already come."""
        if expert not in self.experts:
            raise Internal(f"{self.what(expert)}: it was not asked for, or came twice")

    def memory_for(self, expert: int) -> memoryview:
        """Returns the caller's memory for an expert's bytes. Raises InvalidRequest when it has the wrong size."""
        memory = self._into(expert)
        check_memory(self.bank, expert, memory, self.num_bytes)
        return memory

    def is_sound(self, expert: int, received: Checksums, expected: Checksums) -> bool:
        """Whether the checksums of the received bytes are the expected ones. If not, marks the expert as failed."""
        try:
            compare(received, expected, whole=self.sections is Sections.ALL, what=self.what(expert))
        except CorruptRecord as error:
            self.fail(expert, error)
            return False
        return True

    def arrive(self, expert: int, version: int, tier: int, *, unchanged: bool = False) -> Fetched | None:
        """Takes an expert, whose bytes are complete, off the missing experts. Returns the `Fetched` that the store yields for the expert.

        None: the version is older than one that the store had acknowledged to this client, so an update was lost; the expert is marked as
        failed.

        Args:
            expert: the expert's id.
            version: the version that came.
            tier: the number of the `Tier` where the daemon found it.
            unchanged: whether the caller has this version already, and no bytes came.
        """
        floor = self._floors.get(expert)
        if floor is not None and (lost := self._read_floor.lost_update(self.bank, expert, version, floor)) is not None:
            self.fail(expert, lost)
            return None
        del self.experts[expert]
        return Fetched(expert=expert, version=version, served_from=_TIERS[tier], unchanged=unchanged)

    def fail(self, expert: int, error: OocMoeError) -> None:
        """Marks an expert as failed. The first such error is kept in `error`, to be raised when all other experts have come."""
        self.error = self.error or error
        del self.experts[expert]
