"""One training run in one workdir: state, checkpoints, logs and callbacks around the loop. Every stage comes through here."""

import dataclasses
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
from jax.sharding import Mesh

from jaxgpt import partition, tree
from jaxgpt.config import to_dict
from jaxgpt.partition import DEFAULT_RULES
from jaxgpt.runs import logs
from jaxgpt.runs.checkpoint import Checkpointer
from jaxgpt.runs.workdir import JsonLog, StopSignal
from jaxgpt.train import callbacks
from jaxgpt.train.config import RunConfig
from jaxgpt.train.loop import LoopConfig, train
from jaxgpt.train.optimizer import ema_params, make_optimizer, make_schedule
from jaxgpt.train.step import abstract_state, evaluate, init_state, make_eval_step, make_train_step
from jaxgpt.train.throughput import TrainingFlops, peak_flops
from jaxgpt.types import Metrics, Objective, Params, TrainState


@dataclasses.dataclass(frozen=True)
class Stage:
    """What one kind of training brings to a run.

    init_fn: rng -> boxed parameters, the frozen ones included. train_batches: the first batch's index -> this process's
      rows, batch by batch. eval_batches: name -> one pass over a held-out set, this process's rows.
    tokens_per_step, flops_per_token: for throughput and MFU.
    trainable: which parameters, by path name, are trained; the others are frozen: never in a checkpoint, loaded anew.
    load: (abstract parameters, all of them) -> those that come from elsewhere, in place of init_fn's.
    sources: {"init_from": digest, "data.train": digest, ...}, the content of all that the run reads, by field; it is kept in
      the checkpoints, and a run is resumed only with the same (`workdir.check_sources`).
    on_eval: called after each evaluation with (step, all parameters), to write samples; what it returns joins the row of
      metrics. on_start: called with the last step whose logs stay. metric_group: as in LoopConfig.
    """

    init_fn: Callable[[jax.Array], Any]
    objective: Objective
    train_batches: Callable[[int], Iterator[Any]]
    eval_batches: dict[str, Callable[[], Iterator[Any]]]
    tokens_per_step: int
    flops_per_token: TrainingFlops | None
    trainable: Callable[[str], bool] = lambda name: True
    load: Callable[[Params], Params] | None = None
    sources: dict[str, str] = dataclasses.field(default_factory=dict)
    on_eval: Callable[[int, Params], dict[str, float] | None] = lambda step, params: None
    on_start: Callable[[int], None] = lambda step: None
    metric_group: str = "train"


@dataclasses.dataclass(frozen=True)
class Program:
    """What `run_program` runs: a state, how it is made, and what a step does with it.

    abstract: the state with its shardings. create: -> a fresh (state, frozen). reload: -> frozen alone, for a resumed run.
    train_step, evaluate: as in `loop.train`, but that evaluate also gets frozen. batches: first step -> global batches.
    schedule: step -> learning rate. The rest as in Stage.
    """

    abstract: Any
    create: Callable[[], tuple[Any, Params]]
    reload: Callable[[], Params]
    train_step: Callable[[Any, Params, Any], tuple[Any, Metrics]]
    batches: Callable[[int], Iterator[Any]]
    evaluate: Callable[[Any, Params, int], dict[str, float]]
    schedule: Callable[[Any], Any]
    tokens_per_step: int
    flops_per_token: TrainingFlops | None
    on_start: Callable[[int], None]
    sources: dict[str, str] = dataclasses.field(default_factory=dict)
    metric_group: str = "train"


def run(
    config: RunConfig, workdir: str, mesh: Mesh, stage: Stage, watchers: Sequence[callbacks.Callback] = ()
) -> TrainState:
    """Train the stage in `workdir`, from its newest good checkpoint if there is one; see `run_program`."""
    optimizer = make_optimizer(config.optimizer, config.num_train_steps)
    rng = jax.random.key(config.seed)
    abstract, abstract_frozen = abstract_state(stage.init_fn, optimizer, rng, mesh, DEFAULT_RULES, stage.trainable)

    def load() -> Params:
        return stage.load(tree.merge(abstract.params, abstract_frozen)) if stage.load is not None else {}

    def create() -> tuple[TrainState, Params]:
        return init_state(stage.init_fn, optimizer, rng, mesh, DEFAULT_RULES, stage.trainable, loaded=load())[:2]

    program = Program(
        abstract=abstract,
        create=create,
        reload=lambda: tree.split(load(), stage.trainable)[1] if abstract_frozen else {},
        train_step=make_train_step(
            stage.objective, optimizer, mesh, DEFAULT_RULES,
            shardings=jax.tree.map(lambda leaf: leaf.sharding, abstract), accum=config.gradient_accumulation_steps,
        ),
        batches=lambda start: (partition.to_global(b, mesh, config.batch_size) for b in stage.train_batches(start)),
        evaluate=_evaluator(config, mesh, stage),
        schedule=make_schedule(config.optimizer, config.num_train_steps),
        tokens_per_step=stage.tokens_per_step,
        flops_per_token=stage.flops_per_token,
        sources=stage.sources,
        on_start=stage.on_start,
        metric_group=stage.metric_group,
    )  # fmt: skip
    return run_program(config, workdir, mesh, program, watchers)


