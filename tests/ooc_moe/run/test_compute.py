"""What a run computes in: float32, or bfloat16 in rollouts, updates and evaluations; and the same bits where it is asked for."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from ooc_moe.evaluation.evaluate import Evaluator
from ooc_moe.learning.learner import Learner
from ooc_moe.learning.protection import make_protection
from ooc_moe.learning.rollout import Collector
from ooc_moe.learning.stem_replay import StemReplay
from ooc_moe.metrics.log import read_metrics
from ooc_moe.moe import grouped, looped
from ooc_moe_client.in_memory import InMemoryStore
from tests.ooc_moe.learning.protected import open_agent, rollout_of
from tests.ooc_moe.runs import PIXEL_AGENT, bodies, pixel_run, play, without_clock

CATCH = "pixel/catch"


@pytest.fixture(autouse=True)
def same_torch() -> Iterator[None]:
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Counter[tuple[str, str]]:
    """Counts (part of the run, arithmetic of the experts)."""
    found: Counter[tuple[str, str]] = Counter()
    part = ["elsewhere"]

    def within(owner: type, method: str, name: str) -> None:
        right = getattr(owner, method)

        def run(self, *args, **options):
            before, part[0] = part[0], name
            try:
                return right(self, *args, **options)
            finally:
                part[0] = before

        monkeypatch.setattr(owner, method, run)

    within(Collector, "collect", "rollout")
    within(Learner, "update", "update")
    within(Evaluator, "_evaluate", "evaluation")
    for module, name in ((grouped, "bfloat16"), (looped, "float32")):
        right = module.forward
        monkeypatch.setattr(module, "forward", lambda *args, name=name, right=right: (found.update([(part[0], name)]), right(*args))[1])
    return found


@pytest.mark.parametrize("compute", ["float32", "bfloat16"])
@pytest.mark.parametrize("protection", ["replay", "ewc", "clone"])
def test_a_run_computes_everything_in_what_it_is_told(tmp_path: Path, calls, compute: str, protection: str) -> None:
    config = pixel_run(tmp_path / "run", updates=1, eval_steps=6, compute=compute, protection=protection)
    play(config, InMemoryStore())
    arithmetics = {name for _, name in calls}
    assert arithmetics == {compute}
    assert {part for part, _ in calls} >= {"rollout", "update", "evaluation"}
    updates = [event for event in read_metrics(config.run_dir) if event["event"] == "update"]
    assert len(updates) == 2
    assert all(math.isfinite(value) for event in updates for value in event["losses"].values())
    # Before the first step the policy is the one that acted, up to the rounding of bfloat16 in other shapes of products.
    assert all(abs(event["losses"]["approx_kl"]) < 1e-2 for event in updates)


@pytest.mark.parametrize("banks", ["shared", "per-layer"])
def test_an_agent_in_bfloat16_stays_near_float32_and_answers_in_float32(banks: str) -> None:
    results = []
    for compute in ("float32", "bfloat16"):
        with open_agent(PIXEL_AGENT) as agent:
            generator = torch.Generator().manual_seed(0)
            rollout = rollout_of(agent, CATCH, generator)  # In float32: the same frames and routes for both.
            agent.compute = compute
            agent.eval()
            output = agent(rollout.frames_BTSHW, game=CATCH, starts_BT=rollout.starts_BT, routing=rollout.experts_BTLK)
            (output.logits_BTA.square().mean() + output.value_BT.square().mean() + output.aux_loss).backward()
            segment = agent.segment(CATCH, 4)
            acted = agent.act(rollout.frames_BTSHW[:4, 0], segment, deterministic=True)
            ahead_N = agent.values(acted.tokens_ND, segment, starts_N=torch.zeros(4, dtype=torch.bool))
            gradients = [agent.gradients[0].flat(expert) for expert in agent.gradients[0].experts]
            dense = [parameter.grad for parameter in agent.parameters() if parameter.grad is not None]
            results.append(
                [output.logits_BTA, output.value_BT, output.aux_loss, acted.values_N, acted.tokens_ND, ahead_N, *gradients, *dense]
            )
    assert len(results[0]) > 20
    differ = 0
    for plain, cast in zip(*([tensor.detach() for tensor in tensors] for tensors in results), strict=True):
        assert cast.dtype == torch.float32
        assert float((cast - plain).norm()) <= 5e-2 * float(plain.norm()) + 1e-5
        differ += not torch.equal(plain, cast)
    assert differ > len(results[0]) / 2, "it was computed in bfloat16"


def test_stem_replay_computes_as_the_agent_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[bool] = []
    with open_agent(PIXEL_AGENT) as agent:
        agent.compute = "bfloat16"
        agent.stem.register_forward_hook(lambda *_: seen.append(torch.is_autocast_enabled("cpu")))
        replay = make_protection(pixel_run(tmp_path, compute="bfloat16"), agent)
        assert isinstance(replay, StemReplay)
        generator = torch.Generator().manual_seed(0)
        replay.leave(CATCH, rollout_of(agent, CATCH, generator), generator)
        assert replay.loss("pixel/avoid", generator).dtype == torch.float32
    assert len(seen) > 2
    assert all(seen)


def test_a_deterministic_run_on_the_cpu_gives_the_bits_of_any_other(tmp_path: Path) -> None:
    stores, ends = [], []
    for deterministic in (False, True):
        config = pixel_run(tmp_path / str(deterministic) / "run", updates=1, eval_steps=6, deterministic=deterministic)
        stores.append(InMemoryStore())
        play(config, stores[-1])
        assert torch.are_deterministic_algorithms_enabled() == deterministic
        ends.append(without_clock(config.run_dir))
    assert ends[0] == ends[1]
    for bank in config.agent.bank_names("run"):
        assert bodies(stores[0], bank) == bodies(stores[1], bank)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA")
@pytest.mark.parametrize("compute", ["float32", "bfloat16"])
@pytest.mark.parametrize("protection", ["replay", "freeze", "ewc", "clone", "none"])
def test_a_run_on_a_gpu_ends_with_finite_losses(tmp_path: Path, calls, compute: str, protection: str) -> None:
    config = pixel_run(tmp_path / "run", updates=1, eval_steps=6, device="cuda", compute=compute, protection=protection)
    play(config, InMemoryStore())
    assert {name for _, name in calls} == {compute}
    updates = [event for event in read_metrics(config.run_dir) if event["event"] == "update"]
    assert all(math.isfinite(value) for event in updates for value in event["losses"].values())
