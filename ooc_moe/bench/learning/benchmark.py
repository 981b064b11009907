"""`ooc-moe bench learning`: steps per second and returns of our PPO, compared with those of Stable-Baselines3's PPO (SB3).

Our PPO and SB3's train the same dense network: ours has one expert in each layer, which every token goes to. One sample of speed is the
time of one update, that is, of a rollout and the epochs of learning from it. No daemon and no detector run, and no metrics are logged. The
two learners are timed in interleaved rounds (harness.py).
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from ooc_moe import envs
from ooc_moe.agent.agent import Agent
from ooc_moe.bench.harness import Spread, TimedPath, WrongBytes, timed_rounds, warm_up
from ooc_moe.bench.learning.options import LearningBench
from ooc_moe.bench.learning.results import Returns, Speed
from ooc_moe.bench.torch_setup import torch_threads
from ooc_moe.config.run import RunConfig
from ooc_moe.display.progress import passing_bar
from ooc_moe.learning.learner import Learner
from ooc_moe.learning.protection import Unprotected
from ooc_moe.learning.rollout import Collector, Rollout
from ooc_moe.metrics import provenance
from ooc_moe_client.hbm.cache import ExpertCache
from ooc_moe_client.in_memory import InMemoryStore
from ooc_moe_wire.errors import InvalidRequest

PATHS = 3  # Paths in each game: our PPO, SB3 in its own environments, and SB3 in ours.
TOLERANCE = 1e-5
# Returns are taken from the games that end in the last quarter of a training.
LAST_PART = 0.25


class OurPPO:
    """Trains our PPO in one game, with learner and environments as in a run, but without a daemon: the experts are kept in this process."""

    def __init__(self, config: RunConfig, stack: ExitStack) -> None:
        (self.game,) = config.games
        store = InMemoryStore()
        caches = []
        for spec in config.agent.bank_specs(config.name, config.seed):
            store.create_bank(spec)
            caches.append(stack.enter_context(ExpertCache(store, spec.name, capacity_experts=1)))
        self.agent = Agent(config.agent, caches, seed=config.seed)
        self.agent.add_game(self.game)
        generator = torch.Generator().manual_seed(config.seed)
        self._learner = Learner(self.agent, self.game, config, protection=Unprotected(), generator=generator)
        self._collector = Collector(
            self.agent, make_envs(config, stack), config.ppo, generator=generator, on_segment=lambda frames_NSHW: None
        )
        self._collector.reset(config.seed)

    def update(self, remaining: float = 1.0) -> Rollout:
        """Does one PPO update: plays (collects a rollout), learns from the rollout, and returns it.

        `remaining`: the share of the training that is still to come, from which the learning rate follows.
        """
        rollout = self._collector.collect()
        self._learner.update(rollout, remaining=remaining)
        return rollout


def make_envs(config: RunConfig, stack: ExitStack) -> envs.GameEnvs:
    """Makes our own environments (not SB3's) for the game of `config`; `stack` closes them."""
    (game,), agent = config.games, config.agent
    game_envs = envs.make(
        game, config.ppo.num_envs, frame_size=agent.frame_size, frame_stack=agent.frame_stack, num_threads=config.env_threads
    )
    stack.callback(game_envs.close)
    return game_envs


def run(bench: LearningBench, console: Console) -> tuple[list[Speed], list[Returns]]:
    """Measures the speeds, then the returns (game scores) of our PPO and SB3's, and gives back a list of each; draws a progress bar on
    `console`.

    Raises:
        InvalidRequest: Stable-Baselines3 is not installed.
        WrongBytes: the two networks compute different outputs.
    """
    with torch_threads(bench.threads), passing_bar(console) as progress:
        samples = PATHS * bench.rounds * len(bench.games)
        task = progress.add_task("speed", total=samples + 2 * bench.seeds * len(bench.returns_games))
        speeds = [speed for game in bench.games for speed in _speeds(bench, game, lambda: progress.advance(task))]
        progress.update(task, description="returns")
        returns = [_returns(bench, game, lambda: progress.advance(task)) for game in bench.returns_games]
    return speeds, returns


def _speeds(bench: LearningBench, game: str, on_run: Callable[[], None]) -> list[Speed]:
    """Measures the steps per second of our PPO, of SB3 with its own environments, and of SB3 with our environments, in the same rounds."""
    config = bench.run_config(game)
    peer = _peer()
    with ExitStack() as stack:
        ours = OurPPO(config, stack)
        peers = {
            "its own": peer.make_ppo(config, peer.sb3_envs(config)),
            "ours": peer.make_ppo(config, peer.SharedEnvs(make_envs(config, stack), config.seed)),
        }
        paths = [_path("our PPO", ours.update)]
        for name, model in peers.items():
            stack.callback(model.env.close)
            check_same_network(ours.agent, model)
            paths.append(_path(name, partial(model.learn, config.steps_per_update, reset_num_timesteps=False)))
        warm_up(paths, before_each=lambda: None)
        seconds = timed_rounds(paths, calls=1, rounds=bench.rounds, order=random.Random(0), on_run=on_run)
    rates = {name: Spread.of([config.steps_per_update / value for value in values]) for name, values in seconds.items()}
    return [Speed(game=game, peer_envs=name, ours=rates["our PPO"], peer=rates[name]) for name in peers]


def _path(name: str, update: Callable[[], Any]) -> TimedPath:
    """Makes a benchmark case (path) whose run is one update. Its check does nothing: `check_same_network` has compared the networks."""

    def run() -> None:
        update()

    return TimedPath(name=name, run=run, check=lambda: None)


def check_same_network(agent: Agent, model: Any) -> None:
    """Copies the agent's parameters to SB3's `model`, and checks that agent and `model` then compute the same policy and values for the
    same frames.

    Raises:
        WrongBytes: the policies or values differ by more than TOLERANCE.
    """
    peer, config = _peer(), agent.config
    peer.copy_parameters(agent, model.policy)
    generator = torch.Generator().manual_seed(0)
    shape = (64, config.frame_stack, config.frame_size, config.frame_size)
    frames_NSHW = torch.randint(256, shape, dtype=torch.uint8, generator=generator)
    (game,) = agent.games
    with torch.no_grad():
        output = agent(frames_NSHW.unsqueeze(1), game=game)
        logits_NA = model.policy.get_distribution(frames_NSHW).distribution.logits
        values_N = model.policy.predict_values(frames_NSHW).squeeze(1)
    pairs = {
        "log probabilities": (torch.log_softmax(output.logits_BTA.squeeze(1), dim=-1), logits_NA),
        "values": (output.value_BT.squeeze(1), values_N),
    }
    for name, (one, other) in pairs.items():
        if not torch.allclose(one, other, atol=TOLERANCE):
            raise WrongBytes(f"SB3's {name} are up to {float((one - other).abs().max()):.1e} away from the agent's")


def _returns(bench: LearningBench, game: str, on_run: Callable[[], None]) -> Returns:
    our_returns, peer_returns = [], []
    for seed in range(bench.seeds):
        config = bench.run_config(game, seed)
        our_returns.append(our_return(config))
        on_run()
        peer_returns.append(peer_return(config))
        on_run()
    return Returns(game=game, steps=config.steps_per_game, ours=tuple(our_returns), peer=tuple(peer_returns))


def our_return(config: RunConfig) -> float:
    """Trains our PPO with `config`. Returns the mean raw return of the episodes that ended in training's last quarter; NaN if none did."""
    with ExitStack() as stack:
        ours = OurPPO(config, stack)
        updates = config.updates_per_game
        ended = [ours.update(remaining=1 - update / updates).episode_returns for update in range(updates)]
    returns = [value for values in ended[-_last_updates(updates) :] for value in values]
    return statistics.fmean(returns) if returns else float("nan")


def peer_return(config: RunConfig) -> float:
    """Trains SB3's PPO in its own environments, starting from the same parameters as ours.

    Returns, as `our_return` does, the mean raw return of the episodes that ended in training's last quarter; NaN if none did.
    """
    peer = _peer()
    returns: list[float] = []
    begin = config.steps_per_game - _last_updates(config.updates_per_game) * config.steps_per_update

    def note(seen: dict[str, Any], _: dict[str, Any]) -> bool:
        if seen["self"].num_timesteps > begin:
            returns.extend(info["episode"]["r"] for info in seen["infos"] if "episode" in info)
        return True

    with ExitStack() as stack:
        model = peer.make_ppo(config, peer.sb3_envs(config))
        stack.callback(model.env.close)
        peer.copy_parameters(OurPPO(config, stack).agent, model.policy)
        model.learn(config.steps_per_game, callback=note)
    return statistics.fmean(returns) if returns else float("nan")


def _last_updates(updates: int) -> int:
    """Returns how many updates the last quarter of a training has, given how many the training has; at least one."""
    return max(1, round(LAST_PART * updates))


def _peer() -> Any:
    try:
        from ooc_moe.bench.learning import peers
    except ImportError as missing:
        raise InvalidRequest(f'learning: {missing.name} is not installed; pip install "ooc-moe[bench,atari]"') from missing
    return peers


def facts(bench: LearningBench, *, command: str) -> dict[str, str]:
    """Returns the lines above the result tables, by name, so that a reader can judge and repeat the measurement.

    They are the command, the commit, the machine, the versions, and how our learner and SB3's were set up.
    """
    return provenance.facts(Path(), command=command) | {
        "torch": f"{torch.__version__}, cpu, threads: {bench.threads} for either learner, {bench.env_threads} to emulate Atari where "
        "environments are ours",
        "network": "our stem, then one block of attention, with a context of one frame, and a dense FFN; SB3's starts as a copy of ours",
        "environments": "ours: ale-py's AtariVectorEnv, and pixel games in numpy; SB3's own: make_atari_env (gymnasium's AtariEnv with "
        "AtariWrapper, DummyVecEnv, VecFrameStack), and pixel games one by one in DummyVecEnv. Atari: sticky actions 0.25, 18 actions, "
        "4 frames of 42 x 42, rewards clipped, a lost life ends an episode",
        "update": "steps, epochs and steps of a minibatch: Atari 16 x 64, 3, 256; pixel 32 x 32, 3, 256",
        "rounds": f"{bench.rounds}, interleaved; in a round each learner does one update. Returns are means over the games that ended in "
        "the last quarter",
    }
