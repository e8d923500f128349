"""Runs of a sweep as processes, several at a time: ROOT/stages/NAME-KEY each, with its output in ROOT/logs/NAME-KEY.

Any number of processes, on all hosts that see ROOT, may work on the same runs: each run is done by one of them, while those
that need it wait.
"""

import contextlib
import os
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

from experiments.shared.signals import INTERRUPTED, PREEMPTED
from experiments.shared.stages import start_stage
from jaxgpt.pipeline.sweep import StageRun
from jaxgpt.runs import workdir as workdirs

POLL_SECONDS = 0.2


class StartedRun(NamedTuple):
    """A run that is going on, and the lock that is held meanwhile."""

    run: StageRun
    child: subprocess.Popen
    held: contextlib.ExitStack


def stage_path(root: str, folder: str) -> str:
    """The workdir of a run."""
    return os.path.join(root, "stages", folder)


def log_path(root: str, folder: str, name: str = "output.log") -> str:
    """A file about a run."""
    return os.path.join(root, "logs", folder, name)


def is_finished(root: str, folder: str) -> bool:
    """Whether a run is complete."""
    return os.path.exists(os.path.join(stage_path(root, folder), "manifest.json"))


def failure(root: str, folder: str) -> int | None:
    """The exit code of a run that failed when it was last tried; None for all others."""
    path = log_path(root, folder, "exit_code")
    if is_finished(root, folder) or not os.path.exists(path):
        return None
    with open(path) as file:
        return int(file.read())


def missing(root: str, chains: Iterable[Mapping[str, StageRun]]) -> dict[str, StageRun]:
    """The runs that have to be done for the last of each chain (stage -> run, parents first), by folder, parents first."""
    needed: dict[str, StageRun] = {}

    def visit(chain: Mapping[str, StageRun], name: str) -> None:
        run = chain[name]
        if run.folder not in needed and not is_finished(root, run.folder):
            for parent in run.stage.parents():
                visit(chain, parent)
            needed[run.folder] = run

    for chain in chains:
        visit(chain, list(chain)[-1])
    return needed


def run_all(
    root: str,
    runs: Mapping[str, StageRun],
    num_processes: int,
    environment: Mapping[str, str],
    on_finish: Callable[[str], None],
) -> None:
    """Do runs, parents first, at most num_processes at a time.

    A run that fails leaves its exit code, and those that are built on it are not done. environment: of each process, with
    "{worker}" replaced by its number. on_finish hears of each run's folder.

    Raises workdir.Stopped when all have saved, where SIGTERM or SIGINT ended it before its end.
    """
    waiting, lost = dict(runs), set()
    asked: set[int] = set()  # the workers that were told to stop
    jobs: dict[int, StartedRun] = {}
    with workdirs.StopSignal() as stop:
        try:
            while jobs or (waiting and not stop.should_stop(0)):
                for worker, job in list(jobs.items()):
                    if stop.should_stop(0) and worker not in asked:
                        asked.add(worker)  # once: it saves, and goes on from there another time
                        job.child.terminate()
                    if job.child.poll() is None:
                        continue
                    del jobs[worker]
                    with job.held:
                        if not stop.should_stop(0) and job.child.returncode in (PREEMPTED, INTERRUPTED):
                            waiting[job.run.folder] = job.run  # it alone was stopped, has saved, and goes on
                            continue
                        if not _is_done(root, job, stopped=stop.should_stop(0)):
                            lost.add(job.run.folder)
                            continue
                    on_finish(job.run.folder)
                for folder, run in list(waiting.items()):
                    worker = next((number for number in range(num_processes) if number not in jobs), None)
                    if worker is None or stop.should_stop(0):
                        break
                    parents = set(run.folders.values()) - {folder}
                    if parents & lost:
                        lost.add(waiting.pop(folder).folder)
                    elif is_finished(root, folder):  # another process has done it
                        on_finish(waiting.pop(folder).folder)
                    elif all(is_finished(root, parent) for parent in parents):
                        added = {name: value.replace("{worker}", str(worker)) for name, value in environment.items()}
                        if job := _start(root, run, os.environ | added):
                            jobs[worker] = job
                            del waiting[folder]
                time.sleep(POLL_SECONDS)
        finally:
            for job in jobs.values():
                with job.held:
                    job.child.terminate()
                    job.child.wait()
    if stop.should_stop(0):
        raise stop.stopped("before all trials were finished")


def _start(root: str, run: StageRun, environment: Mapping[str, str]) -> StartedRun | None:
    """Begin or resume a run, if nobody else is doing or has done it."""
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(workdirs.lock(os.path.dirname(log_path(root, run.folder))))
        except workdirs.InUseError:
            return None
        if is_finished(root, run.folder):
            return None
        with contextlib.suppress(FileNotFoundError):
            os.remove(log_path(root, run.folder, "exit_code"))
        folders = {name: stage_path(root, folder) for name, folder in run.folders.items()}
        title = f"{run.folder}: {run.stage.title or run.name}"
        with open(log_path(root, run.folder), "a") as log:
            child = start_stage(
                run.stage, title, folders[run.name], folders, env=environment, stdout=log, stderr=subprocess.STDOUT
            )
        return StartedRun(run, child, stack.pop_all())


def _is_done(root: str, job: StartedRun, *, stopped: bool) -> bool:
    """Whether a run that has ended is complete; where it is not, and was not asked to stop, its failure is noted."""
    folder, code = job.run.folder, job.child.returncode
    if code == 0 and is_finished(root, folder):
        return True
    if not stopped:
        code = 128 - code if code < 0 else code or 1
        workdirs.write_atomic(log_path(root, folder, "exit_code"), f"{code}\n")
        with open(log_path(root, folder), encoding="utf-8", errors="replace") as file:
            last = file.read().strip().rpartition("\n")[2]
        print(f"{folder} failed with exit code {code}: {last}", flush=True)
    return False
