"""A search over the fields of a pipeline's stages as data: its trials, and the stages that they share."""

import dataclasses
import difflib
import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal, NamedTuple

import numpy as np

from jaxgpt import config as config_lib
from jaxgpt.pipeline.graph import PipelineConfig, StageConfig, key

DIGITS = 12  # of a stage's key that are in the name of its folder


@dataclasses.dataclass(frozen=True)
class RangeConfig:
    """Numbers from low to high, both included, uniform in themselves or in their logarithm."""

    low: float
    high: float
    scale: Literal["linear", "log"] = "linear"
    integer: bool = False

    def __post_init__(self):
        if not self.low < self.high:
            raise ValueError(f"A range needs low < high, not low={self.low} and high={self.high}.")
        if self.scale == "log" and self.low <= 0:
            raise ValueError(f"A range with scale='log' needs low > 0, not low={self.low}.")
        if self.integer and (self.low % 1 or self.high % 1):
            raise ValueError(f"A range of integers needs whole low and high, not low={self.low} and high={self.high}.")

    def draw(self, rng: np.random.Generator) -> float | int:
        """One of its numbers."""
        margin = 0.5 if self.integer else 0.0  # so that the ends are as likely as what is between
        low, high = self.low - margin, self.high + margin
        is_log = self.scale == "log"
        value = math.exp(rng.uniform(math.log(low), math.log(high))) if is_log else float(rng.uniform(low, high))
        value = min(max(value, self.low), self.high)
        return round(value) if self.integer else value


@dataclasses.dataclass(frozen=True)
class SweepConfig:
    """Trials of a pipeline that differ in some fields of its stages, and the number by which they are compared.

    pipeline: FILE.py[:PRESET] of a jaxgpt.pipeline.graph.PipelineConfig. Stages that the metric's is not built on do not
      run, and what stages `expect` is not judged.
    search: {"STAGE.FIELD": what is tried}, or nested as the fields are: a list of values, or the fields of a RangeConfig
      for a random search. A list of one value sets the field for all trials.
    num_trials: of a random search, which draws uniformly from lists too; 0 is a grid, all combinations of the lists. The
      first trials of a larger num_trials are those of a smaller one.
    metric: STAGE.PATH, a path into that stage's manifest: "sft.final_metrics.eval/loss".
    mode: whether the least or the greatest metric is the best.
    num_processes: stages that run at a time, each in a process.
    environment: of each process, "{worker}" replaced by its number below num_processes: {"CUDA_VISIBLE_DEVICES":
      "{worker}"} gives each a GPU of its own.
    trial: the only trial to run, as a task of an array job does; none is all.
    """

    pipeline: str = ""
    search: dict[str, Any] = dataclasses.field(default_factory=dict)
    num_trials: int = 0
    seed: int = 0
    metric: str = ""
    mode: Literal["min", "max"] = "min"
    num_processes: int = 1
    environment: dict[str, str] = dataclasses.field(default_factory=dict)
    trial: int | None = None

    def __post_init__(self):
        for field in ("pipeline", "metric"):
            if not getattr(self, field):
                raise ValueError(f"{field} is missing.")
        if not all(self.metric.partition(".")):
            raise ValueError(f"metric={self.metric!r} is not STAGE.PATH such as 'sft.final_metrics.eval/loss'.")
        if self.num_trials < 0 or self.num_processes < 1:
            raise ValueError(
                f"num_trials={self.num_trials} must be at least 0, num_processes={self.num_processes} at least 1."
            )
        self.space()

    def space(self) -> dict[str, tuple | RangeConfig]:
        """What is tried of each STAGE.FIELD; ValueError where that is nothing."""
        if not self.search:
            raise ValueError("search is empty: a sweep needs at least one STAGE.FIELD with what is tried.")
        space = {name: _choices(f"search.{name}", value) for name, value in _leaves(self.search, "")}
        for name, choices in space.items():
            if "." not in name:
                raise ValueError(f"search.{name} is not STAGE.FIELD such as 'sft.optimizer.learning_rate'.")
            if isinstance(choices, RangeConfig) and not self.num_trials:
                raise ValueError(f"search.{name} is a range, which num_trials > 0 draws from; a grid needs a list.")
        return space


