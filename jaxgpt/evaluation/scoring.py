"""Rewards of responses outside of training: of held-out preferences, and of texts that a user brings."""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from jaxgpt import partition
from jaxgpt.data.batches import eval_batches
from jaxgpt.data.preference import RankedRows
from jaxgpt.models.config import ModelConfig
from jaxgpt.objectives.reward import last_token_rewards
from jaxgpt.partition import DEFAULT_RULES
from jaxgpt.types import Array, PairBatch, Params

_LENGTH_MULTIPLE = 64  # sequence lengths are rounded up to it, because every length is compiled for

Scorer = Callable[[np.ndarray, np.ndarray], np.ndarray]


class ScoredPairs(NamedTuple):
    """Rewards of all strictly ordered pairs of some prompts; arrays [N], lengths in response tokens."""

    chosen_N: np.ndarray
    rejected_N: np.ndarray
    chosen_lengths_N: np.ndarray
    rejected_lengths_N: np.ndarray
    margins_N: np.ndarray
    prompts_N: np.ndarray


def make_scorer(model: ModelConfig, params: Params, mesh: Mesh) -> Scorer:
    """(tokens, segments: i32 [B, T], the same on all processes) -> rewards f32 [B]; B is a multiple of the mesh's rows."""

    @functools.partial(jax.jit, out_shardings=partition.replicated(mesh))
    def rewards(params: Params, tokens_BT: Array, segments_BT: Array) -> Array:
        with partition.activate(mesh, DEFAULT_RULES):
            return last_token_rewards(model, params, tokens_BT, segments_BT)

    def score(tokens_BT: np.ndarray, segments_BT: np.ndarray) -> np.ndarray:
        local = partition.local_rows(mesh, len(tokens_BT))
        on_mesh = partition.to_global((tokens_BT[local], segments_BT[local]), mesh, len(tokens_BT))
        return np.asarray(jax.device_get(rewards(params, *on_mesh)))

    return score


def score_pairs(score: Scorer, plan: RankedRows, batch_size: int, max_batches: int = 0) -> ScoredPairs:
    """The pairs of a held-out set; max_batches as in `batches.eval_batches`."""
    parts, first = [], 0
    for batch in _whole_batches(plan, batch_size, max_batches):
        rewards_BC = _score(score, batch)
        lengths_BC: np.ndarray = batch.weights_BCT.sum(axis=-1).astype(np.int64)
        ranks_BC = batch.ranks_BC
        better = (ranks_BC[:, :, None] < ranks_BC[:, None, :]) & (ranks_BC[:, :, None] >= 0)
        b, i, j = np.nonzero(better)
        parts.append(
            ScoredPairs(
                rewards_BC[b, i], rewards_BC[b, j], lengths_BC[b, i], lengths_BC[b, j], batch.margins_B[b], first + b
            )
        )
        first += len(ranks_BC)
    return ScoredPairs(*(np.concatenate(field) for field in zip(*parts, strict=True)))


def best_response_rewards(score: Scorer, plan: RankedRows, batch_size: int, max_batches: int = 0) -> np.ndarray:
    """Rewards of the best-ranked responses of a set, f32 [N]."""
    parts = [_score(score, b)[b.ranks_BC == 0] for b in _whole_batches(plan, batch_size, max_batches)]
    return np.concatenate(parts)


def symmetry_gaps(score: Scorer, plan: RankedRows, batch_size: int) -> tuple[float, float]:
    """Largest changes of a reward over one batch: (candidates in the opposite order, padding on the other side)."""
    (batch,) = _whole_batches(plan, batch_size, 1)
    rewards = _score(score, batch)

    def gap(move: Callable[[np.ndarray], np.ndarray], back: Callable[[np.ndarray], np.ndarray]) -> float:
        moved = batch.replace(tokens_BCT=move(batch.tokens_BCT), segments_BCT=move(batch.segments_BCT))
        return float(np.abs(back(_score(score, moved)) - rewards)[batch.ranks_BC >= 0].max())

    flip = functools.partial(np.flip, axis=1)
    length = batch.tokens_BCT.shape[-1]
    used_BC1 = np.sum(batch.segments_BCT != 0, axis=-1, keepdims=True)
    pad_left = lambda a: np.take_along_axis(a, (np.arange(length) + used_BC1) % length, axis=-1)
    return gap(flip, flip), gap(pad_left, lambda rewards: rewards)


def score_sequences(score: Scorer, sequences: Sequence[np.ndarray], batch_size: int, pad_id: int) -> np.ndarray:
    """Rewards of token sequences, f32 [N], in their order; sequences of similar length share a batch."""
    order = sorted(range(len(sequences)), key=lambda i: len(sequences[i]))
    rewards = np.zeros(len(sequences), np.float32)
    for begin in range(0, len(order), batch_size):
        chosen = order[begin : begin + batch_size]
        length = -(-len(sequences[chosen[-1]]) // _LENGTH_MULTIPLE) * _LENGTH_MULTIPLE
        tokens = np.full((batch_size, length), pad_id, np.int32)
        segments = np.zeros((batch_size, length), np.int32)
        for row, i in enumerate(chosen):
            tokens[row, : len(sequences[i])] = sequences[i]
            segments[row, : len(sequences[i])] = 1
        rewards[chosen] = score(tokens, segments)[: len(chosen)]
    return rewards


def _whole_batches(plan: RankedRows, batch_size: int, max_batches: int) -> Iterator[Any]:
    return eval_batches(
        plan, batch_size=batch_size, rows=slice(0, batch_size), max_batches=max_batches, batch_type=PairBatch
    )


def _score(score: Scorer, batch: Any) -> np.ndarray:
    rows = lambda a: a.reshape(-1, a.shape[-1])
    return score(rows(batch.tokens_BCT), rows(batch.segments_BCT)).reshape(batch.ranks_BC.shape)
