"""What a store was acknowledged, and so must see again: the newest version of each expert that a push answered.

Knows nothing of planes or calls.
"""

from __future__ import annotations

from collections.abc import Iterable

from ooc_moe_wire.errors import LostUpdate


class Acknowledged:
    """Versions by bank and expert. Thread-safe: each step is one operation on a dict."""

    def __init__(self) -> None:
        self._versions: dict[str, dict[int, int]] = {}

    def note(self, bank: str, expert: int, version: int) -> None:
        """A push was acknowledged with this version."""
        versions = self._versions.setdefault(bank, {})
        versions[expert] = max(version, versions.get(expert, 0))

    def forget(self, bank: str) -> None:
        """The bank was deleted, or taken back to an earlier state."""
        self._versions.pop(bank, None)

    def of(self, bank: str, experts: Iterable[int]) -> dict[int, int]:
        """The versions of those experts that have one: what a fetch that begins now must answer at least."""
        versions = self._versions.get(bank)
        return {expert: versions[expert] for expert in experts if expert in versions} if versions else {}

    def lost(self, bank: str, expert: int, version: int, least: int) -> LostUpdate | None:
        """The error of a fetch that had to answer `least`; None when the version is new enough, or the bank was forgotten meanwhile."""
        if version >= least or not self.of(bank, (expert,)):
            return None
        return LostUpdate(f"bank {bank!r}, expert {expert}: the store gave version {version}, but had acknowledged {least}")
