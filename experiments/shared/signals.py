"""How a command ends that is asked to: one sentence, and exit code 42 after SIGTERM, 130 after Ctrl-C, at whatever point.

A run that trains saves first (`jaxgpt.runs.workdir.StopSignal`); all else leaves what it has left by then, which the same
command goes on from.
"""

import contextlib
import os
import signal
import sys
from collections.abc import Callable, Iterator
from typing import NoReturn

PREEMPTED, INTERRUPTED = 42, 130
_SENTENCE = {
    signal.SIGTERM: "Preempted; the same command starts again, or goes on where it was.",
    signal.SIGINT: "Interrupted; the same command starts again, or goes on where it was.",
}


def end_at_once() -> None:
    """Until `one_sentence` takes over, while modules are imported and nothing has begun: end the process at a signal."""
    codes = {signal.SIGTERM: PREEMPTED, signal.SIGINT: INTERRUPTED}

    def handle(number: int, _: object) -> None:
        os.write(2, f"{_SENTENCE[signal.Signals(number)]}\n".encode())
        os._exit(codes[signal.Signals(number)])

    for number in codes:
        signal.signal(number, handle)


@contextlib.contextmanager
def one_sentence(preempted_code: Callable[[], int]) -> Iterator[None]:
    """Turn SIGTERM, Ctrl-C, and the Stopped of a run that has saved, into a sentence on stderr and the exit code."""
    from jaxgpt.runs.workdir import Stopped  # imports jax, for which `end_at_once` must not wait

    def raise_stopped(number: int, _: object) -> NoReturn:
        signal.signal(number, signal.SIG_IGN)  # once is enough; what follows is only clean-up
        raise Stopped(number, _SENTENCE[signal.SIGTERM])

    signal.signal(signal.SIGTERM, raise_stopped)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    except Stopped as stopped:
        _be_deaf()
        _end(str(stopped), INTERRUPTED if stopped.number == signal.SIGINT else preempted_code())
    except KeyboardInterrupt:
        _be_deaf()
        _end(_SENTENCE[signal.SIGINT], INTERRUPTED)


def _be_deaf() -> None:
    """Ignore further signals until the process has ended: a Ctrl-C in a terminal is often followed by a parent's SIGTERM."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def _end(sentence: str, code: int) -> NoReturn:
    print(sentence, file=sys.stderr, flush=True)
    sys.exit(code)
