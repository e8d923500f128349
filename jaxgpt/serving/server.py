"""The server process: a socket, uvicorn, and a stop that lets running responses end."""

import asyncio
import signal
import socket
from collections.abc import Callable

import uvicorn
from starlette.applications import Starlette

from jaxgpt.serving.worker import Worker


def listen(host: str, port: int) -> socket.socket:
    """A listening socket; ValueError where the address is taken or is not this machine's."""
    try:
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except (OSError, OverflowError) as error:
        raise ValueError(f"host={host!r}, port={port} cannot be listened on ({error}).") from error


async def serve(
    app: Starlette, worker: Worker, listener: socket.socket, *, grace_seconds: float, on_ready: Callable[[], None]
) -> None:
    """Serve until SIGTERM or SIGINT. Then new calls get 503, and the server ends when all others have, or after
    grace_seconds, or at a second signal. on_ready: called once connections are answered.
    """
    # The signals are ours: uvicorn would close the listener at once and end by the signal, not with exit code 0.
    loop, stop, hurry = asyncio.get_running_loop(), asyncio.Event(), asyncio.Event()
    config = uvicorn.Config(app, log_level="warning", access_log=False, lifespan="off", ws="none",
                            timeout_graceful_shutdown=5)  # fmt: skip
    server = uvicorn.Server(config)
    running = asyncio.create_task(server.serve(sockets=[listener]))
    while not server.started and not running.done():
        await asyncio.sleep(0.01)
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, lambda: hurry.set() if stop.is_set() else stop.set())
    worker.start()
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
        await running
