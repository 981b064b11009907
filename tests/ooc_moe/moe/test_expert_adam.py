import pytest
import torch

from ooc_moe.config.agent import PRESETS
from ooc_moe.moe.expert_adam import ExpertAdam
from ooc_moe.moe.layer import PARAMETERS, ExpertGradients

TINY = PRESETS["tiny"]
# Which experts get gradients at each step; 2 is left out once, 9 comes late.
STEPS = [(0, 2, 5), (0, 5), (2, 5, 9), (0, 2, 5, 9)]


def fill(gradients: ExpertGradients, experts: tuple[int, ...], step: int) -> None:
    for expert in experts:
        generator = torch.Generator().manual_seed(100 * step + expert)
        for gradient in gradients.of(expert).values():
            gradient.copy_(torch.randn(gradient.shape, generator=generator))


@pytest.mark.parametrize("capacity", [1, 3, 16])
def test_several_steps_equal_torchs_adam_expert_by_expert(world, twin, capacity: int) -> None:
    (cache,) = world.caches(TINY, capacity=capacity)
    gradients = ExpertGradients(cache)
    adam = ExpertAdam([cache], [gradients], lr=0.01, betas=(0.8, 0.95), eps=1e-6)
    dense = twin(TINY)
    twins = {expert: torch.optim.Adam(dense.experts[expert].values(), lr=0.01, betas=(0.8, 0.95), eps=1e-6) for expert in range(16)}
    for step, experts in enumerate(STEPS):
        adam.lr = 0.01 / (step + 1)
        adam.zero_grad()
        fill(gradients, experts, step)
        adam.step()
        for expert in experts:
            for name, gradient in gradients.of(expert).items():
                dense.experts[expert][name].grad = gradient.clone()
            twins[expert].param_groups[0]["lr"] = 0.01 / (step + 1)
            twins[expert].step()
    for expert in range(16):
        with cache.reading([expert]) as (slot,):
            assert int(cache.views["step"][slot]) == sum(expert in experts for experts in STEPS)
            for name, parameter in dense.experts[expert].items():
                torch.testing.assert_close(cache.views[name][slot], parameter.data, rtol=1e-6, atol=1e-7)
                for moment in ("exp_avg", "exp_avg_sq"):
                    expected = twins[expert].state[parameter].get(moment, torch.zeros_like(parameter))
                    torch.testing.assert_close(cache.views[f"{name}.{moment}"][slot], expected, rtol=1e-6, atol=1e-9)


def test_an_expert_without_gradients_stays_as_it_was_bit_for_bit(world, stored) -> None:
    (cache,) = world.caches(TINY, capacity=4)
    before = stored(cache)
    gradients = ExpertGradients(cache)
    adam = ExpertAdam([cache], [gradients], lr=0.01)
    with cache.reading([1, 2, 3]):
        pass
    fill(gradients, (2, 7), 0)
    adam.step()
    after = stored(cache)
    assert {expert for expert in before if before[expert] != after[expert]} == {2, 7}
    versions = {info.expert: info.version for info in cache._shared.store.list_experts(cache.bank)}
    assert {expert for expert, version in versions.items() if version} == {2, 7}, "no other expert was even written"


def test_moments_survive_eviction_and_a_new_cache(world, stored) -> None:
    results = []
    for reopen in (False, True):
        store, updated = world.store(TINY), [[]]
        (cache,) = world.caches(TINY, capacity=2, store=store)
        for step in range(4):
            if reopen:
                cache.flush()
                (cache,) = world.caches(TINY, capacity=2, store=store)
            gradients = ExpertGradients(cache)
            fill(gradients, (0, 1, 2, 3), step)
            adam = ExpertAdam([cache], [gradients], lr=0.01)
            adam.load_state_dict(updated)
            adam.step()
            updated = adam.state_dict()
        results.append(stored(cache))
    assert results[0] == results[1]
    assert updated == [[0, 1, 2, 3]]