def run_program(
    config: RunConfig, workdir: str, mesh: Mesh, program: Program, watchers: Sequence[callbacks.Callback] = ()
) -> Any:
    """Checkpoints, logs and callbacks around the loop; returns the state after the last step.

    watchers: callbacks of the caller's, beside those that the config names.

    Raises workdir.Stopped, with everything saved, where a signal ended it before; ValueError where metrics or samples are
    not those that the checkpoint was saved beside.
    """
    is_main = jax.process_index() == 0
    with Checkpointer(os.path.join(workdir, "checkpoints"), config.checkpoint) as checkpointer, StopSignal() as stop:
        restored = checkpointer.restore(program.abstract)
        if restored is not None:
            state, meta, start = restored
            logs.check(workdir, meta.get("logs", {}), start)
            frozen, last_logged = program.reload(), start
        else:
            (state, frozen), meta, start, last_logged = program.create(), {}, 0, -1
        metrics_log = JsonLog(os.path.join(workdir, "metrics.jsonl")) if is_main else None
        if metrics_log is not None:
            metrics_log.truncate_after(last_logged)
            print(f"{_describe(state, frozen, mesh)}; training from step {start}.", flush=True)
        program.on_start(last_logged)
        watchers = [*watchers, *_callbacks(config, workdir, start)] if is_main else []
        try:
            state, step = train(
                _loop_config(config, program, start),
                state=state,
                frozen=frozen,
                train_step=program.train_step,
                batches=program.batches(start),
                evaluate=lambda state, step: program.evaluate(state, frozen, step),
                schedule=program.schedule,
                checkpointer=checkpointer,
                metrics_log=metrics_log,
                callbacks=watchers,
                stop=stop,
                start_step=start,
                meta=meta | {"sources": program.sources},
                log_marks=(lambda: logs.marks(workdir)) if is_main else dict,
            )
        finally:
            for watcher in watchers:
                watcher.close()
    if step < config.num_train_steps:
        raise stop.stopped(f"at step {step} of {config.num_train_steps}")
    return state


def _describe(state: Any, frozen: Params, mesh: Mesh) -> str:
    axes = " x ".join(f"{name}={size}" for name, size in mesh.shape.items() if size > 1)
    frozen_count = f" (and {tree.count(frozen):,} frozen ones)" if frozen else ""
    devices = f"{mesh.size} {mesh.devices.flat[0].device_kind} device(s)" + (f" ({axes})" if axes else "")
    return f"{tree.count(state.params):,} parameters{frozen_count} on {devices}"


def _evaluator(config: RunConfig, mesh: Mesh, stage: Stage) -> Callable[[TrainState, Params, int], dict[str, float]]:
    eval_step = make_eval_step(stage.objective, mesh, DEFAULT_RULES)

    def run_evaluation(state: TrainState, frozen: Params, step: int) -> dict[str, float]:
        row: dict[str, float] = {}
        averaged = ema_params(state.opt_state)
        for name, batches in stage.eval_batches.items():
            suffix = f"/{name}" if len(stage.eval_batches) > 1 else ""
            for group, params in (("eval", state.params), ("eval_ema", averaged)):
                if params is not None:
                    on_mesh = (partition.to_global(b, mesh, config.batch_size) for b in batches())
                    row |= evaluate(eval_step, params, frozen, on_mesh, group + suffix)
        if len(stage.eval_batches) > 1:  # what keep-best and plots look at: the mean over the sets
            row["eval/loss"] = sum(row[f"eval/{name}/loss"] for name in stage.eval_batches) / len(stage.eval_batches)
        return row | (stage.on_eval(step, tree.merge(state.params, frozen)) or {})

    return run_evaluation


def _callbacks(config: RunConfig, workdir: str, start: int) -> list[callbacks.Callback]:
    watchers = [callbacks.progress_bar(start, config.num_train_steps), callbacks.tensorboard(workdir, start)]
    if config.profile.num_steps:
        watchers.append(callbacks.profiler(config.profile, workdir))
    if config.wandb.project:
        watchers.append(callbacks.wandb(config.wandb, workdir, to_dict(config)))
    return watchers


def _loop_config(config: RunConfig, program: Program, start: int) -> LoopConfig:
    return LoopConfig(
        num_train_steps=config.num_train_steps,
        log_interval_steps=config.log_interval_steps,
        eval_interval_steps=config.eval_interval_steps,
        eval_at_start=config.eval_at_start and start == 0,
        save_interval_steps=config.checkpoint.save_interval_steps,
        nonfinite=config.nonfinite,
        tokens_per_step=program.tokens_per_step,
        flops_per_token=program.flops_per_token,
        peak_flops=peak_flops(jax.devices()[0]),
        metric_group=program.metric_group,
    )
