"""The studies that `ooc-moe study` offers. Everything that is tuned for a study is in this file."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from ooc_moe.config.agent import PRESETS, AgentConfig
from ooc_moe.config.run import PPOConfig, RunConfig
from ooc_moe.study.study import Study
from ooc_moe.study.variants import Variant
from ooc_moe_wire.errors import InvalidRequest

_ALL = (
    *("full", "moe-token", "dense", "single", "dense-clone", "dense-replay", "pools", "joint", "pools-freeze", "dense-total", "dense-ewc"),
    "moe-untrained",
)
_RIVALS = ("full", "dense", "moe-token", "single", "dense-clone")
_SYNTHETIC_SEEDS = {name: 5 if name in ("full", "moe-token", "dense", "dense-clone") else 3 for name in _ALL}
_SYNTHETIC_SEEDS |= {"moe-token-out": 1, "full-share": 3}
_CONFLICTING = ("pixel/catch", "pixel/avoid", "pixel/toward", "pixel/away", "pixel/cross")

# 20 experts are what five games need. HBM holds the pools of two games.
_SYNTHETIC_AGENT = AgentConfig(
    num_games=5,
    frame_size=10,
    frame_stack=2,
    stem_channels=(16, 32),
    # With kernels (2, 3) the stem sees every pixel. With (3, 3) it would miss the grid's last row and column, and with them the paddle.
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
    # With the default of 0.05, 70 % of the score in cross was left after four later games; with 0.3, 96 %. Learning did not suffer (one
    # seed).
    protection_weight=0.3,
    eval_envs=16,
    eval_episodes=4,
    eval_steps=400,
    eval_unseen=True,
    env_threads=1,
)
# Nine games. The bank begins with experts for four of them and grows five times.
_LONG = (*_CONFLICTING, "pixel/catch@1", "pixel/away@2", "pixel/cross@3", "pixel/avoid@4")

_ATARI_CPU = RunConfig(
    run_dir=Path("atari-cpu"),
    games=("krull",),
    agent=replace(PRESETS["demo"], num_games=3),
    ppo=PPOConfig(),
    steps_per_game=98_304,
    eval_envs=8,
    eval_steps=6_000,  # Enough for a whole game of CrazyClimber.
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
    """Makes the caching study's variants: HBM for the experts of half a game, or of one, two or three games; blocks or turns."""

    def variant_with(hbm_experts: int, switch_every: int) -> Variant:
        name = f"hbm{hbm_experts}-{f'every{switch_every}' if switch_every else 'blocks'}"

        def change(config: RunConfig) -> RunConfig:
            # The trace does not depend on the size of the HBM, so one run with a trace is enough for the simulator.
            trace = "accesses.trace" if hbm_experts == 8 and not switch_every else None
            return replace(config, agent=replace(config.agent, hbm_experts=hbm_experts), switch_every=switch_every, trace=trace)

        turns = f"in turns of {switch_every} updates" if switch_every > 1 else "in turns of one update" if switch_every else "in blocks"
        return Variant(name, f"full, HBM {hbm_experts} experts, games {turns}", change)

    variants = [variant_with(hbm, every) for hbm in (12, 8, 4, 2) for every in (0, 16, 4, 1)]
    return {variant.name: variant for variant in variants}


_CACHING = _caching_variants()

STUDIES = {
    study.name: study
    for study in (
        Study(
            name="synthetic",
            asks="Do separation and protection hold for five small games? In two pairs of them the same picture demands opposite actions.",
            limits=(
                "Games of ten by ten cells and a network of one layer: nothing follows for large networks or real games. The two games of "
                "a pair differ by one lit cell, which a small detector can learn. No game here changes its looks while it is played."
            ),
            recipe=_SYNTHETIC,
            # By the measurements in learning.md, cross teaches the stem the least of what the other games need.
            orders={"catch-first": _CONFLICTING, "cross-first": _CONFLICTING[::-1]},
            seeds=_SYNTHETIC_SEEDS,
        ),
        Study(
            name="synthetic-long",
            asks="Does the recipe hold over nine games, for which the bank must grow, and what does output cloning cost in comparison?",
            limits=(
                "One order, and games of one family. Parameters grow with every game, because every game gets a pool of its own; that is "
                "the price of never forgetting."
            ),
            recipe=replace(_SYNTHETIC, agent=replace(_SYNTHETIC_AGENT, num_games=9, num_experts=16)),
            orders={"nine": _LONG},
            seeds={"full": 3, "dense-clone": 3, "single": 1},
            verdict_orders=1,
        ),
        Study(
            name="synthetic-twins",
            asks="Do the results report that two games cannot be told apart when they look alike in every pixel?",
            limits="This is no test of the recipe: no method that looks at frames can tell these two games apart. It counts for no target.",
            recipe=replace(_SYNTHETIC, agent=replace(_SYNTHETIC_AGENT, num_games=2)),
            orders={"twins": ("pixel/blind-toward", "pixel/blind-away")},
            seeds={"full": 3, "single": 1},
            verdict_orders=1,
        ),
        Study(
            name="atari-cpu",
            asks="How much of the claim holds for real Atari games, within what a CPU can compute?",
            limits=(
                "So few steps separate little: early policies hardly depend on what is on the screen, and 42 x 42 pixels hide many "
                "details. One order."
            ),
            recipe=_ATARI_CPU,
            # In these games 65k steps reached several times the score of random play and of every constant action. Left out: RoadRunner,
            # because the constant action "left" already gets 2000 points per 1000 steps; and the games that 65k steps did not teach
            # (Assault, Atlantis, Boxing, Breakout, Jamesbond, UpNDown).
            orders={"krull-first": ("krull", "crazy_climber", "kung_fu_master")},
            seeds=dict.fromkeys(_RIVALS, 2),
            verdict_seeds=3,
        ),
        Study(
            name="atari-gpu",
            asks="Does the claim hold for Atari games at 84 x 84 pixels and a million steps a game?",
            limits="A million steps a game are a tenth of what published agents are trained for; scores are far below theirs.",
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
            asks="What does it cost in hits and stalls when games take turns instead of coming in blocks?",
            limits=(
                "Five small games and experts of 200 KiB: hit rates carry over to cases in which the pools fit HBM equally well, seconds "
                "of stall do not. The simulator leaves write-back out. One seed."
            ),
            recipe=replace(_SYNTHETIC, eval_steps=0, eval_unseen=False),
            orders={"catch-first": _CONFLICTING},
            seeds=dict.fromkeys(_CACHING, 1),
            variants=_CACHING,
        ),
    )
}


def find_study(name: str) -> Study:
    """Returns the study called `name`. Raises InvalidRequest if there is none."""
    if name not in STUDIES:
        raise InvalidRequest(f"study: {name!r} is not one of {', '.join(STUDIES)}")
    return STUDIES[name]
