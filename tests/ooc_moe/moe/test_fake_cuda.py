"""The layer's arithmetic on fake tensors of device "cuda": shapes, dtypes, and that no operation mixes devices. It needs no GPU.

Fake tensors have no values, so a read on the host fails here: the router's counts are replaced, and the norm of clipping is left out.
Autograd asks CUDA itself for the stream of a tensor on "cuda", so gradients are off, and backward is called directly. Indexing and copying
ask it for a device guard, which torch without CUDA does not have, so they are replaced.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.overrides import TorchFunctionMode

from ooc_moe.moe import grouped, looped
from ooc_moe.moe.expert_adam import ExpertAdam
from ooc_moe.moe.expert_layout import ffn_layout
from ooc_moe.moe.layer import ExpertGradients, TieredExperts, TieredMoE, _MixedExperts
from ooc_moe.moe.router import Router, balance_loss
from ooc_moe.moe.wave import WaveRows
from ooc_moe_client.hbm.slots import strided_views

CUDA = torch.device("cuda:0")
DIM, HIDDEN = 16, 32
COUNTS = [5, 8, 3]
POOL = [2, 3, 5]
LAYOUT = ffn_layout(DIM, HIDDEN)


class WithoutCuda(TorchFunctionMode):
    """Does what torch without CUDA cannot do on fake tensors: unpack, and index by numbers, slices, lists and tensors."""

    def __torch_function__(self, function, types, arguments=(), options=None):
        if function is Tensor.__getitem__:
            return self.get(*arguments)
        if function is Tensor.__setitem__:
            tensor, index, value = arguments
            value = value if isinstance(value, Tensor) else torch.full((), value, dtype=tensor.dtype, device=tensor.device)
            return torch.ops.aten.index_put_(tensor, [self.at(index, tensor)], value)
        if function is Tensor.__iter__:
            return iter(arguments[0].unbind())
        assert function is not Tensor.cpu, "a copy to the host"
        return function(*arguments, **(options or {}))

    def get(self, tensor: Tensor, index) -> Tensor:
        dim = 0
        for part in index if isinstance(index, tuple) else (index,):
            if isinstance(part, int):
                tensor = tensor.select(dim, part)
            elif isinstance(part, slice):
                start, stop, step = part.indices(tensor.shape[dim])
                tensor = torch.ops.aten.slice(tensor, dim, start, stop, step)
                dim += 1
            else:
                tensor = torch.ops.aten.index(tensor, [None] * dim + [self.at(part, tensor)])
                dim += 1
        return tensor

    def at(self, index, tensor: Tensor) -> Tensor:
        """An index as a tensor. Torch brings that of a list to the device by itself."""
        return index if isinstance(index, Tensor) else torch.tensor(index).to(tensor.device)


def copy_(target: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
    """In place of `Tensor.copy_`, which torch's own shape functions call too: there is nothing to copy."""
    assert target.device == source.device
    assert target.shape == torch.broadcast_shapes(target.shape, source.shape)
    return target


@pytest.fixture(autouse=True)
def fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(Tensor, "copy_", copy_)
    with FakeTensorMode(), torch.no_grad(), WithoutCuda():
        yield


class FakeCache:
    """What the layer uses of a cache whose slots are fake memory of a GPU: room for every expert, in the slot of its id."""

    def __init__(self) -> None:
        self.layout, self.device, self.capacity_experts = LAYOUT, CUDA, 8
        self.views = strided_views(LAYOUT, torch.zeros(self.capacity_experts, LAYOUT.body_bytes, dtype=torch.uint8, device=CUDA))

    def waves(self, experts: Sequence[int]) -> list[list[int]]:
        return [sorted(experts)]

    @contextmanager
    def reading(self, experts: Sequence[int], **options: object) -> Iterator[list[int]]:
        yield list(experts)

    updating = reading


def wave(dtype: torch.dtype) -> tuple[list[dict[str, Tensor]], list[dict[str, Tensor] | None], WaveRows, Tensor, Tensor]:
    """(parameters, gradients, rows, outputs, gradients of the tokens) of one wave of three experts, the last of them not trained."""
    cache = FakeCache()
    gradients = ExpertGradients(cache)  # type: ignore[arg-type]
    rows_MD, grad_x_MD, out_MD = torch.empty(3, sum(COUNTS), DIM, dtype=dtype, device=CUDA)
    before_MH, after_MH = torch.empty(2, sum(COUNTS), HIDDEN, dtype=dtype, device=CUDA)
    parameters = [{name: cache.views[name][slot] for name in ("w1", "b1", "w2", "b2")} for slot in POOL]
    return parameters, [gradients.of(2), gradients.of(3), None], WaveRows(COUNTS, rows_MD, before_MH, after_MH), out_MD, grad_x_MD