# What a manifest may hold to compare by, and the metrics that all runs of a kind log; others depend on the config.
_PARTS = ("final_metrics", "report_card", "reference_lines", "reward_shift", "step", "data", "curve", "vocab_size")
_METRICS = (
    "eval/loss", "eval/perplexity", "eval/bits_per_byte", "eval/accuracy", "eval/scores", "eval/gold", "eval/kl",
    "eval/bytes_per_token", "eval/reward_shift", "eval/margin", "eval/length", "train/loss", "train/accuracy",
    "train/grad_norm", "train/learning_rate", "reward/accuracy", "reward/margin", "reward/loss", "objective/kl",
    "objective/entropy", "objective/scores", "objective/rlhf_reward", "objective/non_score_reward", "policy/approxkl",
    "policy/clipfrac", "policy/ratio", "policy/loss", "value/loss", "value/clipfrac", "value/explained_variance",
    "rollout/mean_length", "rollout/eos_fraction", "rollout/logprob_gap",
)  # fmt: skip


def _check_metric(metric: str) -> None:
    """ValueError for a path that no manifest has, or that differs in a letter or two from a metric that there is."""
    _, part, *names = metric.split(".", 2)
    if part not in _PARTS:
        nearest = difflib.get_close_matches(part, _PARTS, n=1, cutoff=0.0)[0]
        raise ValueError(f"metric={metric!r}: no manifest has {part!r}; the nearest is {nearest!r}.")
    name = ".".join(names)
    if part == "final_metrics" and name not in _METRICS:
        alike = [known for known in _METRICS if known.count("/") == name.count("/")]
        close = difflib.get_close_matches(name, alike, n=1, cutoff=0.85)
        if close or not name:
            nearest = close[0] if close else _METRICS[0]
            raise ValueError(f"metric={metric!r}: there is no such metric; the nearest is {nearest!r}.")


