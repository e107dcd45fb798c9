"""The cache: what it holds is not asked again, and being killed costs no answer that was written."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from resource import RLIMIT_FSIZE, getrlimit, setrlimit
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from encoders import ImageError
from mof.evals.answering import Answer, AnswerCache, Prompt, answer_all, cache_key
from mof.evals.run import Run


class Counting:
    """Answers with the prompt's text, last prompt first; counts what it is asked."""

    def __init__(self, **settings: Any) -> None:
        self.name, self.settings = "counting", settings
        self.asked: list[str] = []

    def answer(self, prompts: Sequence[Prompt]) -> Iterator[tuple[int, Answer]]:
        for position in reversed(range(len(prompts))):
            self.asked.append(prompts[position].id)
            text = prompts[position].messages[0]["content"][-1]["text"]
            yield position, Answer(text, (-0.1, -2.5) if prompts[position].options else None, 10, 3)


@pytest.fixture
def images(tmp_path: Path) -> list[str]:
    files = [tmp_path / f"{colour}.png" for colour in ("red", "green")]
    for file in files:
        Image.new("RGB", (4, 4), file.stem).save(file)
    return [str(file) for file in files]


def test_a_second_run_is_free(tmp_path: Path, images: list[str]) -> None:
    prompts = [Prompt.about(str(i), image, f"what {i}?", ("(a)", "(b)")) for i, image in enumerate(images * 2)]
    file = tmp_path / "new" / "cache.jsonl"
    first, usage = answer_all(Counting(), prompts, AnswerCache(file))
    assert [answer.text for answer in first] == [f"what {i}?" for i in range(4)]
    assert (usage.answers, usage.asked, usage.input_tokens, usage.output_tokens) == (4, 4, 40, 12)
    again = Counting()
    second, usage = answer_all(again, prompts, AnswerCache(file))
    assert second == first and again.asked == []
    assert (usage.asked, usage.asked_input_tokens, usage.input_tokens) == (0, 0, 40)


def test_whatever_may_change_an_answer_is_in_the_key(images: list[str]) -> None:
    red, green = images
    prompt = Prompt.about("1", red, "what?")
    others = {
        cache_key(Counting(), Prompt.about("1", green, "what?")),
        cache_key(Counting(), Prompt.about("1", red, "which?")),
        cache_key(Counting(), Prompt.about("1", red, "what?", ("(a)", "(b)"))),
        cache_key(Counting(), Prompt("1", [{"role": "system", "content": prompt.messages[0]["content"]}], [red])),
        cache_key(Counting(model="other"), prompt),
        cache_key(Counting(), dataclasses.replace(prompt, images=[red, red])),
        cache_key(Counting(), dataclasses.replace(prompt, images=[Image.new("RGB", (4, 4))])),
    }
    assert len(others | {cache_key(Counting(), prompt)}) == 8
    key = cache_key(Counting(), prompt)
    copy = Path(red).with_name("copy.png")
    copy.write_bytes(Path(red).read_bytes())
    assert cache_key(Counting(), Prompt.about("another id", str(copy), "what?")) == key
    Image.open(green).save(red)  # the same name, another picture
    assert cache_key(Counting(), prompt) != key
    with pytest.raises(ImageError, match="gone"):
        cache_key(Counting(), Prompt.about("1", "gone.png", "what?"))


def test_equal_prompts_are_asked_once_with_a_cache(tmp_path: Path, images: list[str]) -> None:
    prompts = [Prompt.about(str(i), images[0], "what?") for i in range(3)]
    answerer = Counting()
    answers, usage = answer_all(answerer, prompts, AnswerCache(tmp_path / "cache.jsonl"))
    assert len(answerer.asked) == 1 and [answer.text for answer in answers] == ["what?"] * 3
    assert usage.answers == 1  # what was paid for
    answer_all(answerer, prompts)
    assert len(answerer.asked) == 4


def test_every_cut_of_the_file_keeps_what_was_whole(tmp_path: Path) -> None:
    whole = tmp_path / "whole.jsonl"
    cache = AnswerCache(whole)
    answers = {"k1": Answer("one\nline", (-1.5, -0.25), 3, 4), "k2": Answer("zwei \u2019\u2028", None), "k3": Answer("")}
    for key, answer in answers.items():
        cache.put(key, answer)
    content = whole.read_bytes()
    ends = [i + 1 for i, byte in enumerate(content) if byte == ord("\n")]
    assert len(ends) == 3
    cut = tmp_path / "cut.jsonl"
    for length in sorted({*range(0, len(content), 9), *(end + i for end in ends for i in (-2, -1, 0))}):
        cut.write_bytes(content[:length])
        kept = [key for key, end in zip(answers, ends, strict=True) if end - 1 <= length]  # a line may lack but its end
        cache = AnswerCache(cut)
        assert [key for key in answers if cache.get(key) == answers[key]] == kept
        cache.put("new", Answer("after the cut"))
        cache.put("newer", Answer("after that"))
        reopened = AnswerCache(cut)
        assert all(reopened.get(key) == answers[key] for key in kept)
        assert reopened.get("new") == Answer("after the cut") and reopened.get("newer") == Answer("after that")


