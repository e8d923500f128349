"""Templates of strangers, rendered by a process of their own, which ends where one takes too much time or memory.

A template is a program: a sandbox keeps it from files and from Python, but no sandbox in the same process keeps it from
computing 10**(10**9).
"""

import atexit
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping
from typing import Any

from jaxgpt.data import template_sandbox
from jaxgpt.data.template_sandbox import TemplateError

CPU_SECONDS = 2.0  # of one rendering with its compilation; those of published templates take milliseconds
MEMORY_BYTES = 1 << 30  # of the whole process


def render(source: str, values: Mapping[str, Any] | None) -> str:
    """`template_sandbox.render` within CPU_SECONDS and MEMORY_BYTES; values None: compile only, the text is empty."""
    return _WORKER.render(source, values)


class _Worker:
    """The process, one for all templates and threads, started where it is needed and again where it has ended."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen | None = None
        self._owner = os.getpid()

    def render(self, source: str, values: Mapping[str, Any] | None) -> str:
        request = json.dumps({"source": source, "values": values}).encode()
        with self._lock:
            process = self._started()
            assert process.stdin is not None  # for the type checker
            assert process.stdout is not None
            try:
                process.stdin.write(request + b"\n")
                process.stdin.flush()
                answer = process.stdout.readline()
            except BrokenPipeError:
                answer = b""
            except BaseException:  # an answer that nobody has read would be taken for the next one
                self.close()
                raise
            if not answer.endswith(b"\n"):
                raise TemplateError(self._why_ended(), None)
        found = json.loads(answer)
        if "error" in found:
            raise TemplateError(found["error"], found["line"])
        return found["text"]

    def close(self) -> None:
        """End the process."""
        process, self._process = self._process, None
        if process is not None and self._owner == os.getpid():
            process.kill()
            process.communicate()

    def _started(self) -> subprocess.Popen:
        if self._owner != os.getpid():  # a copy of the process that has started it
            if self._process is not None:
                for pipe in (self._process.stdin, self._process.stdout):
                    if pipe is not None:
                        pipe.close()
                self._process.returncode = 0  # which is not ours to wait for
            self._process, self._owner = None, os.getpid()
        if self._process is None or self._process.poll() is not None:
            self.close()
            self._process = subprocess.Popen(
                [sys.executable, "-P", template_sandbox.__file__, str(CPU_SECONDS), str(MEMORY_BYTES)],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
                start_new_session=True,  # so that Ctrl-C is for this process alone
            )  # fmt: skip
        return self._process

    def _why_ended(self) -> str:
        assert self._process is not None  # for the type checker
        process = self._process
        code = process.wait()
        self.close()
        if code == -signal.SIGPROF:
            return f"it takes more than {CPU_SECONDS:g} seconds of processor time"
        return f"the process that renders it ended with {f'signal {-code}' if code < 0 else f'exit code {code}'}"


_WORKER = _Worker()
atexit.register(_WORKER.close)
os.register_at_fork(after_in_child=lambda: setattr(_WORKER, "_lock", threading.Lock()))
