"""The one thread that owns the engine: calls wait for it in a bounded queue, pieces of text come back as they are made."""

import collections
import dataclasses
import logging
import threading
from collections.abc import Callable

from jaxgpt.generate.stream import Piece, TextEngine
from jaxgpt.serving.protocol import ApiError, Call, internal_error


@dataclasses.dataclass(eq=False)
class ServedCall:
    """A call being served. emit: given (index of a choice, its next piece), or (index, what ended it), by the thread."""

    call: Call
    emit: Callable[[int, Piece | ApiError], None]
    is_cancelled: bool = False


class Worker:
    """Runs an engine in a thread of its own, from `start` to `stop`.

    Whatever goes wrong with one request ends that request, with an error for its client. A step serves all of them, so that
    one that fails ends the worker: every client gets an error, and the process has to be started again.

    max_queue: choices that may wait beyond those the slots take. failure: what broke the engine, None while it is well.
    """

    def __init__(self, engine: TextEngine, *, num_slots: int, max_queue: int):
        self.failure: str | None = None
        self._engine, self._num_slots, self._max_queue = engine, num_slots, max_queue
        self._waiting: collections.deque[tuple[ServedCall, int]] = collections.deque()
        self._running: dict[int, tuple[ServedCall, int]] = {}
        self._is_draining = self._is_stopped = False
        self._changed = threading.Condition()
        self._on_failure: Callable[[], object] = lambda: None
        self._thread = threading.Thread(target=self._run, name="engine")

    def start(self, on_failure: Callable[[], object] = lambda: None) -> None:
        """Begin to serve. on_failure: called by the thread when the engine has failed and all clients know."""
        self._on_failure = on_failure
        self._thread.start()

    def submit(self, call: Call, emit: Callable[[int, Piece | ApiError], None]) -> ServedCall:
        """Queue a call. ApiError 429 where the queue is full, 503 while shutting down, 500 where the engine broke."""
        with self._changed:
            if self.failure is not None:
                raise ApiError(500, self.failure)
            if self._is_draining:
                raise ApiError(503, "The server is shutting down.", code="shutting_down")
            room = self._num_slots + self._max_queue - len(self._running) - len(self._waiting)
            if len(call.requests) > room:
                raise ApiError(429, f"The queue is full: {len(self._waiting)} are waiting.", code="queue_full")
            job = ServedCall(call, emit)
            self._waiting.extend((job, index) for index in range(len(call.requests)))
            self._changed.notify_all()
            return job

    def cancel(self, job: ServedCall) -> None:
        """Give up a job: what waits is dropped, what runs frees its slots before the next step. No piece is awaited."""
        with self._changed:
            job.is_cancelled = True
            self._waiting = collections.deque(item for item in self._waiting if item[0] is not job)
            self._changed.notify_all()

    def drain(self) -> None:
        """Refuse new calls from now on; those that wait or run go on."""
        with self._changed:
            self._is_draining = True

    def stop(self) -> None:
        """End the thread; calls that are not done end with an error."""
        with self._changed:
            self._is_draining = self._is_stopped = True
            self._changed.notify_all()
        self._thread.join()

    def load(self) -> tuple[int, int]:
        """How many choices run, and how many wait."""
        with self._changed:
            return len(self._running), len(self._waiting)

    def _run(self) -> None:
        error = ApiError(503, "The server was shut down before the response was complete.", code="shutting_down")
        try:
            while self._admit():
                for slot, piece in self._engine.step():
                    self._deliver(slot, piece)
        except Exception as problem:  # whatever it is, clients must not wait for ever
            logging.exception("The engine failed.")
            error = ApiError(500, f"The engine failed: {type(problem).__name__}.")
        with self._changed:
            self._is_draining = True
            self.failure = str(error) if error.status == 500 else None
            for job, index in [*self._running.values(), *self._waiting]:
                self._emit(job, index, error)
            self._running.clear()
            self._waiting.clear()
        if self.failure is not None:
            self._on_failure()

    def _deliver(self, slot: int, piece: Piece | Exception) -> None:
        with self._changed:
            job, index = self._running[slot]
            if isinstance(piece, Exception):
                logging.error("The text of a request failed.", exc_info=piece)
                piece = internal_error(piece)
            if isinstance(piece, ApiError) or piece.finish:
                del self._running[slot]
            self._emit(job, index, piece)

    def _emit(self, job: ServedCall, index: int, piece: Piece | ApiError) -> None:
        """Tell a job's client, if there still is one: after `cancel` nobody listens, which the lock makes sure of."""
        if job.is_cancelled:
            return
        try:
            job.emit(index, piece)
        except Exception:  # the event loop it was called from has gone
            job.is_cancelled = True

    def _admit(self) -> bool:
        """Wait for work, let go what was cancelled and start what there are slots for; False when it is time to stop."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._running or self._is_stopped)
            if self._is_stopped:
                return False
            for slot, (job, _) in list(self._running.items()):
                if job.is_cancelled:
                    self._engine.cancel(slot)
                    del self._running[slot]
            while self._waiting and self._engine.engine.num_free:
                job, index = self._waiting.popleft()
                try:
                    slot = self._engine.start(job.call.requests[index], job.call.stop, job.call.prefix)
                except Exception as error:
                    logging.exception("A request could not be started.")
                    self._emit(job, index, internal_error(error))
                else:
                    self._running[slot] = (job, index)
            return True
