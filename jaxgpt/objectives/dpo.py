"""Direct preference optimization: the policy is its own reward model. One loss for pairs and for ranked lists."""

import dataclasses
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp

from jaxgpt import numerics
from jaxgpt.models import decoder
from jaxgpt.models.config import ModelConfig
from jaxgpt.objectives.reward import pair_accuracy, pair_weights, preference_nll, real_positions, strict_pairs
from jaxgpt.types import Array, Objective, PairBatch, Params

Reference = Callable[[Params, PairBatch], Array]  # -> the reference policy's log-probs, f32 [B, C]


@dataclasses.dataclass(frozen=True)
class DPOConfig:
    """How the two policies' log-probs become a loss.

    loss: `sigmoid` (Rafailov et al. 2023) or `ipo` (Azar et al. 2023), a regression that does not saturate. As in the papers,
      the log-prob of a response is the sum over its tokens; where others average it for IPO (TRL), beta has another scale.
    beta: strength of the pull towards the reference; 1 / nats.
    label_smoothing: assumed share of pairs whose label is wrong (`sigmoid` only).
    reference_free: a uniform reference, whose log-ratio of any two responses is 0.
    chunk_tokens: how many tokens' logits exist at a time (over all devices).
    """

    loss: Literal["sigmoid", "ipo"] = "sigmoid"
    beta: float = 0.1
    label_smoothing: float = 0.0
    reference_free: bool = False
    chunk_tokens: int = 1024

    def __post_init__(self):
        if self.beta <= 0:
            raise ValueError(f"dpo.beta must be positive, not {self.beta}.")
        if not 0 <= self.label_smoothing < 0.5:
            raise ValueError(f"dpo.label_smoothing must be in [0, 0.5), not {self.label_smoothing}.")
        if self.label_smoothing and self.loss != "sigmoid":
            raise ValueError(
                f"dpo.label_smoothing={self.label_smoothing} has no meaning for dpo.loss={self.loss!r}; use "
                "dpo.loss='sigmoid', or leave it at 0."
            )
        if self.chunk_tokens < 1:
            raise ValueError(f"dpo.chunk_tokens must be at least 1, not {self.chunk_tokens}.")


def dpo_loss(
    policy_BC: Array, reference_BC: Array, ranks_BC: Array, config: DPOConfig
) -> tuple[Array, dict[str, Array]]:
    """The DPO loss of each prompt: its mean over the prompt's strictly ordered pairs, one pair being plain DPO.

    With h = log pi(i)/ref(i) - log pi(j)/ref(j), i ranked better than j, and label smoothing e:
    `sigmoid` is -(1 - e) log sigmoid(beta h) - e log sigmoid(-beta h), `ipo` is (h - 1 / (2 beta))^2.

    Args:
      policy_BC, reference_BC: f32 sums of the log-probs of each response's tokens, in nats; anything, even nan, where
        there is no candidate. ranks_BC: i32; 0 is the best, equal ranks tie and are skipped, -1 is no candidate.

    Returns:
      loss_B, f32, 0 for a prompt without such a pair, and f32 sums over the prompts with one: "loss", "accuracy" (of
      h > 0; half where equal), "margin" (beta h), "chosen_reward" and "rejected_reward" (beta log pi/ref of i and of j),
      "chosen_logprob" and "rejected_logprob", each the mean over the prompt's pairs, and "weight", the number of prompts.

    Source: Rafailov et al. 2023 (arXiv:2305.18290), eq. 7; Azar et al. 2023 (arXiv:2310.12036), eq. 17.
    """
    clean = lambda logprobs_BC: jnp.where(ranks_BC >= 0, logprobs_BC.astype(jnp.float32), 0)
    policy_BC, reference_BC = clean(policy_BC), clean(reference_BC)
    ratio_BC = policy_BC - reference_BC
    h_BCC = ratio_BC[:, :, None] - ratio_BC[:, None, :]
    pairs_BCC = strict_pairs(ranks_BC)
    weights_BCC = pair_weights(pairs_BCC)
    if config.loss == "ipo":
        loss_BCC = jnp.square(h_BCC - 1 / (2 * config.beta))
    else:
        loss_BCC = preference_nll(config.beta * h_BCC, 1 - config.label_smoothing)
    loss_B = jnp.sum(weights_BCC * loss_BCC, axis=(1, 2))

    chosen_BC, rejected_BC = jnp.sum(weights_BCC, axis=2), jnp.sum(weights_BCC, axis=1)
    counts_B = jnp.any(pairs_BCC, axis=(1, 2)).astype(jnp.float32)
    return loss_B, {
        "loss": jnp.sum(loss_B),
        "accuracy": jnp.sum(counts_B * pair_accuracy(h_BCC, weights_BCC)),
        "margin": config.beta * jnp.sum(weights_BCC * h_BCC),
        "chosen_reward": config.beta * jnp.sum(chosen_BC * ratio_BC),
        "rejected_reward": config.beta * jnp.sum(rejected_BC * ratio_BC),
        "chosen_logprob": jnp.sum(chosen_BC * policy_BC),
        "rejected_logprob": jnp.sum(rejected_BC * policy_BC),
        "weight": jnp.sum(counts_B),
    }


