"""Any endpoint that speaks OpenAI's chat completions: hosted models, or a server such as vLLM's on one's own machine."""

from __future__ import annotations

import base64
import contextlib
import email.utils
import http.client
import io
import json
import math
import os
import random
import socket
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from PIL import Image

from encoders import read_image
from mof.data.records import ImageSource
from mof.evals.answering import Answer, Prompt

FIRST_WAIT, LONGEST_WAIT = 1.0, 60.0  # seconds between attempts, doubled each time
LONGEST_REQUESTED_WAIT = 600.0  # a server that asks for more (a spent daily quota) is not waited for
LARGEST_REPLY = 2**24  # bytes
TOO_MANY_IN_A_ROW = 10  # prompts without an answer (or two rounds, if that is more): the endpoint is down, the others are not asked
REFUSALS = (400, 413, 415, 422)  # of this prompt only; other prompts may pass
MIME = {"JPEG": "image/jpeg", "PNG": "image/png", "WEBP": "image/webp", "GIF": "image/gif"}
ORIENTATION = 0x0112  # EXIF tag; 1 is upright


class Endpoint:
    """Asks an OpenAI-compatible endpoint, several prompts at a time, at temperature 0. Gives no log-likelihoods.

    Time-outs, dropped connections, replies that are no chat completion, HTTP 408, 429 and 5xx are tried again, after waits that
    double and are drawn at random below that, or as long as the server's Retry-After asks. A prompt that the endpoint
    refuses (HTTP 400, 413, 415, 422) becomes an answer with an error. Redirects are not followed, and proxies not used.

    Args:
        url: up to and with the version, such as "https://api.openai.com/v1".
        model: as the endpoint calls it.
        key_variable: environment variable with the API key; unset, none is sent. The key is never written anywhere.
        concurrency: prompts under way at a time.
        timeout: seconds for one attempt in all.
        attempts: at each prompt.
    """

    def __init__(
        self,
        url: str,
        model: str,
        *,
        key_variable: str = "OPENAI_API_KEY",
        max_new_tokens: int = 256,
        concurrency: int = 8,
        timeout: float = 120.0,
        attempts: int = 6,
    ) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment or "@" in parts.netloc:
            shown = url.rpartition("@")[2].partition("?")[0]  # without what may be a secret
            raise ValueError(f"endpoint {shown!r}: expected http(s)://HOST[:PORT]/PATH without user, password or query")
        if min(concurrency, attempts, max_new_tokens) < 1 or not 0 < timeout < math.inf:
            raise ValueError(
                f"concurrency {concurrency}, attempts {attempts}, max_new_tokens {max_new_tokens} and timeout {timeout} should be positive"
            )
        self._key = os.environ.get(key_variable, "").strip()
        if not (self._key.isascii() and self._key.isprintable()):
            raise ValueError(f"the API key in {key_variable} holds characters that no HTTP header takes")
        self._parts, self._path = parts, parts.path.rstrip("/") + "/chat/completions"
        self.name, self.concurrency, self.timeout, self.attempts = model, concurrency, timeout, attempts
        self.max_new_tokens = max_new_tokens
        self.settings: dict[str, Any] = {
            "kind": "endpoint", "url": url.rstrip("/"), "model": model, "max_new_tokens": max_new_tokens, "temperature": 0,
        }  # fmt: skip

    def answer(self, prompts: Sequence[Prompt]) -> Iterator[tuple[int, Answer]]:
        unanswered: list[str] = []
        in_a_row = 0
        stop = threading.Event()
        pool = ThreadPoolExecutor(self.concurrency)
        jobs = {pool.submit(self._ask, prompt, stop): position for position, prompt in enumerate(prompts)}
        try:
            for job in as_completed(jobs):
                try:
                    answer = job.result()
                except _NoAnswer as error:
                    unanswered.append(f"prompt {prompts[jobs[job]].id}: {error}")
                    in_a_row += 1
                    if in_a_row >= max(TOO_MANY_IN_A_ROW, 2 * self.concurrency):
                        break
                else:
                    in_a_row = 0
                    yield jobs[job], answer
        finally:
            stop.set()
            pool.shutdown(wait=False, cancel_futures=True)
        if unanswered:
            raise ValueError(
                f"{len(unanswered)} of {len(prompts)} prompts got no answer after {self.attempts} attempts each; {unanswered[0]}. "
                "Answers that came are kept where there is a cache: run again for the others"
            )

    def _ask(self, prompt: Prompt, stop: threading.Event) -> Answer:
        body = json.dumps({
            "model": self.name, "messages": _messages(prompt), "temperature": 0, "max_tokens": self.max_new_tokens,
        }).encode()  # fmt: skip
        for attempt in range(self.attempts):
            try:
                return self._attempt(body)
            except _TryAgain as error:
                wait = backoff(attempt) if error.wait is None else error.wait
                if attempt + 1 == self.attempts or wait > LONGEST_REQUESTED_WAIT or stop.wait(wait):
                    raise _NoAnswer(str(error)) from None
        raise AssertionError("unreachable")

    def _attempt(self, body: bytes) -> Answer:
        try:
            status, headers, reply = self._post(body)
        except (OSError, http.client.HTTPException) as error:
            raise _TryAgain(f"{type(error).__name__}: {error}") from None
        if status == 200:
            return _to_answer(reply)
        message = f"HTTP {status}: {self._excerpt(reply)}"
        if status in REFUSALS:
            return Answer("", error=message)
        if status in (408, 429) or status >= 500:
            raise _TryAgain(message, _retry_after(headers))
        raise ValueError(f"{self.settings['url']}, model {self.name}: {message}")  # a wrong key, model or address: for all prompts

    def _post(self, body: bytes) -> tuple[int, Mapping[str, str], bytes]:
        kind = http.client.HTTPSConnection if self._parts.scheme == "https" else http.client.HTTPConnection
        connection = kind(self._parts.hostname or "", self._parts.port, timeout=self.timeout)
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {self._key}"} if self._key else {})
        try:
            connection.connect()
            # The socket's own time-out starts anew with every byte that trickles in.
            watchdog = threading.Timer(self.timeout, _cut, [connection.sock])
            watchdog.daemon = True
            watchdog.start()
            try:
                connection.request("POST", self._path, body, headers)
                response = connection.getresponse()
                return response.status, {k.lower(): v for k, v in response.headers.items()}, response.read(LARGEST_REPLY)
            finally:
                watchdog.cancel()
        finally:
            connection.close()

    def _excerpt(self, reply: bytes) -> str:
        text = " ".join(reply[:2000].decode(errors="replace").split())
        return (text.replace(self._key, "***") if self._key else text)[:300]


