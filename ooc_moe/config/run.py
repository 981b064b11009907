"""What a run is: its games, its budget, its agent and its PPO. Checked here, written to config.json, read back by --resume."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from ooc_moe.config.agent import AgentConfig, require
from ooc_moe.metrics.log import CONFIG_FILE
from ooc_moe.metrics.trace import TraceInfo
from ooc_moe_client.hbm.admission import AdmissionMode
from ooc_moe_client.remote.connection import check_target
from ooc_moe_client.store import Plane
from ooc_moe_wire.errors import InvalidRequest

PrefetchSource = Literal["off", "detector", "schedule"]
Protection = Literal["replay", "freeze", "ewc", "clone", "none"]
Recogniser = Literal["detector", "nearest-mean", "oracle"]
# What a bank's name may hold, but no slash; the rest of it has room beside.
_NAME, _NAME_SAYS = re.compile(r"[A-Za-z0-9_\-.]{1,100}"), "1 to 100 letters, digits, '_', '-' or '.'"


@dataclass(frozen=True, slots=True)
class Turn:
    """Updates that follow one another in one game: number `first` to `end - 1` of `games[phase]`."""

    phase: int
    first: int
    end: int
    evaluated: bool
    """Whether the games are evaluated after it, and a checkpoint is kept."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PPOConfig:
    """Proximal policy optimisation (Schulman et al. 2017), with the values common for Atari."""

    num_envs: int = 16
    """Environments played side by side."""
    rollout_steps: int = 64
    """Steps of each environment between updates; a multiple of the agent's context."""
    epochs: int = 3
    """Passes over a rollout."""
    minibatch_segments: int = 16
    """Segments (context steps of one environment) per optimizer step."""
    learning_rate: float = 1e-3
    """Adam's."""
    anneal: bool = True
    """Whether the learning rate falls linearly to zero within each game; otherwise it stays."""
    gamma: float = 0.99
    """Discount per step."""
    gae_lambda: float = 0.95
    """Generalised advantage estimation: 0 is one-step, 1 is Monte Carlo."""
    clip: float = 0.2
    """Probability ratios beyond 1 +- clip carry no gradient where moving on would gain."""
    entropy_coef: float = 0.01
    """Weight of the entropy bonus."""
    value_coef: float = 0.5
    """Weight of the value loss."""
    max_grad_norm: float = 0.5
    """Global norm of all gradients, dense and experts'."""
    replay_routing: bool = True
    """Whether an update sends each token to the experts it went to in the rollout; otherwise the router chooses anew, as in any training
    pass with noise of its own, and the ratios are not 1 even before the first step."""

    def __post_init__(self) -> None:
        for name in ("num_envs", "rollout_steps", "epochs", "minibatch_segments"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        for name in ("gamma", "gae_lambda"):
            require(0 <= getattr(self, name) <= 1, name, getattr(self, name), "between 0 and 1")
        for name in ("learning_rate", "clip", "max_grad_norm"):
            require(0 < getattr(self, name) < math.inf, name, getattr(self, name), "a number above 0")
        for name in ("entropy_coef", "value_coef"):
            require(math.isfinite(getattr(self, name)), name, getattr(self, name), "a number")


@dataclass(frozen=True, kw_only=True, slots=True)
class RunConfig:
    """One training run."""

    run_dir: Path
    """Everything the run writes; its last part names the run and its banks."""
    games: tuple[str, ...]
    """Learned one after another; a game may come back."""
    agent: AgentConfig
    ppo: PPOConfig = field(default_factory=PPOConfig)
    steps_per_game: int = 20_480
    """Environment steps in each game, over all environments (an Atari step is 4 frames)."""
    seed: int = 0
    store: str | None = None
    """The daemon's address; None starts one on run_dir/store."""
    plane: str = "auto"
    """How experts travel: over the connection ("stream"), through memory that a daemon on this host shares ("local"), or so if possible."""
    prefetch: PrefetchSource = "detector"
    """Who names the experts to bring ahead: nobody, the detector, or the schedule (which knows the next game). Unless it is nobody, an
    update's own are brought ahead too, as far as replayed routing names them."""
    prefetch_admission: str = "enforce"
    """What becomes of a named expert that has no slot to spare, or cannot come in time at the measured bandwidth: fetched all the same
    ("off"), and counted ("observe"), or dropped ("enforce")."""
    switch_every: int = 0
    """Updates in a game before the next one has its turn, round after round until each had all its steps; 0: all of a game's at once.
    1 is joint training, as far as one set of environments at a time can be. The games are evaluated once, at the end."""
    protection: Protection = "replay"
    """How later games are kept from changing what all games share: feature replay for the stem; the stem frozen after the first game;
    elastic weight consolidation; the earlier games' outputs cloned; not at all."""
    protection_weight: float | None = None
    """Weight of the protection's loss; None: its own default."""
    recognise: Recogniser = "detector"
    """Who tells evaluation which game is on the screen: the detector, its baseline, or the truth."""
    exemplars_per_game: int = 200
    """Frames of each game that the detector stores and learns from while it learns others; 0: none."""
    detect_unknown: bool = True
    """Whether frames that lie far from all stored ones count as of no known game: they name no experts, and hardly move the belief."""
    belief_smoothing: float = 0.7
    """How much of what an environment was believed to show outlives a frame; 0: nothing."""
    belief_switch_at: float = 0.7
    """The smoothed probability that another game needs to be believed instead; 0: being the most probable is enough."""
    eval_envs: int = 8
    eval_episodes: int = 1
    """Episodes that evaluation plays in each environment, one after another."""
    eval_steps: int = 1000
    """The most steps of an evaluation in each environment; 0 switches evaluation off."""
    eval_unseen: bool = False
    """Whether the games that are still to come are evaluated too, which forward transfer is measured by."""
    checkpoint_every: int = 0
    """Updates between checkpoints; 0: only at the end of each game (of the run, where games take turns). A checkpoint resets the
    environments."""
    from_bank: str | None = None
    """Fork the experts' first values from this bank."""
    device: str = "cpu"
    threads: int = 1
    """Torch's threads; small agents gain little from more, and lose much where other work shares the cores."""
    env_threads: int = 2
    """Threads that emulate Atari; results do not depend on it."""
    trace: str | None = None
    """The file that records which experts are asked for; None records nothing."""

    def __post_init__(self) -> None:
        require(_NAME.fullmatch(self.name) is not None, "run_dir", self.run_dir, f"named with {_NAME_SAYS}, which its banks' names carry")
        require(bool(self.games), "games", self.games, "at least one game")
        comes_back = self.switch_every > 0 and len(set(self.games)) < len(self.games)
        require(not comes_back, "games", self.games, "different games, which a run with switch_every needs")
        for name in ("steps_per_game", "eval_envs", "eval_episodes", "threads", "env_threads"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        for name in ("eval_steps", "checkpoint_every", "switch_every", "seed", "exemplars_per_game"):
            require(getattr(self, name) >= 0, name, getattr(self, name), "at least 0")
        weight = self.protection_weight
        require(weight is None or 0 <= weight < math.inf, "protection_weight", weight, "a number of at least 0")
        for name, choices in (("prefetch", PrefetchSource), ("protection", Protection), ("recognise", Recogniser)):
            require(getattr(self, name) in get_args(choices), name, repr(getattr(self, name)), f"one of {', '.join(get_args(choices))}")
        modes = [mode.value for mode in AdmissionMode]
        require(self.prefetch_admission in modes, "prefetch_admission", repr(self.prefetch_admission), f"one of {', '.join(modes)}")
        planes = [plane.value for plane in Plane]
        require(self.plane in planes, "plane", repr(self.plane), f"one of {', '.join(planes)}")
        if self.store is not None:
            check_target(self.store)
        context, steps = self.agent.context, self.ppo.rollout_steps
        require(steps % context == 0, "rollout_steps", steps, f"a multiple of the agent's context, {context}")
        self._check_detector()
        self._check_room()

    def _check_detector(self) -> None:
        for name in ("belief_smoothing", "belief_switch_at"):
            require(0 <= getattr(self, name) < 1, name, getattr(self, name), "at least 0 and below 1")
        stored = self.exemplars_per_game
        require(stored >= 2 or not self.detect_unknown, "exemplars_per_game", stored, "at least 2, which detect_unknown compares with")

    def _check_room(self) -> None:
        """That every game finds a pool, where banks may not grow: now, and not when the game's turn comes."""
        agent, num_games = self.agent, len(set(self.games))
        needed, each = agent.owned_experts(num_games), agent.owned_experts(1)
        want = f"at least {needed}, which {num_games} games need ({each} each, by pool_size {agent.pool_size}) where grow is off"
        require(agent.grow or needed <= agent.num_experts, "num_experts", agent.num_experts, want)

    @property
    def name(self) -> str:
        """The run's name, which its banks carry."""
        return self.run_dir.resolve().name

    @property
    def steps_per_update(self) -> int:
        """Environment steps of one rollout."""
        return self.ppo.num_envs * self.ppo.rollout_steps

    @property
    def updates_per_game(self) -> int:
        """PPO updates in each game: the steps rounded up to whole rollouts."""
        return -(-self.steps_per_game // self.steps_per_update)

    @property
    def turns(self) -> tuple[Turn, ...]:
        """The run's order: all updates of a game at once, or `switch_every` of each game, round after round."""
        updates, games = self.updates_per_game, range(len(self.games))
        if not self.switch_every:
            return tuple(Turn(phase, 0, updates, evaluated=True) for phase in games)
        rounds = [(first, min(first + self.switch_every, updates)) for first in range(0, updates, self.switch_every)]
        return tuple(Turn(phase, *span, evaluated=span == rounds[-1] and phase == games[-1]) for span in rounds for phase in games)

    def trace_info(self) -> TraceInfo:
        """What a trace of this run says of itself."""
        agent = self.agent
        return TraceInfo(
            source=self.name,
            num_banks=agent.num_banks,
            expert_bytes=agent.expert_layout().body_bytes,
            hbm_experts=agent.hbm_experts // agent.num_banks * agent.num_banks,
        )

    def to_json(self) -> str:
        """The configuration as text; run_dir is left out, so that a run may be moved."""
        fields = dataclasses.asdict(self)
        del fields["run_dir"]
        return json.dumps(fields, indent=2)

    @staticmethod
    def read(run_dir: Path) -> RunConfig:
        """The configuration of an existing run. Raises InvalidRequest when there is none."""
        path = run_dir / CONFIG_FILE
        if not path.exists():
            raise InvalidRequest(f"run_dir: {run_dir} holds no run (no {CONFIG_FILE})")
        return RunConfig.from_json(path.read_text(), run_dir)

    @staticmethod
    def from_json(text: str, run_dir: Path) -> RunConfig:
        """Reads `to_json`'s text back."""
        fields: dict[str, Any] = json.loads(text)
        agent: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in fields.pop("agent").items()}
        if agent.get("attention") == "first-game":
            raise InvalidRequest(f"attention: 'first-game' of {run_dir} is no longer supported; train again with 'per-game' or 'shared'")
        ppo, games = PPOConfig(**fields.pop("ppo")), tuple(fields.pop("games"))
        return RunConfig(run_dir=run_dir, agent=AgentConfig(**agent), ppo=ppo, games=games, **fields)
