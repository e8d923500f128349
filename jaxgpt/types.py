"""Core types: the axis legend, batches, the train state and the protocols everything else composes.

Axis legend (shape suffixes of names throughout the library):

  B batch    T time (query)    S key / cache    P prompt    R response (S = P + R)
  V vocab    D model    N query heads    K kv heads    G = N // K    H head dim    F mlp
  L layers   Z LoRA rank   C candidates (responses to one prompt)
"""

from collections.abc import Mapping
from typing import Any, Protocol

import jax
from flax import struct

Array = jax.Array
Params = Any  # a pytree (nested dict) of arrays
OptState = Any
Metrics = Mapping[str, Array]  # name -> scalar


class LMBatch(struct.PyTreeNode):
    """One batch for next-token training, packed or padded: the mask is data, not code.

    tokens_BT, targets_BT: i32. Targets are shifted by the data pipeline, never by the loss.
    weights_BT: f32; 0 on padding, on prompts, and where the target belongs to another segment.
    segments_BT: i32; 0 is padding, documents of a row are numbered from 1.
    positions_BT: i32; restart at 0 with every segment.
    """

    tokens_BT: Array
    targets_BT: Array
    weights_BT: Array
    segments_BT: Array
    positions_BT: Array


class PairBatch(struct.PyTreeNode):
    """Ranked responses: each row holds C candidates for one prompt (two for pairs), each prompt + response, right-padded.

    tokens_BCT, targets_BCT: i32, targets shifted by the data pipeline. weights_BCT: f32; 1 where the target belongs to
    the response (its end included). segments_BCT: i32; 1 on real tokens, 0 on padding.
    ranks_BC: i32; 0 is the best, equal ranks tie, -1 is no candidate at all.
    margins_B: f32; how much better the better one is said to be, 0 where nothing is said.
    reference_logprobs_BC: f32, the reference policy's log-prob of each response (DPO), where computed beforehand.
    """

    tokens_BCT: Array
    targets_BCT: Array
    weights_BCT: Array
    segments_BCT: Array
    ranks_BC: Array
    margins_B: Array
    reference_logprobs_BC: Array | None = None


class Trajectory(struct.PyTreeNode):
    """B sequences of P prompt tokens, padded on the left, and R response tokens, padded on the right: S = P + R.

    Index t of an array [B, R] is about the response's token t. A token is live up to and including the EOS that ended the
    response; arrays [B, R] may hold anything, even nan, where it is not, unless said otherwise. All but the tokens are
    constants to the loss: no gradient flows into them.

    tokens_BS, segments_BS, positions_BS: i32. segments: 1 on real tokens, 0 on padding of either side. positions count
      real tokens from 0.
    response_mask_BR: f32; 1 on live tokens, else 0. From lengths, so pad == eos is no problem.
    old_logprobs_BR: f32, nats, before the update and by the trainer's own forward pass, under the distribution sampled
      from.
    advantages_BR: f32.
    weights_BR: f32; how much each token's loss counts, 0 where the token is not live or the row not used.
    row_weights_B: f32; what each row adds to the weight that the summed loss is divided by. It need not be the sum of
      weights_BR over the row (see `objectives.ppo.token_weights`).
    returns_BR, old_values_BR: f32, reward units: the critic's target, and its prediction before the update. old_values
      at t is the value of the state before token t. None without a critic.
    reference_logprobs_BR: f32, nats, of the frozen reference, where the loss has a KL term.
    kl_coef_B: f32, that term's coefficient where it changes from one iteration to the next; None is the config's.
    """

    tokens_BS: Array
    segments_BS: Array
    positions_BS: Array
    response_mask_BR: Array
    old_logprobs_BR: Array
    advantages_BR: Array
    weights_BR: Array
    row_weights_B: Array
    returns_BR: Array | None = None
    old_values_BR: Array | None = None
    reference_logprobs_BR: Array | None = None
    kl_coef_B: Array | None = None


class TrainState(struct.PyTreeNode):
    """What is trained, and nothing else.

    step: i32 scalar, the number of updates applied. params: the trainable parameters, float32.
    rng: a typed PRNG key; the key of a step is `fold_in(rng, step)`.
    """

    step: Array
    params: Params
    opt_state: OptState
    rng: Array


class Objective(Protocol):
    """A loss: `(params, batch, rng) -> (loss_sum, metrics)`, all of them SUMS over the batch.

    `metrics["weight"]` is the total weight; the train step divides the summed gradient and every other metric
    by the *global* weight, so that devices, accumulation and packing cannot change the gradient.
    `rng=None` means deterministic (no dropout).
    """

    def __call__(self, params: Params, batch: Any, rng: Array | None) -> tuple[Array, Metrics]: ...
