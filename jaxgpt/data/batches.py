"""From text files to batches: sources, their packed rows, and the one global order in which they are read.

The data are a function of the global step alone. Each source is shuffled and repeated without end, the sources are
mixed by weight, and batch k is rows [k B, (k + 1) B) of that one global order, of which a process reads only its own.
The state of the iterator is one integer, the next batch; seeking costs nothing, and processes and workers may change
in number on resume.
"""

import dataclasses
import functools
import hashlib
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import grain
import numpy as np
from absl import flags

from jaxgpt.data.config import DataConfig, SourceConfig
from jaxgpt.data.packing import Row, RowPlan, make_plan
from jaxgpt.data.sources import resolve_paths
from jaxgpt.data.token_cache import Split, tokenize_source
from jaxgpt.data.tokenizer import Tokenizer
from jaxgpt.types import LMBatch

MAX_THREADS = 2  # more contend for the interpreter's lock
# grain's own shuffle needs 10 us for a row of 2**16 or more, but 7 ms for one of seven: it never searches fewer than
# 2**16 places. Up to there a permutation in memory costs nothing.
FEW_ROWS = 1 << 16
COUNT_CHUNK = 1 << 24  # tokens counted at a time


@dataclasses.dataclass(frozen=True)
class Data:
    """All that a run reads.

    train: name -> (rows, weight). eval: name -> rows; empty where nothing is held out. A source that is given as a path
      and not as a mixture is named `text`.
    vocab_size: of the tokenizer. fingerprint: digest of the content of all sources, of the tokenizer and of how
      held-out data is split off; where files lie does not matter. fingerprints: the same of each source, by the field of the
      config that names it.
    stats: "train/<name>" and "eval/<name>" -> {"documents", "tokens", "bytes", "rows"}: rows per epoch, UTF-8 bytes of
      the text.
    """

    train: dict[str, tuple[RowPlan, float]]
    eval: dict[str, RowPlan]
    vocab_size: int
    fingerprint: str
    fingerprints: dict[str, str]
    stats: dict[str, dict[str, int]]

    @property
    def train_rows(self) -> int:
        """Rows of one pass over all training sources."""
        return sum(len(plan) for plan, _ in self.train.values())


