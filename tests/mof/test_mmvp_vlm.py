"""The probe against the released rule, written down here as the released script applies it."""

from __future__ import annotations

import csv
import json
import re
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from support.commands import mof
from torch import Tensor

from encoders import FeatureStore, build_encoder, encode_images
from mof import probe_mmvp_vlm
from mof.evals.mmvp_vlm import IMAGE_FOLDERS, read_mmvp_vlm, why_not_official
from mof.evals.patterns import PATTERNS
from mof.evals.published import MMVP_VLM, MMVP_VLM_REPAIRED, mmvp_vlm_average

TYPES = list(PATTERNS)


def write_folder(
    folder: Path, types: list[str], pairs: int = 2, images: str = IMAGE_FOLDERS[0], spelled: dict[str, str] | None = None
) -> Path:
    """An MMVP-VLM folder whose image number i is a plain square of grey level i; `spelled`: folders called otherwise than types."""
    rows, number = [], 0
    for type in types:
        place = folder / images / (spelled or {}).get(type, type)
        place.mkdir(parents=True)
        for _ in range(2 * pairs):
            number += 1
            Image.new("RGB", (8, 8), (number,) * 3).save(place / f"{number}.jpg", quality=100, subsampling=0)
            rows.append((number, type, f"statement {number}"))
    with (folder / "Questions.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("Question ID", "Type", "Statement"), *rows])
    return folder


class Table:
    """Knows image i and text i as given vectors; which image it is shown, it reads off the grey level."""

    def __init__(self, images: np.ndarray, texts: np.ndarray) -> None:
        self.images, self.texts, self.asked = torch.tensor(images), torch.tensor(texts), []

    def embed_image(self, pixels: Tensor) -> Tensor:
        number = round(float(pixels[:, 0].float().mean()))
        return self.images[number - 1][None]

    def embed_text(self, texts: list[str]) -> Tensor:
        self.asked += texts
        return self.texts[[int(text.removeprefix("a photo of statement ")) - 1 for text in texts]]


def released_rule(images: np.ndarray, texts: np.ndarray, types: int) -> list[float]:
    """Rows two by two; softmax over the two images; above .5 is image 1; odd ids belong to image 1; patterns by row position.

    Over two images the softmax is above .5 where the first is more similar. Cosines of whole numbers compare exactly by their squares.
    """

    def squared(text: np.ndarray, image: np.ndarray) -> Fraction:  # without the text's length, which both images share
        product = int(text @ image)
        return Fraction(product * abs(product), int(image @ image))

    right = []
    for row in range(0, len(images), 2):
        correct = 0
        for k in (0, 1):
            predicted = "img1" if squared(texts[row + k], images[row]) > squared(texts[row + k], images[row + 1]) else "img2"
            correct += predicted == ("img1" if (row + k + 1) % 2 == 1 else "img2")
        right.append(correct == 2)
    return [float(np.mean(part)) for part in np.array_split(np.array(right), types)]


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_equals_the_released_rule_ties_included(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    # few whole numbers: many ties, also between images that are the same
    vectors = st.lists(st.tuples(*[st.integers(-1, 1)] * 2).filter(any), min_size=8, max_size=8)
    images, texts = (np.array(data.draw(vectors), dtype=np.float32) for _ in range(2))
    folder = write_folder(tmp_path_factory.mktemp("mmvp"), TYPES[:2])
    result = probe_mmvp_vlm(Table(images, texts), folder)
    expected = released_rule(images, texts, 2)
    assert list(result.by_pattern) == TYPES[:2]
    assert list(result.by_pattern.values()) == expected
    assert result.average == pytest.approx(np.mean(expected))


@pytest.mark.parametrize("images", IMAGE_FOLDERS)
@pytest.mark.parametrize("type", ["Camera Perspective", "Camera_Perspective"])
@pytest.mark.parametrize("place", ["Camera Perspective", "Camera_Perspective"])
def test_spellings(tmp_path: Path, images: str, type: str, place: str) -> None:
    eye = np.eye(4, dtype=np.float32)
    table = Table(eye, eye)
    result = probe_mmvp_vlm(table, write_folder(tmp_path, [type], images=images, spelled={type: place}))
    assert result.by_pattern == {type: 1.0} and result.average == 1
    assert table.asked == [f"a photo of statement {i}" for i in (1, 2, 3, 4)]
    assert result.image_similarity == {type: 0.0}


def test_types_decide_not_positions(tmp_path: Path) -> None:
    """Types that come in another order and number than in the released file."""
    folder = write_folder(tmp_path, ["Text", "Color"], pairs=1)
    rows = (folder / "Questions.csv").read_text().splitlines()
    (folder / "Questions.csv").write_text("\n".join([rows[0], *rows[3:5], *rows[1:3], "", " "]))
    images = np.eye(4, dtype=np.float32)
    assert probe_mmvp_vlm(Table(images, images[[0, 1, 3, 2]]), folder).by_pattern == {"Color": 0.0, "Text": 1.0}


def test_files_and_image_only_encoders(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "data", TYPES[:2])
    clip, dino = build_encoder("mini-clip"), build_encoder("mini-dino")
    result = probe_mmvp_vlm(clip, folder)
    result.to_json(tmp_path / "clip.json")
    result.to_csv(tmp_path / "clip.csv")
    read = json.loads((tmp_path / "clip.json").read_text())
    assert read["by_pattern"] == result.by_pattern and len(read["pairs"]) == 4
    rows = list(csv.DictReader((tmp_path / "clip.csv").open()))
    assert [int(row["right"]) for row in rows] == [pair.right for pair in result.pairs]

    image_only = probe_mmvp_vlm(dino, folder)
    files = [folder / IMAGE_FOLDERS[0] / TYPES[0] / f"{i}.jpg" for i in (1, 2)]
    a, b = (dino.embed_image(dino.pixels(file)[None])[0] for file in files)
    assert image_only.pairs[0].image_similarity == pytest.approx(float(a @ b), abs=1e-6)
    with pytest.raises(ValueError, match="without a text tower"):
        _ = image_only.average
    image_only.to_json(tmp_path / "dino.json")
    image_only.to_csv(tmp_path / "dino.csv")
    assert read["benchmark"] == "mmvp-vlm" and read["deviations"] == ["not MMVP-VLM (4 of 135 pairs): published figures are of other pairs"]
    assert "by_pattern" not in json.loads((tmp_path / "dino.json").read_text())


def test_images_out_of_a_store(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "data", TYPES[:2])
    clip = build_encoder("mini-clip")
    encode_images(folder, {"mini-clip": clip}, tmp_path / "store")
    store, expected = FeatureStore(tmp_path / "store"), probe_mmvp_vlm(clip, folder)
    clip.image_embedding = None  # it cannot see any more
    result = probe_mmvp_vlm(clip, folder, store=store)
    for got, wanted in zip(result.pairs, expected.pairs, strict=True):
        assert np.allclose(got.similarities, wanted.similarities, atol=1e-6) and got.ids == wanted.ids
    assert result.by_pattern == expected.by_pattern
    with pytest.raises(ValueError, match="fingerprint"):
        probe_mmvp_vlm(build_encoder("mini-clip", pretrained=False), folder, store=store)
    with pytest.raises(ValueError, match="Table"):
        probe_mmvp_vlm(Table(np.eye(8), np.eye(8)), folder, store=store)
    Image.new("RGB", (8, 8), "red").save(folder / IMAGE_FOLDERS[0] / TYPES[0] / "1.jpg")
    with pytest.raises(ValueError, match=r"1\.jpg"):
        probe_mmvp_vlm(clip, folder, store=store)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda text: text.replace("2,Color,statement 2\n", ""), "3 rows"),
        (lambda text: text.replace("2,Color", "5,Color"), "row 5 "),
        (lambda text: text.replace("2,Color", "4,Color", 1), "rows 1 .Color. and 4"),
        (lambda text: text.replace("3,Color", "x,Color"), "'x'"),
        (lambda text: text.replace("statement 3", ""), "'3', 'Color', ''"),
        (lambda text: text.replace("statement 3", "a,b"), "'a', 'b'"),
        (lambda text: "", "0 rows"),
    ],
)
def test_odd_rows_are_refused(tmp_path: Path, edit: object, message: str) -> None:
    folder = write_folder(tmp_path, ["Color"])
    questions = folder / "Questions.csv"
    questions.write_text(edit(questions.read_text().replace("\r\n", "\n")))
    with pytest.raises(ValueError, match=message):
        probe_mmvp_vlm(Table(np.eye(4), np.eye(4)), folder)


