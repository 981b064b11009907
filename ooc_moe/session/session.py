"""Opens the parts of a run and connects them: store, expert caches, agent, detector, and the prefetching of what the detector expects.

Training and evaluation both open a session.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from google.protobuf.json_format import MessageToDict
from torch import Tensor

from ooc_moe import envs
from ooc_moe.agent.agent import Agent
from ooc_moe.config.run import RunConfig
from ooc_moe.detection.belief import Belief
from ooc_moe.detection.detector import Detector
from ooc_moe.detection.nearest_mean import NearestClassMean
from ooc_moe.envs import GameEnvs
from ooc_moe.metrics.trace import TraceWriter
from ooc_moe.session.daemon import embedded_daemon
from ooc_moe.session.torch_setup import set_up_torch
from ooc_moe_client.hbm.admission import AdmissionMode
from ooc_moe_client.hbm.cache import ExpertCache
from ooc_moe_client.hbm.reporter import Reporter
from ooc_moe_client.hbm.stats import CacheStats
from ooc_moe_client.remote.store import RemoteStore
from ooc_moe_client.store import ExpertStore, Plane, Sections
from ooc_moe_wire.errors import InvalidRequest

log = logging.getLogger(__name__)

LEAST_USEFUL = 0.1
"""A new game may borrow an older game's expert if the detector expects at least this share of the new game's frames to use the expert."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Session:
    """The open parts of a run while it trains or is evaluated: store, expert caches, agent, detector and its baseline, all connected."""

    config: RunConfig
    store: ExpertStore
    """The connection to the storage daemon."""
    caches: list[ExpertCache]
    """The caches in GPU memory, one for each bank."""
    agent: Agent
    detector: Detector
    nearest_mean: NearestClassMean
    """The detector's baseline."""
    reporter: Reporter
    """Sends the caches' counters to the daemon at regular intervals."""
    trace: TraceWriter | None = None
    """Records which experts are used. None: nothing is recorded."""

    def mark_game(self, game: str, *, evaluating: bool = False) -> None:
        """Writes to the trace (the record of expert uses, if the run makes one) that `game` is played from now on.

        `evaluating` tells whether it is played for evaluation, not for training.
        """
        if self.trace is not None:
            self.trace.mark(game, evaluating=evaluating)

    def prefetch(
        self,
        experts: Iterable[int],
        *,
        within_s: float | None = None,
        probabilities: Mapping[int, float] | None = None,
        read_only: Collection[int] = (),
    ) -> None:
        """Asks the caches to fetch experts that will probably be needed. Returns at once.

        Args:
            experts: numbers across banks (expert * num_banks + bank), the most urgent first.
            within_s: seconds until they are needed. None: unknown.
            probabilities: the probability that each expert is needed. None: all are needed for certain.
            read_only: the experts to fetch without their optimizer moments.
        """
        wanted: defaultdict[tuple[int, Sections], dict[int, float]] = defaultdict(dict)
        for number in experts:
            expert, bank = divmod(number, len(self.caches))
            sections = Sections.PARAMETERS if number in read_only else Sections.ALL
            wanted[bank, sections][expert] = 1.0 if probabilities is None else probabilities[number]
        for (bank, sections), share in wanted.items():
            self.caches[bank].prefetch(list(share), sections=sections, within_s=within_s, probabilities=share)

    def useful_experts(self, frames_NSHW: Tensor) -> list[list[int]]:
        """Chooses experts of known games that a new game could borrow. Returns their ids by bank, the most useful first.

        The detector, which does not know the new game yet, predicts how probable it is that frames of the new game use each expert. An
        expert is as useful as its mean probability over the frames. `Agent.add_game` takes the result.

        Args:
            frames_NSHW: frames of the new game.
        """
        num_banks, agent = len(self.caches), self.agent
        older = sorted({number for game in agent.games for number in agent.prefetch_set(game)})
        if not older:
            return [[] for _ in self.caches]
        probabilities_E = self.detector.predict(frames_NSHW).expert_probabilities_NE.mean(0)
        likeliest_first = (older[place] for place in probabilities_E[older].argsort(descending=True, stable=True).tolist())
        useful = [number for number in likeliest_first if probabilities_E[number] >= LEAST_USEFUL]
        return [[number // num_banks for number in useful if number % num_banks == bank] for bank in range(num_banks)]

    def usage_of(self, experts_BTLK: Tensor) -> Tensor:
        """Counts how often each expert is chosen in a routing. The counts are in the order of the experts' numbers across banks.

        Args:
            experts_BTLK: the routing: ids of the chosen experts, (..., layers, top_k).
        """
        num_banks = len(self.caches)
        layers = torch.arange(experts_BTLK.shape[-2]) % num_banks
        numbered = experts_BTLK.long() * num_banks + layers[:, None]
        return torch.bincount(numbered.flatten(), minlength=self.num_experts)

    def make_envs(self, game: str, num_envs: int) -> GameEnvs:
        """Makes `num_envs` environments of a game, whose frames have the sizes that the agent expects."""
        agent = self.config.agent
        return envs.make(game, num_envs, frame_size=agent.frame_size, frame_stack=agent.frame_stack, num_threads=self.config.env_threads)

    def new_belief(self, num_envs: int) -> Belief:
        """Makes a belief: which game each of `num_envs` environments probably shows, smoothed over frames as the configuration says."""
        return Belief(num_envs, smoothing=self.config.belief_smoothing, switch_at=self.config.belief_switch_at)

    @property
    def num_experts(self) -> int:
        """The number of experts in all banks together."""
        return self.agent.num_experts

    def cache_stats(self) -> CacheStats:
        """The counters of all expert caches, added up."""
        first, *rest = (cache.stats() for cache in self.caches)
        return sum(rest, start=first)

    def store_stats(self) -> dict[str, Any]:
        """The counters of the daemon's storage tiers: those that `ooc-moe stats --json` prints under dram, nvme and total."""
        stats = MessageToDict(self.store.stats(), preserving_proto_field_name=True, always_print_fields_with_no_presence=True)
        return {name: {key: _number(value) for key, value in stats.get(name, {}).items()} for name in ("dram", "nvme", "total")}

    def flush(self) -> None:
        """Writes every changed expert back to the store, and returns when all of them are on disk."""
        for cache in self.caches:
            cache.flush()


def check_device(device: str) -> None:
    """Raises InvalidRequest unless `device` is a cpu or cuda device on which torch can make tensors."""
    if device.partition(":")[0] not in ("cpu", "cuda"):
        raise InvalidRequest(f"device: {device!r} is neither cpu nor cuda")
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise InvalidRequest(f"device: {device!r} cannot be used here: {str(error).splitlines()[0]}") from error


@contextmanager
def open_session(
    config: RunConfig, store: ExpertStore, bank_names: Sequence[str], *, trace: TraceWriter | None = None
) -> Iterator[Session]:
    """Opens the parts of a run on existing banks, for as long as the `with` block runs. Yields the session.

    The agent, the detector and its baseline are new and know no game yet; a caller may load their states.

    Args:
        config: the run's configuration.
        store: where the banks are.
        bank_names: the banks, in the order of the agent's caches.
        trace: records which experts are used. None: nothing is recorded.
    """
    set_up_torch(config)
    per_cache = config.agent.hbm_experts // len(bank_names)
    with ExitStack() as stack:
        caches = []
        for number, bank in enumerate(bank_names):
            on_access = None if trace is None else partial(trace.access, number)
            cache = ExpertCache(
                store,
                bank,
                capacity_experts=per_cache,
                device=config.device,
                admission=AdmissionMode(config.prefetch_admission),
                on_access=on_access,
            )
            caches.append(stack.enter_context(cache))
        agent = Agent(config.agent, caches, seed=config.seed, compute=config.compute).to(config.device)
        recogniser: dict[str, Any] = {
            "frame_stack": config.agent.frame_stack,
            "frame_size": config.agent.frame_size,
            "num_experts": agent.num_experts,
            "prefetch_experts": config.agent.prefetch_experts,
            "detect_unknown": config.detect_unknown,
            "seed": config.seed,
        }
        detector = Detector(**recogniser, exemplars_per_game=config.exemplars_per_game)
        agent.predictor = detector.predict
        reporter = stack.enter_context(Reporter(store, caches))
        yield Session(
            config=config,
            store=store,
            caches=caches,
            agent=agent,
            detector=detector,
            nearest_mean=NearestClassMean(**recogniser),
            reporter=reporter,
            trace=trace,
        )


@contextmanager
def open_store(config: RunConfig) -> Iterator[ExpertStore]:
    """Connects to the run's storage daemon for as long as the `with` block runs. Yields the connection.

    If the configuration names no daemon, an embedded one on run_dir/store is started, and stopped at the end.

    Raises:
        InvalidRequest: the daemon cannot be reached on the configured plane (shared memory or gRPC).
        Unavailable: the embedded daemon does not start.
    """
    with ExitStack() as stack:
        target = config.store or stack.enter_context(embedded_daemon(Path(config.run_dir) / "store", dram_bytes=config.agent.dram_bytes))
        store = RemoteStore(target, trainer=config.name, plane=Plane(config.plane))
        stack.callback(store.close)
        log.info("experts travel on the %s plane", store.plane.value)
        yield store


def _number(value: Any) -> Any:
    """Turns a 64-bit integer, which protobuf's JSON writes as text, back into an integer. Other values stay as they are."""
    return int(value) if isinstance(value, str) and value.isdigit() else value
