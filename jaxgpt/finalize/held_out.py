"""The held-out loss of the stage that a model comes from, to say what a smaller or an averaged one costs."""

import dataclasses
import os
from collections.abc import Callable, Iterator
from typing import Any

from jax.sharding import Mesh

from jaxgpt import partition
from jaxgpt.config import build
from jaxgpt.data import batches
from jaxgpt.data.config import DataConfig, HoldoutConfig
from jaxgpt.data.conversations import SFTConfig, tokenize_conversations
from jaxgpt.data.packing import RowPlan, make_plan
from jaxgpt.data.preference import build_preferences
from jaxgpt.data.token_cache import Split
from jaxgpt.finalize.config import FinalizeConfig
from jaxgpt.json_object import read_object
from jaxgpt.objectives.next_token import LossConfig, make_next_token
from jaxgpt.objectives.reward import RewardConfig, make_reward
from jaxgpt.partition import DEFAULT_RULES
from jaxgpt.runs.load import Run, read_run, without_adapters
from jaxgpt.train.step import evaluate, make_eval_step
from jaxgpt.types import LMBatch, Objective, PairBatch, Params

Paths = str | tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class HeldOut:
    """loss: parameters -> nats per token, or a reward model's loss per pair. stage: whose loss it is. rows: how many."""

    loss: Callable[[Params], float]
    stage: str
    rows: int


def held_out(config: FinalizeConfig, run: Run, mesh: Mesh) -> HeldOut | None:
    """The measure of a run's model, None where there is nothing to measure.

    DPO and reinforcement learning are measured by the loss of the SFT or pretraining run they come from.

    Raises ValueError where the loss must be known and there are no held-out data for it.
    """
    if not config.data.eval and not config.changes_values:
        return None
    try:
        owner, stage = _owner(run)
        return _measure(run, owner, stage, config.data.eval, mesh)
    except ValueError as error:
        if config.data.eval:
            raise
        if config.max_loss_increase is not None:
            reason = str(error).removesuffix(".")
            raise ValueError(
                f"data.eval is needed to measure what the artifact costs, since {reason}; give held-out data, or "
                "max_loss_increase=none to publish without."
            ) from error
        return None


def _owner(run: Run) -> tuple[Run, str]:
    """The run itself or its nearest ancestor that has a loss on held-out data, and its stage."""
    wanted = ("reward",) if run.config.head == "scalar" else ("pretrain", "sft")
    seen = run
    while True:
        stage = seen.manifest()["stage"]
        if stage in wanted:
            return seen, stage
        if not os.path.isdir(seen.base):
            # It was trained elsewhere: it is read as what its template says it is.
            return seen, "reward" if wanted == ("reward",) else "sft" if seen.template is not None else "pretrain"
        seen = read_run(seen.base, run.field)


def _measure(run: Run, owner: Run, stage: str, paths: Paths, mesh: Mesh) -> HeldOut:
    values: dict[str, Any] = read_object(os.path.join(owner.workdir, "config.json"))
    data = _data_config(run, owner, values, paths)
    cache_dir = data.cache_dir or os.path.join(os.path.dirname(os.path.abspath(owner.workdir)), "token_cache")
    plans, objective, batch_type = _stage_data(run, stage, values, data, cache_dir)
    shards = mesh.shape["data"] * mesh.shape["fsdp"]
    batch_size = -(-values.get("batch_size", 8) // shards) * shards
    step = make_eval_step(objective, mesh, DEFAULT_RULES)

    def on_mesh(plan: Any) -> Iterator[Any]:
        rows = partition.local_rows(mesh, batch_size)
        for batch in batches.eval_batches(
            plan, batch_size=batch_size, rows=rows, max_batches=data.eval_batches, batch_type=batch_type
        ):
            yield partition.to_global(batch, mesh, batch_size)

    def loss(params: Params) -> float:
        losses = [evaluate(step, params, {}, on_mesh(plan), "eval")["eval/loss"] for plan in plans.values()]
        return sum(losses) / len(losses)

    return HeldOut(loss, stage, sum(len(plan) for plan in plans.values()))


def _data_config(run: Run, owner: Run, values: dict[str, Any], paths: Paths) -> DataConfig:
    """The stage's data section; held-out files of their own are read as a run's that holds nothing out."""
    data = build(DataConfig, values.get("data", {}), "data")
    if "data" not in values:
        data = dataclasses.replace(data, sequence_length=min(run.config.max_seq_length, 512), packing="best_fit")
    if paths or data.eval:
        return dataclasses.replace(data, train=paths or data.eval, eval=(), holdout=HoldoutConfig(fraction=0))
    if not data.train or not data.holdout.fraction:
        raise ValueError(f"{owner.workdir} names no held-out data.")
    return data


def _stage_data(
    run: Run, stage: str, values: dict[str, Any], data: DataConfig, cache_dir: str
) -> tuple[dict[str, Any], Objective, type]:
    """(name -> held-out rows, the objective, the type of its batches) of a stage."""
    model, tokenizer = without_adapters(run.config), run.tokenizer
    template: Any = run.template
    if stage != "pretrain" and template is None:
        raise ValueError(f"{run.workdir} has no chat template to read conversations with.")

    def conversations(files: list[str], split: Split) -> RowPlan:
        settings = build(SFTConfig, values.get("sft", {}), "sft")
        source = tokenize_conversations(files, tokenizer, template, data, settings, split, cache_dir)
        return make_plan(source, data.packing, data.sequence_length, tokenizer.pad_id)

    if stage == "reward":
        built = build_preferences(data, tokenizer, template, values.get("too_long", "truncate_left"), cache_dir)
        objective = make_reward(model, build(RewardConfig, values.get("reward", {}), "reward"))
    else:
        make_rows = conversations if stage == "sft" else None
        built = batches.build_data(data, tokenizer, cache_dir=cache_dir, make_rows=make_rows)
        objective = make_next_token(model, build(LossConfig, values.get("loss", {}), "loss"))
    plans = built.eval if data.holdout.fraction else {name: plan for name, (plan, _) in built.train.items()}
    return plans, objective, PairBatch if stage == "reward" else LMBatch
