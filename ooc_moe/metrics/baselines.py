"""Stores the scores of random play and of constant actions in files, and reads them back.

`evaluation/baselines.py` measures the scores and writes them by this module. Reports and studies read them. Each file holds one game's
scores for one protocol (the settings with which it was played). The files lie below `DIRECTORY` in the directory of a run or of a study.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from ooc_moe.metrics.run import RunRecord

DIRECTORY = "baselines"
"""Name of the directory of the files, in a run's directory or a study's."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Protocol:
    """The settings with which a game is played to measure a score. Two scores can be compared if all these settings are equal."""

    eval_envs: int
    """Environments played side by side."""
    eval_episodes: int
    """Whole episodes that each environment plays."""
    eval_steps: int
    """The most steps of each environment."""
    seed: int
    """The seed of the run whose scores are compared with these."""

    @staticmethod
    def of(config: Mapping[str, Any]) -> Protocol | None:
        """Returns the protocol with which a run is evaluated, taken from its configuration.

        None if the configuration is an old one that lacks some of the settings.
        """
        names = [field.name for field in fields(Protocol)]
        return Protocol(**{name: config[name] for name in names}) if config.keys() >= set(names) else None


@dataclass(frozen=True, kw_only=True, slots=True)
class Baselines:
    """The mean raw returns (scores) of random play and of constant actions in one game. A constant action is played in every step."""

    game: str
    random_mean: float
    """Mean return of uniformly random actions, in the environments that a run with the same seed is evaluated in."""
    constant_means: list[float]
    """Mean return of playing only one action, for each action by number, in the same environments as `random_mean`."""
    best_action: int
    """The action with the highest mean in `constant_means`."""
    best_constant_mean: float
    """Mean return of `best_action` in other environments of the game. Its mean in `constant_means` is biased upwards, because it is the
    maximum of 18 noisy means."""
    best_constant_returns: list[float]
    """The returns of the episodes whose mean is `best_constant_mean`."""


def read_baselines(game: str, directory: Path, protocol: Protocol) -> Baselines | None:
    """Reads a game's scores from `directory`. Returns None if they were not measured with exactly this protocol."""
    path = _path(game, directory, protocol)
    return Baselines(**json.loads(path.read_text())) if path.exists() else None


def write_baselines(found: Baselines, directory: Path, protocol: Protocol) -> None:
    """Writes a game's scores to a file in `directory`, for `read_baselines`. The directory is made if it does not exist."""
    directory.mkdir(parents=True, exist_ok=True)
    path = _path(found.game, directory, protocol)
    unfinished = path.with_suffix(f".{os.getpid()}")  # A name per process: two runs with different seeds may write at the same time.
    unfinished.write_text(json.dumps(asdict(found)))
    unfinished.replace(path)


def best_constants(record: RunRecord) -> dict[str, float]:
    """Reads the mean return of the best constant action in each of a run's games: game -> return.

    Only games are included for which `ooc-moe eval --constants` measured this return, in the same way as the run is evaluated.
    """
    protocol = Protocol.of(record.config)
    if protocol is None:
        return {}
    found = {game: read_baselines(game, record.run_dir / DIRECTORY, protocol) for game in record.games}
    return {game: each.best_constant_mean for game, each in found.items() if each is not None}


def _path(game: str, directory: Path, protocol: Protocol) -> Path:
    sizes = f"{protocol.eval_envs}x{protocol.eval_episodes}-{protocol.eval_steps}"
    return directory / f"{game.replace('/', '-')}-{sizes}-seed{protocol.seed}.json"
