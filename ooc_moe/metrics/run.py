"""Reads a run's directory (config.json and metrics.jsonl) into arrays, from which figures and tables are made. The run may be unfinished.

This module computes only differences and sums; measures.py computes what they mean.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from ooc_moe.metrics.log import CONFIG_FILE, METRICS_FILE, Event, read_metrics
from ooc_moe.metrics.measures import Floats, cold_unchanged
from ooc_moe_wire.errors import InvalidRequest

UNKNOWN = float("nan")
_Usage = Mapping[str, Mapping[str, int]]
"""Layer -> expert -> tokens."""


@dataclass(frozen=True, kw_only=True)
class Scores:
    """Evaluation scores by phase (rows) and game (columns); NaN if the game was not evaluated then."""

    games: tuple[str, ...]
    trained_P: tuple[int, ...]
    """The column of the game that each phase trained."""
    mean_PG: Floats
    """Mean raw return."""
    random_G: Floats
    """Mean raw return of random play."""
    untrained_G: Floats
    """The agent's own score before any training, if evaluated; else random play's, because an agent that knows no game acts at random."""
    returns: dict[tuple[int, int], list[float]]
    """(phase, game) -> the returns of single episodes, whose mean is `mean_PG[phase, game]`."""


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """A run's configuration and events."""

    run_dir: Path
    config: dict[str, Any]
    events: list[Event]
    single_task: Mapping[str, float] = field(default_factory=dict)
    """Game -> mean raw return of an agent that learned this game alone; only games for which such a run was given (single_task.py)."""

    @staticmethod
    def read(run_dir: Path) -> RunRecord:
        """Reads a run. Raises InvalidRequest if the directory holds no run, or a damaged one."""
        config_file = run_dir / CONFIG_FILE
        if not config_file.exists() and not (run_dir / METRICS_FILE).exists():
            raise InvalidRequest(f"run_dir: {run_dir} holds no run (neither {CONFIG_FILE} nor {METRICS_FILE})")
        try:
            config = json.loads(config_file.read_text()) if config_file.exists() else {}
        except ValueError as error:
            raise InvalidRequest(f"{config_file}: not JSON ({error})") from error
        return RunRecord(run_dir=run_dir, config=config, events=read_metrics(run_dir))

    @property
    def name(self) -> str:
        """The run's name."""
        return self.run_dir.resolve().name

    @cached_property
    def schedule(self) -> tuple[str, ...]:
        """The games in order of training; a game may come back."""
        return tuple(self.config.get("games") or [event["to"] for event in self.switches])

    @cached_property
    def games(self) -> tuple[str, ...]:
        """The distinct games, in order of first training."""
        return tuple(dict.fromkeys(self.schedule))

    @cached_property
    def updates(self) -> list[Event]:
        """The PPO updates."""
        return self._of("update")

    @cached_property
    def switches(self) -> list[Event]:
        """The "switch" events, one at the beginning of each game's training."""
        return self._of("switch")

    @cached_property
    def evaluations(self) -> list[Event]:
        """The "evaluation" events, one for each phase and evaluated game."""
        return self._of("evaluation")

    @property
    def made_by(self) -> str:
        """Version and commit of the program that began the run; "" if they were not logged."""
        return next((f"{event['version']}, commit {event['commit']}" for event in self._of("begun")), "")

    @property
    def done(self) -> bool:
        """Whether the run has finished."""
        return bool(self._of("done"))

    @cached_property
    def steps_U(self) -> Floats:
        """Environment steps at each update."""
        return np.array([event["step"] for event in self.updates], float)

    @cached_property
    def spans(self) -> list[tuple[str, float, float]]:
        """(game, first step, last step) of each phase begun, up to the newest update."""
        starts = [float(event["step"]) for event in self.switches]
        ends = [*starts[1:], float(self.steps_U[-1]) if len(self.steps_U) else 0.0]
        return [(event["to"], start, max(start, end)) for event, start, end in zip(self.switches, starts, ends, strict=False)]

    def series(self, *path: str) -> Floats:
        """(U,) the number at `path` in each update's event, for example ("cache", "hits"); NaN where there is none."""
        return np.array([_number(event, path) for event in self.updates], float)

    def increments(self, *path: str, evaluations: bool = False) -> Floats:
        """(U,) how much the counter at `path` grew in each update.

        What an evaluation between two updates counted is left out; with `evaluations`, it is added to the update after the evaluation.
        """
        grown, between = [], 0.0
        for kind, growth in self._growth(path):
            if kind == "update":
                grown.append(growth + between)
                between = 0.0
            elif evaluations:
                between += growth
        return np.array(grown, float)

    def total(self, *path: str) -> float:
        """How much the counter at `path` grew over the run, evaluations included; NaN if it was never logged."""
        known = [growth for _, growth in self._growth(path) if not np.isnan(growth)]
        return float(sum(known)) if known else UNKNOWN

    def _growth(self, path: Sequence[str]) -> Iterator[tuple[str, float]]:
        """(kind of event, growth of the counter since the event before) for each event that logged the counter.

        - Counters of the trainer, and of a daemon that the run started itself, start at zero, and again when the run is resumed.
        - Counters of another daemon may be older than the run. Their first growth is not known: NaN.
        - A counter that fell has restarted from zero.
        - An evaluation logs how much it added. All other events log the counter's value.
        """
        own = path[0] != "store" or self.config.get("store") is None
        before = 0.0 if own else UNKNOWN
        for event in self.events:
            if event["event"] == "resumed" and own:
                before = 0.0
            if not isinstance(event.get(path[0]), dict):
                if event["event"] == "update":
                    yield "update", UNKNOWN
                continue
            # A counter that is missing in the event has not counted anything yet.
            value = float(np.nan_to_num(_number(event, path)))
            if event["event"] == "evaluation":
                before += value
                yield "evaluation", value
            else:
                yield event["event"], value if value < before else value - before
                before = value

    def last(self, *path: str) -> float:
        """The newest value at `path`; NaN if there is none."""
        values = (_number(event, path) for event in reversed(self.events) if event["event"] in ("update", "done"))
        return next((value for value in values if not np.isnan(value)), UNKNOWN)

    @cached_property
    def scores(self) -> Scores:
        """The evaluations as matrices."""
        phases = max((int(event["phase"]) for event in self.evaluations), default=-1) + 1
        column = {game: index for index, game in enumerate(self.games)}
        mean_PG = np.full((phases, len(column)), UNKNOWN)
        random_G, untrained_G = np.full(len(column), UNKNOWN), np.full(len(column), UNKNOWN)
        returns = {}
        for event in self.evaluations:
            phase, game, mean = int(event["phase"]), column.get(event["evaluated"]), _number(event, ("return_mean",))
            if game is None:
                continue
            random_G[game] = _number(event, ("random_mean",))
            if phase < 0:
                untrained_G[game] = mean
            else:
                mean_PG[phase, game] = mean
                returns[phase, game] = [float(value) for value in event.get("returns") or () if value is not None]
        return Scores(
            games=self.games,
            trained_P=tuple(column[game] for game in self.schedule[:phases]),
            mean_PG=mean_PG,
            random_G=random_G,
            untrained_G=np.where(np.isnan(untrained_G), random_G, untrained_G),
            returns=returns,
        )

    @cached_property
    def num_experts(self) -> int:
        """Experts of each bank: as configured, or more if the bank grew."""
        counted = (counts for event in self.updates for name in ("usage", "fetches") for counts in (event.get(name) or {}).values())
        seen = (int(expert) for counts in counted for expert in counts)
        return max(int(self.config.get("agent", {}).get("num_experts", 1)), max(seen, default=0) + 1)

    @cached_property
    def cold_unchanged(self) -> tuple[int, int]:
        """(number unchanged bit for bit, number of all) of the cold experts of all phases; (0, 0) if no checksums were logged.

        `measures.cold_unchanged` says what a cold expert is.
        """
        found = []
        before: dict[tuple[int, str], list[str]] = {}
        owner: dict[tuple[int, str], str] = {}  # With pools, the first game that uses an expert owns it; other games borrow it.
        trained: set[tuple[int, str]] = set()
        pools = self.config.get("agent", {}).get("routing") != "token"
        for event in self.events:
            if event["event"] == "update":
                used = {(self._bank_of(layer), expert) for layer, counts in (event.get("usage") or {}).items() for expert in counts}
                trained |= {expert for expert in used if owner.setdefault(expert, event["game"]) == event["game"] or not pools}
            elif event["event"] == "checksums":
                after = {(int(bank), expert): sums for bank, experts in event["experts"].items() for expert, sums in experts.items()}
                found.append(cold_unchanged(before, after, trained))
                before, trained = after, set()
        return sum(equal for equal, _ in found), sum(cold for _, cold in found)

    def training_fetches(self) -> Floats:
        """(G, E) how often each expert was fetched while each game was trained, on demand or ahead; all zero if fetches were not logged."""
        return self._usage([(event["game"], event.get("fetches") or {}) for event in self.updates])

    def training_usage(self) -> Floats:
        """(G, E) tokens of each game that went to each expert in training.

        Layers that share a bank are added up. If each layer has its own bank, the banks' experts stand side by side.
        """
        return self._usage([(event["game"], event.get("usage") or {}) for event in self.updates])

    def evaluation_usage(self) -> Floats:
        """(G, E) tokens of each game that went to each expert in the evaluations after the last phase; columns as in `training_usage`."""
        return self._usage([(event["evaluated"], event.get("usage") or {}) for event in self.last_evaluations])

    @property
    def last_evaluations(self) -> list[Event]:
        """The evaluations after the last evaluated phase."""
        newest = max((event["phase"] for event in self.evaluations), default=None)
        return [event for event in self.evaluations if event["phase"] == newest]

    def usage_by_environment(self) -> tuple[list[str], Floats]:
        """(game of each environment, (N, E) tokens) in the evaluations after the last phase; empty if this was not logged."""
        rows = [(event["evaluated"], usage) for event in self.last_evaluations for usage in event.get("usage_by_env") or ()]
        return [game for game, _ in rows], self._counts([usage for _, usage in rows])

    def _usage(self, rows: Sequence[tuple[str, _Usage]]) -> Floats:
        """(G, E) token counts by game and expert."""
        rows = [(game, usage) for game, usage in rows if usage]
        counts_RE = self._counts([usage for _, usage in rows])
        counts_GE = np.zeros((len(self.games), counts_RE.shape[1]))
        np.add.at(counts_GE, [self.games.index(game) for game, _ in rows], counts_RE)
        return counts_GE

    def _counts(self, usages: Sequence[_Usage]) -> Floats:
        """(R, E) token counts of each row; see `training_usage` for the columns."""
        banks = max((self._bank_of(layer) + 1 for usage in usages for layer in usage), default=1)
        counts_RE = np.zeros((len(usages), banks * self.num_experts))
        for row, usage in enumerate(usages):
            for layer, counts in usage.items():
                for expert, count in counts.items():
                    counts_RE[row, self._bank_of(layer) * self.num_experts + int(expert)] += count
        return counts_RE

    def _bank_of(self, layer: str) -> int:
        """The bank of a layer: 0 if all layers share one bank, else the layer's own number."""
        return 0 if self.config.get("agent", {}).get("banks", "shared") == "shared" else int(layer)

    def _of(self, kind: str) -> list[Event]:
        return [event for event in self.events if event["event"] == kind]


def _number(event: Event, path: Sequence[str]) -> float:
    value: Any = event
    for key in path:
        value = value.get(key) if isinstance(value, dict) else None
    # Protobuf's JSON writes 64-bit counters as strings.
    return UNKNOWN if value is None or isinstance(value, dict | list) else float(value)
