"""Prompts for reinforcement learning: records in, left-padded batches out, in an order that the step alone decides."""

import collections
import dataclasses
import hashlib
import json
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxgpt.data import chat
from jaxgpt.data.batches import epoch_permutation
from jaxgpt.data.chat import ChatTemplate, Message
from jaxgpt.data.config import DataConfig
from jaxgpt.data.conversations import Located, records_of_side
from jaxgpt.data.sources import Record, required_field
from jaxgpt.data.token_cache import Split
from jaxgpt.data.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True, eq=False)
class PromptSet:
    """The prompts of some files that fit, in the order of the files; entry i of each tuple belongs to prompt i.

    ids: i32 [n], BOS first where there is one, at most max_prompt_length. texts: the record's prompt, or where that is a
      list of messages the text that the template makes of them.
    records: all fields of each record, as a reward function sees them. where: "path, line n" of each, for messages.
    fingerprint: digest (hex) of ids and records in their order; where files lie does not matter.
    template_digest: None where prompts were encoded without a template.
    notes: what was left out, e.g. {"dropped, too long": 3}.
    """

    ids: tuple[np.ndarray, ...]
    texts: tuple[str, ...]
    records: tuple[dict[str, Any], ...]
    where: tuple[str, ...]
    max_prompt_length: int
    pad_id: int
    fingerprint: str
    tokenizer_digest: str
    template_digest: str | None
    notes: dict[str, int]

    def __len__(self) -> int:
        return len(self.ids)

    def batch(self, indices: Sequence[int] | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The prompts at `indices`, padded on the left to P = max_prompt_length, so that every batch has one shape.

        Returns:
          prompt_BP: i32. mask_BP: f32, 1 on real tokens.
        """
        prompt_BP = np.full((len(indices), self.max_prompt_length), self.pad_id, np.int32)
        mask_BP = np.zeros(prompt_BP.shape, np.float32)
        for row, index in enumerate(indices):
            ids = self.ids[index]
            prompt_BP[row, -len(ids) :] = ids
            mask_BP[row, -len(ids) :] = 1
        return prompt_BP, mask_BP


def read_prompts(
    paths: Sequence[str],
    tokenizer: Tokenizer,
    template: ChatTemplate | None,
    config: DataConfig,
    max_prompt_length: int,
    split: Split = "all",
) -> PromptSet:
    """The prompts of one side of the held-out split of {"prompt", ...} records, tokenized.

    A prompt is a text or a list of messages that awaits an answer; a text is one message of the user's. Without a
    template it must be a text, and is encoded as BOS + text. Prompts longer than max_prompt_length (in tokens, BOS
    included) are dropped and counted in `notes`: a prompt cut short would be another question.

    Args:
      paths: files, as of `sources.resolve_paths`.
      tokenizer: of the policy.
      template: of the policy.
      config: its `fields` and `holdout` matter.
      max_prompt_length: P, `rollout.max_prompt_length`.
      split: a prompt belongs to a side by its hash: the same one as in SFT and preference data.

    Raises:
      ValueError: naming file and line, for records as `chat.prompt_messages`; naming rollout.max_prompt_length and the
        shortest prompt, where none fits.
    """
    if max_prompt_length < 1:
        raise ValueError(f"rollout.max_prompt_length must be at least 1, not {max_prompt_length}.")

    def read(record: Record) -> _Content:
        messages = chat.prompt_messages(record, config.fields)
        value = required_field(record, "prompt", config.fields, object)
        text = value if isinstance(value, str) else None
        return _Content(chat.hashable_prompt(messages), messages, text, record.fields)

    kept: list[tuple[np.ndarray, str, dict[str, Any], str]] = []
    notes: collections.Counter = collections.Counter()
    shortest, digest = None, hashlib.sha256()
    for record in records_of_side(paths, config, split, read):
        where = f"{record.path}, line {record.line}"
        ids, text = _encode(record, where, tokenizer, template)
        shortest = len(ids) if shortest is None else min(shortest, len(ids))
        if len(ids) > max_prompt_length:
            notes["dropped, too long"] += 1
            continue
        kept.append((ids, text, record.content.fields, where))
        digest.update(json.dumps([ids.tolist(), record.content.fields], sort_keys=True, default=str).encode())
    if not kept:
        raise ValueError(_none_left(paths, config, split, max_prompt_length, shortest))
    all_ids, texts, records, places = zip(*kept, strict=True)
    return PromptSet(
        ids=all_ids, texts=texts, records=records, where=places,
        max_prompt_length=max_prompt_length, pad_id=tokenizer.pad_id, fingerprint=digest.hexdigest(),
        tokenizer_digest=tokenizer.digest, template_digest=None if template is None else template.digest,
        notes=dict(notes),
    )  # fmt: skip


class _Content(NamedTuple):
    """What is read of a record. prompt: its hash decides the side. text: the prompt, None where it is messages."""

    prompt: str
    messages: list[Message]
    text: str | None
    fields: dict[str, Any]


def _encode(record: Located, where: str, tokenizer: Tokenizer, template: ChatTemplate | None) -> tuple[np.ndarray, str]:
    """Ids and text of a prompt; mistakes name file and line."""
    messages, text = record.content.messages, record.content.text
    if template is None:
        if text is None:
            raise ValueError(f"{where}: a prompt that is a list of messages needs a chat template, and there is none.")
        return tokenizer.encode(text, add_bos=True), text
    try:
        ids = template.encode_prompt(tokenizer, messages)
        return ids, template.render(messages, True, tokenizer) if text is None else text
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def _none_left(
    paths: Sequence[str], config: DataConfig, split: Split, max_prompt_length: int, shortest: int | None
) -> str:
    """Why there is no prompt."""
    files = ", ".join(paths[:3])
    if shortest is None:
        side = split.replace("_", "-")
        return f"No prompt of {files} is on the {side} side; data.holdout.fraction={config.holdout.fraction}."
    return (
        f"No prompt of {files} fits rollout.max_prompt_length={max_prompt_length}: the shortest has {shortest} tokens."
    )


def prompt_indices(step: int, batch_size: int, num_prompts: int, seed: int) -> np.ndarray:
    """Which prompts (i64 [batch_size]) iteration `step` asks for: a pure function, so that resuming needs no state.

    Batch k is places [k B, (k + 1) B) of an endless order, in which every epoch is another permutation of all prompts;
    a batch may end one epoch and begin the next.

    Raises:
      ValueError: for a negative step, or no prompts or rows.
    """
    if step < 0 or batch_size < 1 or num_prompts < 1:
        raise ValueError(
            f"Prompts need step >= 0, rollout.batch_size >= 1 and at least one prompt, not step={step}, "
            f"rollout.batch_size={batch_size} and {num_prompts} prompts."
        )
    begin, end = step * batch_size, (step + 1) * batch_size
    epochs = range(begin // num_prompts, -(-end // num_prompts))
    order = np.concatenate([epoch_permutation(num_prompts, seed % 2**32, epoch) for epoch in epochs])
    return order[begin - epochs[0] * num_prompts :][:batch_size]
