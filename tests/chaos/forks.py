"""Commands as forks of one process that has imported everything, and has not yet started jax: a tiny run takes seconds."""

import atexit
import contextlib
import functools
import importlib
import json
import os
import runpy
import signal
import sys
import tempfile
import threading
import time
import traceback
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple, NoReturn

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
COMMANDS = (
    "tokenizer", "pretrain", "sft", "reward", "dpo", "ppo", "grpo", "best_of_n", "finalize", "evaluate", "import_hf",
    "export_hf", "pipeline", "generate", "make_data",
)  # fmt: skip
TIMEOUT_SECONDS = 120.0


class Outcome(NamedTuple):
    """How a command ended: its exit code (minus the signal that ended it, None where it hung), output, file operations."""

    code: int | None
    out: str
    err: str
    operations: int

    @property
    def error(self) -> str:
        """The last line of stderr."""
        return (self.err.strip().splitlines() or [""])[-1]


def prepare() -> None:
    """Set the environment of jax and import all commands; to be called before anything else imports jax."""
    os.chdir(ROOT)
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=1 --xla_backend_optimization_level=0"
    os.environ["JAX_COMPILATION_CACHE_DIR"] = os.path.join(
        os.environ.get("JAX_COMPILATION_CACHE_DIR", os.path.join(ROOT, ".cache", "jax")), "chaos"
    )
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.05"
    os.environ["OPENBLAS_NUM_THREADS"] = "1"
    os.environ["TQDM_DISABLE"] = "1"
    for name in COMMANDS:
        importlib.import_module(f"experiments.{name}")
    warnings.filterwarnings("ignore", message=r".*found in sys\.modules after import")
    warnings.filterwarnings("ignore", message=r"os\.fork\(\) was called|.*is multi-threaded, use of fork")


def run(stage: str, arguments: list[str], *, root: str, fault: Any = None) -> Outcome:
    """Run experiments.STAGE in a fork of its own process group; the file operations below `root` are counted."""
    from tests.chaos.faults import Counter, install

    counter = Counter()

    def child() -> None:
        install(root, counter, fault)
        if stage == "pipeline":
            _fork_stages()
        run_stage(stage, arguments)

    return _run(child, counter)


def call(function: Callable[[], None]) -> Outcome:
    """Run a function in a fork, so that whatever it starts is not in this process."""
    from tests.chaos.faults import Counter

    return _run(function, Counter())


def _run(child: Callable[[], None], counter: Any) -> Outcome:
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        pid = os.fork()
        if not pid:
            os.setsid()
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            os.dup2(out.fileno(), 1)
            os.dup2(err.fileno(), 2)
            finish(child)
        try:
            code = _wait(pid)
        except BaseException:  # the campaign is ended
            with contextlib.suppress(ProcessLookupError):
                os.killpg(pid, signal.SIGKILL)
            raise
        texts = []
        for file in (out, err):
            file.seek(0)
            texts.append(file.read().decode(errors="replace"))
        return Outcome(code, *texts, counter.value)


def _wait(pid: int) -> int | None:
    end = time.monotonic() + TIMEOUT_SECONDS
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(pid, signal.SIGKILL)  # whoever it has left behind
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > end:
            os.killpg(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            return None
        time.sleep(0.01)


def run_stage(stage: str, arguments: list[str]) -> None:
    """Run a command as `python -m experiments.STAGE` would."""
    sys.argv = [f"experiments/{stage}.py", *arguments]
    runpy.run_module(f"experiments.{stage}", run_name="__main__", alter_sys=True)


def finish(function: Callable[[], None]) -> NoReturn:
    """Call the function and end the process as Python would at its end."""
    code: Any = 0
    try:
        function()
    except SystemExit as error:
        code = error.code
    except BaseException:
        traceback.print_exc()
        code = 1
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code if isinstance(code, int) else 0 if code is None else 1)


class _Stages:
    """Forks of this process as it is now, made on demand for a pipeline, which has started jax when it starts its stages."""

    def __init__(self) -> None:
        self._asked, ask = os.pipe()
        answers, self._answer = os.pipe()
        if not os.fork():
            os.close(ask)
            os.close(answers)
            self._serve()
        os.close(self._asked)
        os.close(self._answer)
        self._ask, self._answers = os.fdopen(ask, "w"), os.fdopen(answers)

    def _serve(self) -> NoReturn:
        with os.fdopen(self._asked) as asked:
            for line in asked:
                pid = os.fork()
                if not pid:
                    finish(functools.partial(run_stage, *json.loads(line)))
                code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
                os.write(self._answer, f"{code}\n".encode())
        os._exit(0)

    def start(self, command: str, *arguments: str, **_: Any) -> "_Stages":
        """In place of experiments.shared.stages.start: begin a stage; as much of a Popen as a pipeline needs."""
        sys.stdout.flush()
        print(json.dumps([command, arguments]), file=self._ask, flush=True)
        return self

    def poll(self) -> int:
        """The exit code of the stage, when it has ended."""
        return int(self._answers.readline())


def _fork_stages() -> None:
    """The stages of a pipeline are forks, too, whose operations count with its own."""
    from experiments.shared import stages

    stages.start = _Stages().start  # type: ignore
