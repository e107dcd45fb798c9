"""The annotation page, for the browser on this machine and for nobody else.

    GET  /                          the page
    GET  /api/progress              counts, the patterns, the first pair to do
    GET  /api/pairs/N               one pair with its annotation and revision
    POST /api/pairs/N               {"revision", "annotation"} -> the new revision; 409 with the newer annotation if there is one
    GET  /images/N/0, /images/N/1   its images

Clients name no files. Requests under another host name are refused (a foreign page may have its name point here), and so are requests
that a foreign page sends.
"""

from __future__ import annotations

import asyncio
import dataclasses
import io
import json
import logging
import socket
from collections import Counter
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
from mof.pairs.annotation.annotation import JOURNAL, Annotation, ConflictError, Journal, Saved
from mof.pairs.pair_table import PairTable

logger = logging.getLogger(__name__)

ADDRESS = "127.0.0.1"
LONGEST_REQUEST = 100_000  # bytes
SILENCE = 60  # seconds that a client may be silent within a header, or may take for a body
SHOWABLE = {b"\xff\xd8\xff": "image/jpeg", b"\x89PNG": "image/png", b"GIF8": "image/gif"}  # by their first bytes
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
    """The pairs of a folder with their annotations, as the page shows and saves them.

    Args:
        folder: what `mof blind-pairs` wrote; annotations go into `annotations.jsonl` in it.

    Raises:
        ValueError: for a folder without pairs, or whose annotations cannot be read.
    """

    def __init__(self, folder: str | Path) -> None:
        self.table = PairTable(folder)
        self.journal = Journal(self.table.folder / JOURNAL)
        self.progress()

    def progress(self) -> dict[str, Any]:
        """Return how many pairs are done, skipped and flagged, and the number of the first other pair, None if there is none."""
        states = self._states()
        counts = Counter(states)
        first = states.index("todo") if "todo" in states else None
        return {"pairs": len(states), "done": counts["done"], "skipped": counts["skipped"], "flagged": counts["flagged"], "first": first}

    def show(self, number: int) -> dict[str, Any]:
        """Return a pair, for the page. IndexError for a number without a pair."""
        pair, states = self.table.pairs[number], self._states()
        todo = next((n for n in (*range(number + 1, len(states)), *range(number)) if states[n] == "todo"), None)
        return dataclasses.asdict(pair) | _shown(self.journal.get(pair.names)) | {"number": number, "next_todo": todo}

    def save(self, number: int, request: Any) -> dict[str, Any]:
        """Save {"revision", "annotation"}, and return the new revision.

        Raises:
            ValueError: for a request of another form.
            ConflictError: when the pair was changed since the revision.
        """
        if not isinstance(request, dict) or not isinstance(request.get("revision"), int):
            raise ValueError("expected an object of revision and annotation")
        annotation = Annotation.from_json(request.get("annotation"))
        return _shown(self.journal.save(self.table.pairs[number].names, request["revision"], annotation))

    def _states(self) -> list[str]:
        annotations = self.journal.all()
        return [annotations.get(pair.names, Saved()).annotation.state for pair in self.table.pairs]


class Connection(H11Protocol):
    """A connection that is closed when a client sends nothing for SILENCE seconds. Uvicorn would wait for the rest of a header forever."""

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._expect_request()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)  # ends the wait
        self._expect_request()

    def _expect_request(self) -> None:
        if self.timeout_keep_alive_task is None and self.conn.their_state is h11.IDLE:
            self.timeout_keep_alive_task = self.loop.call_later(SILENCE, self.timeout_keep_alive_handler)


class AnnotationServer:
    """A server of one folder, which runs until Ctrl-C or `shutdown`.

    Args:
        folder: what `mof blind-pairs` wrote.
        port: 0 takes any free port.

    Raises:
        ValueError: for a folder that cannot be annotated, or a port that is taken.
    """

    def __init__(self, folder: str | Path, port: int = 0) -> None:
        self.session = Session(folder)
        try:
            self._socket = socket.create_server((ADDRESS, port))
        except (OSError, OverflowError) as error:
            raise ValueError(f"cannot listen on port {port}: {error}") from None
        self.address: tuple[str, int] = self._socket.getsockname()
        app = _application(self.session, {f"{name}:{self.address[1]}" for name in (ADDRESS, "localhost")})
        quiet: dict[str, Any] = {"log_config": None, "access_log": False, "server_header": False, "lifespan": "off", "ws": "none"}
        headers = list(HEADERS.items())
        self._server = uvicorn.Server(uvicorn.Config(app, http=Connection, headers=headers, timeout_graceful_shutdown=1, **quiet))

    @property
    def url(self) -> str:
        return f"http://{ADDRESS}:{self.address[1]}/"

    def serve_forever(self) -> None:
        """Answer requests. Ctrl-C raises KeyboardInterrupt."""
        self._server.run([self._socket])

    def shutdown(self) -> None:
        """Let `serve_forever` return, in another thread."""
        self._server.should_exit = True


def _application(session: Session, hosts: set[str]) -> Starlette:
    """Return the routes, for requests under the names `hosts` only. Functions that are not async run in threads."""
    page = render(Path(__file__).with_name("page.html"))

    async def guard(request: Request, answer: Callable[[Request], Awaitable[Response]]) -> Response:
        host, origin = request.headers.get("host"), request.headers.get("origin")
        if host not in hosts or (origin is not None and origin.removeprefix("http://") not in hosts):
            return _json({"error": "only pages of this server, under its own address, are answered"}, 403)
        return await answer(request)

    def show_progress(request: Request) -> Response:
        return _json(session.progress() | {"patterns": list(PATTERNS), "folder": str(session.table.folder)})

    def show_pair(request: Request) -> Response:
        return _json(session.show(request.path_params["number"]))

    async def save_pair(request: Request) -> Response:
        if request.headers.get("content-type", "").partition(";")[0].strip() != "application/json":
            raise ValueError("expected JSON")  # a foreign page could send other types without asking first
        content = await asyncio.wait_for(_body(request), SILENCE)
        return _json(await run_in_threadpool(lambda: session.save(request.path_params["number"], json.loads(content))))

    def show_image(request: Request) -> Response:
        return _image(session.table.image(request.path_params["number"], request.path_params["side"]))

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
