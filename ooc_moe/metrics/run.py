"""Reads a run's directory (config.json and metrics.jsonl) into arrays, from which charts and tables are made. The run may be unfinished.

This module computes only differences and sums of logged numbers. From its arrays, measures.py computes measures such as forgetting.

Letters of shapes: P phases (a phase is the time in which one game is trained), G games, U PPO updates, E experts, N environments.
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
    """The scores of a run's evaluations, by phase (rows, P) and game (columns, G). NaN where a game was not evaluated after a phase.

    A phase is the training in one game; a game that is trained again has several phases. `games` names the columns.
    """

    games: tuple[str, ...]
    trained_P: tuple[int, ...]
    """For each phase, the column of the game that it trained."""
    mean_PG: Floats
    """The mean raw return (score) of each game after each phase."""
    random_G: Floats
    """The mean raw return of random play in each game."""
    untrained_G: Floats
    """The agent's score before any training, if it was evaluated then. Else the score of random play, because an untrained agent acts at
    random."""
    returns: dict[tuple[int, int], list[float]]
    """(phase, game) -> the returns of single episodes, whose mean is `mean_PG[phase, game]`."""


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """A run as read from its files: its configuration, its logged events, and the figures that are computed from them."""

    run_dir: Path
    config: dict[str, Any]
    events: list[Event]
    single_task: Mapping[str, float] = field(default_factory=dict)
    """Game -> mean raw return of an agent that learned this game alone; only games for which such a run was given (single_task.py)."""

    @staticmethod
    def read(run_dir: Path) -> RunRecord:
        """Reads a run from its directory. Raises InvalidRequest if the directory holds no run, or a damaged one."""
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
        """The run's name: that of its directory."""
        return self.run_dir.resolve().name

    @cached_property
    def schedule(self) -> tuple[str, ...]:
        """The games in the order in which they are trained. A game that is trained again later appears again."""
        return tuple(self.config.get("games") or [event["to"] for event in self.switches])

    @cached_property
    def games(self) -> tuple[str, ...]:
        """The games of the run, each once, in the order of their first training."""
        return tuple(dict.fromkeys(self.schedule))

    @cached_property
    def updates(self) -> list[Event]:
        """The "update" events, one for each PPO update."""
        return self._of("update")

    @cached_property
    def switches(self) -> list[Event]:
        """The "switch" events, one for each time that the training in a game begins."""
        return self._of("switch")

    @cached_property
    def evaluations(self) -> list[Event]:
        """The "evaluation" events: after each phase (the training in one game), one for each game that was evaluated."""
        return self._of("evaluation")

    @property
    def made_by(self) -> str:
        """The version and commit of the program that began the run. "" if they were not logged."""
        return next((f"{event['version']}, commit {event['commit']}" for event in self._of("begun")), "")

    @property
    def done(self) -> bool:
        """Whether the run has finished."""
        return bool(self._of("done"))

    @cached_property
    def steps_U(self) -> Floats:
        """The environment steps that the run had made at each update, (U,)."""
        return np.array([event["step"] for event in self.updates], float)

    @cached_property
    def spans(self) -> list[tuple[str, float, float]]:
        """When each game was trained: (game, first step, last step) of each phase so far. The newest phase ends at the newest update."""
        starts = [float(event["step"]) for event in self.switches]
        ends = [*starts[1:], float(self.steps_U[-1]) if len(self.steps_U) else 0.0]
        return [(event["to"], start, max(start, end)) for event, start, end in zip(self.switches, starts, ends, strict=False)]

    def series(self, *path: str) -> Floats:
        """One number from each update's event, (U,), for example `series("cache", "hits")`. NaN where the event lacks it.

        `path` holds the keys that lead to the number in the event's nested dicts.
        """
        return np.array([_number(event, path) for event in self.updates], float)

    def increments(self, *path: str, evaluations: bool = False) -> Floats:
        """How much a counter grew in each update, (U,). `path` holds the keys that lead to the counter in an event's dicts.

        Growth during an evaluation between two updates is left out. With `evaluations`, it is added to the update after the evaluation.
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
        """How much a counter grew over the whole run, evaluations included. NaN if the counter was never logged.

        `path` holds the keys that lead to the counter in an event's nested dicts.
        """
        known = [growth for _, growth in self._growth(path) if not np.isnan(growth)]
        return float(sum(known)) if known else UNKNOWN

    def _growth(self, path: Sequence[str]) -> Iterator[tuple[str, float]]:
        """How much a counter grew from each event that logged it to the next: yields (kind of event, growth) for each such event.

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
        """The newest value of one number in the events, for example `last("cache", "capacity")`. NaN if it was never logged."""
        values = (_number(event, path) for event in reversed(self.events) if event["event"] in ("update", "done"))
        return next((value for value in values if not np.isnan(value)), UNKNOWN)

    @cached_property
    def scores(self) -> Scores:
        """The scores of all evaluations, as a matrix of phases and games."""
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
        """The number of experts of each bank: as configured, or more if the bank has grown."""
        counted = (counts for event in self.updates for name in ("usage", "fetches") for counts in (event.get(name) or {}).values())
        seen = (int(expert) for counts in counted for expert in counts)
        return max(int(self.config.get("agent", {}).get("num_experts", 1)), max(seen, default=0) + 1)

    @cached_property
    def cold_unchanged(self) -> tuple[int, int]:
        """Counts the cold experts of all phases: (how many stayed unchanged bit for bit, how many there were).

        A phase is the training in one game. Its cold experts were trained before it and are not trained in it. (0, 0) if no checksums were
        logged.
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
        """How often each expert was fetched into HBM while each game was trained, (G, E), on demand or ahead of its use.

        All zero if fetches were not logged. Columns are experts, in the order of the columns of `training_usage`.
        """
        return self._usage([(event["game"], event.get("fetches") or {}) for event in self.updates])

    def training_usage(self) -> Floats:
        """How many tokens of each game went to each expert in training, (G, E).

        The columns are the experts of a bank; the counts of all layers that share the bank are added up. If each layer has its own bank,
        the columns are the experts of the first bank, then those of the second, and so on.
        """
        return self._usage([(event["game"], event.get("usage") or {}) for event in self.updates])

    def evaluation_usage(self) -> Floats:
        """How many tokens of each game went to each expert in the newest evaluation of the run, (G, E).

        Rows are the games of the run. Columns are the experts of a bank; if each layer has its own bank, those of the first bank, then
        the experts of the second, and so on.
        """
        return self._usage([(event["evaluated"], event.get("usage") or {}) for event in self.last_evaluations])

    @property
    def last_evaluations(self) -> list[Event]:
        """The "evaluation" events of the newest evaluation of the run, one event for each game that was evaluated then."""
        newest = max((event["phase"] for event in self.evaluations), default=None)
        return [event for event in self.evaluations if event["phase"] == newest]

    def usage_by_environment(self) -> tuple[list[str], Floats]:
        """How often each environment used each expert in the newest evaluation of the run. No rows if the run did not log this.

        An environment is one copy of a game; an evaluation may play several copies at once.

        Returns:
            The games that the N environments played, and a matrix (N, E): how many tokens of each environment went to each expert. Its
                columns are the experts of a bank; if each layer has its own bank, the experts of the first bank, then those of the second,
                and so on.
        """
        rows = [(event["evaluated"], usage) for event in self.last_evaluations for usage in event.get("usage_by_env") or ()]
        return [game for game, _ in rows], self._counts([usage for _, usage in rows])

    def _usage(self, rows: Sequence[tuple[str, _Usage]]) -> Floats:
        """Adds up logged counts, given as (game, layer -> expert -> count), to a matrix by game and expert, (G, E)."""
        rows = [(game, usage) for game, usage in rows if usage]
        counts_RE = self._counts([usage for _, usage in rows])
        counts_GE = np.zeros((len(self.games), counts_RE.shape[1]))
        np.add.at(counts_GE, [self.games.index(game) for game, _ in rows], counts_RE)
        return counts_GE

    def _counts(self, usages: Sequence[_Usage]) -> Floats:
        """Turns R logged counts, layer -> expert -> count, into the rows of a matrix (R, E); columns as in `training_usage`."""
        banks = max((self._bank_of(layer) + 1 for usage in usages for layer in usage), default=1)
        counts_RE = np.zeros((len(usages), banks * self.num_experts))
        for row, usage in enumerate(usages):
            for layer, counts in usage.items():
                for expert, count in counts.items():
                    counts_RE[row, self._bank_of(layer) * self.num_experts + int(expert)] += count
        return counts_RE

    def _bank_of(self, layer: str) -> int:
        """The number of the bank that a layer uses: 0 if all layers share one bank, else the layer's own number."""
        return 0 if self.config.get("agent", {}).get("banks", "shared") == "shared" else int(layer)

    def _of(self, kind: str) -> list[Event]:
        return [event for event in self.events if event["event"] == kind]


def _number(event: Event, path: Sequence[str]) -> float:
    value: Any = event
    for key in path:
        value = value.get(key) if isinstance(value, dict) else None
    # Protobuf's JSON writes 64-bit counters as strings.
    return UNKNOWN if value is None or isinstance(value, dict | list) else float(value)
