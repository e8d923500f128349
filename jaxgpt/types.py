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
