"""Perplexity and bits per byte of texts, each document by itself, in windows where it is longer than the model's context."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jax.sharding import Mesh

from jaxgpt.data import sources
from jaxgpt.evaluation.config import TaskConfig
from jaxgpt.evaluation.intervals import Metric, Z, ratio_metric
from jaxgpt.evaluation.logprobs import TokenScores, encode_after_start, token_scores
from jaxgpt.evaluation.results import Result
from jaxgpt.runs.load import LoadedModel


class Window(NamedTuple):
    """ids[begin:end] is what the model sees; the tokens from `first` on are scored (places in ids)."""

    begin: int
    first: int
    end: int


def windows(count: int, length: int, stride: int) -> list[Window]:
    """How `count` ids are seen through a model of `length` inputs, so that each id but the first is scored once.

    The window moves by `stride`; the last one ends with the text and is as full as any. An id after the first window has
    at least length - stride + 1 ids of context.

    Raises:
      ValueError: for a stride that is not in [1, length].
    """
    if not 1 <= stride <= length:
        raise ValueError(f"The stride must be from 1 to max_seq_length={length}, not {stride}.")
    found: list[Window] = []
    scored = 1
    while scored < count:
        end = min(count, scored + (stride if found else length))
        found.append(Window(max(0, end - length - 1), scored, end))
        scored = end
    return found


def text_scores(
    model: LoadedModel, ids: Sequence[np.ndarray], stride: int, *, mesh: Mesh, batch_size: int
) -> list[TokenScores]:
    """`token_scores` of documents of any length (i32 [n], as of `encode_after_start`): [n - 1] of each.

    stride: as of `windows`.
    """
    length = model.config.max_seq_length
    places = [(i, w) for i, document in enumerate(ids) for w in windows(len(document), length, stride)]
    scored = token_scores(model, [ids[i][w.begin : w.end] for i, w in places], mesh=mesh, batch_size=batch_size)
    parts: list[list[TokenScores]] = [[TokenScores(np.zeros(0, np.float32), np.zeros(0, bool))] for _ in ids]
    for (i, w), scores in zip(places, scored, strict=True):
        new = slice(w.first - w.begin - 1, None)
        parts[i].append(TokenScores(scores.logprobs[new], scores.is_greedy[new]))
    return [TokenScores(*map(np.concatenate, zip(*part, strict=True))) for part in parts]


def evaluate_perplexity(task: TaskConfig, field: str, model: LoadedModel, *, mesh: Mesh, batch_size: int) -> Result:
    """Loss (nats per token), perplexity, bits per byte, and the accuracy of the next token in the texts of task.path.

    Every token of a document is scored, the first one given BOS (or EOS, see `encode_after_start`); an EOS at the end is not,
    since where a text ends is no part of it. Bytes are those of the UTF-8 text, so that bits per byte compare between
    tokenizers. Intervals are over documents.
    """
    length = model.config.max_seq_length
    stride = task.stride or max(1, length // 2)
    if stride > length:
        raise ValueError(f"{field}.stride={stride} is more than model.max_seq_length={length}, and would skip tokens.")
    documents = [
        document
        for file in sources.resolve_paths(task.path, f"{field}.path")
        for document in sources.read_texts(file, fields=task.fields, text_separator=task.text_separator)
    ]
    ids = [encode_after_start(model.tokenizer, document.text) for document in documents]
    scores = text_scores(model, ids, stride, mesh=mesh, batch_size=batch_size)
    nats_N = np.array([-score.logprobs.sum(dtype=np.float64) for score in scores])
    tokens_N = np.array([len(score.logprobs) for score in scores])
    bytes_N = np.array([len(document.text.encode()) for document in documents])
    loss = ratio_metric(nats_N, tokens_N)
    metrics = {
        "loss": loss,
        "perplexity": _exponential(loss),
        "bits_per_byte": ratio_metric(nats_N / math.log(2), bytes_N),
        "accuracy": ratio_metric(np.array([score.is_greedy.sum() for score in scores]), tokens_N),
    }
    samples = [
        {
            "document": f"{document.path}, line {document.line}", "prompt": document.text[:200], "tokens": int(tokens),
            "bytes": int(size), "loss": nats / tokens, "bits_per_byte": nats / math.log(2) / size,
        }
        for document, nats, tokens, size in zip(documents, nats_N.tolist(), tokens_N, bytes_N, strict=True)
    ]  # fmt: skip
    counts = {"documents": len(ids), "tokens": int(tokens_N.sum()), "bytes": int(bytes_N.sum())}
    return Result(metrics, counts, samples)


def _exponential(loss: Metric) -> Metric:
    """The perplexity of a loss; the interval's ends are those of the loss."""
    value = math.exp(min(loss["value"], 700.0))
    if loss["stderr"] is None:
        return loss | {"value": value}
    low, high = (math.exp(min(loss["value"] + sign * Z * loss["stderr"], 700.0)) for sign in (-1, 1))
    return loss | {"value": value, "stderr": value * loss["stderr"], "low": low, "high": high}
