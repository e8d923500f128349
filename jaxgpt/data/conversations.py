"""Conversations on disk and in rows: each record tokenized once, by its template, with the mask of what is trained on."""

import array
import collections
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from tqdm import tqdm

from jaxgpt.data import chat, sources
from jaxgpt.data.chat import ChatTemplate, Encoded
from jaxgpt.data.config import DataConfig
from jaxgpt.data.token_cache import Split, TokenizedSource, cached_source, token_dtype, write_meta
from jaxgpt.data.tokenizer import Tokenizer

TooLong = Literal["drop", "truncate_left", "truncate_right"]


@dataclasses.dataclass(frozen=True)
class SFTConfig:
    """What of a conversation is learnt from.

    loss_on: `assistant` is every assistant turn, `completion` the last one, `all` every token; with the end of each turn.
      Templates that rewrite a turn once another one follows (Qwen 3's leaves out its thoughts) refuse `assistant` for
      conversations of several turns, since what the model is to write is no longer there; `completion` takes them.
    too_long: conversations beyond data.sequence_length are dropped, or cut at their start (the system message and the
      first turns go, the response stays) or at their end. What then has no response left is dropped. All are counted.
    empty_response: a record whose response is empty is an error, or dropped and counted.
    """

    loss_on: chat.LossOn = "assistant"
    too_long: TooLong = "drop"
    empty_response: Literal["error", "drop"] = "error"


def tokenize_conversations(
    paths: Sequence[str],
    tokenizer: Tokenizer,
    template: ChatTemplate,
    config: DataConfig,
    sft: SFTConfig,
    split: Split,
    cache_dir: str,
) -> TokenizedSource:
    """The conversations of one side of the held-out split of some files, from the cache or tokenized now.

    A conversation belongs to the held-out side by the hash of its prompt, so that no prompt is on both sides. A row of T
    tokens takes T + 1 of them: the last one is a target only. `notes` counts what was truncated or dropped.

    Raises:
      ValueError: naming file and line, for records as `chat.conversation`, or an empty response; where nothing is left.
    """
    limit = config.sequence_length + 1

    def write(folder: Path) -> None:
        with ExampleWriter(folder, tokenizer) as writer:
            for record in records_of_side(paths, config, split, lambda r: chat.conversation(r, config.fields)):
                example = _example(record, tokenizer, template, sft, limit, writer.notes)
                if example is not None:
                    writer.add(example, num_bytes=sum(len(m.content.encode()) for m in record.content))
        check_left(writer, paths, config, split)

    recipe = {
        "kind": "conversations", "encoding": chat.ENCODING, "template": template.digest, "sft": dataclasses.asdict(sft),
        "limit": limit, **split_recipe(config, split),
    }  # fmt: skip
    return cached_source(cache_dir, paths, tokenizer, config, recipe, write)


def _example(
    record: "Located",
    tokenizer: Tokenizer,
    template: ChatTemplate,
    sft: SFTConfig,
    limit: int,
    notes: collections.Counter,
) -> Encoded | None:
    """What is written of a conversation; None where it is dropped."""
    if chat.has_empty_response(record.content):
        if sft.empty_response == "error":
            raise ValueError(
                f"{record.path}, line {record.line}: the response is empty; sft.empty_response=drop leaves such records out."
            )
        notes["dropped, empty response"] += 1
        return None
    with chat.located(f"{record.path}, line {record.line}"):
        encoded = template.encode(tokenizer, record.content, loss_on=sft.loss_on)
        response = encoded.trained
        if (
            sft.loss_on == "all" and len(encoded.ids) > limit
        ):  # the prompt is trained on, but cannot stand for a response
            response = template.encode(tokenizer, record.content, loss_on="completion").trained
    return fit(encoded, limit, sft.too_long, notes, response, tokenizer.bos_id)


