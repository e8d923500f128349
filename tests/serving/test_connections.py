"""Connections that send or read slowly, or nothing: each ends in time, and others are served meanwhile."""

import asyncio
import json
import signal
from contextlib import asynccontextmanager

import pytest

pytest.importorskip("uvicorn")

from jaxgpt.serving.connection import max_connections
from jaxgpt.serving.server import listen, serve
from tests.serving.tiny import COMPLETION, make

MOST = 8
HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"


@asynccontextmanager
async def running(params, request_seconds=0.3):
    """The port of a server that is stopped by SIGTERM at the end, in this event loop."""
    made, ready = make(params, request_seconds=request_seconds), asyncio.Event()
    listener = listen("127.0.0.1", 0, MOST)
    task = asyncio.create_task(
        serve(made.app, made.worker, listener, grace_seconds=5, request_seconds=request_seconds, keep_alive_seconds=60,
              on_ready=ready.set)
    )  # fmt: skip
    await asyncio.wait_for(ready.wait(), 10)
    yield listener.getsockname()[1]
    signal.raise_signal(signal.SIGTERM)
    await asyncio.wait_for(task, 20)


async def say(port, *parts, seconds=20.0):
    """What a server answers to these bytes until it closes the connection."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        for part in parts:
            writer.write(part)
            await writer.drain()
        return await asyncio.wait_for(reader.read(), seconds)
    except (ConnectionError, asyncio.IncompleteReadError):
        return b""
    finally:
        writer.close()


def request(body=None, extra=b"Connection: close\r\n"):
    data = json.dumps(COMPLETION if body is None else body).encode()
    return HEAD + extra + b"Content-Length: %d\r\n\r\n" % len(data) + data


INCOMPLETE = {
    "nothing": b"",
    "half a head": HEAD[:40],
    "half a body": HEAD + b'Content-Length: 50\r\n\r\n{"model"',
    "a chunked body without end": HEAD + b"Transfer-Encoding: chunked\r\n\r\n3\r\n{  \r\n",
    "half a second head": request(extra=b"") + HEAD[:40],
}


@pytest.mark.parametrize("what", INCOMPLETE, ids=str)
def test_what_never_comes_to_its_end_is_answered_with_408_and_closed(params, what, caplog):
    async def talk():
        async with running(params) as port:
            return await say(port, INCOMPLETE[what])

    answer = asyncio.run(talk())
    status = answer.split(b"HTTP/1.1 ")[-1][:3]
    assert status == b"408", answer
    assert json.loads(answer.split(b"\r\n\r\n")[-1])["error"]["code"] == "timeout"
    assert not caplog.records


def test_silent_connections_do_not_lock_others_out_nor_delay_the_stop(params, caplog):
    """Far more than there is room for, with a time-out that never comes: the oldest make room."""

    async def talk():
        async with running(params, request_seconds=600) as port:
            silent = [await asyncio.open_connection("127.0.0.1", port) for _ in range(5 * MOST)]
            answers = [await say(port, request()) for _ in range(3)]
            for _, writer in silent:
                writer.close()
            return answers

    for answer in asyncio.run(talk()):
        assert answer.startswith(b"HTTP/1.1 200"), answer
    assert not caplog.records


def test_beyond_the_connections_that_are_served_a_new_one_gets_503(params):
    async def talk():
        async with running(params, request_seconds=600) as port:
            long = request(COMPLETION | {"max_tokens": 60, "stop": [], "stream": True})
            busy = [asyncio.create_task(say(port, long)) for _ in range(6 * MOST)]
            return await asyncio.gather(*busy)

    answers = asyncio.run(talk())
    codes = {answer[9:12] for answer in answers if answer}
    assert codes <= {b"200", b"429", b"503"}
    refused = [answer for answer in answers if answer.startswith(b"HTTP/1.1 503")]
    for answer in refused:
        assert json.loads(answer.split(b"\r\n\r\n")[1])["error"]["code"] == "too_many_connections"


@pytest.mark.parametrize(
    "data",
    [b"garbage\r\n\r\n", b"\x16\x03\x01\x02\x00", HEAD + b"Content-Length: -1\r\n\r\n",
     HEAD + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n", HEAD + b"X: " + b"a" * 100_000 + b"\r\nConnection: close\r\n\r\n"],
    ids=range(5),
)  # fmt: skip
def test_what_is_no_http_gets_an_error_in_openais_format(params, data, caplog):
    async def talk():
        async with running(params) as port:
            return await say(port, data)

    answer = asyncio.run(talk())
    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 4"), answer
    assert json.loads(body)["error"]["type"] == "invalid_request_error"
    assert not caplog.records


def test_a_client_that_leaves_in_the_middle_of_its_body_leaves_no_trace(params, caplog):
    async def talk():
        async with running(params, request_seconds=600) as port:
            _, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(HEAD + b"Content-Length: 50\r\n\r\n{")
            await writer.drain()
            await say(port, request())
            writer.transport.abort()
            return await say(port, request())

    assert asyncio.run(talk()).startswith(b"HTTP/1.1 200")
    assert not caplog.records


def test_there_are_no_more_connections_than_open_files(monkeypatch):
    monkeypatch.setattr("resource.getrlimit", lambda _: (128, 128))
    assert 1 <= max_connections(0) < 128 - 32
    with pytest.raises(ValueError, match=r"max_connections=128 does not fit .* limit of 128 open files"):
        max_connections(128)
    monkeypatch.setattr("resource.getrlimit", lambda _: (1 << 20, 1 << 20))
    assert (max_connections(0), max_connections(5000)) == (1000, 5000)
