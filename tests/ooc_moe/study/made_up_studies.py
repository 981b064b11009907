"""A small study, and directories that look like those of its finished runs, with scores that a test chooses. Nothing is trained."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np

from ooc_moe.config.run import PPOConfig, RunConfig
from ooc_moe.metrics import statistics
from ooc_moe.metrics.log import CONFIG_FILE, MetricsWriter, read_metrics
from ooc_moe.session import checkpoint
from ooc_moe.study.caching import CachingPoint, Way
from ooc_moe.study.results import collect
from ooc_moe.study.runner import steps_of
from ooc_moe.study.scores import StudyScores, strata
from ooc_moe.study.studies import find_study
from ooc_moe.study.study import Study, StudyRun

SYNTHETIC = find_study("synthetic")
GAMES = ("pixel/catch", "pixel/avoid", "pixel/toward")
# Raw returns, on the scale of the pixel games, whose best play is 5, 5 and 20.
RANDOM = {"pixel/catch": -1.0, "pixel/avoid": 1.0, "pixel/toward": 0.0}
SINGLE = {"pixel/catch": 4.0, "pixel/avoid": 4.0, "pixel/toward": 16.0}
CONSTANT = {"pixel/catch": 0.0, "pixel/avoid": 2.0, "pixel/toward": 0.0}


def small_study(**changes: object) -> Study:
    """Returns a study of three games in two orders, with the variants that the verdicts need. `changes` overwrites its fields."""
    fields = {
        "name": "small",
        "asks": "Does it work?",
        "limits": "Everything.",
        "recipe": replace(SYNTHETIC.recipe, steps_per_game=2048),
        "orders": {"forth": GAMES, "back": GAMES[::-1]},
        "seeds": {"full": 5, "moe-token": 5, "dense": 5, "joint": 1, "single": 3},
    }
    return Study(**(fields | changes))  # type: ignore[arg-type]


TINY = RunConfig(
    run_dir=Path("unused"),
    games=("pixel/catch", "pixel/toward"),
    agent=replace(SYNTHETIC.recipe.agent, num_experts=8, pool_size=2, hbm_experts=4, dram_experts=6),
    ppo=PPOConfig(num_envs=4, rollout_steps=8, epochs=1, minibatch_segments=4),
    steps_per_game=64,
    eval_envs=2,
    eval_steps=12,
)


def write_run(config: RunConfig, *, with_checkpoint: bool, done: bool = False) -> RunConfig:
    """Writes the directory of a run that has done its first update, or all of it if `done`. Returns the run's configuration.

    `with_checkpoint`: whether it looks as if the run had saved a checkpoint.
    """
    config.run_dir.mkdir(parents=True)
    (config.run_dir / CONFIG_FILE).write_text(config.to_json())
    writer = MetricsWriter(config.run_dir, tensorboard=False)
    writer.log("update", step=32, update=1)
    if done:
        writer.log("done", step=128, update=4)
    writer.close()
    if with_checkpoint:
        saved = config.run_dir / checkpoint.DIRECTORY / checkpoint.LATEST
        saved.parent.mkdir()
        saved.touch()
    return config


def write_finished_runs(
    study: Study, directory: Path, final: Mapping[str, float], *, learned: float = 1.0, seeds: int = 5, usage: float = 0.0
) -> list[StudyRun]:
    """Writes directories that look like those of a study's finished runs, and returns these runs.

    Args:
        study: the study. Runs are written for its variants in `final`, and for the variant single.
        directory: holds a directory for each study.
        final: by variant, which share of the score right after a game's training is left at the end of the run.
        learned: the score right after a game's training; 1 is single-task.
        seeds: write only the runs of this many seeds.
        usage: the share of its routed mass that an environment puts on an expert of its own game. The rest goes to one expert that all
            games use.
    """
    runs = [run for run in study.runs(directory) if run.config.seed < seeds and (run.variant in final or run.variant == "single")]
    for run in runs:
        config = run.config
        config.run_dir.mkdir(parents=True, exist_ok=True)
        (config.run_dir / CONFIG_FILE).write_text(config.to_json())
        writer = MetricsWriter(config.run_dir, tensorboard=False)
        rng = np.random.default_rng(config.seed)
        phases = [len(config.games) - 1] if config.switch_every else range(len(config.games))
        for phase in phases:
            for column, game in enumerate(config.games):
                kept = 1.0 if run.variant == "single" else learned * (final[run.variant] if column < phase else 1.0)
                score = RANDOM[game] + (kept if column <= phase else 0.0) * (SINGLE[game] - RANDOM[game])
                score += rng.normal(0, 0.01)
                by_env = [{"0": {str(column): round(1000 * usage), "9": 1000 - round(1000 * usage)}} for _ in range(6)]
                writer.log(
                    "evaluation",
                    step=phase,
                    update=phase,
                    game=config.games[phase],
                    phase=phase,
                    evaluated=game,
                    known=column <= phase,
                    returns=[score - 0.1, score, score + 0.1],
                    return_mean=score,
                    random_mean=RANDOM[game],
                    episodes_truncated=0,
                    believed={game: 1.0},
                    detector_accuracy=0.99,
                    steps_to_detect=4.0,
                    usage={"0": {str(column): 10}},
                    **({"usage_by_env": by_env} if run.variant == "moe-token" else {}),
                )
        writer.log("done", step=steps_of(config), update=3)
        writer.close()
    return runs


def scores_of(study: Study, runs: list[StudyRun], constants: Mapping[str, float] = CONSTANT) -> StudyScores:
    return collect(study, runs, constants)


def mean(found: StudyScores, variant: str, name: str) -> float:
    return float(statistics.mean(statistics.pooled(strata(found.cells(variant, name)))))


def change_evaluations(runs: list[StudyRun], variant: str, game: str, **fields: object) -> None:
    """Overwrites `fields` of all evaluations of one game, in the metrics of all runs of a variant."""
    for run in runs:
        if run.variant == variant:
            events = [event | (fields if event.get("evaluated") == game else {}) for event in read_metrics(run.config.run_dir)]
            (run.config.run_dir / "metrics.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))


def points(blocks: tuple[float, float], turns: tuple[float, float], *, hbm: int = 4) -> list[CachingPoint]:
    """Makes caching points with the given (hit rate, stall) in blocks and in turns of one update, the same for trainer and simulator."""
    return [
        CachingPoint(
            way=way,
            hbm_experts=hbm,
            bank_experts=20,
            switch_every=every,
            accesses=100,
            hit_rate=rate,
            belady=0.99,
            stall_s=stall,
        )
        for way in Way
        for every, (rate, stall) in ((None, blocks), (1, turns))
    ]
