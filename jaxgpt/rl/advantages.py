"""From scores to advantages: penalties, normalisation, KL in the reward, GAE and baselines over groups. All float32.

Index t of an array [B, R] is about token t of a response; mask_BR is 1 on live tokens, those up to and including the EOS
that ended it, and 0 after them, where the other arrays may hold anything, even nan. Axis legend in jaxgpt/types.py.
"""

from typing import Literal, get_args

import jax
import jax.numpy as jnp
from flax import struct

from jaxgpt.numerics import KLEstimator, kl_estimate, masked_mean
from jaxgpt.types import Array

Baseline = Literal["mean", "leave_one_out", "batch_mean", "none", "best"]
Scale = Literal["group", "batch", "none"]


class Moments(struct.PyTreeNode):
    """Running moments of what was seen so far: count, mean, and m2, the sum of squared deviations from the mean.

    f32 scalars; state, to be checkpointed with the run.
    """

    count: Array
    mean: Array
    m2: Array


def init_moments() -> Moments:
    """Moments of nothing."""
    return Moments(*(jnp.zeros((), jnp.float32) for _ in range(3)))  # buffers of their own: state may be donated


def update_moments(moments: Moments, x: Array, mask: Array | None = None) -> Moments:
    """The moments with the finite elements of x under mask (all, without one) added to them.

    Source: Chan, Golub and LeVeque 1979, "Updating formulae and a pairwise algorithm for computing sample variances".
    """
    # One NaN among the scores must not stay in the moments: the iteration is skipped, the run goes on.
    mask = jnp.where(jnp.isfinite(x), 1.0 if mask is None else mask.astype(jnp.float32), 0.0)
    new_count, new_mean = jnp.sum(mask), masked_mean(x, mask)
    new_m2 = new_count * masked_mean(jnp.square(jnp.where(mask != 0, x, 0) - new_mean), mask)
    count = moments.count + new_count
    share = new_count / jnp.maximum(count, 1)
    difference = new_mean - moments.mean
    return Moments(
        count=count,
        mean=moments.mean + difference * share,
        m2=moments.m2 + new_m2 + jnp.square(difference) * moments.count * share,
    )


def normalize(x: Array, moments: Moments, eps: float = 1e-8) -> Array:
    """(x - mean) / sqrt(var + eps) by the population variance of the moments, f32; x itself where they are of nothing."""
    variance = moments.m2 / jnp.maximum(moments.count, 1)
    normalized = (x.astype(jnp.float32) - moments.mean) / jnp.sqrt(variance + eps)
    return jnp.where(moments.count > 0, normalized, x)


def apply_missing_eos(scores_B: Array, has_eos_B: Array, penalty: float | None) -> Array:
    """The scores, f32, with `penalty` in place of the score of each response that the length limit cut off.

    A torso gets no opinion, whatever the scorer would say of it. None changes nothing.

    Source: the "EOS trick" of Huang et al. 2024 (arXiv:2403.17031).
    """
    scores_B = scores_B.astype(jnp.float32)
    return scores_B if penalty is None else jnp.where(has_eos_B, scores_B, penalty)


def clip_scores(scores_B: Array, limit: float | None) -> Array:
    """The scores, f32, clipped to [-limit, limit]; None changes nothing."""
    scores_B = scores_B.astype(jnp.float32)
    return scores_B if limit is None else jnp.clip(scores_B, -limit, limit)


def shaped_rewards(
    scores_B: Array,
    logp_BR: Array,
    reference_BR: Array,
    mask_BR: Array,
    kl_coef: Array | float,
    estimator: KLEstimator = "k1",
) -> tuple[Array, Array]:
    """The reward of each token: -kl_coef KL(token), and the response's score on its last live token.

    Args:
      scores_B: one per response, any dtype, already normalised, clipped and penalised. A row without a live token gets
        none.
      logp_BR, reference_BR: log-probs of the policy before the update and of the reference, nats.
      kl_coef: reward units per nat; may be traced (see `adaptive_kl`).

    Returns:
      rewards_BR and kl_BR, f32, both 0 where the mask is 0.

    Raises:
      ValueError: at trace time, if the shapes do not agree.

    Source: Ziegler et al. 2019 (arXiv:1909.08593), eq. 2; Stiennon et al. 2020 (arXiv:2009.01325), §3.4.
    """
    _check_shapes(mask_BR, logp_BR=logp_BR, reference_BR=reference_BR)
    if scores_B.shape != mask_BR.shape[:1]:
        raise ValueError(f"scores_B has shape {scores_B.shape}; one score per row is {mask_BR.shape[:1]}.")
    is_live_BR = mask_BR != 0
    kl_BR = jnp.where(is_live_BR, kl_estimate(logp_BR, reference_BR, estimator), 0.0)
    left_BR = jnp.cumsum(is_live_BR[:, ::-1], axis=1)[:, ::-1]  # live tokens from here on
    is_last_BR = is_live_BR & (left_BR == 1)
    return jnp.where(is_last_BR, scores_B.astype(jnp.float32)[:, None], 0.0) - kl_coef * kl_BR, kl_BR


