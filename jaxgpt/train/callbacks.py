"""What watches a run: progress bar, TensorBoard, Weights & Biases, profiler. Each is one function making a Callback."""

import dataclasses
import os
import secrets
import time
from collections.abc import Callable
from typing import Any

import jax
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.summary import scalar
from tqdm import tqdm

from jaxgpt.runs.workdir import write_atomic
from jaxgpt.train.config import ProfileConfig, WandbConfig


def _nothing(*_: Any) -> None:
    pass


@dataclasses.dataclass(frozen=True)
class Callback:
    """on_step(step) before each update; on_log(step, row) for each row of metrics.jsonl; close() at the end."""

    on_step: Callable[[int], None] = _nothing
    on_log: Callable[[int, dict[str, float]], None] = _nothing
    close: Callable[[], None] = _nothing


def progress_bar(start_step: int, num_train_steps: int) -> Callback:
    """A bar with loss, or score and KL in RL, tokens/s and the time left."""
    bar = tqdm(initial=start_step, total=num_train_steps, unit="step", dynamic_ncols=True, mininterval=0.5)

    def on_log(step, row):
        if "objective/scores" in row or "eval/scores" in row:
            shown = {"score": "objective/scores", "kl": "objective/kl", "eval": "eval/scores"}
        else:
            shown = {"loss": "train/loss", "eval": "eval/loss"}
        fields = {short: f"{row[name]:.3f}" for short, name in shown.items() if name in row}
        if "train/tokens_per_second" in row:
            fields["tok/s"] = f"{row['train/tokens_per_second']:,.0f}"
        bar.set_postfix(fields, refresh=False)

    return Callback(on_step=lambda step: bar.update(step - bar.n) and None, on_log=on_log, close=bar.close)


def tensorboard(workdir: str, start_step: int) -> Callback:
    """The scalars of metrics.jsonl as TensorBoard events; a resumed run hides what the interrupted one wrote beyond it.

    A row is on disk when on_log returns. tensorboardX's SummaryWriter writes in a thread, in which a full disk's error is
    lost, and after which the next row waits for ever.
    """
    folder = os.path.join(workdir, "tensorboard")
    os.makedirs(folder, exist_ok=True)
    writer = EventsWriter(os.path.join(folder, "events"))

    def write(step: int, **content: Any) -> None:
        writer.write_event(Event(step=step, wall_time=time.time(), **content))

    if start_step:
        write(start_step + 1, session_log=SessionLog(status=SessionLog.START))

    def on_log(step: int, row: dict[str, float]) -> None:
        for name, value in row.items():
            if name != "step":
                write(step, summary=scalar(name, value))
        writer.flush()

    return Callback(on_log=on_log, close=writer.close)


def wandb(config: WandbConfig, workdir: str, run_config: dict) -> Callback:
    """The same rows to Weights & Biases; one run per workdir, continued on resume.

    Its id is drawn once and kept in WORKDIR/wandb_id: names of workdirs repeat (runs/a/sft, runs/b/sft), and one that is
    moved stays the same run.
    """
    try:
        import wandb as client
    except ImportError as error:
        raise ValueError(
            "wandb.project is set but wandb is not installed: pip install -e '.[wandb]' in the project's folder."
        ) from error
    path = os.path.join(workdir, "wandb_id")
    if not os.path.isfile(path):
        write_atomic(path, f"{secrets.token_hex(8)}\n")
    with open(path) as file:
        run_id = file.read().strip()
    run = client.init(
        project=config.project,
        name=config.name or "/".join(os.path.abspath(workdir).split(os.sep)[-2:]),
        id=run_id,
        resume="allow",
        dir=workdir,
        mode=config.mode or None,
        group=config.group or None,
        tags=config.tags or None,
        config=run_config,
    )
    return Callback(on_log=lambda step, row: run.log(row, step=step), close=run.finish)


def profiler(config: ProfileConfig, workdir: str) -> Callback:
    """A jax.profiler trace of the configured steps, in WORKDIR/profile (open it with TensorBoard or xprof)."""
    recording: list[int] = []

    def stop():
        if recording:
            recording.clear()
            jax.profiler.stop_trace()

    def on_step(step):
        if step == config.start_step:
            jax.profiler.start_trace(os.path.join(workdir, "profile"))
            recording.append(step)
        elif step == config.start_step + config.num_steps:
            stop()

    return Callback(on_step=on_step, close=stop)
