"""Sets up the peer that `ooc-moe bench learning` compares our PPO with: Stable-Baselines3's PPO (SB3), with our dense network and games.

The network consists of our own stem and attention and of dense layers that compute what one expert in each layer computes, for a context of
one frame. With the agent's parameters it returns the agent's logits and values.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import ale_py
import gymnasium
import numpy as np
import torch
from gymnasium import spaces
from stable_baselines3 import PPO
from stable_baselines3.common.env_util import make_atari_env, make_vec_env
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from stable_baselines3.common.vec_env import VecEnv, VecFrameStack
from torch import Tensor, nn
from torch.nn.functional import gelu

from ooc_moe import envs
from ooc_moe.agent.agent import Agent
from ooc_moe.agent.stem import Stem
from ooc_moe.agent.transformer import CausalAttention
from ooc_moe.config.agent import AgentConfig
from ooc_moe.config.run import RunConfig
from ooc_moe.envs import ATARI_GAMES, NUM_ACTIONS, GameEnvs
from ooc_moe.envs.atari import NOOPS_MAX, STICKY_PROBABILITY
from ooc_moe.envs.game import Array
from ooc_moe.learning.learner import ADAM_EPS

REWARD_LIMIT = 1.0


class DenseBlock(nn.Module):
    """A transformer block with a dense FFN. It computes what our `transformer.Block` does with one expert, without router and cache."""

    def __init__(self, config: AgentConfig) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(config.dim)
        self.attention = CausalAttention(config.dim, config.num_heads)
        self.ffn_norm = nn.LayerNorm(config.dim)
        self.w1, self.w2 = nn.Linear(config.dim, config.hidden), nn.Linear(config.hidden, config.dim)

    def forward(self, x_BTD: Tensor) -> Tensor:
        """Applies attention, then the FFN, each with a residual connection: (B, T, D) -> (B, T, D)."""
        x_BTD = x_BTD + self.attention(self.norm(x_BTD), mask=None)
        y_BTD: Tensor = x_BTD + self.w2(gelu(self.w1(self.ffn_norm(x_BTD))))
        return y_BTD


class DenseNetwork(BaseFeaturesExtractor):  # type: ignore[misc]
    """The network that SB3 trains, up to its heads: maps N stacks of frames (N, S, H, W) to the input of SB3's heads (N, D)."""

    def __init__(self, observation_space: spaces.Box, config: AgentConfig) -> None:
        super().__init__(observation_space, features_dim=config.dim)
        self.stem = Stem(config)
        self.embedding_D = nn.Parameter(torch.zeros(config.dim))
        self.blocks = cast("Sequence[DenseBlock]", nn.ModuleList(DenseBlock(config) for _ in range(config.num_layers)))
        self.norm = nn.LayerNorm(config.dim)

    def forward(self, frames_NSHW: Tensor) -> Tensor:
        """Makes one token of each stack of frames and runs it through all blocks: (N, S, H, W) -> (N, D)."""
        x_N1D = (self.stem(frames_NSHW) + self.embedding_D).unsqueeze(1)
        for block in self.blocks:
            x_N1D = block(x_N1D)
        normal_ND: Tensor = self.norm(x_N1D).squeeze(1)
        return normal_ND


@torch.no_grad()
def copy_parameters(agent: Agent, policy: Any) -> None:
    """Copies the parameters of our agent, a dense one for one game, into `policy`, the network of SB3; the two networks then compute the
    same."""
    (network,) = agent.networks.values()
    mine: DenseNetwork = policy.features_extractor
    mine.stem.load_state_dict(agent.stem.state_dict())
    mine.embedding_D.copy_(network.embedding_TD[0])
    mine.norm.load_state_dict(network.norm.state_dict())
    for cache, block, theirs in zip(agent.caches, mine.blocks, network.blocks, strict=True):
        block.norm.load_state_dict(theirs.norm.state_dict())
        block.attention.load_state_dict(theirs.attention.state_dict())
        block.ffn_norm.load_state_dict(theirs.moe.norm.state_dict())
        with cache.reading([0]) as (slot,):
            for layer, number in ((block.w1, 1), (block.w2, 2)):
                layer.weight.copy_(cache.views[f"w{number}"][slot].t())
                layer.bias.copy_(cache.views[f"b{number}"][slot])
    policy.action_net.load_state_dict(network.policy.state_dict())
    policy.value_net.load_state_dict(network.value.state_dict())


