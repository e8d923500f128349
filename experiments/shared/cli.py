"""What every stage's command shares: --config with overrides, --workdir, --print_config, and errors a user can act on."""

import json
import os
import select
import sys
from collections.abc import Callable
from typing import Any, NoReturn, TypeVar

from absl import app, flags, logging

from experiments.shared import errors, signals
from experiments.shared.config_file import read_config, resolved
from jaxgpt import config as config_lib
from jaxgpt import partition

T = TypeVar("T")

_UNREAD = 128 + 13  # what a shell shows of a command that SIGPIPE ended

_CONFIG = flags.DEFINE_string("config", None, "Config file, with a preset after a colon: configs/pretrain.py:tiny.")
_WORKDIR = flags.DEFINE_string("workdir", None, "Where the run's files go; the same command again resumes.")
_PRINT = flags.DEFINE_bool("print_config", False, "Print the resolved config as JSON and exit.")
_PREEMPTED_EXIT_CODE = flags.DEFINE_integer(
    "preempted_exit_code", signals.PREEMPTED, "Exit code after SIGTERM, once everything is saved."
)
flags.DEFINE_string(
    "config.FIELD", None, "Override one field of the config, e.g. --config.optimizer.learning_rate=1e-3."
)


def run(
    main: Callable[[T, str], None], config_cls: type[T], *, default_config: str, needs_workdir: bool = True
) -> None:
    """Parse the command line, build `config_cls` and call main(config, workdir) within absl's app.

    A user's mistake, or what the environment does not give (disk, permission, memory), is one sentence on stderr and exit
    code 2; see errors.py. Several processes (launch.local, a TPU pod) are joined before main. A run that diverged
    (FloatingPointError) ends with its sentence and exit code 1, and one that a signal stopped as signals.py says.
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
            _fail(str(error))
        return positional

    def start(_) -> None:
        if not flags.FLAGS["verbosity"].present:
            logging.set_verbosity(logging.WARNING)
            logging.get_absl_logger().addFilter(errors.is_news)
        try:
            config = load_config(_CONFIG.value or default_config, overrides, config_cls)
            if _PRINT.value:
                print(json.dumps(config_lib.to_dict(config), indent=2), flush=True)
                return
            if needs_workdir and not _WORKDIR.value:
                raise ValueError("--workdir=DIR is required: the folder for the run's files.")
            partition.start_distributed()
            main(config, _WORKDIR.value or "")
            sys.stdout.flush()
        except BrokenPipeError:
            if not _is_unread():
                raise
            sys.exit(_UNREAD)
        except FloatingPointError as error:
            print(f"error: {error}", file=sys.stderr, flush=True)
            sys.exit(1)
        except Exception as error:
            said = errors.sentence(error, _WORKDIR.value or "")
            if said is None:
                raise
            if not isinstance(error, ValueError):
                _leave_at_once(said)
            _fail(said)

    sys.unraisablehook = _report_unraisable
    with signals.one_sentence(lambda: _PREEMPTED_EXIT_CODE.value):
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
    """The config of a file (`path.py` or `path.py:preset`) with overrides, as a validated `config_cls`.

    Raises:
      ValueError: also where the file, or the overrides, set num_train_steps and num_epochs both.
    """
    values = read_config(spec)
    config_lib.check_exclusive(dict(config_lib.flatten(values)), spec)
    config_lib.check_exclusive(dict(overrides), "The command line")
    for field, text in overrides:
        config_lib.override(values, config_cls, field, text)
    return config_lib.build(config_cls, resolved(values))


def plain_config(spec: str) -> dict:
    """What a config file gives, as nested dicts; None for what has no value before fields are set."""
    return resolved(read_config(spec), may_lack=True)


def _report_unraisable(unraisable: Any) -> None:
    """Print an error that nobody can catch, as Python does, but for what follows a read or write that failed.

    Where one of a checkpoint's fails, TensorStore's others still report to an event loop that orbax has closed.
    """
    error = unraisable.exc_value
    if not (isinstance(error, RuntimeError) and str(error) == "Event loop is closed"):
        sys.__unraisablehook__(unraisable)


def _leave_at_once(sentence: str) -> NoReturn:
    """Say what the disk or the memory does not give and end the process, without its threads.

    orbax's may wait for ever for a write that has failed, and the interpreter waits for them at its end.
    """
    print(f"error: {sentence}", file=sys.stderr, flush=True)
    sys.stdout.flush()
    os._exit(2)


def _is_unread() -> bool:
    """Whether nobody reads stdout any more, as in `... | head`; it then leads nowhere, so that the end of Python is quiet."""
    poll = select.poll()
    poll.register(sys.stdout.fileno(), 0)
    is_unread = any(event & select.POLLERR for _, event in poll.poll(0))
    if is_unread:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return is_unread


def _fail(said: str) -> None:
    print(f"error: {' '.join(said.split())}", file=sys.stderr, flush=True)
    sys.exit(2)
