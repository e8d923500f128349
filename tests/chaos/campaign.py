"""What the campaigns share: their flags, workers that are forks, and one table of counts at the end."""

import argparse
import json
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple, NoReturn

from tests.chaos import forks
from tests.chaos.world import NAMES_OF_COMMANDS, World


class Case(NamedTuple):
    """One attempt: what it was done to, what was done, what came of it (`ok`, or what is wrong), and how to see it again."""

    subject: str
    what: str
    result: str = "ok"
    detail: str = ""


def flags(description: str, count: str, default: int) -> argparse.Namespace:
    """The command line of a campaign; count: the name of the flag that says how many attempts are made."""
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    parser.add_argument(f"--{count}", dest="count", type=int, default=default, help="attempts over all commands")
    parser.add_argument("--seed", type=int, default=0, help="decides which; the same seed makes the same attempts")
    parser.add_argument("--commands", default=",".join(NAMES_OF_COMMANDS), help="names, with commas between")
    parser.add_argument("--workers", type=int, default=2, help="processes at the same time")
    parser.add_argument("--keep", action="store_true", help="keep the folders")
    options = parser.parse_args()
    options.commands = [name for name in options.commands.split(",") if name]
    for name in options.commands:
        if name not in NAMES_OF_COMMANDS:
            parser.error(f"there is no command {name!r}; there are {', '.join(NAMES_OF_COMMANDS)}")
    return options


def run(
    title: str, options: argparse.Namespace, attempts: Callable[[World], Sequence[Callable[[], list[Case]]]]
) -> NoReturn:
    """Make the world, do the attempts in `options.workers` forks, print the table, and exit 1 where any has failed.

    attempts: world -> calls; those of one worker come one after the other, call k in worker k modulo their number, but
    calls that share a `subject` attribute stay together.
    """
    started = time.monotonic()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that nothing is left, here and in the workers
    root = tempfile.mkdtemp(prefix="chaos-")
    try:
        forks.prepare()
        world = World(root)
        world.make(options.commands)
        print(f"{title}: {len(world.facts)} commands undisturbed in {time.monotonic() - started:.0f} s", flush=True)
        cases = _in_workers(attempts(world), options.workers, root)
    finally:
        if not options.keep:
            shutil.rmtree(root, ignore_errors=True)
    failed = report(title, cases, time.monotonic() - started)
    sys.exit(1 if failed or not cases else 0)


def _in_workers(calls: Sequence[Callable[[], list[Case]]], count: int, root: str) -> list[Case]:
    workers = []
    for worker in range(count):
        path = os.path.join(root, f"worker-{worker}.jsonl")
        pid = os.fork()
        if not pid:
            code = 1
            try:
                with open(path, "w") as file:
                    for one in calls[worker::count]:
                        for case in one():
                            file.write(json.dumps(case) + "\n")
                            file.flush()
                code = 0
            finally:
                os._exit(code)
        workers.append((pid, path))
    cases = []
    for i, (pid, path) in enumerate(workers):
        try:
            code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        except BaseException:
            for other, _ in workers[i:]:
                os.kill(other, signal.SIGTERM)
                os.waitpid(other, 0)
            raise
        with open(path) as file:
            cases += [Case(*json.loads(line)) for line in file]
        if code:
            cases.append(Case("campaign", "worker", f"ended with {code}"))
    return cases


def report(title: str, cases: Sequence[Case], seconds: float) -> int:
    """Print what failed and the table; returns how many failed."""
    failed = [case for case in cases if case.result != "ok"]
    for case in failed:
        print(f"FAILED {case.subject}: {case.what}: {case.result}\n    {case.detail}".rstrip())
    subjects = list(dict.fromkeys(case.subject for case in cases))
    width = max([len(name) for name in subjects] + [8])
    print(f"\n{title}\n{'':{width}}  attempts  failed")
    for name in subjects:
        of_it = [case for case in cases if case.subject == name]
        print(f"{name:{width}}  {len(of_it):8}  {sum(case.result != 'ok' for case in of_it):6}")
    print(f"{'all':{width}}  {len(cases):8}  {len(failed):6}   in {seconds:.0f} s", flush=True)
    return len(failed)
