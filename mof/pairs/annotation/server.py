"""The annotation page, for the browser on this machine and for nobody else.

    GET  /                          the page
    GET  /api/progress              counts, the patterns, the first pair to do
    GET  /api/pairs/N               one pair with its annotation and revision
    POST /api/pairs/N               {"revision", "annotation"} -> the new revision; 409 with the newer one if there is one
    GET  /images/N/0, /images/N/1   its images

Clients name no files. Requests under another host name are refused (a foreign page may have its name point here), and so are posts
that a foreign page sends.
"""

from __future__ import annotations

import io
import json
import logging
import re
from collections.abc import Callable
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from encoders import ImageError, read_image
from encoders.pages import render
from mof.evals.patterns import PATTERNS
from mof.pairs.annotation.journal import ConflictError
from mof.pairs.annotation.session import Session, conflict

logger = logging.getLogger(__name__)

ADDRESS = "127.0.0.1"
LONGEST_REQUEST = 100_000  # bytes
SHOWABLE = {b"\xff\xd8\xff": "image/jpeg", b"\x89PNG": "image/png", b"GIF8": "image/gif"}  # by their first bytes
HEADERS = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": "default-src 'self'; img-src 'self' data:; script-src 'unsafe-inline'; style-src 'unsafe-inline'; "
    "frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
}


class AnnotationServer(ThreadingHTTPServer):
    """Serves one folder until it is shut down.

    Args:
        folder: what `mof blind-pairs` wrote.
        port: 0 takes any that is free.

    Raises:
        ValueError: for a folder that cannot be annotated, or a port that is taken.
    """

    daemon_threads = True

    def __init__(self, folder: str | Path, port: int = 0) -> None:
        self.session = Session(folder)
        self.page = render(Path(__file__).with_name("page.html")).encode()
        try:
            super().__init__((ADDRESS, port), Handler)
        except (OSError, OverflowError) as error:
            raise ValueError(f"cannot listen on port {port}: {error}") from None

    @property
    def hosts(self) -> set[str]:
        """What a browser on this machine may call this server."""
        return {f"{name}:{self.server_address[1]}" for name in (ADDRESS, "localhost")}

    @property
    def url(self) -> str:
        return f"http://{ADDRESS}:{self.server_address[1]}/"


class Handler(BaseHTTPRequestHandler):
    """One request."""

    server: AnnotationServer
    protocol_version = "HTTP/1.1"
    timeout = 60  # seconds of silence

    def do_GET(self) -> None:
        self._answer(self._get)

    def do_POST(self) -> None:
        length = self.headers.get("Content-Length") or ""
        if not length.isdecimal() or int(length) > LONGEST_REQUEST:
            self.close_connection = True  # what was sent stays unread
            self._json({"error": f"expected at most {LONGEST_REQUEST} bytes"}, HTTPStatus.BAD_REQUEST)
            return
        content = self.rfile.read(int(length))
        self._answer(lambda: self._post(content))

    def log_message(self, format: str, *arguments: Any) -> None:
        logger.debug(format, *arguments)

    def _answer(self, act: Callable[[], None]) -> None:
        """Every refusal is a status and one line of JSON that the page can show."""
        hosts, origin = self.server.hosts, self.headers.get("Origin")
        try:
            if self.headers.get("Host") not in hosts or (origin is not None and origin.removeprefix("http://") not in hosts):
                self._json({"error": "only pages of this server, under its own address, are answered"}, HTTPStatus.FORBIDDEN)
            else:
                act()
        except ConflictError as error:
            self._json(conflict(error), HTTPStatus.CONFLICT)
        except IndexError:
            self._json({"error": f"there is no {self.path}"}, HTTPStatus.NOT_FOUND)
        except ImageError as error:
            self._json({"error": str(error)}, HTTPStatus.UNPROCESSABLE_ENTITY)
        except (ValueError, RecursionError) as error:
            self._json({"error": str(error)}, HTTPStatus.BAD_REQUEST)
        except ConnectionError:  # the browser went away
            self.close_connection = True
        except OSError as error:  # a full disk
            logger.warning("%s: %s", self.path, error)
            self._json({"error": f"cannot save: {error}"}, HTTPStatus.INTERNAL_SERVER_ERROR)

    def _get(self) -> None:
        session = self.server.session
        if self.path == "/":
            self._send(self.server.page, "text/html; charset=utf-8")
        elif self.path == "/api/progress":
            self._json(session.progress() | {"patterns": list(PATTERNS), "folder": str(session.table.folder)})
        elif match := re.fullmatch(r"/images/(\d{1,9})/([01])", self.path, re.ASCII):
            self._send(*_image(session.table.image(int(match[1]), int(match[2]))))
        else:
            self._json(session.show(self._pair()))

    def _post(self, content: bytes) -> None:
        number = self._pair()
        if self.headers.get_content_type() != "application/json":  # what a foreign page could send without asking first
            raise ValueError("expected JSON")
        self._json(self.server.session.save(number, json.loads(content)))

    def _pair(self) -> int:
        match = re.fullmatch(r"/api/pairs/(\d{1,9})", self.path, re.ASCII)
        if match is None:
            raise IndexError(self.path)
        return int(match[1])

    def _json(self, document: Any, status: HTTPStatus = HTTPStatus.OK) -> None:
        self._send(json.dumps(document).encode(), "application/json", status)

    def _send(self, content: bytes, kind: str, status: HTTPStatus = HTTPStatus.OK) -> None:
        self.send_response(status)
        for name, value in {"Content-Type": kind, "Content-Length": str(len(content)), **HEADERS}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)


def _image(file: Path) -> tuple[bytes, str]:
    """Content and type: as it is where any browser shows it, otherwise as PNG."""
    try:
        content = file.read_bytes()
    except OSError as error:
        raise ImageError(f"{file}: cannot be read ({error.strerror})") from None
    kind = next((kind for start, kind in SHOWABLE.items() if content.startswith(start)), None)
    if kind is not None:
        return content, kind
    png = io.BytesIO()
    read_image(content, name=str(file)).save(png, "PNG")
    return png.getvalue(), "image/png"
