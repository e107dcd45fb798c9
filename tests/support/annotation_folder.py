"""A folder like the folders that `mof blind-pairs` writes, and a running annotation server, for tests."""

from __future__ import annotations

import csv
import http.client
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from mof.local_server import LocalServer
from mof.pairs.annotation.server import AnnotationServer

TOKEN = "token-of-the-tests"
EMPTY: dict[str, Any] = {
    "pattern": None, "statements": ["", ""], "question": "", "options": ["", ""], "right": [None, None], "mark": None
}  # fmt: skip
COMPLETE: dict[str, Any] = {
    "pattern": "State", "statements": ["open wings", "closed wings"], "question": "Are the wings open or closed?",
    "options": ["Open", "Closed"], "right": ["a", "b"], "mark": None,
}  # fmt: skip


def write_folder(folder: Path, pairs: int = 3) -> Path:
    """Write pairs of k-left.jpg and k-right.png, noise of 16 x 16, and pairs.csv with their absolute paths; return the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    rows = []
    for k in range(pairs):
        names = folder / f"{k}-left.jpg", folder / f"{k}-right.png"
        for name in names:
            Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(name)
        rows.append((2 * k, 2 * k + 1, *names, 0.99 - k / 100, 0.25, 0.74 - k / 100))
    with (folder / "pairs.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("i", "j", "image_i", "image_j", "clip_similarity", "dino_similarity", "gap"), *rows])
    return folder


@contextmanager
def serving(folder: Path) -> Iterator[AnnotationServer]:
    """Run the annotation server of a folder in a thread."""
    server = AnnotationServer(folder, token=TOKEN)
    with running(server):
        yield server


@contextmanager
def running(server: LocalServer) -> Iterator[None]:
    """Run a server in a thread."""
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield
    finally:
        server.shutdown()
        thread.join()


def ask(port: int, path: str, body: Any = None, headers: dict[str, str] | None = None) -> tuple[int, Any, http.client.HTTPResponse]:
    """Return status, document (or bytes) and the reply. Headers replace the headers that a page of this server would send."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=600)
    sent = {"Cookie": f"mof-token-{port}={TOKEN}"} | ({"Content-Type": "application/json"} if body is not None else {})
    content = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
    connection.request("GET" if body is None else "POST", path, content, sent | (headers or {}))
    reply = connection.getresponse()
    data = reply.read()
    connection.close()
    return reply.status, json.loads(data) if reply.headers["Content-Type"] == "application/json" else data, reply


def port_of(server: LocalServer) -> int:
    return server.address[1]
