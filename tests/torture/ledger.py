"""What a daemon acknowledged, and so what it may answer after a crash: a `Cell` for each expert, and a `Ledger` of all versions.

A cell has the last state that must survive a crash, and every state that was sent after it. A crash may leave any one of these. Several
threads may use the ledger at once.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, field

from tests.torture.bodies import Tag


@dataclass(eq=False)
class Write:
    """A body that was sent for an expert; `tag` stands for its bytes.

    Its `version` is None until an answer or a fetch shows it, and is higher than `above`, the newest version known when it was sent.
    """

    tag: Tag
    durable: bool = True
    version: int | None = None
    above: int = 0

    def explains(self, version: int, tag: Tag) -> bool:
        """Whether this write may be the state that was found, with this version and these bytes."""
        return self.tag == tag and (version > self.above if self.version is None else version == self.version)


@dataclass
class Cell:
    """The states of one expert that a crash may leave: `floor`, the last one that must survive, and `later`, those sent after it."""

    floor: Write
    later: list[Write] = field(default_factory=list)

    @property
    def newest(self) -> Write:
        """The state that was sent last."""
        return (self.later or [self.floor])[-1]

    def save(self, write: Write) -> None:
        """Notes that a write must survive crashes from now on, and that no older state may come back."""
        self.later = self.later[self.later.index(write) + 1 :] if write in self.later else self.later
        self.floor = write

    def explanation(self, version: int, tag: Tag) -> Write | None:
        """Returns the write that explains the state found after a crash, or None if that state is not allowed."""
        return next((write for write in (self.floor, *self.later) if write.explains(version, tag)), None)


class Ledger:
    """The bytes of every version that an answer ever named. A version's bytes must never change, not even after restarts.

    Methods raise AssertionError when an answer contradicts what is noted.
    """

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.newest = 0
        self.num_acknowledged = 0
        self.num_verified = 0
        self._meaning: dict[int, tuple[str, int, Tag]] = {}

    def note(self, bank: str, expert: int, version: int, tag: Tag) -> None:
        """Notes which bytes a version has; asserts that they are the same as when it was noted before."""
        with self.lock:
            if version == 0:
                assert tag.number == 0, f"bank {bank}, expert {expert}: version 0 is {tag}"
                return
            known = self._meaning.setdefault(version, (bank, expert, tag))
            assert known == (bank, expert, tag), f"version {version} was {known}, and is {(bank, expert, tag)} now"
            self.newest = max(self.newest, version)

    def acknowledged(self, bank: str, expert: int, cell: Cell, write: Write, version: int) -> None:
        """Notes that the daemon acknowledged `write` under this version. A durable write must survive crashes from now on."""
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
        """Notes the result of a fetch; asserts that its version is at least `at_least`, a version known to be stored when the fetch began.

        A durable push becomes visible only when it survives a crash, so a state that was seen must survive too.
        """
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
        """Notes the state that was found after a crash, which must survive from now on. Asserts that the cell allows it."""
        with self.lock:
            self.num_verified += 1
            self.note(bank, expert, version, tag)
            write = cell.explanation(version, tag)
            assert write is not None, f"bank {bank}, expert {expert}: version {version}, {tag} is explained by none of {cell}"
            write.version = version
            cell.floor, cell.later = write, []
