"""write_dataset draws the miniature world as data: LLaVA records with images for training, and MMVP's pairs of questions for measuring."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from encoders.progress import tracked
from encoders.whole_files import write_json
from mof.evals.benchmark_folders import write_mmvp
from mof.miniature.benchmarks import described_pair
from mof.miniature.language import DESCRIBE, Turn, description, dialogue, yes_or_no
from mof.miniature.noise import KINDS, draw_kind
from mof.miniature.scenes import PATTERNS, Scene, render, sample_scene

HABIT_SHARE = 0.2  # share of fields with the usual value of the kind of object; this share is 0.7 in the texts of mini-lm


def write_dataset(
    folder: Path, *, align: int, finetune: int, pairs: int, seed: int = 0, mixes: Mapping[str, Mapping[str, float]] | None = None,
    progress: bool = False,
) -> None:  # fmt: skip
    """Draw the images and write `align.json`, `finetune.json`, `images/` and `MMVP/`.

    Args:
        align: number of records that describe an image.
        finetune: number of records with questions and answers. Nine tenths of them have an image, and a tenth asks twice whether a
            thing is in the image, to be answered by yes or no; all others ask five other questions.
        pairs: number of pairs of held-out scenes for each of the nine patterns, in MMVP's layout with lossless images.
        seed: the same seed draws the same data. The held-out scenes are never among the training scenes.
        mixes: name of a file of records -> share for each kind of noise (`mof.miniature.noise`), of the records that ask five
            questions about a picture. All files have the same pictures, and a record with noise at a low share has the same noise
            at a higher share. Default: "finetune" without noise. For each file, `NAME-truth.json` holds the noise, the deciding
            words and whether the picture supports them, by the record's id; no training reads it.
        progress: show a bar.

    Raises:
        ValueError: for an unknown kind of noise, or shares whose sum is above 1.
    """
    (folder / "images").mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    captions = [_caption_record(folder, i, rng) for i in tracked(range(align), "scenes to align on", shown=progress)]
    talks = [_talk(folder, i, rng) for i in tracked(range(finetune), "scenes to fine-tune on", shown=progress)]
    chosen = [pattern for pattern in PATTERNS for _ in range(pairs)]
    held_out = [described_pair(pattern, rng) for pattern in tracked(chosen, "held-out pairs", shown=progress)]
    write_mmvp(folder / "MMVP", held_out, suffix=".png")
    write_json(folder / "align.json", captions)
    for name, shares in (mixes or {"finetune": {}}).items():
        _write_mix(folder, name, talks, shares, seed)


@dataclass(frozen=True)
class _Talk:
    """A _Talk is a scene with questions and answers, before noise is added."""

    id: str
    scene: Scene
    turns: list[Turn]
    image: str | None
    """Name of the image; None for a record of text, in which a description takes the place of the image."""
    context: str = ""
    noisy: bool = True
    """Whether noise may change the record."""


def _talk(folder: Path, i: int, rng: np.random.Generator) -> _Talk:
    scene = sample_scene(rng, habit_share=HABIT_SHARE)
    asks_yes_or_no, is_text = i % 10 == 4, i % 10 == 9  # text as in LLaVA's mix, yes or no as in its VQA part
    turns = (yes_or_no if asks_yes_or_no else dialogue)(scene, rng)
    if is_text:
        return _Talk(f"talk-{i}", scene, turns, None, context=description(scene, rng), noisy=False)
    return _Talk(f"talk-{i}", scene, turns, _draw(folder, f"talk-{i}", scene, rng), noisy=not asks_yes_or_no)


def _write_mix(folder: Path, name: str, talks: list[_Talk], shares: Mapping[str, float], seed: int) -> None:
    records, truths = [], {}
    for i, talk in enumerate(talks):
        rng = np.random.default_rng([seed, i])  # a generator for each record, so that images and other records do not depend on the noise
        kind = draw_kind(shares, rng) if talk.noisy else None
        turns = KINDS[kind](talk.scene, rng) if kind else talk.turns
        first = f"<image>\n{turns[0].question}" if talk.image else f"{talk.context}\n{turns[0].question}"
        questions = [first, *(turn.question for turn in turns[1:])]
        texts = [pair for turn, asked in zip(turns, questions, strict=True) for pair in (("human", asked), ("gpt", turn.answer))]
        records.append(_record(talk.id, texts) | ({"image": talk.image} if talk.image else {}))
        truths[talk.id] = {"noise": kind, "words": [turn.word for turn in turns], "grounded": [turn.grounded for turn in turns]}
    write_json(folder / f"{name}.json", records)
    write_json(folder / f"{name}-truth.json", truths)


def _caption_record(folder: Path, i: int, rng: np.random.Generator) -> dict[str, Any]:
    scene = sample_scene(rng, habit_share=HABIT_SHARE)
    turns = [("human", f"<image>\n{DESCRIBE}"), ("gpt", description(scene, rng))]
    return _record(f"caption-{i}", turns) | {"image": _draw(folder, f"caption-{i}", scene, rng)}


def _draw(folder: Path, name: str, scene: Scene, rng: np.random.Generator) -> str:
    file = f"{name}.png"
    render(scene, rng).save(folder / "images" / file)
    return file


def _record(name: str, turns: list[tuple[str, str]]) -> dict[str, Any]:
    return {"id": name, "conversations": [{"from": who, "value": text} for who, text in turns]}
