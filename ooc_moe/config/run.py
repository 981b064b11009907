"""The configuration of a training run: games, steps, agent, PPO, evaluation and storage.

The values are checked when a configuration is made. A run writes its configuration to config.json; `--resume` and `--config` read that
file. The docstring below each field is also the help of its option on the command line.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from ooc_moe.config.agent import AgentConfig, Compute, require
from ooc_moe.metrics.log import CONFIG_FILE
from ooc_moe.metrics.trace import TraceInfo
from ooc_moe.moe.expert_layout import check_bfloat16_widths
from ooc_moe_client.remote.connection import check_target
from ooc_moe_wire.errors import InvalidRequest, require_at_least

PrefetchSource = Literal["off", "detector", "schedule"]
Protection = Literal["replay", "freeze", "ewc", "clone", "none"]
Recogniser = Literal["detector", "nearest-mean", "oracle"]
# The values of the client's enumerations Plane and AdmissionMode, as words of a file or of the command line.
PlaneName = Literal["auto", "stream", "local"]
AdmissionName = Literal["off", "observe", "enforce"]
# As the name of a bank, without a slash, and short enough for "/experts" or "/layer12" to follow.
_NAME, _NAME_SAYS = re.compile(r"[A-Za-z0-9_\-.]{1,100}"), "1 to 100 letters, digits, '_', '-' or '.'"

_CHOICES: dict[str, Any] = {
    "compute": Compute,
    "plane": PlaneName,
    "prefetch": PrefetchSource,
    "prefetch_admission": AdmissionName,
    "protection": Protection,
    "recognise": Recogniser,
}


@dataclass(frozen=True, slots=True)
class Turn:
    """A stretch of consecutive PPO updates in one game. A run is a sequence of turns."""

    phase: int
    """The game's position in the run's list of games, from 0."""
    first: int
    """Number of the turn's first update, counted in this game from 0."""
    end: int
    """Number of the update after the turn's last one, counted in the same way."""
    evaluated: bool
    """Whether the games are evaluated after this turn, and a checkpoint is kept for good."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PPOConfig:
    """The settings of proximal policy optimisation (PPO, Schulman et al. 2017). The defaults are values that are common for Atari."""

    num_envs: int = 16
    """Environments that are played in parallel."""
    rollout_steps: int = 64
    """Steps of each environment between two updates; must be a multiple of the agent's context."""
    epochs: int = 3
    """Times that each update goes through its rollout."""
    minibatch_segments: int = 16
    """Segments per optimizer step; a segment is `context` steps of one environment."""
    learning_rate: float = 1e-3
    """Adam's learning rate."""
    anneal: bool = True
    """Whether the learning rate falls linearly to zero within each game; otherwise it is constant."""
    gamma: float = 0.99
    """Discount: the factor that a reward is multiplied by for each step that it lies ahead."""
    gae_lambda: float = 0.95
    """Lambda of generalised advantage estimation: 0 is one-step, 1 is Monte Carlo."""
    clip: float = 0.2
    """PPO's clipping range: a probability ratio beyond 1 +- clip has no gradient in the direction that would increase the objective."""
    entropy_coef: float = 0.01
    """Weight of the entropy bonus."""
    value_coef: float = 0.5
    """Weight of the value loss."""
    max_grad_norm: float = 0.5
    """Largest global norm of all gradients (dense parameters and experts together); larger gradients are scaled down."""
    replay_routing: bool = True
    """Whether an update sends each token to the same experts as the rollout did. Otherwise the router chooses again with new noise, and the
    ratios differ from 1 even before the first step."""

    def __post_init__(self) -> None:
        require_at_least(1, **{name: getattr(self, name) for name in ("num_envs", "rollout_steps", "epochs", "minibatch_segments")})
        for name in ("gamma", "gae_lambda"):
            require(0 <= getattr(self, name) <= 1, name, getattr(self, name), "between 0 and 1")
        for name in ("learning_rate", "clip", "max_grad_norm"):
            require(0 < getattr(self, name) < math.inf, name, getattr(self, name), "a number above 0")
        for name in ("entropy_coef", "value_coef"):
            require(math.isfinite(getattr(self, name)), name, getattr(self, name), "a number")


