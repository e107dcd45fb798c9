"""`mof verify`: one line for each damaged, missing or foreign file, whatever command wrote it."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support.commands import mof
from support.tiny import build_model, build_tokenizer

from encoders import Encoder, View, encode_images
from encoders.digests import DamagedError, seal_json
from encoders.model_cards import CARD
from encoders.whole_files import read_sealed, write_sealed
from mof import MoFProcessor
from mof.evals.answerers import AnswersFile
from mof.evals.answering import Answer, AnswerCache
from mof.evals.mmvp_vlm import MMVPVLMResult, PairResult
from mof.evals.outcomes import read_outcome
from mof.evals.pope import PopeQuestion, eval_pope
from mof.evals.run import Run
from mof.pairs.pair_table import BlindPairs


def verify(folder: Path) -> tuple[int, list[str]]:
    """The exit code and the lines without the summary."""
    result = mof("verify", folder)
    return result.exit_code, result.output.splitlines()[:-1]


def flip(path: Path) -> bytes:
    """Flip a bit of the file and return its sound content."""
    sound = path.read_bytes()
    damaged = bytearray(sound)
    damaged[random.Random(len(sound)).randrange(len(sound))] ^= 4
    path.write_bytes(damaged)
    return sound


def assert_found(folder: Path, files: list[Path]) -> None:
    assert files and verify(folder) == (0, [])
    for path in files:
        sound = flip(path)
        code, lines = verify(folder)
        assert code == 1 and len(lines) == 1 and path.name in lines[0], (path, lines)
        path.write_bytes(sound[: len(sound) // 2])
        code, lines = verify(folder)
        assert code == 1 and any(path.name in line for line in lines), (path, lines)
        path.write_bytes(sound)
    assert verify(folder) == (0, [])


def test_model_folder(tmp_path: Path) -> None:
    tokenizer = build_tokenizer()
    model = build_model(tokenizer)
    model.save_pretrained(tmp_path)
    MoFProcessor.from_parts(model, tokenizer).save_pretrained(tmp_path)
    assert_found(tmp_path, sorted(path for path in tmp_path.iterdir() if path.name != CARD))  # people edit the card
    (tmp_path / "generation_config.json").unlink()
    code, lines = verify(tmp_path)
    assert code == 1 and lines == [f"{tmp_path / 'generation_config.json'} is missing"]


def test_pairs_and_sealed_lines(tmp_path: Path) -> None:
    pairs = BlindPairs(np.array([0]), np.array([1]), np.array([0.99], np.float32), np.array([0.25], np.float32), 2, 1)
    pairs.to_parquet(tmp_path / "pairs.parquet", ["a.png", "b.png"])
    lines = [seal_json({"image_i": "a.png", "question": question}, indent=None) + b"\n" for question in ("Which?", "Which one?")]
    (tmp_path / "annotations.jsonl").write_bytes(b"".join(lines))
    assert_found(tmp_path, [tmp_path / "pairs.parquet", tmp_path / "annotations.jsonl"])


def test_evaluation(tmp_path: Path) -> None:
    replies = {f"random/{i}": "yes" if i % 2 else "no" for i in range(4)}
    (tmp_path / "replies.json").write_text(json.dumps(replies))
    questions = [PopeQuestion(id, "random", f"{id[-1]}.jpg", "Is there a dog?", reply == "yes") for id, reply in replies.items()]
    run = Run(tmp_path / "run", AnswersFile(tmp_path / "replies.json"))
    eval_pope(run, questions, None)
    AnswerCache(run.folder / "cache.jsonl").put("key", Answer("yes"))
    probe = tmp_path / "run/probe.json"
    MMVPVLMResult("encoder", [PairResult("Text", (1, 2), ("a", "b"), 0.9, ((0.2, 0.1), (0.1, 0.2)))]).to_json(probe)
    assert_found(run.folder, [run.folder / name for name in ("settings.json", "answers.jsonl", "result.json", "cache.jsonl", "probe.json")])
    for place, file in ((run.folder, "answers.jsonl"), (run.folder, "result.json"), (probe, "probe.json")):
        sound = flip(run.folder / file)
        with pytest.raises(DamagedError, match=rf"{file}(, line \d: .*)? is damaged.*again writes it anew"):
            read_outcome(place)
        (run.folder / file).write_bytes(sound)
        assert read_outcome(place).figures
    (run.folder / "answers.jsonl").write_bytes(b"".join((run.folder / "answers.jsonl").read_bytes().splitlines(True)[:2]))
    with pytest.raises(DamagedError, match=r"answers\.jsonl is damaged"):  # though each line is sound
        read_outcome(run.folder)


@pytest.fixture
def stores(tmp_path: Path, tiny_encoders: dict[str, Encoder]) -> Path:
    for i in range(3):
        pixels = np.random.default_rng(i).integers(0, 256, (40, 40, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{i}.png")
    for name, blurred in (("plain", False), ("blurred", True)):
        for images in ([tmp_path / "0.png", tmp_path / "1.png"], tmp_path):
            encode_images(images, tiny_encoders, tmp_path / "stores" / name, tokens="int8", view=View(48, "pad", (1, 2, 3), blurred))
    return tmp_path / "stores"


def test_stores(stores: Path) -> None:
    files = [path for path in stores.glob("plain/**/*") if path.suffix in (".json", ".parquet", ".safetensors", ".npy")]
    assert len(files) == 1 + 3 + 4 + 2
    assert_found(stores, files)


def test_a_store_that_a_killed_run_has_begun_is_sound(stores: Path) -> None:
    plain = stores / "plain"
    manifest = {name: value for name, value in read_sealed(plain / "manifest.json").items() if name not in ("files", "shards")}
    write_sealed(plain / "manifest.json", manifest)
    for path in [*plain.glob("*.parquet"), *plain.glob("*.npy")]:
        path.unlink()
    assert verify(stores) == (0, [])


def test_swapped_shards(stores: Path) -> None:
    (shard,) = stores.glob("plain/a-*/features-00000.safetensors")
    shutil.copy(stores / "blurred" / shard.relative_to(stores / "plain"), shard)
    code, lines = verify(stores)
    assert code == 1 and len(lines) == 1 and str(shard) in lines[0]


def test_what_is_no_folder_is_refused(tmp_path: Path) -> None:
    result = mof("verify", tmp_path / "nowhere")
    assert result.exit_code == 2 and "nowhere is no folder" in result.output


def test_files_that_end_in_nothing_or_in_depth_are_named_and_those_of_others_are_not(tmp_path: Path) -> None:
    (tmp_path / "site").mkdir()
    (tmp_path / "site/manifest.json").write_text("[1]")  # of a web page
    assert verify(tmp_path) == (0, [])
    (tmp_path / "empty.json").touch()
    (tmp_path / "deep.json").write_text("[" * 100_000)
    code, lines = verify(tmp_path)
    assert code == 1 and [Path(line.split()[0]).name for line in lines] == ["deep.json", "empty.json"]
