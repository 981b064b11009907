"""Checks the arguments of the detector and of its baseline. A failed check raises InvalidRequest."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ooc_moe_wire.errors import InvalidRequest


def check_knows_a_game(games: Sequence[str]) -> None:
    """Raises InvalidRequest if no game was added yet, because without one no prediction is possible."""
    if not games:
        raise InvalidRequest("detector: asked for a prediction before any game was added")


def index_of_game(game: str, games: Sequence[str]) -> int:
    """The position of a game in the list of known games. Raises InvalidRequest if the game is not in the list."""
    if game not in games:
        raise InvalidRequest(f"game: the detector does not know {game!r}, only {', '.join(games) or 'nothing yet'}")
    return games.index(game)


def check_usage(expert_usage_E: Tensor, num_experts: int) -> None:
    """Raises InvalidRequest unless `expert_usage_E`, which counts the uses of experts, has one count for each of `num_experts`."""
    if expert_usage_E.shape != (num_experts,):
        raise InvalidRequest(f"expert_usage: shape {tuple(expert_usage_E.shape)}, but there are {num_experts} experts")
