"""What the launchers share: options, the command after --, and the exit codes to start again on."""

import argparse
import difflib
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from typing import NoReturn

import yaml

PREEMPTED, INTERRUPTED = 42, 130  # exit codes of commands that a signal stopped, and that have saved
# What a new start does not change: done, diverged, a mistake, no such command, Ctrl-C. All else is
# started again: a preempted run, one that the kernel or a lost host ended, and those that jax ended
# (134) because another one was lost.
FINAL = (0, 1, 2, 126, 127, INTERRUPTED)
RESTARTED = (PREEMPTED, 134, 135, 137, 139, 143)  # the same for schedulers that want these named

EXAMPLE = "python -m experiments.pretrain --config=... --workdir=..."


class Parser(argparse.ArgumentParser):
    """Options of `python -m launch.NAME`; a mistake is one sentence on stderr and exit code 2."""

    def __init__(self, name: str, description: str):
        usage = f"python -m launch.{name} [options] -- {EXAMPLE}"
        super().__init__(usage=usage, description=description.split("\n")[0], allow_abbrev=False)
        self.add_argument("--dry_run", action="store_true", help="print what would be run and written")

    def error(self, message: str) -> NoReturn:
        """End with the message as the only sentence."""
        fail(message)

    def parse(self, arguments: list[str]) -> tuple[argparse.Namespace, list[str]]:
        """The options, and the command after --."""
        split = arguments.index("--") if "--" in arguments else len(arguments)
        options, unknown = self.parse_known_args(arguments[:split])
        if unknown:
            names = [name for action in self._actions for name in action.option_strings]
            nearest = difflib.get_close_matches(unknown[0].partition("=")[0], names, n=1, cutoff=0)
            self.error(f"{unknown[0]} is no option of this launcher; the nearest is {nearest[0]}.")
        if not arguments[split + 1 :]:
            self.error(f"the command to run is missing: ... -- {EXAMPLE}")
        return options, arguments[split + 1 :]


def add_job_options(parser: Parser) -> None:
    """The options of every launcher that leaves this machine."""
    parser.add_argument("--name", required=True, type=job_name, help="of the job; one for each run")
    parser.add_argument(
        "--env",
        action="append",
        default=[],
        type=variable,
        metavar="NAME=VALUE",
        help="a variable for the command's environment, e.g. LIBTPU_INIT_ARGS=...; may be repeated",
    )


def add_restarts(parser: Parser) -> None:
    """--max_restarts, for what ended badly; a preemption counts where the scheduler counts it."""
    parser.add_argument("--max_restarts", type=at_least(0), default=100, help="starts after the first one")


def add_mounts(parser: Parser) -> None:
    """--mount, for launchers whose machines see a bucket as a folder."""
    parser.add_argument(
        "--mount",
        action="append",
        default=[],
        type=bucket_mount,
        metavar="gs://BUCKET:/FOLDER",
        help="a bucket as a folder; may be repeated",
    )


def add_num_slices(parser: Parser) -> None:
    """--num_slices, for launchers of TPU slices."""
    parser.add_argument("--num_slices", type=at_least(1), default=1, help="slices, joined by the data-centre network")


def job_name(text: str) -> str:
    """A name that Kubernetes, Google Cloud, gcluster (28 characters) and SLURM all take."""
    if not re.fullmatch(r"[a-z]([-a-z0-9]{0,26}[a-z0-9])?", text):
        near = re.sub("[^a-z0-9]+", "-", text.lower()).lstrip("0123456789-")[:28].strip("-")
        raise argparse.ArgumentTypeError(
            f"{text!r} must be a letter and then at most 27 small letters, digits and hyphens: {near or 'run-1'!r}"
        )
    return text


def variable(text: str) -> tuple[str, str]:
    """The name and the value of NAME=VALUE."""
    name, equals, value = text.partition("=")
    if not (equals and re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name)):
        raise argparse.ArgumentTypeError(f"{text!r} must be NAME=VALUE")
    return name, value


def at_least(least: int) -> Callable[[str], int]:
    """An argparse type: an integer that is not smaller."""

    def parse(text: str) -> int:
        if not re.fullmatch(r"-?\d+", text) or int(text) < least:
            raise argparse.ArgumentTypeError(f"{text} must be an integer of at least {least}")
        return int(text)

    return parse


def bucket_mount(text: str) -> tuple[str, str]:
    """The bucket and the folder of gs://BUCKET:/FOLDER."""
    found = re.fullmatch(r"gs://([a-z0-9][-_.a-z0-9]+)/?:(/.+)", text)
    if not found:
        raise argparse.ArgumentTypeError(f"{text!r} must be gs://BUCKET:/FOLDER")
    return found[1], found[2]


def shell(command: list[str], environment: list[tuple[str, str]]) -> str:
    """The command as one line of a shell script, with its variables."""
    words = [f"{name}={shlex.quote(value)}" for name, value in environment]
    return " ".join([*(["env", *words] if words else []), shlex.join(command)])


class _Dumper(yaml.SafeDumper):
    """YAML as people write it: a script as a block, and no references."""

    def ignore_aliases(self, data: object) -> bool:
        return True


_Dumper.add_representer(
    str,
    lambda dumper, text: dumper.represent_scalar("tag:yaml.org,2002:str", text, "|" if "\n" in text else None),
)


def to_yaml(value: dict) -> str:
    """The value as a YAML document, keys in their order."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, width=1000)


def call(command: list[str], text: str | None = None) -> int:
    """Run a tool on this terminal, with `text` as its input; returns its exit code."""
    try:
        return subprocess.run(command, input=text, text=True, check=False).returncode
    except FileNotFoundError:
        missing(command[0])


def missing(tool: str) -> NoReturn:
    """End because a tool is not installed."""
    fail(f"{tool} is not on the PATH; docs/pods.md tells where it is from, and --dry_run does without.")


def submitted(code: int, tool: str, following: list[str]) -> int:
    """The launcher's exit code once a scheduler has answered; prints how to follow the job."""
    if code:
        fail(f"{tool} took no job (exit code {code}); nothing was started.")
    print("Follow it with:", *following, sep="\n    ", flush=True)
    return 0


def fail(sentence: str) -> NoReturn:
    """One sentence on stderr, and exit code 2."""
    print(f"error: {sentence}", file=sys.stderr, flush=True)
    sys.exit(2)
