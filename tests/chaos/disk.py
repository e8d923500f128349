"""The disk: it is full, read-only or broken from the n-th file operation on; with the disk well again, the same result.

    python -m tests.chaos.disk [--faults=60] [--seed=0] [--commands=pretrain,sft] [--workers=2]

A layer under Python's file operations raises ENOSPC (until the end), EROFS (until the end) or EIO (once). Where root may
mount one, a tiny tmpfs is filled, too, which also meets what is written from C++. The command ends with exit code 2 and one
sentence, without a traceback and without a manifest of what is not there; run again, it ends as an undisturbed one.
"""

import functools
import os
import random
import re
import shutil
import subprocess
from collections.abc import Callable, Sequence

from tests.chaos import campaign, forks
from tests.chaos.campaign import Case
from tests.chaos.faults import Fault
from tests.chaos.kills import places
from tests.chaos.world import World, difference, facts

ERRORS = ("ENOSPC", "EROFS", "EIO")
FILLED = ("tokenizer", "pretrain", "sft", "finalize")
SHARES = (0.3, 0.6, 0.9)  # of the room that the command needs
_DRAWN = (".png", "report.html")


def check(world: World, name: str, done: forks.Outcome) -> list[str]:
    """What is wrong with the end of a command whose disk has failed it."""
    expected = world.facts[name]
    if done.code == 0:  # what failed was not needed; of the report that is said
        changed = difference(expected, facts(world.case(name)))
        if "could not be written" in done.err:
            changed = [line for line in changed if not line.split()[0].endswith((*_DRAWN, ".tmp", "plots"))]
        return changed
    lines = [line for line in done.err.splitlines() if line.startswith("error: ")]
    if len(lines) == 2 and re.fullmatch(r"error: the stage \w+ ended with exit code 2, unfinished\.", lines[1]):
        lines.pop()  # a pipeline's, behind the sentence of its stage
    problems = []
    if done.code != 2:
        problems.append(f"exit code {done.code}: {done.error}"[:300])
    if "Traceback" in done.err:
        problems.append("a traceback")
    if done.code == 2 and len(lines) != 1:
        problems.append(f"{len(lines)} sentences")
    if os.path.exists(os.path.join(world.case(name), "run", "manifest.json")):
        changed = [line for line in difference(expected, facts(world.case(name))) if "temporary" not in line]
        if not all(line.split()[0].endswith(_DRAWN) or ".tmp" in line for line in changed):
            problems.append(f"a manifest, but {'; '.join(changed)}")
    return problems


def again(world: World, name: str) -> list[str]:
    """What is wrong with the command's next run, on a disk that is well."""
    done = world.run(name)
    if done.code:
        return [f"again: exit code {done.code}: {done.error}"[:300]]
    return [f"again: {line}" for line in difference(world.facts[name], facts(world.case(name)))]


def attempt(world: World, name: str, count: int, rng: random.Random) -> list[Case]:
    """`count` faults of the layer in one command."""
    cases = []
    for i, at in enumerate(places(world.operations[name], count, rng) if count else ()):
        fault = Fault(ERRORS[(i + len(name)) % len(ERRORS)], at)
        world.clear(name)
        done = world.run(name, fault)
        problems = check(world, name, done) + again(world, name)
        cases.append(Case(name, f"{fault.kind} at operation {at}", "; ".join(problems) or "ok", done.err[-600:]))
    return cases


def fill(world: World, name: str) -> list[Case]:
    """The command on a tmpfs that is too small, and again on one that is not; nothing where none can be mounted."""
    case, cases = world.case(name), []
    world.clear(name)
    world.run(name)
    needed = sum(os.path.getsize(os.path.join(folder, f)) for folder, _, files in os.walk(case) for f in files)
    for share in SHARES:
        shutil.rmtree(case, ignore_errors=True)
        os.makedirs(case)
        if subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={int(share * needed)}", "tmpfs", case], check=False,
                          stderr=subprocess.DEVNULL).returncode:  # fmt: skip
            return cases
        try:
            done = world.run(name)
            problems = check(world, name, done)
            subprocess.run(["mount", "-o", "remount,size=64m", case], check=True)
            problems += again(world, name)
        finally:
            subprocess.run(["umount", "-l", case], check=True)
        cases.append(
            Case(name, f"a disk of {share:.0%} of what it needs", "; ".join(problems) or "ok", done.err[-600:])
        )
    return cases


def attempts(world: World, commands: Sequence[str], count: int, seed: int) -> list[Callable[[], list[Case]]]:
    """One call for each command, with its share of the faults; and one for each that has its disk filled."""
    share, rest = divmod(count, len(commands))

    def both(name: str, faults: int) -> list[Case]:
        found = attempt(world, name, faults, random.Random(f"{seed} {name}"))
        return found + (fill(world, name) if name in FILLED and os.geteuid() == 0 else [])

    return [functools.partial(both, name, share + (i < rest)) for i, name in enumerate(commands)]


def main() -> None:
    """The command line."""
    options = campaign.flags(__doc__, "faults", 60)
    campaign.run(
        "Faults of the disk", options, lambda world: attempts(world, options.commands, options.count, options.seed)
    )


if __name__ == "__main__":
    main()
