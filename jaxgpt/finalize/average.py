"""Averages of parameters: of a run's last checkpoints, over its training, or of several runs. All of them uniform means."""

import dataclasses
import os
from collections.abc import Callable, Iterable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jaxgpt.models.config import ModelConfig
from jaxgpt.runs.artifact import is_artifact
from jaxgpt.runs.checkpoint import good_steps
from jaxgpt.runs.load import Run, load_plain, read_run, step_to_load, without_adapters
from jaxgpt.types import Params

# Fields of a model that say how it is computed or trained, not what it is.
_RUNTIME_FIELDS = ("dropout", "dtype", "attention_kernel", "scan_layers", "remat", "init", "max_seq_length")


@dataclasses.dataclass(frozen=True)
class AverageConfig:
    """Which parameters become one model; adapters are merged into each before.

    kind: `none` is the newest checkpoint; `last_k` the mean of the last k checkpoints; `ema` the average that the optimizer
      kept (optimizer.ema_decay); `soup` the mean of init_from and `runs`, which should share their start (Wortsman et al.
      2022, arXiv:2203.05482).
    """

    kind: Literal["none", "last_k", "ema", "soup"] = "none"
    k: int = 5
    runs: tuple[str, ...] = ()

    def __post_init__(self):
        if self.k < 1:
            raise ValueError(f"average.k must be at least 1, not {self.k}.")
        if bool(self.runs) != (self.kind == "soup"):
            raise ValueError(
                "average.runs are what average.kind='soup' mixes with init_from: set both, or none of them."
            )


class Member(NamedTuple):
    """One model of a mean: a run, the step of its checkpoint (None: the newest), and whether the optimizer's average."""

    run: Run
    step: int | None = None
    ema: bool = False

    def load(self, mesh: Mesh) -> Params:
        """Its plain parameters."""
        return load_plain(self.run, mesh, step=self.step, ema=self.ema)[1]


def find_members(run: Run, average: AverageConfig) -> list[Member]:
    """What is averaged.

    Raises ValueError where the run has too few checkpoints, and naming what differs in a run that is no match for it.
    """
    if average.kind in ("last_k", "ema") and is_artifact(run.workdir):
        raise ValueError(
            f"average.kind={average.kind!r} needs the checkpoints of a training run; {run.workdir} is an artifact, with one "
            "set of weights."
        )
    if average.kind == "last_k":
        newest = step_to_load(run.workdir)
        steps = [step for step in good_steps(os.path.join(run.workdir, "checkpoints")) if step <= newest]
        if len(steps) < average.k:
            raise ValueError(
                f"average.k={average.k}, but {run.workdir} keeps {len(steps)} good checkpoint(s), of the steps {steps}; "
                "checkpoint.max_to_keep says how many a run keeps."
            )
        return [Member(run, step) for step in steps[-average.k :]]
    others = [read_run(path, f"average.runs[{i}]") for i, path in enumerate(average.runs)]
    for other in others:
        other.manifest()
        _check_match(run, other)
    return [Member(run, ema=average.kind == "ema"), *map(Member, others)]


def _check_match(run: Run, other: Run) -> None:
    digest = lambda run: run.template.digest if run.template is not None else "none"
    pairs = [
        ("tokenizer", run.tokenizer.digest, other.tokenizer.digest),
        ("chat template", digest(run), digest(other)),
    ]
    for what, ours, theirs in pairs:
        if ours != theirs:
            raise ValueError(
                f"{other.field}: {other.workdir} has the {what} {theirs[:12]}, but init_from has {ours[:12]}; a soup is of "
                "models that share it."
            )
    architecture = _architecture(other.config)
    for name, value in _architecture(run.config).items():
        if value != architecture[name]:
            raise ValueError(
                f"{other.field}: {other.workdir} has model.{name}={architecture[name]!r}, but init_from has {value!r}; "
                "a soup is of models of one architecture."
            )


def mean(loads: Iterable[Callable[[], Params]]) -> Params:
    """The uniform mean, f32, of the trees that `loads` give, each loaded when its turn comes."""
    add = jax.jit(lambda total, params: jax.tree.map(jnp.add, total, params), donate_argnums=0)
    total, count = None, 0
    for load in loads:
        total = load() if total is None else add(total, load())
        count += 1
    return jax.jit(lambda total: jax.tree.map(lambda x: x / count, total), donate_argnums=0)(total)


def _architecture(config: ModelConfig) -> dict:
    fields = dataclasses.asdict(without_adapters(config))
    ignored = [name for name in _RUNTIME_FIELDS if name != "max_seq_length" or config.position != "learned"]
    return {name: value for name, value in fields.items() if name not in ignored}
