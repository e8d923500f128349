"""Answers to prompts, and what verifiers say of them."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jax.sharding import Mesh

from jaxgpt.data import sources
from jaxgpt.data.chat import Message
from jaxgpt.data.sources import Record
from jaxgpt.evaluation import prompts
from jaxgpt.evaluation.config import TaskConfig
from jaxgpt.evaluation.intervals import mean_metric
from jaxgpt.evaluation.prompts import Example, read_prompt
from jaxgpt.evaluation.results import Result
from jaxgpt.generate.samplers import SamplerConfig
from jaxgpt.generate.text import generate_texts, stop_ids
from jaxgpt.rewards import functions
from jaxgpt.runs.load import LoadedModel


class Answers(NamedTuple):
    """texts: without what ended them. num_tokens: generated, the end included. finished: False where max_new cut it off.
    truncated: prompts that lost their start.
    """

    texts: list[str]
    num_tokens: list[int]
    finished: list[bool]
    truncated: int


def generate_answers(
    model: LoadedModel, encoded: Sequence[np.ndarray], *, sampler: SamplerConfig, max_new: int, stop: Sequence[str],
    seed: int, mesh: Mesh, batch_size: int, field: str = "max_new_tokens",
) -> Answers:  # fmt: skip
    """An answer to each prompt (i32, BOS first), up to EOS, the template's end, the first of the texts `stop`, or max_new.

    A prompt for which model.max_seq_length has no room beside max_new tokens loses its beginning after BOS.

    Raises:
      ValueError: naming `field`, where max_new leaves no room for a prompt.
    """
    limit = model.config.max_seq_length - max_new
    if limit < 1:
        raise ValueError(
            f"{field}={max_new} leaves no room for a prompt in model.max_seq_length={model.config.max_seq_length}."
        )
    # A text that is one piece can end the generation itself; any other is looked for afterwards.
    pieces = [ids for ids in map(model.tokenizer.encode, stop) if len(ids) == 1]
    ends = [*stop_ids(model.tokenizer), *(int(ids[0]) for ids in pieces)]
    if model.template is not None:
        ends += model.template.stop_ids(model.tokenizer)
    records = generate_texts(
        model.config, model.params, model.tokenizer, [""] * len(encoded), sampler=sampler, max_new=max_new, seed=seed,
        batch_size=batch_size, eos_ids=tuple(dict.fromkeys(ends)), mesh=mesh,
        encoded=[prompts.shorten(ids, limit, model.tokenizer.bos_id) for ids in encoded],
    )  # fmt: skip
    texts = [_cut(record["response"], stop) for record in records]
    finished = [r["stop_reason"] == "eos" or text != r["response"] for r, text in zip(records, texts, strict=True)]
    return Answers(texts, [r["num_tokens"] for r in records], finished, sum(len(ids) > limit for ids in encoded))


def answer_task(
    task: TaskConfig, field: str, model: LoadedModel, examples: Sequence[Example], turns: Sequence[Sequence[Message]],
    *, seed: int, mesh: Mesh, batch_size: int,
) -> Answers:  # fmt: skip
    """The model's answers to the prompts of a task. Few-shot without a template, "two newlines" ends an answer too."""
    stop = task.stop
    if task.num_shots and model.template is None:
        stop = (*stop, prompts.SHOT_SEPARATOR)
    encoded = [prompts.encode_prompt(model, turn, e.where) for turn, e in zip(turns, examples, strict=True)]
    return generate_answers(
        model, encoded, sampler=task.sampler, max_new=task.max_new_tokens, stop=stop, seed=seed, mesh=mesh,
        batch_size=batch_size, field=f"{field}.max_new_tokens",
    )  # fmt: skip


def read_answer(record: Record, fields: Mapping[str, str]) -> Example:
    """{"prompt", "answer" (or "reference"): a text, a number, or a list of them, of which the first is shown in shots}.

    Raises ValueError naming file and line.
    """
    name = sources.present_field(record, ("answer", "reference"), fields) or "answer"
    value: Any = sources.required_field(record, name, fields, object)
    if value == []:
        raise ValueError(f"{record.path}, line {record.line}: the field {fields.get(name, name)!r} is an empty list.")
    first = value[0] if isinstance(value, list) else value
    # Verifiers and functions of the user's find the answer under its standard name, too.
    return read_prompt(record, fields)._replace(answer=str(first), record=record.fields | {name: value})


def evaluate_generation(
    task: TaskConfig, field: str, model: LoadedModel, *, mesh: Mesh, batch_size: int, seed: int
) -> Result:
    """The mean of each of task.metrics over the model's answers."""
    score = functions.combine(task.metrics)
    examples = prompts.read_examples(task.path, f"{field}.path", read_answer, task.fields)
    places, records = [e.where for e in examples], [e.record for e in examples]
    functions.check_records(task.metrics, records, places)
    turns = prompts.few_shot(examples, task, field, read_answer, seed)
    answers = answer_task(task, field, model, examples, turns, seed=seed, mesh=mesh, batch_size=batch_size)
    scores = score([e.text for e in examples], answers.texts, records, places).by_source
    samples = [
        {"prompt": e.text, "response": text, "answer": e.answer} | {name: float(v[i]) for name, v in scores.items()}
        for i, (e, text) in enumerate(zip(examples, answers.texts, strict=True))
    ]
    counts = {
        "records": len(examples), "truncated": answers.truncated, "mean_tokens": float(np.mean(answers.num_tokens))
    }  # fmt: skip
    return Result({name: mean_metric(values.astype(np.float64)) for name, values in scores.items()}, counts, samples)


def _cut(text: str, stop: Sequence[str]) -> str:
    """The text before the first of the texts in it."""
    return text[: min((text.index(end) for end in stop if end in text), default=len(text))]
