"""Preferences: records of ranked responses, and rows that hold all responses to one prompt side by side."""

import array
import collections
import dataclasses
import functools
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxgpt.data import chat, sources
from jaxgpt.data.batches import Data, build_data
from jaxgpt.data.chat import ChatTemplate, Encoded, Message
from jaxgpt.data.config import DataConfig
from jaxgpt.data.conversations import (
    ExampleWriter,
    Located,
    TooLong,
    check_left,
    fit,
    records_of_side,
    split_recipe,
)
from jaxgpt.data.packing import NO_PIECES, Pieces, Row, build_row
from jaxgpt.data.sources import Record
from jaxgpt.data.token_cache import Split, TokenizedSource, cached_source, map_file
from jaxgpt.data.tokenizer import Tokenizer

ALIASES = (("chosen", "winning_response"), ("rejected", "losing_response"))
FIELDS = ("prompt", "chosen", "rejected", "winning_response", "losing_response", "responses", "margin")
_TURN = re.compile(r"\n\n(Human|Assistant):")


class Preference(NamedTuple):
    """Conversations that differ after a common prompt, and how good each one's end is.

    prompt: canonical text of what they share. ranks: 0 is the best, equal ranks tie. margin: how much better the better
    one is said to be, from a field "margin", else 0.
    """

    conversations: list[list[Message]]
    ranks: list[int]
    margin: float
    prompt: str


def preference(record: Record, fields: Mapping[str, str]) -> Preference:
    """Read {"prompt", "chosen", "rejected"}, {"prompt", "responses": [best, ..., worst]} with ties as nested lists, or
    Anthropic HH's {"chosen", "rejected"} of two whole transcripts, whose turns begin with "Human:" and "Assistant:".

    Raises ValueError naming file and line: a missing field, a wrong type, fewer than two responses, equal responses.
    """
    margin = _margin(record, fields)
    groups = _ranked_texts(record, fields)
    texts = [text for group in groups for text in group]
    ranks = [rank for rank, group in enumerate(groups) for _ in group]
    if sources.present_field(record, ["prompt"], fields):
        prompt = chat.prompt_messages(record, fields)
        conversations = [[*prompt, Message("assistant", text)] for text in texts]
    else:
        conversations = [_transcript(record, text) for text in texts]
        prompt = []
    # Templates may trim what a message says, so that white space alone makes no difference.
    if len({tuple((m.role, m.content.strip()) for m in c) for c in conversations}) < len(texts):
        raise _error(record, "two responses are equal, so that neither can be better")
    prompt = prompt or _common_prompt(record, conversations)
    return Preference(conversations, ranks, margin, chat.hashable_prompt([*prompt, Message("assistant", "")]))


def _margin(record: Record, fields: Mapping[str, str]) -> float:
    """The field "margin"; 0 where neither the record nor data.fields has one."""
    if not sources.present_field(record, ["margin"], fields):
        return 0.0
    margin, key = sources.required_field(record, "margin", fields, object), fields.get("margin", "margin")
    if isinstance(margin, bool) or not isinstance(margin, int | float):
        raise _error(record, f"the field {key!r} must be a number, not {type(margin).__name__}")
    if not abs(margin) <= float(np.finfo(np.float32).max):
        raise _error(record, f"the field {key!r} must be a finite number, not {margin}")
    return float(margin)


def _ranked_texts(record: Record, fields: Mapping[str, str]) -> list[list[str]]:
    """The responses, best first; those in one list tie."""
    either = ("responses", *(name for pair in ALIASES for name in pair))
    if sources.present_field(record, either, fields) == "responses":
        levels = sources.required_field(record, "responses", fields, list)
        groups = [level if isinstance(level, list) else [level] for level in levels]
    else:
        names = [sources.present_field(record, pair, fields) or pair[0] for pair in ALIASES]
        groups = [[sources.required_field(record, name, fields, str)] for name in names]
    texts = [text for group in groups for text in group]
    for text in texts:
        if not isinstance(text, str):
            raise _error(record, f"every response must be a string, not {type(text).__name__}")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise _error(record, f"a response has half a surrogate pair at character {error.start}") from error
    if not all(groups):
        raise _error(record, "a list of responses that tie is empty")
    if len(texts) < 2:
        raise _error(record, f"a preference needs at least two responses, not {len(texts)}")
    return groups


