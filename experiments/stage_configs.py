"""The configs of a pipeline's stages, built before any of them runs, so that a mistake in the last is said at once."""

import difflib
import functools
import importlib
import importlib.util
import os
import pkgutil
import typing
from collections.abc import Mapping
from typing import Any

import experiments
from experiments import cli
from experiments.errors import ROOT
from jaxgpt.data.sources import resolve_paths
from jaxgpt.pipeline.graph import PipelineConfig, StageConfig

_FILES = ("data.train", "data.eval", "prompts_file")
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
        for field in (*_FILES, *_FOLDERS):
            _check_path(config, field, folders)
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


def _check_path(config: Any, field: str, folders: Mapping[str, str]) -> None:
    """ValueError for a path of the user's that is not there; what stages are yet to write is left alone."""
    value = config
    for name in field.split("."):
        value = getattr(value, name, None)
    paths = [value] if isinstance(value, str) else list(value) if isinstance(value, tuple) else []
    for path in paths:
        if not path or any(path == folder or path.startswith(f"{folder}{os.sep}") for folder in folders.values()):
            continue
        if field in _FILES:
            resolve_paths(path, field)
        elif not os.path.exists(path):
            raise ValueError(f"{field}={path!r} does not exist.")