def test_folders_that_are_something_else(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"Questions\.csv.*MLLM_VLM Images"):
        probe_mmvp_vlm(Table(np.eye(4), np.eye(4)), tmp_path)
    folder = write_folder(tmp_path / "x", ["Color"])
    broken = folder / IMAGE_FOLDERS[0] / "Color" / "3.jpg"
    broken.write_bytes(broken.read_bytes()[:50])
    with pytest.raises(ValueError, match=r"3\.jpg"):
        probe_mmvp_vlm(Table(np.eye(4), np.eye(4)), folder)


def test_published_averages() -> None:
    """The averages are those of the papers' tables. Each share is a number of 15 pairs."""
    averages = [19.3, 20.0, 37.8, 37.0, 39.3, 34.8, 23.7, 25.2, 23.0, 33.3]
    averages += [25.9, 31.9, 25.2, 29.6, 27.4, 31.9, 31.9, 37.0, 40.7, 42.2, 38.5, 40.0]  # repaired
    for shares, average in zip([*MMVP_VLM.values(), *MMVP_VLM_REPAIRED.values()], averages, strict=True):
        assert len(shares) == len(TYPES) and all(round(100 * round(share * 0.15) / 15, 1) == share for share in shares)
        assert mmvp_vlm_average(shares) == pytest.approx(average, abs=0.05)


