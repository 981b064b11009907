"""The command `games`: lists the games that can be played, and what each of them needs."""

from __future__ import annotations

import fnmatch
import importlib.util
from dataclasses import dataclass
from typing import Annotated, Any

from ooc_moe.cli.options import JsonOption
from ooc_moe.cli.output import Column, print_records, say
from ooc_moe_wire.command_line import Flag, closest
from ooc_moe_wire.errors import InvalidRequest

LOOKS = ("@1", "@2", "...", "@flip", "@turn")
COLUMNS = (
    Column("game", "game"),
    Column("needs", "needs"),
    Column("random", "random play", lambda score: f"{score:,.1f}", right=True),
    Column("reference", "reference", lambda score: f"{score:,.1f}", right=True),
    Column("reference_is", "which is"),
)


@dataclass(frozen=True, kw_only=True)
class Games(JsonOption):
    """List the games that can be played, what each needs, and the reference scores with which its scores are compared.

    A pixel game may be played in another look: pixel/catch@1, @2, ... has another background, @flip is upside down, @turn has rows for
    columns.

    $ ooc-moe games
    $ ooc-moe games 'k*'
    $ ooc-moe games pixel --json
    """

    pattern: Annotated[str, Flag(positional=True, metavar="PATTERN")] = ""
    """Only games whose name contains this text, or matches it if it has * or ?."""

    def run(self) -> None:
        """Prints the list of games whose name matches the pattern."""
        games = matching_games(self.pattern)
        print_records(COLUMNS, games, as_json=self.as_json)
        if not self.as_json and any(game["looks"] for game in games):
            say(f"pixel games take a look after their name, for example pixel/catch@1: {' '.join(LOOKS)}")


def matching_games(pattern: str) -> list[dict[str, Any]]:
    """Returns a record for each game whose name contains `pattern`, or matches `pattern` if that has * or ?.

    A record holds the game's name, what it needs, and its reference scores. Raises InvalidRequest if no name matches.
    """
    from ooc_moe.envs import ATARI_GAMES, PIXEL_GAMES

    names = [*ATARI_GAMES, *PIXEL_GAMES]
    wanted = pattern.lower() if any(sign in pattern for sign in "*?[") else f"*{pattern.lower()}*"
    found = [name for name in names if fnmatch.fnmatchcase(name, wanted)]
    if not found:
        raise InvalidRequest(f"pattern: {pattern!r} matches no game{closest(pattern, names)}")
    has_atari = importlib.util.find_spec("ale_py") is not None
    return [_game(name, has_atari) for name in found]


def _game(name: str, has_atari: bool) -> dict[str, Any]:
    from ooc_moe.envs import REFERENCE_SCORES

    random, reference = REFERENCE_SCORES[name]
    pixel = name.startswith("pixel/")
    needs = "nothing" if pixel else "ale-py (installed)" if has_atari else "ale-py: pip install 'ooc-moe[atari]'"
    return {
        "game": name,
        "kind": "pixel" if pixel else "atari",
        "needs": needs,
        "playable": pixel or has_atari,
        "random": random,
        "reference": reference,
        "reference_is": "best play" if pixel else "human",
        "looks": list(LOOKS) if pixel else [],
    }
