"""One training run in one workdir: state, checkpoints, logs and callbacks around the loop. Every stage comes through here."""

import dataclasses
import os
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax.sharding import Mesh

from jaxgpt import partition, tree
from jaxgpt.config import to_dict
from jaxgpt.partition import DEFAULT_RULES
from jaxgpt.train import callbacks
from jaxgpt.train.checkpoint import Checkpointer
from jaxgpt.train.config import TrainConfig
from jaxgpt.train.evaluation import evaluate
from jaxgpt.train.loop import LoopConfig, train
from jaxgpt.train.optimizer import ema_params, make_optimizer, make_schedule
from jaxgpt.train.step import abstract_state, init_state, make_eval_step, make_train_step
from jaxgpt.train.throughput import peak_flops, training_flops_per_token
from jaxgpt.train.workdir import JsonLog, StopSignal
from jaxgpt.types import Objective, Params, TrainState


@dataclasses.dataclass(frozen=True)
class Stage:
    """What one kind of training brings to a run.

    init_fn: rng -> boxed parameters. train_batches: the first batch's index -> this process's rows, batch by batch.
    eval_batches: name -> one pass over a held-out set, this process's rows. on_eval: called after each evaluation
      with (step, parameters), to write samples. initial_params: shardings -> parameters to start from instead of
      init_fn's. on_start: called with the step that training goes on from.
    """

    init_fn: Callable[[jax.Array], Any]
    objective: Objective
    train_batches: Callable[[int], Iterator[Any]]
    eval_batches: dict[str, Callable[[], Iterator[Any]]]
    on_eval: Callable[[int, Params], None] = lambda step, params: None
    initial_params: Callable[[Params], Params] | None = None
    on_start: Callable[[int], None] = lambda step: None


def run(config: TrainConfig, workdir: str, mesh: Mesh, stage: Stage) -> tuple[TrainState, int]:
    """Train the stage in `workdir`, from its newest good checkpoint if there is one; returns the state and its step."""
    optimizer = make_optimizer(config.optimizer, config.num_train_steps)
    schedule = make_schedule(config.optimizer, config.num_train_steps)
    rng = jax.random.key(config.seed)
    is_main = jax.process_index() == 0
    abstract, _ = abstract_state(stage.init_fn, optimizer, rng, mesh, DEFAULT_RULES)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    with Checkpointer(os.path.join(workdir, "checkpoints"), config.checkpoint) as checkpointer, StopSignal() as stop:
        restored = checkpointer.restore(abstract)
        if restored is not None:
            state, meta, start = restored
        else:
            state, _, _ = init_state(stage.init_fn, optimizer, rng, mesh, DEFAULT_RULES)
            if stage.initial_params is not None:
                params = stage.initial_params(abstract.params)
                state = state.replace(params=params, opt_state=_fresh(optimizer, params, shardings))
            meta, start = {}, 0
        metrics_log = JsonLog(os.path.join(workdir, "metrics.jsonl")) if is_main else None
        if metrics_log is not None:
            metrics_log.truncate_after(start)
            print(
                f"{tree.count(state.params):,} parameters on {_describe(mesh)}; training from step {start}.", flush=True
            )
        stage.on_start(start)
        watchers = _callbacks(config, workdir, start) if is_main else []
        try:
            return train(
                _loop_config(config),
                state=state,
                frozen={},
                train_step=make_train_step(
                    stage.objective, optimizer, mesh, DEFAULT_RULES,
                    shardings=shardings, accum=config.gradient_accumulation_steps,
                ),
                batches=(partition.to_global(b, mesh, config.batch_size) for b in stage.train_batches(start)),
                evaluate=_evaluator(config, mesh, stage),
                schedule=schedule,
                checkpointer=checkpointer,
                metrics_log=metrics_log,
                callbacks=watchers,
                stop=stop,
                start_step=start,
                meta=meta,
            )  # fmt: skip
        finally:
            for watcher in watchers:
                watcher.close()


def _fresh(optimizer, params: Params, shardings: TrainState) -> Any:
    return jax.jit(optimizer.init, out_shardings=shardings.opt_state)(params)


def _describe(mesh: Mesh) -> str:
    axes = " x ".join(f"{name}={size}" for name, size in mesh.shape.items() if size > 1)
    return f"{mesh.size} {mesh.devices.flat[0].device_kind} device(s)" + (f" ({axes})" if axes else "")


def _evaluator(config: TrainConfig, mesh: Mesh, stage: Stage) -> Callable[[TrainState, int], dict[str, float]]:
    eval_step = make_eval_step(stage.objective, mesh, DEFAULT_RULES)

    def run_evaluation(state: TrainState, step: int) -> dict[str, float]:
        row: dict[str, float] = {}
        averaged = ema_params(state.opt_state)
        for name, batches in stage.eval_batches.items():
            suffix = f"/{name}" if len(stage.eval_batches) > 1 else ""
            for group, params in (("eval", state.params), ("eval_ema", averaged)):
                if params is not None:
                    on_mesh = (partition.to_global(b, mesh, config.batch_size) for b in batches())
                    row |= evaluate(eval_step, params, {}, on_mesh, group + suffix)
        if len(stage.eval_batches) > 1:  # what keep-best and plots look at: the mean over the sets
            row["eval/loss"] = sum(row[f"eval/{name}/loss"] for name in stage.eval_batches) / len(stage.eval_batches)
        stage.on_eval(step, state.params)
        return row

    return run_evaluation


def _callbacks(config: TrainConfig, workdir: str, start: int) -> list[callbacks.Callback]:
    watchers = [callbacks.progress_bar(start, config.num_train_steps), callbacks.tensorboard(workdir, start)]
    if config.profile.num_steps:
        watchers.append(callbacks.profiler(config.profile, workdir))
    if config.wandb.project:
        watchers.append(callbacks.wandb(config.wandb, workdir, to_dict(config)))
    return watchers


def _loop_config(config: TrainConfig) -> LoopConfig:
    return LoopConfig(
        num_train_steps=config.num_train_steps,
        log_interval_steps=config.log_interval_steps,
        eval_interval_steps=config.eval_interval_steps,
        save_interval_steps=config.checkpoint.save_interval_steps,
        nonfinite=config.nonfinite,
        tokens_per_step=config.batch_size * config.data.sequence_length,
        flops_per_token=training_flops_per_token(config.model, config.data.sequence_length),
        peak_flops=peak_flops(jax.devices()[0]),
    )