@dataclass(frozen=True, kw_only=True, slots=True)
class RunConfig:
    """The configuration of one training run. `agent` has the sizes of the agent, `ppo` the settings of its learning."""

    run_dir: Path
    """The directory that the run writes to; the last part of the path names the run and its banks."""
    games: tuple[str, ...]
    """Games to learn one after another, for example krull,road_runner. A game may occur more than once."""
    agent: AgentConfig
    ppo: PPOConfig = field(default_factory=PPOConfig)
    steps_per_game: int = 20_480
    """Environment steps in each game, over all environments (an Atari step is 4 frames)."""
    seed: int = 0
    """Seed of everything random."""
    store: str | None = None
    """Address of the storage daemon: HOST:PORT or unix:PATH. Without an address, the run starts its own daemon on RUN_DIR/store."""
    plane: PlaneName = "auto"
    """How experts travel: over the connection (stream), through memory that a daemon on this host shares (local), or local where possible
    (auto)."""
    prefetch: PrefetchSource = "detector"
    """What decides which experts to prefetch: nothing does (off), the detector, or the schedule, which knows the next game. Unless off,
    experts that replayed routing needs are prefetched too."""
    prefetch_admission: AdmissionName = "enforce"
    """What happens to a prefetch without a free slot, or too late at the measured bandwidth: it is fetched (off), fetched and counted
    (observe), or dropped (enforce)."""
    switch_every: int = 0
    """Updates in a game before the next game has its turn; the games take turns until each had all its steps. 0: all updates of a game at
    once; 1: close to joint training. Unless 0, the games are evaluated once, at the end."""
    protection: Protection = "replay"
    """How the parts that all games share are protected from later games: stored features of the stem are replayed (replay), the stem is
    frozen after the first game (freeze), elastic weight consolidation (ewc), earlier games' outputs are cloned (clone), or not at all
    (none)."""
    protection_weight: float | None = None
    """Weight of the protection's loss; by default each protection has its own."""
    recognise: Recogniser = "detector"
    """What tells evaluation which game is on the screen: the detector, its baseline (nearest-mean), or the true game (oracle)."""
    exemplars_per_game: int = 200
    """Frames of each game that the detector stores, and rehearses while it learns other games; 0: none."""
    detect_unknown: bool = True
    """Whether frames far from all stored frames count as an unknown game. Such frames prefetch nothing and hardly change the belief."""
    belief_smoothing: float = 0.7
    """Weight of the previous belief about an environment's game in the new belief, per frame; 0: no smoothing."""
    belief_switch_at: float = 0.7
    """Smoothed probability that another game needs before the belief switches to it; 0: the most probable game is believed."""
    eval_envs: int = 8
    """Environments that evaluation plays in parallel, for each game."""
    eval_episodes: int = 1
    """Episodes that evaluation plays one after another in each environment."""
    eval_steps: int = 1000
    """Largest number of evaluation steps in each environment, over all its episodes of a game; 0: no evaluation."""
    eval_unseen: bool = False
    """Whether games that are not learned yet are evaluated too. Forward transfer is measured by them."""
    checkpoint_every: int = 0
    """Updates between checkpoints; 0: only at the end of each game (of the run, if games take turns). A checkpoint resets the
    environments."""
    from_bank: str | None = None
    """Name of a bank whose experts the run begins with. They are forked: the run never changes that bank."""
    device: str = "cpu"
    """Device of the agent: cpu, cuda or cuda:N."""
    compute: Compute = "float32"
    """What the agent's networks compute in. bfloat16 is autocast, with grouped products for the experts: faster on a GPU. Parameters,
    gradients, routers and losses stay float32."""
    deterministic: bool = False
    """Whether torch uses only operations that give the same bits again on the same machine, which is slower on a GPU. On the CPU a run
    gives the same bits either way."""
    threads: int = 1
    """CPU threads that torch computes with. Small agents gain little from more threads, and lose much if other work shares the cores."""
    env_threads: int = 2
    """Threads that emulate Atari; results do not depend on their number."""
    trace: str | None = None
    """File that records which experts are used, for ooc-moe simulate; by default nothing is recorded."""

    def __post_init__(self) -> None:
        require(_NAME.fullmatch(self.name) is not None, "run_dir", self.run_dir, f"named with {_NAME_SAYS}, which its banks' names carry")
        require(bool(self.games), "games", self.games, "at least one game")
        comes_back = self.switch_every > 0 and len(set(self.games)) < len(self.games)
        require(not comes_back, "games", self.games, "different games, which a run with switch_every needs")
        for least, names in (
            (1, ("steps_per_game", "eval_envs", "eval_episodes", "threads", "env_threads")),
            (0, ("eval_steps", "checkpoint_every", "switch_every", "seed", "exemplars_per_game")),
        ):
            require_at_least(least, **{name: getattr(self, name) for name in names})
        weight = self.protection_weight
        require(weight is None or 0 <= weight < math.inf, "protection_weight", weight, "a number of at least 0")
        for name, choices in _CHOICES.items():
            require(getattr(self, name) in get_args(choices), name, repr(getattr(self, name)), f"one of {', '.join(get_args(choices))}")
        if self.store is not None:
            check_target(self.store)
        context, steps = self.agent.context, self.ppo.rollout_steps
        require(steps % context == 0, "rollout_steps", steps, f"a multiple of the agent's context, {context}")
        if self.compute == "bfloat16":
            check_bfloat16_widths(self.agent.dim, self.agent.hidden)
        self._check_detector()
        self._check_room()

    def _check_detector(self) -> None:
        for name in ("belief_smoothing", "belief_switch_at"):
            require(0 <= getattr(self, name) < 1, name, getattr(self, name), "at least 0 and below 1")
        stored = self.exemplars_per_game
        require(stored >= 2 or not self.detect_unknown, "exemplars_per_game", stored, "at least 2, which detect_unknown compares with")

    def _check_room(self) -> None:
        """Raises InvalidRequest if the banks may not grow and are too small for the pools of all games.

        Without this check, the run would stop only when the turn of the first game without room came.
        """
        agent, num_games = self.agent, len(set(self.games))
        needed, each = agent.owned_experts(num_games), agent.owned_experts(1)
        want = f"at least {needed}, which {num_games} games need ({each} each, by pool_size {agent.pool_size}) where grow is off"
        require(agent.grow or needed <= agent.num_experts, "num_experts", agent.num_experts, want)

    @property
    def name(self) -> str:
        """The run's name: the last part of its directory. The names of its banks begin with it."""
        return self.run_dir.resolve().name

    @property
    def steps_per_update(self) -> int:
        """The number of environment steps in one rollout, over all environments."""
        return self.ppo.num_envs * self.ppo.rollout_steps

    @property
    def updates_per_game(self) -> int:
        """The number of PPO updates in each game: enough for `steps_per_game`, rounded up to whole rollouts."""
        return -(-self.steps_per_game // self.steps_per_update)

    @property
    def turns(self) -> tuple[Turn, ...]:
        """The order in which the run's updates go through its games.

        Without `switch_every`, each game gets all its updates in one turn. With it, the games take turns of `switch_every` updates, round
        after round.
        """
        updates, games = self.updates_per_game, range(len(self.games))
        if not self.switch_every:
            return tuple(Turn(phase, 0, updates, evaluated=True) for phase in games)
        rounds = [(first, min(first + self.switch_every, updates)) for first in range(0, updates, self.switch_every)]
        return tuple(Turn(phase, *span, evaluated=span == rounds[-1] and phase == games[-1]) for span in rounds for phase in games)

    def trace_info(self) -> TraceInfo:
        """Describes this run in the form that a trace file (the record of its expert uses) begins with."""
        agent = self.agent
        return TraceInfo(
            source=self.name,
            num_banks=agent.num_banks,
            expert_bytes=agent.expert_layout().body_bytes,
            hbm_experts=agent.hbm_experts // agent.num_banks * agent.num_banks,
        )

    def to_json(self) -> str:
        """Returns the configuration as JSON. run_dir is left out, so that a run's directory may be moved."""
        fields = dataclasses.asdict(self)
        del fields["run_dir"]
        return json.dumps(fields, indent=2)

    @staticmethod
    def read(run_dir: Path) -> RunConfig:
        """Reads the configuration of an existing run. Raises InvalidRequest if the directory holds no run."""
        path = run_dir / CONFIG_FILE
        if not path.exists():
            raise InvalidRequest(f"run_dir: {run_dir} holds no run (no {CONFIG_FILE})")
        return RunConfig.from_json(path.read_text(), run_dir)

    @staticmethod
    def from_json(text: str, run_dir: Path) -> RunConfig:
        """Makes a configuration from the text that `to_json` returned, with `run_dir` as the run's directory."""
        fields: dict[str, Any] = json.loads(text)
        agent: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in fields.pop("agent").items()}
        if agent.get("attention") == "first-game":
            raise InvalidRequest(f"attention: 'first-game' of {run_dir} is no longer supported; train again with 'per-game' or 'shared'")
        ppo, games = PPOConfig(**fields.pop("ppo")), tuple(fields.pop("games"))
        return RunConfig(run_dir=run_dir, agent=AgentConfig(**agent), ppo=ppo, games=games, **fields)
