"""The HTTP application: OpenAI's endpoints over a worker's engine, as a Starlette app."""

import asyncio
import functools
import logging
import secrets
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from jaxgpt.generate.dialogue import ChatFormat
from jaxgpt.generate.stream import Piece
from jaxgpt.serving import protocol
from jaxgpt.serving.gate import EVERYBODY, Access, error_response
from jaxgpt.serving.protocol import ApiError, Call, Limits, internal_error
from jaxgpt.serving.responses import Choice, Writer, event
from jaxgpt.serving.worker import Worker

NUM_READERS = 2  # threads that read bodies, render templates and tokenize


def make_app(
    worker: Worker,
    form: ChatFormat,
    limits: Limits,
    *,
    max_body_bytes: int,
    request_seconds: float = 30.0,
    access: Access = EVERYBODY,
) -> Starlette:
    """GET /health, /v1/models and /v1/models/NAME; POST /v1/completions and /v1/chat/completions.

    max_body_bytes, request_seconds: of one body, and how long it may take to come.

    Every error has OpenAI's body, {"error": {"message", "type", "param", "code"}}. A client that goes away frees its slots.
    """
    readers = ThreadPoolExecutor(NUM_READERS, thread_name_prefix="reader")
    card = {"id": limits.model, "object": "model", "created": int(time.time()), "owned_by": "jaxgpt"}

    async def health(request: Request) -> Response:
        running, waiting = worker.load()
        status = "ok" if worker.failure is None else worker.failure
        return JSONResponse(
            {"status": status, "running": running, "waiting": waiting}, 200 if worker.failure is None else 500
        )

    async def models(request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [card]})

    async def model(request: Request) -> Response:
        name = request.path_params["name"]
        if name != limits.model:
            message = f"There is no model {name!r}; this server has {limits.model!r}."
            raise ApiError(404, message, param="model", code="model_not_found")
        return JSONResponse(card)

    def endpoint(body_cls: type, make_call: Callable[..., Call], is_chat: bool):
        async def handle(request: Request):
            try:
                data = await _read_body(request, max_body_bytes, request_seconds)
            except ClientDisconnect:
                return _nobody
            # A long prompt takes a while, in which others are answered; few threads, so that the engine's has its turn.
            call = await asyncio.get_running_loop().run_in_executor(readers, read, data)
            writer = Writer(call, form.tokenizer, limits.model, is_chat=is_chat)
            return functools.partial(_respond, worker, call, writer)

        def read(data: bytes) -> Call:
            try:
                return make_call(protocol.parse_body(body_cls, data), form, limits, secrets.randbits(32))
            except RecursionError as error:
                raise ApiError(400, "The body is nested too deeply.") from error

        return handle

    return Starlette(
        routes=[
            Route("/health", health),
            Route("/v1/models", models),
            Route("/v1/models/{name:path}", model),
            Route("/v1/completions", endpoint(protocol.CompletionBody, protocol.completion_call, False), methods=["POST"]),
            Route("/v1/chat/completions", endpoint(protocol.ChatBody, protocol.chat_call, True), methods=["POST"]),
        ],
        middleware=access.middleware(),
        exception_handlers={ApiError: _api_error, HTTPException: _http_error, Exception: _internal_error},
    )  # fmt: skip


async def _read_body(request: Request, max_bytes: int, seconds: float) -> bytes:
    """The body; ApiError 415 where it is not said to be JSON, 413 where it is longer than max_bytes, 408 where it takes long.

    A web page may send any other content type to any server without asking it.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        message = f"The content type must be application/json, not {kind!r}."
        raise ApiError(415, message, code="unsupported_content_type")
    too_large = ApiError(413, f"The body is longer than {max_bytes} bytes.", code="body_too_large")
    if int(request.headers.get("content-length", "0")) > max_bytes:
        raise too_large
    body = bytearray()
    try:
        async with asyncio.timeout(seconds):
            async for part in request.stream():
                body += part
                if len(body) > max_bytes:
                    raise too_large
    except TimeoutError as error:
        raise ApiError(408, f"The body was not complete after {seconds:g} seconds.", code="timeout") from error
    return bytes(body)


async def _nobody(scope: Scope, receive: Receive, send: Send) -> None:
    """The response to a client that has gone."""


async def _respond(worker: Worker, call: Call, writer: Writer, scope: Scope, receive: Receive, send: Send) -> None:
    """Serve a call until it is done or the client has gone."""
    loop = asyncio.get_running_loop()
    pieces: asyncio.Queue = asyncio.Queue()

    def emit(index: int, piece: Piece | ApiError) -> None:
        loop.call_soon_threadsafe(pieces.put_nowait, (index, piece))

    job = worker.submit(call, emit)
    write = _write_stream if call.stream else _write_whole
    tasks = [
        asyncio.create_task(write(call, writer, pieces, scope, receive, send)),
        asyncio.create_task(_disconnected(receive)),
    ]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if tasks[0].done():
            tasks[0].result()
    finally:
        worker.cancel(job)
        for task in tasks:
            task.cancel()


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _pieces(call: Call, queue: asyncio.Queue) -> AsyncIterator[tuple[int, Piece]]:
    """(index of a choice, piece) until all choices have ended; ApiError where the worker gives one up."""
    left = len(call.requests)
    while left:
        index, piece = await queue.get()
        if isinstance(piece, ApiError):
            raise piece
        left -= piece.finish is not None
        yield index, piece


async def _write_whole(call, writer: Writer, queue, scope: Scope, receive: Receive, send: Send) -> None:
    choices = [Choice() for _ in call.requests]
    async for index, piece in _pieces(call, queue):
        choices[index].add(piece)
    await JSONResponse(writer.whole(choices))(scope, receive, send)


async def _write_stream(call, writer: Writer, queue, scope: Scope, receive: Receive, send: Send) -> None:
    """Server-sent events; an error after the first of them is one, too."""

    async def put(text: str, more: bool = True) -> None:
        if text or not more:
            await send({"type": "http.response.body", "body": text.encode(), "more_body": more})

    headers = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache")]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    choices = [Choice() for _ in call.requests]
    for index in range(len(choices)):
        await put(writer.opening(index))
    try:
        async for index, piece in _pieces(call, queue):
            choices[index].add(piece)
            await put(writer.chunk(index, piece))
        await put(writer.closing(choices))
    except ApiError as error:
        await put(event(error.body))
    except Exception as error:
        logging.exception("A stream failed.")
        await put(event(internal_error(error).body))
    await put("", more=False)


async def _api_error(request: Request, error: Exception) -> Response:
    if not isinstance(error, ApiError):
        raise error
    return error_response(error)


async def _http_error(request: Request, error: Exception) -> Response:
    """Starlette's own 404 and 405."""
    if not isinstance(error, HTTPException):
        raise error
    message = f"{request.method} {request.url.path}: {error.detail}."
    return error_response(ApiError(error.status_code, message), error.headers)


async def _internal_error(request: Request, error: Exception) -> Response:
    return error_response(internal_error(error))
