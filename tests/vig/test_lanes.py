"""Two items are scored side by side: one reads its records while the other uses the model, as the caller would."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import pytest
import torch

from vig import score
from vig.scoring.pairs import PairReader
from vig.scoring.passes import TwoPasses


def test_records_are_read_while_the_model_scores(
    llava: Any, records: list[Any], image_folder: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first pass does not go on before the second item's record is read, and no two threads use the model or the tokenizer."""
    read, batch, second = PairReader.read, TwoPasses._batch, threading.Event()
    using: dict[str, list[int]] = {"reader": [], "model": []}

    def alone(who: str, function: Any, *arguments: Any) -> Any:
        using[who].append(1)
        assert len(using[who]) == 1
        try:
            return function(*arguments)
        finally:
            using[who].pop()

    def reading(self: PairReader, raw: Any) -> Any:
        pair = alone("reader", read, self, raw)
        if raw["id"] == "r1":
            second.set()
        return pair

    def scoring(self: TwoPasses, *arguments: Any) -> Any:
        assert second.wait(60)
        return alone("model", batch, self, *arguments)

    monkeypatch.setattr(PairReader, "read", reading)
    monkeypatch.setattr(TwoPasses, "_batch", scoring)
    scores = score(*llava, records, image_folder=image_folder, batch_size=1)
    assert scores.ids == [record["id"] for record in records] and not scores.failures


def test_the_callers_autocast_holds(llava: Any, records: list[Any], image_folder: Any) -> None:
    exact = score(*llava, records, image_folder=image_folder)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = score(*llava, records, image_folder=image_folder)
    apart = max(float(np.abs(rounded[one.id].token_vig - one.token_vig).max()) for one in exact)
    assert 1e-3 < apart < 0.5


def test_each_item_keeps_its_own_account(llava: Any, records: list[Any], image_folder: Any) -> None:
    bad = [{**records[0], "id": f"bad{index}", "image": "missing.png"} for index in range(3)]
    text = {"id": "text", "conversations": [{"from": "human", "value": "Two and two?"}, {"from": "gpt", "value": "Four."}]}
    mixed = [records[0], bad[0], records[1], text, bad[1], records[2], records[3], bad[2]]
    scores = score(*llava, iter(mixed), image_folder=image_folder, batch_size=1)
    assert scores.ids == ["r0", "r1", "r2", "r3"]
    assert list(scores.failures) == ["bad0", "bad1", "bad2"] and scores.manifest["text_only"] == ["text"]