@pytest.mark.parametrize(("arithmetic", "dtype"), [(looped, torch.float32), (grouped, torch.bfloat16)], ids=["looped", "grouped"])
def test_a_wave_stays_on_the_device_without_a_host_read(arithmetic, dtype: torch.dtype):
    parameters, gradients, rows, out_MD, grad_x_MD = wave(dtype)
    arithmetic.forward(parameters, rows, out_MD)
    arithmetic.backward(parameters, gradients, rows, out_MD, grad_x_MD)
    for tensor in (out_MD, grad_x_MD, *gradients[0].values()):
        assert tensor.device == CUDA


def test_slots_are_viewed_on_their_device_in_place():
    views = FakeCache().views
    assert {view.device for view in views.values()} == {CUDA}
    assert views["w1"].shape == (8, DIM, HIDDEN)
    assert views["w1"].stride() == (LAYOUT.body_bytes // 4, HIDDEN, 1)


def test_gradients_are_made_on_the_caches_device():
    gradients = ExpertGradients(FakeCache())  # type: ignore[arg-type]
    assert gradients.of(3)["w2"].device == CUDA
    assert gradients.flat(3).shape == (2 * DIM * HIDDEN + HIDDEN + DIM,)


def routing(router: Router, monkeypatch: pytest.MonkeyPatch) -> Router:
    """The router with made-up counts in place of those that it reads from the device."""
    monkeypatch.setattr(router, "_on_host", lambda *_: dict(zip(POOL, (20, 10, 10), strict=True)))
    return router


@pytest.mark.parametrize("replayed", [False, True])
def test_a_router_mixes_no_devices(monkeypatch: pytest.MonkeyPatch, replayed: bool):
    with CUDA:
        router = routing(Router(DIM, POOL, top_k=2, noise=0.1), monkeypatch)
    experts_NK = torch.zeros(20, 2, dtype=torch.int64, device=CUDA) if replayed else None
    routed = router(torch.empty(20, DIM, device=CUDA), experts_NK=experts_NK, noisy=True)
    made = (routed.logits_NE, routed.chosen_NK, routed.experts_NK, routed.gates_NK, routed.order_M, routed.counts_E)
    assert {tensor.device for tensor in made} == {CUDA}
    assert balance_loss(routed).device == CUDA


def test_a_router_of_one_expert_reads_nothing_on_the_host():
    with CUDA:
        router = Router(DIM, [4], top_k=1)
    routed = router(torch.empty(20, DIM, device=CUDA))
    assert routed.tokens_by_expert == {4: 20}
    assert routed.gates_NK.device == CUDA


def test_a_router_reads_the_device_where_it_says_so():
    with CUDA:
        router = Router(DIM, POOL, top_k=2)
    with pytest.raises(DataDependentOutputException):
        router(torch.empty(20, DIM, device=CUDA))


class Context(SimpleNamespace):
    """What `_MixedExperts` uses of the context that autograd gives it."""

    needs_input_grad = (True, True)

    def save_for_backward(self, *tensors: Tensor | None) -> None:
        self.saved_tensors = tensors


@pytest.mark.parametrize("autocast", [False, True])
def test_a_layer_goes_forward_and_backward_with_no_read_beside_the_counts(monkeypatch: pytest.MonkeyPatch, autocast: bool):
    experts, context = TieredExperts(FakeCache()), Context()  # type: ignore[arg-type]
    with CUDA:
        router = routing(Router(DIM, POOL, top_k=2), monkeypatch)
        layer = TieredMoE(experts, router)
    x_ND = torch.empty(20, DIM, device=CUDA)
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device_type: device_type == "cuda" and autocast)
    monkeypatch.setattr(torch, "get_autocast_dtype", lambda device_type: torch.bfloat16)
    assert layer(x_ND).y.device == CUDA
    routed = router(x_ND)
    y_ND = _MixedExperts.forward(context, x_ND, routed.gates_NK, torch.zeros(()), experts, routed, {5})
    grad_x_ND, grad_gates_NK, *_ = _MixedExperts.backward(context, torch.empty_like(y_ND))
    assert context.saved_tensors[0].dtype == (torch.bfloat16 if autocast else torch.float32)
    for made, like in ((y_ND, x_ND), (grad_x_ND, x_ND), (grad_gates_NK, routed.gates_NK)):
        assert (made.device, made.dtype, made.shape) == (CUDA, like.dtype, like.shape)
    assert experts.gradients.experts == [2, 3]


def test_an_optimizer_step_mixes_no_devices():
    cache = FakeCache()
    gradients = ExpertGradients(cache)  # type: ignore[arg-type]
    adam = ExpertAdam([cache], [gradients], lr=0.01)  # type: ignore[list-item]
    for expert in POOL:
        gradients.of(expert)
    adam.step()
    assert adam.state_dict() == [POOL]
