"""Reward models in evaluations: the rewards of answers, and the report card on any preferences."""

import dataclasses
import functools
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
from jax.sharding import Mesh

from jaxgpt.data import conversations, preference, sources
from jaxgpt.data.chat import ChatTemplate, Message, located
from jaxgpt.data.config import DataConfig
from jaxgpt.evaluation import scoring
from jaxgpt.evaluation.config import TaskConfig
from jaxgpt.evaluation.report_card import pair_scores, report_card
from jaxgpt.evaluation.results import Result
from jaxgpt.runs.load import LoadedModel


@dataclasses.dataclass(frozen=True, eq=False)
class RewardScorer:
    """A reward model with its template, on a mesh; field: the config field that named it, for messages.

    Raises ValueError naming the field, for a model without a scalar head or a template.
    """

    model: LoadedModel
    mesh: Mesh
    field: str

    def __post_init__(self):
        if self.model.config.head != "scalar" or self.model.template is None:
            raise ValueError(f"{self.field} is not a reward model, made by experiments.reward, which is needed here.")

    @functools.cached_property
    def scorer(self) -> scoring.Scorer:
        """Its rewards of batches; compiled once for each shape."""
        return scoring.make_scorer(self.model.config, self.model.params, self.mesh)

    @property
    def template(self) -> ChatTemplate:
        """What makes conversations its input."""
        assert self.model.template is not None  # for the type checker
        return self.model.template

    def score(
        self, prompts: Sequence[Sequence[Message]], responses: Sequence[str], where: Sequence[str], batch_size: int,
        *, finished: Sequence[bool],
    ) -> np.ndarray:  # fmt: skip
        """The rewards of responses, f32 [N], unshifted; conversations that are too long lose their beginning.

        finished: whether each has ended; of one that was cut off the reward is read at its last token, as in training a
        policy.

        Raises ValueError naming file and line of a prompt that the template cannot take.
        """
        tokenizer, limit = self.model.tokenizer, self.model.config.max_seq_length
        sequences = []
        for prompt, response, place, is_finished in zip(prompts, responses, where, finished, strict=True):
            talk = [*prompt, Message("assistant", response)]
            with located(place):
                encoded = self.template.encode_scored(tokenizer, talk, is_finished=is_finished)
            everything = np.ones(len(encoded.ids), bool)
            fitted = conversations.fit(encoded, limit, "truncate_left", Counter(), everything, tokenizer.bos_id)
            sequences.append((fitted or encoded).ids)
        return scoring.score_sequences(self.scorer, sequences, batch_size, tokenizer.pad_id)


def evaluate_report_card(
    task: TaskConfig, field: str, judge: RewardScorer, *, batch_size: int, cache_dir: str
) -> Result:
    """`report_card` of a reward model on the preferences of task.path; batch_size counts prompts."""
    model = judge.model
    data = DataConfig(fields=task.fields, sequence_length=model.config.max_seq_length)
    plan = preference.tokenize_preferences(
        sources.resolve_paths(task.path, f"{field}.path"), model.tokenizer, judge.template, data, task.too_long, "all",
        cache_dir,
    )  # fmt: skip
    score = judge.scorer
    scored = scoring.score_pairs(score, plan, batch_size)
    if not len(scored.chosen_N):
        raise ValueError(
            f"{field}.path: no two responses to a prompt differ in rank, so that there is nothing to judge."
        )
    swap_gap, pad_gap = scoring.symmetry_gaps(score, plan, batch_size)
    card = report_card(pair_scores({"preferences": scored}), task.report_card, swap_gap=swap_gap, pad_gap=pad_gap)
    counts = {"pairs": len(scored.chosen_N), "prompts": len(plan)} | {
        note: count for note, count in plan.source.notes.items() if note != "prompts"
    }
    return Result(_metrics(card), counts, [], {"report_card": card})


def _metrics(card: dict[str, Any]) -> dict[str, Any]:
    """What of a card goes into the table; only rates have intervals."""
    pairs = card["accuracy"]["pairs"]
    rate = lambda r: {"value": r["accuracy"], "stderr": None, "low": r["low"], "high": r["high"], "n": r["pairs"]}
    plain = lambda value: {"value": value, "stderr": None, "low": None, "high": None, "n": pairs}
    return {
        "accuracy": rate(card["accuracy"]),
        "longer_wins_accuracy": rate(card["length"]["longer_wins"]),
        "expected_calibration_error": plain(card["calibration"]["ece"]),
        "length_correlation": plain(card["length"]["correlation"]),
    }
