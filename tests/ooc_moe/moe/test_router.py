import pytest
import torch

from ooc_moe.moe.router import Router, balance_loss
from ooc_moe_wire.errors import InvalidRequest

EXPERTS = (3, 5, 8, 13, 21)


@pytest.fixture
def router() -> Router:
    torch.manual_seed(0)
    router = Router(dim=6, experts=EXPERTS, top_k=2, noise=1.0)
    torch.nn.init.normal_(router.weight)
    return router


@pytest.fixture
def x_ND() -> torch.Tensor:
    return torch.randn(40, 6, generator=torch.Generator().manual_seed(1))


def test_without_noise_the_largest_logits_win_and_share_by_softmax(router: Router, x_ND: torch.Tensor) -> None:
    routed = router(x_ND)
    for token, x_D in enumerate(x_ND):
        logits = {expert: float(router.weight[place].detach() @ x_D) for place, expert in enumerate(EXPERTS)}
        best = sorted(logits, key=lambda expert: -logits[expert])[:2]
        assert routed.experts_NK[token].tolist() == best
        weights = torch.tensor([logits[expert] for expert in best]).softmax(0)
        torch.testing.assert_close(routed.gates_NK[token], weights)


def test_noise_moves_the_choice_in_training_only_and_repeats_with_its_generator(router: Router, x_ND: torch.Tensor) -> None:
    def choose() -> torch.Tensor:
        return router(x_ND, noisy=True, generator=torch.Generator().manual_seed(5)).experts_NK

    clean = router(x_ND).experts_NK
    noisy = choose()
    assert not torch.equal(noisy, clean)
    assert torch.equal(noisy, choose())
    router.eval()
    assert torch.equal(choose(), clean)


def test_weights_come_from_clean_logits_whatever_the_noise_chose(router: Router, x_ND: torch.Tensor) -> None:
    acted = router(x_ND, noisy=True, generator=torch.Generator().manual_seed(5))
    replayed = router(x_ND, experts_NK=acted.experts_NK)
    assert torch.equal(acted.gates_NK, replayed.gates_NK)
    assert torch.equal(acted.experts_NK, replayed.experts_NK)
    assert torch.equal(balance_loss(acted), balance_loss(replayed))


def test_noise_of_zero_is_no_noise(x_ND: torch.Tensor) -> None:
    torch.manual_seed(0)
    router = Router(dim=6, experts=EXPERTS, top_k=2, noise=0.0)
    assert torch.equal(router(x_ND, noisy=True).experts_NK, router(x_ND).experts_NK)


@pytest.mark.parametrize("stranger", [0, 4, 22, 1000])
def test_a_replayed_expert_of_another_pool_is_refused_by_its_id(router: Router, x_ND: torch.Tensor, stranger: int) -> None:
    experts_NK = router(x_ND).experts_NK.clone()
    experts_NK[7, 1] = stranger
    with pytest.raises(InvalidRequest, match=f"expert {stranger} is not one of"):
        router(x_ND, experts_NK=experts_NK)


def test_a_replay_of_another_shape_is_refused(router: Router, x_ND: torch.Tensor) -> None:
    with pytest.raises(InvalidRequest, match=r"\(39, 2\) is not \(40, 2\)"):
        router(x_ND, experts_NK=router(x_ND).experts_NK[1:])


@torch.no_grad()
def test_the_balancing_loss_is_one_for_an_even_load_and_the_number_of_experts_for_a_collapsed_one() -> None:
    router = Router(dim=4, experts=range(4), top_k=1, noise=0.0)
    router.weight.copy_(torch.eye(4) * 50)
    assert float(balance_loss(router(torch.eye(4)))) == pytest.approx(1.0)
    assert float(balance_loss(router(torch.eye(4)[[0, 0, 0]]))) == pytest.approx(4.0)


def test_the_balancing_loss_equals_the_formula_and_pushes_load_from_the_busiest(router: Router, x_ND: torch.Tensor) -> None:
    routed = router(x_ND)
    f = [sum(expert == chosen for row in routed.experts_NK.tolist() for chosen in row) / 80 for expert in EXPERTS]
    p = (x_ND @ router.weight.T).softmax(1).mean(0)
    loss = balance_loss(routed)
    torch.testing.assert_close(loss, 5 * (torch.tensor(f) * p).sum())
    routed.logits_NE.retain_grad()
    balance_loss(routed).backward()
    slope_E = routed.logits_NE.grad.sum(0)
    assert slope_E[f.index(max(f))] > 0 > slope_E[f.index(min(f))]


def test_assignments_are_counted_and_sorted_by_expert_each_experts_in_the_order_of_tokens(router: Router, x_ND: torch.Tensor) -> None:
    routed = router(x_ND)
    flat = routed.experts_NK.flatten().tolist()
    assert routed.order_M.tolist() == sorted(range(80), key=lambda place: flat[place])
    assert routed.counts_E.tolist() == [flat.count(expert) for expert in EXPERTS]
    few = router(x_ND[:1])
    assert few.tokens_by_expert == dict.fromkeys(few.experts_NK.flatten().tolist(), 1)
    assert list(few.tokens_by_expert) == sorted(few.tokens_by_expert)


def test_the_only_expert_takes_all_tokens_in_their_order_and_repeats_no_other(x_ND: torch.Tensor) -> None:
    only = Router(dim=6, experts=[7], top_k=1, noise=1.0)
    routed = only(x_ND, noisy=True)
    assert routed.experts_NK.tolist() == [[7]] * 40
    assert routed.gates_NK.tolist() == [[1.0]] * 40
    assert (routed.counts_E.tolist(), routed.tokens_by_expert) == ([40], {7: 40})
    assert torch.equal(routed.rows_of(x_ND), x_ND)
    assert only(x_ND, experts_NK=routed.experts_NK.int()).tokens_by_expert == {7: 40}
    with pytest.raises(InvalidRequest, match="expert 8 is not one of"):
        only(x_ND[:3], experts_NK=torch.tensor([[7], [8], [9]]))
    with pytest.raises(InvalidRequest, match="shape"):
        only(x_ND, experts_NK=routed.experts_NK[:3])


@pytest.mark.parametrize("replayed", [False, True])
def test_logits_and_weights_are_float32_under_autocast_too(router: Router, x_ND: torch.Tensor, replayed: bool) -> None:
    plain = router(x_ND)
    with torch.autocast("cpu", torch.bfloat16):
        cast = router(x_ND, experts_NK=plain.experts_NK if replayed else None)
        loss = balance_loss(cast)
    assert cast.logits_NE.dtype == cast.gates_NK.dtype == loss.dtype == torch.float32
    assert torch.equal(cast.experts_NK, plain.experts_NK)
    assert torch.equal(cast.logits_NE, plain.logits_NE)
    assert torch.equal(cast.gates_NK, plain.gates_NK)
    assert torch.equal(loss, balance_loss(plain))


@pytest.mark.parametrize("experts", [(3,), EXPERTS])
def test_tokens_in_bfloat16_are_routed_in_float32(experts: tuple[int, ...]) -> None:
    router = Router(dim=6, experts=experts, top_k=min(2, len(experts)))
    routed = router(torch.randn(4, 6, dtype=torch.bfloat16))
    assert routed.logits_NE.dtype == routed.gates_NK.dtype == torch.float32