def gae(rewards_BR: Array, values_BR: Array, mask_BR: Array, *, gamma: float, lam: float) -> tuple[Array, Array]:
    """Generalized advantage estimation over the live tokens.

    A_t = sum_l (gamma lam)^l delta_{t+l}, delta_t = r_t + gamma V_{t+1} - V_t, with V = 0 after the last live token. Where
    the mask has a hole, the next live token is the successor.

    Args:
      rewards_BR: reward units, KL penalty subtracted, score on the last live token.
      values_BR: at t the value of the state before token t.

    Returns:
      advantages_BR (not whitened) and returns_BR = advantages + values, f32, both 0 where the mask is 0.

    Raises:
      ValueError: at trace time, if the shapes differ.

    Source: Schulman et al. 2016 (arXiv:1506.02438), eq. 16.
    """
    _check_shapes(mask_BR, rewards_BR=rewards_BR, values_BR=values_BR)
    is_live_BR = mask_BR != 0
    clean = lambda x_BR: jnp.where(is_live_BR, x_BR.astype(jnp.float32), 0.0)
    rewards_BR, values_BR = clean(rewards_BR), clean(values_BR)

    def back(after, token):
        (advantage_after_B, value_after_B), (reward_B, value_B, is_live_B) = after, token
        delta_B = reward_B + gamma * value_after_B - value_B
        advantage_B = delta_B + gamma * lam * advantage_after_B
        after = jnp.where(is_live_B, advantage_B, advantage_after_B), jnp.where(is_live_B, value_B, value_after_B)
        return after, advantage_B

    end_B = jnp.zeros_like(rewards_BR[:, 0])
    tokens = (rewards_BR.T, values_BR.T, is_live_BR.T)
    _, advantages_RB = jax.lax.scan(back, (end_B, end_B), tokens, reverse=True)
    advantages_BR = clean(advantages_RB.T)
    return advantages_BR, advantages_BR + values_BR