def sequence_logprobs(
    model: ModelConfig, params: Params, batch: PairBatch, chunk_tokens: int, rng: Array | None = None
) -> Array:
    """The log-prob of each response given its prompt: the weighted SUM over its tokens, in nats, f32 [B, C].

    Padding on either side changes nothing. rng: for dropout; None for none.
    """
    rows = lambda a_BCT: a_BCT.reshape(-1, a_BCT.shape[-1])
    segments_BT, weights_BT = rows(batch.segments_BCT), rows(batch.weights_BCT).astype(jnp.float32)
    x_BTD = decoder.hidden_states(
        model, params, rows(batch.tokens_BCT), segments_BT, real_positions(segments_BT), dropout_rng=rng
    )
    logprobs_BT = numerics.chunked_token_logprobs(
        lambda head, x: decoder.logits(model, head, x),
        decoder.head_params(model, params),
        x_BTD,
        rows(batch.targets_BCT),
        chunk_tokens=chunk_tokens,
    )
    logprobs_B = jnp.sum(jnp.where(weights_BT != 0, logprobs_BT, 0) * weights_BT, axis=1)
    return logprobs_B.reshape(batch.ranks_BC.shape)


def make_dpo(model: ModelConfig, config: DPOConfig, reference: Reference | None) -> Objective:
    """The objective (params, PairBatch, rng) -> (loss sum, the sums of `dpo_loss`); weight is the number of prompts.

    reference: the reference policy's `sequence_logprobs`, from whatever part of the (merged) params is frozen. It is not
      called, and may be None, where the batch brings reference_logprobs_BC. No gradient flows into either.

    Raises:
      ValueError: if model.head is not 'lm'; if a reference is given with dpo.reference_free, or, at trace time, if there
        is none and the batch brings none.
    """
    if model.head != "lm":
        raise ValueError(f"DPO needs a language model, model.head='lm', not {model.head!r}.")
    if config.reference_free and reference is not None:
        raise ValueError("dpo.reference_free=True has no use for a reference policy; give None, or set it to False.")

    def reference_logprobs(params, batch: PairBatch) -> Array:
        if config.reference_free:
            return jnp.zeros(batch.ranks_BC.shape, jnp.float32)
        if batch.reference_logprobs_BC is not None:
            return batch.reference_logprobs_BC
        if reference is None:
            raise ValueError(
                "DPO needs a reference policy: give one to make_dpo, let the batch bring reference_logprobs_BC, or set "
                "dpo.reference_free=True."
            )
        # Stopped at the input, so that nothing is kept for a backward pass; stopped again by the caller.
        return reference(jax.lax.stop_gradient(params), batch)

    def dpo(params, batch: PairBatch, rng):
        policy_BC = sequence_logprobs(model, params, batch, config.chunk_tokens, rng)
        reference_BC = jax.lax.stop_gradient(reference_logprobs(params, batch))
        loss_B, sums = dpo_loss(policy_BC, reference_BC, batch.ranks_BC, config)
        return jnp.sum(loss_B), sums

    return dpo
