"""Endpoint asks any server that speaks OpenAI's chat completions: a hosted model, or a server such as vLLM's on your own machine."""

from __future__ import annotations

import base64
import io
import json
import math
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from contextlib import aclosing
from dataclasses import replace
from itertools import islice
from typing import Any
from urllib.parse import urlsplit

from PIL import Image

from encoders import ImageError, read_image
from encoders.images.opening import open_image, read_file
from mof.data.records import ImageSource
from mof.evals.answerers.api_keys import key_for, without_key
from mof.evals.answering import Answer, Prompt

try:
    import anyio
    import anyio.to_thread
    import httpx2
    import openai
    from anyio.from_thread import start_blocking_portal
except ModuleNotFoundError as error:
    raise ValueError('endpoints are asked by the client of OpenAI, which is not installed: pip install "mof-vig[endpoint]"') from error

LARGEST_REPLY = 2**24  # bytes
TOO_MANY_IN_A_ROW = 10  # prompts without an answer, or two rounds if that is more: then the endpoint is down, and no more are asked
REFUSALS = (400, 413, 415, 422)  # status if this prompt is refused; other prompts may pass
TRIED_AGAIN = (408, 409, 429)  # status after which the client tries again, as after 5xx
FROM_ENVIRONMENT = ("OpenAI-Organization", "OpenAI-Project")  # headers that the client would send to any endpoint
MIME = {"JPEG": "image/jpeg", "PNG": "image/png", "WEBP": "image/webp", "GIF": "image/gif"}
ORIENTATION = 0x0112  # EXIF tag; 1 is upright


class Endpoint:
    """Endpoint asks an OpenAI-compatible endpoint, several prompts at a time, at temperature 0. It gives no log-likelihoods.

    The client of OpenAI tries again after time-outs, dropped connections, replies that are no chat completion, and HTTP 408,
    409, 429 and 5xx. It waits as long as the server's Retry-After asks (at most two minutes), or else longer each time. A prompt
    that the endpoint refuses (HTTP 400, 413, 415, 422) becomes an answer with an error. Redirects are not followed, and
    proxies are not used.

    Args:
        url: the address, which ends with the version, such as "https://api.openai.com/v1".
        model: the endpoint's name for the model.
        key_variable: environment variable with the API key; no key is sent if it is unset. Without a name, it is OPENAI_API_KEY
            for OpenAI's own host, and other hosts get no key. The key is never written anywhere.
        concurrency: number of prompts under way at a time.
        timeout: seconds for a whole attempt.
        attempts: number of attempts at each prompt.
    """

    def __init__(
        self,
        url: str,
        model: str,
        *,
        key_variable: str | None = None,
        max_new_tokens: int = 256,
        concurrency: int = 8,
        timeout: float = 120.0,
        attempts: int = 6,
    ) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment or "@" in parts.netloc:
            shown = url.rpartition("@")[2].partition("?")[0]  # without a part that may be secret
            raise ValueError(f"endpoint {shown!r}: expected http(s)://HOST[:PORT]/PATH without user, password or query")
        if min(concurrency, attempts, max_new_tokens) < 1 or not 0 < timeout < math.inf:
            raise ValueError(
                f"concurrency {concurrency}, attempts {attempts}, max_new_tokens {max_new_tokens} and timeout {timeout} should be positive"
            )
        self._key = key_for(url, key_variable)
        self.name, self.concurrency, self.timeout, self.attempts = model, concurrency, timeout, attempts
        self.max_new_tokens = max_new_tokens
        self.settings: dict[str, Any] = {
            "kind": "endpoint", "url": url.rstrip("/"), "model": model, "max_new_tokens": max_new_tokens, "temperature": 0,
        }  # fmt: skip

    def answer(self, prompts: Sequence[Prompt]) -> Iterator[tuple[int, Answer]]:
        unanswered: list[str] = []
        in_a_row = 0
        waiting = iter(enumerate(prompts))
        jobs: dict[Future[Answer], int] = {}
        http = _WholeReplies(self.timeout, trust_env=False, follow_redirects=False)
        client = openai.AsyncOpenAI(
            api_key=self._key or "none",  # the client insists on a key, and may not take another from the environment
            base_url=self.settings["url"], timeout=self.timeout, max_retries=self.attempts - 1, http_client=http,
        )  # fmt: skip
        with start_blocking_portal() as portal:
            try:
                while in_a_row < max(TOO_MANY_IN_A_ROW, 2 * self.concurrency):
                    for position, prompt in islice(waiting, self.concurrency - len(jobs)):
                        jobs[portal.start_task_soon(self._ask, client, prompt)] = position
                    if not jobs:
                        break
                    for job in wait(jobs, return_when=FIRST_COMPLETED).done:
                        position = jobs.pop(job)
                        try:
                            answer = job.result()
                        except _NoAnswer as error:
                            unanswered.append(f"prompt {prompts[position].id}: {error}")
                            in_a_row += 1
                        else:
                            in_a_row = 0
                            yield position, answer
            finally:
                for job in jobs:
                    job.cancel()
                portal.call(client.close)
        if unanswered:
            raise ValueError(
                f"{len(unanswered)} of {len(prompts)} prompts got no answer after {self.attempts} attempts each; {unanswered[0]}. "
                "Answers that came are kept where there is a cache: run again for the others"
            )

    async def _ask(self, client: openai.AsyncOpenAI, prompt: Prompt) -> Answer:
        try:
            messages: Any = await anyio.to_thread.run_sync(_messages, prompt)
        except ImageError as error:  # costs this prompt only
            return Answer("", error=str(error))
        kept_back = FROM_ENVIRONMENT if self._key else (*FROM_ENVIRONMENT, "Authorization")
        try:
            reply = await client.chat.completions.with_raw_response.create(
                model=self.name, messages=messages, temperature=0, max_tokens=self.max_new_tokens,
                extra_headers=dict.fromkeys(kept_back, openai.Omit()),
            )  # fmt: skip
        except openai.APIStatusError as error:
            status = error.status_code
            message = f"HTTP {status}: {self._excerpt(error.response.content.decode(errors='replace'))}"
            if status in REFUSALS:
                return Answer("", error=message)
            if status in TRIED_AGAIN or status >= 500:
                raise _NoAnswer(message) from None
            # A wrong key, model or address stops all prompts.
            unsent = "" if self._key else "; no key was sent: --key-variable (key_variable) names the variable that holds the key"
            raise ValueError(f"{self.settings['url']}, model {self.name}: {message}{unsent if status in (401, 403) else ''}") from None
        except openai.APIConnectionError as error:
            cause = error.__cause__ or error
            raise _NoAnswer(f"{type(cause).__name__}: {self._excerpt(str(cause))}") from None
        answer = _to_answer(reply.content)
        return replace(answer, text=without_key(answer.text, self._key))

    def _excerpt(self, text: str) -> str:
        """Return the beginning of a text in one line, without the key, which a few servers echo."""
        printable = "".join(letter if letter.isprintable() else " " for letter in without_key(text, self._key))
        return " ".join(printable.split())[:300]


