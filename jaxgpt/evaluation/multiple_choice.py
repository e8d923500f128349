"""Multiple choice by log-likelihood: the choice that the model gives the highest probability, plain and per byte."""

from collections.abc import Mapping

import numpy as np
from jax.sharding import Mesh

from jaxgpt.data import chat, sources
from jaxgpt.data.sources import Record
from jaxgpt.evaluation import prompts
from jaxgpt.evaluation.config import TaskConfig
from jaxgpt.evaluation.intervals import mean_metric
from jaxgpt.evaluation.logprobs import token_scores
from jaxgpt.evaluation.prompts import Example
from jaxgpt.evaluation.results import Result
from jaxgpt.rewards.verifiers import shortened
from jaxgpt.runs.load import LoadedModel


def read_choices(record: Record, fields: Mapping[str, str]) -> Example:
    """{"prompt", "choices": [texts], "answer": the index of the right one, from 0, or its text}.

    Raises ValueError naming file and line: a missing field, fewer than two choices, an answer that is none of them.
    """
    where = f"{record.path}, line {record.line}"
    messages = chat.prompt_messages(record, fields)
    choices = sources.required_field(record, "choices", fields, list)
    answer = sources.required_field(record, "answer", fields, object)
    if len(choices) < 2 or not all(isinstance(choice, str) and choice for choice in choices):
        raise ValueError(f"{where}: choices must be at least two texts, none of them empty, not {shortened(choices)}.")
    if isinstance(answer, str) and answer in choices:
        gold = choices.index(answer)
    elif isinstance(answer, int) and not isinstance(answer, bool) and 0 <= answer < len(choices):
        gold = answer
    else:
        raise ValueError(
            f"{where}: the answer {answer!r} is neither one of the choices, {shortened(choices)}, nor the index of one, "
            f"0 to {len(choices) - 1}."
        )
    return Example(messages, choices[gold], tuple(choices), gold, record.fields, where)


def evaluate_multiple_choice(
    task: TaskConfig, field: str, model: LoadedModel, *, mesh: Mesh, batch_size: int, seed: int
) -> Result:
    """Accuracy of the choice with the highest log-likelihood after the prompt, and of the highest per UTF-8 byte.

    They are lm-eval's acc and acc_bytes (its acc_norm counts characters). The first of equal choices is taken. A prompt
    that is too long for the model loses its beginning, and is counted as truncated.
    """
    examples = prompts.read_examples(task.path, f"{field}.path", read_choices, task.fields)
    turns = prompts.few_shot(examples, task, field, read_choices, seed)
    limit = model.config.max_seq_length + 1  # the last token is only a target
    sequences, lengths, truncated = [], [], 0
    for example, turn in zip(examples, turns, strict=True):
        pairs = [prompts.encode_answer(model, turn, choice, example.where) for choice in example.choices]
        longest = max(len(choice_ids) for _, choice_ids in pairs)
        if longest >= limit:
            raise ValueError(
                f"{example.where}: a choice of {longest} tokens leaves no room for a prompt in "
                f"model.max_seq_length={model.config.max_seq_length}."
            )
        truncated += any(len(a) + len(b) > limit for a, b in pairs)
        sequences += [prompts.shorten(np.concatenate(pair), limit, model.tokenizer.bos_id) for pair in pairs]
        lengths += [len(choice_ids) for _, choice_ids in pairs]
    scores = token_scores(model, sequences, mesh=mesh, batch_size=batch_size)
    totals = [float(s.logprobs[-n:].sum(dtype=np.float64)) for s, n in zip(scores, lengths, strict=True)]

    samples, begin = [], 0
    for example in examples:
        logprobs = totals[begin : begin + len(example.choices)]
        begin += len(example.choices)
        sizes = [len(choice.encode()) for choice in example.choices]
        chosen, chosen_per_byte = int(np.argmax(logprobs)), int(np.argmax(np.divide(logprobs, sizes)))
        samples.append({
            "prompt": example.text, "choices": list(example.choices), "answer": example.gold, "logprobs": logprobs,
            "response": example.choices[chosen], "accuracy": float(chosen == example.gold),
            "accuracy_per_byte": float(chosen_per_byte == example.gold),
        })  # fmt: skip
    metrics = {name: mean_metric(np.array([s[name] for s in samples])) for name in ("accuracy", "accuracy_per_byte")}
    return Result(metrics, {"records": len(examples), "truncated": truncated}, samples)
