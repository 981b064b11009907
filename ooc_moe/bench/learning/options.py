"""The options of `ooc-moe bench learning`, and the agents and settings that the command compares. Importing this module does not import
torch."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

from ooc_moe import envs
from ooc_moe.config.agent import PRESETS, AgentConfig
from ooc_moe.config.run import PPOConfig, RunConfig
from ooc_moe.envs import ATARI_GAMES
from ooc_moe_wire.command_line import Flag
from ooc_moe_wire.errors import require_at_least

GAMES = ("krull", "pixel/catch")
RETURNS_GAMES = ("pixel/catch", "pixel/cross")
FULL_GAMES = ("krull", "crazy_climber")
STEPS, FULL_STEPS = 61_440, 204_800


@dataclass(frozen=True, kw_only=True, slots=True)
class LearningBench:
    """The options of `ooc-moe bench learning`: speeds are measured in each of `games`, returns in each of `returns_games`.

    Returns are those after `steps` environment steps, for each of `seeds` seeds.

    Raises:
        InvalidRequest: a game is unknown, or a number is below 1.
    """

    games: tuple[str, ...] = GAMES
    """Games whose speed is measured."""
    returns_games: Annotated[tuple[str, ...], Flag(name="returns")] = RETURNS_GAMES
    """Games whose returns are measured; none measures no returns."""
    steps: int = STEPS
    """Environment steps before returns are read."""
    seeds: int = 3
    """Trainings of each program in each game."""
    rounds: int = 7
    """Interleaved rounds of the speed."""
    threads: int = 1
    """Threads of torch."""
    env_threads: int = 2
    """Threads that emulate Atari in our environments."""

    def __post_init__(self) -> None:
        for game in (*self.games, *self.returns_games):
            envs.check_name(game)
        require_at_least(1, rounds=self.rounds, steps=self.steps, seeds=self.seeds, threads=self.threads, env_threads=self.env_threads)

    def run_config(self, game: str, seed: int = 0) -> RunConfig:
        """The configuration with which our learner and Stable-Baselines3's learn `game`.

        The frames that they see: for Atari stacks of four frames of 42 x 42 pixels, for pixel games stacks of two frames of 10 x 10."""
        pixel = game not in ATARI_GAMES
        agent, ppo = (PIXEL_AGENT, PIXEL_PPO) if pixel else (ATARI_AGENT, ATARI_PPO)
        return RunConfig(
            run_dir=Path("bench"),
            games=(game,),
            agent=agent,
            ppo=ppo,
            steps_per_game=-(-self.steps // (ppo.num_envs * ppo.rollout_steps)) * ppo.num_envs * ppo.rollout_steps,
            seed=seed,
            threads=self.threads,
            env_threads=self.env_threads,
        )


def dense(config: AgentConfig) -> AgentConfig:
    """Returns the configuration of a dense network: one expert in each layer, as wide as `top_k` experts of `config` together.

    The dense network's context is one frame, because SB3's network also sees each observation by itself.
    """
    return replace(
        config,
        routing="token",
        banks="per-layer",
        num_experts=1,
        top_k=1,
        pool_size=1,
        hidden=config.top_k * config.hidden,
        context=1,
        balance_weight=0.0,
        router_noise=0.0,
    )


ATARI_AGENT = dense(replace(PRESETS["demo"], num_layers=1))
PIXEL_AGENT = dense(
    replace(PRESETS["demo"], num_layers=1, frame_size=10, frame_stack=2, stem_channels=(16, 32), stem_kernels=(2, 3), stem_strides=(1, 2))
)
ATARI_PPO = PPOConfig(num_envs=16, rollout_steps=64, epochs=3, minibatch_segments=256)
PIXEL_PPO = PPOConfig(num_envs=32, rollout_steps=32, epochs=3, minibatch_segments=256, learning_rate=2e-3, gamma=0.9, entropy_coef=0.005)
