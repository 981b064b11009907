"""The arithmetic of PPO: advantages and the clipped loss.

Sources: Schulman et al. 2017 (PPO), Schulman et al. 2016 (GAE). Details are as in CleanRL's `ppo_atari.py`, with three differences: steps
in which an environment reset itself are left out; where a step limit cut an episode off, the value of the next frame stands for the missing
rewards; and the value loss is not clipped.

Letters: T steps, N environments, B segments of T frames, A actions, M all steps in one vector.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ooc_moe.config.run import PPOConfig


@torch.no_grad()
def advantages(
    *,
    rewards_TN: Tensor,
    values_TN: Tensor,
    next_values_TN: Tensor,
    terminated_TN: Tensor,
    truncated_TN: Tensor,
    played_TN: Tensor,
    gamma: float,
    gae_lambda: float,
) -> Tensor:
    """Computes generalised advantage estimates (T, N). They are zero for steps that were not played.

    Args:
        rewards_TN: the reward of step t, clipped if the learner clips.
        values_TN: the value of the observation before step t.
        next_values_TN: the value of the observation after step t, computed from the frames of step t's segment.
        terminated_TN: True where step t ended the episode or a life. Its advantage uses neither the next value nor later advantages.
        truncated_TN: True where the step limit cut the episode off after step t. Its advantage uses the next value, but no later advantage.
        played_TN: False where the environment ignored the action and reset itself.
        gamma: the discount.
        gae_lambda: GAE's lambda.
    """
    played = played_TN.to(values_TN.dtype)
    goes_on_TN = played * (~(terminated_TN | truncated_TN)).to(values_TN.dtype)
    delta_TN = (rewards_TN + gamma * next_values_TN * (~terminated_TN) - values_TN) * played
    out_TN = torch.zeros_like(values_TN)
    later_N = torch.zeros_like(values_TN[0])
    for t in reversed(range(len(rewards_TN))):
        later_N = delta_TN[t] + gamma * gae_lambda * goes_on_TN[t] * later_N
        out_TN[t] = later_N
    return out_TN


@dataclass(frozen=True, slots=True)
class Loss:
    """PPO's loss (`total`), its three parts, and two measures of how far the new policy is from the old one.

    All are scalars; only `total` carries a gradient.
    """

    total: Tensor
    """policy + value_coef * value - entropy_coef * entropy."""
    policy: Tensor
    """The clipped policy loss."""
    value: Tensor
    """Half the mean squared error of the values."""
    entropy: Tensor
    """The mean entropy of the policy."""
    approx_kl: Tensor
    """An estimate of KL(old policy || new policy)."""
    clip_fraction: Tensor
    """The share of the steps whose probability ratio lies outside the clipping range."""


def clipped_loss(
    config: PPOConfig,
    *,
    logits_BTA: Tensor,
    value_BT: Tensor,
    actions_BT: Tensor,
    old_log_probs_BT: Tensor,
    advantages_BT: Tensor,
    returns_BT: Tensor,
    played_BT: Tensor,
) -> Loss:
    """Computes PPO's clipped policy loss, the value loss and the entropy, averaged over the steps that were played.

    Advantages are normalised over these steps first.

    Args:
        config: the clipping range and the weights of the parts.
        logits_BTA: the agent's action logits now.
        value_BT: the agent's values now.
        actions_BT: the actions that were taken.
        old_log_probs_BT: their log-probabilities when they were taken.
        advantages_BT: how much better each action was than expected.
        returns_BT: the targets of the values.
        played_BT: False where the environment ignored the action and reset itself.
    """
    mask_M = played_BT.flatten().to(value_BT.dtype)
    weights_M = mask_M / mask_M.sum().clamp(min=1)

    def mean(x_BT: Tensor) -> Tensor:
        return x_BT.flatten().dot(weights_M)

    log_probs_BTA = torch.log_softmax(logits_BTA, dim=-1)
    log_ratio_BT = log_probs_BTA.gather(-1, actions_BT.unsqueeze(-1)).squeeze(-1) - old_log_probs_BT
    ratio_BT = log_ratio_BT.exp()
    centred_BT = advantages_BT - mean(advantages_BT)
    normal_BT = centred_BT / (mean(centred_BT.square()).sqrt() + 1e-8)
    policy = -mean(torch.minimum(ratio_BT * normal_BT, ratio_BT.clamp(1 - config.clip, 1 + config.clip) * normal_BT))
    value = 0.5 * mean((value_BT - returns_BT).square())
    entropy = mean(-(log_probs_BTA.exp() * log_probs_BTA).sum(-1))
    with torch.no_grad():
        # Schulman's low-variance estimator of KL(old || new): http://joschu.net/blog/kl-approx.html
        approx_kl = mean(ratio_BT - 1 - log_ratio_BT)
        clip_fraction = mean(((ratio_BT - 1).abs() > config.clip).to(value_BT.dtype))
    total = policy + config.value_coef * value - config.entropy_coef * entropy
    return Loss(total, policy.detach(), value.detach(), entropy.detach(), approx_kl, clip_fraction)
