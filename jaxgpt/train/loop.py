"""The training loop: the order of update, log, evaluation and checkpoint that makes a run resumable to the bit."""

import collections
import dataclasses
import math
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax

from jaxgpt.runs.checkpoint import Checkpointer
from jaxgpt.runs.workdir import JsonLog, StopSignal
from jaxgpt.train.callbacks import Callback
from jaxgpt.train.config import NonfiniteConfig
from jaxgpt.train.step import Step
from jaxgpt.train.throughput import TrainingFlops
from jaxgpt.types import Metrics, Params, TrainState


@dataclasses.dataclass(frozen=True)
class LoopConfig:
    """When things happen, in steps; tokens_per_step and flops_per_token (0 and None: unknown) are for throughput and MFU.

    metric_group: what the objective's own metrics but the loss are logged under, those with a group in their name excepted.
    eval_at_start: evaluate before the first
      update, as step 0.
    """

    num_train_steps: int
    log_interval_steps: int
    eval_interval_steps: int
    save_interval_steps: int
    nonfinite: NonfiniteConfig
    tokens_per_step: int
    flops_per_token: TrainingFlops | None = None
    peak_flops: float | None = None
    metric_group: str = "train"
    eval_at_start: bool = False


class Nonfinite:
    """Counts updates that were not applied, and ends the run when they are too many."""

    def __init__(self, config: NonfiniteConfig, skipped: int = 0):
        self.config, self.skipped = config, skipped
        self._pending: collections.deque[tuple[int, Any]] = collections.deque()

    def watch(self, step: int, finite: Any, in_flight: int = 2) -> None:
        """Note the flag of `step` and look at those of steps more than in_flight ago, so that the device stays busy."""
        self._pending.append((step, finite))
        while len(self._pending) > in_flight:
            self._check(*self._pending.popleft())

    def flush(self) -> None:
        """Look at every flag noted so far."""
        while self._pending:
            self._check(*self._pending.popleft())

    def _check(self, step: int, finite: Any) -> None:
        if bool(finite):
            return
        self.skipped += 1
        if self.config.action == "stop":
            raise FloatingPointError(
                f"The loss or its gradient is not finite at step {step}; the run stops and the last good checkpoint stays. "
                "A lower optimizer.learning_rate, a longer optimizer.warmup_steps or nonfinite.action=skip may help."
            )
        if self.skipped > self.config.max_skipped:
            raise FloatingPointError(
                f"{self.skipped} batches with a loss or gradient that is not finite by step {step}, more than "
                f"nonfinite.max_skipped={self.config.max_skipped}; the run stops and the last good checkpoint stays."
            )


class Throughput:
    """Tokens per second of training alone: compilation, evaluation and checkpointing are not counted."""

    def __init__(self):
        self._started, self._tokens = None, 0

    def start(self) -> None:
        """Begin a window now."""
        self._started, self._tokens = time.perf_counter(), 0

    def count(self, tokens: int) -> None:
        """Add the tokens of an update to the window."""
        self._tokens += tokens

    def rate(self) -> float | None:
        """Tokens per second since `start`; None where nothing was counted."""
        if self._started is None or not self._tokens:
            return None
        return self._tokens / (time.perf_counter() - self._started)


def train(
    config: LoopConfig,
    *,
    state: TrainState,
    frozen: Params,
    train_step: Step,
    batches: Iterator[Any],
    evaluate: Callable[[TrainState, int], dict[str, float]],
    schedule: Callable[[Any], Any],
    checkpointer: Checkpointer,
    metrics_log: JsonLog | None,
    callbacks: Sequence[Callback],
    stop: StopSignal,
    start_step: int = 0,
    meta: dict | None = None,
    log_marks: Callable[[], dict[str, dict]] = dict,
) -> tuple[TrainState, int]:
    """Train from start_step; returns the state and the step reached, less than num_train_steps where it was stopped.

    batches: global batches from start_step on. evaluate: (state, step) -> metrics of the row. metrics_log: None on all
      processes but one. meta: what the restored checkpoint carried beside the state.

    A step's row of metrics is on disk before its checkpoint is begun, so that a run restarted from that checkpoint has
    every row up to it, and drops and writes again those after it.
    """
    meta = meta or {}
    nonfinite = Nonfinite(config.nonfinite, meta.get("skipped", 0))
    last_eval: dict[str, float] = meta.get("last_eval", {})
    throughput = Throughput()
    step = start_step

    def log(row: dict[str, float]) -> None:
        if metrics_log is not None:
            metrics_log.append(step, row)
        for callback in callbacks:
            callback.on_log(step, {"step": step, **row})

    if stop.should_stop(step):  # while it was being prepared
        return state, step
    if config.eval_at_start:
        log(evaluate(state, step))
    while step < config.num_train_steps:
        for callback in callbacks:
            callback.on_step(step)
        state, metrics = train_step(state, frozen, next(batches))
        step += 1
        nonfinite.watch(step, metrics["finite"])
        throughput.count(config.tokens_per_step)
        is_last = step == config.num_train_steps
        stopping = stop.should_stop(step)

        row: dict[str, float] = {}
        if step == start_step + 1:  # the first update compiles
            jax.block_until_ready(metrics)
            throughput.start()
        if step % config.log_interval_steps == 0 or is_last:
            row |= _train_row(metrics, float(schedule(step - 1)), throughput.rate(), config)
        saves = step % config.save_interval_steps == 0 or is_last or stopping
        evaluates = is_last or (config.eval_interval_steps and step % config.eval_interval_steps == 0)
        if evaluates:
            nonfinite.flush()
            last_eval = evaluate(state, step)
            row |= last_eval
        if row:
            if config.nonfinite.action == "skip":
                row["train/skipped_batches"] = nonfinite.skipped
            log(row)
        if saves:
            nonfinite.flush()
            carried = meta | {"skipped": nonfinite.skipped, "last_eval": last_eval, "logs": log_marks()}
            checkpointer.save(step, state, carried, last_eval or None)
        if row or saves:
            throughput.start()
        if stopping:
            break
    checkpointer.wait()
    return state, step


def _train_row(metrics: Metrics, learning_rate: float, rate: float | None, config: LoopConfig) -> dict[str, float]:
    values = {name: float(value) for name, value in jax.device_get(dict(metrics)).items()}
    hidden = ("finite", "weight", "bytes", "objective")
    group = lambda name: "train" if name in ("loss", "grad_norm") else config.metric_group
    named = {name if "/" in name else f"{group(name)}/{name}": value for name, value in values.items()}
    row = {name: value for name, value in named.items() if name.rsplit("/", 1)[-1] not in hidden}
    row["train/learning_rate"] = learning_rate
    if rate is not None and math.isfinite(rate):
        row["train/tokens_per_second"] = rate
        if config.peak_flops and config.flops_per_token:
            share = rate / (config.peak_flops * jax.device_count())
            row["train/mfu"] = share * config.flops_per_token.causal
            row["train/mfu_full_attention"] = share * config.flops_per_token.full
    return row
