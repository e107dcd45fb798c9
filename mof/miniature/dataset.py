"""The miniature world as data: LLaVA records with pictures for training, and MMVP-style pairs of questions for measuring."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from rich.progress import track

from mof.miniature.language import DESCRIBE, description, dialogue, question, word
from mof.miniature.scenes import PATTERNS, Scene, render, sample_pair, sample_scene

HABIT_SHARE = 0.2  # how often a field has the value that its kind of object usually has; 0.7 in the texts of mini-lm


def write_dataset(folder: Path, *, align: int, finetune: int, pairs: int, seed: int = 0) -> None:
    """Draw the pictures and write `align.json`, `finetune.json`, `pairs.json` and `images/`.

    Args:
        align: records that describe a picture.
        finetune: records of five questions and answers about a picture, a tenth of them about no picture.
        pairs: pairs of held-out scenes for each of the nine patterns. Both pictures get the same question, whose right
            answers differ; all options are equally likely, whatever is usual.
        seed: the same seed draws the same data. The held-out scenes are never among the training scenes.
    """
    (folder / "images").mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    captions = [_caption_record(folder, i, rng) for i in track(range(align), "drawing scenes to align on")]
    talks = [_talk_record(folder, i, rng) for i in track(range(finetune), "drawing scenes to finetune on")]
    chosen = [(pattern, i) for pattern in PATTERNS for i in range(pairs)]
    questions = [q for pattern, i in track(chosen, "drawing held-out pairs") for q in _pair(folder, pattern, i, rng)]
    for name, records in (("align", captions), ("finetune", talks), ("pairs", questions)):
        (folder / f"{name}.json").write_text(json.dumps(records))


def _caption_record(folder: Path, i: int, rng: np.random.Generator) -> dict[str, Any]:
    scene = sample_scene(rng, habit_share=HABIT_SHARE)
    turns = [("human", f"<image>\n{DESCRIBE}"), ("gpt", description(scene, rng))]
    return _record(f"caption-{i}", turns) | {"image": _draw(folder, f"caption-{i}", scene, rng)}


def _talk_record(folder: Path, i: int, rng: np.random.Generator) -> dict[str, Any]:
    scene = sample_scene(rng, habit_share=HABIT_SHARE)
    turns = [(who, text) for turn in dialogue(scene, rng) for who, text in zip(("human", "gpt"), turn, strict=True)]
    if i % 10 == 9:  # text only, as in LLaVA's mix: the description stands in for the picture
        turns[0] = ("human", f"{description(scene, rng)}\n{turns[0][1]}")
        return _record(f"talk-{i}", turns)
    turns[0] = ("human", f"<image>\n{turns[0][1]}")
    return _record(f"talk-{i}", turns) | {"image": _draw(folder, f"talk-{i}", scene, rng)}


def _pair(folder: Path, pattern: str, i: int, rng: np.random.Generator) -> list[dict[str, Any]]:
    """The two questions of a pair: the same words, another picture, the other answer."""
    scenes = sample_pair(rng, pattern)
    answers = [word(pattern, getattr(scene, PATTERNS[pattern])) for scene in scenes]
    asked = question(scenes[0], pattern, rng, other=answers[1])
    shared = {"pair": f"{pattern}-{i}", "pattern": pattern, "question": asked, "options": sorted(answers)}
    return [
        shared | {"id": f"{pattern}-{i}-{k}", "image": _draw(folder, f"{pattern}-{i}-{k}", scene, rng), "answer": answers[k]}
        for k, scene in enumerate(scenes)
    ]


def _draw(folder: Path, name: str, scene: Scene, rng: np.random.Generator) -> str:
    file = f"{name.replace(' ', '_')}.png"
    render(scene, rng).save(folder / "images" / file)
    return file


def _record(name: str, turns: list[tuple[str, str]]) -> dict[str, Any]:
    return {"id": name, "conversations": [{"from": who, "value": text} for who, text in turns]}
