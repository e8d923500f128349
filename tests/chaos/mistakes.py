"""A table of users' mistakes over all commands: each is exit code 2 and one sentence that names the place, at no cost.

    python -m tests.chaos.mistakes [--only=TEXT] [--every=N] [--untimed] [--list]

A command is a fork of this process, which has imported everything and has not started jax. A mistake fails the campaign where
its command does not exit with 2, says anything but one line on stderr that begins with "error: ", does not name what the
table says it must, leaves a file behind, or takes more than two seconds of CPU time. It prints counts, and exits with 1 where
any has failed.
"""

import argparse
import collections
import functools
import importlib
import os
import shutil
import signal
import sys
import tempfile
import time
import warnings
from typing import Any, NamedTuple

from tests.chaos.forks import finish, run_stage

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
CPU_SECONDS = 2.0  # after imports
TIMEOUT_SECONDS = 60.0
COMMANDS = (
    "tokenizer", "pretrain", "sft", "reward", "ppo", "grpo", "dpo", "best_of_n", "finalize", "generate", "chat", "serve",
    "evaluate", "import_hf", "export_hf", "pipeline", "sweep", "benchmark", "make_data",
)  # fmt: skip


class Outcome(NamedTuple):
    """How a command ended: its exit code (None where it hung), what it said, and its CPU time in seconds."""

    code: int | None
    out: str
    err: str
    seconds: float


def prepare() -> None:
    """Import all commands, and set what jax reads when it starts; nothing may have started it."""
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=1 --xla_backend_optimization_level=0"
    os.environ["TQDM_DISABLE"] = "1"
    for name in COMMANDS:
        importlib.import_module(f"experiments.{name}")
    for name in ("array_record.python.array_record_module", "tokenizers"):
        importlib.import_module(name)
    warnings.filterwarnings("ignore", message=r".*found in sys\.modules after import")
    warnings.filterwarnings("ignore", message=r"os\.fork\(\) was called|.*is multi-threaded, use of fork")


def run(stage: str, arguments: list[str], folder: str = ROOT) -> Outcome:
    """Run `python -m experiments.STAGE` in a fork, in a folder."""
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        sys.stdout.flush()
        pid = os.fork()
        if not pid:
            os.setsid()
            null = os.open(os.devnull, os.O_RDONLY)
            for source, target in ((null, 0), (out.fileno(), 1), (err.fileno(), 2)):
                os.dup2(source, target)
            os.chdir(folder)
            finish(functools.partial(run_stage, stage, arguments))
        code, seconds = _wait(pid)
        said = []
        for file in (out, err):
            file.seek(0)
            said.append(file.read().decode(errors="replace"))
        return Outcome(code, said[0], said[1], seconds)


def _wait(pid: int) -> tuple[int | None, float]:
    end = time.monotonic() + TIMEOUT_SECONDS
    while True:
        done, status, usage = os.wait4(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status), usage.ru_utime + usage.ru_stime
        if time.monotonic() > end:
            os.killpg(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            return None, TIMEOUT_SECONDS
        time.sleep(0.005)


def listing(folder: str) -> dict[str, tuple[int, int]]:
    """Each path below a folder, with its size and time of change."""
    found = {}
    for path, folders, files in os.walk(folder):
        for name in (*folders, *files):
            status = os.lstat(os.path.join(path, name))
            is_folder = name in folders
            found[os.path.join(path, name)] = (0, 0) if is_folder else (status.st_size, status.st_mtime_ns)
    return found


def judge(outcome: Outcome, words: tuple[str, ...], before: dict, after: dict) -> str:
    """What is wrong with how a mistake was answered; empty where nothing is."""
    lines = outcome.err.splitlines()
    if outcome.code is None:
        return "hang"
    if "Traceback (most recent call last)" in outcome.err:
        return "traceback"
    if outcome.code != 2:
        return f"exit code {outcome.code}"
    if len(lines) != 1 or not lines[0].startswith("error: "):
        return "not one sentence"
    if not lines[0].endswith((".", "?")) or len(lines[0]) > 1000:
        return "not a sentence"
    missing = [word for word in words if word not in lines[0]]
    if missing:
        return f"does not name {missing[0]}"
    if before != after:
        changed = sorted(path for path in before.keys() | after.keys() if before.get(path) != after.get(path))
        return f"left {os.path.basename(changed[0])} behind"
    return ""


def campaign(root: str, every: int = 1, only: str = "") -> list[tuple[Any, Outcome, str]]:
    """Run the mistakes of the table whose names contain `only`, every N-th of them; returns (mistake, outcome, verdict)."""
    from tests.chaos.mistake_table import World, mistakes

    world = World(root)
    found = []
    for mistake in [m for m in mistakes(world) if only in m.name][::every]:
        folder = world.fresh()
        arguments = mistake.arguments(folder)
        before = listing(folder)
        outcome = run(mistake.stage, arguments, folder)
        found.append((mistake, outcome, judge(outcome, mistake.words, before, listing(folder))))
    return found


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", default="", help="those whose names contain this text")
    parser.add_argument("--every", type=int, default=1, help="every N-th mistake of the table")
    parser.add_argument("--untimed", action="store_true", help="do not judge how long they take")
    parser.add_argument("--list", action="store_true", help="print every sentence")
    options = parser.parse_args()
    prepare()
    root = tempfile.mkdtemp()  # not a TemporaryDirectory, which a fork would remove at its end
    try:
        results = campaign(root, options.every, options.only)
    finally:
        shutil.rmtree(root, ignore_errors=True)
    counts: dict[str, collections.Counter] = collections.defaultdict(collections.Counter)
    for mistake, outcome, verdict in results:
        if not options.untimed and not verdict and outcome.seconds > CPU_SECONDS and not mistake.is_late:
            verdict = f"took {outcome.seconds:.1f} s of CPU time"
        counts[mistake.stage][verdict.split()[0] if verdict else "one sentence"] += 1
        if verdict or options.list:
            said = (outcome.err.strip().splitlines() or ["(nothing)"])[-1]
            print(f"{'FAILED' if verdict else 'ok'} {mistake.name}: {verdict or ''} [{outcome.seconds:.1f} s] {said}")
    print("\nstage        mistakes  one sentence  else")
    for stage, count in sorted(counts.items()):
        other = ", ".join(f"{n} {what}" for what, n in count.items() if what != "one sentence")
        print(f"{stage:12} {count.total():8}  {count['one sentence']:12}  {other or '-'}")
    good = sum(count["one sentence"] for count in counts.values())
    print(f"{good} of {len(results)} mistakes: exit code 2, one sentence that names the place, nothing left, in time.")
    sys.exit(0 if good == len(results) and results else 1)


if __name__ == "__main__":
    main()