def test_runs_that_share_a_file_end_each_others_torn_lines(tmp_path: Path) -> None:
    """The disk fills in the middle of a line, or another run is killed there, while this run goes on."""
    file = tmp_path / "cache.jsonl"
    ours = AnswerCache(file)
    ours.put("k1", Answer("first"))
    with file.open("ab") as torn:
        torn.write(b'{"format": 1, "key": "lo')
    ours.put("k2", Answer("second"))
    AnswerCache(file).put("k3", Answer("third"))
    kept = AnswerCache(file)
    assert [kept.get(key) for key in ("k1", "k2", "k3")] == [Answer("first"), Answer("second"), Answer("third")]


def test_lines_without_a_format_are_read_and_those_of_a_later_format_are_not(tmp_path: Path) -> None:
    file = tmp_path / "cache.jsonl"
    cache = AnswerCache(file)
    cache.put("key", Answer("new"))
    (line,) = file.read_text().splitlines()
    entry = json.loads(line)
    assert entry.pop("format") == 1 and entry.pop("digest")
    later = entry | {"format": 2, "key": "later"}
    file.write_text("".join(json.dumps(row) + "\n" for row in (entry | {"key": "old"}, later)))
    cache = AnswerCache(file)
    assert cache.get("old") == Answer("new") and cache.get("later") is None


def test_a_damaged_line_is_named_and_its_prompt_asked_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = tmp_path / "cache.jsonl"
    for key in ("k1", "k2"):
        AnswerCache(file).put(key, Answer("yes"))
    sound = file.read_bytes()
    second = sound.index(b"\n") + 1
    for place in range(second, len(sound), 7):
        damaged = bytearray(sound)
        damaged[place] ^= 1
        file.write_bytes(damaged)
        caplog.clear()
        cache = AnswerCache(file)
        assert cache.get("k1") == Answer("yes") and cache.get("k2") is None
        assert f"{file}, line 2 holds no whole answer" in caplog.text
        cache.put("k2", Answer("yes"))
        assert file.read_bytes() == sound, "the next answer mends the file"


def test_lines_of_others_stay_in_the_file_and_torn_lines_do_not(tmp_path: Path) -> None:
    others = b'{"id": 1, "answer": "yes"}\nno JSON\n'
    torn = b'{"format": 1, "key": "lo'
    for position, content in enumerate((others + torn, others + torn + b"\n", others + torn[:3])):
        file = tmp_path / f"{position}.jsonl"
        file.write_bytes(content)
        link = tmp_path / f"link-{position}.jsonl"
        link.symlink_to(file)
        AnswerCache(link).put("k", Answer("yes"))
        assert file.read_bytes().startswith(others) and file.read_bytes().count(b"\n") == 3 and link.is_symlink()
        assert AnswerCache(file).get("k") == Answer("yes")


def test_a_full_disk_is_told_with_the_file(tmp_path: Path) -> None:
    cache, (_, hard) = AnswerCache(tmp_path / "cache.jsonl"), getrlimit(RLIMIT_FSIZE)
    (tmp_path / "cache.jsonl").write_bytes(b"\n" * 90)
    setrlimit(RLIMIT_FSIZE, (100, hard))
    try:
        with pytest.raises(OSError, match=r"File too large: '.*cache\.jsonl'"):
            cache.put("k", Answer("yes"))
    finally:
        setrlimit(RLIMIT_FSIZE, (hard, hard))


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.binary(max_size=200) | st.sampled_from([b"{}\n", b"[]\n", b'{"key": [], "answer": {}}', b'{"key": "x", "answer": {"text": 1}}']))
def test_any_file_opens(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "cache.jsonl"
    file.write_bytes(content)
    assert AnswerCache(file).get("k") is None


def test_an_image_that_is_not_read_costs_its_own_prompts(tmp_path: Path, images: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    with Path(images[0]).open("ab") as file:
        file.truncate(5000)
    monkeypatch.setenv("MOF_MAX_IMAGE_BYTES", "4000")
    prompts = [Prompt.about(str(i), image, "what?") for i, image in enumerate(images)]
    answers, usage = answer_all(Counting(), prompts, AnswerCache(tmp_path / "cache.jsonl"))
    assert "red.png" in str(answers[0].error) and "5,000 bytes" in str(answers[0].error)
    assert answers[1].text == "what?" and usage.asked == 1
    run = Run(tmp_path / "run", Counting())
    result = run.measure("pope", prompts, [], lambda answers: ([], {}, []), decoding="any", refused="they cost nothing")
    assert "red.png" in result["deviations"][1] and "they cost nothing" in result["deviations"][1]


def test_an_answer_is_on_disk_before_it_is_used(tmp_path: Path) -> None:
    class Watching(Counting):
        def answer(self, prompts: Sequence[Prompt]) -> Iterator[tuple[int, Answer]]:
            for done, made in enumerate(super().answer(prompts)):
                assert len(file.read_text().splitlines() if file.exists() else []) == done
                yield made

    file = tmp_path / "cache.jsonl"
    prompts = [Prompt(str(i), [{"role": "user", "content": [{"type": "text", "text": str(i)}]}], []) for i in range(5)]
    answer_all(Watching(), prompts, AnswerCache(file))
    assert {json.loads(line)["answer"]["text"] for line in file.read_text().splitlines()} == set("01234")
