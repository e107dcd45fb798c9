"""What `print` shows of scores, pairs, selections, stores, encoders and mixers, and how pairs and scores are looked up."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from encoders import Encoder, FeatureStore, encode_images
from mof import InterleavedMoF, blind_pairs
from mof.pairs.pair_table import BlindPairs
from vig import Score, Scores, select


def lines(shown: object) -> list[str]:
    text = str(shown)
    assert text == repr(shown)
    assert 2 <= len(text.splitlines()) <= 10 and all(len(line) <= 140 for line in text.splitlines())
    return text.splitlines()


@pytest.fixture
def scores() -> Scores:
    values = {"a": [0.5, 1.5], "b": [0.25], "c": [-1.0, 0.0, 1.0]}
    items = []
    for id, token_vig in values.items():
        vig = float(np.mean(token_vig))
        items.append(Score(id, vig, 1.0, 1.0 + vig, np.array(token_vig, np.float32), np.arange(len(token_vig)), np.array([], int), "0"))
    return Scores(items, {"identity": {}, "complete": True, "text_only": ["t"], "failures": {"f": "no image f.png"}})


@pytest.fixture
def pairs() -> BlindPairs:
    clip, dino = np.eye(7, dtype=np.float32), np.eye(7, dtype=np.float32)
    clip[:, 0] = 5
    return blind_pairs(clip / np.linalg.norm(clip, axis=1, keepdims=True), dino, 0.5, 0.5)


def test_scores(scores: Scores) -> None:
    head, others, vig = lines(scores)
    assert head == "Scores of 3 records with 6 answer tokens"
    assert others == "  1 records without an image, 1 that could not be scored"
    assert vig == "  VIG in nats: mean 0.417, median 0.250, from 0.000 to 1.000"
    assert len(lines(Scores([], scores.manifest))) == 2
    assert "did not finish" in str(Scores([], {**scores.manifest, "complete": False}))
    assert scores["b"].id == scores[1].id == "b" and [score.id for score in scores[1:]] == ["b", "c"]
    assert str(scores["a"]) == "Score of record 'a': VIG 1.000 nats; loss 1.000 with the image, 2.000 with the null image; 2 answer tokens"
    with pytest.raises(KeyError, match=r"'f'.*no image f\.png"):
        scores["f"]
    with pytest.raises(KeyError, match="'x'.*not scored"):
        scores["x"]


def test_selection(scores: Scores) -> None:
    assert lines(select(scores, keep=0.3))[1].startswith("1 of 3 samples and 1 of 6 answer tokens with VIG >= 1.0000")
    assert lines(select(scores, sources={"a": "x", "b": "y", "c": "z"}))[-1].startswith("  z")
    items = [Score(str(n), 0.0, 1.0, 1.0, np.zeros(1, np.float32), np.zeros(1, int), np.array([], int), "0") for n in range(30)]
    many = select(Scores(items, scores.manifest), sources={str(n): f"source {n}" for n in range(30)})
    assert lines(many)[-1] == "  and 23 more sources; summary() shows all"


def test_pairs(pairs: BlindPairs) -> None:
    head, names, *rows, more = lines(pairs)
    assert head == pairs.summary() and names.split() == ["i", "j", "CLIP", "DINO", "gap"] and len(rows) == 5 and more.strip() == "..."
    assert rows[0].split() == ["0", "1", "0.981", "0.000", "0.981"]
    assert len(lines(pairs[:0])) == 2
    first = pairs[0]
    assert (first.i, first.j) == (pairs.i[0], pairs.j[0]) and isinstance(first.i, int)
    assert first.gap == pytest.approx(float(pairs.gap[0]))
    assert [(pair.i, pair.j) for pair in pairs] == list(zip(pairs.i.tolist(), pairs.j.tolist(), strict=True))
    assert pairs[-1] == list(pairs)[-1] and len(pairs[2:4]) == 2 and pairs[2:4][0] == pairs[2]
    assert len(pairs[pairs.i > 0]) == int((pairs.i > 0).sum())
    table = pairs.table([f"{n}.png" for n in range(7)])
    assert table.num_rows == len(pairs) and table["image_j"].to_pylist()[0] == "1.png"
    assert table.drop_columns(["image_i", "image_j"]).equals(pairs.table())
    with pytest.raises(IndexError):
        pairs[len(pairs)]


def test_encoder_mixer_and_store(tiny_encoders: dict[str, Encoder], tmp_path: Path) -> None:
    head, sizes, embedding, weights = lines(tiny_encoders["b"])
    assert head == "TinyEncoder tiny-b" and sizes.strip() == "24 x 24 pixels -> 6 x 6 tokens of 24 channels"
    assert "embedding of 24 numbers; no text tower" in embedding and "frozen, torch.float32, cpu" in weights
    mixer = InterleavedMoF(tiny_encoders, hidden_size=32)
    assert lines(mixer)[0] == "InterleavedMoF: 32 tokens of 32 channels for an image of 32 pixels"
    assert lines(mixer)[2] == "  a: tiny-a, 32 pixels, 4 x 4 tokens of 16 channels, frozen"
    Image.new("RGB", (40, 30), "red").save(tmp_path / "red.png")
    encode_images(tmp_path, tiny_encoders, tmp_path / "store", tokens="int8")
    head, a, _ = lines(FeatureStore(tmp_path / "store"))
    assert head == f"FeatureStore {tmp_path / 'store'}: 1 images"
    assert a == "  a: embeddings of 16 numbers, 4 x 4 tokens of 16 channels in int8"
