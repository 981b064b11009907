"""The sizes of an agent: its configuration, its number of parameters and bytes, and the presets.

`ooc_moe.agent` builds the agent that a configuration describes; `run.py` beside this file configures its training.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

from ooc_moe.config.seeds import derived_seed
from ooc_moe.moe.expert_layout import ffn_layout
from ooc_moe_wire.errors import InvalidRequest, require_at_least
from ooc_moe_wire.layout import BankSpec, Layout

Routing = Literal["pool", "token"]
Scope = Literal["shared", "per-layer"]
AttentionOwner = Literal["per-game", "shared"]
Compute = Literal["float32", "bfloat16"]


@dataclass(frozen=True, kw_only=True, slots=True)
class AgentConfig:
    """All sizes of an agent. The defaults are those of the preset "full"; `PRESETS` has the other presets.

    A bank is a named set of experts in the store. A pool is the set of experts that a game may route to in a layer.
    """

    num_games: int = 57
    """Games that the parameter estimate assumes. The agent can learn more games if its banks may grow."""
    frame_size: int = 84
    """Height and width of a frame in pixels."""
    frame_stack: int = 4
    """Consecutive frames that the agent sees at once: the input channels of its convolutions (the stem)."""
    num_actions: int = 18
    """Actions that the policy chooses from; 18 are all of Atari's."""
    stem_channels: tuple[int, ...] = (32, 64, 64)
    """Output channels of the stem's convolutions (channels, kernels and strides as in Mnih et al. 2015)."""
    stem_kernels: tuple[int, ...] = (8, 4, 3)
    """Kernel sizes of the stem's convolutions."""
    stem_strides: tuple[int, ...] = (4, 2, 1)
    """Strides of the stem's convolutions."""
    dim: int = 512
    """Width of a token, and of every layer's input and output."""
    hidden: int = 2048
    """Width of the hidden layer inside an expert."""
    num_layers: int = 6
    """Transformer blocks."""
    num_heads: int = 8
    """Attention heads; dim must be a multiple of this number."""
    context: int = 32
    """Frames of a segment: an action depends on at most this many past frames."""
    dropout: float = 0.0
    """Dropout on the two residual branches of a block. With a value above 0, PPO's ratios differ from 1 even before the first update."""
    num_experts: int = 256
    """Experts that each bank has at the start."""
    grow: bool = True
    """Whether a bank grows when it has too few unowned experts for a new game; otherwise the game is refused."""
    banks: Scope = "shared"
    """Whether all layers share one bank of experts (shared), or each layer has its own (per-layer)."""
    routing: Routing = "pool"
    """The experts that a token may go to: those of its game's pool, or (token) all experts of the bank, with one router for all games."""
    pool_size: int = 4
    """Experts that a game owns in each of its pools."""
    shared_experts: int = 0
    """Experts of older games that a new game's pool also uses. The new game reads these experts and never changes them."""
    pools: Scope = "shared"
    """Whether a game has one pool of experts for all layers (shared), or one per layer (per-layer; always so with one bank per layer)."""
    top_k: int = 2
    """Experts that each token is sent to."""
    router_noise: float = 1.0
    """Standard deviation of the noise on the router's logits in training; 0: no noise."""
    balance_weight: float = 0.01
    """Weight of the load-balancing loss; 0: no such loss."""
    attention: AttentionOwner = "per-game"
    """Whether each game has attention of its own (per-game), or all games train the same attention, as in ordinary networks (shared)."""
    hbm_experts: int = 32
    """Experts that fit into the trainer's HBM cache, over all banks."""
    dram_experts: int = 128
    """Experts that fit into the DRAM of the run's own daemon, over all banks."""
    prefetch_experts: int = 32
    """Experts that the detector prefetches when it recognises a game."""

    def __post_init__(self) -> None:
        self._check_types()
        require_at_least(1, **{name: getattr(self, name) for name in _AT_LEAST_ONE})
        for name in ("router_noise", "balance_weight", "dropout"):
            require(math.isfinite(getattr(self, name)) and getattr(self, name) >= 0, name, getattr(self, name), "at least 0")
        require(self.dropout < 1, "dropout", self.dropout, "below 1")
        for name, choices in (("routing", Routing), ("banks", Scope), ("pools", Scope), ("attention", AttentionOwner)):
            require(getattr(self, name) in get_args(choices), name, repr(getattr(self, name)), f"one of {', '.join(get_args(choices))}")
        self._check_sizes()
        self._check_stem()

    def _check_types(self) -> None:
        for name in (*_AT_LEAST_ONE, "prefetch_experts", "shared_experts"):
            value = getattr(self, name)
            require(isinstance(value, int) and not isinstance(value, bool), name, repr(value), "a whole number")

    def _check_sizes(self) -> None:
        require(self.dim % self.num_heads == 0, "num_heads", self.num_heads, f"a divisor of dim {self.dim}")
        fits = self.routing == "token" or self.pool_size <= self.num_experts
        require(fits, "pool_size", self.pool_size, f"at most num_experts {self.num_experts}")
        require(self.top_k <= self.choices, "top_k", self.top_k, f"at most the {self.choices} experts a token can choose from")
        require_at_least(0, prefetch_experts=self.prefetch_experts, shared_experts=self.shared_experts)
        require(self.routing == "pool" or not self.shared_experts, "shared_experts", self.shared_experts, "0, with token routing")
        for name in ("hbm_experts", "dram_experts"):
            require(getattr(self, name) >= self.num_banks, name, getattr(self, name), f"at least one for each of {self.num_banks} banks")

    def _check_stem(self) -> None:
        require(bool(self.stem_channels), "stem_channels", self.stem_channels, "at least one convolution")
        for name in ("stem_channels", "stem_kernels", "stem_strides"):
            sizes = getattr(self, name)
            require(len(sizes) == len(self.stem_channels), name, sizes, f"as long as stem_channels {self.stem_channels}")
            require(all(isinstance(size, int) and size >= 1 for size in sizes), name, sizes, "made of whole numbers of at least 1")
        require(self.stem_output_size >= 1, "frame_size", self.frame_size, "large enough for the stem's convolutions")

    @property
    def choices(self) -> int:
        """The number of experts that the router chooses from for each token, not counting borrowed ones."""
        return self.pool_size if self.routing == "pool" else self.num_experts

    @property
    def num_banks(self) -> int:
        """The number of banks: 1 if all layers share a bank, otherwise one per layer."""
        return 1 if self.banks == "shared" else self.num_layers

    @property
    def pools_per_game(self) -> int:
        """The number of pools (sets of experts to route to) of each game: 1 if all layers share one bank and pool, else one per layer."""
        return 1 if self.pools == "shared" and self.banks == "shared" else self.num_layers

    def owned_experts(self, num_games: int) -> int:
        """The number of experts that `num_games` games own together in each bank; 0 with token routing, where no game owns experts."""
        pools = self.pools_per_game // self.num_banks
        return num_games * pools * self.pool_size if self.routing == "pool" else 0

    @property
    def stem_output_size(self) -> int:
        """Height and width of the stem's last feature map; below 1 if the frame is too small for the convolutions."""
        size = self.frame_size
        for kernel, stride in zip(self.stem_kernels, self.stem_strides, strict=True):
            size = (size - kernel) // stride + 1 if size >= kernel else 0
        return size

    @property
    def dram_bytes(self) -> int:
        """Bytes of DRAM that the daemon needs for `dram_experts` experts."""
        return self.dram_experts * self.expert_layout().record_bytes

    def expert_layout(self) -> Layout:
        """The layout of one expert's record: its parameters and its Adam state."""
        return ffn_layout(self.dim, self.hidden)

    def bank_names(self, run: str) -> list[str]:
        """The names of a run's banks, in the order of the caches that `Agent` takes."""
        return [f"{run}/experts"] if self.banks == "shared" else [f"{run}/layer{layer}" for layer in range(self.num_layers)]

    def bank_specs(self, run: str, seed: int) -> list[BankSpec]:
        """Describes the banks of a run, for their creation in the store.

        Initial values depend on the seed and on the bank's index, not on the run's name.
        """
        layout = self.expert_layout()
        return [
            BankSpec(name=name, num_experts=self.num_experts, layout=layout, seed=derived_seed(seed, "bank", index))
            for index, name in enumerate(self.bank_names(run))
        ]

    def estimate_params(self) -> ParamEstimate:
        """Counts parameters and bytes of an agent that has learned `num_games` games, each borrowing as many experts as allowed."""
        dim, games, layers, layout = self.dim, self.num_games, self.num_layers, self.expert_layout()
        num_experts = self.num_banks * max(self.num_experts, self.owned_experts(games))
        attentions = layers * (games if self.attention == "per-game" else 1)
        borrowed = sum(min(self.shared_experts, game * self.pool_size) for game in range(games))
        rows = games * self.pool_size + borrowed if self.routing == "pool" else self.num_experts
        return ParamEstimate(
            num_experts=num_experts,
            experts=num_experts * sum(math.prod(tensor.shape) for tensor in layout.parameters),
            attention=attentions * (4 * dim * dim + 4 * dim),
            routers=layers * rows * dim,
            stem=self._stem_params(),
            embeddings=games * (self.context + 1) * dim,
            norms=games * (2 * layers + 1) * 2 * dim,
            heads=games * (dim + 1) * (self.num_actions + 1),
            hbm_bytes=self.hbm_experts * layout.body_bytes,
            dram_bytes=self.dram_bytes,
            nvme_bytes=num_experts * layout.record_bytes,
        )

    def _stem_params(self) -> int:
        inputs = (self.frame_stack, *self.stem_channels[:-1])
        convolutions = zip(inputs, self.stem_channels, self.stem_kernels, strict=True)
        features = self.stem_channels[-1] * self.stem_output_size**2
        return sum(channels * (before * kernel**2 + 1) for before, channels, kernel in convolutions) + (features + 1) * self.dim


