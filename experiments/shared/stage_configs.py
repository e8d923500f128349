"""The configs of a pipeline's stages, built before any of them runs, so that a mistake in the last is said at once."""

import difflib
import functools
import importlib
import importlib.util
import os
import pkgutil
import typing
from collections.abc import Iterator, Mapping
from typing import Any

import experiments
from experiments.shared import cli
from experiments.shared.errors import ROOT
from jaxgpt.data.sources import resolve_paths
from jaxgpt.pipeline.graph import PipelineConfig, StageConfig
from jaxgpt.rewards.functions import file_and_function

_FILES = ("data.train", "data.eval", "prompts_file", "score")
_FOLDERS = ("init_from", "reward_model", "gold_model", "baseline", "data.tokenizer", "source")


def check_stages(pipeline: PipelineConfig, folders: Mapping[str, str]) -> None:
    """ValueError naming the first stage, of those that run, whose command, config file, fields or own files are wrong."""
    for name in pipeline.order():
        check_stage(f"stages.{name}", pipeline.stages[name], folders)


def check_stage(where: str, stage: StageConfig, folders: Mapping[str, str]) -> None:
    """ValueError where a stage could not begin; what is in the workdirs `folders` of its parents is not known yet."""
    cls = config_class(stage.command, where)
    flags = [flag.removeprefix("--config.").split("=", 1) for flag in stage.flags(folders)[1:]]
    try:
        config = cli.load_config(stage.spec, [(field, value) for field, value in flags], cls)
        if hasattr(config, "check_complete"):
            config.check_complete()
        for field, value, is_data in _paths(config):
            _check_path(field, value, is_data, folders)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


@functools.cache
def config_class(command: str, where: str = "command") -> Any:
    """The config dataclass of `python -m experiments.COMMAND`; ValueError naming the nearest command."""
    commands = [module.name for module in pkgutil.iter_modules(experiments.__path__)]
    main = getattr(importlib.import_module(f"experiments.{command}"), "main", None) if command in commands else None
    if main is None:
        known = [name for name in commands if os.path.isfile(os.path.join(ROOT, "configs", f"{name}.py"))]
        nearest = difflib.get_close_matches(command, known, n=1, cutoff=0.0)[0]
        raise ValueError(f"{where}.command={command!r} is no command; the nearest is {nearest!r}.")
    return typing.get_type_hints(getattr(main, "func", main))["config"]


def _paths(config: Any) -> Iterator[tuple[str, str | tuple[str, ...], bool]]:
    """(field, paths, whether they are files of data) of all that a config names on the disk."""
    for field in (*_FILES, *_FOLDERS):
        value = functools.reduce(lambda section, name: getattr(section, name, None), field.split("."), config)
        if isinstance(value, Mapping):
            yield from ((f"{field}.{name}.path", source.path, True) for name, source in value.items())
        elif isinstance(value, str | tuple):
            yield field, value, field in _FILES
    tasks = getattr(config, "tasks", {})
    for label, task in tasks.items():
        yield f"tasks.{label}.path", task.path, True
        yield f"tasks.{label}.shots", task.shots, True
    rewards = {field: getattr(config, field, {}) for field in ("rewards", "gold")}
    for field, sources in (rewards | {f"tasks.{label}.metrics": task.metrics for label, task in tasks.items()}).items():
        files = {label: file_and_function(source.name) for label, source in sources.items()}
        yield from ((f"{field}.{label}.name", file[0], False) for label, file in files.items() if file is not None)
    judge = getattr(config, "judge", "")
    yield "judge", (file_and_function(judge) or (judge,))[0], False
    template = getattr(config, "chat_template", "")
    if template.endswith(".jinja"):
        yield "chat_template", template, False


def _check_path(field: str, value: str | tuple[str, ...], is_data: bool, folders: Mapping[str, str]) -> None:
    """ValueError for a path of the user's that is not there; what stages are yet to write is left alone."""
    for path in [value] if isinstance(value, str) else value:
        if not path or any(path == folder or path.startswith(f"{folder}{os.sep}") for folder in folders.values()):
            continue
        if is_data:
            resolve_paths(path, field)
        elif not os.path.exists(path):
            raise ValueError(f"{field}={path!r} does not exist.")
