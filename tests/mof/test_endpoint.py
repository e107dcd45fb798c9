"""Endpoints that time out, rate-limit, drop connections and talk nonsense."""

from __future__ import annotations

import base64
import importlib
import io
import json
import logging
import sys
import threading
import time
from collections.abc import Iterator
from email.utils import formatdate
from pathlib import Path

import anyio
import pytest
from PIL import Image
from support.stand_in import Body, completion, question_of, serve

from mof.evals.answerers import Endpoint, endpoint
from mof.evals.answerers.api_keys import key_for
from mof.evals.answering import Answer, AnswerCache, Prompt, answer_all

KEY = "sk-very-secret-0123456789"
ECHOES = [
    f"bad key {KEY}".encode(),
    b"x" * 90 + KEY.encode(),
    b" " * 1990 + KEY.encode(),
    KEY.upper().encode(),
    KEY[:12].encode() + b"\n " + KEY[12:].encode(),
    b"Bearer " + base64.b64encode(KEY.encode()),
    f'{{"error": {{"message": "Incorrect API key provided: {KEY}"}}}}'.encode(),
]


@pytest.fixture(autouse=True)
def hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("openai._base_client.INITIAL_RETRY_DELAY", 0.01)
    monkeypatch.setattr(endpoint, "LARGEST_REPLY", 2**16)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


@pytest.fixture
def image(tmp_path: Path) -> Path:
    file = tmp_path / "red.jpg"
    Image.new("RGB", (8, 6), (255, 0, 0)).save(file)
    return file


def texts(count: int) -> list[Prompt]:
    return [Prompt(str(i), [{"role": "user", "content": [{"type": "text", "text": f"say {i}"}]}], []) for i in range(count)]


def echo(body: Body) -> str:
    return question_of(body).removeprefix("say ")


def ask(asked: Endpoint, prompts: list[Prompt]) -> list[Answer]:
    return answer_all(asked, prompts)[0]


