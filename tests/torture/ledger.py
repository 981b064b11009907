"""What a daemon promised, and therefore may answer: one `Cell` per expert, and one `Ledger` of all versions ever seen.

A cell keeps the last state that must survive a crash, and everything sent after it: what a crash may leave is one of these. Several
threads may use the ledger at once.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, field

from tests.torture.bodies import Tag


@dataclass(eq=False)
class Write:
    """A body that was sent for an expert. Its version is above `above`; it is None until an answer or a fetch tells it."""

    tag: Tag
    durable: bool = True
    version: int | None = None
    above: int = 0

    def explains(self, version: int, tag: Tag) -> bool:
        """Whether it may be what was found."""
        return self.tag == tag and (version > self.above if self.version is None else version == self.version)


@dataclass
class Cell:
    """One expert: `floor` survives a crash; of `later`, in the order of sending, any may have survived instead."""

    floor: Write
    later: list[Write] = field(default_factory=list)

    @property
    def newest(self) -> Write:
        """What was sent last."""
        return (self.later or [self.floor])[-1]

    def save(self, write: Write) -> None:
        """That write is safe now, and nothing before it can come back."""
        self.later = self.later[self.later.index(write) + 1 :] if write in self.later else self.later
        self.floor = write

    def explanation(self, version: int, tag: Tag) -> Write | None:
        """Which of the states that a crash may leave it is, if any."""
        return next((write for write in (self.floor, *self.later) if write.explains(version, tag)), None)


class Ledger:
    """Every version that any answer ever named, over all lives of a daemon: what it is never changes."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.newest = 0
        self.num_acknowledged = 0
        self.num_verified = 0
        self._meaning: dict[int, tuple[str, int, Tag]] = {}

    def note(self, bank: str, expert: int, version: int, tag: Tag) -> None:
        """A version was seen with these bytes."""
        with self.lock:
            if version == 0:
                assert tag.number == 0, f"bank {bank}, expert {expert}: version 0 is {tag}"
                return
            known = self._meaning.setdefault(version, (bank, expert, tag))
            assert known == (bank, expert, tag), f"version {version} was {known}, and is {(bank, expert, tag)} now"
            self.newest = max(self.newest, version)

    def acknowledged(self, bank: str, expert: int, cell: Cell, write: Write, version: int) -> None:
        """The daemon answered a push with a version."""
        with self.lock:
            assert write.version in (None, version), f"bank {bank}, expert {expert}: acknowledged {version}, but seen as {write.version}"
            assert version > write.above, (
                f"bank {bank}, expert {expert}: version {version} is not above {write.above}, which was known before"
            )
            write.version = version
            self.note(bank, expert, version, write.tag)
            self.num_acknowledged += 1
            if write.durable:
                cell.save(write)

    def seen(self, bank: str, expert: int, cell: Cell, version: int, tag: Tag, *, at_least: int) -> None:
        """A fetch that began when `at_least` was known gave this: a durable push becomes visible when it is safe, and not before."""
        with self.lock:
            self.num_verified += 1
            self.note(bank, expert, version, tag)
            assert version >= at_least, f"bank {bank}, expert {expert}: version {version} came after {at_least}"
            write = next((write for write in cell.later if write.tag == tag), None)
            if write is not None:
                assert write.version in (None, version), f"bank {bank}, expert {expert}: {version} was acknowledged as {write.version}"
                write.version = version
                if write.durable:
                    cell.save(write)

    def found(self, bank: str, expert: int, cell: Cell, version: int, tag: Tag) -> None:
        """After a crash the expert is this: from now on it must survive."""
        with self.lock:
            self.num_verified += 1
            self.note(bank, expert, version, tag)
            write = cell.explanation(version, tag)
            assert write is not None, f"bank {bank}, expert {expert}: version {version}, {tag} is explained by none of {cell}"
            write.version = version
            cell.floor, cell.later = write, []
