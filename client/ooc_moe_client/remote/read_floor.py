"""`ReadFloor`: for each expert, the oldest version that a fetch may still return.

This version, the expert's floor, is the newest one that the daemon acknowledged to this client. For example, once a push was acknowledged
as version 7, a fetch that returns version 6 would mean that the update was lost; such a fetch must raise an error.
"""

from __future__ import annotations

from collections.abc import Iterable

from ooc_moe_wire.errors import LostUpdate


class ReadFloor:
    """For each expert that this client pushed, its floor: the newest version that the daemon has acknowledged.

    A fetch that returns an older version than the floor is an error. Thread-safe, because each step is one operation on a dict.
    """

    def __init__(self) -> None:
        self._versions: dict[str, dict[int, int]] = {}

    def raise_to(self, bank: str, expert: int, version: int) -> None:
        """Raises the expert's floor (the oldest version that a fetch may return) to `version`.

        Call this when a push was acknowledged with that version.
        """
        versions = self._versions.setdefault(bank, {})
        versions[expert] = max(version, versions.get(expert, 0))

    def forget(self, bank: str) -> None:
        """Drops the floors (oldest versions that a fetch may return) of a bank's experts.

        Call this when the bank was deleted or restored, so older versions are right.
        """
        self._versions.pop(bank, None)

    def of(self, bank: str, experts: Iterable[int]) -> dict[int, int]:
        """The floors of these experts now (oldest versions that a fetch may return). Experts that this client never pushed are left out."""
        versions = self._versions.get(bank)
        return {expert: versions[expert] for expert in experts if expert in versions} if versions else {}

    def lost_update(self, bank: str, expert: int, version: int, floor: int) -> LostUpdate | None:
        """Returns the error for a fetch that returned an expert in a version older than its floor. `floor`: as it was when the fetch began.

        None: `version` is new enough, or the bank's floors were dropped since the fetch began.
        """
        if version >= floor or not self.of(bank, (expert,)):
            return None
        return LostUpdate(f"bank {bank!r}, expert {expert}: the store gave version {version}, but had acknowledged {floor}")
