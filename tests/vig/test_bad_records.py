"""Whatever is in a data set, the sound records are scored as ever and the others are listed with a reason."""

from __future__ import annotations

import copy
import io
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFile
from support.odd_records import CONVERSATION, ODD_RECORDS
from support.pictures import encoded

import vig.scoring.passes
from vig import load_scores, score

MESSAGES = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]}, {"role": "assistant", "content": "A dog."}]


PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 30, 3), dtype=np.uint8))
PNG = encoded(PICTURE)


def opened(content: bytes) -> Image.Image:
    return Image.open(io.BytesIO(content))


def chat(text: str, image: Any = PICTURE, answer: str = "A dog.") -> dict[str, Any]:
    question = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]}
    return {"messages": [question, {"role": "assistant", "content": answer}], "images": [image]}


BAD: dict[str, Any] = {
    "no dict": "hello",
    "nothing": None,
    "a number": 3.5,
    "keys of two kinds": {1: 2, "a": {(1, 2): 3}},
    "empty": {},
    "no turns": {"conversations": [], "image": "0.png"},
    "turns of another type": {"conversations": {"from": "human"}, "image": "0.png"},
    "a turn that is no dict": {"conversations": ["hi", 3, None], "image": "0.png"},
    "unknown role": {"image": "0.png", "conversations": [{"from": "alien", "value": "<image>"}, CONVERSATION[1]]},
    "two questions": {"image": "0.png", "conversations": [CONVERSATION[0], *CONVERSATION]},
    "no answer": {"image": "0.png", "conversations": CONVERSATION[:1]},
    "a number as answer": {"image": "0.png", "conversations": [CONVERSATION[0], {"from": "gpt", "value": 7}]},
    "image in the answer": {"image": "0.png", "conversations": [CONVERSATION[0], {"from": "gpt", "value": "<image>"}]},
    "no placeholder": {"image": "0.png", "conversations": [{"from": "human", "value": "What?"}, CONVERSATION[1]]},
    "two placeholders": {"image": "0.png", "conversations": [{"from": "human", "value": "<image><image>"}, CONVERSATION[1]]},
    "missing file": {"image": "missing.png", "conversations": CONVERSATION},
    "a folder": {"image": ".", "conversations": CONVERSATION},
    "an array of floats": {"image": np.zeros((4, 4, 3)), "conversations": CONVERSATION},
    "an array of five channels": {"image": np.zeros((4, 4, 5), np.uint8), "conversations": CONVERSATION},
    "bytes that are no image": {"image": {"bytes": b"GIF89a?", "path": None}, "conversations": CONVERSATION},
    "cut bytes": {"image": {"bytes": PNG[:400], "path": None}, "conversations": CONVERSATION},
    "neither bytes nor path": {"image": {"bytes": None, "path": None}, "conversations": CONVERSATION},
    "a name with a zero byte": {"image": "a\0b.png", "conversations": CONVERSATION},
    "image token in the text": chat("What does <image> mean?"),
    "image token in the answer": chat("What?", answer="It says <image>."),
    "half a character": chat("What?", answer="\ud83d"),
}
SOUND: dict[str, Any] = {
    "bytes": {"image": {"bytes": PNG, "path": "somewhere.png"}, "conversations": CONVERSATION},
    "path": {"image": {"bytes": None, "path": "0.png"}, "conversations": CONVERSATION},
    "an array": {"image": np.zeros((4, 4, 3), np.uint8), "conversations": CONVERSATION},
    "one pixel": chat("What?", Image.new("RGB", (1, 1))),
    "a line": chat("What?", Image.new("RGB", (300, 1))),
    "grey": chat("What?", Image.new("L", (20, 20))),
    "palette": chat("What?", PICTURE.convert("P")),
    "columns of a table": {"conversations": None, "messages": MESSAGES, "image": None, "images": [PICTURE]},
    "smiley": chat("What?", answer="😀 ja"),
}


def named(cases: dict[str, Any]) -> list[Any]:
    return [raw | {"id": name} if isinstance(raw, dict) else raw for name, raw in cases.items()]


@pytest.mark.parametrize("batch_size", [64, 1])
def test_a_data_set_full_of_trouble(llava, records, image_folder, tmp_path, batch_size) -> None:
    all_of_them = [*named(BAD), *named(SOUND), *records]
    random.Random(0).shuffle(all_of_them)
    scores = score(*llava, all_of_them, tmp_path, image_folder=image_folder, batch_size=batch_size)
    assert set(scores.ids) == {*SOUND, *(record["id"] for record in records)}
    assert len(scores.failures) == len(BAD) and {name for name, raw in BAD.items() if isinstance(raw, dict)} <= set(scores.failures)
    assert all(scores.failures.values()) and scores.manifest["text_only"] == []
    alone = score(*llava, records, image_folder=image_folder)
    by_id = {s.id: s for s in scores}
    for s in alone:
        np.testing.assert_allclose(by_id[s.id].token_vig, s.token_vig, atol=1e-5)
    lines = [json.loads(line) for line in (tmp_path / "_rejected.jsonl").read_text().splitlines()]
    assert {line["id"]: line["reason"] for line in lines} == scores.failures == load_scores(tmp_path).failures
    assert json.loads((tmp_path / "_manifest.json").read_text())["rejected"] == len(BAD)


