"""From text files to batches: sources, their packed rows, and the one global order in which they are read.

The data are a function of the global step alone. Each source is shuffled and repeated without end, the sources are
mixed by weight, and batch k is rows [k B, (k + 1) B) of that one global order, of which a process reads only its own.
The state of the iterator is one integer, the next batch; seeking costs nothing, and processes and workers may change
in number on resume.
"""

import dataclasses
import hashlib
import json
import os
import sys
from collections.abc import Iterator, Mapping

import grain
import numpy as np
from absl import flags

from jaxgpt.data.config import DataConfig, SourceConfig
from jaxgpt.data.packing import Row, RowPlan, make_plan
from jaxgpt.data.sources import resolve_paths
from jaxgpt.data.token_cache import Split, TokenizedSource, tokenize_source
from jaxgpt.data.tokenizer import Tokenizer
from jaxgpt.types import LMBatch

MAX_THREADS = 4
COUNT_CHUNK = 1 << 24  # tokens counted at a time


@dataclasses.dataclass(frozen=True)
class Data:
    """All that a run reads.

    train: name -> (rows, weight). eval: name -> rows; empty where nothing is held out. tokenized: "train/<name>" and
      "eval/<name>" -> tokens. A source that is a path and not a mixture is named `text`.
    fingerprint: digest of the content of every source, of the tokenizer and of the held-out split.
    stats: the same names -> {"documents", "tokens", "bytes", "rows"}; rows per epoch, UTF-8 bytes of the text.
    """

    train: dict[str, tuple[RowPlan, float]]
    eval: dict[str, RowPlan]
    tokenized: dict[str, TokenizedSource]
    fingerprint: str
    stats: dict[str, dict[str, int]]


def build_data(config: DataConfig, tokenizer: Tokenizer, *, cache_dir: str | os.PathLike) -> Data:
    """Tokenizes (or finds in the cache) and packs the sources of `data.train` and `data.eval`.

    Where `data.eval` is empty, `data.holdout` splits it off each source of `data.train`; with a fraction of 0 there is
    no evaluation data.

    Raises:
      ValueError: for a source without files, documents or rows.
    """
    if not config.train:
        raise ValueError(
            "data.train is empty; give a path, a glob, a list of them, or a mixture {name: {path, weight}}."
        )
    split_off = not config.eval and config.holdout.fraction > 0
    train_sources = _named_sources(config.train)
    sides: list[tuple[str, dict[str, SourceConfig], Split]] = [
        ("train", train_sources, "train" if split_off else "all")
    ]
    if config.eval:
        sides.append(("eval", _named_sources(config.eval), "all"))
    elif split_off:
        sides.append(("eval", train_sources, "held_out"))

    tokenized, plans, stats = {}, {}, {}
    for side, sources, split in sides:
        for name, source in sources.items():
            field = f"data.{'train' if split == 'held_out' else side}" + (f".{name}.path" if len(sources) > 1 else "")
            paths = resolve_paths(source.path, field)
            label = f"{side}/{name}"
            tokenized[label] = tokens = tokenize_source(paths, tokenizer, config, split, cache_dir)
            plans[label] = plan = make_plan(tokens, config.packing, config.sequence_length, tokenizer.pad_id)
            if not len(plan):
                raise ValueError(
                    f"{field}: no document of {', '.join(paths)} has two tokens, so there is nothing to predict."
                )
            stats[label] = {
                "documents": tokens.num_documents,
                "tokens": tokens.num_tokens,
                "bytes": tokens.num_bytes,
                "rows": len(plan),
            }
    keys = {label: tokens.key for label, tokens in tokenized.items()}
    return Data(
        train={name: (plans[f"train/{name}"], source.weight) for name, source in train_sources.items()},
        eval={label.removeprefix("eval/"): plan for label, plan in plans.items() if label.startswith("eval/")},
        tokenized=tokenized,
        fingerprint=hashlib.sha256(json.dumps(keys, sort_keys=True).encode()).hexdigest(),
        stats=stats,
    )


def _named_sources(sources: str | tuple[str, ...] | dict[str, SourceConfig]) -> dict[str, SourceConfig]:
    return dict(sources) if isinstance(sources, Mapping) else {"text": SourceConfig(path=sources)}


