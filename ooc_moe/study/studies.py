"""The studies: which variants learn which games in which orders, how often, and with what. All that is tuned stands here.

Knows nothing of how runs are made and read.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from ooc_moe.config.agent import PRESETS, AgentConfig
from ooc_moe.config.run import PPOConfig, RunConfig
from ooc_moe.study.variants import VARIANTS, Variant
from ooc_moe_wire.errors import InvalidRequest


@dataclass(frozen=True, kw_only=True, slots=True)
class StudyRun:
    """One run of a study: `config.run_dir` is <studies>/<study>/<variant>/<order>/seed-<n>."""

    variant: str
    order: str
    """The name of the order of the games; of a variant that learns each game alone, the game."""
    config: RunConfig

    @property
    def label(self) -> str:
        """For people."""
        return f"{self.variant}, {self.order}, seed {self.config.seed}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Study:
    """A table's worth of runs."""

    name: str
    asks: str
    """What it is made to find out."""
    limits: str
    """What it cannot show."""
    recipe: RunConfig
    """The full recipe; every variant is a change of it."""
    orders: Mapping[str, tuple[str, ...]]
    """Sequences of games by name."""
    seeds: Mapping[str, int]
    """Variants, the most important first, and how many seeds each has."""
    variants: Mapping[str, Variant] = field(default_factory=lambda: VARIANTS)
    verdict_seeds: int = 5
    """Seeds below which the verdicts on separation and protection are not spoken."""
    verdict_orders: int = 2
    """Orders below which that on protection is not."""

    @property
    def games(self) -> tuple[str, ...]:
        """All games, in the order of the first sequence."""
        return tuple(dict.fromkeys(game for games in self.orders.values() for game in games))

    def runs(
        self,
        studies_dir: Path,
        *,
        variants: Sequence[str] = (),
        seeds: int | None = None,
        steps_per_game: int | None = None,
    ) -> list[StudyRun]:
        """All runs, in the order of work: seed by seed, so that a study that is not finished already shows something.

        Args:
            studies_dir: holds a directory for each study.
            variants: only these.
            seeds: at most so many of each variant.
            steps_per_game: instead of the study's own.

        Raises:
            InvalidRequest: a variant that this study does not have.
        """
        for name in variants:
            if name not in self.seeds:
                raise InvalidRequest(f"variants: {name!r} is not one of {', '.join(self.seeds)}")
        wanted = {name: min(count, seeds or count) for name, count in self.seeds.items() if not variants or name in variants}
        recipe = self.recipe if steps_per_game is None else replace(self.recipe, steps_per_game=steps_per_game)
        return [
            run
            for seed in range(max(wanted.values(), default=0))
            for name, count in wanted.items()
            if seed < count
            for run in self._of_seed(studies_dir / self.name, self.variants[name], recipe, seed)
        ]

    def _of_seed(self, directory: Path, variant: Variant, recipe: RunConfig, seed: int) -> Iterator[StudyRun]:
        orders = {game.replace("/", "-"): (game,) for game in self.games} if variant.alone else self.orders
        for order, games in orders.items():
            run_dir = directory / variant.name / order / f"seed-{seed}"
            config = replace(variant.change(recipe), run_dir=run_dir, games=games, seed=seed)
            if config.trace is not None:
                config = replace(config, trace=str(run_dir / config.trace))
            yield StudyRun(variant=variant.name, order=order, config=config)


_ALL = (
    *("full", "moe-token", "dense", "single", "dense-clone", "dense-replay", "pools", "joint", "pools-freeze", "dense-total", "dense-ewc"),
    "moe-untrained",
)
_RIVALS = ("full", "dense", "moe-token", "single", "dense-clone")
_SYNTHETIC_SEEDS = {name: 5 if name in ("full", "moe-token", "dense", "dense-clone") else 3 for name in _ALL}
_SYNTHETIC_SEEDS |= {"moe-token-out": 1, "full-share": 3}
_CONFLICTING = ("pixel/catch", "pixel/avoid", "pixel/toward", "pixel/away", "pixel/cross")

# 20 experts: what five games need. HBM holds two games' pools.
_SYNTHETIC_AGENT = AgentConfig(
    num_games=5,
    frame_size=10,
    frame_stack=2,
    stem_channels=(16, 32),
    # Together they see every pixel: with (3, 3) the last row and column of the grid fall off, and with them the paddle.
    stem_kernels=(2, 3),
    stem_strides=(1, 2),
    dim=64,
    hidden=128,
    num_layers=1,
    num_heads=4,
    context=8,
    num_experts=20,
    pool_size=4,
    top_k=2,
    hbm_experts=8,
    dram_experts=16,
    prefetch_experts=4,
)
_SYNTHETIC = RunConfig(
    run_dir=Path("synthetic"),
    games=_CONFLICTING,
    agent=_SYNTHETIC_AGENT,
    ppo=PPOConfig(
        num_envs=32, rollout_steps=32, epochs=3, minibatch_segments=32, learning_rate=3e-3, gamma=0.95, gae_lambda=0.9, entropy_coef=0.01
    ),
    steps_per_game=51_200,
    # The usual 0.05 kept 70 % of cross through four games, 0.3 keeps 96 %, and costs no learning that one seed could show.
    protection_weight=0.3,
    eval_envs=16,
    eval_episodes=4,
    eval_steps=400,
    eval_unseen=True,
    env_threads=1,
)
# Nine games, and experts for four of them: the bank grows five times.
_LONG = (*_CONFLICTING, "pixel/catch@1", "pixel/away@2", "pixel/cross@3", "pixel/avoid@4")

