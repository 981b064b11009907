"""Checks of arguments that the detector and its baseline share. Each raises InvalidRequest."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ooc_moe_wire.errors import InvalidRequest


def check_knows_a_game(games: Sequence[str]) -> None:
    """Checks that at least one game was added, without which no prediction is possible."""
    if not games:
        raise InvalidRequest("detector: asked for a prediction before any game was added")


def index_of_game(game: str, games: Sequence[str]) -> int:
    """The position of a game among the known games. Refuses a game that is not among them."""
    if game not in games:
        raise InvalidRequest(f"game: the detector does not know {game!r}, only {', '.join(games) or 'nothing yet'}")
    return games.index(game)


def check_usage(expert_usage_E: Tensor, num_experts: int) -> None:
    """Checks that the usage has one count for each expert."""
    if expert_usage_E.shape != (num_experts,):
        raise InvalidRequest(f"expert_usage: shape {tuple(expert_usage_E.shape)}, but there are {num_experts} experts")