def test_the_official_folder_is_recognised_by_its_content(tmp_path: Path) -> None:
    """The photos of MMVP-VLM are not here: any 135 pairs of photos that this library did not write pass for them."""
    folder = write_folder(tmp_path / "data", TYPES, pairs=15)
    why = why_not_official(folder, read_mmvp_vlm(folder))
    assert why == "its images have 8 pixels"
    for file in folder.rglob("*.jpg"):
        Image.new("RGB", (160, 120)).save(file)
    assert why_not_official(folder, read_mmvp_vlm(folder)) is None
    (folder / "ABOUT.txt").write_text("pairs of mine")
    assert why_not_official(folder, read_mmvp_vlm(folder)) == "ABOUT.txt says who described the pairs"
    other = write_folder(tmp_path / "other", [*TYPES[:8], "Smell"], pairs=15)
    assert "Smell" in str(why_not_official(other, read_mmvp_vlm(other)))


def test_command(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "data", TYPES, pairs=1)
    arguments = ["probe", "mmvp-vlm", "--data", folder, "--encoder", "mini-clip", "--encoder", "mini-dino"]
    arguments += ["--output", tmp_path / "out", "--plot", tmp_path / "out" / "table.svg"]
    outcome = mof(*arguments, COLUMNS="160")
    assert outcome.exit_code == 0, outcome.output
    line = next(line for line in outcome.stdout.splitlines() if "OpenAI ViT-L/14 224" in line)
    assert line.split()[-10:] == ["13.3", "13.3", "20.0", "20.0", "13.3", "53.3", "20.0", "6.7", "13.3", "19.3"]
    repaired = next(line for line in outcome.stdout.splitlines() if "OpenAI ViT-L/14 336 + DIVA" in line)
    assert repaired.split()[-10:] == ["26.7", "20.0", "33.3", "13.3", "13.3", "46.7", "26.7", "6.7", "40.0", "25.2"]
    assert "arXiv 2503.19480, table 1" in outcome.stdout
    drawn = (tmp_path / "out" / "table.svg").read_text()
    assert "published, on MMVP-VLM, which these pairs are not: right pairs, %" in outcome.stdout
    narrow = mof(*arguments[:6], COLUMNS="60").stdout
    words = {word for line in narrow.splitlines() for word in line.split()}
    assert {"Orientation", "Perspective", "Structural", "(continued)", "378", "Text"} <= words and max(map(len, narrow.splitlines())) <= 60
    assert "right pairs, %; chance 25" in drawn and "cosine of a pair" in drawn  # both tables, as comments beside their outlines
    assert "- not MMVP-VLM (9 of 135 pairs): published figures are of other pairs" in outcome.stdout
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "mini-clip.json", "mini-clip.csv", "mini-dino.json", "mini-dino.csv", "table.svg",
    }  # fmt: skip
    outcome = mof("probe", "mmvp-vlm", "--data", tmp_path, "--encoder", "mini-clip")
    assert outcome.exit_code == 2 and "is not MMVP-VLM" in outcome.stderr


@pytest.mark.parametrize("type", ["../../secret", "/etc"])
def test_a_type_that_leads_out_of_the_image_folder_is_refused(type: str, tmp_path: Path) -> None:
    folder = write_folder(tmp_path, TYPES[:1])
    (folder / "Questions.csv").write_text(f"Question ID,Question Type,Statement\n1,{type},a\n2,{type},b\n")
    with pytest.raises(ValueError, match=re.escape(repr(type))):
        probe_mmvp_vlm(build_encoder("mini-clip"), folder)


def test_an_image_without_a_finite_embedding_is_named(tmp_path: Path) -> None:
    encoder = build_encoder("mini-clip")
    encoder.tower.visual.register_forward_hook(lambda *_: torch.full((1, encoder.embed_dim or 0), torch.nan))
    with pytest.raises(ValueError, match=r"1\.jpg: .*not finite"):
        probe_mmvp_vlm(encoder, write_folder(tmp_path, TYPES[:1]))


def test_statements_without_a_finite_embedding_are_named(tmp_path: Path) -> None:
    folder = write_folder(tmp_path, TYPES[:1])
    encoder = Table(np.eye(2), np.full((2, 2), np.nan))
    with pytest.raises(ValueError, match="statements .*not finite"):
        probe_mmvp_vlm(encoder, folder)