FAULTS = {
    "rate limit": (429, {}, b"slow down"),
    "rate limit with a wait": (429, {"Retry-After": "0"}, b""),
    "a wait that is nonsense": (429, {"Retry-After": "soon"}, b""),
    "a wait of not-a-number seconds": (503, {"retry-after": "nan"}, b""),
    "server error": (500, {}, b"<html>oops</html>"),
    "garbage": (200, {}, b"\xff\xfe not json"),
    "half of a JSON": (200, {}, completion("x")[:-5]),
    "a JSON list": (200, {}, b"[1, 2]"),
    "no choices": (200, {}, b'{"choices": []}'),
    "no text": (200, {}, b'{"choices": [{"message": {"content": 5}}]}'),
    "nested too deep": (200, {}, b"[" * 100000),
    "an error in place of a completion": (200, {}, b'{"error": {"code": 429, "message": "slow down"}}'),
    "choices that are null": (200, {}, b'{"choices": null}'),
    "a choice without message": (200, {}, b'{"choices": [{"delta": {}}]}'),
    "an empty body": (200, {}, b""),
    "a number of more digits than Python reads": (200, {}, b"9" * 5000),
    "a body without end": (200, {}, b" " * 2**18),
    "more headers than HTTP libraries take": (200, {f"X-{i}": "1" * 500 for i in range(300)}, completion("x")),
    "a chunk of no length": (200, {"Transfer-Encoding": "chunked"}, b"zz\r\nx\r\n"),
    "dropped connection": "drop",
    "half a reply": "cut",
}


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)
def test_faults_pass(fault: object) -> None:
    with serve(echo, [fault, fault]) as server:
        answers = ask(Endpoint(server.url, "m", concurrency=2), texts(2))
    assert [answer.text for answer in answers] == ["0", "1"]
    assert len(server.requests) == 6


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["stall", "drip"])
def test_an_attempt_ends_after_its_timeout(fault: str) -> None:
    with serve(echo, [fault, fault]) as server:
        with pytest.raises(ValueError, match="ReadTimeout"):
            ask(Endpoint(server.url, "m", timeout=0.3, attempts=1), texts(1))
        assert ask(Endpoint(server.url, "m", timeout=0.5), texts(1))[0].text == "0"


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The seconds that the client waits between attempts, in a world where these pass in no time."""
    waited: list[float] = []

    async def sleep(seconds: float) -> None:
        waited.append(seconds)

    monkeypatch.setattr(anyio, "sleep", sleep)
    return waited


def test_the_server_says_how_long_to_wait(waits: list[float]) -> None:
    with serve(echo, [(429, {"Retry-After": "17"}, b""), (429, {"Retry-After": formatdate(time.time() + 90, usegmt=True)}, b"")]) as server:
        ask(Endpoint(server.url, "m"), texts(1))
    assert waits[0] == 17 and 17 < waits[1] <= 90


def test_a_wait_of_a_day_is_not_waited_for(waits: list[float]) -> None:
    with serve(echo, [(429, {"Retry-After": "86400"}, b"quota spent")]) as server, pytest.raises(ValueError, match="quota spent"):
        ask(Endpoint(server.url, "m"), texts(1))
    assert waits == []


def test_what_fails_for_good_does_not_stop_the_others(tmp_path: Path) -> None:
    def reply(body: Body) -> object:
        return (500, {}, b"never") if echo(body) == "3" else echo(body)

    cache = AnswerCache(tmp_path / "cache.jsonl")
    with serve(reply) as server:
        with pytest.raises(ValueError, match=r"1 of 6 .* 3 attempts.* 3: HTTP 500: never"):
            answer_all(Endpoint(server.url, "m", attempts=3), texts(6), cache)
        assert len(server.requests) == 8
        server.reply = echo
        answers, usage = answer_all(Endpoint(server.url, "m", attempts=3), texts(6), AnswerCache(cache.file))
    assert [answer.text for answer in answers] == list("012345")
    assert (usage.asked, usage.asked_input_tokens, usage.input_tokens, usage.output_tokens) == (1, 100, 600, 12)
    assert len(server.requests) == 9


def test_a_refused_prompt_is_an_answer_with_an_error_and_is_asked_again_next_time(tmp_path: Path) -> None:
    def reply(body: Body) -> object:
        return (400, {}, b"content policy") if echo(body) == "1" else echo(body)

    with serve(reply) as server:
        for _ in range(2):
            answers, usage = answer_all(Endpoint(server.url, "m"), texts(3), AnswerCache(tmp_path / "cache.jsonl"))
            assert [answer.text for answer in answers] == ["0", "", "2"]
            assert answers[1].error is not None and "content policy" in answers[1].error
        assert usage.asked == 1
        with pytest.raises(ValueError, match="content policy"):
            ask(Endpoint(server.url, "m"), texts(2)[1:])


@pytest.mark.slow
@pytest.mark.parametrize("status", [401, 403, 404, 302])
def test_what_is_wrong_for_all_prompts_stops_at_once(status: int) -> None:
    with serve(lambda _: (status, {"Location": "/elsewhere"}, b"no such model")) as server:
        with pytest.raises(ValueError, match=f"HTTP {status}: no such model"):
            ask(Endpoint(server.url, "m", concurrency=2), texts(50))
        assert len(server.requests) < 10


def test_an_endpoint_that_is_down_is_not_asked_thousands_of_times() -> None:
    with serve(lambda _: (503, {}, b"down")) as server:
        with pytest.raises(ValueError, match=r"of 1000 .* 2 attempts.* \d+: HTTP 503: down"):
            ask(Endpoint(server.url, "m", attempts=2, concurrency=4), texts(1000))
        assert len(server.requests) < 60


def test_nobody_waits_for_an_answer_that_is_not_wanted_any_more(monkeypatch: pytest.MonkeyPatch) -> None:
    genuine, waiting, given_up = anyio.sleep, threading.Semaphore(0), []

    async def sleep(seconds: float) -> None:
        waiting.release()
        try:
            await genuine(seconds)
        except BaseException:
            given_up.append(seconds)
            raise

    def reply(body: Body) -> object:
        if echo(body) != "9":
            return (429, {"Retry-After": "60"}, b"")
        assert all(waiting.acquire(timeout=600) for _ in range(9))
        return (401, {}, b"wrong key")

    monkeypatch.setattr(anyio, "sleep", sleep)
    with serve(reply) as server, pytest.raises(ValueError, match="wrong key"):
        ask(Endpoint(server.url, "m", concurrency=10), texts(10))
    assert given_up == [60] * 9


def test_an_address_where_nobody_listens() -> None:
    with serve(echo) as server:
        url = server.url
    with pytest.raises(ValueError, match="ConnectError"):
        ask(Endpoint(url, "m", attempts=2), texts(1))


def test_without_the_client_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openai", None)
    monkeypatch.delitem(sys.modules, "mof.evals.answerers.endpoint")
    with pytest.raises(ValueError, match=r"mof-vig\[endpoint\]"):
        importlib.import_module("mof.evals.answerers.endpoint")


def test_what_is_sent(image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_KEY", f" {KEY}\n")
    turned = image.with_name("turned.jpg")
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (8, 6), (0, 255, 0)).save(turned, exif=exif)
    prompts = [Prompt.about("1", str(image), "What?"), Prompt.about("2", str(turned), "And?"), *texts(1)]
    with serve(lambda _: "ok") as server:
        ask(Endpoint(server.url + "/", "gpt-x", key_variable="MY_KEY", max_new_tokens=7, concurrency=1), prompts)
    (first, headers), (second, _), (third, _) = server.requests
    assert headers["authorization"] == f"Bearer {KEY}"
    assert (first["model"], first["temperature"], first["max_tokens"]) == ("gpt-x", 0, 7)
    picture, words = first["messages"][0]["content"]
    assert words == {"type": "text", "text": "What?"}
    assert picture == {"type": "image_url", "image_url": {"url": f"data:image/jpeg;base64,{base64.b64encode(image.read_bytes()).decode()}"}}
    url = second["messages"][0]["content"][0]["image_url"]["url"]
    assert url.startswith("data:image/png;base64,")
    assert Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))).size == (6, 8)  # upright
    assert third["messages"] == [{"role": "user", "content": "say 0"}]


def test_without_a_key_of_its_own_none_is_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("OPENAI_API_KEY", "OPENAI_ADMIN_KEY", "OPENAI_ORG_ID", "OPENAI_PROJECT_ID"):
        monkeypatch.setenv(variable, KEY)
    with serve(echo) as server:
        ask(Endpoint(server.url, "m", key_variable="UNSET"), texts(1))
    [(_, headers)] = server.requests
    assert "authorization" not in map(str.lower, headers) and KEY not in str(headers)


@pytest.mark.slow
def test_the_key_is_written_nowhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MY_KEY", KEY)
    caplog.set_level(logging.DEBUG)

    def reply(body: Body) -> object:
        return (400, {}, f"bad key {KEY}".encode()) if echo(body) == "0" else echo(body)

    with serve(reply) as server:
        asked = Endpoint(server.url, "m", attempts=2, key_variable="MY_KEY")
        answers, _ = answer_all(asked, texts(2), AnswerCache(tmp_path / "cache.jsonl"))
        server.reply = lambda body: (500, {}, f"bad key {KEY}".encode())
        with pytest.raises(ValueError, match=r"bad key \*\*\*") as error:
            ask(asked, texts(1))
        for body in ECHOES:  # in spellings of servers, and cut in the middle of the key
            for status in (200, 401, 500):
                server.reply = lambda _, body=body, status=status: (status, {}, body)
                with pytest.raises(ValueError) as echoed:
                    ask(asked, texts(1))
                assert "sk-very-sec" not in str(echoed.value) and KEY.split("-")[-1] not in str(echoed.value), echoed.value
        server.reply = lambda _: f"Your key is {KEY}."
        assert ask(asked, texts(1))[0].text == "Your key is ***."
    seen = "".join([str(error.value), str(answers), json.dumps(asked.settings), caplog.text, *capfd.readouterr()])
    seen += (tmp_path / "cache.jsonl").read_text()
    assert KEY not in seen and "bad key" in seen
    monkeypatch.setenv("OPENAI_API_KEY", "sk-\u2019\nx")
    with pytest.raises(ValueError, match="OPENAI_API_KEY") as error:
        Endpoint("https://api.openai.com/v1", "m")
    assert "sk-" not in str(error.value)


@pytest.mark.parametrize(
    ("url", "variable", "sent"),
    [
        ("https://api.openai.com/v1", None, True),
        ("https://eu.api.openai.com/v1", None, True),
        ("https://api.openai.com.evil.example/v1", None, False),
        ("https://notapi.openai.com/v1", None, False),
        ("http://localhost:8000/v1", None, False),
        ("http://localhost:8000/v1", "OPENAI_API_KEY", True),
        ("http://[::1]:8000/v1", "OPENAI_API_KEY", True),
        ("https://evil.example/v1", "OPENAI_API_KEY", True),
        ("http://127.0.0.1.evil.example/v1", "OPENAI_API_KEY", None),
        ("http://10.0.0.7:8000/v1", "OPENAI_API_KEY", None),
        ("http://api.openai.com/v1", None, None),
    ],
)
def test_a_key_goes_to_its_own_host_and_never_in_the_open(
    monkeypatch: pytest.MonkeyPatch, url: str, variable: str | None, sent: bool | None
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    if sent is None:
        with pytest.raises(ValueError, match="OPENAI_API_KEY is not sent over plain http") as refused:
            key_for(url, variable)
        assert KEY not in str(refused.value)
    else:
        assert key_for(url, variable) == (KEY if sent else "")


def test_the_default_key_stays_here_and_the_refusal_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    with serve(lambda _: (401, {}, b"who are you?")) as server, pytest.raises(ValueError, match="no key was sent: --key-variable"):
        ask(Endpoint(server.url, "m"), texts(1))
    assert KEY not in str(server.requests)


def test_an_image_that_cannot_be_read_costs_its_own_prompt(tmp_path: Path, image: Path) -> None:
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(b"no image")
    with serve(lambda _: "red") as server:
        answers = ask(Endpoint(server.url, "m"), [Prompt.about(str(i), str(file), "?") for i, file in enumerate((image, broken))])
    assert [answer.text for answer in answers] == ["red", ""] and "broken.jpg" in str(answers[1].error)


@pytest.mark.parametrize("url", ["localhost:8000/v1", "ftp://host/v1", "http://", "http://user:pa55@host/v1", "https://host/v1?key=pa55"])
def test_a_bad_address_is_refused_without_its_secrets(url: str) -> None:
    with pytest.raises(ValueError, match="http") as error:
        Endpoint(url, "m")
    assert "pa55" not in str(error.value)


def test_no_more_prompts_under_way_than_asked_for() -> None:
    three = threading.Barrier(3, timeout=600)

    def together(body: Body) -> str:
        three.wait()
        return echo(body)

    with serve(together) as server:
        ask(Endpoint(server.url, "m", concurrency=3), texts(12))
    assert server.most_under_way == 3


def test_other_forms_of_reply() -> None:
    def reply(body: Body) -> bytes:
        forms: Iterator[dict[str, object]] = iter([
            {"content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
            {"content": None, "refusal": "I can't."},
            {"content": ""},
        ])  # fmt: skip
        message = [*forms][int(echo(body))]
        return json.dumps({"choices": [{"message": message}], "usage": {"prompt_tokens": "many", "completion_tokens": -1}}).encode()

    with serve(reply) as server:
        answers = ask(Endpoint(server.url, "m"), texts(3))
    assert [answer.text for answer in answers] == ["ab", "I can't.", ""]
    assert {(answer.input_tokens, answer.output_tokens) for answer in answers} == {(0, 0)}
