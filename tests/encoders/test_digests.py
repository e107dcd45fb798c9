"""A flipped bit, wherever it is, is noticed or changes nothing that is read; foreign, copied and missing files are refused."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file

from encoders import Encoder, FeatureStore, View, encode_images
from encoders.digests import DamagedError, open_json, seal_json
from encoders.saved_folders import check_folder, recording
from encoders.store import new_images
from encoders.store.shards import Shard
from encoders.tables import ForeignError, read_table, write_table
from encoders.whole_files import read_sealed, write_sealed

TABLE = pa.table({"id": [f"r{i}" for i in range(40)], "value": [i / 7 for i in range(40)], "ids": [[i, 2 * i] for i in range(40)]})


def flips(path: Path, number: int, seed: int = 0) -> Iterator[None]:
    """Flip a random bit of the file, `number` times, each time in the sound file; half of them in its last and first 300 bytes."""
    rng, sound = random.Random(seed), path.read_bytes()
    for trial in range(number):
        place = rng.randrange(len(sound))
        if trial % 2:
            place = rng.randrange(min(300, len(sound))) * rng.choice((1, -1))
        damaged = bytearray(sound)
        damaged[place] ^= 1 << rng.randrange(8)
        path.write_bytes(damaged)
        yield
    path.write_bytes(sound)


def assert_noticed(path: Path, read: Callable[[], Any], same: Callable[[Any, Any], bool], number: int = 60) -> int:
    """Flip bits of a file; each is noticed by a ValueError that names the file, or the same is read. Return how many were noticed."""
    expected, noticed = read(), 0
    for _ in flips(path, number):
        try:
            assert same(read(), expected), "other values were read"
        except ValueError as error:
            assert path.name in str(error)
            noticed += 1
    assert same(read(), expected)
    return noticed


def test_every_bit_of_sealed_json_and_tables(tmp_path: Path) -> None:
    write_sealed(tmp_path / "a.json", {"text": "mof-digest of a thing", "number": 1.5, "none": None})
    assert assert_noticed(tmp_path / "a.json", lambda: read_sealed(tmp_path / "a.json"), dict.__eq__, 150) == 150
    write_table(tmp_path / "a.parquet", TABLE, "run")
    assert assert_noticed(tmp_path / "a.parquet", lambda: read_table(tmp_path / "a.parquet", run="run"), pa.Table.equals, 150) == 150
    assert pq.read_table(tmp_path / "a.parquet").equals(TABLE)  # as others read it


def test_json_of_earlier_releases_and_other_values(tmp_path: Path) -> None:
    (tmp_path / "old.json").write_text('{"digest": "abc", "a": 1}')
    assert read_sealed(tmp_path / "old.json") == {"digest": "abc", "a": 1}
    pq.write_table(TABLE, tmp_path / "old.parquet")
    assert read_table(tmp_path / "old.parquet", ["value"], "run").equals(TABLE.select(["value"]))
    line = seal_json({"a": "é\u2028", "b": [1]}, indent=None)
    assert b"\n" not in line and open_json(line, "line") == {"a": "é\u2028", "b": [1]}
    with pytest.raises(DamagedError, match=r"line 7 is damaged"):
        open_json(line.replace(b"[1]", b"[2]"), "line 7")
    with pytest.raises(ValueError, match="JSON object, got a list"):
        open_json(b"[1]", "line")


def test_a_table_is_refused_elsewhere(tmp_path: Path) -> None:
    write_table(tmp_path / "a.parquet", TABLE, "one")
    shutil.copy(tmp_path / "a.parquet", tmp_path / "b.parquet")
    with pytest.raises(ForeignError, match=r"b\.parquet is a copy of a\.parquet"):
        read_table(tmp_path / "b.parquet")
    with pytest.raises(ForeignError, match=r"a\.parquet belongs to another run"):
        read_table(tmp_path / "a.parquet", run="two")


def test_a_folder_of_other_libraries(tmp_path: Path) -> None:
    check_folder(tmp_path)  # without a list
    (tmp_path / "notes.txt").write_text("mine")
    with recording(tmp_path):
        (tmp_path / "config.json").write_text('{"a": 1}')
        (tmp_path / "old.bin").write_bytes(b"old")
        save_file({"w": torch.arange(9.0)}, tmp_path / "model.safetensors")
    assert list(read_sealed(tmp_path / "digests.json")["files"]) == ["config.json", "model.safetensors", "old.bin"]
    for name in ("config.json", "model.safetensors", "digests.json"):
        read = lambda: (check_folder(tmp_path), True)[1]  # noqa: E731
        assert assert_noticed(tmp_path / name, read, bool.__eq__, 30) == 30
    (tmp_path / "notes.txt").write_text("mine, changed")
    check_folder(tmp_path)
    with recording(tmp_path):
        (tmp_path / "old.bin").unlink()
        (tmp_path / "config.json").write_text('{"a": 2}')
    check_folder(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    check_folder(tmp_path, without=".safetensors")
    with pytest.raises(DamagedError, match=r"model\.safetensors is missing.* delete .*digests\.json"):
        check_folder(tmp_path)
    with recording(tmp_path):
        (tmp_path / "config.json").write_text('{"a": 3}')
    with pytest.raises(DamagedError, match=r"model\.safetensors"):  # a save does not vouch for files that it did not write
        check_folder(tmp_path)


def test_the_switch_of_the_impatient(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_sealed(tmp_path / "a.json", {"a": 1})
    (tmp_path / "a.json").write_bytes((tmp_path / "a.json").read_bytes().replace(b'"a": 1', b'"a": 2'))
    with pytest.raises(DamagedError, match=r"a\.json"):
        read_sealed(tmp_path / "a.json")
    monkeypatch.setenv("MOF_CHECK", "off")
    assert read_sealed(tmp_path / "a.json") == {"a": 2}


# --- feature stores ---


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    (tmp_path / "photos").mkdir()
    for i in range(9):
        pixels = np.random.default_rng(i).integers(0, 256, (40, 40, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"photos/{i}.png")
    return tmp_path / "photos"


def encode(photos: Path, store: Path, encoders: dict[str, Encoder], **options: Any) -> FeatureStore:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(new_images, "SHARD_IMAGES", 4)
        encode_images(photos, encoders, store, batch_size=4, **{"tokens": "int8", **options})
    return FeatureStore(store)


def features(store: Path) -> list[Any]:
    opened = FeatureStore(store)
    values = [(opened.embeddings(name).copy(), opened.tokens(name, slice(None)).numpy()) for name in opened.encoders]
    return [opened.names, opened.keys, *(array for pair in values for array in pair)]


def equal(left: list[Any], right: list[Any]) -> bool:
    return left[:2] == right[:2] and all(np.array_equal(a, b) for a, b in zip(left[2:], right[2:], strict=True))


@pytest.mark.slow
def test_every_file_of_a_store(photos: Path, tmp_path: Path, tiny_encoders: dict[str, Encoder]) -> None:
    store = tmp_path / "store"
    encode(photos, store, tiny_encoders)
    whole = features(store)
    files = [path for path in store.rglob("*") if path.is_file() and path.suffix in (".json", ".parquet", ".safetensors", ".npy")]
    assert {path.suffix for path in files} == {".json", ".parquet", ".safetensors", ".npy"}
    for path in files:
        noticed = assert_noticed(path, lambda: features(store), equal, 24)
        assert noticed > 20, f"{path}: {noticed} of 24"  # a flip in the padding of a header reads the same
    for path in files * 2:
        broken = tmp_path / "broken"
        shutil.copytree(store, broken)
        next(flips(broken / path.relative_to(store), 1, seed=len(path.name)))
        encode(photos, broken, tiny_encoders)  # running again repairs it
        assert equal(by_name(features(broken)), by_name(whole))
        shutil.rmtree(broken)


def by_name(values: list[Any]) -> list[Any]:
    """The same features in the order of the names."""
    names, keys, *arrays = values
    order = np.argsort(names)
    return [sorted(names), [keys[i] for i in order], *(array[order] for array in arrays)]


def test_damage_names_the_image(photos: Path, tmp_path: Path, tiny_encoders: dict[str, Encoder]) -> None:
    store = encode(photos, tmp_path / "store", tiny_encoders)
    file = tmp_path / "store" / store.manifest["a"]["folder"] / "features-00001.safetensors"
    with safe_open(file, "pt") as shard:
        offset = file.read_bytes().index(shard.get_tensor("tokens")[2].numpy().tobytes())
    content = bytearray(file.read_bytes())
    content[offset] ^= 1
    file.write_bytes(content)
    opened = FeatureStore(tmp_path / "store")
    rows = [row for row, name in enumerate(opened.names) if name != str(photos / "6.png")]
    assert len(opened.tokens("a", rows)) == 8, "other rows are sound"
    with pytest.raises(DamagedError, match=r"features-00001\.safetensors is damaged, in tokens of .*6\.png.*mof encode"):
        opened.tokens("a", slice(None))
    with pytest.raises(DamagedError, match=r"features-00001\.safetensors.*tokens"):
        Shard(file).check()


def test_files_of_another_store_are_refused(photos: Path, tmp_path: Path, tiny_encoders: dict[str, Encoder]) -> None:
    plain, blurred = tmp_path / "plain", tmp_path / "blurred"
    for store, blur in ((plain, False), (blurred, True)):
        encode(photos, store, tiny_encoders, view=View(48, "pad", (1, 2, 3), blur))
    folder = FeatureStore(plain).manifest["a"]["folder"]
    for name in (f"{folder}/features-00000.safetensors", "images-00000.parquet", "view.parquet"):
        sound = (plain / name).read_bytes()
        shutil.copy(blurred / name, plain / name)
        with pytest.raises(ValueError, match=Path(name).name):
            features(plain)
        (plain / name).write_bytes(sound)
    shutil.copy(plain / folder / "features-00000.safetensors", plain / folder / "features-00009.safetensors")
    with pytest.raises(ForeignError, match=r"features-00009\.safetensors is a copy of features-00000\.safetensors"):
        FeatureStore(plain)
    with pytest.raises(ForeignError, match=r"features-00009"):
        encode(photos, plain, tiny_encoders, view=View(48, "pad", (1, 2, 3)))


def test_an_edited_manifest_is_refused(photos: Path, tmp_path: Path, tiny_encoders: dict[str, Encoder]) -> None:
    encode(photos, tmp_path / "store", tiny_encoders)
    manifest = tmp_path / "store/manifest.json"
    sound = manifest.read_text()
    manifest.write_text(sound.replace('"tokens": "int8"', '"tokens": "float16"'))
    with pytest.raises(DamagedError, match=r"manifest\.json"):
        FeatureStore(tmp_path / "store")
    edited = json.loads(sound)
    del edited["digest"]
    edited["encoders"]["a"]["tokens"] = "float16"
    manifest.write_text(json.dumps(edited))
    with pytest.raises(ForeignError, match=r"features-00000\.safetensors"):  # the shards know their format
        FeatureStore(tmp_path / "store")


def test_deleted_and_renamed_images_leave_the_view(photos: Path, tmp_path: Path, tiny_encoders: dict[str, Encoder]) -> None:
    first = encode(photos, tmp_path / "store", tiny_encoders)
    (photos / "2.png").unlink()
    (photos / "5.png").rename(photos / "renamed.png")
    (photos / "7.png").write_bytes(b"no image any more")
    (photos / "8.png").rename(tmp_path / "8.png")
    report = encode_images([photos, tmp_path / "8.png"], tiny_encoders, tmp_path / "store", tokens="int8")
    assert (report.encoded, report.gone) == (0, 2) and "2 whose files are gone" in report.summary()
    store = FeatureStore(tmp_path / "store")
    expected = [str(photos / f"{name}.png") for name in ("0", "1", "3", "4", "renamed", "6")] + [str(tmp_path / "8.png")]
    assert store.names == expected
    rows = [0, 1, 3, 4, 5, 6, 8]
    assert np.array_equal(store.embeddings("a"), first.embeddings("a")[rows])
    assert torch.equal(store.tokens("b", slice(None)), first.tokens("b", rows))
    encode_images(tmp_path / "8.png", tiny_encoders, tmp_path / "store", tokens="int8")
    assert FeatureStore(tmp_path / "store").names == expected, "images from elsewhere stay as long as they are there"


def test_prune_deletes_what_is_gone(photos: Path, tmp_path: Path, tiny_encoders: dict[str, Encoder]) -> None:
    first = encode(photos, tmp_path / "store", tiny_encoders)
    expected = {name: first.embeddings(name)[[4, 6, 7, 8]] for name in "ab"}
    for number in (0, 1, 2, 3, 5):
        (photos / f"{number}.png").unlink()
    encode_images(photos, {"a": tiny_encoders["a"]}, tmp_path / "store", tokens="int8", prune=True)
    store = FeatureStore(tmp_path / "store")
    assert [Path(name).stem for name in store.names] == ["4", "6", "7", "8"]
    for name in "ab":
        assert np.array_equal(store.embeddings(name), expected[name])
        files = sorted((tmp_path / "store" / store.manifest[name]["folder"]).iterdir())
        assert sum(len(Shard(file).keys) for file in files) == 4
    assert sum(map(len, (pq.read_table(file) for file in (tmp_path / "store").glob("images-*.parquet")))) == 4
    (photos / "0.png").write_bytes((photos / "4.png").read_bytes())
    assert encode_images(photos, tiny_encoders, tmp_path / "store", tokens="int8").encoded == 0


def test_embeddings_in_many_shards_are_mapped(photos: Path, tmp_path: Path, tiny_encoders: dict[str, Encoder]) -> None:
    store = encode(photos, tmp_path / "store", tiny_encoders)
    embeddings = store.embeddings("a")
    assert isinstance(embeddings, np.memmap) and embeddings.filename == store.joined("a")
    store.joined("a").unlink()
    gathered = FeatureStore(tmp_path / "store").embeddings("a")
    assert not isinstance(gathered, np.memmap) and np.array_equal(gathered, embeddings)
    (photos / "4.png").unlink()
    again = encode(photos, tmp_path / "store", tiny_encoders)
    assert np.array_equal(again.embeddings("a"), np.delete(embeddings, 4, axis=0)) and isinstance(again.embeddings("a"), np.memmap)
    assert len(list((tmp_path / "store").glob("a-*.npy"))) == 1, "that of the earlier view is gone"


def test_a_store_of_an_earlier_release_is_read_and_continued(photos: Path, tmp_path: Path, tiny_encoders: dict[str, Encoder]) -> None:
    store = encode(photos, tmp_path / "store", tiny_encoders)
    expected = features(tmp_path / "store")
    for path in (tmp_path / "store").rglob("*"):  # as earlier releases wrote it
        if path.suffix == ".safetensors":
            shard = Shard(path)
            keys = torch.from_numpy(shard.keys.view(np.uint8).reshape(-1, 16).copy())
            save_file({"keys": keys, **shard.features}, path, {"errors": shard.metadata["errors"]})
        elif path.name.startswith("images-"):
            pq.write_table(read_table(path), path)
        elif path.suffix in (".npy", ".parquet"):
            path.unlink()
    manifest = read_sealed(tmp_path / "store/manifest.json")
    del manifest["store"], manifest["files"]
    (tmp_path / "store/manifest.json").write_text(json.dumps(manifest))
    assert equal(features(tmp_path / "store"), expected)
    assert encode_images(photos, tiny_encoders, tmp_path / "store", tokens="int8").encoded == 0
    assert equal(features(tmp_path / "store"), expected)
    store = FeatureStore(tmp_path / "store")
    assert isinstance(store.embeddings("a"), np.memmap)


def test_copies_made_by_hand_harm_nothing(photos: Path, tmp_path: Path, tiny_encoders: dict[str, Encoder]) -> None:
    encode(photos, tmp_path / "store", tiny_encoders)
    whole = features(tmp_path / "store")
    for path in [path for path in (tmp_path / "store").rglob("*-0*.*") if path.is_file()]:
        shutil.copy(path, path.with_name(f"{path.stem} (copy){path.suffix}"))
        shutil.copy(path, path.with_name(f"{path.stem}-conflict{path.suffix}"))
    assert equal(features(tmp_path / "store"), whole)
    encode(photos, tmp_path / "store", tiny_encoders)
    assert equal(features(tmp_path / "store"), whole)


def test_every_cut_of_embeddings_in_one_piece_is_mended(photos: Path, tmp_path: Path, tiny_encoders: dict[str, Encoder]) -> None:
    joined = encode(photos, tmp_path / "store", tiny_encoders).joined("a")
    whole, content = features(tmp_path / "store"), joined.read_bytes()
    for size in (0, 1, 60, len(content) - 1):
        joined.write_bytes(content[:size])
        with pytest.raises(DamagedError, match=joined.name):
            features(tmp_path / "store")
        encode(photos, tmp_path / "store", tiny_encoders)
        assert equal(features(tmp_path / "store"), whole)


@pytest.mark.parametrize("content", ["", "[1]", "[" * 100_000, '{"format": 1}', '{"format": 1, "encoders": []}'])
def test_a_manifest_of_something_else_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "manifest.json").write_text(content)
    with pytest.raises(ValueError, match=r"manifest\.json"):
        FeatureStore(tmp_path)


@pytest.mark.parametrize("name", ["images-00000.parquet", "view.parquet"])
def test_a_deleted_list_is_missed(photos: Path, tmp_path: Path, tiny_encoders: dict[str, Encoder], name: str) -> None:
    encode(photos, tmp_path / "store", tiny_encoders)
    (tmp_path / "store" / name).unlink()
    with pytest.raises(DamagedError, match=r"(view\.parquet is missing|the index lacks \d images).*mof encode"):
        FeatureStore(tmp_path / "store")
    assert len(encode(photos, tmp_path / "store", tiny_encoders)) == 9


def test_a_deleted_shard_is_missed(photos: Path, tmp_path: Path, tiny_encoders: dict[str, Encoder]) -> None:
    store = encode(photos, tmp_path / "store", tiny_encoders)
    shard = tmp_path / "store" / store.manifest["a"]["folder"] / "features-00001.safetensors"
    shard.unlink()
    with pytest.raises(DamagedError, match=r"features-00001\.safetensors is missing: the same `mof encode` again"):
        FeatureStore(tmp_path / "store")
    assert len(FeatureStore(tmp_path / "store", ["b"])) == 9
    encode_images(photos, {"b": tiny_encoders["b"]}, tmp_path / "store", tokens="int8")
    with pytest.raises(DamagedError, match=r"features-00001\.safetensors is missing"):
        FeatureStore(tmp_path / "store")
    assert len(encode(photos, tmp_path / "store", tiny_encoders)) == 9
