"""A run's directory: its lock, config, metrics and the signal that asks it to stop."""

import contextlib
import errno
import fcntl
import glob
import json
import os
import shutil
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import jax
from jax.experimental import multihost_utils

from jaxgpt.json_object import parse_object, read_object, to_json


class InUseError(ValueError):
    """Another run holds the workdir."""


@contextlib.contextmanager
def lock(workdir: str, *, wait: bool = False) -> Iterator[None]:
    """Hold `workdir` (made if need be) for one run; if another run has it, wait or raise InUseError naming the holder.

    The kernel's lock ends with the process, however it ends. Process 0 alone takes it in a multi-process job. Folders that
    were made for it are removed where an error leaves nothing in them.
    """
    _check_workdir(workdir)
    made = _missing_folders(workdir)
    os.makedirs(workdir, exist_ok=True)
    if jax.process_index() != 0:
        yield
        return
    try:
        with _locked(workdir, wait=wait):
            try:
                yield
            except Exception:
                if made and os.path.isdir(workdir) and os.listdir(workdir) == [".lock"]:
                    os.remove(os.path.join(workdir, ".lock"))
                raise
    except Exception:
        for folder in made:
            with contextlib.suppress(OSError):  # somebody else is using it
                os.rmdir(folder)
        raise


def _check_workdir(workdir: str) -> None:
    """ValueError where a folder can neither be there nor be made."""
    if os.path.islink(workdir) and not os.path.exists(workdir):
        raise ValueError(f"--workdir={workdir} is a symbolic link that leads to nothing, or in a circle.")
    if os.path.exists(workdir) and not os.path.isdir(workdir):
        raise ValueError(f"--workdir={workdir} is a file, not a folder.")


def _missing_folders(folder: str) -> list[str]:
    """Those of a folder and its parents that are not there, the innermost first."""
    folder, missing = os.path.abspath(folder), []
    while not os.path.exists(folder) and os.path.dirname(folder) != folder:
        missing.append(folder)
        folder = os.path.dirname(folder)
    return missing