class _NoAnswer(Exception):
    """_NoAnswer says that a prompt got no answer in any attempt."""


class _WholeReplies(openai.DefaultAsyncHttpxClient):
    """_WholeReplies gives the client of OpenAI whole chat completions, or else errors after which it tries again.

    A time-out of httpx starts anew with every byte; here `seconds` is the time for a whole attempt.
    """

    def __init__(self, seconds: float, **options: Any) -> None:
        super().__init__(**options)
        self._seconds = seconds

    async def send(self, request: httpx2.Request, **_: Any) -> httpx2.Response:
        try:
            with anyio.fail_after(self._seconds):
                async with aclosing(await super().send(request, stream=True)) as response:
                    body = bytearray()
                    async for piece in response.aiter_bytes():
                        body += piece
                        if len(body) > LARGEST_REPLY:
                            raise httpx2.DecodingError(f"the reply is longer than {LARGEST_REPLY} bytes")
        except TimeoutError:
            raise httpx2.ReadTimeout(f"no whole reply within {self._seconds} s") from None
        if response.status_code == 200:
            _to_answer(body)
        headers = [(name, value) for name, value in response.headers.multi_items() if name != "content-encoding"]  # decoded already
        return httpx2.Response(response.status_code, headers=headers, content=bytes(body), request=request)


def _to_answer(reply: bytes | bytearray) -> Answer:
    """Return the answer in a chat completion. If a safety filter refuses, its text is the answer."""
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
        raise httpx2.DecodingError(f"the reply is no chat completion: {bytes(reply).decode(errors='replace')}") from None
    usage = document.get("usage")
    counts = [usage.get(name) if isinstance(usage, dict) else None for name in ("prompt_tokens", "completion_tokens")]
    used, made = (count if isinstance(count, int) and count > 0 else 0 for count in counts)
    return Answer(content.strip(), input_tokens=used, output_tokens=made)


def _messages(prompt: Prompt) -> list[dict[str, Any]]:
    """Return the prompt's messages, with their images as data URLs."""
    messages = prompt.filled(lambda image: {"type": "image_url", "image_url": {"url": data_url(image)}})
    for message in messages:
        if all(part["type"] == "text" for part in message["content"]):  # a few servers take only plain text in system messages
            message["content"] = "".join(part["text"] for part in message["content"])
    return messages


def data_url(image: ImageSource) -> str:
    """Return the data URL of an image: the file itself if it is upright and of a known kind, else the decoded image as PNG."""
    content = image if isinstance(image, Image.Image) else read_file(image)
    upright = read_image(content, None if isinstance(image, Image.Image) else str(image))  # refuses a file that is no image, too
    if isinstance(content, bytes):
        with open_image(content, str(image)) as file:
            mime = MIME.get(file.format or "")
            if mime and file.getexif().get(ORIENTATION, 1) == 1:
                return f"data:{mime};base64,{base64.b64encode(content).decode()}"
    buffer = io.BytesIO()
    upright.save(buffer, "PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