_ATARI_CPU = RunConfig(
    run_dir=Path("atari-cpu"),
    games=("krull",),
    agent=replace(PRESETS["demo"], num_games=3),
    ppo=PPOConfig(),
    steps_per_game=98_304,
    eval_envs=8,
    eval_steps=6_000,  # Room for a whole game of CrazyClimber.
    eval_unseen=True,
    env_threads=1,
)
_ATARI_GPU = replace(
    _ATARI_CPU,
    agent=replace(
        PRESETS["full"], num_games=4, num_experts=32, num_layers=4, dim=256, hidden=1024, num_heads=8, hbm_experts=8, dram_experts=16
    ),
    ppo=PPOConfig(num_envs=64, rollout_steps=128, epochs=3, minibatch_segments=32, learning_rate=3e-4),
    steps_per_game=1_000_000,
    eval_envs=16,
    eval_steps=9_000,
    device="cuda",
    env_threads=8,
)


def _caching_variants() -> dict[str, Variant]:
    """The full recipe with HBM for half of a game's, one, two and three games' experts; the games in blocks, and in turns."""

    def change(hbm_experts: int, switch_every: int) -> Variant:
        name = f"hbm{hbm_experts}-{f'every{switch_every}' if switch_every else 'blocks'}"

        def changed(config: RunConfig) -> RunConfig:
            # The trace does not depend on the HBM's size; one of them is enough for the simulator.
            trace = "accesses.trace" if hbm_experts == 8 and not switch_every else None
            return replace(config, agent=replace(config.agent, hbm_experts=hbm_experts), switch_every=switch_every, trace=trace)

        turns = f"in turns of {switch_every} updates" if switch_every > 1 else "in turns of one update" if switch_every else "in blocks"
        return Variant(name, f"full, HBM {hbm_experts} experts, games {turns}", changed)

    made = [change(hbm, every) for hbm in (12, 8, 4, 2) for every in (0, 16, 4, 1)]
    return {variant.name: variant for variant in made}


_CACHING = _caching_variants()

STUDIES = {
    study.name: study
    for study in (
        Study(
            name="synthetic",
            asks="Do separation and protection hold for five small games, two pairs of which want opposite things of the same picture?",
            limits=(
                "Ten by ten cells and one layer: nothing follows for large networks or real games. The pairs differ by one lit cell, "
                "which a small detector can learn; games that change their looks within themselves are not here."
            ),
            recipe=_SYNTHETIC,
            # By learning.md, crossing teaches the stem least of what the others need.
            orders={"catch-first": _CONFLICTING, "cross-first": _CONFLICTING[::-1]},
            seeds=_SYNTHETIC_SEEDS,
        ),
        Study(
            name="synthetic-long",
            asks="Does the recipe hold over nine games, for which the bank has to grow, and what does cloning cost beside it?",
            limits=(
                "One order, and the games of one family; what a pool costs in parameters grows with every game, which is the price of "
                "never forgetting."
            ),
            recipe=replace(_SYNTHETIC, agent=replace(_SYNTHETIC_AGENT, num_games=9, num_experts=16)),
            orders={"nine": _LONG},
            seeds={"full": 3, "dense-clone": 3, "single": 1},
            verdict_orders=1,
        ),
        Study(
            name="synthetic-twins",
            asks="Is it reported that two games which look alike in every pixel cannot be told apart?",
            limits="It is no test of the recipe: no method that looks at frames can tell these two apart. It counts for no target.",
            recipe=replace(_SYNTHETIC, agent=replace(_SYNTHETIC_AGENT, num_games=2)),
            orders={"twins": ("pixel/blind-toward", "pixel/blind-away")},
            seeds={"full": 3, "single": 1},
            verdict_orders=1,
        ),
        Study(
            name="atari-cpu",
            asks="What is left of the claim on real Atari games, within a budget that a CPU can pay?",
            limits=(
                "So few steps separate little: early policies are nearly the same whatever is on the screen, and 42 x 42 pixels hide "
                "much. One order."
            ),
            recipe=_ATARI_CPU,
            # In these, 65k steps reached several times what random play and every constant action get. Left out: RoadRunner (always left:
            # 2000 points per 1000 steps), and what 65k steps did not teach (Assault, Atlantis, Boxing, Breakout, Jamesbond, UpNDown).
            orders={"krull-first": ("krull", "crazy_climber", "kung_fu_master")},
            seeds=dict.fromkeys(_RIVALS, 2),
            verdict_seeds=3,
        ),
        Study(
            name="atari-gpu",
            asks="Does the claim hold for Atari at 84 x 84 and a million steps a game?",
            limits="A million steps a game are a tenth of what published agents get; scores stand far below theirs.",
            recipe=_ATARI_GPU,
            orders={
                "krull-first": ("krull", "crazy_climber", "road_runner", "assault"),
                "assault-first": ("assault", "road_runner", "crazy_climber", "krull"),
            },
            seeds=dict.fromkeys(_RIVALS, 3),
            verdict_seeds=3,
        ),
        Study(
            name="caching",
            asks="What does it cost in hits and stalls when games do not come in blocks?",
            limits=(
                "Five small games and experts of 200 KiB: hit rates carry over where pools fit likewise, seconds of stall do not. The "
                "simulator leaves write-back out. One seed."
            ),
            recipe=replace(_SYNTHETIC, eval_steps=0, eval_unseen=False),
            orders={"catch-first": _CONFLICTING},
            seeds=dict.fromkeys(_CACHING, 1),
            variants=_CACHING,
        ),
    )
}


def find_study(name: str) -> Study:
    """The study of that name. Raises InvalidRequest when there is none."""
    if name not in STUDIES:
        raise InvalidRequest(f"study: {name!r} is not one of {', '.join(STUDIES)}")
    return STUDIES[name]
