"""Direct preference optimization: rankings train the policy itself, against a frozen reference.

    python -m experiments.dpo --config=configs/dpo.py --workdir=runs/dpo --config.init_from=runs/sft \
        --config.data.train=preferences.jsonl

Records are those of experiments.reward. See configs/dpo.py for presets.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from experiments.shared import cli
from experiments.shared.training import Job, train_in
from jaxgpt import partition, tree
from jaxgpt.data import batches, conversations, preference
from jaxgpt.data.sources import check_fields
from jaxgpt.models import lora
from jaxgpt.objectives.dpo import DPOConfig, make_dpo, sequence_logprobs
from jaxgpt.partition import DEFAULT_RULES
from jaxgpt.runs.load import abstract_params, load_trunk, without_adapters
from jaxgpt.train.config import check_lengths
from jaxgpt.train.finetune import FinetuneConfig, Start, start_from
from jaxgpt.train.run import Stage
from jaxgpt.train.throughput import training_flops_per_token
from jaxgpt.types import Array, PairBatch, Params

REFERENCE = "reference"  # the frozen subtree of a run that trains every parameter


@dataclasses.dataclass(frozen=True)
class Config(FinetuneConfig):
    """One DPO run. batch_size counts prompts.

    precompute_reference: the reference's log-probs are computed once, before the first update, and its parameters are not
      kept; else they are computed at every step. With adapters the reference is the base, which is there anyway.
    """

    dpo: DPOConfig = DPOConfig()
    precompute_reference: bool = False
    too_long: conversations.TooLong = "truncate_left"

    def __post_init__(self):
        super().__post_init__()
        check_fields(self.data.fields, preference.FIELDS)


def main(config: Config, workdir: str) -> None:
    """Train the run in `workdir`, or go on with it."""
    start = start_from(config)
    check_lengths(config.data, start.model)
    train_in(workdir, "dpo", config, start.model, functools.partial(prepare, config, start))


def prepare(config: Config, start: Start, mesh: Mesh, cache_dir: str) -> Job:
    """The DPO objective over prompts with their responses."""
    data = preference.build_preferences(config.data, start.tokenizer, start.template, config.too_long, cache_dir)
    keeps_reference = not (config.dpo.reference_free or config.precompute_reference or config.lora.rank)
    if config.precompute_reference:
        data = with_reference_logprobs(config, start, data, mesh)
    rows, length = partition.local_rows(mesh, config.batch_size), config.data.sequence_length
    is_policy = start.trainable()
    stage = Stage(
        init_fn=with_reference(start.init_fn()) if keeps_reference else start.init_fn(),
        objective=make_dpo(start.model, config.dpo, reference(config, start, keeps_reference)),
        **batches.batch_streams(config.data, data, config.batch_size, rows, config.seed, PairBatch),
        tokens_per_step=config.batch_size * preference.num_candidates(data) * length,
        flops_per_token=training_flops_per_token(start.model, length),
        trainable=lambda name: is_policy(name) and not name.startswith(REFERENCE),
        load=functools.partial(load, start, mesh),
        metric_group="reward",
    )
    return Job(stage, data, start.tokenizer, start.template, start.parents)


def with_reference(init_fn: Callable[[Array], Any]) -> Callable[[Array], Any]:
    """The parameters twice: the policy's, and below `reference` those it is held against."""
    return lambda rng: init_fn(rng) | {REFERENCE: init_fn(rng)}


def load(start: Start, mesh: Mesh, abstract: Params) -> Params:
    """The parent's parameters for the policy, and again for the reference where there is one."""
    policy = start.load({name: part for name, part in abstract.items() if name != REFERENCE}, mesh)
    # A copy: the policy's buffers are donated to the train step.
    return policy | ({REFERENCE: jax.tree.map(lambda x: x.copy(), policy)} if REFERENCE in abstract else {})


def reference(config: Config, start: Start, keeps_reference: bool):
    """(params, batch) -> the reference's log-probs; None where the batch brings them, or none are needed."""
    plain = without_adapters(start.model)
    if keeps_reference:
        return lambda params, batch: sequence_logprobs(plain, params[REFERENCE], batch, config.dpo.chunk_tokens)
    if config.dpo.reference_free or config.precompute_reference:
        return None
    base = lambda params: tree.split(params, lambda name: not lora.is_adapter(name))[0]
    return lambda params, batch: sequence_logprobs(plain, base(params), batch, config.dpo.chunk_tokens)


def with_reference_logprobs(config: Config, start: Start, data: batches.Data, mesh: Mesh) -> batches.Data:
    """The data with the parent's log-prob of every response in the rows."""
    plain = without_adapters(start.model)
    params = load_trunk(start.parent, abstract_params(plain, mesh), mesh)

    @functools.partial(jax.jit, out_shardings=partition.replicated(mesh))
    def logprobs(params: Params, batch: PairBatch) -> Array:
        with partition.activate(mesh, DEFAULT_RULES):
            return sequence_logprobs(plain, params, batch, config.dpo.chunk_tokens)

    def extend(plan):
        size, rows = config.batch_size, partition.local_rows(mesh, config.batch_size)
        fixed = batches.eval_batches(plan, batch_size=size, rows=rows, batch_type=PairBatch)
        parts = [np.asarray(logprobs(params, partition.to_global(batch, mesh, size))) for batch in fixed]
        return dataclasses.replace(plan, reference_logprobs_GC=np.concatenate(parts)[: len(plan)])

    train = {name: (extend(plan), weight) for name, (plan, weight) in data.train.items()}
    return dataclasses.replace(data, train=train, eval={name: extend(plan) for name, plan in data.eval.items()})


if __name__ == "__main__":
    cli.run(main, Config, default_config="configs/dpo.py")
