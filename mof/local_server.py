"""LocalServer serves a page to the browser of the person who started it, and to nobody else.

Requests are refused without the token, from a foreign page, and under the name of another host, since a foreign page may have its name
point here. Any port may stand beside the name of this machine, so that the port can be forwarded.
"""

from __future__ import annotations

import asyncio
import json
import logging
import secrets
import socket
from collections.abc import Awaitable, Callable, Mapping, Sequence
from functools import partial
from typing import Any

import h11
import uvicorn
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.base import BaseHTTPMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route
from uvicorn.protocols.http.h11_impl import H11Protocol

from encoders import ImageError

logger = logging.getLogger(__name__)

ADDRESS = "127.0.0.1"
CONNECTIONS = 100  # at a time; a browser opens six
SILENCE = 60  # seconds that a client may be silent within a header, or may take for a body
HEADERS = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": "default-src 'self'; img-src 'self' data:; script-src 'unsafe-inline'; style-src 'unsafe-inline'; "
    "frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
}
REFUSALS: Mapping[Any, int] = {
    IndexError: 404, ImageError: 422, ValueError: 400, RecursionError: 400, asyncio.TimeoutError: 408, OSError: 500, ClientDisconnect: 400
}  # fmt: skip
"""Error -> status of the reply, whose document is {"error": text for the page}."""
Answer = Callable[[Request, Any], Response]
"""A function that answers a request in which an error was raised."""


class Connection(H11Protocol):
    """A connection is closed when a client sends nothing for SILENCE seconds. Uvicorn would wait for the rest of a header forever.

    Beyond CONNECTIONS, the connection that has waited longest for a request is closed.
    """

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self.last_heard = self.loop.time()
        if len(self.connections) > CONNECTIONS:
            everybody: list[Any] = list(self.connections)
            waiting = [other for other in everybody if other.conn.their_state is h11.IDLE]
            min(waiting, key=lambda other: other.last_heard, default=self).transport.abort()
        self._expect_request()

    def data_received(self, data: bytes) -> None:
        self.last_heard = self.loop.time()
        super().data_received(data)  # ends the wait
        self._expect_request()

    def _expect_request(self) -> None:
        if self.timeout_keep_alive_task is None and self.conn.their_state is h11.IDLE:
            self.timeout_keep_alive_task = self.loop.call_later(SILENCE, self.timeout_keep_alive_handler)


class LocalServer:
    """LocalServer serves routes until Ctrl-C or `shutdown`.

    Args:
        routes: functions that are not async run in threads. The page lies at "/". An error is told in words: `REFUSALS`.
        command: the command that prints the address, for the message to a visitor without the token.
        port: 0 takes any free port.
        token: the word that the address of the page holds; a random word by default.
        answers: error -> its answer, for errors that `REFUSALS` lacks.

    Raises:
        ValueError: for a port that is taken.
    """

    def __init__(
        self,
        routes: Sequence[Route],
        command: str,
        port: int = 0,
        token: str | None = None,
        answers: Mapping[Any, Answer] | None = None,
    ) -> None:
        self.token = token or secrets.token_urlsafe(24)
        try:
            self._socket = socket.create_server((ADDRESS, port))
        except (OSError, OverflowError) as error:
            raise ValueError(f"cannot listen on port {port}: {error}") from None
        self.address: tuple[str, int] = self._socket.getsockname()
        handlers: dict[Any, Any] = {kind: partial(_refuse, status=status) for kind, status in REFUSALS.items()}
        handlers[HTTPException] = lambda request, error: _refuse(request, error, error.status_code)
        guard = Middleware(BaseHTTPMiddleware, dispatch=_guard(self.token, f"mof-token-{self.address[1]}", command))
        app = Starlette(routes=routes, middleware=[guard], exception_handlers={**handlers, **(answers or {})})
        app.router.redirect_slashes = False
        quiet: dict[str, Any] = {"log_config": None, "access_log": False, "server_header": False, "lifespan": "off", "ws": "none"}
        headers = list(HEADERS.items())
        self._server = uvicorn.Server(uvicorn.Config(app, http=Connection, headers=headers, timeout_graceful_shutdown=1, **quiet))

    @property
    def url(self) -> str:
        """Return the address of the page, with the token."""
        return f"http://{ADDRESS}:{self.address[1]}/?token={self.token}"

    def serve_forever(self) -> None:
        """Answer requests. Ctrl-C raises KeyboardInterrupt."""
        self._server.run([self._socket])

    def shutdown(self) -> None:
        """Let `serve_forever` return, in another thread."""
        self._server.should_exit = True


def _guard(token: str, cookie: str, command: str) -> Callable[[Request, Any], Awaitable[Response]]:
    """Return the function that lets requests with the token through, in the address or the cookie."""

    async def guard(request: Request, answer: Callable[[Request], Awaitable[Response]]) -> Response:
        host, origin = request.headers.get("host", ""), request.headers.get("origin")
        if host.partition(":")[0] not in (ADDRESS, "localhost") or origin not in (None, f"http://{host}"):
            return as_json({"error": "only pages of this server, under its own address, are answered"}, 403)
        asked = request.query_params.get("token")
        if not secrets.compare_digest((asked or request.cookies.get(cookie, "")).encode(), token.encode()):
            return as_json({"error": f"open the address that `{command}` printed, with its token"}, 403)
        reply = await answer(request)
        if asked:
            reply.set_cookie(cookie, token, httponly=True, samesite="strict")
        return reply

    return guard


def _refuse(request: Request, error: Exception, status: int) -> Response:
    """Return the reply that tells the page why its request was refused."""
    if status == 500:  # a full disk
        logger.warning("%s: %s", request.url.path, error)
    text = {404: f"there is no {request.url.path}", 500: f"cannot save: {error}"}.get(status, str(error))
    return as_json({"error": text}, status)


async def posted(request: Request, longest: int) -> Any:
    """Return the document that a page posted as JSON. ValueError for another type, or more than `longest` bytes."""
    if request.headers.get("content-type", "").partition(";")[0].strip() != "application/json":
        raise ValueError("expected JSON")  # a foreign page could send other types without asking first
    return await run_in_threadpool(json.loads, await asyncio.wait_for(_body(request, longest), SILENCE))


async def _body(request: Request, longest: int) -> bytes:
    content = bytearray()
    async for part in request.stream():
        content += part
        if len(content) > longest:
            raise ValueError(f"expected at most {longest} bytes")
    return bytes(content)


def as_json(document: Any, status: int = 200) -> Response:
    """Return the reply that holds a document."""
    return Response(json.dumps(document), status, media_type="application/json")
