"""A run as its directory tells it: config.json and metrics.jsonl read into arrays, whole or half-finished.

What figures and tables are made from. Computes nothing but differences and sums; measures.py says what the numbers mean.
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

UNSAID = float("nan")
_Usage = Mapping[str, Mapping[str, int]]
"""Layer -> expert -> tokens."""


@dataclass(frozen=True, kw_only=True)
class Scores:
    """What evaluation found, by phase (rows) and game (columns); NaN where it did not look."""

    games: tuple[str, ...]
    trained_P: tuple[int, ...]
    """The column of the game that each phase trained."""
    mean_PG: Floats
    random_G: Floats
    untrained_G: Floats
    """The agent's own score before any training: random play's, as long as it knows no game to play as."""
    returns: dict[tuple[int, int], list[float]]
    """The single returns behind `mean_PG[phase, game]`."""


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """A run's configuration and events."""

    run_dir: Path
    config: dict[str, Any]
    events: list[Event]
    single_task: Mapping[str, float] = field(default_factory=dict)
    """Mean raw return by game of a network of its own, as far as other runs tell (single_task.py)."""

    @staticmethod
    def read(run_dir: Path) -> RunRecord:
        """Raises InvalidRequest when the directory holds no run, or a damaged one."""
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
        """The beginnings of games."""
        return self._of("switch")

    @cached_property
    def evaluations(self) -> list[Event]:
        """One per phase and evaluated game."""
        return self._of("evaluation")

    @property
    def made_by(self) -> str:
        """Version and commit of what began the run; "" where it was not logged."""
        return next((f"{event['version']}, commit {event['commit']}" for event in self._of("begun")), "")

    @property
    def done(self) -> bool:
        """Whether the run came to its end."""
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
        """(U,) the number below `path` at each update; NaN where there is none."""
        return np.array([_number(event, path) for event in self.updates], float)

    def increments(self, *path: str, evaluations: bool = False) -> Floats:
        """(U,) how much the counter below `path` grew in each update; what an evaluation added since the update before is left out.

        `evaluations`: it is counted to the update after it.
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
        """How much a counter grew over the run, evaluations included; NaN when it was never logged."""
        known = [growth for _, growth in self._growth(path) if not np.isnan(growth)]
        return float(sum(known)) if known else UNSAID

    def _growth(self, path: Sequence[str]) -> Iterator[tuple[str, float]]:
        """(kind of event, growth of the counter since the event before) wherever it was logged.

        The trainer's counters begin at zero, and again when a run is resumed. So do those of a daemon that the run started itself; another
        daemon's may be older than the run, and then the first value says nothing: NaN. A counter that fell began anew. Updates and the end
        log a counter as it stands; an evaluation logs how much it added.
        """
        own = path[0] != "store" or self.config.get("store") is None
        before = 0.0 if own else UNSAID
        for event in self.events:
            if event["event"] == "resumed" and own:
                before = 0.0
            if not isinstance(event.get(path[0]), dict):
                if event["event"] == "update":
                    yield "update", UNSAID
                continue
            # A counter that is not among those logged has not counted anything yet.
            value = float(np.nan_to_num(_number(event, path)))
            if event["event"] == "evaluation":
                before += value
                yield "evaluation", value
            else:
                yield event["event"], value if value < before else value - before
                before = value

    def last(self, *path: str) -> float:
        """The newest known value below `path`; NaN when there is none."""
        values = (_number(event, path) for event in reversed(self.events) if event["event"] in ("update", "done"))
        return next((value for value in values if not np.isnan(value)), UNSAID)

    @cached_property
    def scores(self) -> Scores:
        """The evaluations as a matrix."""
        phases = max((int(event["phase"]) for event in self.evaluations), default=-1) + 1
        column = {game: index for index, game in enumerate(self.games)}
        mean_PG = np.full((phases, len(column)), UNSAID)
        random_G, untrained_G = np.full(len(column), UNSAID), np.full(len(column), UNSAID)
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
        """Experts of each bank: as configured, or more if it grew."""
        counted = (counts for event in self.updates for name in ("usage", "fetches") for counts in (event.get(name) or {}).values())
        seen = (int(expert) for counts in counted for expert in counts)
        return max(int(self.config.get("agent", {}).get("num_experts", 1)), max(seen, default=0) + 1)

    @cached_property
    def cold_unchanged(self) -> tuple[int, int]:
        """(equal bit for bit, all) cold experts, added up over the phases; see measures.py. (0, 0) where no checksums were logged."""
        found = []
        before: dict[tuple[int, str], list[str]] = {}
        owner: dict[tuple[int, str], str] = {}  # With pools: the first game that used the expert; the others borrow it.
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
        """(G, E) experts fetched while training each game, on demand or ahead; all zero where it was not logged."""
        return self._usage([(event["game"], event.get("fetches") or {}) for event in self.updates])

    def training_usage(self) -> Floats:
        """(G, E) tokens per game and expert over all updates of the game; see `_usage`."""
        return self._usage([(event["game"], event.get("usage") or {}) for event in self.updates])

    def evaluation_usage(self) -> Floats:
        """(G, E) the same over the evaluations of the last phase, in which the agent itself said which game it saw."""
        return self._usage([(event["evaluated"], event.get("usage") or {}) for event in self.last_evaluations])

    @property
    def last_evaluations(self) -> list[Event]:
        """The evaluations after the newest evaluated phase."""
        newest = max((event["phase"] for event in self.evaluations), default=None)
        return [event for event in self.evaluations if event["phase"] == newest]

    def usage_by_environment(self) -> tuple[list[str], Floats]:
        """(game of each, (N, E) tokens) for all environments of the last phase's evaluations; none where it was not logged."""
        rows = [(event["evaluated"], usage) for event in self.last_evaluations for usage in event.get("usage_by_env") or ()]
        return [game for game, _ in rows], self._counts([usage for _, usage in rows])

    def _usage(self, rows: Sequence[tuple[str, _Usage]]) -> Floats:
        """Token counts by game and expert."""
        rows = [(game, usage) for game, usage in rows if usage]
        counts_RE = self._counts([usage for _, usage in rows])
        counts_GE = np.zeros((len(self.games), counts_RE.shape[1]))
        np.add.at(counts_GE, [self.games.index(game) for game, _ in rows], counts_RE)
        return counts_GE

    def _counts(self, usages: Sequence[_Usage]) -> Floats:
        """(R, E) token counts: layers are added up where they share a bank, and stand side by side where each has its own."""
        banks = max((self._bank_of(layer) + 1 for usage in usages for layer in usage), default=1)
        counts_RE = np.zeros((len(usages), banks * self.num_experts))
        for row, usage in enumerate(usages):
            for layer, counts in usage.items():
                for expert, count in counts.items():
                    counts_RE[row, self._bank_of(layer) * self.num_experts + int(expert)] += count
        return counts_RE

    def _bank_of(self, layer: str) -> int:
        """Layers share one bank, or each has its own."""
        return 0 if self.config.get("agent", {}).get("banks", "shared") == "shared" else int(layer)

    def _of(self, kind: str) -> list[Event]:
        return [event for event in self.events if event["event"] == kind]


def _number(event: Event, path: Sequence[str]) -> float:
    value: Any = event
    for key in path:
        value = value.get(key) if isinstance(value, dict) else None
    # Protobuf's JSON writes 64-bit counters as strings.
    return UNSAID if value is None or isinstance(value, dict | list) else float(value)
