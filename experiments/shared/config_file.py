"""Config files: Python with get_config() or get_config(preset), as nested plain dicts in which references still refer."""

import inspect
import os
import traceback
import types
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict, FieldReference

from experiments.shared.errors import ROOT, raised_in

_DEEPEST = 50  # sections in sections; a section that stands in itself has no end


def read_config(spec: str) -> dict:
    """What the config file of `path.py` or `path.py:preset` gives, as nested dicts.

    A FieldReference stays one, so that what is computed from a field follows when the field is set (see `resolved`), and a
    section that stands in two places is one dict. configs/... means the project's where there is no such file here.

    Raises:
      ValueError: naming the file, and the line where that is known, for a file that is missing or fails.
    """
    path, _, preset = spec.partition(":")
    found = _find(path)
    get_config = _load_module(found, path)
    parameters = _called(found, path, lambda: inspect.signature(get_config).parameters)
    if preset and not parameters:
        raise ValueError(f"--config: {path} has no presets, so {preset!r} is none of them; leave out :{preset}.")
    config = _called(found, path, lambda: get_config(preset) if preset else get_config())
    if not isinstance(config, Mapping | ConfigDict):
        raise ValueError(
            f"--config: get_config() of {path} returns {'None' if config is None else type(config).__name__}, not a "
            "ConfigDict or a dict."
        )
    _check_depth(config, path)
    return _plain(config, {})


def resolved(values: Any, path: str = "", *, may_lack: bool = False) -> Any:
    """The nested values with every reference replaced by what it now refers to.

    Raises ValueError naming a field without value; with may_lack it is None.
    """
    if isinstance(values, dict):
        return {
            key: resolved(value, f"{path}.{key}" if path else str(key), may_lack=may_lack)
            for key, value in values.items()
        }
    if not isinstance(values, FieldReference):
        return values
    try:
        value = values.get()
    except Exception as error:
        if may_lack:
            return None
        said = " ".join(str(error).split()).rstrip(".") or type(error).__name__
        what = "is required, and has no value" if "required" in said.lower() else f"cannot be computed ({said})"
        raise ValueError(f"The config field {path} {what}; set it with --config.{path}=VALUE.") from error
    return resolved(_plain(value, {}), path, may_lack=may_lack) if isinstance(value, Mapping | ConfigDict) else value


def _find(path: str) -> str:
    ours = os.path.join(ROOT, path)
    if not os.path.isfile(path) and path.split(os.sep)[0] == "configs" and os.path.isfile(ours):
        return ours
    if not os.path.isfile(path):
        folder = os.path.dirname(path) or "."
        there = sorted(f for f in os.listdir(folder) if f.endswith(".py")) if os.path.isdir(folder) else []
        raise ValueError(f"--config: there is no file {path!r}; {folder} holds {', '.join(there) or 'no configs'}.")
    return path


def _load_module(found: str, path: str) -> Any:
    """The file's get_config. Not by importlib, which would leave byte code beside a file that somebody else may own."""
    if not found.endswith(".py"):
        raise ValueError(f"--config: {path} is not a Python file.")
    with open(found, "rb") as file:
        source = file.read()
    module = types.ModuleType(f"config_{os.path.splitext(os.path.basename(found))[0]}")
    module.__file__ = found
    _called(found, path, lambda: exec(compile(source, found, "exec"), module.__dict__))
    get_config = getattr(module, "get_config", None)
    if not callable(get_config):
        raise ValueError(f"--config: {path} has no function get_config().")
    return get_config


def _called(found: str, path: str, function: Any) -> Any:
    """What code of a config file returns; what it raises as a ValueError with the line."""
    try:
        return function()
    except SyntaxError as error:
        raise ValueError(f"--config: {path}, line {error.lineno}: {error.msg}.") from error
    except (Exception, SystemExit) as error:
        if isinstance(error, ValueError) and raised_in(error) == found:
            raise ValueError(str(error)) from error  # the file's own words, such as that it has no such preset
        frames = traceback.extract_tb(error.__traceback__)
        lines = [frame.lineno for frame in frames if frame.filename == found]
        place = f"{path}, line {lines[-1]}" if lines else path
        said = f": {' '.join(str(error).split()).rstrip('.')}" if str(error) else ""
        hint = " (a plain dict may have dots in its names)" if "ConfigDict does not accept dots" in said else ""
        raise ValueError(f"--config: {place}: {type(error).__name__}{said}{hint}.") from error


def _check_depth(section: Any, path: str, *names: str) -> None:
    if len(names) > _DEEPEST:
        raise ValueError(f"--config: {path}: {'.'.join(names[:3])}... is nested too deeply, or stands in itself.")
    is_config = isinstance(section, ConfigDict)
    for key, value in section.items(preserve_field_references=True) if is_config else section.items():
        if isinstance(value, Mapping | ConfigDict):
            _check_depth(value, path, *names, str(key))


def _plain(section: Any, seen: dict[int, dict]) -> dict:
    """Nested dicts of nested ConfigDicts or mappings; one that stands in two places becomes one dict."""
    if id(section) not in seen:
        seen[id(section)] = plain = {}
        is_config = isinstance(section, ConfigDict)
        for key, value in section.items(preserve_field_references=True) if is_config else section.items():
            is_reference = isinstance(value, FieldReference)
            content = _content(value) if is_reference else value
            plain[key] = _plain(content, seen) if isinstance(content, Mapping | ConfigDict) else value
    return seen[id(section)]


def _content(reference: FieldReference) -> Any:
    try:
        return reference.get()
    except Exception:  # it may get a value yet
        return None
