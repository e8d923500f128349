"""Reward modelling: a scalar per response, learned from rankings. Bradley-Terry over all pairs, or Plackett-Luce."""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp

from jaxgpt.models import decoder
from jaxgpt.models.config import ModelConfig
from jaxgpt.types import Array, Objective, PairBatch, Params


@dataclasses.dataclass(frozen=True)
class RewardConfig:
    """How rankings become a loss.

    loss: `bradley_terry` compares every pair of a prompt's candidates, `plackett_luce` models the whole order; for two
      candidates they are the same.
    margin: coefficient of PairBatch.margins_B, by which the better reward should lead (Touvron et al. 2023,
      arXiv:2307.09288, eq. 2); 0 ignores the margins.
    label_smoothing: assumed share of pairs whose label is wrong.
    center_coef: coefficient of the squared sum of a pair's rewards, which keeps rewards near 0 (Eisenstein et al. 2023,
      arXiv:2312.09244, eq. 2).
    ties: what a tied pair is to `bradley_terry`: nothing (`skip`), or half a win for either (`half`).
    """

    loss: Literal["bradley_terry", "plackett_luce"] = "bradley_terry"
    margin: float = 0.0
    label_smoothing: float = 0.0
    center_coef: float = 0.0
    ties: Literal["skip", "half"] = "skip"

    def __post_init__(self):
        if self.margin < 0:
            raise ValueError(f"reward.margin must not be negative, not {self.margin}.")
        if not 0 <= self.label_smoothing < 0.5:
            raise ValueError(f"reward.label_smoothing must be in [0, 0.5), not {self.label_smoothing}.")
        if self.center_coef < 0:
            raise ValueError(f"reward.center_coef must not be negative, not {self.center_coef}.")
        if self.loss == "plackett_luce":
            for name, default in (("margin", 0.0), ("label_smoothing", 0.0), ("ties", "skip")):
                if getattr(self, name) != default:
                    raise ValueError(
                        f"reward.{name}={getattr(self, name)!r} is about pairs and has no meaning for "
                        f"reward.loss='plackett_luce'; use reward.loss='bradley_terry', or leave it at {default!r}."
                    )


def strict_pairs(ranks_BC: Array) -> Array:
    """True at [b, i, j] where candidate i is ranked better than candidate j: bool [B, C, C]. Rank -1 is no candidate."""
    return (ranks_BC[:, :, None] < ranks_BC[:, None, :]) & (ranks_BC[:, :, None] >= 0)


def tied_pairs(ranks_BC: Array) -> Array:
    """True at [b, i, j], i < j, where both candidates have the same rank: bool [B, C, C]."""
    equal_BCC = (ranks_BC[:, :, None] == ranks_BC[:, None, :]) & (ranks_BC[:, :, None] >= 0)
    return jnp.triu(equal_BCC, k=1)


def pair_weights(pairs_BCC: Array) -> Array:
    """Equal weights of a prompt's pairs, f32 [B, C, C]: they sum to 1, or to 0 where there is no pair."""
    counts_B = jnp.sum(pairs_BCC, axis=(1, 2), dtype=jnp.float32)
    return pairs_BCC / jnp.maximum(counts_B, 1)[:, None, None]


def pair_accuracy(difference_BCC: Array, weights_BCC: Array) -> Array:
    """How many of the pairs are ordered right, f32 [B]; equal scores count as half, and so does a prompt without pairs."""
    return (1 + jnp.sum(weights_BCC * jnp.sign(difference_BCC), axis=(1, 2))) / 2


def preference_nll(logits: Array, win_probability: Array | float) -> Array:
    """-p log sigmoid(x) - (1 - p) log sigmoid(-x): the cross-entropy of a preference that holds with probability p."""
    return -win_probability * jax.nn.log_sigmoid(logits) - (1 - win_probability) * jax.nn.log_sigmoid(-logits)


def plackett_luce(rewards_BC: Array, ranks_BC: Array) -> Array:
    """Negative log-likelihood of each prompt's order, per choice, f32 [B].

    The order is a series of choices, each among the candidates not placed yet: candidate i, chosen from all those not
    ranked better, contributes logsumexp(their rewards) - r_i. Tied candidates are each chosen from a set that holds all
    of them (Breslow 1974). The sum is divided by the number of choices from more than one candidate (C - 1 without
    ties), so that lists of all lengths weigh the same, and two candidates give exactly the Bradley-Terry loss.

    Args:
      rewards_BC: f32, finite everywhere. ranks_BC: i32; 0 is the best, -1 is no candidate.

    Source: Plackett 1975, "The analysis of permutations", and Luce 1959; as a ranking loss Xia et al. 2008 (ListMLE).
    """
    present_BC = ranks_BC >= 0
    # A candidate is always in its own set, an absent one too: no logsumexp is over nothing, whose gradient were nan.
    left_BCC = present_BC[:, None, :] & (ranks_BC[:, None, :] >= ranks_BC[:, :, None])
    left_BCC |= jnp.eye(ranks_BC.shape[1], dtype=bool)
    log_total_BC = jax.nn.logsumexp(jnp.where(left_BCC, rewards_BC[:, None, :], -jnp.inf), axis=-1)
    is_choice_BC = present_BC & (jnp.sum(left_BCC, axis=-1) > 1)
    nll_B = jnp.sum(jnp.where(is_choice_BC, log_total_BC - rewards_BC, 0), axis=-1)
    return nll_B / jnp.maximum(jnp.sum(is_choice_BC, axis=-1), 1)