def test_a_new_optimizer_starts_without_the_momentum_of_the_last_one(world) -> None:
    def moments(*games: tuple[int, ...]) -> dict[str, torch.Tensor]:
        """Of expert 2, after an optimizer for each game has moved that game's experts twice."""
        (cache,) = world.caches(TINY, capacity=2)
        for experts in games:
            gradients = ExpertGradients(cache)
            adam = ExpertAdam([cache], [gradients], lr=0.01)
            for step in range(2):
                adam.zero_grad()
                fill(gradients, experts, step)
                adam.step()
        with cache.reading([2]) as (slot,):
            return {name: view[slot].clone() for name, view in cache.views.items() if name not in PARAMETERS}

    again, alone = moments((0, 1, 2), (1, 2, 3)), moments((1, 2, 3))
    assert int(alone["step"]) == 2
    assert all(torch.equal(again[name], moment) for name, moment in alone.items())


def test_an_experts_update_is_the_same_bit_for_bit_whichever_others_are_in_its_wave(world, stored) -> None:
    results = []
    for capacity, order in ((1, (0, 2, 5, 9)), (2, (9, 5, 2, 0)), (3, (5, 0, 9, 2)), (16, (2, 9, 0, 5))):
        (cache,) = world.caches(TINY, capacity=capacity)
        # Residents from before move the experts to other slots.
        for expert in range(capacity):
            with cache.reading([15 - expert]):
                pass
        gradients = ExpertGradients(cache)
        adam = ExpertAdam([cache], [gradients], lr=0.01)
        for step in range(5):
            adam.zero_grad()
            fill(gradients, tuple(expert for expert in order if step % 2 or expert != 5), step)
            adam.step()
        results.append(stored(cache))
    assert results.count(results[0]) == len(results)
    assert len({results[0][expert] for expert in (0, 2, 5, 9)}) == 4


def test_all_slots_of_a_wave_are_updated_in_one_fused_step(world, monkeypatch) -> None:
    (cache,) = world.caches(TINY, capacity=3)
    gradients = ExpertGradients(cache)
    fill(gradients, (0, 1, 2, 3, 4), 0)
    calls: list[int] = []
    fused = torch._fused_adam_
    monkeypatch.setattr(
        torch, "_fused_adam_", lambda parameters, *rest, **options: (calls.append(len(parameters)), fused(parameters, *rest, **options))
    )
    ExpertAdam([cache], [gradients], lr=0.01).step()
    assert calls == [12, 8]


@pytest.mark.parametrize("max_norm", [0.5, 1e6])
def test_clipping_equals_torchs_over_dense_and_expert_gradients_together(world, max_norm: float) -> None:
    (cache,) = world.caches(TINY)
    gradients = ExpertGradients(cache)
    fill(gradients, (3, 1, 8), 0)
    torch.manual_seed(0)
    dense = [torch.nn.Parameter(torch.zeros(7, 5)), torch.nn.Parameter(torch.zeros(3)), torch.nn.Parameter(torch.zeros(2))]
    for parameter in dense[:2]:
        parameter.grad = torch.randn(parameter.shape)
    twins = [torch.nn.Parameter(torch.zeros_like(parameter)) for parameter in dense[:2]]
    twins += [torch.nn.Parameter(torch.zeros_like(gradients.flat(expert))) for expert in gradients.experts]
    flats = [dense[0].grad, dense[1].grad, *(gradients.flat(expert) for expert in gradients.experts)]
    for parameter, flat in zip(twins, flats, strict=True):
        parameter.grad = flat.clone()

    norm = ExpertAdam([cache], [gradients], lr=0.1).clip_grad_norm(dense, max_norm)
    expected = torch.nn.utils.clip_grad_norm_(twins, max_norm)
    assert norm == pytest.approx(float(expected), rel=1e-6)
    for parameter, flat in zip(twins, flats, strict=True):
        torch.testing.assert_close(flat, parameter.grad)
    assert dense[2].grad is None


def test_clipping_nothing_is_no_error(world) -> None:
    (cache,) = world.caches(TINY)
    assert ExpertAdam([cache], [ExpertGradients(cache)], lr=0.1).clip_grad_norm([], 1.0) == 0.0
