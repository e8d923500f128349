"""The server process: a socket, uvicorn, and a stop that lets running responses end."""

import asyncio
import functools
import logging
import signal
import socket
from collections.abc import Callable
from typing import Any

import uvicorn
from starlette.applications import Starlette

from jaxgpt.serving.connection import Connection, Listener, close_one
from jaxgpt.serving.worker import Worker

CLOSE_SECONDS = 3  # for what is written to be read, when all responses have ended


def listen(host: str, port: int, max_connections: int) -> Listener:
    """A listening socket; ValueError where the address is taken or is not this machine's."""
    try:
        plain = socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except (OSError, OverflowError) as error:
        raise ValueError(f"host={host!r}, port={port} cannot be listened on ({error}).") from error
    listener = Listener(fileno=plain.detach())
    listener.most = max_connections
    return listener


async def serve(
    app: Starlette, worker: Worker, listener: Listener, *, grace_seconds: float, request_seconds: float,
    keep_alive_seconds: float, on_ready: Callable[[], None],
) -> None:  # fmt: skip
    """Serve until SIGTERM or SIGINT, or until the engine fails. Then new calls get 503, and the server ends when all others
    have, or after grace_seconds, or at a second signal. on_ready: called once connections are answered.
    """
    # The signals are ours: uvicorn would close the listener at once and end by the signal, not with exit code 0.
    loop, stop, hurry = asyncio.get_running_loop(), asyncio.Event(), asyncio.Event()
    protocol: Any = functools.partial(Connection, request_seconds=request_seconds)
    keep_alive: Any = keep_alive_seconds  # uvicorn wants an int, for no reason
    config = uvicorn.Config(app, http=protocol, log_level="error", access_log=False, lifespan="off", ws="none", backlog=128,
                            timeout_keep_alive=keep_alive, timeout_graceful_shutdown=2 * CLOSE_SECONDS)  # fmt: skip
    # At "warning" asyncio tells of each piece that was written to a client that had just gone, which is nobody's mistake.
    logging.getLogger("asyncio").setLevel(logging.ERROR)
    server = uvicorn.Server(config)
    connections: Any = server.server_state.connections
    listener.make_room = lambda: close_one(connections)
    running = asyncio.create_task(server.serve(sockets=[listener]))
    while not server.started and not running.done():
        await asyncio.sleep(0.01)
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, lambda: hurry.set() if stop.is_set() else stop.set())
    worker.start(on_failure=lambda: loop.call_soon_threadsafe(stop.set))
    try:
        on_ready()
        stopping = asyncio.create_task(stop.wait())
        await asyncio.wait({running, stopping}, return_when=asyncio.FIRST_COMPLETED)
        stopping.cancel()
        worker.drain()
        deadline = loop.time() + grace_seconds
        while any(worker.load()) and not hurry.is_set() and loop.time() < deadline:
            await asyncio.sleep(0.02)
    finally:
        await asyncio.to_thread(worker.stop)
        server.should_exit = True
        await asyncio.wait({running}, timeout=CLOSE_SECONDS)
        for connection in list(connections):
            connection.transport.abort()
        await running
