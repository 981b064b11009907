import dataclasses
from contextlib import nullcontext

import pytest
import torch

from ooc_moe.config.agent import PRESETS
from ooc_moe.moe import grouped
from ooc_moe.moe.layer import TieredExperts, TieredMoE
from ooc_moe.moe.router import Router, balance_loss
from ooc_moe.moe.wave import WaveRows
from ooc_moe_wire.errors import InvalidRequest

TINY = PRESETS["tiny"]
POOL = (1, 4, 6, 9, 15)


@pytest.fixture
def make_layer(world):
    def make(*, capacity: int = 16, dropout: float = 0.0) -> TieredMoE:
        (cache,) = world.caches(TINY, capacity=capacity)
        torch.manual_seed(0)
        router = Router(TINY.dim, POOL, top_k=2, noise=1.0)
        torch.nn.init.normal_(router.weight)
        return TieredMoE(TieredExperts(cache), router, dropout=dropout)

    return make


def tokens(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, TINY.dim, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("shape", [(12,), (3, 4)])
@pytest.mark.parametrize("capacity", [1, 2, 16])
def test_the_layer_and_all_its_gradients_equal_a_plain_dense_twin(make_layer, twin, shape, capacity: int) -> None:
    layer, dense = make_layer(capacity=capacity), twin(TINY)
    x = tokens(*shape).requires_grad_()
    output = layer(x)
    weights = torch.randn(output.y.shape, generator=torch.Generator().manual_seed(4))
    (output.y * weights).sum().backward()

    y = x.detach().clone().requires_grad_()
    normal_ND = torch.nn.functional.layer_norm(y.reshape(12, -1), (TINY.dim,))
    places_NK = torch.tensor([[POOL.index(expert) for expert in row] for row in output.routed.experts_NK.tolist()])
    router_weight = layer.router.weight.detach().clone().requires_grad_()
    gates_NK = (normal_ND @ router_weight.T).gather(1, places_NK).softmax(1)
    expected = y + dense(normal_ND, output.routed.experts_NK, gates_NK).view_as(y)
    (expected * weights).sum().backward()

    torch.testing.assert_close(output.y, expected)
    torch.testing.assert_close(x.grad, y.grad)
    torch.testing.assert_close(layer.router.weight.grad, router_weight.grad)
    gradients = layer._experts.gradients
    assert gradients.experts == sorted(set(output.routed.experts_NK.flatten().tolist()))
    for expert in gradients.experts:
        for name, gradient in gradients.of(expert).items():
            torch.testing.assert_close(gradient, dense.experts[expert][name].grad, msg=f"{expert} {name}")


def test_gradients_of_two_passes_add_up_and_zero_forgets_them(make_layer) -> None:
    layer = make_layer()
    gradients = layer._experts.gradients

    def backward(x: torch.Tensor) -> dict[int, torch.Tensor]:
        layer(x).y.square().sum().backward()
        return {expert: gradients.flat(expert).clone() for expert in gradients.experts}

    first = backward(tokens(6))
    gradients.zero()
    assert gradients.experts == []
    second = backward(3 * tokens(9))
    both = backward(tokens(6))
    assert set(both) == set(first) | set(second)
    for expert, sum_ in both.items():
        expected = sum(part[expert] for part in (first, second) if expert in part)
        torch.testing.assert_close(sum_, expected)


def test_experts_get_gradients_even_where_nothing_dense_is_trained(make_layer) -> None:
    layer = make_layer().requires_grad_(False)
    layer(tokens(5)).y.sum().backward()
    assert layer._experts.gradients.experts


def test_without_grad_nothing_is_kept_and_no_expert_becomes_dirty(make_layer) -> None:
    layer = make_layer()
    with torch.no_grad():
        output = layer(tokens(5))
    stats = layer._experts.cache.stats()
    assert not output.y.requires_grad
    assert (layer._experts.gradients.experts, stats.dirty) == ([], 0)
    assert stats.bytes_in == stats.misses * TINY.expert_layout().parameter_bytes, "acting fetches parameters only"


def test_tokens_are_counted_by_expert(make_layer) -> None:
    output = make_layer()(tokens(30))
    chosen = output.routed.experts_NK.flatten().tolist()
    assert output.tokens_by_expert == {expert: chosen.count(expert) for expert in sorted(set(chosen))}
    assert sum(output.tokens_by_expert.values()) == 60


def test_only_the_chosen_experts_are_fetched_and_backward_counts_no_access(make_layer) -> None:
    layer = make_layer()
    output = layer(tokens(1))
    output.y.sum().backward()
    stats = layer._experts.cache.stats()
    assert (stats.accesses, stats.misses, stats.resident) == (2, 2, 2)


def test_with_room_for_one_expert_backward_fetches_again(make_layer) -> None:
    layer = make_layer(capacity=1)
    layer(tokens(12)).y.sum().backward()
    stats = layer._experts.cache.stats()
    assert stats.misses == stats.accesses == len(layer._experts.gradients.experts)
    assert stats.refetches >= stats.misses - 1


def test_dropout_is_off_in_evaluation_and_drops_in_training(make_layer) -> None:
    layer, plain = make_layer(dropout=0.5), make_layer()
    x = tokens(8)
    assert torch.equal(layer.eval()(x).y, plain.eval()(x).y)
    layer.train()
    added = layer(x).y - x
    assert 0.2 < float((added == 0).float().mean()) < 0.8


def test_a_failure_inside_an_expert_leaves_nothing_pinned(make_layer) -> None:
    layer = make_layer(capacity=1)

    def fail(*_: object) -> None:
        raise RuntimeError("in the middle")

    for _ in range(2):
        with pytest.raises(RuntimeError, match="in the middle"):
            layer._experts.visit([1, 4], fail, counted=True)
    assert layer(tokens(12)).y.isfinite().all()


def test_a_larger_model_dimension_needs_no_other_code(world, twin) -> None:
    config = dataclasses.replace(TINY, dim=24, hidden=40, num_heads=3)
    (cache,) = world.caches(config, capacity=3)
    x_ND = torch.randn(5, 24)
    experts_NK = torch.tensor([[0, 1], [2, 3], [4, 5], [6, 7], [0, 15]])
    routed = Router(24, range(16), top_k=2, noise=0.0)(x_ND, experts_NK=experts_NK)
    y_ND = TieredExperts(cache)(x_ND, routed)
    torch.testing.assert_close(y_ND, twin(config)(x_ND, experts_NK, routed.gates_NK))


def test_autocast_to_bfloat16_stays_near_float32_and_its_gradients_add_up_in_float32(make_layer) -> None:
    results = []
    for enabled in (False, True):
        layer, x = make_layer(capacity=2), tokens(40).requires_grad_()
        routing = make_layer()(x).routed.experts_NK
        for _ in range(2):
            with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
                output = layer(x, experts_NK=routing)
            output.y.square().sum().backward()
        gradients = layer._experts.gradients
        results.append([output.y.detach(), x.grad, layer.router.weight.grad, *(gradients.flat(expert) for expert in gradients.experts)])
    for plain, cast in zip(*results, strict=True):
        assert cast.dtype == torch.float32
        assert 1e-5 < float((cast - plain).norm() / plain.norm()) < 3e-2


@pytest.mark.parametrize("sizes", [{"dim": 12, "hidden": 32, "num_heads": 3}, {"dim": 16, "hidden": 20}])
def test_widths_that_grouped_products_cannot_have_are_refused_by_name_in_bfloat16_only(world, sizes: dict[str, int]) -> None:
    (cache,) = world.caches(dataclasses.replace(TINY, **sizes))
    layer = TieredMoE(TieredExperts(cache), Router(sizes["dim"], POOL, top_k=2))
    x_ND = torch.randn(5, sizes["dim"])
    layer(x_ND)
    name, width = ("dim", 12) if sizes["dim"] == 12 else ("hidden", 20)
    with (
        torch.autocast("cpu", torch.bfloat16),
        pytest.raises(InvalidRequest, match=f"{name}: {width} is not a multiple of 8, which experts in bfloat16 need"),
    ):
        layer(x_ND)


@torch.no_grad()
@pytest.mark.parametrize(("dim", "hidden", "fits"), [(16, 40, True), (12, 40, False), (16, 20, False)])
def test_grouped_products_take_multiples_of_8_on_a_gpu(dim: int, hidden: int, fits: bool) -> None:
    """By torch's own rules for CUDA: on "meta", where tensors have no content, it checks strides as the kernels do."""
    shapes, counts = {"w1": (dim, hidden), "b1": (hidden,), "w2": (hidden, dim), "b2": (dim,)}, [3, 5]
    x_MD, out_MD, grad_MD = (torch.zeros(8, dim, dtype=torch.bfloat16, device="meta") for _ in range(3))
    rows = WaveRows(counts, x_MD, *(torch.zeros(8, hidden, dtype=torch.bfloat16, device="meta") for _ in range(2)))
    parameters, gradients = ([{name: torch.zeros(shapes[name], device="meta") for name in shapes} for _ in counts] for _ in range(2))
    with nullcontext() if fits else pytest.raises(RuntimeError, match="multiple of 16 bytes"):
        grouped.forward(parameters, rows, out_MD)
    with nullcontext() if fits else pytest.raises(RuntimeError, match="multiple of 16 bytes"):
        grouped.backward(parameters, gradients, rows, out_MD, grad_MD)


def test_a_visit_on_the_hit_path_takes_no_memory_for_gradients_or_slots_anew(make_layer) -> None:
    layer = make_layer()
    gradients = layer._experts.gradients

    def addresses() -> dict[int, int]:
        gradients.zero()
        layer(tokens(20)).y.sum().backward()
        return {expert: gradients.flat(expert).data_ptr() for expert in gradients.experts}

    assert set(addresses().values()) == set(addresses().values())


def test_a_layer_call_turns_the_device_into_host_numbers_once(make_layer, monkeypatch) -> None:
    layer = make_layer()
    layer(tokens(9)).y.sum().backward()
    seen = []
    for name in ("tolist", "item", "__bool__", "__int__", "__float__", "nonzero", "cpu", "numpy"):
        right = getattr(torch.Tensor, name)
        monkeypatch.setattr(torch.Tensor, name, lambda self, *rest, name=name, right=right: (seen.append(name), right(self, *rest))[1])
    output = layer(tokens(9))
    again = layer(tokens(9), experts_NK=output.routed.experts_NK)
    (again.y.sum() + balance_loss(again.routed)).backward()
    assert seen == ["tolist", "tolist"]