def build_data(
    config: DataConfig,
    tokenizer: Tokenizer,
    *,
    cache_dir: str | os.PathLike,
    make_rows: Callable[[list[str], Split], RowPlan] | None = None,
) -> Data:
    """The packed sources of `data.train` and `data.eval`, tokenized now or found in the cache.

    Where `data.eval` is empty, `data.holdout` splits it off each source of `data.train`; with a fraction of 0 there is
    no evaluation data.

    make_rows: (files of a source, side of the held-out split) -> its rows; None reads texts and packs them.

    Raises:
      ValueError: for a source without files, documents or rows.
    """
    config.check_complete()

    def pack_texts(paths: list[str], split: Split) -> RowPlan:
        tokens = tokenize_source(paths, tokenizer, config, split, cache_dir)
        return make_plan(tokens, config.packing, config.sequence_length, tokenizer.pad_id)

    make_rows = make_rows or pack_texts
    split_off = not config.eval and config.holdout.fraction > 0
    train = _named_sources(config.train)
    parts: list[tuple[str, str, SourceConfig, Split]] = []
    for name, source in train.items():
        parts.append((f"train/{name}", _field("train", config.train, name), source, "train" if split_off else "all"))
        if split_off:
            parts.append((f"eval/{name}", _field("train", config.train, name), source, "held_out"))
    for name, source in _named_sources(config.eval).items() if config.eval else ():
        parts.append((f"eval/{name}", _field("eval", config.eval, name), source, "all"))

    plans, stats, keys = {}, {}, {}
    by_field: dict[str, tuple[str, ...]] = {}
    for label, field, source, split in parts:
        plan = make_rows(resolve_paths(source.path, field), split)
        tokens = plan.source
        if not len(plan):
            raise ValueError(
                f"{field}: no document has two tokens on the {label.split('/')[0]} side: nothing to learn from."
            )
        counts = {"documents": tokens.num_documents, "tokens": tokens.num_tokens, "bytes": tokens.num_bytes}
        plans[label], stats[label], keys[label] = plan, counts | {"rows": len(plan)} | tokens.notes, tokens.key
        by_field[field] = (*by_field.get(field, ()), tokens.key)
    return Data(
        train={name: (plans[f"train/{name}"], source.weight) for name, source in train.items()},
        eval={label.removeprefix("eval/"): plan for label, plan in plans.items() if label.startswith("eval/")},
        vocab_size=tokenizer.vocab_size,
        fingerprint=_digest(keys),
        fingerprints={field: _digest(field_keys) for field, field_keys in by_field.items()},
        stats=stats,
    )


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _field(side: str, sources: str | tuple[str, ...] | dict[str, SourceConfig], name: str) -> str:
    return f"data.{side}.{name}.path" if isinstance(sources, Mapping) else f"data.{side}"


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
    batch_type: type = LMBatch,
) -> grain.DatasetIterator:
    """Batches without end, from batch `start_batch` on, of this process's rows.

    Args:
      sources: name -> (rows, weight). Of any run of rows, each source has its share of the weights, to about 1 %.
      batch_size: rows of a global batch (B).
      seed: of the shuffle. Every epoch of every source has an order of its own.
      rows: the rows of each batch to read, as of `jaxgpt.partition.local_rows`.
      start_batch: the first batch; reaching it reads nothing.
      shuffle: False keeps each source in the order of its plan.
      num_workers: processes that build batches; 0 builds them in threads of this one.
      prefetch: batches held ready; 0 builds a batch when it is asked for.
      batch_type: whose fields the rows have.

    Returns:
      batch_type of numpy arrays [rows, ...]; `close()` ends threads and workers.

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
        orders.append(_endless_order(plan, _source_seed(seed, name) if shuffle else None))
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
    return iter(dataset.map(functools.partial(_to_batch, batch_type)))


def eval_batches(
    plan: RowPlan, *, batch_size: int, rows: slice, max_batches: int = 0, batch_type: type = LMBatch
) -> Iterator[Any]:
    """One pass over a plan in a fixed order, of this process's rows; the last batch is filled up with rows of weight 0.

    max_batches: the most batches; 0 is all. Where it leaves rows out, those read are spread evenly over the plan, since
    neighbours are alike (in length, under `best_fit`).

    Returns:
      batch_type of numpy arrays [rows, ...].
    """
    count = min(len(plan), max_batches * batch_size) if max_batches else len(plan)
    for begin in range(0, count, batch_size):
        batch = [_spread_row(plan, begin + row, count) for row in range(batch_size)[rows]]
        yield _to_batch(batch_type, _stack(batch))


def batch_streams(
    config: DataConfig, data: Data, batch_size: int, rows: slice, seed: int, batch_type: type = LMBatch
) -> dict[str, Any]:
    """{"train_batches": first batch -> batches without end, "eval_batches": {name: () -> one pass}}, of these rows."""
    train = functools.partial(
        train_batches, data.train, batch_size=batch_size, seed=seed, rows=rows, shuffle=config.shuffle,
        num_workers=config.num_workers, prefetch=config.prefetch, batch_type=batch_type,
    )  # fmt: skip
    evaluation = {
        name: functools.partial(
            eval_batches, plan, batch_size=batch_size, rows=rows, max_batches=config.eval_batches, batch_type=batch_type
        )
        for name, plan in data.eval.items()
    }
    return {"train_batches": lambda start: train(start_batch=start), "eval_batches": evaluation}


def unigram_entropy(data: Data) -> float:
    """The entropy of the training targets' distribution over the vocabulary, in nats per token.

    It is the loss of the best model that ignores the context. Sources count by how many targets of theirs a run reads.
    """
    frequencies = np.zeros(data.vocab_size)
    for plan, weight in data.train.values():
        tokens, offsets = plan.source.tokens, plan.source.offsets
        counts = -np.bincount(tokens[offsets[:-1]], minlength=data.vocab_size)  # a document's first token is no target
        for begin in range(0, len(tokens), COUNT_CHUNK):
            counts += np.bincount(tokens[begin : begin + COUNT_CHUNK], minlength=data.vocab_size)
        frequencies += counts * (weight / len(plan))
    p = frequencies[frequencies > 0] / frequencies.sum()
    return float(-(p * np.log(p)).sum())


def _endless_order(plan: RowPlan, seed: int | None) -> grain.MapDataset:
    """The rows of a plan epoch after epoch, each shuffled anew; in order where seed is None."""
    rows = grain.MapDataset.source(plan)
    if seed is None:
        return rows.repeat()
    if len(plan) <= FEW_ROWS:
        return grain.MapDataset.select_from_datasets([rows], _EpochPermutations(len(plan), seed))
    if _is_power_of_four(len(plan) - 1):
        return grain.MapDataset.select_from_datasets([rows], _LargeEpochPermutations(len(plan), seed))
    return rows.shuffle(seed=seed).repeat()


def _is_power_of_four(n: int) -> bool:
    return n.bit_count() == 1 and n.bit_length() % 2 == 1


@dataclasses.dataclass(frozen=True)
class _EpochPermutations(grain.transforms.DatasetSelectionMap):
    """grain's selection map that visits all rows in a random order, then in another one, and so on."""

    num_rows: int
    seed: int

    def __len__(self) -> int:
        return sys.maxsize

    def __getitem__(self, index: int) -> tuple[int, int]:
        epoch, place = divmod(index, self.num_rows)
        return 0, int(epoch_permutation(self.num_rows, self.seed, epoch)[place])


@dataclasses.dataclass(frozen=True)
class _LargeEpochPermutations(grain.transforms.DatasetSelectionMap):
    """As _EpochPermutations, for 4**k + 1 rows, of which grain's own shuffle leaves out one and visits another twice.

    Its search space is one row too small there. One more row makes it large enough: whoever comes to that row, goes on to
    where that row leads, so that all the others are visited once.
    """

    num_rows: int
    seed: int

    @functools.cached_property
    def _order(self) -> grain.MapDataset:
        return grain.MapDataset.range(self.num_rows + 1).shuffle(seed=self.seed).repeat()

    def __len__(self) -> int:
        return sys.maxsize

    def __getitem__(self, index: int) -> tuple[int, int]:
        epoch, place = divmod(index, self.num_rows)
        row = self._order[epoch * (self.num_rows + 1) + place]
        if row == self.num_rows:
            row = self._order[epoch * (self.num_rows + 1) + row]
        return 0, int(row)


@functools.lru_cache(maxsize=64)
def epoch_permutation(size: int, seed: int, epoch: int) -> np.ndarray:
    """The order (i64 [size], not to be written to) of one epoch: each epoch of each seed has its own."""
    return np.random.default_rng((seed, epoch)).permutation(size)


@dataclasses.dataclass(frozen=True)
class _LocalRows(grain.transforms.DatasetSelectionMap):
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
    return plan.empty_row()


def _stack(rows: Sequence[Row]) -> Row:
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]}


def _to_batch(batch_type: type, arrays: Row) -> Any:
    return batch_type(**arrays)
