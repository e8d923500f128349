"""Proximal policy optimization over recorded responses: clipped policy and value losses, KL and entropy, as sums."""

import dataclasses
from collections.abc import Mapping
from typing import Literal, get_args

import jax.numpy as jnp

from jaxgpt import numerics
from jaxgpt.models import decoder
from jaxgpt.models.config import ModelConfig
from jaxgpt.models.decoder import VALUE_HEAD
from jaxgpt.numerics import KLEstimator, masked_sum
from jaxgpt.types import Array, Metrics, Objective, Params, Trajectory

Aggregation = Literal["token", "sequence", "constant"]
KLPlace = Literal["reward", "loss"]


@dataclasses.dataclass(frozen=True)
class PPOConfig:
    """What an iteration of PPO does with its responses (Schulman et al. 2017, arXiv:1707.06347; details for language
    models: Ziegler et al. 2019, arXiv:1909.08593; Stiennon et al. 2020, arXiv:2009.01325; Huang et al. 2024,
    arXiv:2403.17031).

    Where the KL goes changes what is optimised. In the reward, with k1 and gamma = 1, the policy gradient is that of
    E[score] - kl_coef KL(pi || ref) of whole responses, whose optimum is ref(y) exp(score(y) / kl_coef) / Z. In the loss, no
    gradient flows to the earlier tokens that led to a later KL; and of one token drawn from pi itself, k1's gradient is
    zero in expectation (it does nothing), k2's is that of KL(pi || ref), and k3's that of KL(ref || pi), the other
    direction, with optimum kl_coef ref(y) / (c - score(y)), c such that it sums to 1. In the reward, k2 and k3 penalise
    another quantity than the sequence KL, too.

    num_epochs, num_minibatches: passes over an iteration's responses, and updates per pass.
    clip_epsilon, clip_epsilon_high: the ratio is clipped to [1 - clip_epsilon, 1 + clip_epsilon_high]; None is
      clip_epsilon. "Clip-higher" (0.28) is of DAPO (Yu et al. 2025, arXiv:2503.14476).
    dual_clip: where the advantage A is negative, the loss is at most -dual_clip A (Ye et al. 2020, arXiv:1912.09729); None
      is off.
    value_clip: predictions further than this from the old ones are clipped; 0 or None is off. value_coef: weight of the
      value loss where policy and critic are trained by one loss. entropy_coef: weight of the entropy bonus.
    gamma, gae_lambda: discount and GAE (Schulman et al. 2016, arXiv:1506.02438).
    kl_coef: reward units per nat; 0 is off. kl_target: the KL of a response, nats, towards which kl_coef is adapted, by
      at most 20 % in kl_horizon / (responses of an iteration) iterations; None keeps it fixed.
    whiten_rewards, whiten_advantages: over the live tokens of the iteration; rewards keep their mean.
    missing_eos_penalty: the score of a response that the length limit cut off, instead of its own; None is off.
    normalize_rewards, reward_clip: scores by their running moments, then clipped to +-reward_clip; before the KL is added.
    target_kl: an iteration's updates end once approxkl, nats per token, exceeds it; None is off.
    aggregation: how token losses are averaged: over all `token`s (DAPO); over the tokens of each `sequence`, then over
      sequences (GRPO: Shao et al. 2024, arXiv:2402.03300); or as sums over each sequence divided by a `constant`, the
      longest possible length (Dr. GRPO: Liu et al. 2025, arXiv:2503.20783).
    chunk_tokens: how many tokens' logits exist at a time (over all devices).
    """

    num_epochs: int = 4
    num_minibatches: int = 1
    clip_epsilon: float = 0.2
    clip_epsilon_high: float | None = None
    dual_clip: float | None = None
    value_clip: float | None = 0.2
    value_coef: float = 0.1
    entropy_coef: float = 0.0
    gamma: float = 1.0
    gae_lambda: float = 0.95
    kl_coef: float = 0.05
    kl_estimator: KLEstimator = "k1"
    kl_in: KLPlace = "reward"
    kl_target: float | None = None
    kl_horizon: int = 10_000
    whiten_rewards: bool = False
    whiten_advantages: bool = True
    missing_eos_penalty: float | None = None
    reward_clip: float | None = None
    normalize_rewards: bool = False
    target_kl: float | None = None
    aggregation: Aggregation = "token"
    chunk_tokens: int = 1024

    def __post_init__(self):
        for name in ("num_epochs", "num_minibatches", "kl_horizon", "chunk_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"ppo.{name} must be at least 1, not {getattr(self, name)}.")
        if not 0 < self.clip_epsilon < 1:
            raise ValueError(f"ppo.clip_epsilon must be in (0, 1), not {self.clip_epsilon}.")
        for name in ("clip_epsilon_high", "kl_target", "reward_clip", "target_kl"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"ppo.{name} must be positive, or None for none of its own, not {value}.")
        if self.dual_clip is not None and not self.dual_clip > 1:
            raise ValueError(f"ppo.dual_clip must be more than 1, or None to switch it off, not {self.dual_clip}.")
        for name in ("value_clip", "value_coef", "entropy_coef", "kl_coef"):
            if not (getattr(self, name) or 0) >= 0:
                raise ValueError(f"ppo.{name} must not be negative, not {getattr(self, name)}.")
        for name in ("gamma", "gae_lambda"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"ppo.{name} must be in [0, 1], not {getattr(self, name)}.")
        for name, known in (("kl_estimator", KLEstimator), ("kl_in", KLPlace), ("aggregation", Aggregation)):
            if getattr(self, name) not in get_args(known):
                raise ValueError(
                    f"ppo.{name} must be one of {', '.join(get_args(known))}, not {getattr(self, name)!r}."
                )
        if self.kl_target is not None and self.kl_coef == 0:
            raise ValueError(
                f"ppo.kl_target={self.kl_target} adapts ppo.kl_coef by factors, which leave 0 at 0: start from a positive "
                "one, or set ppo.kl_target=None."
            )


def token_weights(mask_BR: Array, aggregation: Aggregation) -> tuple[Array, Array]:
    """How much each token's loss counts, f32 [B, R], and the weight of each row that the sum is divided by, f32 [B].

    With n live tokens in a row: `token` is 1 and n, `sequence` 1 / n and 1, `constant` 1 / R and 1 (see `PPOConfig`). A
    row whose mask is all 0 has no weight.

    Raises:
      ValueError: for an unknown aggregation.
    """
    mask_BR = (mask_BR != 0).astype(jnp.float32)
    lengths_B = jnp.sum(mask_BR, axis=1)
    if aggregation == "token":
        return mask_BR, lengths_B
    if aggregation == "sequence":
        return mask_BR / jnp.maximum(lengths_B, 1)[:, None], (lengths_B > 0).astype(jnp.float32)
    if aggregation == "constant":
        return mask_BR / mask_BR.shape[1], (lengths_B > 0).astype(jnp.float32)
    raise ValueError(f"ppo.aggregation must be one of {', '.join(get_args(Aggregation))}, not {aggregation!r}.")


def policy_loss(
    logp_BR: Array, old_BR: Array, advantages_BR: Array, weights_BR: Array, config: PPOConfig
) -> tuple[Array, dict[str, Array]]:
    """The weighted sum of the clipped surrogate max(-A ratio, -A clip(ratio)), ratio = exp(logp - old).

    Args:
      logp_BR: log-probs under the policy being trained, nats; the only one that carries a gradient. advantages_BR: A.
      weights_BR: f32; 0 where a token is not live, and the others may then be anything, even nan.

    Returns:
      The sum, and f32 sums: "loss", the same; and over the tokens with a weight, each counted once, "tokens", "approxkl"
      ((logp - old)^2 / 2, nats), "clipfrac" (the clipped branch is the larger one), "ratio_offset" (ratio - 1) and
      "ratio_offset_squared", whose means give the ratio's mean and variance without cancellation (`token_means`).

    Source: Schulman et al. 2017 (arXiv:1707.06347), eq. 7; Ye et al. 2020 (arXiv:1912.09729), eq. 5.
    """
    is_live_BR = weights_BR != 0
    clean = lambda x_BR: jnp.where(is_live_BR, x_BR.astype(jnp.float32), 0.0)
    advantages_BR = clean(advantages_BR)
    difference_BR = clean(logp_BR) - clean(old_BR)
    ratio_BR = jnp.exp(difference_BR)
    high = config.clip_epsilon if config.clip_epsilon_high is None else config.clip_epsilon_high
    plain_BR = -advantages_BR * ratio_BR
    clipped_BR = -advantages_BR * jnp.clip(ratio_BR, 1 - config.clip_epsilon, 1 + high)
    # where, not maximum: at ratio 1 the branches are equal, and the gradient is that of the first.
    is_clipped_BR = clipped_BR > plain_BR
    loss_BR = jnp.where(is_clipped_BR, clipped_BR, plain_BR)
    if config.dual_clip is not None:
        most_BR = -config.dual_clip * advantages_BR
        loss_BR = jnp.where((advantages_BR < 0) & (loss_BR > most_BR), most_BR, loss_BR)

    loss_sum = masked_sum(loss_BR, weights_BR)
    offset_BR = jnp.expm1(difference_BR)
    return loss_sum, {
        "loss": loss_sum,
        "approxkl": jnp.sum(jnp.square(difference_BR)) / 2,
        "clipfrac": masked_sum(is_clipped_BR, is_live_BR),
        "ratio_offset": jnp.sum(offset_BR),
        "ratio_offset_squared": jnp.sum(jnp.square(offset_BR)),
        "tokens": jnp.sum(is_live_BR, dtype=jnp.float32),
    }


def value_loss(
    values_BR: Array, old_values_BR: Array, returns_BR: Array, weights_BR: Array, clip: float | None
) -> tuple[Array, dict[str, Array]]:
    """The weighted sum of max((V - G)^2, (V' - G)^2) / 2, V' the prediction V clipped to within `clip` of the old one.

    Args:
      values_BR: V, the only one that carries a gradient. returns_BR: G. All in reward units.
      weights_BR: f32; 0 where a token is not live, and the others may then be anything, even nan.
      clip: 0 or None leaves V as it is.

    Returns:
      The sum, and f32 sums: "loss", the same; over the tokens with a weight "tokens", "clipfrac" (the clipped error is the
      larger one) and "error" ((V - G)^2).

    Source: Huang et al. 2024 (arXiv:2403.17031), after Ziegler et al. 2019.
    """
    is_live_BR = weights_BR != 0
    clean = lambda x_BR: jnp.where(is_live_BR, x_BR.astype(jnp.float32), 0.0)
    values_BR, old_values_BR, returns_BR = clean(values_BR), clean(old_values_BR), clean(returns_BR)
    error_BR = jnp.square(values_BR - returns_BR)
    is_clipped_BR = jnp.zeros_like(is_live_BR)
    loss_BR = error_BR
    if clip:
        clipped_BR = jnp.square(jnp.clip(values_BR, old_values_BR - clip, old_values_BR + clip) - returns_BR)
        is_clipped_BR = clipped_BR > error_BR
        loss_BR = jnp.where(is_clipped_BR, clipped_BR, error_BR)
    loss_sum = masked_sum(loss_BR, weights_BR) / 2
    return loss_sum, {
        "loss": loss_sum,
        "clipfrac": masked_sum(is_clipped_BR, is_live_BR),
        "error": jnp.sum(error_BR),
        "tokens": jnp.sum(is_live_BR, dtype=jnp.float32),
    }


def kl_loss(
    logp_BR: Array, reference_BR: Array, weights_BR: Array, estimator: KLEstimator, coef: Array | float = 1.0
) -> tuple[Array, dict[str, Array]]:
    """The weighted sum of coef KL(token), and {"kl"}: the plain sum of KL(token), nats, over the tokens with a weight.

    logp_BR is the one that carries a gradient; `PPOConfig` says what that gradient is. Where weights_BR is 0, the log-probs
    may be anything, even nan. coef: reward units per nat, anything that broadcasts to [B, R].

    Source: Shao et al. 2024 (arXiv:2402.03300), eq. 4 (k3).
    """
    is_live_BR = weights_BR != 0
    clean = lambda x_BR: jnp.where(is_live_BR, x_BR.astype(jnp.float32), 0.0)
    kl_BR = numerics.kl_estimate(clean(logp_BR), clean(reference_BR), estimator)
    return masked_sum(coef * kl_BR, weights_BR), {"kl": jnp.sum(kl_BR)}


def token_means(sums: Mapping[str, Array], prefix: str = "") -> dict[str, Array]:
    """What a researcher reads: means over tokens, made of the sums above, in place of them.

    sums: of an objective, or what the train step made of them (all divided by one number, which cancels). "approxkl",
    "clipfrac", "kl", "entropy" and "error" become means over "tokens", "ratio" and "ratio_var" are made of the offsets;
    the rest ("loss", which has weights of its own, "weight", "grad_norm", ...) stays. prefix: of the names meant
    ("policy/").
    """
    rest = dict(sums)
    tokens = rest.pop(f"{prefix}tokens")
    pop_mean = lambda name: rest.pop(prefix + name) / jnp.where(tokens == 0, 1.0, tokens)
    names = ("approxkl", "clipfrac", "kl", "entropy", "error")
    means = {prefix + name: pop_mean(name) for name in names if prefix + name in rest}
    if f"{prefix}ratio_offset" in rest:
        offset, squared = pop_mean("ratio_offset"), pop_mean("ratio_offset_squared")
        means[f"{prefix}ratio"] = 1 + offset
        means[f"{prefix}ratio_var"] = jnp.maximum(squared - jnp.square(offset), 0.0)
    return rest | means


def response_logprobs(
    model: ModelConfig,
    params: Params,
    tokens_BS: Array,
    segments_BS: Array,
    positions_BS: Array,
    *,
    num_response: int,
    temperature: float,
    chunk_tokens: int,
) -> tuple[Array, Array]:
    """Log-prob of each response token and entropy of the distribution it is drawn from, nats, f32 [B, R].

    Both under softmax(logits / temperature), both 0 on padding, both with gradients. No dropout: a ratio to the old policy
    would be noise. Logits are computed for response tokens alone, a chunk at a time.

    Args:
      tokens_BS, segments_BS, positions_BS: as in `Trajectory`.
      num_response: R, static; P = S - R must be at least 1.

    Raises:
      ValueError: at trace time, if model.head is not 'lm', if temperature is not positive, or if no prompt is left.
    """
    _check_policy(model, temperature)
    x_BRD, is_real_BR = _states_before(model, params, tokens_BS, segments_BS, positions_BS, num_response)
    return _logprobs(model, params, x_BRD, is_real_BR, tokens_BS[:, -num_response:], temperature, chunk_tokens)


def _logprobs(
    model: ModelConfig,
    params: Params,
    x_BRD: Array,
    is_real_BR: Array,
    tokens_BR: Array,
    temperature: float,
    chunk: int,
) -> tuple[Array, Array]:
    """What `response_logprobs` returns, from the hidden states before the response tokens."""
    logprobs_BR, entropy_BR = numerics.chunked_logprobs_and_entropy(
        lambda head, x: decoder.logits(model, head, x) / temperature,
        decoder.head_params(model, params),
        x_BRD,
        tokens_BR,
        chunk_tokens=chunk,
    )
    return jnp.where(is_real_BR, logprobs_BR, 0.0), jnp.where(is_real_BR, entropy_BR, 0.0)


def response_values(
    model: ModelConfig,
    params: Params,
    tokens_BS: Array,
    segments_BS: Array,
    positions_BS: Array,
    *,
    num_response: int,
) -> Array:
    """The critic's value of the state before each response token, reward units, f32 [B, R]; 0 on padding. No dropout.

    The value at t is read from the hidden state of the token before t, which knows nothing of token t. Arguments as in
    `response_logprobs`. Raises ValueError at trace time if model.head is not 'scalar', or if no prompt is left.
    """
    if model.head != "scalar":
        raise ValueError(f"A critic needs model.head='scalar', not {model.head!r}.")
    x_BRD, is_real_BR = _states_before(model, params, tokens_BS, segments_BS, positions_BS, num_response)
    return jnp.where(is_real_BR, decoder.values(model, params, x_BRD), 0.0)


def _check_policy(model: ModelConfig, temperature: float) -> None:
    if model.head != "lm":
        raise ValueError(f"A policy needs model.head='lm', not {model.head!r}.")
    if not temperature > 0:
        raise ValueError(f"rollout.temperature must be positive where log-probs are trained, not {temperature}.")


def _states_before(
    model: ModelConfig, params: Params, tokens_BS: Array, segments_BS: Array, positions_BS: Array, num_response: int
) -> tuple[Array, Array]:
    """Hidden states that response tokens are drawn from, [B, R, D]: those of positions P - 1 .. S - 2; and what is real."""
    length = tokens_BS.shape[1]
    if not 0 < num_response < length:
        raise ValueError(
            f"{num_response} of {length} tokens are the response: there must be at least one, after a prompt of at least one."
        )
    x_BSD = decoder.hidden_states(model, params, tokens_BS, segments_BS, positions_BS)
    return x_BSD[:, length - num_response - 1 : -1], segments_BS[:, -num_response:] != 0


def shared_critic(params: Params) -> Params:
    """The parameters of the critic that is the policy's own trunk with the value head VALUE_HEAD beside it."""
    return {name: leaf for name, leaf in params.items() if name != VALUE_HEAD} | {"head": params[VALUE_HEAD]}


def make_policy(model: ModelConfig, config: PPOConfig, temperature: float) -> Objective:
    """The objective (params, Trajectory, rng) -> (loss sum, the sums of `policy_loss`), without dropout whatever the rng.

    metrics["weight"] is the sum of row_weights_B. With ppo.kl_in='loss' the loss has kl_coef KL (batch.kl_coef_B in place
    of ppo.kl_coef, where given) and the sums have "kl"; with ppo.entropy_coef it has -entropy_coef entropy, and
    they have "entropy".

    temperature: of the distribution sampled from, static; old_logprobs_BR and reference_logprobs_BR are under it, too.

    Raises:
      ValueError: if model.head is not 'lm' or temperature not positive; at trace time, if a KL term has no reference.
    """
    _check_policy(model, temperature)

    def policy(params, batch: Trajectory, rng) -> tuple[Array, Metrics]:
        del rng
        logp_BR, entropy_BR = response_logprobs(
            model, params, *_places(batch), num_response=batch.weights_BR.shape[1], temperature=temperature,
            chunk_tokens=config.chunk_tokens,
        )  # fmt: skip
        total, sums = _policy_terms(config, batch, logp_BR, entropy_BR)
        return total, sums | {"weight": jnp.sum(batch.row_weights_B)}

    return policy


def make_value(model: ModelConfig, config: PPOConfig) -> Objective:
    """The objective (params, Trajectory, rng) -> (loss sum, the sums of `value_loss`), without dropout whatever the rng.

    metrics["weight"] is the sum of row_weights_B. ppo.value_coef is the business of `make_ppo`.

    Raises:
      ValueError: if model.head is not 'scalar'; at trace time, if the batch brings no returns_BR and old_values_BR.
    """
    if model.head != "scalar":
        raise ValueError(f"A critic needs model.head='scalar', not {model.head!r}.")

    def value(params, batch: Trajectory, rng) -> tuple[Array, Metrics]:
        del rng
        values_BR = response_values(model, params, *_places(batch), num_response=batch.weights_BR.shape[1])
        total, sums = _value_terms(config, batch, values_BR)
        return total, sums | {"weight": jnp.sum(batch.row_weights_B)}

    return value


def make_ppo(model: ModelConfig, config: PPOConfig, temperature: float) -> Objective:
    """One loss, policy + value_coef value, of a policy and a critic that share a trunk, from one forward pass.

    params: the policy's, and VALUE_HEAD, a scalar head, beside them. Sums are named "policy/..." and "value/...". As
    `make_policy` and `make_value` otherwise.
    """
    _check_policy(model, temperature)
    critic = dataclasses.replace(model, head="scalar")

    def ppo(params, batch: Trajectory, rng) -> tuple[Array, Metrics]:
        del rng
        num_response = batch.weights_BR.shape[1]
        x_BRD, is_real_BR = _states_before(model, params, *_places(batch), num_response)
        tokens_BR = batch.tokens_BS[:, -num_response:]
        probabilities = _logprobs(model, params, x_BRD, is_real_BR, tokens_BR, temperature, config.chunk_tokens)
        policy_sum, policy_sums = _policy_terms(config, batch, *probabilities)
        values_BR = jnp.where(is_real_BR, decoder.values(critic, shared_critic(params), x_BRD), 0.0)
        value_sum, value_sums = _value_terms(config, batch, values_BR)
        named = {f"policy/{name}": total for name, total in policy_sums.items()}
        named |= {f"value/{name}": total for name, total in value_sums.items()}
        return policy_sum + config.value_coef * value_sum, named | {"weight": jnp.sum(batch.row_weights_B)}

    return ppo


def _places(batch: Trajectory) -> tuple[Array, Array, Array]:
    return batch.tokens_BS, batch.segments_BS, batch.positions_BS


def _policy_terms(
    config: PPOConfig, batch: Trajectory, logp_BR: Array, entropy_BR: Array
) -> tuple[Array, dict[str, Array]]:
    """The clipped surrogate with its KL and entropy terms, and their sums."""
    weights_BR = batch.weights_BR
    total, sums = policy_loss(logp_BR, batch.old_logprobs_BR, batch.advantages_BR, weights_BR, config)
    if config.kl_in == "loss" and config.kl_coef:
        if batch.reference_logprobs_BR is None:
            raise ValueError("ppo.kl_in='loss' needs a reference policy: the batch must bring reference_logprobs_BR.")
        coef = config.kl_coef if batch.kl_coef_B is None else batch.kl_coef_B[:, None]
        kl_sum, kl_sums = kl_loss(logp_BR, batch.reference_logprobs_BR, weights_BR, config.kl_estimator, coef)
        total, sums = total + kl_sum, sums | kl_sums
    if config.entropy_coef:
        total = total - config.entropy_coef * masked_sum(entropy_BR, weights_BR)
        sums |= {"entropy": masked_sum(entropy_BR, weights_BR != 0)}
    return total, sums


def _value_terms(config: PPOConfig, batch: Trajectory, values_BR: Array) -> tuple[Array, dict[str, Array]]:
    if batch.returns_BR is None or batch.old_values_BR is None:
        raise ValueError("The value loss needs a batch with returns_BR and old_values_BR.")
    return value_loss(values_BR, batch.old_values_BR, batch.returns_BR, batch.weights_BR, config.value_clip)