def make_ppo(config: RunConfig, vec_env: VecEnv) -> Any:
    """Makes SB3's PPO with the settings that our PPO has with `config`: the same learning rates, loss and network shape."""
    ppo = config.ppo
    first = config.steps_per_update / config.steps_per_game  # SB3 lowers the rate before its first update; our learner, after it.
    return PPO(
        "CnnPolicy",
        vec_env,
        learning_rate=lambda remaining: ppo.learning_rate * (remaining + first),
        n_steps=ppo.rollout_steps,
        batch_size=ppo.minibatch_segments * config.agent.context,
        n_epochs=ppo.epochs,
        gamma=ppo.gamma,
        gae_lambda=ppo.gae_lambda,
        clip_range=ppo.clip,
        ent_coef=ppo.entropy_coef,
        vf_coef=ppo.value_coef / 2,  # SB3 weighs the mean squared error; our learner, half of it.
        max_grad_norm=ppo.max_grad_norm,
        seed=config.seed,
        device="cpu",
        policy_kwargs={
            "features_extractor_class": DenseNetwork,
            "features_extractor_kwargs": {"config": config.agent},
            "net_arch": [],
            "normalize_images": False,  # The stem scales the pixels.
            "ortho_init": False,  # The parameters are copied from the agent.
            "optimizer_kwargs": {"eps": ADAM_EPS},
        },
    )


def sb3_envs(config: RunConfig) -> VecEnv:
    """Makes the game's environments as SB3's users make them: they are stepped one after another, each in its own wrappers.

    An environment whose episode has ended is reset within the same step, so that no step is spent on resets.
    """
    agent, (game,) = config.agent, config.games
    if game not in ATARI_GAMES:
        return make_vec_env(lambda: OneGame(game, agent), config.ppo.num_envs, seed=config.seed)
    gymnasium.register_envs(ale_py)
    name = "".join(word.capitalize() for word in game.split("_"))
    atari = make_atari_env(
        f"ALE/{name}-v5",
        config.ppo.num_envs,
        seed=config.seed,
        env_kwargs={"frameskip": 1, "repeat_action_probability": STICKY_PROBABILITY, "full_action_space": True},
        wrapper_kwargs={"screen_size": agent.frame_size, "noop_max": NOOPS_MAX},
    )
    return VecFrameStack(atari, agent.frame_stack)


class OneGame(gymnasium.Env[Array, np.int64]):
    """One environment of a pixel game with gymnasium's interface, which is what SB3's vectorised environments are made of."""

    def __init__(self, game: str, config: AgentConfig) -> None:
        self._envs = envs.make(game, 1, frame_size=config.frame_size, frame_stack=config.frame_stack)
        self.observation_space, self.action_space = _spaces(self._envs)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Array, dict[str, Any]]:
        """Starts an episode of the game. Returns its first frames, and an empty dict, as gymnasium demands."""
        super().reset(seed=seed)
        return self._envs.reset(int(self.np_random.integers(1 << 31)))[0], {}

    def step(self, action: np.int64) -> tuple[Array, float, bool, bool, dict[str, Any]]:
        """Plays one action. Returns frames, reward, terminated, truncated, and an empty dict, as gymnasium demands."""
        step = self._envs.step(np.array([action]))
        return step.observations[0], float(step.rewards[0]), bool(step.terminated[0]), bool(step.truncated[0]), {}


class SharedEnvs(VecEnv):  # type: ignore[misc]
    """Our vectorised environments behind SB3's interface for environments.

    Only for measuring speed: our environments spend a step on each reset, and SB3 would learn from that step as if it had been played.
    """

    def __init__(self, inner: GameEnvs, seed: int) -> None:
        self._inner, self._seed = inner, seed
        super().__init__(inner.num_envs, *_spaces(inner))

    def reset(self) -> Array:
        """Starts all games and returns their first frames."""
        return self._inner.reset(self._seed)

    def step_async(self, actions: Array) -> None:
        """Stores the actions; `step_wait` plays them."""
        self._actions = actions

    def step_wait(self) -> tuple[Array, Array, Array, list[dict[str, Any]]]:
        """Plays the actions that `step_async` stored. Returns frames, rewards clipped to [-1, 1], which episodes ended, and empty dicts."""
        step = self._inner.step(self._actions)
        rewards = step.rewards.clip(-REWARD_LIMIT, REWARD_LIMIT)
        return step.observations, rewards, step.terminated | step.truncated, [{} for _ in step.rewards]

    def close(self) -> None:
        """Closes the environments."""
        self._inner.close()

    def get_attr(self, attr_name: str, indices: Any = None) -> list[Any]:
        """Returns None for each environment, whatever the attribute. SB3 asks only for the render mode."""
        return [None] * self.num_envs

    def set_attr(self, attr_name: str, value: Any, indices: Any = None) -> None:
        """Not implemented, because PPO does not call it."""
        raise NotImplementedError

    def env_method(self, method_name: str, *args: Any, indices: Any = None, **kwargs: Any) -> list[Any]:
        """Not implemented, because PPO does not call it."""
        raise NotImplementedError

    def env_is_wrapped(self, wrapper_class: Any, indices: Any = None) -> list[bool]:
        """Returns False for each environment: none of them is wrapped."""
        return [False] * self.num_envs


def _spaces(inner: GameEnvs) -> tuple[spaces.Box, spaces.Discrete]:
    return spaces.Box(0, 255, inner.observation_shape, np.uint8), spaces.Discrete(NUM_ACTIONS)
