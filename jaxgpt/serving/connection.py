"""Connections that end: a bounded number of them, each with a bounded time to send a request and to read what is sent."""

import asyncio
import json
import os
import resource
import socket
from collections.abc import Callable

import h11
from uvicorn.protocols.http.h11_impl import STATUS_PHRASES, H11Protocol

from jaxgpt.serving.protocol import ApiError

MOST = 1000  # connections, where nobody says how many
RESERVE = 32  # open files beyond what is open at the start and the connections


def max_connections(wanted: int) -> int:
    """How many connections the limit of open files has room for: `wanted`, or as many as that up to 1000 where it is 0.

    Raises ValueError where there is no room for those wanted.
    """
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    files = len(os.listdir("/dev/fd")) + RESERVE
    room = MOST if limit == resource.RLIM_INFINITY and not wanted else max(limit - files, 0)
    if limit == resource.RLIM_INFINITY and wanted:
        return wanted
    if max(wanted, 1) > room:
        raise ValueError(
            f"max_connections={wanted} does not fit this process's limit of {limit} open files, which has room for {room}; "
            f"raise it (ulimit -n {files + max(wanted, MOST)}) or ask for fewer."
        )
    return wanted or min(room, MOST)


class Listener(socket.socket):
    """A listening socket that never has more than so many connections.

    make_room: asked to close a connection that waits for its client, when there are too many; whether it has found one. If
    not, the new connection gets a 503.
    """

    most = MOST
    make_room: Callable[[], bool] = staticmethod(lambda: False)

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._connected: list[socket.socket] = []

    def accept(self) -> tuple[socket.socket, object]:
        """The next connection; BlockingIOError, which the event loop takes for "not now", where there is no room."""
        self._connected = [one for one in self._connected if one.fileno() >= 0]
        is_full = len(self._connected) >= self.most
        if is_full and self.make_room():
            raise BlockingIOError("A connection is being closed to make room.")
        connection, address = super().accept()
        if is_full:
            with connection:
                connection.setblocking(False)
                connection.send(_BUSY)
            raise BlockingIOError("There are too many connections.")
        self._connected.append(connection)
        return connection, address


class Connection(H11Protocol):
    """uvicorn's connection with an end to every wait.

    request_seconds: from the first byte (of a new connection: from its beginning) to the end of a request's head, and the
    longest time a client may take nothing of what is written. A body's time is the application's to limit.
    """

    def __init__(self, *args, request_seconds: float, **kwargs):
        super().__init__(*args, **kwargs)
        self._seconds = request_seconds
        self._head_timer: asyncio.TimerHandle | None = None
        self._write_timer: asyncio.TimerHandle | None = None
        self.since = self.loop.time()  # when it was made, or its last response was complete

    @property
    def is_idle(self) -> bool:
        """Whether there is no whole request that is being answered."""
        return self.cycle is None or self.cycle.response_complete or self.cycle.more_body

    def connection_made(self, transport) -> None:
        super().connection_made(transport)
        self._await_head()

    def connection_lost(self, exc: Exception | None) -> None:
        for timer in (self._head_timer, self._write_timer):
            if timer is not None:
                timer.cancel()
        super().connection_lost(exc)
        self._unset_keepalive_if_required()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._await_head()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._write_timer = self.loop.call_later(self._seconds, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._write_timer is not None:
            self._write_timer.cancel()

    def on_response_complete(self) -> None:
        self.since = self.loop.time()
        super().on_response_complete()
        if self.conn.trailing_data[0]:  # the beginning of a next request came during this one
            self._await_head()
        if self.transport.is_closing():  # which waits until what is written has been read
            self.loop.call_later(self._seconds, self.transport.abort)

    def timeout_keep_alive_handler(self) -> None:
        self.transport.abort()

    def shutdown(self) -> None:
        if self.is_idle:
            self.transport.abort()
        else:
            super().shutdown()

    def send_400_response(self, msg: str) -> None:
        self._refuse(ApiError(400, msg))

    def _await_head(self) -> None:
        """Start the clock where a request's head is not complete, and stop it where it is."""
        is_waiting = self.conn.their_state is h11.IDLE and not self.transport.is_closing()
        if self._head_timer is not None and not is_waiting:
            self._head_timer.cancel()
            self._head_timer = None
        elif self._head_timer is None and is_waiting:
            error = ApiError(408, f"The request was not complete after {self._seconds:g} seconds.", code="timeout")
            self._head_timer = self.loop.call_later(self._seconds, self._refuse, error)

    def _refuse(self, error: ApiError) -> None:
        """Send an error and close; if a response has begun, just close."""
        if self.transport.is_closing():
            return
        try:
            self.transport.write(b"".join(data for event in _events(error) if (data := self.conn.send(event))))
            self.transport.close()
        except h11.LocalProtocolError:
            self.transport.abort()
        if self.cycle is not None and not self.cycle.response_complete:
            self.cycle.disconnected = True
            self.cycle.message_event.set()


def close_one(connections) -> bool:
    """Close the connection that has waited for its client for longest; whether there is one."""
    idle = [one for one in connections if one.is_idle and not one.transport.is_closing()]
    if idle:
        min(idle, key=lambda one: one.since).transport.abort()
    return bool(idle)


def _events(error: ApiError) -> list[h11.Event]:
    body = json.dumps(error.body).encode()
    headers = [("content-type", "application/json"), ("content-length", str(len(body))), ("connection", "close")]
    response = h11.Response(status_code=error.status, headers=headers, reason=STATUS_PHRASES[error.status])
    return [response, h11.Data(data=body), h11.EndOfMessage()]


def _busy() -> bytes:
    connection = h11.Connection(h11.SERVER)
    events = _events(ApiError(503, "The server has too many connections.", code="too_many_connections"))
    return b"".join(data for event in events if (data := connection.send(event)))


_BUSY = _busy()
