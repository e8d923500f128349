"""Who is let in: the names a server is called by, the web pages that may call it, and the key that clients show."""

import dataclasses
import hmac
import ipaddress
import json
import os
import stat
from collections.abc import Mapping

from starlette.datastructures import Headers
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from jaxgpt.serving.protocol import ApiError

OPEN_PATH = "/health"  # for everybody: probes know neither name nor key, and it tells nothing of what is served


@dataclasses.dataclass(frozen=True)
class Access:
    """hosts: names in a Host header; "*" is any. origins: of web pages that may call; "*" is any, none is none.

    api_key: what clients send as Authorization: Bearer KEY; empty lets all in.
    """

    hosts: tuple[str, ...] = ("*",)
    origins: tuple[str, ...] = ()
    api_key: str = dataclasses.field(default="", repr=False)

    def middleware(self) -> list[Middleware]:
        """What stands before an application's routes, outermost first."""
        cors = Middleware(
            CORSMiddleware, allow_origins=self.origins, allow_methods=["GET", "POST"], allow_headers=["*"]
        )
        return [
            Middleware(_Doors, access=self),
            *([cors] if self.origins else []),
            Middleware(_Keyhole, key=self.api_key),
        ]


EVERYBODY = Access()


def default_hosts(host: str) -> tuple[str, ...]:
    """The names that a server bound to `host` answers to: this machine's own where only it can connect, else any.

    A web page can make a browser believe that its own name stands for 127.0.0.1; the Host header then tells.
    """
    try:
        is_loopback = ipaddress.ip_address(host).is_loopback
    except ValueError:
        is_loopback = host == "localhost"
    return ("localhost", "127.0.0.1", "::1", host) if is_loopback else ("*",)


def read_api_key(path: str) -> str:
    """The key in a file, without white space around it; ValueError naming api_key_file, and never what is in the file."""
    try:
        with open(path, "rb") as file:
            mode, key = os.fstat(file.fileno()).st_mode, file.read(10_000).strip()
    except OSError as error:
        raise ValueError(f"api_key_file={path!r} cannot be read ({error.strerror}).") from error
    if mode & stat.S_IROTH:
        raise ValueError(f"api_key_file={path!r} can be read by every user of this machine: chmod o-rwx it first.")
    if not key:
        raise ValueError(f"api_key_file={path!r} is empty; it must hold the key.")
    if len(key) > 1000 or not all(0x21 <= byte <= 0x7E for byte in key):
        raise ValueError(f"api_key_file={path!r} must hold one key: up to 1000 letters, digits and signs, no spaces.")
    return key.decode()


def error_response(error: ApiError, headers: Mapping[str, str] | None = None) -> Response:
    """The response for an error: its body is plain ASCII, whatever it quotes."""
    retry = {"Retry-After": "1"} if error.status in (429, 503) else {}
    return Response(json.dumps(error.body), error.status, {**retry, **(headers or {})}, "application/json")


class _Doors:
    """Refuses other hosts and origins, and closes the connection after a response that came before the end of a body."""

    def __init__(self, app: ASGIApp, access: Access):
        self._app, self._access = app, access
        self._hosts = {host.lower().strip("[]") for host in access.hosts}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve or refuse one request."""
        headers = Headers(scope=scope)
        is_unread = "transfer-encoding" in headers or headers.get("content-length", "0") != "0"

        async def noting() -> Message:
            nonlocal is_unread
            message = await receive()
            if message["type"] == "http.request" and not message.get("more_body", False):
                is_unread = False
            return message

        async def closing(message: Message) -> None:
            if message["type"] == "http.response.start" and is_unread:
                message = {**message, "headers": [*message.get("headers", ()), (b"connection", b"close")]}
            await send(message)

        error = None if scope["path"] == OPEN_PATH else self._problem(headers)
        serve = self._app if error is None else error_response(error)
        await serve(scope, noting, closing)

    def _problem(self, headers: Headers) -> ApiError | None:
        name = _name(headers.get("host", ""))
        if "*" not in self._hosts and name not in self._hosts:
            message = f"This server is not called {name!r}; allowed_hosts lists its names."
            return ApiError(403, message, code="host_not_allowed")
        origin = headers.get("origin")
        if origin is not None and not {"*", origin} & set(self._access.origins):
            message = f"Web pages of {origin!r} may not call this server; allowed_origins lists those that may."
            return ApiError(403, message, code="origin_not_allowed")
        return None


class _Keyhole:
    """Refuses requests without the key."""

    def __init__(self, app: ASGIApp, key: str):
        self._app, self._key = app, key.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve or refuse one request."""
        kind, _, key = Headers(scope=scope).get("authorization", "").partition(" ")
        is_known = kind.lower() == "bearer" and hmac.compare_digest(key.strip().encode("latin-1"), self._key)
        if not self._key or is_known or scope["path"] == OPEN_PATH:
            await self._app(scope, receive, send)
            return
        message = "The API key is missing or wrong: send it as 'Authorization: Bearer KEY'."
        error = ApiError(401, message, code="invalid_api_key")
        await error_response(error, {"WWW-Authenticate": "Bearer"})(scope, receive, send)


def _name(host: str) -> str:
    """The name in a Host header, without port and brackets."""
    host = host.strip().lower()
    return host[1:].partition("]")[0] if host.startswith("[") else host.partition(":")[0]
