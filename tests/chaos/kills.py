"""Kills: a command dies at its n-th file operation, once to three times; run again, it ends as if it had been left alone.

    python -m tests.chaos.kills [--kills=200] [--seed=0] [--commands=pretrain,sft] [--workers=2]

Every command counts its renames, opens for writing, fsyncs, mkdirs and removals; each kill is SIGKILL to the process and all
that it has started, before or right after one of them. What must be equal then: metrics (without the clock's), samples,
results, config, manifest, tokenizer, weights byte by byte, the newest checkpoint array by array, and which files there are.
"""

import functools
import random
import signal
from collections.abc import Callable, Sequence

from tests.chaos import campaign
from tests.chaos.campaign import Case
from tests.chaos.faults import Fault
from tests.chaos.world import World, difference, facts


def places(total: int, count: int, rng: random.Random) -> list[int]:
    """Operations in [1, total], one drawn from each of `count` equal parts."""
    return [min(total, int(total * (k + rng.random()) / count) + 1) for k in range(count)]


def attempts(world: World, commands: Sequence[str], kills: int, seed: int) -> list[Callable[[], list[Case]]]:
    """One call for each command, with its share of the kills."""
    share, rest = divmod(kills, len(commands))
    return [
        functools.partial(attempt, world, name, share + (i < rest), random.Random(f"{seed} {name}"))
        for i, name in enumerate(commands)
    ]


def attempt(world: World, name: str, kills: int, rng: random.Random) -> list[Case]:
    """Kill a command as often as said, in trials of one to three kills; one case for each kill."""
    cases: list[Case] = []
    ats = places(world.operations[name], kills, rng) if kills else []
    rng.shuffle(ats)
    while ats:
        faults = [Fault("kill", ats.pop(), rng.random() < 0.5) for _ in range(min(len(ats), rng.choice((1, 1, 2, 3))))]
        what = ", ".join(f"operation {fault.at}{' (after)' if fault.after else ''}" for fault in faults)
        world.clear(name)
        problems = []
        for fault in faults:
            code = world.run(name, fault).code
            if code not in (-signal.SIGKILL, 0):  # 0: a run that goes on has fewer operations left
                problems.append(f"the run that was to be killed ended with {code}")
        done = world.run(name)
        if done.code != 0:
            problems.append(f"the last run ended with {done.code}: {done.error}")
        else:
            problems += difference(world.facts[name], facts(world.case(name)))
        result = "; ".join(problems) or "ok"
        cases += [Case(name, what, result, done.err[-600:] if done.code else "")]
        cases += [Case(name, what)] * (len(faults) - 1)
    return cases


def main() -> None:
    """The command line."""
    options = campaign.flags(__doc__, "kills", 200)
    campaign.run("Kills", options, lambda world: attempts(world, options.commands, options.count, options.seed))


if __name__ == "__main__":
    main()