def ranked_loss(
    rewards_BC: Array, ranks_BC: Array, margins_B: Array, config: RewardConfig
) -> tuple[Array, dict[str, Array]]:
    """The ranking loss of each prompt, and what it is made of.

    Bradley-Terry: the mean of -log sigmoid(r_i - r_j - margin) over the prompt's comparable pairs, i better than j; so a
    prompt counts the same however many candidates it has. Plackett-Luce: see `plackett_luce`. Either way center_coef adds
    the mean of center_coef (r_i + r_j)^2 over the same pairs. A prompt with no comparable pair (fewer than two
    candidates, or nothing but ties where ties do not count) has loss 0 and weight 0.

    Args:
      rewards_BC: any float dtype; may be anything, even nan, where there is no candidate.
      ranks_BC: i32; 0 is the best, equal ranks tie, -1 is no candidate. margins_B: f32, reward units.

    Returns:
      loss_B, f32 in nats, and f32 sums over the prompts with a comparable pair: "loss" (without centering), "accuracy" and
      "margin" (means over the prompt's strictly ordered pairs of [r_i > r_j], half where equal, and of r_i - r_j; half
      and 0 where all its pairs are ties), "reward_mean" (over the prompt's candidates) and "weight" (their number).

    Source: Ouyang et al. 2022 (arXiv:2203.02155), eq. 1; Bradley and Terry 1952.
    """
    present_BC = ranks_BC >= 0
    rewards_BC = jnp.where(present_BC, rewards_BC.astype(jnp.float32), 0)
    difference_BCC = rewards_BC[:, :, None] - rewards_BC[:, None, :]
    strict_BCC = strict_pairs(ranks_BC)
    pairs_BCC = strict_BCC | tied_pairs(ranks_BC) if config.ties == "half" else strict_BCC
    weights_BCC = pair_weights(pairs_BCC)
    counts_B = jnp.any(pairs_BCC, axis=(1, 2)).astype(jnp.float32)

    if config.loss == "plackett_luce":
        loss_B = counts_B * plackett_luce(rewards_BC, ranks_BC)
    else:
        logits_BCC, win_BCC = difference_BCC, jnp.where(strict_BCC, 1 - config.label_smoothing, 0.5)
        if config.margin:
            logits_BCC -= config.margin * jnp.where(strict_BCC, margins_B[:, None, None], 0)
        loss_B = jnp.sum(weights_BCC * preference_nll(logits_BCC, win_BCC), axis=(1, 2))

    ordered_BCC = pair_weights(strict_BCC)
    reward_mean_B = jnp.sum(rewards_BC, axis=1) / jnp.maximum(jnp.sum(present_BC, axis=1), 1)
    sums = {
        "loss": jnp.sum(loss_B),
        "accuracy": jnp.sum(counts_B * pair_accuracy(difference_BCC, ordered_BCC)),
        "margin": jnp.sum(ordered_BCC * difference_BCC),
        "reward_mean": jnp.sum(counts_B * reward_mean_B),
        "weight": jnp.sum(counts_B),
    }
    if config.center_coef:
        square_BCC = jnp.square(rewards_BC[:, :, None] + rewards_BC[:, None, :])
        loss_B = loss_B + config.center_coef * jnp.sum(weights_BCC * square_BCC, axis=(1, 2))
    return loss_B, sums


def real_positions(segments_BT: Array) -> Array:
    """Positions that count real tokens only, i32 [B, T], so that padding on either side changes nothing."""
    return jnp.maximum(jnp.cumsum(segments_BT != 0, axis=1, dtype=jnp.int32) - 1, 0)


def last_token_rewards(
    model: ModelConfig, params: Params, tokens_BT: Array, segments_BT: Array, rng: Array | None = None
) -> Array:
    """The scalar head's value at the last real token of each row, f32 [B].

    Rows are padded on the right or on the left; a row of nothing but padding gets a finite value without meaning.

    Args:
      tokens_BT: i32. segments_BT: i32, 0 on padding. rng: for dropout; None for none.

    Raises:
      ValueError: if model.head is not 'scalar'.

    Source: Stiennon et al. 2020 (arXiv:2009.01325).
    """
    x_BTD = decoder.hidden_states(model, params, tokens_BT, segments_BT, real_positions(segments_BT), dropout_rng=rng)
    last_B = segments_BT.shape[1] - 1 - jnp.argmax(jnp.flip(segments_BT != 0, axis=1), axis=1)
    x_BD = jnp.take_along_axis(x_BTD, last_B[:, None, None], axis=1)
    return decoder.values(model, params, x_BD)[:, 0]


def make_reward(model: ModelConfig, config: RewardConfig) -> Objective:
    """The objective (params, PairBatch, rng) -> (loss sum, the sums of `ranked_loss`); weight is the number of prompts.

    Each response is forwarded once, whatever the number of pairs it is in (Ouyang et al. 2022, arXiv:2203.02155).
    Raises ValueError if model.head is not 'scalar'.
    """
    if model.head != "scalar":
        raise ValueError(f"A reward model needs model.head='scalar', not {model.head!r}.")

    def reward(params, batch: PairBatch, rng):
        rows = lambda a_BCT: a_BCT.reshape(-1, a_BCT.shape[-1])
        rewards = last_token_rewards(model, params, rows(batch.tokens_BCT), rows(batch.segments_BCT), rng)
        loss_B, sums = ranked_loss(rewards.reshape(batch.ranks_BC.shape), batch.ranks_BC, batch.margins_B, config)
        return jnp.sum(loss_B), sums

    return reward
