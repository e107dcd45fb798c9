"""Files that a user names may be anything: pipes, JSON without end, photos. Each is refused in a line that names it."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from support.commands import mof

from encoders import Encoder, encode_images
from encoders.digests import DamagedError
from encoders.saved_folders import loading, require_config
from encoders.weight_files import WeightsError, explain_download, refuse_misfit
from encoders.whole_files import unfinished_folder
from mof.cli.convert import RECORD, _refuse_foreign
from mof.evals.answerers import AnswersFile
from mof.evals.benchmark_folders import DescribedPair, write_mmvp, write_mmvp_vlm
from mof.evals.chair import CocoWords, photos, read_coco, read_objects
from mof.evals.mmvp import read_mmvp
from mof.evals.mmvp_vlm import read_mmvp_vlm as read_pairs
from mof.evals.outcomes import read_outcome
from mof.evals.pope import read_pope
from mof.evals.question_files import read_patterns
from mof.llava.parts import read_config
from mof.pairs.annotation.annotated_pairs import _read_ticked

READERS: dict[str, tuple[str, Callable[[Path], Any]]] = {
    "answers": ("a.json", AnswersFile),
    "lines of answers": ("a.jsonl", AnswersFile),
    "table of answers": ("a.csv", AnswersFile),
    "patterns": ("a.json", read_patterns),
    "POPE": ("coco_pope_random.json", lambda file: read_pope(file.parent)),
    "COCO": ("a.json", lambda file: read_coco(file, "caption")),
    "synonyms": ("a.txt", CocoWords),
    "result": ("result.json", read_outcome),
    "ticked pairs": ("a.json", _read_ticked),
    "model": ("config.json", lambda file: require_config(file.parent)),
    "checkpoint": ("config.json", lambda file: read_config(file.parent)),
}


@pytest.mark.parametrize("content", [b"", b"[" * 100_000, b"[1]", b"\xff\xd8\xff\xe0 a photo", b"{", None], ids=str)
@pytest.mark.parametrize("kind", READERS)
def test_no_file_hangs_or_ends_in_another_error(kind: str, content: bytes | None, tmp_path: Path) -> None:
    name, read = READERS[kind]
    if content is None:
        os.mkfifo(tmp_path / name)
    else:
        (tmp_path / name).write_bytes(content)
    if kind == "synonyms" and content not in (b"", b"\xff\xd8\xff\xe0 a photo", None):
        read(tmp_path / name)  # any text is a list of words
        return
    with pytest.raises(ValueError, match=rf"{name}|{tmp_path}"):
        read(tmp_path / name)


@pytest.mark.parametrize(
    "change",
    [
        {"categories": [{"name": "dog"}]},
        {"categories": [{"id": 1, "name": None}]},
        {"images": [3]},
        {"annotations": ["category_id image_id"]},
        {"annotations": [{"image_id": [1], "category_id": 1}]},
        {"annotations": [{"image_id": 1, "category_id": [1]}]},
    ],
)
def test_a_file_that_is_almost_cocos_is_named(change: dict[str, Any], tmp_path: Path) -> None:
    sound = {"annotations": [{"image_id": 1, "category_id": 1}], "categories": [{"id": 1, "name": "dog"}], "images": [{"id": 1}]}
    (tmp_path / "words.txt").write_text("dog, puppy\n")
    (tmp_path / "instances.json").write_text(json.dumps(sound))
    assert read_objects(CocoWords(tmp_path / "words.txt"), [tmp_path / "instances.json"], []) == {"1": {"dog"}}
    with pytest.raises(ValueError, match=r"instances\.json: expected a file_name"):
        photos([tmp_path / "instances.json"], tmp_path, None)
    (tmp_path / "instances.json").write_text(json.dumps(sound | change))
    with pytest.raises(ValueError, match=r"instances\.json"):
        read_objects(CocoWords(tmp_path / "words.txt"), [tmp_path / "instances.json"], [])


@pytest.mark.parametrize("change", [{"question_id": []}, {"image": None}, {"text": 7}, {"label": ["yes"]}])
def test_a_question_of_other_types_is_named(change: dict[str, Any], tmp_path: Path) -> None:
    question = {"question_id": 1, "image": "a.jpg", "text": "Is a dog there?", "label": "yes"}
    (tmp_path / "coco_pope_random.json").write_text(json.dumps(question | change))
    with pytest.raises(ValueError, match=r"coco_pope_random\.json, line 1: expected"):
        read_pope(tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", '{"1": "(a)", "2": "(b)", "1": "(b)"}', "two values of '1'"),
        ("a.csv", "id,response\n1,Yes, it is\n2,No\n", "row 1 has more cells than the 2 columns"),
        ("a.csv", "id,response,response\n1,Yes,No\n", "two columns have the same name"),
        ("a.csv", "id,response\n", "holds no answers"),
    ],
)
def test_no_answer_is_cut_or_replaced_in_silence(name: str, content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=f"{name}.*{message}"):
        AnswersFile(tmp_path / name)


@pytest.mark.parametrize("content", ["", "{}", "[1]", '{"files": 3}'])
def test_a_damaged_note_of_an_earlier_conversion_is_named(content: str, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / RECORD).write_text(content)
    with pytest.raises(ValueError, match=rf"{RECORD} is damaged"):
        _refuse_foreign(tmp_path / "source", tmp_path / "out", True)


def test_empty_columns_of_a_spreadsheet_are_no_answers(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("id,response,,\n1,Yes,,\n2,No,,,\n")
    assert AnswersFile(tmp_path / "a.csv").answers == {"1": "Yes", "2": "No"}


def test_errors_of_transformers_name_the_folder_and_are_short(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=rf"^{tmp_path} cannot be loaded .*\.\.\.$") as error, loading(tmp_path):
        raise ValueError("Model type should be one of\n" + "ThisConfig, " * 1000)
    assert len(str(error.value)) < 500 and "\n" not in str(error.value)
    with pytest.raises(WeightsError, match="give a local file"), loading(tmp_path), explain_download("weights of x"):
        raise OSError("the hub does not answer " * 100)  # the advice at its end stays


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("encode", "--images", "x", "--encoder", "mini-clip", "-o", ""), "expected a path, got an empty text"),
        (("probe", "layers", "--data", "x", "--encoder", "mini-clip", "--plot", "x.doc"), "expected a name that ends in .png"),
        (("verify", "."), "holds no files"),
    ],
)
def test_mistakes_are_told_before_any_work(arguments: tuple[str, ...], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = mof(*arguments)
    assert result.exit_code == 2 and words in result.output and not list(tmp_path.iterdir())


def test_damage_to_a_benchmark_that_we_wrote_is_named(tmp_path: Path) -> None:
    pair = DescribedPair(
        "State",
        (Image.new("RGB", (20, 20), "red"), Image.new("RGB", (20, 20), "blue")),
        ("open wings", "closed wings"), "Open or closed?", ("Open", "Closed"), ("a", "b"),
    )  # fmt: skip
    write_mmvp(tmp_path / "MMVP", [pair])
    write_mmvp_vlm(tmp_path / "VLM", [pair])
    for folder, read, names in ((tmp_path / "MMVP", read_mmvp, ("Questions.csv", "1.jpg")), (tmp_path / "VLM", read_pairs, ("2.jpg",))):
        read(folder)
        for name in names:
            [file] = folder.rglob(name)
            sound = file.read_bytes()
            file.write_bytes(sound[:-3] + bytes([sound[-3] ^ 1]) + sound[-2:])
            with pytest.raises(DamagedError, match=name):
                read(folder)
            file.write_bytes(sound)
        (folder / "digests.json").unlink()  # as in folders of others
        read(folder)


def test_an_error_without_a_text_is_named(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="cannot be loaded: MemoryError$"), refuse_misfit(tmp_path):
        raise MemoryError


def test_a_folder_of_something_else_gets_no_features(tmp_path: Path, tiny_encoders: dict[str, Encoder]) -> None:
    Image.new("RGB", (40, 30), "red").save(tmp_path / "a.png")
    (tmp_path / "new").mkdir()
    for name in (".DS_Store", "_lock-0000", ".tmp-1a2b3c4d-1-00-manifest.json"):  # of a desktop, and of a run that was killed early
        (tmp_path / "new" / name).touch()
    assert encode_images(tmp_path / "a.png", tiny_encoders, tmp_path / "new").encoded == 1
    shutil.rmtree(tmp_path / "new")
    with pytest.raises(ValueError, match=r"holds a\.png and no feature store; give a new folder"):
        encode_images(tmp_path / "a.png", tiny_encoders, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]


def test_the_unfinished_folder_of_a_killed_process_is_deleted_and_that_of_a_living_one_is_not(tmp_path: Path) -> None:
    with unfinished_folder(tmp_path / "out") as living:
        (living / "model.safetensors").touch()
        number = living.name.split("-")[2]
        dead = living.with_name(living.name.replace(f"-{number}-", "-999999999-"))
        dead.mkdir()
        with unfinished_folder(tmp_path / "out"):
            assert living.is_dir() and not dead.exists()
    assert not list(tmp_path.iterdir())


def test_a_model_without_its_digests_is_told(tmp_path: Path, tiny_model: Any, caplog: pytest.LogCaptureFixture) -> None:
    tiny_model.save_pretrained(tmp_path)
    type(tiny_model).from_pretrained(tmp_path)
    assert "digests.json" not in caplog.text
    (tmp_path / "digests.json").unlink()
    type(tiny_model).from_pretrained(tmp_path)
    assert f"{tmp_path / 'digests.json'} is missing" in caplog.text
