"""The server of the annotation page answers the browser of the person who started it, and nobody else.

    GET  /?token=TOKEN              the page, and the token as a cookie, which every other request needs
    GET  /api/progress              counts, the patterns, the first pair to do
    GET  /api/pairs/N               one pair with its annotation and revision
    POST /api/pairs/N               {"revision", "annotation"} -> the new revision; 409 with the newer annotation if there is one
    GET  /images/N/0, /images/N/1   its images

Clients name no files. Requests are refused without the token, from a foreign page, and under the name of another host, since a foreign
page may have its name point here. Any port may stand beside the name of this machine, so that the port can be forwarded.
"""

from __future__ import annotations

import asyncio
import dataclasses
import io
import json
import logging
import secrets
import socket
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path
from typing import Any

try:
    import h11
    import uvicorn
    from starlette.applications import Starlette
    from starlette.concurrency import run_in_threadpool
    from starlette.exceptions import HTTPException
    from starlette.middleware import Middleware
    from starlette.middleware.base import BaseHTTPMiddleware
    from starlette.requests import ClientDisconnect, Request
    from starlette.responses import HTMLResponse, Response
    from starlette.routing import Route
    from uvicorn.protocols.http.h11_impl import H11Protocol
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(f"the annotation page needs {error.name}: pip install 'mof-vig[annotate]'", name=error.name) from error

from encoders import ImageError, read_image
from encoders.images.opening import read_file
from encoders.pages import render
from mof.evals.patterns import PATTERNS
from mof.pairs.annotation.annotated_pairs import AnnotatedPairs
from mof.pairs.annotation.annotation import Annotation, State
from mof.pairs.annotation.journal import ConflictError, Saved

logger = logging.getLogger(__name__)

ADDRESS = "127.0.0.1"
MARKED: tuple[State, ...] = ("done", "skipped", "flagged")
CONNECTIONS = 100  # at a time; a browser opens six
LONGEST_REQUEST = 100_000  # bytes
SILENCE = 60  # seconds that a client may be silent within a header, or may take for a body
SHOWABLE = {b"\xff\xd8\xff": "image/jpeg", b"\x89PNG": "image/png", b"GIF8": "image/gif"}  # first bytes of a file -> its type
HEADERS = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": "default-src 'self'; img-src 'self' data:; script-src 'unsafe-inline'; style-src 'unsafe-inline'; "
    "frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
}
REFUSALS = {
    IndexError: 404, ImageError: 422, ValueError: 400, RecursionError: 400, asyncio.TimeoutError: 408, OSError: 500, ClientDisconnect: 400
}  # fmt: skip
"""Error -> status of the reply, whose document is {"error": text for the page}."""


class Session:
    """A session shows and saves the pairs of a folder with their annotations.

    Args:
        folder, ticked: as `AnnotatedPairs` takes them.
    """

    def __init__(self, folder: str | Path, ticked: str | Path | None = None) -> None:
        self.pairs = AnnotatedPairs(folder, ticked)

    def progress(self) -> dict[str, Any]:
        """Return the numbers of pairs that are done, skipped and flagged, and the place of the first other pair, or None."""
        self.pairs.refresh()
        counts: dict[str, int] = {state: self.pairs.count(state) for state in MARKED}
        return {"pairs": len(self.pairs), **counts, "first": self.pairs.next_todo(0)}

    def show(self, number: int) -> dict[str, Any]:
        """Return a pair, for the page. IndexError for a number without a pair."""
        self.pairs.refresh()
        pair, saved, todo = self.pairs.table.pairs[number], self.pairs.saved(number), self.pairs.next_todo(number + 1)
        if not saved.revision:
            saved = Saved(0, Annotation(pattern=self.pairs.tags.get(pair.names)))
        return dataclasses.asdict(pair) | _shown(saved) | {"number": number, "next_todo": None if todo == number else todo}

    def save(self, number: int, request: Any) -> dict[str, Any]:
        """Save {"revision", "annotation"}, and return the new revision.

        Raises:
            ValueError: for a request of another form.
            ConflictError: when the pair was changed since the revision.
        """
        if not isinstance(request, dict) or not isinstance(request.get("revision"), int):
            raise ValueError("expected an object of revision and annotation")
        annotation = Annotation.from_json(request.get("annotation"))
        return _shown(self.pairs.save(number, request["revision"], annotation))


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