def fit(
    encoded: Encoded,
    limit: int,
    too_long: TooLong,
    notes: collections.Counter,
    response: np.ndarray,
    bos_id: int | None,
) -> Encoded | None:
    """The conversation in at most `limit` tokens, or None where it is dropped; counted in notes. BOS stays where it has one.

    response: bool [n], the tokens of which some must be left.
    """
    ids, trained = encoded
    if len(ids) <= limit:
        return encoded
    if too_long == "drop":
        notes["dropped, too long"] += 1
        return None
    kept = int(ids[0] == bos_id)
    rest = slice(len(ids) - limit + kept, None) if too_long == "truncate_left" else slice(kept, limit)
    if not response[rest].any():
        notes["dropped, no response left"] += 1
        return None
    notes["truncated"] += 1
    return Encoded(*(np.concatenate([a[:kept], a[rest]]) for a in (ids, trained)))


class Located(NamedTuple):
    """What was read from a record, and where the record stands."""

    content: Any
    path: str
    line: int


def records_of_side(
    paths: Sequence[str], config: DataConfig, split: Split, read: Callable[[sources.Record], Any]
) -> Iterator[Located]:
    """Every record of the files that is on this side, as `read` makes it, with a progress bar.

    read: record -> messages, or an object with `prompt`, their `chat.hashable_prompt`: its hash decides the side.
    """
    if config.holdout.by == "position" and split != "all":
        raise ValueError("data.holdout.by='position' is for plain text; records are split by 'hash'.")
    with tqdm(desc=f"tokenize ({split})", unit=" records", delay=2) as progress:
        for path in paths:
            for record in sources.read_records(path):
                progress.update()
                content = read(record)
                if split != "all":
                    prompt = getattr(content, "prompt", None)
                    key = chat.hashable_prompt(content) if prompt is None else prompt
                    if sources.is_held_out(key, config.holdout.fraction) != (split == "held_out"):
                        continue
                yield Located(content, record.path, record.line)


def split_recipe(config: DataConfig, split: Split) -> dict[str, Any]:
    """The part of a cache entry's recipe that says which side it holds."""
    return {"split": split if split == "all" else [split, "prompt", config.holdout.fraction]}


class ExampleWriter:
    """tokens.bin, trained.bin, offsets.bin and meta.json of a cache entry, example by example. A context manager."""

    def __init__(self, folder: Path, tokenizer: Tokenizer):
        self._folder, self._dtype = folder, token_dtype(tokenizer)
        self._offsets = array.array("q", [0])
        self._num_bytes = 0
        self.notes: collections.Counter = collections.Counter()

    def __enter__(self) -> "ExampleWriter":
        self._tokens = open(self._folder / "tokens.bin", "wb")  # noqa: SIM115
        self._trained = open(self._folder / "trained.bin", "wb")  # noqa: SIM115
        return self

    def __exit__(self, *_: object) -> None:
        self._tokens.close()
        self._trained.close()
        write_meta(self._folder, self._dtype, self._offsets, self._num_bytes, dict(self.notes))

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def add(self, example: Encoded, num_bytes: int) -> None:
        """Append one example; num_bytes: of its text, in UTF-8."""
        self._tokens.write(example.ids.astype(self._dtype).tobytes())
        self._trained.write(example.trained.astype(bool).tobytes())
        self._offsets.append(self._offsets[-1] + len(example.ids))
        self._num_bytes += num_bytes


def check_left(writer: ExampleWriter, paths: Sequence[str], config: DataConfig, split: Split) -> None:
    """ValueError where nothing was written."""
    if not len(writer):
        dropped = ", ".join(f"{count} {what}" for what, count in writer.notes.items() if count)
        side = "" if split == "all" else f" on the {split.replace('_', '-')} side"
        why = f" ({dropped}); data.sequence_length={config.sequence_length}."
        if not dropped:
            why = f"; data.holdout.fraction={config.holdout.fraction} leaves none there: set another, or data.eval."
        raise ValueError(f"No record of {', '.join(paths[:3])} is left{side}{why}")
