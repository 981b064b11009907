"""`ReadFloor`: the oldest version of each expert that a store may still be shown.

A store whose push was acknowledged with version 7 must never again be given version 6: the update would be lost unnoticed.
"""

from __future__ import annotations

from collections.abc import Iterable

from ooc_moe_wire.errors import LostUpdate


class ReadFloor:
    """The newest acknowledged version of each expert, by bank. Thread-safe: each step is one operation on a dict."""

    def __init__(self) -> None:
        self._versions: dict[str, dict[int, int]] = {}

    def raise_to(self, bank: str, expert: int, version: int) -> None:
        """Notes that a push of the expert was acknowledged with this version."""
        versions = self._versions.setdefault(bank, {})
        versions[expert] = max(version, versions.get(expert, 0))

    def forget(self, bank: str) -> None:
        """Drops the floor of a whole bank, because the bank was deleted or brought back to an earlier state on purpose."""
        self._versions.pop(bank, None)

    def of(self, bank: str, experts: Iterable[int]) -> dict[int, int]:
        """The floor of each of these experts that has one. It holds for fetches that begin now."""
        versions = self._versions.get(bank)
        return {expert: versions[expert] for expert in experts if expert in versions} if versions else {}

    def lost_update(self, bank: str, expert: int, version: int, floor: int) -> LostUpdate | None:
        """The error of a fetch that got `version` and began when the floor was `floor`.

        None when the version is new enough, or when the bank's floor was dropped since.
        """
        if version >= floor or not self.of(bank, (expert,)):
            return None
        return LostUpdate(f"bank {bank!r}, expert {expert}: the store gave version {version}, but had acknowledged {floor}")
