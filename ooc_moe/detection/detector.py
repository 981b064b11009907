"""The detector: recognises the game on the screen and predicts which experts it will need.

`Detector` is a small network over the newest frame, with one output per game and one per expert. It learns online while a game is trained,
from that game's frames and from a few stored frames of every other game. Without stored frames it would forget, because it meets the games
one after another, as the agent does. It runs on the CPU, because frames are made there. belief.py holds its results (`Prediction`) and
smooths them over time (`Belief`), screens.py holds the network's parts, and nearest_mean.py a baseline to compare with.

Letters: N frames or environments, S stacked frames, H height, W width, G games, E experts, M stored frames, D features.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ooc_moe.config.seeds import derived_seed, seeded
from ooc_moe.detection.belief import Belief, Prediction
from ooc_moe.detection.checks import check_knows_a_game, check_usage, index_of_game
from ooc_moe.detection.screens import SCREEN, Neighbourhood, Reservoir, ScreenFeatures, screens_of

__all__ = ["Belief", "Detector", "Prediction"]

GRADIENT_STEPS = 4
"""Gradient steps of one call of `learn`. With 4, some 20 calls, as in a short run, are enough to recognise a game."""
FEATURES_LR, HEADS_LR = 1e-3, 1e-2
REPLAY = 64
"""Stored frames of other games in each gradient step."""
USAGE_DECAY = 0.8
"""The weight of an expert's recorded usage when a call of `learn` averages it with the new usage."""
UNUSED_LOGIT = -4.0
"""The initial logit of an expert. It is so low that an expert which was never seen in use is not prefetched."""