def _transcript(record: Record, text: str) -> list[Message]:
    """The turns of an HH transcript."""
    before, *parts = _TURN.split(text)
    if before.strip() or not parts or parts[0] != "Human":
        raise _error(record, "without a field 'prompt' a response must be a transcript that begins with '\\n\\nHuman:'")
    roles = {"Human": "user", "Assistant": "assistant"}
    turns = [Message(roles[who], said.strip()) for who, said in zip(parts[::2], parts[1::2], strict=True)]
    if turns[-1].role != "assistant":
        raise _error(record, "a transcript must end with a turn of the Assistant")
    return turns


def _common_prompt(record: Record, conversations: list[list[Message]]) -> list[Message]:
    """The turns that all transcripts begin with, up to the first that differs."""
    shared = 0
    while all(len(c) > shared + 1 and c[shared] == conversations[0][shared] for c in conversations):
        shared += 1
    if not shared:
        raise _error(record, "the transcripts have no turn in common")
    return conversations[0][:shared]


def _error(record: Record, text: str) -> ValueError:
    return ValueError(f"{record.path}, line {record.line}: {text}.")


@dataclasses.dataclass(frozen=True)
class RankedRows:
    """One row per prompt: the fields of `types.PairBatch`, C candidates of T tokens each.

    source: every response with its prompt, an example of its own. num_candidates: C, at least max_candidates.
    reference_logprobs_GC: f32, of every response, for DPO where they are computed beforehand.
    """

    source: TokenizedSource
    sequence_length: int
    pad_id: int
    num_candidates: int
    reference_logprobs_GC: np.ndarray | None = None

    @functools.cached_property
    def groups(self) -> np.ndarray:
        """i64 [prompts + 1]: prompt g has the examples groups[g] : groups[g + 1]."""
        return map_file(Path(self.source.path) / "groups.bin", "int64", self.source.notes["prompts"] + 1)

    @functools.cached_property
    def _ranks(self) -> np.ndarray:
        return map_file(Path(self.source.path) / "ranks.bin", "int32", self.source.num_documents)

    @functools.cached_property
    def margins(self) -> np.ndarray:
        """f32 [prompts], of the records."""
        return map_file(Path(self.source.path) / "margins.bin", "float32", self.source.notes["prompts"])

    def __getstate__(self) -> dict:
        # As of TokenizedSource: worker processes map the files themselves.
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

    @property
    def max_candidates(self) -> int:
        """The most responses that a prompt has."""
        return int(np.diff(self.groups).max())

    def __len__(self) -> int:
        return self.source.notes["prompts"]

    def __getitem__(self, index: int) -> Row:
        """Row `index` as {tokens_BCT: [C, T], ..., ranks_BC: [C], margins_B: []}."""
        begin, end = self.groups[index : index + 2]
        row = self._row(range(begin, end), self._ranks[begin:end], self.margins[index])
        if self.reference_logprobs_GC is not None:
            row["reference_logprobs_BC"] = self.reference_logprobs_GC[index]
        return row

    def empty_row(self) -> Row:
        """A prompt without responses."""
        row = self._row(range(0), np.zeros(0, np.int32), np.float32(0))
        if self.reference_logprobs_GC is not None:
            row["reference_logprobs_BC"] = np.zeros(self.num_candidates, np.float32)
        return row

    def _row(self, examples: range, ranks: np.ndarray, margin: np.float32) -> Row:
        tokens, offsets, trained = self.source.tokens, self.source.offsets, self.source.trained
        candidates = []
        for example in examples:
            start, end = offsets[example : example + 2]
            piece = Pieces(np.array([start]), np.array([end - start]), np.array([False]))
            candidates.append(build_row(tokens, piece, self.sequence_length, self.pad_id, trained))
        missing = self.num_candidates - len(candidates)
        candidates += [build_row(tokens, NO_PIECES, self.sequence_length, self.pad_id)] * missing
        names = ("tokens", "targets", "weights", "segments")
        row: Row = {f"{name}_BCT": np.stack([c[f"{name}_BT"] for c in candidates]) for name in names}
        row["ranks_BC"] = np.concatenate([ranks, np.full(missing, -1)]).astype(np.int32)
        row["margins_B"] = margin
        return row