def _leaves(values: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    """(dotted name, what is tried); a mapping with low or high is a range, any other a section."""
    for name, value in values.items():
        if isinstance(value, Mapping) and not {"low", "high"} & value.keys():
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _choices(field: str, value: Any) -> tuple | RangeConfig:
    if isinstance(value, Mapping):
        for end in ("low", "high"):
            if end not in value:
                raise ValueError(f"{field}.{end} is missing: a range needs low and high.")
        try:
            return config_lib.build(RangeConfig, value, field)
        except ValueError as error:
            raise ValueError(str(error) if field in str(error) else f"{field}: {error}") from error
    if not isinstance(value, list | tuple):
        raise ValueError(f"{field} must be a list of values or a range of low and high, not {value!r}.")
    if not value:
        raise ValueError(f"{field} is an empty list: there is nothing to try.")
    return tuple(value)


def assignments(config: SweepConfig) -> list[dict[str, Any]]:
    """The values of each trial, STAGE.FIELD -> value: a grid's with the last field changing fastest, or drawn from seed."""
    space = config.space()
    if not config.num_trials:
        lists = [choices for choices in space.values() if not isinstance(choices, RangeConfig)]
        return [dict(zip(space, values, strict=True)) for values in itertools.product(*lists)]
    return [
        {
            name: choices.draw(rng) if isinstance(choices, RangeConfig) else choices[rng.integers(len(choices))]
            for name, choices in space.items()
        }
        for rng in (np.random.default_rng((config.seed, number)) for number in range(config.num_trials))
    ]


class StageRun(NamedTuple):
    """One stage with the fields of one or more trials; folders: the names, not the paths, of its own and its parents'."""

    name: str
    stage: StageConfig
    folders: dict[str, str]

    @property
    def folder(self) -> str:
        """NAME-KEY: runs that agree in it are the same."""
        return self.folders[self.name]


class Trial(NamedTuple):
    """One assignment, and its runs by stage, parents first; the last is the one that has the metric."""

    number: int
    values: dict[str, Any]
    runs: dict[str, StageRun]

    @property
    def last(self) -> StageRun:
        """The run that has the metric."""
        return list(self.runs.values())[-1]


def plan(config: SweepConfig, pipeline: PipelineConfig, config_values: Callable[[str], Mapping]) -> list[Trial]:
    """The trials of a sweep; trials that agree in a stage and all it is built on share its run.

    config_values: spec -> what the config file of a stage gives.

    Raises:
      ValueError: for a metric or a stage that is not there, or is searched in but decides nothing about the metric.
    """
    target = config.metric.split(".")[0]
    for field, stage in [("metric", target), *((f"search.{name}", name.split(".")[0]) for name in config.space())]:
        if stage not in pipeline.stages:
            nearest = difflib.get_close_matches(stage, pipeline.stages, n=1, cutoff=0.0)[0]
            raise ValueError(f"{field}: the pipeline has no stage {stage!r}; the nearest is {nearest!r}.")
    _check_metric(config.metric)
    trials = [
        Trial(number, values, _runs(_assigned(pipeline, values, target), config_values))
        for number, values in enumerate(assignments(config))
    ]
    for name in config.space():
        if not any(name.split(".")[0] in trial.runs for trial in trials):
            raise ValueError(f"search.{name} changes nothing: {config.metric} is of a stage that is not built on it.")
    if config.trial is not None and not 0 <= config.trial < len(trials):
        raise ValueError(f"trial={config.trial} is not among the {len(trials)} trials, 0 to {len(trials) - 1}.")
    return trials


def _assigned(pipeline: PipelineConfig, values: Mapping[str, Any], target: str) -> PipelineConfig:
    """The pipeline up to a stage, with some STAGE.FIELD set."""
    stages = dict(pipeline.stages)
    for name, value in values.items():
        stage, _, field = name.partition(".")
        stages[stage] = dataclasses.replace(stages[stage], fields=_with(stages[stage].fields, field.split("."), value))
    return dataclasses.replace(pipeline, stages=stages, only=(target,))


def _with(fields: Any, path: list[str], value: Any) -> dict[str, Any]:
    """A copy of nested fields with one set; whether there is such a field is for the stage to judge."""
    fields = dict(fields) if isinstance(fields, Mapping) else {}
    config_lib.set_field(fields, path[0], _with(fields.get(path[0]), path[1:], value) if path[1:] else value)
    return fields


def _runs(pipeline: PipelineConfig, config_values: Callable[[str], Mapping]) -> dict[str, StageRun]:
    """The runs of a pipeline's stages; a key holds the parents' keys, so that all are known before anything has run."""
    keys: dict[str, str] = {}
    runs: dict[str, StageRun] = {}
    for name in pipeline.order():
        stage = pipeline.stages[name]
        parents = sorted(stage.parents())
        keys[name] = key(config_values(stage.spec), stage, {parent: keys[parent] for parent in parents})
        runs[name] = StageRun(name, stage, {n: f"{n}-{keys[n][:DIGITS]}" for n in (*parents, name)})
    return runs


def varied(config: SweepConfig) -> dict[str, bool]:
    """The fields that are not one value for all trials -> whether an axis of theirs is logarithmic.

    That of a list is where its numbers are positive and span a factor of ten.
    """
    spans = {}
    for name, choices in config.space().items():
        if isinstance(choices, RangeConfig):
            spans[name] = choices.scale == "log"
        elif len(choices) > 1:
            numbers = all(isinstance(c, int | float) and not isinstance(c, bool) and c > 0 for c in choices)
            spans[name] = numbers and max(choices) >= 10 * min(choices)
    return spans
