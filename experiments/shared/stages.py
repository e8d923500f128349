"""Stages as processes: their commands, printed so that they can be copied, and ended with the process that started them."""

import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from typing import Any, NoReturn

from experiments.shared.signals import INTERRUPTED, PREEMPTED
from jaxgpt.pipeline.graph import StageConfig
from jaxgpt.runs.workdir import Stopped

# Linux ends the child with its parent; the child asks for it, since a fork by a process with jax's threads is not safe.
DIE_WITH_PARENT = "import ctypes, os, sys; ctypes.CDLL(None).prctl(1, 9); os.execv(sys.argv[1], sys.argv[1:])"


def start(command: str, *arguments: str, **options: Any) -> subprocess.Popen:
    """A process of experiments.COMMAND, which on Linux does not outlive this one; options: of Popen."""
    line = [sys.executable, "-m", f"experiments.{command}", *arguments]
    if sys.platform == "linux":
        line = [sys.executable, "-S", "-c", DIE_WITH_PARENT, *line]
    return subprocess.Popen(line, **options)


def start_stage(
    stage: StageConfig, title: str, workdir: str, folders: Mapping[str, str], **options: Any
) -> subprocess.Popen:
    """A process of a stage, with its command printed; folders: the workdirs of the stages it is built on."""
    arguments = [f"--workdir={workdir}", *stage.flags(folders)]
    print(f"\n== {title}\n$ python -m experiments.{stage.command} {shlex.join(arguments)}", flush=True)
    return start(stage.command, *arguments, **options)


def wait(child: subprocess.Popen) -> int:
    """The exit code of a process, which is asked to save and end by a SIGTERM or SIGINT to this one.

    Raises workdir.Stopped when it has, after a signal to either of the two.
    """
    heard: list[int] = []

    def pass_on(number: int, _: Any) -> None:
        if number == signal.SIGINT and number in heard:
            raise KeyboardInterrupt
        heard.append(number)
        child.terminate()  # not SIGINT: a terminal has sent that to both, and a second one would not let it save

    previous = {number: signal.signal(number, pass_on) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        while (code := child.poll()) is None:
            time.sleep(0.05)  # Python would hear a signal that comes just before a wait without end only after it
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    if not heard and code in (PREEMPTED, INTERRUPTED):
        heard.append(signal.SIGTERM if code == PREEMPTED else signal.SIGINT)
    if heard:
        what = "Preempted" if heard[0] == signal.SIGTERM else "Interrupted"
        raise Stopped(heard[0], f"{what}; the same command resumes.")
    return 128 - code if code < 0 else code  # as a shell gives it for a signal


def fail(sentence: str, code: int) -> NoReturn:
    """Say what went wrong, and exit."""
    print(f"error: {sentence}", file=sys.stderr)
    sys.exit(code)