@contextlib.contextmanager
def _locked(workdir: str, *, wait: bool) -> Iterator[None]:
    with open(os.path.join(workdir, ".lock"), "a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EAGAIN, errno.EACCES):
                raise
            file.seek(0)
            raise InUseError(f"--workdir={workdir} is in use by another run ({file.read().strip()}).") from error
        if not os.fstat(file.fileno()).st_nlink:  # the run that had it has failed, and has removed its folder
            raise InUseError(f"--workdir={workdir} was in use by another run until now; try again.")
        file.seek(0)
        file.truncate()
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        _clear_temporary(workdir)
        yield


# What a killed run may have been writing; the lock is held, so that nobody is writing it now.
_TEMPORARY = (
    *("*.json.tmp", "*.jsonl.tmp", "*.html.tmp", "*.model.tmp", "*.jinja.tmp", "wandb_id.tmp"),
    *("plots/*.png.tmp", "checkpoints/digests/*.json.tmp"),
)


def _clear_temporary(workdir: str) -> None:
    for pattern in _TEMPORARY:
        for path in glob.glob(os.path.join(glob.escape(workdir), pattern)):
            os.remove(path)


_INSIDE = ".partial"
_MOVING = ".moving"  # in it, the names of what is being moved out


@contextlib.contextmanager
def new_folder(workdir: str) -> Iterator[str]:
    """A folder to write to, whose content is that of `workdir` at the end; where anything fails there is neither.

    It is WORKDIR.partial, which becomes `workdir` at once; or WORKDIR/.partial where `workdir` is there already, empty,
    since nothing can be renamed over a mount point. What is in that is moved up at the end, manifest.json last.

    Raises ValueError where `workdir` is there and not an empty folder, or another run is writing it.
    """
    _check_workdir(workdir)
    workdir = os.path.abspath(workdir)
    is_there = os.path.lexists(workdir)
    partial = os.path.join(workdir, _INSIDE) if is_there else f"{workdir}.partial"
    if is_there:
        left = [] if not os.path.isdir(partial) else [_INSIDE, *_being_moved(partial)]  # by a run that was killed
        if not os.path.isdir(workdir) or set(os.listdir(workdir)) - set(left):
            raise ValueError(f"--workdir={workdir} is not empty, and not what this command makes; use another folder.")
    with lock(partial):
        try:
            for name in _being_moved(partial):
                _remove(os.path.join(workdir, name))
            _clear(partial)
            yield partial
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        _move_to(workdir, partial)


def _move_to(workdir: str, partial: str) -> None:
    """Give the finished content of a folder its place: by one rename, or where that cannot be, one name after the other."""
    os.remove(os.path.join(partial, ".lock"))
    if not os.path.exists(workdir):
        with contextlib.suppress(OSError):  # EXDEV, EBUSY: then as below
            os.replace(partial, workdir)
            return
    names = sorted(os.listdir(partial), key=lambda name: name == "manifest.json")
    write_atomic(os.path.join(partial, _MOVING), json.dumps({"names": names}))
    os.makedirs(workdir, exist_ok=True)
    for name in names:
        shutil.move(os.path.join(partial, name), os.path.join(workdir, name))
    shutil.rmtree(partial)


def _being_moved(partial: str) -> list[str]:
    """What a run that was killed may have moved up already, without its manifest."""
    moving = read_json(os.path.join(partial, _MOVING)) if os.path.isdir(partial) else None
    return list(moving["names"]) if moving else []


def _remove(path: str) -> None:
    if os.path.isdir(path):
        shutil.rmtree(path)
    elif os.path.lexists(path):
        os.remove(path)


def _clear(folder: str) -> None:
    """Remove what a killed run left; its lock is held."""
    for entry in os.scandir(folder):
        if entry.name != ".lock":
            _remove(entry.path)


def write_atomic(path: str, text: str) -> None:
    """Replace the file at once and durably: a reader, or a restart after a kill, sees the old or the new text whole.

    A link is followed; a device or a pipe is written to, and stays what it is.
    """
    if os.path.exists(path) and not os.path.isfile(path):
        with open(path, "w", encoding="utf-8") as file:
            file.write(text)
        return
    path = os.path.realpath(path)
    temporary = f"{path}.tmp"
    try:
        with open(temporary, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError:
        with contextlib.suppress(OSError):  # on a full disk it takes room that others need
            os.remove(temporary)
        raise


def read_json(path: str) -> dict | None:
    """The object of a JSON file, None where there is none; ValueError naming the file and line of what is none."""
    return read_object(path) if os.path.isfile(path) else None


def write_config(workdir: str, config: dict) -> None:
    """config.json: the resolved config, from process 0."""
    if jax.process_index() == 0:
        write_atomic(os.path.join(workdir, "config.json"), json.dumps(config, indent=2) + "\n")


def check_same(workdir: str, config: dict, *, ignore: tuple[str, ...] = ()) -> None:
    """ValueError naming the first field in which `config` differs from the workdir's, if there is one.

    ignore: dotted fields (with all below them) that may differ.
    """
    stored = read_json(os.path.join(workdir, "config.json"))
    if stored is None:
        return
    old, new = _flatten(stored), _flatten(json.loads(json.dumps(config)))
    for field in sorted(old.keys() | new.keys()):
        free = any(field == name or field.startswith(f"{name}.") for name in ignore)
        if not free and old.get(field) != new.get(field):
            raise ValueError(
                f"{field}={new.get(field)!r} differs from {old.get(field)!r}, with which the run in {workdir} was started; "
                "use another --workdir for another run."
            )


def check_sources(workdir: str, stored: dict[str, str], now: dict[str, str]) -> None:
    """ValueError naming the first field whose content is not that with which the run in `workdir` was started.

    stored, now: digests by field; the order of `now` is the order in which they are compared. A field that `stored` lacks,
    as of runs that an earlier version started, cannot be compared, which is said in a line.
    """
    unknown = [field for field in now if field not in stored]
    if unknown:
        lacks = f"{workdir} does not say with which {', '.join(unknown)} it was started, so that cannot be verified."
        print(lacks, file=sys.stderr, flush=True)
    for field in (*now, *sorted(stored.keys() - now.keys())):
        was, found = stored.get(field), now.get(field, "none")
        if was is not None and was != found:
            raise ValueError(
                f"{field} has other content than when the run in {workdir} was started (then the digest was {was[:12]}, now "
                f"it is {found[:12]}); restore it, or use another --workdir."
            )


def _flatten(config: Any, field: str = "") -> dict[str, Any]:
    if not isinstance(config, dict):
        return {field: config}
    return {
        k: v for key, value in config.items() for k, v in _flatten(value, f"{field}.{key}" if field else key).items()
    }


CLOCK_METRICS = (
    "train/tokens_per_second",
    "train/mfu",
    "train/mfu_full_attention",
    "time/rollout_seconds",
    "time/update_seconds",
)


def without_times(row: dict[str, float]) -> dict[str, float]:
    """The metrics that the same run has again, however fast the machine is."""
    return {name: value for name, value in row.items() if name not in CLOCK_METRICS}


_SUMMARIZED = (
    "eval/loss", "eval/perplexity", "eval/bits_per_byte", "eval/accuracy", "eval/scores", "eval/gold", "eval/kl",
    "train/loss",
)  # fmt: skip


def summary(metrics: dict[str, float]) -> str:
    """The metrics that say how a run did, in a line; not RL's eval/loss, which is a reward with its sign turned."""
    hidden = "eval/loss" if "eval/scores" in metrics else ""
    shown = [name for name in _SUMMARIZED if metrics.get(name) is not None and name != hidden]
    return ", ".join(f"{name} {metrics[name]:.4f}" for name in shown)


def read_rows(path: str) -> list[dict]:
    """The complete rows of a jsonl file that a killed run may have left with half a last line; [] without the file.

    Raises ValueError naming the file and the line of a row that is damaged.
    """
    if not os.path.isfile(path):
        return []
    with open(path, "rb") as file:
        lines = file.read().split(b"\n")[:-1]  # what follows the last newline was never completed
    return [parse_object(line, f"{path}, line {number}") for number, line in enumerate(lines, 1)]


def read_metrics(path: str) -> list[dict[str, float]]:
    """The rows of a metrics.jsonl, each without what was not finite; ValueError as `read_rows`."""
    return [{name: value for name, value in row.items() if value is not None} for row in read_rows(path)]


def read_steps(path: str) -> list[dict]:
    """The rows of a file that has a "step" in each; ValueError as `read_rows`, and for a row without one."""
    rows = read_rows(path)
    for number, row in enumerate(rows, 1):
        if type(row.get("step")) is not int:
            raise ValueError(f"{path}, line {number}: the row has no step; the file is damaged.")
    return rows


class JsonLog:
    """A jsonl file of rows with a "step" that only grows; every append is on disk before it returns."""

    def __init__(self, path: str):
        self._path = path
        rows = read_steps(path)
        self._last = rows[-1]["step"] if rows else -1

    def truncate_after(self, step: int) -> None:
        """Drop the rows of later steps and half a last line: a run restarted from `step` writes them again."""
        if not os.path.isfile(self._path):
            return
        rows = [row for row in read_steps(self._path) if row["step"] <= step]
        write_atomic(self._path, "".join(to_json(row) + "\n" for row in rows))
        self._last = rows[-1]["step"] if rows else -1

    def append(self, step: int, *rows: dict) -> None:
        """Write the rows of one step; RuntimeError if the step is not later than the last one."""
        if step <= self._last:
            raise RuntimeError(f"{self._path}: step {step} after step {self._last}; a step is written once.")
        with open(self._path, "a") as file:
            file.write("".join(to_json({"step": step, **row}) + "\n" for row in rows))
            file.flush()
            os.fsync(file.fileno())
        self._last = step


_JAX_LOOKS_FOR_SIGTERM_SECONDS = 1.0  # how often jax's listener (xla's preemption notifier) looks for one


class Stopped(BaseException):
    """A run was asked to end before its end, and has saved what it has.

    No Exception, as KeyboardInterrupt is none: what catches errors of a user's function must not catch it. number: of the
    signal.
    """

    def __init__(self, number: int, sentence: str):
        super().__init__(sentence)
        self.number = number


class StopSignal:
    """Whether the run was asked to end: SIGTERM or SIGINT here, or a preemption notice to any process of the job.

    A second SIGINT interrupts at once.
    """

    def __init__(self):
        self._event = threading.Event()
        self._number = signal.SIGTERM
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "StopSignal":
        if threading.current_thread() is threading.main_thread():
            # A job of several processes agrees on a step through jax's own handler of SIGTERM, which one of ours would
            # replace; to it an interrupt is passed on.
            numbers = (signal.SIGTERM, signal.SIGINT) if jax.process_count() == 1 else (signal.SIGINT,)
            for number in numbers:
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        if jax.process_count() > 1 and kind is None:
            # jax's agreement about a SIGTERM waits minutes for a process that has left meanwhile. So none leaves before
            # the last one is deaf to new signals, and an agreement about earlier ones is over.
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            multihost_utils.sync_global_devices("every process is deaf to SIGTERM")
            time.sleep(1.5 * _JAX_LOOKS_FOR_SIGTERM_SECONDS)
            multihost_utils.sync_global_devices("every agreement about a SIGTERM is over")

    def _handle(self, number: int, _: Any) -> None:
        if number == signal.SIGINT and self._event.is_set():
            raise KeyboardInterrupt
        if not self._event.is_set():
            self._number = signal.Signals(number)
        self._event.set()
        if jax.process_count() > 1:
            os.kill(os.getpid(), signal.SIGTERM)

    def stopped(self, where: str) -> Stopped:
        """The exception that ends the run; where: what it had reached, e.g. "at step 3 of 10"."""
        what = "Interrupted" if self._number == signal.SIGINT else "Preempted"
        return Stopped(self._number, f"{what} {where}; the same command resumes.")

    def should_stop(self, step: int) -> bool:
        """Whether to save and leave after `step`; all processes of a job get the same answer."""
        if jax.process_count() > 1:
            return multihost_utils.reached_preemption_sync_point(step)
        return self._event.is_set()