def backoff(attempt: int) -> float:
    """Seconds to wait after the attempt of this number, from 0."""
    return random.uniform(0.5, 1) * min(FIRST_WAIT * 2**attempt, LONGEST_WAIT)


class _TryAgain(Exception):
    def __init__(self, message: str, wait: float | None = None) -> None:
        super().__init__(message)
        self.wait = wait


class _NoAnswer(Exception):
    pass


def _cut(sock: socket.socket) -> None:
    with contextlib.suppress(OSError):  # closed in the meantime
        sock.shutdown(socket.SHUT_RDWR)  # whoever reads from it wakes up


def _to_answer(reply: bytes) -> Answer:
    """Of a chat completion. What a safety filter says in place of an answer is the answer."""
    try:
        document = json.loads(reply)
        message = document["choices"][0]["message"]
        content = message.get("content")
        if content is None:
            content = message["refusal"]
        if isinstance(content, list):
            content = "".join(part["text"] for part in content if part["type"] == "text")
        if not isinstance(content, str):
            raise TypeError
    except (ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError):
        raise _TryAgain(f"the reply is no chat completion: {reply[:100]!r}") from None
    usage = document.get("usage")
    counts = [usage.get(name) if isinstance(usage, dict) else None for name in ("prompt_tokens", "completion_tokens")]
    used, made = (count if isinstance(count, int) and count > 0 else 0 for count in counts)
    return Answer(content.strip(), input_tokens=used, output_tokens=made)


def _retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds that the server asks to wait, which it gives as a number or as a date; None for none or nonsense."""
    value = headers.get("retry-after", "")
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(value).timestamp() - time.time()
        except (ValueError, TypeError, OverflowError):
            return None
    return max(seconds, 0.0) if math.isfinite(seconds) else None


def _messages(prompt: Prompt) -> list[dict[str, Any]]:
    """The prompt's messages, with their images as data URLs."""
    images = iter(prompt.images)
    messages = []
    for message in prompt.messages:
        content: Any = [
            part if part["type"] == "text" else {"type": "image_url", "image_url": {"url": data_url(next(images))}}
            for part in message["content"]
        ]
        if all(part["type"] == "text" for part in content):  # some servers take only plain text in system messages
            content = "".join(part["text"] for part in content)
        messages.append({"role": message["role"], "content": content})
    return messages


def data_url(image: ImageSource) -> str:
    """A file as it is, if it is of a kind that endpoints take and upright; else the decoded image as PNG."""
    upright = read_image(image)  # also refuses what is no image
    if not isinstance(image, Image.Image):
        with Image.open(image) as file:
            mime = MIME.get(file.format or "")
            if mime and file.getexif().get(ORIENTATION, 1) == 1:
                return f"data:{mime};base64,{base64.b64encode(Path(image).read_bytes()).decode()}"
    buffer = io.BytesIO()
    upright.save(buffer, "PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
