"""Log-probabilities of the tokens of given sequences: batched by length, one compiled program per shape."""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from jaxgpt import numerics, partition
from jaxgpt.data.tokenizer import Tokenizer
from jaxgpt.models import decoder
from jaxgpt.partition import DEFAULT_RULES
from jaxgpt.runs.load import LoadedModel

LENGTH_MULTIPLE = 64  # sequence lengths are rounded up to it, because every length is compiled for
CHUNK_TOKENS = 1024  # how many tokens' logits exist at a time, over all devices


class TokenScores(NamedTuple):
    """Of the tokens of a sequence after its first, [n - 1]: log-probs (f32, nats), and whether each is the most probable."""

    logprobs: np.ndarray
    is_greedy: np.ndarray


def encode_after_start(tokenizer: Tokenizer, text: str) -> np.ndarray:
    """Ids of a text (i32 [n + 1]) after the token that its first one is conditioned on, so that all n are scored.

    That is BOS, and EOS for tokenizers that put nothing before a text (GPT-2, Qwen): as in lm-evaluation-harness.
    """
    start = tokenizer.eos_id if tokenizer.bos_id is None else tokenizer.bos_id
    return np.concatenate([[start], tokenizer.encode(text)]).astype(np.int32)


def token_scores(
    model: LoadedModel, sequences: Sequence[np.ndarray], *, mesh: Mesh, batch_size: int
) -> list[TokenScores]:
    """The log-prob of every token of each sequence but the first, given those before it.

    Sequences of similar length share a batch. All processes of a multi-host run must call it, with the same sequences.

    Args:
      model: a language model. sequences: i32 [n], n >= 2, at most model.max_seq_length + 1.
      mesh: where its parameters live. batch_size: a multiple of the mesh's rows.

    Raises:
      ValueError: if the model has no head for tokens, or naming batch_size, where it does not divide.
    """
    if model.config.head != "lm":
        raise ValueError(f"model.head={model.config.head!r} has no log-probabilities; a language model is needed.")
    local = partition.local_rows(mesh, batch_size)
    order = sorted(range(len(sequences)), key=lambda i: len(sequences[i]))
    found: dict[int, TokenScores] = {}
    for begin in range(0, len(order), batch_size):
        chosen = order[begin : begin + batch_size]
        length = len(sequences[chosen[-1]]) - 1
        length = min(-(-length // LENGTH_MULTIPLE) * LENGTH_MULTIPLE, max(length, model.config.max_seq_length))
        tokens = np.full((batch_size, length + 1), model.tokenizer.pad_id, np.int32)
        segments = np.zeros((batch_size, length), np.int32)
        for row, i in enumerate(chosen):
            tokens[row, : len(sequences[i])] = sequences[i]
            segments[row, : len(sequences[i]) - 1] = 1
        rows = tokens[local, :-1], tokens[local, 1:], segments[local]
        on_mesh = partition.to_global(rows, mesh, batch_size)
        logprobs, is_greedy = jax.device_get(_score(model.config, model.params, *on_mesh, mesh=mesh))
        for row, i in enumerate(chosen):
            used = slice(len(sequences[i]) - 1)
            found[i] = TokenScores(logprobs[row, used], is_greedy[row, used] > 0)
    return [found[i] for i in range(len(sequences))]


@functools.partial(jax.jit, static_argnums=0, static_argnames=("mesh",))
def _score(cfg, params, tokens_BT, targets_BT, segments_BT, *, mesh):
    """f32 [B, T] each: log-probs of the targets, and 1 where the target is the most probable token."""
    with partition.activate(mesh, DEFAULT_RULES):
        x_BTD = decoder.hidden_states(cfg, params, tokens_BT, segments_BT)
        out = numerics.chunked_logprobs_and_greedy(
            lambda head, x: decoder.logits(cfg, head, x), decoder.head_params(cfg, params), x_BTD, targets_BT,
            chunk_tokens=CHUNK_TOKENS,
        )  # fmt: skip
    return jax.lax.with_sharding_constraint(out, partition.replicated(mesh))