def test_an_id_that_no_file_takes(llava, records, image_folder, tmp_path) -> None:
    records[1]["id"] = "half \ud83d"
    scores = score(*llava, records, tmp_path, image_folder=image_folder)
    assert scores.ids == ["r0", "r2", "r3", "r4"] and "surrogate" in scores.failures["half \ud83d"]
    assert load_scores(tmp_path).failures == scores.failures


def test_two_broken_open_images_in_a_row(llava, records, image_folder) -> None:
    """Equal in all that is known before they are decoded, and to the sound one before them."""
    lines = [{**chat("What?", opened(content)), "id": name} for name, content in (("sound", PNG), ("cut", PNG[:900]), ("too", PNG[:900]))]
    assert not ImageFile.LOAD_TRUNCATED_IMAGES
    scores = score(*llava, [*lines, *records], image_folder=image_folder)
    assert scores.ids == ["sound", *(record["id"] for record in records)] and list(scores.failures) == ["cut", "too"]


class Rows:
    """As Hugging Face data sets do it: images are decoded when their row is asked for, and iteration ends at an error."""

    def __init__(self, rows: list[dict[str, Any]]) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = dict(self.rows[index])
        row["images"] = [opened(content) for content in row["images"]]
        for image in row["images"]:
            image.load()
        return row


def test_a_row_that_cannot_be_decoded(llava, tmp_path) -> None:
    rows = [{"id": str(i), "messages": MESSAGES, "images": [PNG if i != 1 else PNG[:400]]} for i in range(3)]
    scores = score(*llava, Rows(rows), tmp_path)
    assert scores.ids == ["0", "2"] and list(scores.failures) == ["row 1"] and "OSError" in scores.failures["row 1"]
    with pytest.raises(OSError):
        list(Rows(rows))


def refusing(model: Any, monkeypatch: pytest.MonkeyPatch, bad: Any) -> Any:
    """The model, but records with a token that only `bad` has are refused, as by a kernel or an index."""
    forward = model.forward

    def forward_or_not(*args: Any, **kwargs: Any) -> Any:
        if bad(kwargs["input_ids"]):
            raise RuntimeError("index out of range")
        return forward(*args, **kwargs)

    monkeypatch.setattr(model, "forward", forward_or_not)
    return model


@pytest.mark.parametrize("place", [0, 4])
def test_a_record_that_the_model_refuses_fails_alone(llava, records, image_folder, monkeypatch, caplog, place) -> None:
    model, processor = llava
    plain = score(model, processor, records, image_folder=image_folder)
    strange = copy.deepcopy(records[0]) | {"id": "strange"}
    strange["conversations"][1]["value"] = "~~~"
    token = processor.tokenizer("~", add_special_tokens=False)["input_ids"][-1]
    refusing(model, monkeypatch, lambda ids: bool((ids == token).any()))
    scores = score(model, processor, [*records[:place], strange, *records[place:]], image_folder=image_folder)
    assert scores.ids == plain.ids and list(scores.failures) == ["strange"]
    assert "does not take it (RuntimeError: index out of range)" in scores.failures["strange"]
    for a, b in zip(scores, plain, strict=True):
        np.testing.assert_allclose(a.token_vig, b.token_vig, atol=1e-5)


def test_a_model_that_takes_nothing_ends_the_run(llava, records, image_folder, monkeypatch) -> None:
    monkeypatch.setattr(vig.scoring.passes, "MOST_FAILURES", 3)
    refusing(llava[0], monkeypatch, lambda ids: True)
    with pytest.raises(RuntimeError, match="index out of range"):
        score(*llava, records, image_folder=image_folder)


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(st.lists(ODD_RECORDS, max_size=6))
def test_no_record_can_end_the_run(llava, image_folder, tmp_path_factory, odd) -> None:
    sound = {"id": "sound record", "image": "0.png", "conversations": CONVERSATION}
    folder: Path = tmp_path_factory.mktemp("scores")
    scores = score(*llava, iter([*odd, sound]), folder, image_folder=image_folder, batch_size=4)
    assert "sound record" in scores.ids
    known = set(scores.ids) | set(scores.failures) | set(scores.manifest["text_only"])
    assert len(known) >= 1 and load_scores(folder).failures == scores.failures
