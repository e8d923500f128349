"""From a config to results: the models it names, and each task by its kind."""

import dataclasses
import functools
import os
from typing import Any

from jax.sharding import Mesh

from jaxgpt.data import sources
from jaxgpt.evaluation.config import EvaluateConfig, TaskConfig
from jaxgpt.evaluation.generation import evaluate_generation
from jaxgpt.evaluation.multiple_choice import evaluate_multiple_choice
from jaxgpt.evaluation.perplexity import evaluate_perplexity
from jaxgpt.evaluation.results import Result
from jaxgpt.evaluation.reward_model import RewardScorer, evaluate_report_card
from jaxgpt.evaluation.win_rate import Judge, evaluate_win_rate, function_judge, reward_judge
from jaxgpt.rewards.functions import file_and_function, load_function
from jaxgpt.runs.load import LoadedModel, load_model
from jaxgpt.runs.manifest import manifest_digest, read_manifest


def read_parents(config: EvaluateConfig) -> dict[str, dict[str, str]]:
    """{"path", "digest"} of every finished run that the config names, by its field; ValueError where one is missing.

    Of a judge that is a function, the digest is its file's.
    """
    named = {"init_from": config.init_from, "baseline": config.baseline, "judge": config.judge}
    function = file_and_function(config.judge)
    if function is not None:
        load_function(config.judge, "judge")  # what is wrong with it comes out before anything is evaluated
        named.pop("judge")
    found = {field: _parent(workdir, field) for field, workdir in named.items() if workdir}
    if function is not None:
        found["judge"] = {"path": os.path.abspath(function[0]), "digest": sources.content_digest([function[0]])}
    return found


def _parent(workdir: str, field: str) -> dict[str, str]:
    if not os.path.isdir(workdir):
        judge = ', and no function named as "path/to/file.py:function"' if field == "judge" else ""
        raise ValueError(f"{field}: there is no folder {workdir!r}{judge}.")
    manifest = read_manifest(workdir)
    if manifest is None:
        raise ValueError(f"{field}: {workdir} has no manifest.json: it is no run, or one that has not finished.")
    return {"path": os.path.abspath(workdir), "digest": manifest_digest(manifest)}


def read_digests(config: EvaluateConfig) -> dict[str, str]:
    """The digest of each task's files (its shots included), by label; ValueError where a file is missing."""
    found = {}
    for label, task in config.tasks.items():
        paths = sources.resolve_paths(task.path, f"tasks.{label}.path")
        if task.shots:
            paths += sources.resolve_paths(task.shots, f"tasks.{label}.shots")
        found[label] = sources.content_digest(paths)
    return found


class Evaluation:
    """The models of a config, loaded when a task first asks for them.

    cache_dir: where tokenized preferences are kept.
    """

    def __init__(self, config: EvaluateConfig, mesh: Mesh, cache_dir: str):
        self.config, self.mesh, self.cache_dir = config, mesh, cache_dir

    @functools.cached_property
    def model(self) -> LoadedModel:
        """The one that is evaluated."""
        return load_model(self.config.init_from, self.mesh)

    @functools.cached_property
    def baseline(self) -> LoadedModel:
        """What a win_rate compares it with."""
        return load_model(self.config.baseline, self.mesh)

    @functools.cached_property
    def judge(self) -> Judge:
        """What compares them."""
        name = self.config.judge
        if file_and_function(name) is not None:
            return function_judge(name)
        reward_model = RewardScorer(load_model(name, self.mesh), self.mesh, f"judge={name!r}")
        return reward_judge(reward_model, self.config.batch_size)

    def run(self, label: str, task: TaskConfig) -> Result:
        """The result of one task; ValueError where model, records and task do not fit."""
        field, config = f"tasks.{label}", self.config
        shared: dict[str, Any] = {"mesh": self.mesh, "batch_size": config.batch_size}
        if task.kind == "report_card":
            subject = RewardScorer(self.model, self.mesh, f"init_from={config.init_from!r}")
            return evaluate_report_card(task, field, subject, batch_size=config.batch_size, cache_dir=self.cache_dir)
        model = self._writer(self.model, "init_from", field, task)
        if task.kind == "perplexity":
            return evaluate_perplexity(task, field, model, **shared)
        if task.kind == "multiple_choice":
            return evaluate_multiple_choice(task, field, model, **shared, seed=config.seed)
        if task.kind == "generation":
            return evaluate_generation(task, field, model, **shared, seed=config.seed)
        judge = self.judge  # what is wrong with it comes out before anything is generated
        baseline = self._writer(self.baseline, "baseline", field, task)
        return evaluate_win_rate(task, field, model, baseline, judge, **shared, seed=config.seed)

    def _writer(self, model: LoadedModel, name: str, field: str, task: TaskConfig) -> LoadedModel:
        """The model as a language model, with its template where the config wants it."""
        if model.config.head != "lm":
            raise ValueError(
                f"{field}.kind={task.kind!r} needs a language model, but {name}={getattr(self.config, name)!r} is a reward "
                "model, for tasks of the kind report_card."
            )
        return model if self.config.chat_template == "auto" else dataclasses.replace(model, template=None)
