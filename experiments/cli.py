"""What every stage's command shares: --config with overrides, --workdir, --print_config, and errors a user can act on."""

import importlib.util
import json
import os
import sys
from collections.abc import Callable
from typing import Any, TypeVar

from absl import app, flags, logging
from ml_collections import ConfigDict

from jaxgpt import config as config_lib
from jaxgpt import partition

T = TypeVar("T")

_CONFIG = flags.DEFINE_string("config", None, "Config file, with a preset after a colon: configs/pretrain.py:tiny.")
_WORKDIR = flags.DEFINE_string("workdir", None, "Where the run's files go; the same command again resumes.")
_PRINT = flags.DEFINE_bool("print_config", False, "Print the resolved config as JSON and exit.")
flags.DEFINE_string(
    "config.FIELD", None, "Override one field of the config, e.g. --config.optimizer.learning_rate=1e-3."
)


def run(
    main: Callable[[T, str], None], config_cls: type[T], *, default_config: str, needs_workdir: bool = True
) -> None:
    """Parse the command line, build `config_cls` and call main(config, workdir) within absl's app.

    A ValueError anywhere is a user's mistake: one sentence on stderr, exit code 2. Several processes (launch.local, a
    TPU pod) are joined before main. A run that diverged (FloatingPointError) ends with its sentence and exit code 1.
    """
    overrides: list[tuple[str, str]] = []

    def parse_flags(argv: list[str]) -> list[str]:
        try:
            rest, found = split_overrides(argv)
            overrides.extend(found)
            positional = flags.FLAGS(rest)
            if positional[1:]:
                raise ValueError(f"Unexpected argument {positional[1]!r}; fields are set as --config.a.b=value.")
        except (flags.Error, ValueError) as error:
            _fail(error)
        return positional

    def start(_) -> None:
        if not flags.FLAGS["verbosity"].present:
            logging.set_verbosity(logging.WARNING)
        try:
            config = load_config(_CONFIG.value or default_config, overrides, config_cls)
            if _PRINT.value:
                print(json.dumps(config_lib.to_dict(config), indent=2))
                return
            if needs_workdir and not _WORKDIR.value:
                raise ValueError("--workdir=DIR is required: the folder for the run's files.")
            partition.start_distributed()
            main(config, _WORKDIR.value or "")
        except ValueError as error:
            if not _is_ours(error):
                raise
            _fail(error)
        except FloatingPointError as error:
            print(f"error: {error}", file=sys.stderr, flush=True)
            sys.exit(1)

    app.run(start, flags_parser=parse_flags)


def split_overrides(argv: list[str]) -> tuple[list[str], list[tuple[str, str]]]:
    """Argv without the --config.a.b=value arguments, and those as (field, value) pairs."""
    rest, overrides = argv[:1], []
    arguments = iter(argv[1:])
    for argument in arguments:
        name = argument.lstrip("-")
        if not (argument.startswith("-") and name.startswith("config.")):
            rest.append(argument)
            continue
        name, equals, value = name.removeprefix("config.").partition("=")
        if not equals:
            value = next(arguments, None)
            if value is None:
                raise ValueError(f"--config.{name} needs a value: --config.{name}=VALUE.")
        overrides.append((name, value))
    return rest, overrides


def load_config(spec: str, overrides: list[tuple[str, str]], config_cls: type[T]) -> T:
    """The config of a file (`path.py` or `path.py:preset`) with overrides, as a validated `config_cls`."""
    values = plain_config(spec)
    for field, text in overrides:
        config_lib.override(values, config_cls, field, text)
    return config_lib.build(config_cls, values)


def plain_config(spec: str) -> dict:
    """What a config file gives, as nested dicts."""
    path, _, preset = spec.partition(":")
    if not os.path.isfile(path):
        folder = os.path.dirname(path) or "."
        there = sorted(f for f in os.listdir(folder) if f.endswith(".py")) if os.path.isdir(folder) else []
        raise ValueError(f"--config: there is no file {path!r}; {folder} holds {', '.join(there) or 'no configs'}.")
    return _to_plain(_load_module(path).get_config(preset) if preset else _load_module(path).get_config())


def _load_module(path: str) -> Any:
    name = os.path.splitext(os.path.basename(path))[0]
    spec = importlib.util.spec_from_file_location(f"config_{name}", path)
    if spec is None or spec.loader is None:
        raise ValueError(f"--config: {path} is not a Python file.")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except SyntaxError as error:
        raise ValueError(f"--config: {path}, line {error.lineno}: {error.msg}.") from error
    if not hasattr(module, "get_config"):
        raise ValueError(f"--config: {path} has no get_config().")
    return module


def _to_plain(config: ConfigDict) -> dict:
    return {k: _to_plain(v) if isinstance(v, ConfigDict) else v for k, v in config.items()}


def _is_ours(error: Exception) -> bool:
    """Whether the project itself raised it, for the user; anything else is a bug and keeps its traceback."""
    frame = error.__traceback__
    while frame is not None and frame.tb_next is not None:
        frame = frame.tb_next
    source = frame.tb_frame.f_code.co_filename if frame is not None else ""
    return any(os.path.abspath(source).startswith(os.path.join(_ROOT, part, "")) for part in _PARTS)


_ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
_PARTS = ("jaxgpt", "experiments", "configs")


def _fail(error: Exception) -> None:
    print(f"error: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
    sys.exit(2)