class Detector(nn.Module):
    """Predicts which game an observation shows, and which experts will be used for it. It learns online, while the games are trained.

    Args:
        frame_stack: frames in an observation. Only the newest is used, because the older ones are empty just when a game begins.
        frame_size: height and width of a frame.
        num_experts: number of experts of all banks together; `grow_experts` adds more.
        prefetch_experts: the most experts that a prediction names.
        exemplars_per_game: how many frames of each game are stored. They are a uniform random sample of all the game's frames that were
            learned (reservoir sampling, Vitter 1985). The detector learns from them again while other games are learned.
        detect_unknown: whether a prediction may mark a frame as showing no known game. It is then compared with the stored frames of its
            most probable game, which needs two stored frames.
        seed: decides the initial weights, which frames are stored, and which of these are learned from again.
    """

    def __init__(
        self,
        *,
        frame_stack: int,
        frame_size: int,
        num_experts: int,
        prefetch_experts: int,
        exemplars_per_game: int,
        detect_unknown: bool,
        seed: int,
    ) -> None:
        super().__init__()
        self._frame_shape = (frame_stack, frame_size, frame_size)
        self._prefetch_experts = prefetch_experts
        self._exemplars_per_game, self._detect_unknown = exemplars_per_game, detect_unknown
        self._generator = torch.Generator().manual_seed(derived_seed(seed, "detector"))
        with seeded(derived_seed(seed, "detector weights")):
            self.features = ScreenFeatures()
        self._reset()
        self.grow_experts(num_experts)

    def _reset(self) -> None:
        """Forgets all games and experts: heads without outputs, a new optimizer, no stored frames. The features keep their weights."""
        self.game_head = _GrowingHead(bias=0.0)
        self.expert_head = _GrowingHead(bias=UNUSED_LOGIT)
        self._growth: list[tuple[str, int]] = []
        self._optimizer = torch.optim.Adam(self.features.parameters(), lr=FEATURES_LR, fused=True)
        self._games: list[str] = []
        self._stored: list[Reservoir] = []
        self._neighbourhoods: dict[int, Neighbourhood] = {}
        self._usage_GE = torch.zeros(0, 0)

    @property
    def games(self) -> tuple[str, ...]:
        """The known games, in the order in which they were added."""
        return tuple(self._games)

    @property
    def num_experts(self) -> int:
        """The number of experts for which a prediction has a probability."""
        return self.expert_head.num_outputs

    def add_game(self, name: str) -> None:
        """Adds a game to those that can be recognised. Adding a known game changes nothing."""
        if name in self._games:
            return
        self._games.append(name)
        self._stored.append(Reservoir(self._exemplars_per_game))
        self._usage_GE = torch.cat([self._usage_GE, torch.zeros(1, self.num_experts)])
        self._grow("game_head", 1)

    def grow_experts(self, num_experts: int) -> None:
        """Adds outputs for new experts until predictions cover `num_experts`. If they cover as many already, nothing changes."""
        added = num_experts - self.num_experts
        if added > 0:
            self._usage_GE = F.pad(self._usage_GE, (0, added))
            self._grow("expert_head", added)

    def _grow(self, head: str, outputs: int) -> None:
        self._growth.append((head, outputs))
        parameters = getattr(self, head).grow(outputs)
        self._optimizer.add_param_group({"params": list(parameters), "lr": HEADS_LR})

    # Predicting

    @torch.no_grad()
    def predict(self, frames_NSHW: Tensor) -> Prediction:
        """Predicts the game and the experts of each of these uint8 frames (N, S, H, W).

        The detector is not changed, no gradients are kept, and the result does not depend on the training mode (`train` or `eval`).

        Raises:
            InvalidRequest: the frames have another shape or dtype, or no game was added yet.
        """
        check_knows_a_game(self._games)
        features_ND = self.features(screens_of(frames_NSHW, self._frame_shape))
        probabilities_NG = self.game_head(features_ND).softmax(1)
        expert_probabilities_NE = self.expert_head(features_ND).sigmoid()
        no_N = torch.zeros(len(features_ND), dtype=torch.bool)
        unknown_N = self._unknown(features_ND, probabilities_NG.argmax(1)) if self._detect_unknown else no_N
        return Prediction.of(self._games, probabilities_NG, unknown_N, expert_probabilities_NE, prefetch_experts=self._prefetch_experts)

    def _unknown(self, features_ND: Tensor, games_N: Tensor) -> Tensor:
        """Marks, in a bool tensor (N,), the frames that show no known game: their features are far from all stored frames of `games_N`.

        `games_N` is the number of each frame's most probable game. The probabilities themselves cannot tell an unknown game, because they
        are near 1 for most frames of games that were never seen (Hein et al. 2019).
        """
        unknown_N = torch.ones(len(games_N), dtype=torch.bool)
        for game in sorted(set(games_N.tolist())):
            if len(self._stored[game].screens_MHW) > 1:
                if game not in self._neighbourhoods:
                    self._neighbourhoods[game] = Neighbourhood(self.features(self._stored[game].screens_MHW))
                rows_N = games_N == game
                unknown_N[rows_N] = self._neighbourhoods[game].is_far(features_ND[rows_N])
        return unknown_N

    # Learning

    @torch.enable_grad()
    def learn(self, frames_NSHW: Tensor, game: str, expert_usage_E: Tensor) -> dict[str, float]:
        """Learns that these uint8 frames (N, S, H, W) show `game`, and which experts were used for them.

        Args:
            frames_NSHW: frames of one game.
            game: the name of a game that was added before.
            expert_usage_E: how often each expert was used for these frames, summed over the layers.

        Returns:
            Five figures. `accuracy` (share of right games) and `confidence` (mean probability of the most probable game) are measured on
            these frames before learning from them. `loss`, the sum of `game_loss` and `expert_loss`, is that of the last gradient step.

        Raises:
            InvalidRequest: the game is unknown, or frames or usage have another shape.
        """
        index = index_of_game(game, self._games)
        screens_NHW = screens_of(frames_NSHW, self._frame_shape)
        check_usage(expert_usage_E, self.num_experts)
        with torch.no_grad():
            before = self.game_head(self.features(screens_NHW)).softmax(1).max(1)
        self._record_usage(index, expert_usage_E / len(screens_NHW))
        self._stored[index].add(screens_NHW, self._generator)
        for _ in range(GRADIENT_STEPS):
            losses = self._gradient_step(screens_NHW, index)
        self._neighbourhoods.clear()
        return {"accuracy": (before.indices == index).float().mean().item(), "confidence": before.values.mean().item(), **losses}

    def _record_usage(self, index: int, uses_E: Tensor) -> None:
        """Updates, for game number `index`, the share of its frames for which each expert was used: a moving average over calls.

        `uses_E` is the uses of each expert per frame. It is cut at 1, because several layers may use an expert for the same frame.
        """
        share_E = uses_E.clamp(max=1.0)
        first = not self._stored[index].num_seen
        self._usage_GE[index] = share_E if first else USAGE_DECAY * self._usage_GE[index] + (1 - USAGE_DECAY) * share_E

    def _gradient_step(self, screens_NHW: Tensor, index: int) -> dict[str, float]:
        """Takes one gradient step on these screens of game number `index` and on stored screens of the other games; returns the losses.

        All games have the same weight in the loss.
        """
        others = [game for game, stored in enumerate(self._stored) if game != index and len(stored.screens_MHW)]
        replayed_NHW, replayed_games_N = self._replay(others)
        games_N = torch.cat([torch.full((len(screens_NHW),), index), replayed_games_N])
        weights_N = torch.full((len(games_N),), 1 / len(screens_NHW))
        weights_N[len(screens_NHW) :] = len(others) / REPLAY
        weights_N /= 1 + len(others)
        features_ND = self.features(torch.cat([screens_NHW, replayed_NHW]))
        game_losses_N = F.cross_entropy(self.game_head(features_ND), games_N, reduction="none")
        expert_losses_NE = F.binary_cross_entropy_with_logits(self.expert_head(features_ND), self._usage_GE[games_N], reduction="none")
        game_loss, expert_loss = weights_N @ game_losses_N, weights_N @ expert_losses_NE.mean(1)
        loss = game_loss + expert_loss
        self._optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        self._optimizer.step()
        return {"loss": loss.item(), "game_loss": game_loss.item(), "expert_loss": expert_loss.item()}

    def _replay(self, others: list[int]) -> tuple[Tensor, Tensor]:
        """Draws `REPLAY` stored screens of the games numbered `others`, each game with equal probability.

        Returns:
            The screens, and the number of each screen's game.
        """
        if not others:
            return torch.zeros(0, SCREEN, SCREEN, dtype=torch.uint8), torch.zeros(0, dtype=torch.long)
        draws_N = torch.randint(len(others), (REPLAY,), generator=self._generator)
        counts = torch.bincount(draws_N, minlength=len(others))
        screens = [self._stored[game].draw(count, self._generator) for game, count in zip(others, counts.tolist(), strict=True)]
        return torch.cat(screens), torch.tensor(others).repeat_interleave(counts)

    # Checkpoints

    def get_extra_state(self) -> dict[str, Any]:
        """What `state_dict` saves besides the parameters: games, stored frames, experts' usage, optimizer, random generator.

        `torch.load` can read it with weights_only=True.
        """
        return {
            "games": list(self._games),
            "growth": list(self._growth),
            "stored": [{"screens": stored.screens_MHW, "num_seen": stored.num_seen} for stored in self._stored],
            "usage": self._usage_GE,
            "optimizer": self._optimizer.state_dict(),
            "generator": self._generator.get_state(),
        }

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Restores what `get_extra_state` returned. It also makes the heads as large as they were when the state was saved.

        `load_state_dict` calls this and loads the heads' parameters.
        """
        state = copy.deepcopy(state)
        self._reset()
        for head, outputs in state["growth"]:
            self._grow(head, outputs)
        self._games = state["games"]
        for stored in state["stored"]:
            self._stored.append(Reservoir(self._exemplars_per_game))
            self._stored[-1].screens_MHW, self._stored[-1].num_seen = stored["screens"], stored["num_seen"]
        self._usage_GE = state["usage"]
        self._optimizer.load_state_dict(state["optimizer"])
        self._generator.set_state(state["generator"])


class _GrowingHead(nn.Module):
    """A linear layer to which outputs can be added later.

    The outputs of each addition have parameters of their own, so that the optimizer's moments for the older outputs stay valid.
    """

    def __init__(self, *, bias: float) -> None:
        super().__init__()
        self._bias = bias
        self.blocks = cast("list[nn.Linear]", nn.ModuleList())

    @property
    def num_outputs(self) -> int:
        return sum(len(block.bias) for block in self.blocks)

    def grow(self, outputs: int) -> Iterator[nn.Parameter]:
        """Adds this many outputs, whose weights begin at zero, and returns their parameters for the optimizer."""
        # Without `skip_init` the layer would draw initial weights from torch's global generator.
        block: nn.Linear = nn.utils.skip_init(nn.Linear, ScreenFeatures.DIM, outputs)  # type: ignore[no-untyped-call]
        nn.init.zeros_(block.weight)
        nn.init.constant_(block.bias, self._bias)
        self.blocks.append(block)
        return block.parameters()

    def forward(self, features_ND: Tensor) -> Tensor:
        return torch.cat([block(features_ND) for block in self.blocks], dim=1)
