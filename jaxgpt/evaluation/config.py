"""What an evaluation is told: one model, named tasks, and for win-rates a baseline and a judge."""

import dataclasses
from typing import Literal, get_args

from jaxgpt.config import check_bounds
from jaxgpt.data import preference
from jaxgpt.data.conversations import TooLong
from jaxgpt.data.sources import check_fields
from jaxgpt.evaluation.report_card import Thresholds
from jaxgpt.generate.samplers import SamplerConfig
from jaxgpt.partition import MeshConfig
from jaxgpt.rewards.functions import RewardSource

Kind = Literal["perplexity", "multiple_choice", "generation", "win_rate", "report_card"]

# The fields of each kind, beside kind, path and fields.
_ANSWERS = ("sampler", "max_new_tokens", "stop", "num_shots", "shots")
KIND_FIELDS = {
    "perplexity": ("stride", "text_separator"),
    "multiple_choice": ("num_shots", "shots"),
    "generation": ("metrics", *_ANSWERS),
    "win_rate": _ANSWERS,
    "report_card": ("report_card", "too_long"),
}
# The standard names of each kind's records.
RECORD_FIELDS = {
    "perplexity": ("text",),
    "multiple_choice": ("prompt", "choices", "answer"),
    "generation": ("prompt", "answer", "reference"),
    "win_rate": ("prompt",),
    "report_card": preference.FIELDS,
}


@dataclasses.dataclass(frozen=True)
class TaskConfig:
    """One task. Fields that its kind does not have must be left alone.

    kind: `perplexity` of texts; `multiple_choice` by log-likelihood; `generation`, answers scored by verifiers;
      `win_rate` of answers against those of the baseline, by the judge; `report_card` of a reward model.
    path: files, as of data.train. fields: maps standard field names to those of the files, as data.fields.
    stride: tokens by which the window over a document longer than model.max_seq_length moves; each token then has at
      least max_seq_length - stride tokens of context. 0 is half of max_seq_length.
    text_separator: splits a .txt file into documents; None means one document per file.
    num_shots: solved examples put before each prompt, from the records of the files `shots`.
    metrics: label -> a verifier of `jaxgpt.rewards.verifiers`, or a function of the user's as "path/to/file.py:function".
    sampler, max_new_tokens: how answers are drawn; greedily by default.
    stop: texts that end an answer (they are cut off), besides EOS and the template's end.
    report_card: what a reward model must reach. too_long: as of experiments.reward.
    """

    kind: Kind | None = None
    path: str | tuple[str, ...] = ()
    fields: dict[str, str] = dataclasses.field(default_factory=dict)
    stride: int = 0
    text_separator: str | None = None
    num_shots: int = 0
    shots: str | tuple[str, ...] = ()
    metrics: dict[str, RewardSource] = dataclasses.field(
        default_factory=lambda: {"exact_match": RewardSource("exact_match")}
    )
    sampler: SamplerConfig = SamplerConfig(temperature=0.0)
    max_new_tokens: int = 128
    stop: tuple[str, ...] = ()
    report_card: Thresholds = Thresholds()
    too_long: TooLong = "truncate_left"

    def check(self, field: str) -> None:
        """ValueError naming field.x for what is missing or out of range; field: the task's own, tasks.LABEL."""
        if self.kind is None:
            raise ValueError(f"{field}.kind is required; it is one of {', '.join(get_args(Kind))}.")
        default = TaskConfig()
        for name in sorted({name for names in KIND_FIELDS.values() for name in names}):
            if name not in KIND_FIELDS[self.kind] and getattr(self, name) != getattr(default, name):
                kinds = " or ".join(kind for kind, names in KIND_FIELDS.items() if name in names)
                raise ValueError(f"{field}.{name} has no meaning for {field}.kind={self.kind!r}; it is for {kinds}.")
        check_bounds(self, f"{field}.", stride=0, num_shots=0, max_new_tokens=1)
        check_fields(self.fields, RECORD_FIELDS[self.kind], f"{field}.fields")
        if self.shots and not self.num_shots:
            raise ValueError(f"{field}.shots={self.shots!r} needs {field}.num_shots, how many of them to show.")
        if not self.metrics:
            raise ValueError(f"{field}.metrics is empty; at least one is needed.")
        if "" in self.stop:
            raise ValueError(f"{field}.stop has an empty text, which would end every answer at once.")


@dataclasses.dataclass(frozen=True)
class EvaluateConfig:
    """One evaluation.

    init_from: the workdir of a finished training run, or a finalized artifact. tasks: label -> task.
    baseline: a second one, whose answers a win_rate compares with. judge: which answer is better, for win_rate: the workdir
      of a reward model, or a function of the user's as "path/to/file.py:function".
    chat_template: `auto` makes prompts a user's messages in the template that the model was trained with, if there is
      one; `none` continues the bare text.
    batch_size: sequences at a time. seed: of sampling and of the choice of shots.
    """

    init_from: str = ""
    tasks: dict[str, TaskConfig] = dataclasses.field(default_factory=dict)
    baseline: str = ""
    judge: str = ""
    chat_template: Literal["auto", "none"] = "auto"
    batch_size: int = 16
    seed: int = 0
    mesh: MeshConfig = MeshConfig()

    def __post_init__(self):
        if self.batch_size < 1 or self.seed < 0:
            name, least = ("batch_size", 1) if self.batch_size < 1 else ("seed", 0)
            raise ValueError(f"{name} must be at least {least}, not {getattr(self, name)}.")
        for label, task in self.tasks.items():
            task.check(f"tasks.{label}")
        for name in ("baseline", "judge"):
            if getattr(self, name) and not self._compared():
                raise ValueError(
                    f"{name}={getattr(self, name)!r} is for tasks of the kind win_rate, and there is none."
                )

    def _compared(self) -> list[str]:
        return [label for label, task in self.tasks.items() if task.kind == "win_rate"]

    def check_complete(self) -> None:
        """ValueError naming what is missing of models, tasks and files, which a preset may leave open."""
        if not self.init_from:
            raise ValueError("init_from is required: --config.init_from=DIR, the workdir of a finished run.")
        if not self.tasks:
            raise ValueError(
                "tasks is empty; give label -> task, e.g. --config.tasks=\"{'text': {'kind': 'perplexity', "
                "'path': 'text.txt'}}\"."
            )
        for label, task in self.tasks.items():
            if not task.path:
                raise ValueError(f"tasks.{label}.path is empty; it names the task's files.")
            if task.num_shots and not task.shots:
                raise ValueError(
                    f"tasks.{label}.num_shots={task.num_shots} needs tasks.{label}.shots, files of records."
                )
        for name in ("baseline", "judge"):
            if self._compared() and not getattr(self, name):
                raise ValueError(f"{name} is required by tasks.{self._compared()[0]}, a win_rate.")