def group_advantages(
    scores_B: Array, group_size: int, *, scale: Scale = "group", baseline: Baseline = "mean", eps: float = 1e-4
) -> Array:
    """The advantage of each response over others, without a critic, f32 [B]: (score - baseline) / scale.

    GRPO (Shao et al. 2024, arXiv:2402.03300, §4.1.2) is baseline `mean` and scale `group`. Dr. GRPO (Liu et al. 2025,
    arXiv:2503.20783) is `mean` and `none`. RLOO (Ahmadian et al. 2024, arXiv:2402.14740; Kool et al. 2019) is
    `leave_one_out` and `none`. REINFORCE with a baseline (Williams 1992) is `batch_mean` and `none`. Best of n (Dong et al.
    2023, arXiv:2304.06767) is `best` and `none`.

    Args:
      scores_B: any dtype; rows of one prompt are adjacent, group_size of them.
      group_size: responses per prompt (rollout.num_samples_per_prompt).
      scale: by the standard deviation + eps of the group's or of the batch's scores, ddof 1.
      baseline: of the group, `mean` or that of the others in it (`leave_one_out`); the mean of the whole batch; or 0. With
        `best` the group's best response has 1, in equal parts where several are best, and the others 0: learning from it as
        from a demonstration.
        A mean that holds the response's own score makes the gradient (G - 1) / G of the unbiased one.

    Raises:
      ValueError: at trace time, for an unknown baseline or scale, if the rows do not divide into groups, or if a group or a
        batch of one has nothing to be compared with.
    """
    for name, value, known in (("baseline", baseline, Baseline), ("scale", scale, Scale)):
        if value not in get_args(known):
            raise ValueError(f"{name} must be one of {', '.join(get_args(known))}, not {value!r}.")
    if group_size < 1 or len(scores_B) % group_size:
        raise ValueError(f"{len(scores_B)} responses do not divide into groups of {group_size}.")
    if group_size == 1 and (baseline in ("mean", "leave_one_out", "best") or scale == "group"):
        raise ValueError(
            f"baseline={baseline!r} with scale={scale!r} compares the responses to one prompt: "
            "rollout.num_samples_per_prompt must be at least 2, not 1."
        )
    if len(scores_B) == 1 and scale == "batch":
        raise ValueError("scale='batch' needs the scores of at least 2 responses, not of 1.")

    scores_NG = scores_B.astype(jnp.float32).reshape(-1, group_size)  # N prompts, G responses to each
    # Relative to one of them first: equal scores then have advantage 0 exactly, not a rounding error over eps.
    shifted_NG = scores_NG - scores_NG[:, :1]
    advantages_NG = shifted_NG - jnp.mean(shifted_NG, axis=1, keepdims=True)
    if baseline == "leave_one_out":  # the score minus the mean of the others is this much of its deviation
        advantages_NG = advantages_NG * (group_size / (group_size - 1))
    elif baseline == "best":
        is_best_NG = (scores_NG == jnp.max(scores_NG, axis=1, keepdims=True)).astype(jnp.float32)
        advantages_NG = is_best_NG / jnp.sum(is_best_NG, axis=1, keepdims=True)
    elif baseline != "mean":
        advantages_NG = scores_NG - jnp.mean(scores_NG) if baseline == "batch_mean" else scores_NG
    if scale == "group":
        advantages_NG = advantages_NG / (jnp.std(shifted_NG, axis=1, ddof=1, keepdims=True) + eps)
    elif scale == "batch":
        advantages_NG = advantages_NG / (jnp.std(scores_NG, ddof=1) + eps)
    return advantages_NG.reshape(-1)


def has_spread(scores_B: Array, group_size: int) -> Array:
    """Whether a response's group has scores that differ, bool [B]; groups without teach nothing.

    Source: dynamic sampling of DAPO (Yu et al. 2025, arXiv:2503.14476), §3.2.
    """
    scores_NG = scores_B.reshape(-1, group_size)
    return jnp.repeat(jnp.max(scores_NG, axis=1) > jnp.min(scores_NG, axis=1), group_size)


def adaptive_kl(coef: Array | float, kl: Array | float, target: float, horizon: float, num_episodes: int) -> Array:
    """The KL coefficient of the next iteration, f32: coef (1 + clip(kl / target - 1, +-0.2) num_episodes / horizon).

    A KL that is not finite leaves it as it is.

    Args:
      kl: mean over responses of the summed KL of their tokens, nats; target: what it should be.
      num_episodes: responses in the iteration; horizon: in episodes.

    Raises:
      ValueError: if one step could bring the coefficient to 0 or below.

    Source: Ziegler et al. 2019 (arXiv:1909.08593), the proportional controller of its §2.
    """
    if 0.2 * num_episodes >= horizon:
        raise ValueError(
            f"ppo.kl_horizon={horizon} is too short for iterations of {num_episodes} responses: the KL coefficient could "
            f"fall to 0. It must be more than {0.2 * num_episodes:g}."
        )
    kl = jnp.asarray(kl, jnp.float32)
    error = jnp.where(jnp.isfinite(kl), jnp.clip(kl / target - 1, -0.2, 0.2), 0.0)
    return jnp.asarray(coef, jnp.float32) * (1 + error * num_episodes / horizon)


def explained_variance(values_BR: Array, returns_BR: Array, mask_BR: Array) -> Array:
    """1 - Var(returns - values) / Var(returns) over the live tokens, f32 scalar; 0 where the returns do not vary.

    1 is a perfect critic, 0 one that knows the mean, less than 0 one that is worse.
    """

    def variance(x_BR):
        return masked_mean(jnp.square(jnp.where(mask_BR != 0, x_BR, 0) - masked_mean(x_BR, mask_BR)), mask_BR)

    total = variance(returns_BR)
    return jnp.where(total > 0, 1 - variance(returns_BR - values_BR) / jnp.where(total > 0, total, 1), 0.0)


def _check_shapes(mask_BR: Array, **arrays: Array) -> None:
    for name, array in arrays.items():
        if array.shape != mask_BR.shape:
            raise ValueError(f"{name} has shape {array.shape}, but mask_BR has {mask_BR.shape}.")
