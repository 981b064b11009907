"""PPO's arithmetic against hand-computed cases and a slow plain twin."""

import math

import pytest
import torch

from ooc_moe.config.run import PPOConfig
from ooc_moe.learning.ppo import advantages, clipped_loss


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


def test_advantages_of_lost_lives_an_end_its_autoreset_and_a_cut_are_the_hand_computed_ones():
    # gamma .5, lambda .5, so a later advantage counts a quarter. Step 1 loses a life, step 3 ends the game, step 4 is its autoreset, step 6
    # is cut off, step 7 is its autoreset, step 8 is the last of the rollout.
    # delta_8 = 1 + .5*6 - 2 = 2; delta_7 = 0; delta_6 = 3 + .5*2 - 1 = 3; delta_5 = 0 + .5*1 - 2 = -1.5; delta_4 = 0;
    # delta_3 = 1 - 3 = -2; delta_2 = 0 + .5*3 - 1 = .5; delta_1 = 0 - 2 = -2; delta_0 = 1 + .5*2 - 1 = 1.
    rewards = [1, 0, 0, 1, 0, 0, 3, 0, 1]
    values = [1, 2, 1, 3, 8, 2, 1, 8, 2]
    next_values = [2, 1, 3, 8, 2, 1, 2, 2, 6]
    expected = [1 - 2 / 4, -2, 0.5 - 2 / 4, -2, 0, -1.5 + 3 / 4, 3, 0, 2]
    found = _case(rewards, values, next_values, terminated=[1, 3], truncated=[6], unplayed=[4, 7])
    torch.testing.assert_close(found, torch.tensor(expected))


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


def _of_ratios(ratios, advantages, **options):
    """Two actions that are equally likely now, and were so by the given ratios' inverses."""
    steps = len(ratios)
    old = [[math.log(0.5 / ratio) for ratio in ratios]]
    return _loss([[[0.0, 0.0]] * steps], old_log_probs=old, advantages=[advantages], actions=[[0] * steps], **options)


def test_the_policy_loss_takes_the_worse_of_both_ratios_on_all_four_sides_of_the_clip():
    # Advantages of +1 and -1 are normal already. Gains are clipped: min(1.5, 1.2) = 1.2 and min(-.5, -.8) = -.8;
    # losses are not: min(.5, .8) = .5 and min(-1.5, -1.2) = -1.5. In all -(1.2 - .8 + .5 - 1.5) / 4.
    loss = _of_ratios([1.5, 0.5, 0.5, 1.5], [1.0, -1.0, 1.0, -1.0])
    assert float(loss.policy) == pytest.approx(0.15, abs=1e-6)
    assert float(loss.clip_fraction) == 1.0


def test_ratios_within_the_clip_are_not_clipped():
    # -(1.1 - .9 + 1.1 - .9) / 4
    loss = _of_ratios([1.1, 0.9, 1.1, 0.9], [1.0, -1.0, 1.0, -1.0])
    assert float(loss.policy) == pytest.approx(-0.1, abs=1e-6)
    assert float(loss.clip_fraction) == 0.0
    # ratio - 1 - log ratio: .1 - log 1.1 = .0046898, and -.1 - log .9 = .0053605.
    assert float(loss.approx_kl) == pytest.approx((0.0046898 + 0.0053605) / 2, abs=1e-6)


def test_advantages_are_normalised_over_the_steps_that_were_played_alone():
    # 2, 4 and 6 have mean 4 and standard deviation sqrt(8 / 3); the 100 was not played. Ratios 1.1, 1, .9:
    # -(1.1 * -2 + 1 * 0 + .9 * 2) / sqrt(8 / 3) / 3 = .4 / 4.898979.
    loss = _of_ratios([1.1, 1.0, 0.9, 1.0], [2.0, 4.0, 6.0, 100.0], played=[[True, True, True, False]])
    assert float(loss.policy) == pytest.approx(0.4 / 4.898979, abs=1e-6)


def test_the_total_weighs_its_parts():
    config = PPOConfig(value_coef=0.25, entropy_coef=0.1)
    loss = _of_ratios([1.1, 0.9], [1.0, -1.0], values=[[1.0, 2.0]], returns=[[3.0, 2.0]], config=config)
    # policy -(1.1 - .9) / 2, value .5 * (4 + 0) / 2, entropy log 2.
    assert loss.total.item() == pytest.approx(-0.1 + 0.25 * 1.0 - 0.1 * math.log(2), abs=1e-6)


def test_the_loss_equals_a_slow_sum_step_by_step():
    generator = torch.Generator().manual_seed(5)
    B, T, A = 6, 5, 4
    config = PPOConfig(clip=0.15, entropy_coef=0.02, value_coef=0.7)
    logits = torch.randn(B, T, A, generator=generator)
    old, value, advantage, returns = (torch.randn(B, T, generator=generator) for _ in range(4))
    actions = torch.randint(A, (B, T), generator=generator)
    old = torch.log_softmax(logits, -1).gather(-1, actions.unsqueeze(-1)).squeeze(-1) + 0.2 * old
    played = torch.rand(B, T, generator=generator) < 0.7
    fast = clipped_loss(
        config,
        logits_BTA=logits,
        value_BT=value,
        actions_BT=actions,
        old_log_probs_BT=old,
        advantages_BT=advantage,
        returns_BT=returns,
        played_BT=played,
    )
    steps = [(b, t) for b in range(B) for t in range(T) if played[b, t]]
    mean = sum(float(advantage[step]) for step in steps) / len(steps)
    deviation = (sum((float(advantage[step]) - mean) ** 2 for step in steps) / len(steps)) ** 0.5
    policy = squares = entropy = 0.0
    clipped = 0
    for step in steps:
        weights = [math.exp(float(logit)) for logit in logits[step]]
        probabilities = [weight / sum(weights) for weight in weights]
        ratio = probabilities[int(actions[step])] / math.exp(float(old[step]))
        normal = (float(advantage[step]) - mean) / deviation
        policy -= min(ratio * normal, min(max(ratio, 0.85), 1.15) * normal)
        squares += (float(value[step]) - float(returns[step])) ** 2
        entropy -= sum(p * math.log(p) for p in probabilities)
        clipped += abs(ratio - 1) > 0.15
    count = len(steps)
    assert 0 < clipped < count < B * T
    assert float(fast.policy) == pytest.approx(policy / count, abs=1e-5)
    assert float(fast.value) == pytest.approx(squares / count / 2, abs=1e-5)
    assert float(fast.entropy) == pytest.approx(entropy / count, abs=1e-5)
    assert float(fast.clip_fraction) == pytest.approx(clipped / count)
    assert fast.total.item() == pytest.approx((policy + 0.7 * squares / 2 - 0.02 * entropy) / count, abs=1e-5)