class AnnotationServer:
    """AnnotationServer serves a folder until Ctrl-C or `shutdown`.

    Args:
        folder: a folder that `mof blind-pairs` wrote.
        port: 0 takes any free port.
        ticked: a file of pairs that the gallery wrote, as `AnnotatedPairs` takes it.
        token: the word that the address of the page holds; a random word by default.

    Raises:
        ValueError: for a folder that cannot be annotated, or a port that is taken.
    """

    def __init__(self, folder: str | Path, port: int = 0, ticked: str | Path | None = None, token: str | None = None) -> None:
        self.session = Session(folder, ticked)
        self.token = token or secrets.token_urlsafe(24)
        try:
            self._socket = socket.create_server((ADDRESS, port))
        except (OSError, OverflowError) as error:
            raise ValueError(f"cannot listen on port {port}: {error}") from None
        self.address: tuple[str, int] = self._socket.getsockname()
        app = _application(self.session, self.token, f"mof-token-{self.address[1]}")
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


def _application(session: Session, token: str, cookie: str) -> Starlette:
    """Return the routes, for requests with the token, in the address or the cookie. Functions that are not async run in threads."""
    page = render(Path(__file__).with_name("page.html"))

    async def guard(request: Request, answer: Callable[[Request], Awaitable[Response]]) -> Response:
        host, origin = request.headers.get("host", ""), request.headers.get("origin")
        if host.partition(":")[0] not in (ADDRESS, "localhost") or origin not in (None, f"http://{host}"):
            return _json({"error": "only pages of this server, under its own address, are answered"}, 403)
        asked = request.query_params.get("token")
        if not secrets.compare_digest((asked or request.cookies.get(cookie, "")).encode(), token.encode()):
            return _json({"error": "open the address that `mof blind-pairs annotate` printed, with its token"}, 403)
        reply = await answer(request)
        if asked:
            reply.set_cookie(cookie, token, httponly=True, samesite="strict")
        return reply

    def show_progress(request: Request) -> Response:
        return _json(session.progress() | {"patterns": list(PATTERNS), "folder": str(session.pairs.table.folder)})

    def show_pair(request: Request) -> Response:
        return _json(session.show(request.path_params["number"]))

    async def save_pair(request: Request) -> Response:
        if request.headers.get("content-type", "").partition(";")[0].strip() != "application/json":
            raise ValueError("expected JSON")  # a foreign page could send other types without asking first
        content = await asyncio.wait_for(_body(request), SILENCE)
        return _json(await run_in_threadpool(lambda: session.save(request.path_params["number"], json.loads(content))))

    def show_image(request: Request) -> Response:
        return _image(session.pairs.table.image(request.path_params["number"], request.path_params["side"]))

    routes = [
        Route("/", lambda request: HTMLResponse(page)),
        Route("/api/progress", show_progress),
        Route("/api/pairs/{number:int}", show_pair),
        Route("/api/pairs/{number:int}", save_pair, methods=["POST"]),
        Route("/images/{number:int}/{side:int}", show_image),
    ]
    handlers: dict[Any, Any] = {kind: partial(_refuse, status=status) for kind, status in REFUSALS.items()}
    handlers[HTTPException] = lambda request, error: _refuse(request, error, error.status_code)
    handlers[ConflictError] = lambda request, error: _json(_shown(error.current), 409)
    app = Starlette(routes=routes, middleware=[Middleware(BaseHTTPMiddleware, dispatch=guard)], exception_handlers=handlers)
    app.router.redirect_slashes = False
    return app


def _refuse(request: Request, error: Exception, status: int) -> Response:
    """Return the reply that tells the page why its request was refused."""
    if status == 500:  # a full disk
        logger.warning("%s: %s", request.url.path, error)
    text = {404: f"there is no {request.url.path}", 500: f"cannot save: {error}"}.get(status, str(error))
    return _json({"error": text}, status)


async def _body(request: Request) -> bytes:
    content = b""
    async for part in request.stream():
        content += part
        if len(content) > LONGEST_REQUEST:
            raise ValueError(f"expected at most {LONGEST_REQUEST} bytes")
    return content


def _json(document: Any, status: int = 200) -> Response:
    return Response(json.dumps(document), status, media_type="application/json")


def _shown(saved: Saved) -> dict[str, Any]:
    annotation = saved.annotation
    return {
        "revision": saved.revision,
        "annotation": dataclasses.asdict(annotation),
        "state": annotation.state,
        "missing": annotation.missing(),
    }


def _image(file: Path) -> Response:
    """Return the file as it is if any browser shows it, otherwise as PNG."""
    content = read_file(file)
    kind = next((kind for start, kind in SHOWABLE.items() if content.startswith(start)), None)
    if kind is None:
        png, kind = io.BytesIO(), "image/png"
        read_image(content, name=str(file)).save(png, "PNG")
        content = png.getvalue()
    return Response(content, media_type=kind)
