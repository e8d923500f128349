"""A pipeline as data: its stages, their order, the flags each is called with, and what must hold of its result."""

import dataclasses
import difflib
import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from typing import Any

from jaxgpt.config import flatten
from jaxgpt.data.sources import SUFFIXES, matching_files
from jaxgpt.pipeline.expectations import check_expectation

_REFERENCE = re.compile(r"@(\w+)")  # at the beginning of a text
# What makes a folder what it is: data, or a run or checkpoint. Not all that is in it: a cache (data.cache_dir) is written to.
_OF_A_FOLDER = (
    *SUFFIXES, ".safetensors", ".jinja", "manifest.json", "config.json", "tokenizer.json", "tokenizer.model"
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class StageConfig:
    """One stage of a pipeline: `python -m experiments.COMMAND --config=CONFIG --workdir=ROOT/NAME --config.FIELD=value ...`.

    config: FILE.py[:PRESET]; empty is configs/COMMAND.py.
    fields: of the stage's own config, nested as there. A text that begins with @NAME begins with the workdir of the stage
      NAME, which then runs first.
    expect: what must hold of the result, as "A < B" or "A > FACTOR * B". A and B are numbers, or paths into the stage's
      manifest: "final_metrics.eval/loss", "report_card.accuracy.low"; "first.eval/loss" is the metric's first logged value.
      Of what is a mean over a sample (metrics of evaluate, eval/scores and eval/gold of RL) a bound of the 95 % interval
      is compared, "final_metrics.win_rate/win_rate.high", with room: a right program must not fail by chance.
    """

    command: str = ""
    config: str = ""
    title: str = ""
    fields: dict[str, Any] = dataclasses.field(default_factory=dict)
    expect: tuple[str, ...] = ()

    def __post_init__(self):
        for text in self.expect:
            check_expectation(text, self.command)

    @property
    def spec(self) -> str:
        """The config file, with its preset."""
        return self.config or f"configs/{self.command}.py"

    def parents(self) -> set[str]:
        """The stages it refers to."""
        return set(_references(self.fields))

    def flags(self, workdirs: Mapping[str, str]) -> list[str]:
        """The arguments of its command but for --workdir, references put in."""
        fields = (f"--config.{field}={substitute(value, workdirs)}" for field, value in flatten(self.fields))
        return [f"--config={self.spec}", *fields]


@dataclasses.dataclass(frozen=True)
class CompareConfig:
    """Texts that several stages' models generate after the same prompts, side by side in the report.

    stages: whose models; empty compares none. prompts_file: a jsonl file, with references; its first num_prompts are used.
    """

    stages: tuple[str, ...] = ()
    prompts_file: str = ""
    num_prompts: int = 8
    max_new_tokens: int = 48


@dataclasses.dataclass(frozen=True)
class PipelineConfig:
    """Stages by name, and which of them run.

    only: these and what they are built on; empty is all.
    """

    stages: dict[str, StageConfig] = dataclasses.field(default_factory=dict)
    only: tuple[str, ...] = ()
    compare: CompareConfig = CompareConfig()

    def __post_init__(self):
        if not self.stages:
            raise ValueError("stages is empty: a pipeline needs at least one stage.")
        for name, stage in self.stages.items():
            if not re.fullmatch(r"\w+", name):
                raise ValueError(f"The name of stage {name!r} is a folder's: letters, digits and _ alone.")
            if not stage.command:
                raise ValueError(f"stages.{name}.command is missing: the experiments.COMMAND that the stage runs.")
            for parent in stage.parents():
                self._check_known(parent, f"stages.{name}.fields refers to @{parent}")
        for field, names in (("only", self.only), ("compare.stages", self.compare.stages)):
            for name in names:
                self._check_known(name, f"{field} names {name!r}")
        self.order()

    def _check_known(self, name: str, what: str) -> None:
        if name not in self.stages:
            nearest = difflib.get_close_matches(name, self.stages, n=1, cutoff=0.0)[0]
            raise ValueError(f"{what}, but there is no such stage; the nearest is {nearest!r}.")

    def order(self) -> list[str]:
        """The stages that run, parents first, else as they are written; ValueError for a circle."""
        done: list[str] = []

        def visit(name: str, above: tuple[str, ...]) -> None:
            if name in above:
                raise ValueError(f"The stages {' -> '.join((*above[above.index(name) :], name))} wait for each other.")
            if name not in done:
                for parent in sorted(self.stages[name].parents(), key=list(self.stages).index):
                    visit(parent, (*above, name))
                done.append(name)

        for name in self.only or self.stages:
            visit(name, ())
        return done


def substitute(value: Any, workdirs: Mapping[str, str]) -> Any:
    """The value with the "@NAME" that its texts begin with replaced by that stage's workdir."""
    if isinstance(value, Mapping):
        return {key: substitute(item, workdirs) for key, item in value.items()}
    if isinstance(value, str):
        match = _REFERENCE.match(value)
        return workdirs[match[1]] + value[match.end() :] if match else value
    if isinstance(value, list | tuple):
        return type(value)(substitute(item, workdirs) for item in value)
    return value


def _references(value: Any) -> list[str]:
    return [match[1] for text in _texts(value) if (match := _REFERENCE.match(text))]


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping | list | tuple):
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from _texts(item)


def key(values: Mapping[str, Any], stage: StageConfig, parents: Mapping[str, str]) -> str:
    """What decides whether a finished stage is still the one that is asked for: sha256 (hex).

    Args:
      values: what the stage's config file gives.
      stage: its own fields, and its command.
      parents: name -> manifest digest.

    Files that a text names (itself, as a pattern, or as the folder of a corpus, a run or a checkpoint) count with their size
    and time of change, but for those in parents' workdirs.
    """
    files = {}
    for text in _texts([values, stage.fields]):
        if not _references(text):
            for path in matching_files(text, _OF_A_FOLDER):
                status = os.stat(path)
                files[path] = [status.st_size, status.st_mtime_ns]
    content = [stage.command, stage.spec, values, stage.fields, dict(parents), files]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
