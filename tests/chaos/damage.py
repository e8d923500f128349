"""Damage: each file of a finished run or artifact with a byte flipped, cut, emptied, removed; then the next command reads it.

    python -m tests.chaos.damage [--files=120] [--seed=0] [--commands=pretrain,finalize] [--workers=2]

What reads it: generate, sft and finalize from it, and the same command again, which resumes where the manifest is gone. Each
either says what is wrong with exit code 2, or ends with the result that it has from the undamaged folder: the same texts,
the same weights and metrics, the same digest of its parent. Never a traceback, and never another result without a word.
"""

import functools
import json
import os
import random
import shutil
from collections.abc import Callable, Sequence

from tests.chaos import campaign, forks
from tests.chaos.campaign import Case
from tests.chaos.world import World, difference, facts

SUBJECTS = ("pretrain", "sft", "finalize")  # a run, a run with a chat template, an artifact
KINDS = ("flipped", "cut", "emptied", "removed")
READERS = ("generate", "sft", "finalize", "resume")
_UNREAD = (".lock", "report.html", ".png", "README.md")  # what no command reads
_NAMES_ITSELF = (
    "manifest.json",
)  # its digest is its name: another manifest is another parent, whose content must be the same


def damaged(path: str, kind: str, rng: random.Random) -> None:
    """Damage a file on the disk."""
    if kind == "removed":
        os.remove(path)
        return
    with open(path, "rb") as file:
        content = bytearray(file.read())
    if kind == "flipped" and content:
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    elif kind == "cut":
        content = content[: rng.randrange(max(1, len(content)))]
    elif kind == "emptied":
        content.clear()
    with open(path, "wb") as file:
        file.write(content)


class Readers:
    """The commands that read a subject's copy, and what they make of the undamaged one."""

    def __init__(self, world: World, subject: str):
        self.world, self.subject, self.case = world, subject, world.case(f"damaged-{subject}")
        self.copy = os.path.join(self.case, "run")
        self.names = [name for name in READERS if name != "resume" or subject != "finalize"]
        self.files = self._files()
        self._expected: dict[str, dict[str, str]] = {}

    def expected(self, name: str) -> dict[str, str]:
        """What the reader makes of the undamaged folder."""
        if name not in self._expected:
            self.restore(name)
            done = self.read(name)
            if done.code:
                raise RuntimeError(f"{name} of {self.subject} ended with {done.code}, undamaged: {done.err}")
            self._expected[name] = self.result(name)
        return self._expected[name]

    def _files(self) -> list[str]:
        root = os.path.join(self.world.inputs, self.subject)
        found = [os.path.relpath(os.path.join(parent, f), root) for parent, _, names in os.walk(root) for f in names]
        return sorted(f for f in found if not f.endswith(_UNREAD) and "tensorboard" not in f)

    def restore(self, name: str) -> None:
        """An undamaged copy; for `resume` one that lacks the manifest, as if it had been killed at the end."""
        shutil.rmtree(self.case, ignore_errors=True)
        shutil.copytree(os.path.join(self.world.inputs, self.subject), self.copy)
        if name == "resume":
            os.remove(os.path.join(self.copy, "manifest.json"))

    def read(self, name: str) -> forks.Outcome:
        """Run the reader."""
        out = os.path.join(self.case, "out")
        if name == "generate":
            flags = [
                "--config=configs/generate.py:greedy",
                f"--config.init_from={self.copy}",
                "--config.max_new_tokens=8",
            ]
            return forks.run(
                "generate", [*flags, "--config.prompt=Ann", f"--config.output={out}/texts.jsonl"], root=out
            )
        if name == "finalize":
            return forks.run(
                "finalize",
                ["--config=configs/finalize.py:float32", f"--workdir={out}", f"--config.init_from={self.copy}"],
                root=out,
            )
        if name == "sft":
            flags = self.world.arguments("sft")
            return forks.run("sft", [f"--workdir={out}", *flags, f"--config.init_from={self.copy}"], root=out)
        return forks.run(
            self.world.stage(self.subject),
            [f"--workdir={self.copy}", *self.world.arguments(self.subject)],
            root=self.copy,
        )

    def result(self, name: str) -> dict[str, str]:
        """What the reader has made."""
        found = facts(self.case if name == "resume" else os.path.join(self.case, "out"))
        return {file: value for file, value in found.items() if "damaged" not in file}


def attempt(readers: Readers, name: str, file: str, kind: str, seed: str) -> Case:
    """Damage one file and read."""
    expected = readers.expected(name)
    readers.restore(name)
    damaged(os.path.join(readers.copy, file), kind, random.Random(seed))
    done = readers.read(name)
    what = f"{file} {kind}, then {name}"
    lines = [line for line in done.err.splitlines() if line.startswith("error: ")]
    if done.code == 2 and len(lines) == 1 and "Traceback" not in done.err:
        return Case(readers.subject, what)
    if done.code != 0:
        return Case(readers.subject, what, f"exit code {done.code}: {done.error}"[:300], done.err[-600:])
    found = readers.result(name)
    if file in _NAMES_ITSELF:  # the parent's digest is another one, and says so; all else is the same
        found, expected = ({k: v for k, v in some.items() if k != "manifest.json"} for some in (found, expected))
        found, expected = (
            {k: v for k, v in some.items() if not k.endswith("/manifest.json")} for some in (found, expected)
        )
    changed = difference(expected, found)
    if kind == "removed" and file.endswith(".jsonl") and f"{file} is missing" in done.err:  # what its removal asks for
        changed = [line for line in changed if line.split()[0] != os.path.join("run", file)]
    return Case(readers.subject, what, "; ".join(["exit code 0", *changed]) if changed else "ok")


def plan(readers: Readers, count: int, rng: random.Random) -> list[tuple[str, str, str]]:
    """`count` of (reader, file, kind): every file comes before any comes again, kinds and readers in turn."""
    pairs = [(file, kind) for kind in rng.sample(KINDS, 4) for file in rng.sample(readers.files, len(readers.files))]
    # Only a resume reads the logs.
    chosen = []
    for i, (file, kind) in enumerate(pairs[:count]):
        names = [n for n in readers.names if not (n == "resume" and file == "manifest.json")]
        if file.endswith(".jsonl") and "resume" in names:
            names = ["resume"]
        chosen.append((names[i % len(names)], file, kind))
    return chosen


def attempts(world: World, subjects: Sequence[str], count: int, seed: int) -> list[Callable[[], list[Case]]]:
    """One call for each subject, with its share of the files."""

    def on(subject: str, share: int) -> list[Case]:
        readers = Readers(world, subject)
        chosen = plan(readers, share, random.Random(f"{seed} {subject}"))
        return [attempt(readers, *one, f"{seed} {i} {json.dumps(one)}") for i, one in enumerate(chosen)]

    share, rest = divmod(count, len(subjects))
    return [functools.partial(on, name, share + (i < rest)) for i, name in enumerate(subjects)]


def main() -> None:
    """The command line."""
    options = campaign.flags(__doc__, "files", 120)
    options.commands = [name for name in SUBJECTS if name in options.commands]
    campaign.run("Damaged files", options, lambda world: attempts(world, options.commands, options.count, options.seed))


if __name__ == "__main__":
    main()
