"""The parts of a run put together: the store, the banks, the HBM caches, the agent, the detector; and what prefetches between them.

Training and evaluation both open one. Knows nothing of PPO, phases or reports.
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
from ooc_moe.detection.detector import Detector
from ooc_moe.detection.nearest_mean import NearestClassMean
from ooc_moe.envs import GameEnvs
from ooc_moe.metrics.trace import TraceWriter
from ooc_moe.session.daemon import embedded_daemon
from ooc_moe_client.hbm.admission import AdmissionMode
from ooc_moe_client.hbm.cache import ExpertCache
from ooc_moe_client.hbm.reporter import Reporter
from ooc_moe_client.hbm.stats import CacheStats
from ooc_moe_client.remote.store import RemoteStore
from ooc_moe_client.store import ExpertStore, Plane, Sections
from ooc_moe_wire.errors import InvalidRequest

log = logging.getLogger(__name__)

LEAST_USEFUL = 0.1
"""An older game's expert is lent to a new one if the detector expects it to be used for at least so many of its frames."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Session:
    """What is open while a run trains or is evaluated."""

    config: RunConfig
    store: ExpertStore
    caches: list[ExpertCache]
    agent: Agent
    detector: Detector
    nearest_mean: NearestClassMean
    reporter: Reporter
    trace: TraceWriter | None = None

    def mark_game(self, game: str, *, evaluating: bool = False) -> None:
        """Notes in the trace which game is on the screen from here on."""
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
        """Asks every cache for its share of `experts` (numbered as the detector does: expert x banks + bank).

        Args:
            experts: the most urgent first.
            within_s: when they will be needed; None: nobody knows.
            probabilities: how likely each is to be needed; None: certain.
            read_only: those that come without their moments.
        """
        wanted: defaultdict[tuple[int, Sections], dict[int, float]] = defaultdict(dict)
        for number in experts:
            expert, bank = divmod(number, len(self.caches))
            sections = Sections.PARAMETERS if number in read_only else Sections.ALL
            wanted[bank, sections][expert] = 1.0 if probabilities is None else probabilities[number]
        for (bank, sections), share in wanted.items():
            self.caches[bank].prefetch(list(share), sections=sections, within_s=within_s, probabilities=share)

    def useful_experts(self, frames_NSHW: Tensor) -> list[list[int]]:
        """Which experts of known games might serve a new one, for `Agent.add_game`: ids by bank, the most useful first.

        Useful is what the detector, which knows the older games only, expects to be used for the new one's frames; as a mean over these.
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
        """How often each expert (numbered as the detector does) was used: counts, one per expert of all banks."""
        num_banks = len(self.caches)
        layers = torch.arange(experts_BTLK.shape[-2]) % num_banks
        numbered = experts_BTLK.long() * num_banks + layers[:, None]
        return torch.bincount(numbered.flatten(), minlength=self.num_experts)

    def make_envs(self, game: str, num_envs: int) -> GameEnvs:
        """Environments of a game, with the agent's frames."""
        agent = self.config.agent
        return envs.make(game, num_envs, frame_size=agent.frame_size, frame_stack=agent.frame_stack, num_threads=self.config.env_threads)

    @property
    def num_experts(self) -> int:
        """Experts of all banks together."""
        return self.agent.num_experts

    def cache_stats(self) -> CacheStats:
        """The HBM counters of all caches, added up."""
        first, *rest = (cache.stats() for cache in self.caches)
        return sum(rest, start=first)

    def store_stats(self) -> dict[str, Any]:
        """The daemon's tiers: what `ooc-moe stats --json` prints under dram, nvme and total."""
        stats = MessageToDict(self.store.stats(), preserving_proto_field_name=True, always_print_fields_with_no_presence=True)
        return {name: {key: _number(value) for key, value in stats.get(name, {}).items()} for name in ("dram", "nvme", "total")}

    def flush(self) -> None:
        """Returns when every trained expert is durable."""
        for cache in self.caches:
            cache.flush()


def check_device(device: str) -> None:
    """Raises InvalidRequest unless tensors can be made on this device, which is cpu or cuda."""
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
    """Opens caches on existing banks, and an agent, a detector and its baseline that know no game yet.

    `trace` is told what the caches are asked for.
    """
    torch.set_num_threads(config.threads)
    agent_config = config.agent
    per_cache = agent_config.hbm_experts // len(bank_names)
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
        agent = Agent(agent_config, caches, seed=config.seed).to(config.device)
        recogniser: dict[str, Any] = {
            "frame_stack": agent_config.frame_stack,
            "frame_size": agent_config.frame_size,
            "num_experts": agent.num_experts,
            "prefetch_experts": agent_config.prefetch_experts,
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
    """Connects to the run's daemon, or starts one on run_dir/store and stops it after. Raises InvalidRequest for an impossible plane."""
    with ExitStack() as stack:
        target = config.store or stack.enter_context(embedded_daemon(Path(config.run_dir) / "store", dram_bytes=config.agent.dram_bytes))
        store = RemoteStore(target, trainer=config.name, plane=Plane(config.plane))
        stack.callback(store.close)
        log.info("experts travel on the %s plane", store.plane.value)
        yield store


def _number(value: Any) -> Any:
    """JSON maps 64-bit numbers to strings; numbers read better."""
    return int(value) if isinstance(value, str) and value.isdigit() else value
