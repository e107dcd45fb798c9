"""The server of the annotation page answers the browser of the person who started it, and nobody else.

    GET  /?token=TOKEN              the page, and the token as a cookie, which every other request needs
    GET  /api/progress              counts, the patterns, the first pair to do
    GET  /api/pairs/N               one pair with its annotation and revision
    POST /api/pairs/N               {"revision", "annotation"} -> the new revision; 409 with the newer annotation if there is one
    GET  /images/N/0, /images/N/1   its images

Clients name no files.
"""

from __future__ import annotations

import dataclasses
import io
from pathlib import Path
from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import HTMLResponse, Response
from starlette.routing import Route

from encoders import read_image
from encoders.images.opening import read_file
from encoders.pages import render
from mof.evals.patterns import PATTERNS
from mof.local_server import LocalServer, as_json, posted
from mof.pairs.annotation.annotated_pairs import AnnotatedPairs
from mof.pairs.annotation.annotation import Annotation, State
from mof.pairs.annotation.journal import ConflictError, Saved

MARKED: tuple[State, ...] = ("done", "skipped", "flagged")
LONGEST_REQUEST = 100_000  # bytes
SHOWABLE = {b"\xff\xd8\xff": "image/jpeg", b"\x89PNG": "image/png", b"GIF8": "image/gif"}  # first bytes of a file -> its type


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


class AnnotationServer(LocalServer):
    """AnnotationServer serves a folder until Ctrl-C or `shutdown`.

    Args:
        folder: a folder that `mof blind-pairs` wrote.
        ticked: a file of pairs that the gallery wrote, as `AnnotatedPairs` takes it.
        port, token: as `LocalServer` takes them.

    Raises:
        ValueError: for a folder that cannot be annotated, or a port that is taken.
    """

    def __init__(self, folder: str | Path, port: int = 0, ticked: str | Path | None = None, token: str | None = None) -> None:
        self.session = Session(folder, ticked)
        answers = {ConflictError: lambda _, error: as_json(_shown(error.current), 409)}
        super().__init__(_routes(self.session), "mof blind-pairs annotate", port, token, answers)


def _routes(session: Session) -> list[Route]:
    """Return the routes. Functions that are not async run in threads."""
    page = render(Path(__file__).with_name("page.html"))

    def show_progress(request: Request) -> Response:
        return as_json(session.progress() | {"patterns": list(PATTERNS), "folder": str(session.pairs.table.folder)})

    def show_pair(request: Request) -> Response:
        return as_json(session.show(request.path_params["number"]))

    async def save_pair(request: Request) -> Response:
        document = await posted(request, LONGEST_REQUEST)
        return as_json(await run_in_threadpool(session.save, request.path_params["number"], document))

    def show_image(request: Request) -> Response:
        return _image(session.pairs.table.image(request.path_params["number"], request.path_params["side"]))

    return [
        Route("/", lambda request: HTMLResponse(page)),
        Route("/api/progress", show_progress),
        Route("/api/pairs/{number:int}", show_pair),
        Route("/api/pairs/{number:int}", save_pair, methods=["POST"]),
        Route("/images/{number:int}/{side:int}", show_image),
    ]


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
