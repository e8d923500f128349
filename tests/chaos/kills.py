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
    alone: list[
        int
    ] = []  # a resumed run may have fewer operations left; what it did not reach is tried from the beginning
    while ats or alone:
        count = min(len(ats), rng.choice((1, 1, 2, 3)))
        chosen = [ats.pop() for _ in range(count)] if ats else [alone.pop()]
        world.clear(name)
        done_to, problems = [], []
        for i, at in enumerate(chosen):
            fault = Fault("kill", at, rng.random() < 0.5)
            code = world.run(name, fault).code
            if code == 0:  # threads make a few operations more or less; the last ones are not always there
                alone.append(at if i else max(1, at - 3))
                continue
            done_to.append(f"operation {at}{' (after)' if fault.after else ''}")
            if code != -signal.SIGKILL:
                problems.append(f"the run that was to be killed ended with {code}")
        if not done_to:
            continue
        done = world.run(name)
        if done.code != 0:
            problems.append(f"the last run ended with {done.code}: {done.error}")
        else:
            problems += difference(world.facts[name], facts(world.case(name)))
        result = "; ".join(problems) or "ok"
        cases += [Case(name, ", ".join(done_to), result, done.err[-600:] if done.code else "")]
        cases += [Case(name, f"{at}, of the trial before") for at in done_to[1:]]  # its result is counted once
    return cases


def main() -> None:
    """The command line."""
    options = campaign.flags(__doc__, "kills", 200)
    campaign.run("Kills", options, lambda world: attempts(world, options.commands, options.count, options.seed))


if __name__ == "__main__":
    main()
