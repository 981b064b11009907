"""PPO's arithmetic against hand-computed cases and a slow plain twin."""

import math

import pytest
import torch

from ooc_moe.ppo import advantages, clipped_loss
from ooc_moe.run_config import PPOConfig


def _column(values, dtype=torch.float32):
    return torch.tensor(values, dtype=dtype).unsqueeze(1)


def _case(rewards, values, next_values, *, terminated=(), truncated=(), unplayed=(), gamma=0.5, gae_lambda=0.5):
    steps = range(len(rewards))
    return advantages(
        rewards_TN=_column(rewards),
        values_TN=_column(values),
        next_values_TN=_column(next_values),
        terminated_TN=_column([t in terminated for t in steps], torch.bool),
        truncated_TN=_column([t in truncated for t in steps], torch.bool),
        played_TN=_column([t not in unplayed for t in steps], torch.bool),
        gamma=gamma,
        gae_lambda=gae_lambda,
    ).squeeze(1)


def test_advantages_of_an_undisturbed_stretch_are_the_hand_computed_ones():
    # delta = (1 + .5*2 - 1, 0 + .5*4 - 2, 2 + .5*6 - 4) = (1, 0, 1); advantage = delta + .25 * later
    torch.testing.assert_close(_case([1, 0, 2], [1, 2, 4], [2, 4, 6]), torch.tensor([1.0625, 0.25, 1.0]))


def test_a_terminated_step_sees_no_value_beyond_it_and_no_later_advantage():
    # delta_0 = 1 - 1 = 0 although next_values_0 is 2; step 1 stands alone.
    torch.testing.assert_close(_case([1, 0], [1, 2], [2, 4], terminated=[0]), torch.tensor([0.0, 0.0]))


def test_a_truncated_step_is_bootstrapped_but_carries_no_later_advantage():
    # delta_0 = 1 + .5*2 - 1 = 1 and nothing of step 1's advantage, 5 + .5*4 - 2 = 5.
    torch.testing.assert_close(_case([1, 5], [1, 2], [2, 4], truncated=[0]), torch.tensor([1.0, 5.0]))


def test_a_life_loss_ends_the_value_while_the_next_step_still_counts():
    torch.testing.assert_close(_case([0, 3], [1, 1], [9, 0], terminated=[0]), torch.tensor([-1.0, 2.0]))


def test_a_step_that_was_not_played_has_no_advantage_and_passes_none_on():
    # Step 0 truncates, step 1 is the autoreset, step 2 belongs to the next episode.
    torch.testing.assert_close(_case([1, 7, 1], [1, 9, 1], [2, 1, 2], truncated=[0], unplayed=[1]), torch.tensor([1.0, 0.0, 1.0]))


def test_advantages_equal_a_slow_sum_over_random_episodes():
    generator = torch.Generator().manual_seed(3)
    T, N, gamma, lam = 40, 7, 0.97, 0.9
    rewards, values, next_values = (torch.randn(T, N, generator=generator) for _ in range(3))
    terminated = torch.rand(T, N, generator=generator) < 0.1
    truncated = (torch.rand(T, N, generator=generator) < 0.1) & ~terminated
    played = torch.ones(T, N, dtype=torch.bool)
    played[1:] = ~truncated[:-1]
    fast = advantages(
        rewards_TN=rewards,
        values_TN=values,
        next_values_TN=next_values,
        terminated_TN=terminated,
        truncated_TN=truncated,
        played_TN=played,
        gamma=gamma,
        gae_lambda=lam,
    )
    for n in range(N):
        for start in range(T):
            total, weight = 0.0, 1.0
            for t in range(start, T):
                if not played[t, n]:
                    break
                following = 0.0 if terminated[t, n] else gamma * float(next_values[t, n])
                total += weight * (float(rewards[t, n]) + following - float(values[t, n]))
                if terminated[t, n] or truncated[t, n]:
                    break
                weight *= gamma * lam
            assert float(fast[start, n]) == pytest.approx(total, abs=1e-4)


def _loss(logits, *, old_log_probs, advantages, actions, returns=None, values=None, played=None, config=None):
    shape = torch.tensor(advantages).shape
    return clipped_loss(
        config or PPOConfig(clip=0.2, entropy_coef=0.0, value_coef=0.5),
        logits_BTA=torch.tensor(logits, requires_grad=True),
        value_BT=torch.tensor(values) if values is not None else torch.zeros(shape),
        actions_BT=torch.tensor(actions),
        old_log_probs_BT=torch.tensor(old_log_probs),
        advantages_BT=torch.tensor(advantages),
        returns_BT=torch.tensor(returns) if returns is not None else torch.zeros(shape),
        played_BT=torch.tensor(played) if played is not None else torch.ones(shape, dtype=torch.bool),
    )


def test_with_unchanged_log_probs_the_policy_loss_is_minus_the_mean_advantage_which_is_zero():
    half = math.log(0.5)
    loss = _loss([[[0.0, 0.0], [0.0, 0.0]]], old_log_probs=[[half, half]], advantages=[[1.0, 3.0]], actions=[[0, 1]])
    assert float(loss.policy) == pytest.approx(0.0, abs=1e-6)
    assert float(loss.approx_kl) == pytest.approx(0.0, abs=1e-7)
    assert float(loss.clip_fraction) == 0.0


def test_a_ratio_beyond_the_clip_carries_no_gradient_when_it_would_gain():
    logits = torch.tensor([[[2.0, 0.0], [0.0, 0.0]]], requires_grad=True)
    old = torch.log_softmax(torch.zeros(2), -1)[0]
    loss = clipped_loss(
        PPOConfig(clip=0.2, entropy_coef=0.0),
        logits_BTA=logits,
        value_BT=torch.zeros(1, 2),
        actions_BT=torch.tensor([[0, 0]]),
        old_log_probs_BT=torch.stack([old, old]).unsqueeze(0),
        advantages_BT=torch.tensor([[1.0, -1.0]]),
        returns_BT=torch.zeros(1, 2),
        played_BT=torch.ones(1, 2, dtype=torch.bool),
    )
    (gradient,) = torch.autograd.grad(loss.total, logits)
    assert gradient[0, 0].abs().sum() == 0  # ratio 1.76, advantage above the mean: clipped
    assert gradient[0, 1].abs().sum() > 0


def test_steps_that_were_not_played_change_nothing():
    half = math.log(0.5)
    rows = {"logits": [[[0.3, 0.1], [1.0, -1.0], [0.0, 2.0]]], "actions": [[0, 1, 1]], "old_log_probs": [[half, half, -9.0]]}
    first = _loss(**rows, advantages=[[1.0, 2.0, 50.0]], returns=[[1.0, 2.0, 90.0]], played=[[True, True, False]])
    second = _loss(**rows, advantages=[[1.0, 2.0, -7.0]], returns=[[1.0, 2.0, 0.0]], played=[[True, True, False]])
    assert first.total.item() == second.total.item()


def test_value_loss_is_half_the_mean_square():
    half = math.log(0.5)
    loss = _loss([[[0.0, 0.0]]], old_log_probs=[[half]], advantages=[[0.0]], actions=[[0]], values=[[1.0]], returns=[[4.0]])
    assert float(loss.value) == pytest.approx(4.5)


def test_entropy_of_a_uniform_policy_is_the_log_of_its_actions():
    loss = _loss([[[0.0] * 18]], old_log_probs=[[-math.log(18)]], advantages=[[0.0]], actions=[[0]])
    assert float(loss.entropy) == pytest.approx(math.log(18))
