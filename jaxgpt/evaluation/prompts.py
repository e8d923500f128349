"""Prompts of tasks: records in, conversations with solved examples before them (few-shot) out, and their tokens.

With a chat template, every solved example is a user's turn and the assistant's answer, before the prompt's own turn. Without
one, the text is

    PROMPT ANSWER⏎⏎PROMPT ANSWER⏎⏎PROMPT

with a space between prompt and answer, unless one of them brings white space there, and two newlines after each answer.
"""

import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxgpt.data import chat, sources
from jaxgpt.data.chat import Message
from jaxgpt.data.sources import Record
from jaxgpt.evaluation.config import TaskConfig
from jaxgpt.runs.load import LoadedModel

SHOT_SEPARATOR = "\n\n"


class Example(NamedTuple):
    """One record of a task.

    messages: its prompt. answer: the right one, as text, where the task has one. choices: of multiple choice, with the
    index `gold` of the answer. record: all its fields. where: "path, line n".
    """

    messages: list[Message]
    answer: str
    choices: tuple[str, ...]
    gold: int
    record: dict[str, Any]
    where: str

    @property
    def key(self) -> str:
        """What the prompt says, white space aside."""
        return " ".join(word for m in self.messages for word in (m.role, *m.content.split()))

    @property
    def text(self) -> str:
        """The prompt as a text."""
        return "\n".join(message.content for message in self.messages)


Read = Callable[[Record, Mapping[str, str]], Example]


def read_prompt(record: Record, fields: Mapping[str, str]) -> Example:
    """{"prompt"}; ValueError naming file and line."""
    messages = chat.prompt_messages(record, fields)
    return Example(messages, "", (), -1, record.fields, f"{record.path}, line {record.line}")


def read_examples(path: str | tuple[str, ...], field: str, read: Read, fields: Mapping[str, str]) -> list[Example]:
    """All records of some files; ValueError naming file and line, or `field`."""
    return [
        read(record, fields) for file in sources.resolve_paths(path, field) for record in sources.read_records(file)
    ]


def few_shot(examples: Sequence[Example], task: TaskConfig, field: str, read: Read, seed: int) -> list[list[Message]]:
    """The turns of each example: task.num_shots records of task.shots with their answers, then its own prompt.

    Which ones is drawn without replacement from the seed and the prompt alone, so that neither the order nor the number
    of examples matters. A record with the example's own prompt is never among them.

    Raises:
      ValueError: naming field.num_shots, where there are too few others.
    """
    if not task.num_shots:
        return [example.messages for example in examples]
    shots = read_examples(task.shots, f"{field}.shots", read, task.fields)
    keys = [shot.key for shot in shots]
    count = Counter(keys)
    turns = []
    for example in examples:
        wanted = task.num_shots + count[example.key]
        if wanted > len(shots):
            raise ValueError(
                f"{field}.num_shots={task.num_shots} is more than the {len(shots) - count[example.key]} records of "
                f"{field}.shots that differ from the prompt of {example.where}."
            )
        drawn = random.Random(f"{seed} {example.key}").sample(range(len(shots)), wanted)
        chosen = [shots[i] for i in drawn if keys[i] != example.key][: task.num_shots]
        turns.append(_with_shots(example.messages, chosen))
    return turns


def _with_shots(messages: list[Message], shots: Sequence[Example]) -> list[Message]:
    """A system message stays in front; those of the shots are left out."""
    solved = [turn for shot in shots for turn in (*shot.messages, Message("assistant", shot.answer))]
    system = [turn for turn in messages if turn.role == "system"]
    return [*system, *(turn for turn in (*solved, *messages) if turn.role != "system")]


def join(prompt: str, answer: str) -> str:
    """Prompt and answer as one text, with a space between where neither brings white space."""
    apart = not prompt or not answer or prompt[-1].isspace() or answer[0].isspace()
    return prompt + answer if apart else f"{prompt} {answer}"


def encode_prompt(model: LoadedModel, turns: Sequence[Message], where: str) -> np.ndarray:
    """Ids (i32) of what the model is to answer; ValueError naming file and line."""
    if model.template is None:
        return model.tokenizer.encode(_bare_text(turns, where), add_bos=True)
    with chat.located(where):
        return model.template.encode_prompt(model.tokenizer, turns)


def encode_answer(
    model: LoadedModel, turns: Sequence[Message], answer: str, where: str, *, as_is: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """Ids of the prompt and of the answer after it, without what would end it, i32.

    The answer's are what follows the prompt's in the whole text, white space between them included, as the harness of
    EleutherAI splits it. as_is: no space is put before the answer where there is no template.

    Raises:
      ValueError: naming file and line, where nothing is left of the answer.
    """
    tokenizer = model.tokenizer
    if model.template is None:
        text = _bare_text(turns, where)
        context = text.rstrip()
        whole = text + answer if as_is else join(text, answer)
        prompt_ids, ids = (tokenizer.encode(said, add_bos=True) for said in (context, whole))
        if len(whole) > len(
            context
        ):  # at least one token is the answer's, where it makes one with the end of the prompt
            prompt_ids = prompt_ids[: max(len(ids) - 1, 0)]
        answer_ids = ids[len(prompt_ids) :]
    else:
        with chat.located(where):
            ids, is_answer = model.template.encode(
                tokenizer, [*turns, Message("assistant", answer)], loss_on="completion"
            )
        prompt_ids, answer_ids = ids[: np.argmax(is_answer)], ids[is_answer]
        said = np.flatnonzero(tokenizer.token_bytes_V[answer_ids])
        answer_ids = answer_ids[: said[-1] + 1 if len(said) else 0]
    if not len(answer_ids):
        raise ValueError(f"{where}: the answer {answer!r} has no tokens.")
    return prompt_ids, answer_ids


def _bare_text(turns: Sequence[Message], where: str) -> str:
    """The text of turns without a template."""
    roles = [turn.role for turn in turns]
    if roles != ["user", "assistant"] * (len(turns) // 2) + ["user"]:
        raise ValueError(f"{where}: a prompt that is a list of messages needs a chat template, and there is none.")
    text = ""
    for turn in turns:
        text = text + turn.content if turn.role == "user" else join(text, turn.content) + SHOT_SEPARATOR
    return text


def shorten(ids: np.ndarray, limit: int, bos_id: int | None) -> np.ndarray:
    """The last of too many ids, since what is nearest to the end counts most, after BOS where they begin with it."""
    if len(ids) <= limit:
        return ids
    kept = int(ids[0] == bos_id)
    return np.concatenate([ids[:kept], ids[len(ids) - limit + kept :]])
