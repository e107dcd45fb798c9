"""A stand-in for an OpenAI-compatible server, which can be told to misbehave."""

from __future__ import annotations

import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Body = dict[str, Any]


def completion(text: Any, **usage: Any) -> bytes:
    usage = usage or {"prompt_tokens": 100, "completion_tokens": 2}
    return json.dumps({"choices": [{"message": {"role": "assistant", "content": text}}], "usage": usage}).encode()


class StandIn:
    """Replies with `reply(body)`; before that, the first attempts at each question go through the `faults`, one each.

    A fault is (status, headers, body) or one of "drop", "stall", "drip" and "cut".
    """

    def __init__(self, reply: Callable[[Body], Any], faults: list[Any] | None = None) -> None:
        self.reply, self.faults = reply, faults or []
        self.requests: list[tuple[Body, dict[str, str]]] = []
        self.attempts: Counter[str] = Counter()
        self.lock = threading.Lock()
        self.under_way = self.most_under_way = 0
        self.url = ""

    def handle(self, handler: BaseHTTPRequestHandler) -> None:
        body = json.loads(handler.rfile.read(int(handler.headers["Content-Length"])))
        with self.lock:
            self.requests.append((body, dict(handler.headers)))
            key = json.dumps(body["messages"])
            attempt = self.attempts[key]
            self.attempts[key] += 1
            self.under_way += 1
            self.most_under_way = max(self.most_under_way, self.under_way)
        try:
            fault = self.faults[attempt] if attempt < len(self.faults) else None
            if fault is None:
                made = self.reply(body)
                fault = made if isinstance(made, tuple) else (200, {}, made if isinstance(made, bytes) else completion(made))
        finally:
            with self.lock:  # before the client has its reply, and sends the next prompt
                self.under_way -= 1
        with suppress(OSError):  # the client may have gone
            self.send(handler, fault)

    @staticmethod
    def send(handler: BaseHTTPRequestHandler, fault: Any) -> None:
        if fault == "drop":
            handler.connection.close()
            return
        if fault == "stall":
            time.sleep(3)
            return
        if fault == "drip":  # a byte at a time, which no time-out of a socket ever notices
            for byte in b"HTTP/1.1 200 OK\r\nX-Slow: " + b"x" * 100:
                handler.wfile.write(bytes([byte]))
                time.sleep(0.1)
            return
        if fault == "cut":  # promises more than it sends
            handler.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n" + completion("half")[:30])
            return
        status, headers, content = fault
        handler.send_response(status)
        for name, value in headers.items():
            handler.send_header(name, value)
        handler.send_header("Content-Length", str(len(content)))
        handler.end_headers()
        handler.wfile.write(content)


@contextmanager
def serve(reply: Callable[[Body], Any], faults: list[Any] | None = None) -> Iterator[StandIn]:
    """A running stand-in at its `.url`."""
    stand_in = StandIn(reply, faults)

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            stand_in.handle(self)

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    stand_in.url = f"http://127.0.0.1:{server.server_port}/v1"
    try:
        yield stand_in
    finally:
        server.shutdown()
        server.server_close()


def question_of(body: Body) -> str:
    """The text of the last message."""
    content = body["messages"][-1]["content"]
    return content if isinstance(content, str) else "".join(part.get("text", "") for part in content)
