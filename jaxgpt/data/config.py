"""What the data pipeline may be told: sources, mixture, packing, held-out split."""

import dataclasses
from typing import Literal

from jaxgpt.config import check_bounds

MAX_WORKERS = 1024  # more processes, and batches, than this are a mistake
MAX_PREFETCH = 4096


@dataclasses.dataclass(frozen=True)
class SourceConfig:
    """One named source of a mixture. path: a path, a glob, or several; weight: its share of the sequences, any scale."""

    path: str | tuple[str, ...] = ()
    weight: float = 1.0

    def __post_init__(self):
        if not self.weight > 0:
            raise ValueError(f"data.train: the weight of a source must be positive, not {self.weight}.")


@dataclasses.dataclass(frozen=True)
class HoldoutConfig:
    """How held-out data is split off `data.train` when `data.eval` is empty.

    by: `hash` sends a document to the held-out side by the hash of its content (stable when files are added or
      reordered); `position` takes the last part of every file (for corpora that are one long document).
    fraction: expected share of documents (`hash`) or of bytes (`position`).
    """

    by: Literal["hash", "position"] = "hash"
    fraction: float = 0.01

    def __post_init__(self):
        if not 0 <= self.fraction < 1:
            raise ValueError(f"data.holdout.fraction must be in [0, 1), not {self.fraction}.")


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Where text comes from and how it becomes sequences.

    train: a path, a glob, several of them, or a mixture {name: {path, weight}}. eval: the same; empty means "split
      off train by `holdout`".
    tokenizer: a workdir of `experiments.tokenizer`, or a sentencepiece .model file.
    fields: maps the record's standard field names to the ones in the files, e.g. {"text": "content"}.
    sequence_length: tokens per row. packing: `concat` joins documents and splits every sequence_length tokens;
      `best_fit` fills rows with whole documents (only a document longer than a row is cut, into rows of its own);
      `none` is one document (piece) per row, padded.
    add_bos: every document starts with BOS (every document ends with EOS in any case, except where
      holdout.by == "position", whose pieces are not documents).
    text_separator: splits a .txt file into documents; None means one document per file.
    cache_dir: where tokens are kept; empty means a folder beside the run's workdir.
    num_workers: processes that prepare batches (0 is threads in this process). prefetch: batches held ready.
    eval_batches: the most batches of one evaluation; 0 is all of the held-out data.
    """

    train: str | tuple[str, ...] | dict[str, SourceConfig] = ()
    eval: str | tuple[str, ...] | dict[str, SourceConfig] = ()
    tokenizer: str = ""
    fields: dict[str, str] = dataclasses.field(default_factory=dict)
    sequence_length: int = 256
    packing: Literal["concat", "best_fit", "none"] = "concat"
    shuffle: bool = True
    add_bos: bool = True
    text_separator: str | None = None
    holdout: HoldoutConfig = HoldoutConfig()
    cache_dir: str = ""
    num_workers: int = 0
    prefetch: int = 4
    eval_batches: int = 50

    def __post_init__(self):
        if self.sequence_length < 2:
            raise ValueError(f"data.sequence_length must be at least 2, not {self.sequence_length}.")
        check_bounds(self, "data.", num_workers=0, prefetch=0, eval_batches=0)
        for name, most in (("num_workers", MAX_WORKERS), ("prefetch", MAX_PREFETCH)):
            if getattr(self, name) > most:
                raise ValueError(f"data.{name} must be at most {most}, not {getattr(self, name)}.")

    def check_complete(self) -> None:
        """ValueError where there is nothing to train on, which a preset leaves open."""
        if not self.train:
            raise ValueError("data.train is empty; give a path, a glob, several of them, or {name: {path, weight}}.")
