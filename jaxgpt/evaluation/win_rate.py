"""Win-rates: two models answer the same prompts, a judge says which answer is better; plain, and freed from length."""

import inspect
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from jax.sharding import Mesh

from jaxgpt.evaluation import prompts
from jaxgpt.evaluation.config import TaskConfig
from jaxgpt.evaluation.generation import Answers, answer_task, read_answer
from jaxgpt.evaluation.intervals import length_controlled_win_rate, mean_metric
from jaxgpt.evaluation.prompts import Example
from jaxgpt.evaluation.results import Result
from jaxgpt.evaluation.reward_model import RewardScorer
from jaxgpt.rewards.functions import checked_values, load_function
from jaxgpt.runs.load import LoadedModel


class Verdicts(NamedTuple):
    """wins_N: f64 in [0, 1], 1 where the first answer is better, 1/2 a tie. scores: further numbers [N] by name."""

    wins_N: np.ndarray
    scores: dict[str, np.ndarray]


Judge = Callable[[Sequence[Example], Answers, Answers], Verdicts]


def function_judge(name: str) -> Judge:
    """The judge of a user's function(prompts, responses_a, responses_b, records) -> numbers in [0, 1].

    Raises ValueError for a file or function that cannot be loaded or called so, and later, naming the function and the
    prompt's file and line, where it raises, or returns anything but one number in [0, 1] for each prompt.
    """
    function = load_function(name, "judge")
    try:
        inspect.signature(function).bind([], [], [], [])
    except TypeError as error:
        raise ValueError(
            f"The judge {name} cannot be called as function(prompts, responses_a, responses_b, records): {error}."
        ) from error

    def judge(examples, ours, theirs) -> Verdicts:
        where = [e.where for e in examples]
        batch = ([e.text for e in examples], list(ours.texts), list(theirs.texts), [e.record for e in examples])
        wins_N = checked_values(name, function, batch, where, "judge")
        for i in np.flatnonzero((wins_N < 0) | (wins_N > 1))[:1]:
            raise ValueError(
                f"The judge function {name} returned {wins_N[i]} for the prompt of {where[i]}; a verdict must be in "
                "[0, 1]: 1 where the first response is better, 0 where the second is."
            )
        return Verdicts(wins_N, {})

    return judge


def reward_judge(model: RewardScorer, batch_size: int) -> Judge:
    """The judge that prefers the answer with the higher reward; equal rewards tie."""

    def judge(examples, ours, theirs) -> Verdicts:
        conversations = [e.messages for e in examples]
        where = [e.where for e in examples]
        ours_N, theirs_N = (
            model.score(conversations, answers.texts, where, batch_size, finished=answers.finished)
            for answers in (ours, theirs)
        )
        wins_N = np.where(ours_N == theirs_N, 0.5, (ours_N > theirs_N).astype(np.float64))
        return Verdicts(wins_N, {"reward": ours_N, "baseline_reward": theirs_N})

    return judge


def evaluate_win_rate(
    task: TaskConfig, field: str, model: LoadedModel, baseline: LoadedModel, judge: Judge, *, mesh: Mesh,
    batch_size: int, seed: int,
) -> Result:  # fmt: skip
    """How often the model's answer to a prompt is better than the baseline's, both drawn with the same sampler and seed.

    win_rate counts a tie as half a win; length_controlled_win_rate is of `intervals`, with lengths in characters.
    """
    read = read_answer if task.num_shots else prompts.read_prompt
    examples = prompts.read_examples(task.path, f"{field}.path", prompts.read_prompt, task.fields)
    turns = prompts.few_shot(examples, task, field, read, seed)
    ours, theirs = (
        answer_task(task, field, m, examples, turns, seed=seed, mesh=mesh, batch_size=batch_size)
        for m in (model, baseline)
    )
    verdicts = judge(examples, ours, theirs)
    wins_N = verdicts.wins_N
    lengths, baseline_lengths = (np.array([len(text) for text in answers.texts]) for answers in (ours, theirs))
    metrics = {
        "win_rate": mean_metric(wins_N),
        "length_controlled_win_rate": length_controlled_win_rate(wins_N, lengths - baseline_lengths),
    }
    counts = {
        "records": len(examples), "wins": int(np.sum(wins_N > 0.5)), "ties": int(np.sum(wins_N == 0.5)),
        "losses": int(np.sum(wins_N < 0.5)), "truncated": ours.truncated, "baseline_truncated": theirs.truncated,
        "mean_length": float(lengths.mean()), "baseline_mean_length": float(baseline_lengths.mean()),
        "mean_tokens": float(np.mean(ours.num_tokens)), "baseline_mean_tokens": float(np.mean(theirs.num_tokens)),
    }  # fmt: skip
    samples = [
        {"prompt": e.text, "response": ours.texts[i], "baseline_response": theirs.texts[i], "win": float(wins_N[i])}
        | {name: float(values_N[i]) for name, values_N in verdicts.scores.items()}
        for i, e in enumerate(examples)
    ]
    return Result(metrics, counts, samples)