def tokenize_preferences(
    paths: Sequence[str],
    tokenizer: Tokenizer,
    template: ChatTemplate,
    config: DataConfig,
    too_long: TooLong,
    split: Split,
    cache_dir: str,
) -> RankedRows:
    """The preferences of one side of the held-out split of some files, from the cache or tokenized now.

    A prompt with a response that does not fit data.sequence_length is dropped whole, or its responses are truncated, as
    too_long says; dropped is also one with an empty response, or with two that truncation makes equal. All are counted in
    `source.notes`. Trained on is each conversation's last turn, with which the row ends (`ChatTemplate.encode_scored`).

    Raises ValueError naming file and line, for records as `preference`; where nothing is left.
    """

    def write(folder: Path) -> None:
        groups: array.array = array.array("q", [0])
        ranks: array.array = array.array("i")
        margins: array.array = array.array("f")
        with ExampleWriter(folder, tokenizer) as writer:
            for record in records_of_side(paths, config, split, lambda r: preference(r, config.fields)):
                examples, note = _fit_all(record, tokenizer, template, config, too_long)
                if note:
                    writer.notes[note] += 1
                if not examples:
                    continue
                for example, messages in zip(examples, record.content.conversations, strict=True):
                    writer.add(example, num_bytes=sum(len(m.content.encode()) for m in messages))
                groups.append(groups[-1] + len(examples))
                ranks.extend(record.content.ranks)
                margins.append(record.content.margin)
            writer.notes["prompts"] = len(margins)
        check_left(writer, paths, config, split)
        for name, values in (("groups", groups), ("ranks", ranks), ("margins", margins)):
            (folder / f"{name}.bin").write_bytes(values.tobytes())

    recipe = {
        "kind": "preferences", "encoding": chat.ENCODING, "template": template.digest, "too_long": too_long,
        "limit": config.sequence_length,
        **split_recipe(config, split),
    }  # fmt: skip
    source = cached_source(cache_dir, paths, tokenizer, config, recipe, write)
    rows = RankedRows(source, config.sequence_length, tokenizer.pad_id, 0)
    return dataclasses.replace(rows, num_candidates=rows.max_candidates)


def _fit_all(
    record: Located, tokenizer: Tokenizer, template: ChatTemplate, config: DataConfig, too_long: TooLong
) -> tuple[list[Encoded], str | None]:
    """The record's examples, none where one of them has to be dropped, and what to count of the prompt."""
    examples = []
    note = None
    for messages in record.content.conversations:
        if not messages[-1].content.strip():
            return [], "dropped, empty response"
        with chat.located(f"{record.path}, line {record.line}"):
            encoded = template.encode_scored(tokenizer, messages)
        counted: collections.Counter = collections.Counter()
        fitted = fit(encoded, config.sequence_length, too_long, counted, encoded.trained, tokenizer.bos_id)
        note = next(iter(counted), note)
        if fitted is None:
            return [], note
        examples.append(fitted)
    if len({example.ids.tobytes() for example in examples}) < len(examples):
        return [], "dropped, equal once truncated"
    return examples, note


def num_candidates(data: Data) -> int:
    """C, the same in all sources of `build_preferences`."""
    plan: Any = next(iter(data.train.values()))[0]
    return plan.num_candidates


def build_preferences(
    config: DataConfig, tokenizer: Tokenizer, template: ChatTemplate, too_long: TooLong, cache_dir: str
) -> Data:
    """`batches.build_data` for preferences; all sources get the same number of candidates C, since they share batches."""

    def make_rows(paths: list[str], split: Split) -> RankedRows:
        return tokenize_preferences(paths, tokenizer, template, config, too_long, split, cache_dir)

    data = build_data(config, tokenizer, cache_dir=cache_dir, make_rows=make_rows)
    plans: list[Any] = [*(plan for plan, _ in data.train.values()), *data.eval.values()]
    most = max(plan.num_candidates for plan in plans)
    widen: Callable[[Any], Any] = lambda plan: dataclasses.replace(plan, num_candidates=most)
    train = {name: (widen(plan), weight) for name, (plan, weight) in data.train.items()}
    return dataclasses.replace(data, train=train, eval={name: widen(plan) for name, plan in data.eval.items()})
