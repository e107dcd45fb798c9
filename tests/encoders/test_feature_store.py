"""The feature store against the encoders run by hand on files opened with Pillow; killed, cut, doubled and changed."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import pickle
import re
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors import safe_open
from support.launch import held_lock
from support.tiny_towers import blocks_of, hooks_of
from torch import Tensor, nn

from encoders import Encoder, FeatureStore, ImageError, View, build_encoder, encode_images
from encoders.images.opening import read_file
from encoders.images.reading import blur
from encoders.images.resizing import to_pixels
from encoders.store import feature_store, new_images
from encoders.store.files import pack, unpack
from encoders.store.fingerprints import fingerprint, weights_digest
from encoders.whole_files import read_sealed, write_sealed


def photo(path: Path, seed: int, size: tuple[int, int] = (60, 45)) -> Path:
    """A smooth random picture, so that resizing is not all there is to see."""
    pixels = np.random.default_rng(seed).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC).save(path)
    return path


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    for i in range(12):
        photo(tmp_path / f"photos/{i:02d}.png", i, (60 + i, 45))
    return tmp_path / "photos"


@pytest.fixture
def encoders(tiny_encoders: dict[str, Encoder]) -> dict[str, Encoder]:
    return tiny_encoders


def reference(encoder: Encoder, path: str | Path, batch: int = 1) -> tuple[Tensor, Tensor]:
    """Embedding [E] and tokens [T, D] of a file: opened with Pillow, its central square resized, the encoder called."""
    with Image.open(path) as image:
        pixels = to_pixels(image.convert("RGB"), encoder.image_size, "crop")[None]
    with torch.no_grad():
        return encoder.embed_image(pixels)[0], encoder(pixels).tokens[0]


def assert_true(store: FeatureStore, encoders: dict[str, Encoder], tolerance: float = 1e-6) -> None:
    """Every row is what the encoder makes of the file that is named there."""
    for name, encoder in encoders.items():
        embeddings, tokens = store.embeddings(name), store.tokens(name, slice(None))
        assert embeddings.dtype == np.float32 and len(embeddings) == len(tokens) == len(store) == len(store.names)
        for row, path in enumerate(store.names):
            embedding, patches = reference(encoder, path)
            np.testing.assert_allclose(embeddings[row], embedding, atol=tolerance)
            torch.testing.assert_close(tokens[row].float(), patches, atol=2e-2, rtol=2e-2)
            assert store.keys[row] == hashlib.sha256(Path(path).read_bytes()).hexdigest()[:32]


# --- what is stored ---


@pytest.mark.slow
@pytest.mark.parametrize("tokens", ["float16", "bfloat16", "int8"])
def test_features_are_the_encoders(photos: Path, encoders: dict[str, Encoder], tokens: str, tmp_path: Path) -> None:
    report = encode_images(photos, encoders, tmp_path / "store", tokens=tokens, batch_size=5)
    store = FeatureStore(tmp_path / "store")
    assert (report.images, report.encoded, report.duplicates, report.unreadable) == (12, 12, 0, 0)
    assert store.names == [str(path) for path in sorted(photos.iterdir())]
    assert store.encoders == ["a", "b"] and store.grid("b") == encoders["b"].grid
    assert store.tokens("a", [0]).dtype == {"int8": torch.float32}.get(tokens, getattr(torch, tokens))
    assert_true(store, encoders)


@pytest.mark.data
def test_shipped_encoders_on_real_photos(shared_data: Path, tmp_path: Path) -> None:
    encoders = {name: build_encoder(name) for name in ("mini-clip", "mini-dino")}
    encode_images(shared_data / "photos", encoders, tmp_path / "store", tokens="float16")
    assert_true(FeatureStore(tmp_path / "store"), encoders)


def test_layout_is_open_to_others(photos: Path, encoders: dict[str, Encoder], tmp_path: Path) -> None:
    encode_images(photos, encoders, tmp_path / "store", tokens="int8", batch_size=12)
    index = pq.read_table(tmp_path / "store/images-00000.parquet").to_pylist()
    assert [(row["name"], row["width"], row["height"]) for row in index][3] == (str(photos / "03.png"), 63, 45)
    manifest = json.loads((tmp_path / "store/manifest.json").read_text())["encoders"]
    assert list(manifest) == ["a", "b"]
    assert manifest["a"]["tokens"] == "int8" and manifest["a"]["fingerprint"] == fingerprint(encoders["a"])
    (file,) = (tmp_path / "store" / manifest["a"]["folder"]).iterdir()
    with safe_open(file, "pt") as shard:
        shapes = {name: (shard.get_slice(name).get_dtype(), shard.get_slice(name).get_shape()) for name in shard.keys()}  # noqa: SIM118
        assert shard.metadata()["encoder"] == "a"
    assert shapes == {
        "keys": ("U8", [12, 16]),
        "embeddings": ("F32", [12, 16]),
        "tokens": ("I8", [12, 16, 16]),
        "scales": ("F32", [12, 16]),
    }


def test_one_view_serves_all_encoders(photos: Path, encoders: dict[str, Encoder], tmp_path: Path) -> None:
    for blurred in (False, True):
        view = View(48, "pad", (122, 116, 104), blurred)
        encode_images(photos, encoders, tmp_path / f"store-{blurred}", tokens="float16", view=view)
        store = FeatureStore(tmp_path / f"store-{blurred}")
        for row, name in enumerate(store.names):
            image = Image.open(name).convert("RGB")
            pixels = to_pixels(blur(image) if blurred else image, 48, "pad", (122, 116, 104))[None]
            for key, encoder in encoders.items():
                torch.testing.assert_close(store.tokens(key, [row]).float(), encoder(pixels).tokens, atol=2e-2, rtol=1e-2)
        store.check("a", encoders["a"], view)
        for another in (None, View(48, "pad", (122, 116, 104), not blurred), View(40, "pad", (122, 116, 104), blurred)):
            with pytest.raises(ValueError, match="view"):
                store.check("a", encoders["a"], another)


def test_pooled_only_and_tokens_only(photos: Path, encoders: dict[str, Encoder], tmp_path: Path) -> None:
    encode_images(photos, encoders, tmp_path / "pooled")
    encode_images(photos, encoders, tmp_path / "tokens", embeddings=False, tokens="float16")
    with pytest.raises(ValueError, match="pooled.* a;.*--tokens"):
        FeatureStore(tmp_path / "pooled").tokens("a", [0])
    with pytest.raises(ValueError, match="tokens.* a,"):
        FeatureStore(tmp_path / "tokens").embeddings("a")


def test_reduced_precision_leaves_the_encoder_alone(photos: Path, encoders: dict[str, Encoder], tmp_path: Path) -> None:
    before = {key: value.clone() for key, value in encoders["a"].state_dict().items()}
    encode_images(photos, encoders, tmp_path / "store", dtype=torch.bfloat16)
    assert all(torch.equal(value, before[key]) for key, value in encoders["a"].state_dict().items())
    store = FeatureStore(tmp_path / "store")
    assert store.manifest["a"]["dtype"] == "bfloat16"
    close = [reference(encoders["a"], name)[0].numpy() for name in store.names]
    np.testing.assert_allclose(store.embeddings("a"), close, atol=2e-2)
    assert not np.allclose(store.embeddings("a"), close, atol=1e-6)
    store.check("a", encoders["a"])


def test_encoder_in_training_is_put_into_eval_mode_for_it(photos: Path, tmp_path: Path) -> None:
    encoder = build_encoder("tiny-a", trainable=True).train()
    encode_images(photos, {"a": encoder}, tmp_path / "store")
    assert encoder.training and encoder.tower[2].training
    assert_rows = [reference(build_encoder("tiny-a"), path)[0].numpy() for path in sorted(photos.iterdir())]
    np.testing.assert_allclose(FeatureStore(tmp_path / "store").embeddings("a"), assert_rows, atol=1e-6)


def test_both_features_come_from_one_pass_even_in_threads(build: Callable[..., Encoder]) -> None:
    """The very values of two passes, whatever other threads do with the same tower at the same time."""
    for options in ({}, {"norm": True}, {"layer": [-2, 0, 1]}):
        encoder = build(**options)
        before = hooks_of(encoder)
        batches = [torch.randint(0, 256, (3, 3, encoder.image_size, encoder.image_size), dtype=torch.uint8) for _ in range(6)]
        with torch.no_grad():
            expected = [(encoder.embed_image(batch), encoder(batch).tokens) for batch in batches]
        with ThreadPoolExecutor(3) as pool:
            both = list(pool.map(torch.inference_mode()(encoder.embed_with_tokens), batches))
            alone = list(pool.map(torch.inference_mode()(encoder), batches))
        for (embedding, tokens), together, features in zip(expected, both, alone, strict=True):
            assert torch.equal(together[0], embedding) and torch.equal(together[1].tokens, tokens)
            assert torch.equal(features.tokens, tokens)
        assert hooks_of(encoder) == before


def test_one_pass_runs_each_block_once(build: Callable[..., Encoder]) -> None:
    encoder, ran = build(), []
    for block in blocks_of(encoder):
        block.register_forward_pre_hook(lambda block, _: ran.append(block))
    encoder.embed_with_tokens(torch.zeros(1, 3, 28, 28, dtype=torch.uint8))
    assert ran == list(blocks_of(encoder))


# --- int8 ---


@given(seed=st.integers(0, 2**32 - 1), width=st.integers(1, 64), magnitude=st.floats(1e-6, 1e6))
@settings(max_examples=60, deadline=None)
def test_int8_keeps_its_bound(seed: int, width: int, magnitude: float) -> None:
    """No value moves by more than half a step of absmax / 127; so |error| <= sqrt(D) / 254 * absmax <= sqrt(D) / 254 * |token|."""
    tokens = torch.randn(2, 5, width, generator=torch.Generator().manual_seed(seed)) * magnitude
    tokens[0, 0] = 0
    packed = pack(tokens, "int8")
    back = unpack(packed["tokens"], packed["scales"])
    largest = tokens.abs().amax(-1, keepdim=True)
    assert ((back - tokens).abs() <= largest / 254 * (1 + 1e-4)).all()
    measured = (back - tokens).double().norm(dim=-1) / tokens.double().norm(dim=-1).clamp_min(1e-30)
    torch.testing.assert_close(packed["errors"].double(), measured, atol=1e-6, rtol=1e-3)
    assert packed["errors"].max() <= width**0.5 / 254 * (1 + 1e-4)
    assert packed["tokens"].abs().amax(-1).flatten()[1:].eq(127).all(), "the largest value of a token uses the whole range"


def test_int8_error_is_that_of_the_tokens_on_disk(photos: Path, encoders: dict[str, Encoder], tmp_path: Path) -> None:
    report = encode_images(photos, encoders, tmp_path / "store", tokens="int8", batch_size=5)
    store = FeatureStore(tmp_path / "store")
    for name, encoder in encoders.items():
        true = torch.stack([reference(encoder, path)[1] for path in store.names])
        errors = (store.tokens(name, slice(None)) - true).norm(dim=-1) / true.norm(dim=-1)
        expected = {"mean": float(errors.mean()), "max": float(errors.max())}
        assert report.int8_error[name] == store.manifest[name]["int8_error"] == pytest.approx(expected, rel=1e-3)
        assert f"int8 error of {name} {expected['mean']:.2%}" in report.summary()


def test_features_that_are_not_finite_are_refused(photos: Path, encoders: dict[str, Encoder], tmp_path: Path) -> None:
    with torch.no_grad():
        encoders["a"].tower[0].bias += 1e5
    report = encode_images(photos, encoders, tmp_path / "store", tokens="float16")
    assert (report.images, report.encoded, report.unreadable) == (0, 0, 12)
    failures = [json.loads(line) for line in (tmp_path / "store/failures.jsonl").read_text().splitlines()]
    assert all(re.search("a gives features.*65504.*bfloat16", failure["reason"]) for failure in failures)
    with pytest.raises(ImageError, match=r"\.png: a gives features"):
        encode_images(photos, encoders, tmp_path / "store", tokens="float16", strict=True)


def test_an_error_on_the_way_to_pixels_costs_that_image_alone(
    photos: Path, encoders: dict[str, Encoder], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = Encoder.pixels
    odd = Image.open(photos / "04.png").size
    monkeypatch.setattr(Encoder, "pixels", lambda self, image: 1 / 0 if image.size == odd else original(self, image))
    report = encode_images(photos, encoders, tmp_path / "store")
    (failure,) = [json.loads(line) for line in (tmp_path / "store/failures.jsonl").read_text().splitlines()]
    assert report.images == 11 and failure["name"] == str(photos / "04.png") and "ZeroDivisionError" in failure["reason"]


def test_an_image_without_finite_features_costs_itself_alone(photos: Path, encoders: dict[str, Encoder], tmp_path: Path) -> None:
    Image.new("RGB", (20, 20), "white").save(photos / "04.png")
    (photos / "99 copy.png").write_bytes((photos / "04.png").read_bytes())

    def overflow_on_white(module: nn.Module, inputs: tuple[Tensor]) -> Tensor:
        (x,) = inputs
        return torch.where((x == x.amax()).flatten(1).all(1)[:, None, None, None], torch.nan, x)  # [B, 3, S, S]

    hook = encoders["a"].tower[0].register_forward_pre_hook(overflow_on_white)
    report = encode_images(photos, {"a": encoders["a"]}, tmp_path / "store", tokens="int8", batch_size=5)
    assert (report.images, report.encoded, report.unreadable) == (11, 11, 2)
    failures = [json.loads(line) for line in (tmp_path / "store/failures.jsonl").read_text().splitlines()]
    assert [Path(failure["name"]).name for failure in failures] == ["04.png", "99 copy.png"]
    store = FeatureStore(tmp_path / "store")
    assert len(store) == 11 and np.isfinite(store.embeddings("a")).all() and str(photos / "04.png") not in store.names
    hook.remove()
    assert encode_images(photos, {"a": encoders["a"]}, tmp_path / "store", tokens="int8").encoded == 1, "it is tried again"


# --- files in every state ---


def test_unreadable_images_are_listed_and_skipped(photos: Path, encoders: dict[str, Encoder], tmp_path: Path) -> None:
    (photos / "04.png").write_bytes((photos / "04.png").read_bytes()[:200])
    (photos / "07.png").write_bytes(b"")
    (photos / "07a.jpg").write_bytes(b"no image")
    report = encode_images(photos, encoders, tmp_path / "store", tokens="float16", batch_size=3)
    assert (report.images, report.unreadable) == (10, 3)
    failures = [json.loads(line) for line in (tmp_path / "store/failures.jsonl").read_text().splitlines()]
    assert [entry["name"] for entry in failures] == [str(photos / name) for name in ("04.png", "07.png", "07a.jpg")]
    assert all(entry["name"] in entry["reason"] for entry in failures)
    store = FeatureStore(tmp_path / "store")
    assert len(store) == 10
    assert_true(store, encoders)

    photo(photos / "07.png", 99)  # mended
    assert encode_images(photos, encoders, tmp_path / "store", tokens="float16").unreadable == 2
    assert len((tmp_path / "store/failures.jsonl").read_text().splitlines()) == 2
    assert_true(FeatureStore(tmp_path / "store"), encoders)


def test_strict_raises_at_the_first_and_can_go_on(photos: Path, encoders: dict[str, Encoder], tmp_path: Path) -> None:
    (photos / "08.png").write_bytes(b"no image")
    (photos / "09.png").write_bytes(b"no image")
    with pytest.raises(ImageError, match="08.png"):
        encode_images(photos, encoders, tmp_path / "store", tokens="float16", strict=True, batch_size=2)
    for name in ("08.png", "09.png"):
        (photos / name).unlink()
    report = encode_images(photos, encoders, tmp_path / "store", tokens="float16", strict=True, batch_size=2)
    assert (report.images, report.unreadable) == (10, 0)
    assert_true(FeatureStore(tmp_path / "store"), encoders)


def test_sources_that_overlap_count_once(photos: Path, encoders: dict[str, Encoder], tmp_path: Path) -> None:
    (photos / "zz.png").write_bytes(b"no image")
    report = encode_images([photos, photos / "03.png", photos, photos / "zz.png"], encoders, tmp_path / "store")
    assert (report.images, report.duplicates, report.unreadable) == (12, 0, 1)


def test_same_content_is_encoded_once(photos: Path, encoders: dict[str, Encoder], tmp_path: Path) -> None:
    for copy in ("00-copy.png", "more/05.png", "zz.png"):
        (photos / copy).parent.mkdir(exist_ok=True)
        (photos / copy).write_bytes((photos / "05.png").read_bytes())
    report = encode_images(photos, encoders, tmp_path / "store", tokens="float16", batch_size=2)
    assert (report.images, report.duplicates) == (12, 3)
    store = FeatureStore(tmp_path / "store")
    assert len(store) == len(set(store.keys)) == 12
    rows = {store.row_of(photos / name) for name in ("05.png", "00-copy.png", "more/05.png", "zz.png")}
    assert len(rows) == 1
    assert_true(store, encoders)
    named = pq.read_table(tmp_path / "store/images-00000.parquet").to_pylist()
    key = store.keys[rows.pop()]
    assert sum(row["key"] == key for row in named) == 4


def test_no_readable_image_is_said(encoders: dict[str, Encoder], tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(b"")
    assert encode_images(tmp_path / "a.jpg", encoders, tmp_path / "store").images == 0
    with pytest.raises(ValueError, match="store.* a, b "):
        FeatureStore(tmp_path / "store")


# --- stopped, resumed, added to ---


class Plain(Encoder):
    def __init__(self, side: int) -> None:
        torch.manual_seed(side)
        numbers = {"width": 16, "depth": 1, "patch_size": 8, "image_size": side, "embed_dim": 16}
        super().__init__(nn.Sequential(nn.Conv2d(3, 16, 8, 8), nn.Flatten(2)), **numbers, mean=(0.5,) * 3, std=(0.2,) * 3)

    def patch_tokens(self, x: Tensor) -> Tensor:
        return self.tower(x).transpose(1, 2)

    def image_embedding(self, x: Tensor) -> Tensor:
        return self.tower(x).amax(dim=-1)


def encode(photos: Path, out: Path) -> Any:
    return encode_images(photos, {"a": Plain(32), "b": Plain(48)}, out, tokens="int8", batch_size=4)


def encode_until(photos: Path, out: Path, writes: int, held: Any) -> None:
    """Encode, and wait to be killed when so many files have been written and another is about to get its name."""
    torch.set_num_threads(1)  # a pool of threads does not outlive a fork
    rename, left = os.replace, [writes]

    def rename_or_wait(*paths: Any) -> None:
        if left[0] <= 0:  # several threads write
            held.set()
            time.sleep(600)
        left[0] -= 1
        rename(*paths)

    os.replace = rename_or_wait
    encode(photos, out)


def assert_same(store: FeatureStore, expected: FeatureStore) -> None:
    """Bit for bit, row for row."""
    assert (store.keys, store.names) == (expected.keys, expected.names)
    for name in expected.encoders:
        assert np.array_equal(store.embeddings(name), expected.embeddings(name))
        assert torch.equal(store.tokens(name, slice(None)), expected.tokens(name, slice(None)))


@pytest.mark.slow
@pytest.mark.multiprocess
def test_killed_and_resumed_is_as_never_killed(tmp_path: Path) -> None:
    for i in range(120):
        photo(tmp_path / f"photos/{i:03d}.png", i % 110)  # the last 10 are doubles
    (tmp_path / "photos/033.png").write_bytes(b"damaged")
    (tmp_path / "photos/077.png").write_bytes((tmp_path / "photos/077.png").read_bytes()[:300])
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    context = get_context("fork")  # a new interpreter would import for seconds
    for writes in (4, 7, 10):  # among them files of both encoders
        held = context.Event()
        worker = context.Process(target=encode_until, args=(tmp_path / "photos", killed, writes, held))
        worker.start()
        assert held.wait(600)
        worker.kill()
        worker.join()
    assert len(list(killed.glob("*/features-*.safetensors"))) > 4 and list(killed.rglob(".tmp-*"))
    report = encode(tmp_path / "photos", killed)
    assert 0 < report.encoded < report.images == 108
    encode(tmp_path / "photos", whole)
    assert_same(FeatureStore(killed), FeatureStore(whole))
    assert (killed / "failures.jsonl").read_text() == (whole / "failures.jsonl").read_text()
    again = encode(tmp_path / "photos", killed)
    assert (again.encoded, again.images, again.duplicates, again.unreadable) == (0, 108, 10, 2)


def test_store_that_is_being_written_can_be_read(photos: Path, encoders: dict, tmp_path: Path, caplog) -> None:
    """Stopped between the shard of one encoder and that of the other: only what both have is a row."""
    encode_images(photos, encoders, tmp_path / "store", tokens="float16", batch_size=2)
    folders = {name: tmp_path / "store" / entry["folder"] for name, entry in FeatureStore(tmp_path / "store").manifest.items()}
    for name, kept in (("a", 4), ("b", 1)):
        for file in sorted(folders[name].iterdir())[kept:]:
            file.unlink()
    (folders["a"] / "features-00004.safetensors.tmp").write_bytes(b"half a shard")
    manifest = read_sealed(tmp_path / "store/manifest.json")
    write_sealed(tmp_path / "store/manifest.json", {key: manifest[key] for key in manifest if key not in ("files", "shards")})
    with caplog.at_level(logging.WARNING):
        store = FeatureStore(tmp_path / "store")
    assert "10 of 12 images are not encoded by all of a, b" in caplog.text
    assert len(store) == 2
    assert_true(store, encoders)
    only_a = FeatureStore(tmp_path / "store", ["a"])
    assert len(only_a) == 8
    assert_true(only_a, {"a": encoders["a"]})
    report = encode_images(photos, encoders, tmp_path / "store", tokens="float16", batch_size=2)
    assert report.encoded == 10
    assert_true(FeatureStore(tmp_path / "store"), encoders)
    assert len(FeatureStore(tmp_path / "store")) == 12


def count_calls(encoder: Encoder, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    seen: list[int] = []
    original = encoder.image_embedding

    def counted(x: Tensor) -> Tensor:
        seen.append(len(x))
        return original(x)

    monkeypatch.setattr(encoder, "image_embedding", counted)
    return seen


def test_only_new_images_are_encoded(photos: Path, encoders: dict[str, Encoder], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encode_images(photos, encoders, tmp_path / "store", tokens="float16")
    before = FeatureStore(tmp_path / "store")
    photo(photos / "00-new.png", 50)
    seen = count_calls(encoders["a"], monkeypatch)
    report = encode_images(photos, encoders, tmp_path / "store", tokens="float16")
    assert (report.encoded, report.images, sum(seen)) == (1, 13, 1)
    after = FeatureStore(tmp_path / "store")
    assert after.names == [*before.names, str(photos / "00-new.png")], "rows stay where they were"
    assert_true(after, encoders)


def test_known_files_are_not_read_again(
    photos: Path, encoders: dict[str, Encoder], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode_images(photos, encoders, tmp_path / "store")
    read: list[Path] = []
    for module in (new_images, feature_store):
        monkeypatch.setattr(module, "read_file", lambda path, limits=None: read.append(Path(path)) or read_file(path))
    encode_images(photos, encoders, tmp_path / "store")
    assert [path for path in read if path.parent == photos] == []
    (photos / "03.png").touch()
    store = FeatureStore(tmp_path / "store")
    assert [store.row_of(photos / f"{i:02d}.png") for i in (2, 3, 3)] == [2, 3, 3]
    assert [path for path in read if path.parent == photos] == [photos / "03.png"]


def test_changed_file_gets_new_features(photos: Path, encoders: dict[str, Encoder], tmp_path: Path) -> None:
    encode_images(photos, encoders, tmp_path / "store", tokens="float16")
    photo(photos / "03.png", 77)
    assert encode_images(photos, encoders, tmp_path / "store", tokens="float16").encoded == 1
    store = FeatureStore(tmp_path / "store")
    assert len(store) == 12 and sorted(store.names) == sorted(map(str, photos.iterdir()))
    assert_true(store, encoders)


def test_names_of_encoders_may_be_anything(photos: Path, encoders: dict[str, Encoder], tmp_path: Path) -> None:
    odd = dict(zip(["open_clip:a/b//c.pt", "open_clip:a-b-c.pt", "..", "é" * 200], [*encoders.values()] * 2, strict=True))
    encode_images(photos, odd, tmp_path / "store", tokens="float16")
    assert len([path for path in (tmp_path / "store").iterdir() if path.is_dir()]) == 4
    assert_true(FeatureStore(tmp_path / "store"), odd)


def test_added_encoder_runs_alone(photos: Path, encoders: dict[str, Encoder], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encode_images(photos, {"a": encoders["a"]}, tmp_path / "store", tokens="float16", batch_size=5)
    seen = count_calls(encoders["a"], monkeypatch)
    report = encode_images(photos, encoders, tmp_path / "store", tokens="float16", batch_size=5)
    assert seen == [] and report.encoded == 12
    store = FeatureStore(tmp_path / "store")
    assert store.encoders == ["a", "b"]
    assert_true(store, encoders)


def test_encoder_added_with_other_images_meets_in_the_middle(photos: Path, encoders: dict[str, Encoder], tmp_path: Path) -> None:
    files = sorted(photos.iterdir())
    encode_images(files[:8], {"a": encoders["a"]}, tmp_path / "store", tokens="float16")
    encode_images(files[:3:-1], {"b": encoders["b"]}, tmp_path / "store", tokens="float16")
    store = FeatureStore(tmp_path / "store")
    assert store.names == [str(file) for file in files[4:8]]
    assert_true(store, encoders)


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (lambda e: e.tower[0].bias.data.__setitem__(0, e.tower[0].bias.data[0] * (1 + 2**-22)), "weights"),
        (lambda e: e.set_image_size(40), "spec"),
        (lambda e: setattr(e, "preprocessing", replace(e.preprocessing, mean=(0.5, 0.5, 0.4))), "preprocessing"),
        (lambda e: setattr(e, "preprocessing", replace(e.preprocessing, interpolation="bilinear")), "preprocessing"),
        (lambda e: setattr(e, "preprocessing", replace(e.preprocessing, fit="squash")), "preprocessing"),
        (lambda e: setattr(e, "preprocessing", replace(e.preprocessing, crop_pct=0.875)), "preprocessing"),
        (lambda e: setattr(e, "layer", 0), "spec"),
        (lambda e: e.to(torch.bfloat16), "weights"),
    ],
)
def test_another_encoder_under_the_same_name_is_refused(change, what: str, photos: Path, tmp_path: Path) -> None:
    encode_images(photos, {"a": build_encoder("tiny-a")}, tmp_path / "store")
    changed = build_encoder("tiny-a")
    change(changed)
    store = FeatureStore(tmp_path / "store")
    store.check("a", build_encoder("tiny-a", trainable=True))  # a gradient changes no feature
    prints = f"(?s){fingerprint(build_encoder('tiny-a'))}.*{fingerprint(changed)}.*{what} "
    with pytest.raises(ValueError, match=prints):
        store.check("a", changed)
    with pytest.raises(ValueError, match=prints):
        encode_images(photos, {"a": changed}, tmp_path / "store")
    encode_images(photos, {"other": changed}, tmp_path / "store")
    assert FeatureStore(tmp_path / "store").encoders == ["a", "other"]


def test_other_kinds_of_features_are_refused(photos: Path, encoders: dict[str, Encoder], tmp_path: Path) -> None:
    encode_images(photos, encoders, tmp_path / "store", tokens="int8")
    with pytest.raises(ValueError, match="'a' with tokens int8, not None"):
        encode_images(photos, encoders, tmp_path / "store")
    with pytest.raises(ValueError, match="dtype float32, not bfloat16"):
        encode_images(photos, encoders, tmp_path / "store", tokens="int8", dtype=torch.bfloat16)


def test_second_writer_is_refused_and_a_dead_one_is_no_hindrance(photos: Path, encoders: dict[str, Encoder], tmp_path: Path) -> None:
    (tmp_path / "store").mkdir()
    with held_lock(tmp_path / "store/_lock-0000"), pytest.raises(ValueError, match=str(tmp_path / "store")):
        encode_images(photos, encoders, tmp_path / "store")
    assert encode_images(photos, encoders, tmp_path / "store").encoded == 12


# --- reading ---


@pytest.fixture
def sharded(photos: Path, encoders: dict[str, Encoder], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FeatureStore:
    """Six shards of two rows."""
    monkeypatch.setattr(new_images, "SHARD_IMAGES", 2)
    encode_images(photos, encoders, tmp_path / "store", tokens="int8", batch_size=2)
    store = FeatureStore(tmp_path / "store")
    assert len(list((tmp_path / "store" / store.manifest["a"]["folder"]).iterdir())) == 6
    return store


@given(rows=st.lists(st.integers(-12, 11), max_size=20))
@settings(max_examples=30, deadline=None)
def test_rows_in_any_order(sharded_once: FeatureStore, rows: list[int]) -> None:
    everything = sharded_once.tokens("b", slice(None))
    expected = torch.stack([everything[row] for row in rows]) if rows else everything[:0]
    for given_as in (rows, np.array(rows, int), torch.tensor(rows, dtype=torch.long)):
        assert torch.equal(sharded_once.tokens("b", given_as), expected)


@pytest.fixture(scope="module")
def sharded_once(tmp_path_factory: pytest.TempPathFactory) -> FeatureStore:
    folder = tmp_path_factory.mktemp("sharded")
    for i in range(12):
        photo(folder / f"photos/{i:02d}.png", i)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(new_images, "SHARD_IMAGES", 2)
        encode_images(folder / "photos", {"b": build_encoder("tiny-b")}, folder / "store", tokens="int8", batch_size=2)
    return FeatureStore(folder / "store")


def test_masks_slices_and_bad_rows(sharded: FeatureStore) -> None:
    everything = sharded.tokens("a", slice(None))
    mask = np.arange(12) % 3 == 0
    assert torch.equal(sharded.tokens("a", mask), everything[::3])
    assert torch.equal(sharded.tokens("a", slice(5, 1, -2)), everything[[5, 3]])
    with pytest.raises(IndexError):
        sharded.tokens("a", [12])


def test_row_of_everything_an_image_may_be(sharded: FeatureStore, photos: Path, tmp_path: Path) -> None:
    moved = (photos / "05.png").rename(tmp_path / "elsewhere.bin")
    for image in (moved, str(moved), moved.read_bytes(), sharded.keys[5], str(photos / "05.png")):
        assert sharded.row_of(image) == 5
    photo(tmp_path / "strange.png", 1234)
    with pytest.raises(ValueError, match=r"strange.png \(content key [0-9a-f]{32}\).* 12 images"):
        sharded.row_of(tmp_path / "strange.png")
    with pytest.raises(ValueError, match=r"nowhere\.png"):
        sharded.row_of("nowhere.png")
    with pytest.raises(ValueError, match="content key"):
        sharded.row_of(b"other bytes")


def test_one_shard_is_mapped_not_read(photos: Path, encoders: dict[str, Encoder], tmp_path: Path) -> None:
    encode_images(photos, encoders, tmp_path / "store", tokens="float16")
    store = FeatureStore(tmp_path / "store")
    embeddings = store.embeddings("a")
    assert np.shares_memory(embeddings, store.embeddings("a"))
    maps = Path("/proc/self/maps")
    if maps.exists():
        address = embeddings.__array_interface__["data"][0]
        (line,) = [line for line in maps.read_text().splitlines() if _holds(line, address)]
        assert line.endswith("features-00000.safetensors")


def _holds(line: str, address: int) -> bool:
    first, last = (int(number, 16) for number in line.split()[0].split("-"))
    return first <= address < last


def _row(store: FeatureStore, row: int) -> Tensor:
    return store.tokens("a", [row])


def test_store_travels_to_processes_and_threads(sharded: FeatureStore) -> None:
    everything = sharded.tokens("a", slice(None))
    copy = pickle.loads(data := pickle.dumps(sharded))
    assert torch.equal(copy.tokens("a", slice(None)), everything) and len(data) < 20_000, "no features travel"
    with ThreadPoolExecutor(8) as pool:
        rows = list(pool.map(lambda i: copy.tokens("a", [i % 12]), range(200)))
    assert all(torch.equal(row[0], everything[i % 12]) for i, row in enumerate(rows))
    loader = torch.utils.data.DataLoader(_Rows(sharded), batch_size=3, num_workers=2, multiprocessing_context=get_context("fork"))
    assert torch.equal(torch.cat(list(loader)), everything)


class _Rows(torch.utils.data.Dataset):
    def __init__(self, store: FeatureStore) -> None:
        self.store = store

    def __len__(self) -> int:
        return len(self.store)

    def __getitem__(self, row: int) -> Tensor:
        return _row(self.store, row)[0]


def test_what_is_no_store_is_refused(tmp_path: Path, sharded: FeatureStore) -> None:
    with pytest.raises(ValueError, match=rf"{tmp_path.name}.*manifest\.json"):
        FeatureStore(tmp_path)
    with pytest.raises(ValueError, match=" c;.* a, b"):
        FeatureStore(sharded.path, ["a", "c"])
    with pytest.raises(ValueError, match="'c'.*: a, b"):
        sharded.embeddings("c")
    shard = next((sharded.path / sharded.manifest["a"]["folder"]).iterdir())
    shard.write_bytes(shard.read_bytes()[:100])
    with pytest.raises(ValueError, match=shard.name):
        FeatureStore(sharded.path)


def test_impossible_options_are_refused(photos: Path, encoders: dict[str, Encoder], tmp_path: Path) -> None:
    for options, message in (
        ({"tokens": "int4"}, "'int4'.* float16, bfloat16, int8"),
        ({"batch_size": 0}, " 0 "),
        ({"embeddings": False}, " a:"),
    ):
        with pytest.raises(ValueError, match=message):
            encode_images(photos, encoders, tmp_path / "store", **options)
    with pytest.raises(ValueError, match="no encoders"):
        encode_images(photos, {}, tmp_path / "store")


def test_fingerprints_are_those_of_earlier_versions() -> None:
    """Stores, scores and checkpoints that were written before name these."""
    clip, view = build_encoder("mini-clip"), View(48, "pad", (1, 2, 3), blurred=True)
    prints = [fingerprint(clip), fingerprint(clip, view), fingerprint(build_encoder("mini-dino"))]
    assert prints == ["c09bbd5776c8b4bf8069d20964aaaac5", "b3ef01427a2b1bc80afe6ef2d167bd38", "ea2e6fb68b75b5913828b84c3c496dbb"]


def tower(**tensors: Tensor) -> nn.Module:
    module = nn.Module()
    for name, tensor in tensors.items():
        module.register_buffer(name, tensor)
    return module


DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.uint8)


@given(st.integers(0, 2**32), st.lists(st.integers(1, 4), max_size=3), st.sampled_from(DTYPES), st.data())
@settings(max_examples=50, deadline=None)
def test_the_digest_of_weights_changes_with_every_part_of_them(
    seed: int, shape: list[int], dtype: torch.dtype, data: st.DataObject
) -> None:
    generator = torch.Generator().manual_seed(seed)
    a, b = (torch.randint(1, 100, shape, generator=generator).to(dtype) for _ in "ab")
    digest = weights_digest(tower(a=a, b=b))
    flipped = a.clone()
    content = flipped.reshape(-1).view(torch.uint8)
    content[data.draw(st.integers(0, len(content) - 1), "byte")] ^= 1 << data.draw(st.integers(0, 7), "bit")
    assert weights_digest(tower(a=flipped, b=b)) != digest
    for dtype in DTYPES:  # of the same numbers, and the same bytes where they fit
        assert (weights_digest(tower(a=a.to(dtype), b=b)) == digest) is (dtype == a.dtype)
    assert weights_digest(tower(a=a.view(torch.uint8) if a.ndim else a[None].view(torch.uint8), b=b)) != digest or a.dtype == torch.uint8
    assert weights_digest(tower(a=a[None], b=b)) != digest
    assert weights_digest(tower(a=a, c=b)) != digest
    assert weights_digest(tower(a=a)) != digest
    assert (weights_digest(tower(a=b, b=a)) == digest) is torch.equal(a, b)
    assert weights_digest(tower(b=b, a=a)) == digest, "modules may list their parts in any order"


def test_the_digest_of_weights_is_that_of_any_device_and_thread_number() -> None:
    weights = torch.randn(300, 200)
    digest, threads = weights_digest(tower(a=weights)), torch.get_num_threads()
    try:
        torch.set_num_threads(threads % 2 + 1)
        assert weights_digest(tower(a=weights)) == digest
    finally:
        torch.set_num_threads(threads)
    assert weights_digest(tower(a=weights.T.contiguous().T)) == digest, "nor of how it lies in memory"
    if torch.cuda.is_available():
        assert weights_digest(tower(a=weights).cuda()) == digest