def train_batches(
    sources: Mapping[str, tuple[RowPlan, float]],
    *,
    batch_size: int,
    seed: int,
    rows: slice,
    start_batch: int = 0,
    shuffle: bool = True,
    num_workers: int = 0,
    prefetch: int = 4,
) -> Iterator[LMBatch]:
    """Batches without end, from batch `start_batch` on, of this process's rows.

    Args:
      sources: name -> (rows, weight). Of any run of rows, each source has its share of the weights, to about 1 %.
      batch_size: rows of a global batch (B).
      seed: of the shuffle. Every epoch of every source has an order of its own.
      rows: the rows of each batch to read, as of `jaxgpt.partition.local_rows`.
      shuffle: False keeps each source in the order of its plan.
      num_workers: processes that build batches; 0 builds them in threads of this one.
      prefetch: batches held ready; 0 builds a batch when it is asked for.

    Returns:
      LMBatch of numpy arrays [rows, T].

    Raises:
      ValueError: for no source, a source without rows, or a weight that is not positive.
    """
    if not sources:
        raise ValueError("data.train is empty; at least one source is needed.")
    orders, weights = [], []
    for name, (plan, weight) in sorted(sources.items()):
        if not len(plan):
            raise ValueError(f"data.train: the source {name!r} has no rows.")
        if not weight > 0:
            raise ValueError(f"data.train: the weight of the source {name!r} must be positive, not {weight}.")
        order = grain.MapDataset.source(plan)
        orders.append((order.shuffle(seed=_source_seed(seed, name)) if shuffle else order).repeat())
        weights.append(weight)
    # grain scales the weights so that the least is 100 and cuts off fractions; round here instead.
    shares = [round(100 * weight / min(weights)) for weight in weights]
    global_order = grain.MapDataset.mix(orders, shares)
    local = _LocalRows(batch_size, range(batch_size)[rows], start_batch)
    batches = grain.MapDataset.select_from_datasets([global_order], local).batch(len(local.rows), batch_fn=_stack)
    dataset = batches.to_iter_dataset(
        grain.ReadOptions(num_threads=min(prefetch, MAX_THREADS), prefetch_buffer_size=prefetch)
    )
    if num_workers:
        if not flags.FLAGS.is_parsed():
            flags.FLAGS.mark_as_parsed()  # grain reads flags of its own to start workers
        buffered = max(1, prefetch // num_workers)
        dataset = dataset.mp_prefetch(grain.MultiprocessingOptions(num_workers, per_worker_buffer_size=buffered))
    return iter(dataset.map(_to_batch))


def eval_batches(plan: RowPlan, *, batch_size: int, rows: slice, max_batches: int = 0) -> Iterator[LMBatch]:
    """One pass over a plan in a fixed order, of this process's rows; the last batch is filled up with rows of weight 0.

    max_batches: the most batches; 0 is all. Where it leaves rows out, those read are spread evenly over the plan, since
    neighbours are alike (in length, under `best_fit`).

    Returns:
      LMBatch of numpy arrays [rows, T].
    """
    count = min(len(plan), max_batches * batch_size) if max_batches else len(plan)
    for begin in range(0, count, batch_size):
        batch = [_spread_row(plan, begin + row, count) for row in range(batch_size)[rows]]
        yield _to_batch(_stack(batch))


def unigram_entropy(data: Data, vocab_size: int) -> float:
    """The entropy of the training targets' distribution over the vocabulary, in nats per token.

    It is the loss of the best model that ignores the context. Sources count by how many targets of theirs a run reads.
    """
    frequencies = np.zeros(vocab_size)
    for plan, weight in data.train.values():
        tokens, offsets = plan.source.tokens, plan.source.offsets
        counts = -np.bincount(tokens[offsets[:-1]], minlength=vocab_size)  # nothing predicts a document's first token
        for begin in range(0, len(tokens), COUNT_CHUNK):
            counts += np.bincount(tokens[begin : begin + COUNT_CHUNK], minlength=vocab_size)
        frequencies += counts * (weight / len(plan))
    p = frequencies[frequencies > 0] / frequencies.sum()
    return float(-(p * np.log(p)).sum())


@dataclasses.dataclass(frozen=True)
class _LocalRows:
    """grain's selection map from "the n-th row this process reads" to a row of the global order."""

    batch_size: int
    rows: range
    start_batch: int

    def __len__(self) -> int:
        return (sys.maxsize // self.batch_size - self.start_batch) * len(self.rows)

    def __getitem__(self, index: int) -> tuple[int, int]:
        batch, row = divmod(index, len(self.rows))
        return 0, (self.start_batch + batch) * self.batch_size + self.rows[row]


def _source_seed(seed: int, name: str) -> int:
    # grain shuffles epoch e with seed + e: hashing keeps epoch 1 of one seed from being epoch 0 of the next, and
    # sources of one size from following the same order.
    return int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:4], "big")


def _spread_row(plan: RowPlan, index: int, count: int) -> Row:
    if index < count:
        return plan[index * len(plan) // count]
    return {name: np.zeros_like(values) for name, values in plan[0].items()}


def _stack(rows: list[Row]) -> Row:
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]}


def _to_batch(arrays: Row) -> LMBatch:
    return LMBatch(**arrays)
