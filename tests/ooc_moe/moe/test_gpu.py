"""The layer and its optimizer on CUDA: near the CPU's results, and the same bits for every capacity. Run with -m gpu."""

from __future__ import annotations

import os

import pytest
import torch

from ooc_moe.config.agent import PRESETS
from ooc_moe.moe.expert_adam import ExpertAdam
from ooc_moe.moe.layer import TieredExperts, TieredMoE
from ooc_moe.moe.router import Router, balance_loss
from ooc_moe_client.hbm.cache import ExpertCache
from ooc_moe_client.in_memory import InMemoryStore

# Read by cuBLAS when it starts; needed for the same bits again.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA"),
]
DEMO = PRESETS["demo"]
POOL = (1, 4, 6, 9, 15)
STEPS = 5
# Relative to the norm; float32 on both sides (TF32 is off by default), other orders of summation, five Adam steps.
TOLERANCE = 1e-4
# One pass in bfloat16, whose unit roundoff is 4e-3.
TOLERANCE_BF16 = 3e-2


@pytest.fixture(autouse=True)
def deterministic():
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def inputs(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens (60, dim), and which experts of POOL each goes to; not all are used in every step."""
    generator = torch.Generator().manual_seed(step)
    experts_NK = torch.stack([torch.randperm(3 + step % 3, generator=generator)[:2] for _ in range(60)])
    return torch.randn(60, DEMO.dim, generator=generator), torch.tensor(POOL)[experts_NK]


def trained(device: str, capacity: int, *, steps: int = STEPS, autocast: bool = False) -> dict[str, torch.Tensor]:
    """What some optimizer steps leave: outputs, gradients of inputs and router, and the parameters and moments of every expert."""
    store = InMemoryStore()
    (spec,) = DEMO.bank_specs("gpu", seed=0)
    store.create_bank(spec)
    results: dict[str, torch.Tensor] = {}
    with ExpertCache(store, spec.name, capacity_experts=capacity, device=device) as cache:
        torch.manual_seed(0)
        router = Router(DEMO.dim, POOL, top_k=2, noise=0.0)
        torch.nn.init.normal_(router.weight)
        experts = TieredExperts(cache)
        layer = TieredMoE(experts, router).to(device)
        adam = ExpertAdam([cache], [experts.gradients], lr=0.01)
        for step in range(steps):
            x_ND, experts_NK = (tensor.to(device) for tensor in inputs(step))
            x_ND.requires_grad_()
            adam.zero_grad()
            with torch.autocast(device, torch.bfloat16, enabled=autocast):
                y_ND = layer(x_ND, experts_NK=experts_NK).y
            y_ND.square().sum().backward()
            results[f"norm {step}"] = torch.tensor(adam.clip_grad_norm(layer.parameters(), 1.0), dtype=torch.float64)
            adam.step()
            results |= {f"y {step}": y_ND.detach().cpu(), f"x.grad {step}": x_ND.grad.cpu()}
        results["router.grad"] = router.weight.grad.cpu()
        for expert in POOL:
            with cache.reading([expert]) as (slot,):
                results |= {f"{name} of {expert}": view[slot].clone().cpu() for name, view in cache.views.items()}
    return results


def test_training_on_cuda_stays_near_the_cpu() -> None:
    on_cpu, on_cuda = trained("cpu", 16), trained("cuda", 16)
    assert on_cpu.keys() == on_cuda.keys()
    for name, expected in on_cpu.items():
        error = float((on_cuda[name] - expected).double().norm() / expected.double().norm())
        assert error < TOLERANCE, f"{name}: {error:.1e}"


@pytest.mark.parametrize("capacity", [1, 2, 4])
def test_every_capacity_gives_the_same_bits(capacity: int) -> None:
    everything, some = trained("cuda", 16), trained("cuda", capacity)
    for name, expected in everything.items():
        assert torch.equal(some[name], expected), name


def test_the_same_training_again_gives_the_same_bits_in_bfloat16_too() -> None:
    once, again = (trained("cuda", 4, autocast=True) for _ in range(2))
    for name, expected in once.items():
        assert torch.equal(again[name], expected), name


def test_one_pass_in_bfloat16_stays_near_float32() -> None:
    plain, cast = (trained("cuda", 4, steps=1, autocast=autocast) for autocast in (False, True))
    for name in ("y 0", "x.grad 0", "norm 0"):
        error = float((cast[name] - plain[name]).norm() / plain[name].norm())
        assert error < TOLERANCE_BF16, f"{name}: {error:.1e}"
    for expert in POOL[:3]:
        mean = f"w1.exp_avg of {expert}"
        assert float((cast[mean] - plain[mean]).norm() / plain[mean].norm()) < TOLERANCE_BF16


def test_a_layer_call_waits_for_the_device_once() -> None:
    store = InMemoryStore()
    (spec,) = DEMO.bank_specs("gpu", seed=0)
    store.create_bank(spec)
    with ExpertCache(store, spec.name, capacity_experts=16, device="cuda") as cache:
        layer = TieredMoE(TieredExperts(cache), Router(DEMO.dim, POOL, top_k=2)).cuda()
        x_ND = inputs(0)[0].cuda().requires_grad_()

        def step(*, autocast: bool) -> None:
            with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
                output = layer(x_ND)
            (output.y.sum() + balance_loss(output.routed)).backward()

        for autocast in (False, True):
            step(autocast=autocast)  # fetches and allocates
            torch.cuda.set_sync_debug_mode("warn")
            try:
                with pytest.warns(UserWarning, match="synchronizing CUDA operation") as warned:
                    step(autocast=autocast)
            finally:
                torch.cuda.set_sync_debug_mode("default")
            assert len([one for one in warned if "synchronizing CUDA operation" in str(one.message)]) == 1
