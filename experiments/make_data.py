"""Data that a machine without a network has: the standard library of its own Python, and sums.

    python -m experiments.make_data --config=configs/make_data.py:stdlib --workdir=runs/data

Files are read with ast; nothing of the standard library is imported or run. See configs/make_data.py.
"""

import dataclasses
import functools
import os
import sys
from typing import Literal

from experiments.demo_data.arithmetic import write_arithmetic
from experiments.demo_data.stdlib_corpus import write_stdlib_corpus
from experiments.demo_data.stdlib_tasks import is_held_out_module, write_stdlib_tasks
from experiments.shared import cli
from jaxgpt.config import check_bounds, to_dict
from jaxgpt.runs import manifest as manifests
from jaxgpt.runs import workdir as workdirs
from jaxgpt.runs.artifact import file_digest


@dataclasses.dataclass(frozen=True)
class Config:
    """What is written.

    kind: `stdlib`, a corpus (corpus.jsonl) and questions with answers, rankings and prompts about its functions and classes
      (experiments/demo_data/stdlib_tasks.py); or `arithmetic`, sums (experiments/demo_data/arithmetic.py).
    heldout_fraction: of packages, or of sums, that are in no file to train on.
    max_bytes, max_records: of the corpus, and of each file of tasks; 0 is all there are.
    largest, forget_carry: the largest number to add, and how often demonstrations forget a carry.
    """

    kind: Literal["stdlib", "arithmetic"] = "stdlib"
    seed: int = 0
    heldout_fraction: float = 0.1
    max_bytes: int = 6_000_000
    max_records: int = 0
    largest: int = 99
    forget_carry: float = 0.6

    def __post_init__(self):
        check_bounds(self, "", max_bytes=0, max_records=0, largest=1)
        if not 0 < self.heldout_fraction < 1:
            raise ValueError(f"heldout_fraction must be between 0 and 1, not {self.heldout_fraction}.")
        if not 0 <= self.forget_carry <= 1:
            raise ValueError(f"forget_carry must be in [0, 1], not {self.forget_carry}.")


def main(config: Config, workdir: str) -> None:
    """Write the files, and a manifest with their digests."""
    with workdirs.lock(workdir):
        workdirs.check_same(workdir, to_dict(config))
        if manifests.read_manifest(workdir):
            print(f"{workdir} is finished.")
            return
        workdirs.write_config(workdir, to_dict(config))
        if config.kind == "stdlib":
            unseen = functools.partial(is_held_out_module, seed=config.seed, fraction=config.heldout_fraction)
            corpus = os.path.join(workdir, "corpus.jsonl")
            print(write_stdlib_corpus(corpus, max_bytes=config.max_bytes or sys.maxsize, skip=unseen))
            print(write_stdlib_tasks(
                workdir, seed=config.seed, heldout_fraction=config.heldout_fraction, max_records=config.max_records or None
            ))  # fmt: skip
        else:
            print(write_arithmetic(
                workdir, largest=config.largest, forget_carry=config.forget_carry,
                heldout_fraction=config.heldout_fraction, seed=config.seed,
            ))  # fmt: skip
        files = sorted(name for name in os.listdir(workdir) if name.endswith(".jsonl"))
        manifests.write_manifest(workdir, manifests.base_manifest(
            stage="data", config=to_dict(config), files={name: file_digest(os.path.join(workdir, name)) for name in files}
        ))  # fmt: skip


if __name__ == "__main__":
    cli.run(main, Config, default_config="configs/make_data.py")
