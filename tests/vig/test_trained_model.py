"""What VIG is to mean, on a model that has learnt to look: a matching image helps, a partly matching one less, a wrong one harms."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from PIL import Image
from support.tiny import build_model, build_tokenizer

from mof import MoFProcessor
from mof.data.collator import SupervisedCollator
from vig import score

COLOURS = {"red": (220, 30, 30), "green": (30, 200, 30), "blue": (40, 40, 230)}


def halves(left: str, right: str) -> Image.Image:
    image = Image.new("RGB", (32, 32), COLOURS[left])
    image.paste(COLOURS[right], (16, 0, 32, 32))
    return image


def record(said: tuple[str, str], shown: tuple[str, str], name: str) -> dict[str, Any]:
    turns = [{"from": "human", "value": "<image>\nC?"}, {"from": "gpt", "value": f"{said[0][0]}{said[1][0]}"}]
    return {"id": f"{name} {said}", "image": halves(*shown), "conversations": turns}


@pytest.fixture(scope="module")
def parts() -> tuple[Any, Any]:
    """Our tiny model after some seconds of learning to name the two colours."""
    torch.manual_seed(0)
    tokenizer = build_tokenizer()
    model = build_model(tokenizer)
    processor = MoFProcessor.from_parts(model, tokenizer)
    pairs = [(a, b) for a in COLOURS for b in COLOURS]
    batch = SupervisedCollator(processor)([record(pair, pair, "train") for pair in pairs])
    optimiser = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    for _ in range(80):
        optimiser.zero_grad()
        loss = model(**batch).loss
        loss.backward()
        optimiser.step()
    assert loss.item() < 0.1
    return model.eval(), processor


def test_matching_partly_matching_conflicting(parts) -> None:
    pairs = [(a, b) for a in COLOURS for b in COLOURS if a != b]
    other = dict(zip(COLOURS, [*COLOURS][1:] + [*COLOURS][:1], strict=True))
    shown = {
        "matching": [(a, b) for a, b in pairs],
        "partly": [(a, other[b]) for a, b in pairs],
        "conflicting": [(other[a], other[b]) for a, b in pairs],
    }
    means = {}
    for name, images in shown.items():
        scores = score(*parts, [record(said, image, name) for said, image in zip(pairs, images, strict=True)], null="mean")
        means[name] = scores.vig.mean()
    assert means["matching"] > means["partly"] > means["conflicting"]
    assert means["matching"] > 0.3 and means["conflicting"] < 0  # signed: a wrong image is worse than none


def test_the_wrong_images_lower_the_mean(parts) -> None:
    pairs = [(a, b) for a in COLOURS for b in COLOURS]
    right = score(*parts, [record(pair, pair, "right") for pair in pairs])
    wrong = score(*parts, [record(pair, shown, "wrong") for pair, shown in zip(pairs, pairs[4:] + pairs[:4], strict=True)])
    assert right.vig.mean() > wrong.vig.mean() + 0.3
    # and measured the other way: another record's image is a worse one than the record's own
    assert score(*parts, [record(pair, pair, "right") for pair in pairs], null="shuffle").vig.mean() > 0.3