@dataclass(frozen=True, kw_only=True, slots=True)
class ParamEstimate:
    """How large an agent is: numbers of parameters by kind, and bytes by storage tier.

    Attributes:
        num_experts: the number of experts in all banks together.
        experts: the number of all their parameters. `attention` to `heads` are numbers of parameters, too.
        hbm_bytes: the size of the expert caches in GPU memory.
        dram_bytes: the size of the daemon's cache in DRAM.
        nvme_bytes: the size of the banks on disk when every expert is written once, with its Adam state.
    """

    num_experts: int
    experts: int
    attention: int
    routers: int
    stem: int
    embeddings: int
    norms: int
    heads: int
    hbm_bytes: int
    dram_bytes: int
    nvme_bytes: int

    @property
    def dense(self) -> int:
        """The number of all parameters that are not experts'."""
        return self.attention + self.routers + self.stem + self.embeddings + self.norms + self.heads

    @property
    def total(self) -> int:
        """The number of all parameters, dense and experts'."""
        return self.experts + self.dense


def require(holds: bool, name: str, value: object, want: str) -> None:
    """Raises InvalidRequest "NAME: VALUE is not WANT" unless `holds` is true."""
    if not holds:
        raise InvalidRequest(f"{name}: {value} is not {want}")


_AT_LEAST_ONE = (
    *("num_games", "frame_size", "frame_stack", "num_actions", "dim", "hidden", "num_layers", "num_heads", "context"),
    *("num_experts", "pool_size", "top_k", "hbm_experts", "dram_experts"),
)

Preset = Literal["tiny", "demo", "full"]
PRESETS: dict[str, AgentConfig] = {
    # For tests: every kind of part that an agent has, as small as possible.
    "tiny": AgentConfig(
        num_games=2,
        frame_size=42,
        stem_channels=(8, 16),
        stem_kernels=(8, 4),
        stem_strides=(4, 2),
        dim=16,
        hidden=32,
        num_layers=2,
        num_heads=2,
        context=4,
        num_experts=16,
        pools="per-layer",
        hbm_experts=8,
        dram_experts=8,
        prefetch_experts=8,
    ),
    # For a CPU: three Atari games, with HBM room for one game's experts (a quarter of all) and DRAM room for half.
    "demo": AgentConfig(
        num_games=3,
        frame_size=42,
        stem_channels=(16, 32, 32),
        stem_kernels=(6, 4, 3),
        stem_strides=(3, 2, 1),
        dim=64,
        hidden=128,
        num_layers=2,
        num_heads=4,
        context=16,
        num_experts=32,
        pools="per-layer",
        hbm_experts=8,
        dram_experts=16,
        prefetch_experts=8,
    ),
    # All 57 Atari games on a GPU. A game's layers share its four experts: 57 games own 228 of the 256.
    "full": AgentConfig(),
}
