"""Folders, lists, patterns and tars as one stream; what is cut off or damaged is named, not lost in silence."""

from __future__ import annotations

import gzip
import hashlib
import io
import os
import tarfile
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from support.pictures import tar_of

from encoders import Encoder, ImageError, encode_images
from encoders.images.opening import ImageLimits
from encoders.images.sources import ImageSources, content_key, exists, readable, tar_images


def write(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(name.encode())
    return folder


def names(*images: str | Path) -> list[str]:
    return [name for name, _ in ImageSources(list(images))]


def make_tar(path: Path, members: dict[str, bytes], mode: str = "w") -> Path:
    return tar_of(path, members.items(), mode)


MEMBERS = {f"{i}.{suffix}": bytes([i]) * 3000 for i in range(4) for suffix in ("jpg", "json")}


# --- URLs ---


@pytest.fixture
def bucket() -> Iterator[str]:
    """A URL of a storage in memory, with two tars, two images and a file of another kind."""
    storage = fsspec.filesystem("memory")
    for number in (0, 1):
        tar = io.BytesIO()
        with tarfile.open(fileobj=tar, mode="w") as archive:
            header = tarfile.TarInfo(f"{number}.png")
            header.size = 4
            archive.addfile(header, io.BytesIO(b"tar%d" % number))
        storage.pipe(f"/bucket/train-{number}.tar", tar.getvalue())
        storage.pipe(f"/bucket/photos/{number}.PNG", b"file%d" % number)
    storage.pipe("/bucket/photos/notes.md", b"no image")
    yield "memory://bucket"
    storage.rm("/bucket", recursive=True)


@pytest.mark.parametrize("pattern", ["train-{0..1}.tar", "train-*.tar"])
def test_urls_of_tars_are_read_as_streams(bucket: str, pattern: str) -> None:
    sources = ImageSources(f"{bucket}/{pattern}")
    members = [(f"memory:///bucket/train-{number}.tar/{number}.png", b"tar%d" % number) for number in (0, 1)]
    assert list(sources) == members and sources.total is None
    assert sources.among([members[0][0], "memory:///elsewhere/0.png"]) == [members[0][0]] and exists(members[0][0])


def test_urls_of_folders_and_images(bucket: str, tmp_path: Path) -> None:
    images = [(f"memory:///bucket/photos/{number}.PNG", b"file%d" % number) for number in (0, 1)]
    sources = ImageSources(f"{bucket}/photos")
    assert list(sources) == images and sources.total == 2 and sources.among([images[1][0], "x"]) == [images[1][0]]
    assert next(iter(ImageSources([f"{bucket}/photos/1.PNG", write(tmp_path, "a.png")]))) == images[1]
    (_, refused) = next(iter(ImageSources(f"{bucket}/photos/0.PNG", ImageLimits(max_bytes=3))))
    assert isinstance(refused, ImageError) and "5 bytes" in str(refused)


def test_urls_that_lead_nowhere_are_refused(bucket: str) -> None:
    for url, message in (
        (f"{bucket}/none.tar", r"none\.tar: no such file"),
        (f"{bucket}/photos/*.md", r"notes\.md is no source"),
        ("nothing://a/b.tar", "nothing://a/b.tar: .*nothing"),
    ):
        with pytest.raises(ValueError, match=message):
            ImageSources(url)


def test_a_lost_connection_is_named(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    sources = ImageSources([f"{bucket}/train-*.tar", f"{bucket}/photos/0.PNG"])
    fsspec.filesystem("memory").rm("/bucket/train-0.tar")
    fsspec.filesystem("memory").rm("/bucket/photos/0.PNG")
    (_, first), (_, second), (_, third) = sources
    assert "train-0.tar: cannot be read on" in str(first) and second == b"tar1" and "0.PNG: cannot be read" in str(third)


# --- folders, lists, patterns ---


def test_folder_is_searched_with_its_subfolders_sorted(tmp_path: Path) -> None:
    write(tmp_path, "b.JPG", "a/z.png", "a/b/c.webp", "notes.txt", ".hidden.jpg", ".cache/d.jpg", "c.jpeg.part")
    assert names(tmp_path) == [str(tmp_path / name) for name in ("a/b/c.webp", "a/z.png", "b.JPG")]
    assert ImageSources(tmp_path).total == 3


def test_names_are_absolute_whatever_was_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, "photos/a.jpg")
    monkeypatch.chdir(tmp_path)
    assert names("photos") == names("./photos/../photos/") == names("photos/a.jpg") == [str(tmp_path / "photos/a.jpg")]


def test_links_are_followed_and_loops_end(tmp_path: Path) -> None:
    write(tmp_path, "real/a.jpg", "photos/b.jpg")
    (tmp_path / "photos/linked").symlink_to(tmp_path / "real")
    (tmp_path / "photos/loop").symlink_to(tmp_path / "photos")
    assert names(tmp_path / "photos") == [str(tmp_path / "photos" / name) for name in ("b.jpg", "linked/a.jpg")]


def test_list_is_relative_to_itself(tmp_path: Path) -> None:
    write(tmp_path, "set/a b.jpg", "c.jpg")
    (tmp_path / "set/list.txt").write_bytes(b"\xef\xbb\xbfa b.jpg\r\n\r\n../c.jpg\nmissing.jpg\n")
    found = list(ImageSources(tmp_path / "set/list.txt"))
    assert [name for name, _ in found] == [str(tmp_path / name) for name in ("set/a b.jpg", "c.jpg", "set/missing.jpg")]


def test_file_name_that_is_no_text_can_be_named(tmp_path: Path) -> None:
    raw = os.fsencode(tmp_path) + b"/caf\xe9.jpg"
    Path(os.fsdecode(raw)).write_bytes(b"x")
    ((name, path),) = ImageSources(tmp_path)
    assert name == f"{tmp_path}/caf\\xe9.jpg"
    assert isinstance(path, Path) and path.read_bytes() == b"x"


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\x85", "\x0b", "\x0c", "\x1c"])
def test_only_line_feeds_end_the_lines_of_a_list(separator: str, tmp_path: Path) -> None:
    odd = f"a{separator}b.png"
    (tmp_path / "list.txt").write_text(f"\ufeff{odd}\r\nc.png\n{separator}d.png", encoding="utf-8", newline="")
    write(tmp_path, odd, "c.png")
    assert names(tmp_path / "list.txt") == [f"{tmp_path}/{name}" for name in (odd, "c.png", f"{separator}d.png")]


def test_a_line_with_a_zero_byte_costs_itself_alone(tmp_path: Path, tiny_encoders: dict[str, Encoder]) -> None:
    Image.new("RGB", (40, 30), "red").save(tmp_path / "a.png")
    (tmp_path / "list.txt").write_bytes(b"b\0c.png\na.png\n")
    report = encode_images(tmp_path / "list.txt", {"a": tiny_encoders["a"]}, tmp_path / "store")
    assert (report.encoded, report.unreadable) == (1, 1)


def test_a_file_that_cannot_be_looked_for_is_not_gone(tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to("loop")  # lstat fails, as on a server that is down
    write(tmp_path, "a.png")
    assert exists(str(tmp_path / "loop/b.png")) and exists(str(tmp_path / "a.png"))
    assert not any(exists(str(tmp_path / name)) for name in ("b.png", "a.png/c.png", "c" * 300, "d\0.png"))


def test_spaces_belong_to_a_name_if_there_is_a_file_with_them(tmp_path: Path) -> None:
    write(tmp_path, "a.png", " a.png", "b.png")
    (tmp_path / "list.txt").write_bytes(b"a.png\n a.png\r\n b.png \n")
    assert [str(path) for _, path in ImageSources(tmp_path / "list.txt")] == [f"{tmp_path}/{name}" for name in ("a.png", " a.png", "b.png")]


@pytest.mark.parametrize("kind", ["pipe", "device", "holes", "utf-16"])
def test_a_list_that_is_no_plain_text_is_refused_at_once(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "list.txt"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "holes":
        with path.open("wb") as file:
            file.truncate(30 * 2**30)
    else:
        path.write_text("a.png\n", encoding="utf-16")
    with pytest.raises(ValueError, match=r"list\.txt.* (no regular file|more than the allowed|UTF-16; save it in UTF-8)"):
        ImageSources(path)


def test_a_subfolder_that_cannot_be_opened_is_no_silent_loss(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, "a/1.png", "b/2.png")
    scandir = os.scandir

    def refuse_b(path: str) -> object:
        if os.fspath(path).endswith("/b"):
            raise PermissionError(13, "Permission denied", os.fspath(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse_b)
    assert names(tmp_path) == [f"{tmp_path}/a/1.png", f"{tmp_path}/b"]


def test_a_list_that_starts_from_another_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_text("".join(f"{i}.png\n" for i in range(30)))
    with pytest.raises(ValueError, match=r"first 20 images are missing, such as .*/0.png"):
        ImageSources(tmp_path / "list.txt")
    write(tmp_path, "19.png")
    assert ImageSources(tmp_path / "list.txt").total == 30


def test_no_two_names_are_equal(tmp_path: Path) -> None:
    files = [b"\xff.png", rb"\xff.png", rb"\x5cxff.png", rb"\xfg.png", b"\\\xff.png", "\u00ff.png".encode(), rb"\\xff.png"]
    for file in files:
        Path(os.fsdecode(os.fsencode(tmp_path) + b"/" + file)).write_bytes(file)
    found = list(ImageSources(tmp_path))
    assert len({name for name, _ in found}) == len(files) == len(found)
    assert {name: path.read_bytes() for name, path in found if isinstance(path, Path)}[f"{tmp_path}/\\xfg.png"] == rb"\xfg.png"


@given(
    names=st.sets(
        st.lists(st.sampled_from([b"\\", b"x", b"f", b"5", b"c", b"\xff", b"\xc3\xbf"]), min_size=1, max_size=8).map(b"".join), min_size=2
    )
)
def test_the_texts_of_different_paths_differ(names: set[bytes]) -> None:
    assert len({readable(os.fsdecode(name)) for name in names}) == len(names)


def test_every_image_file_of_a_folder_is_counted(tmp_path: Path) -> None:
    """Also images in formats that are not opened: they are listed as failures when they are read."""
    write(tmp_path, "a.jp2", "b.tga", "c.jpe", "d.heic", "e.PSD", "f.txt", "g.h5", "h.mpg", "i.jxl", "j.pbm", "k.eps")
    (tmp_path / "l.jpg").mkdir()
    assert [Path(name).name for name in names(tmp_path)] == ["a.jp2", "b.tga", "c.jpe", "d.heic", "e.PSD", "i.jxl", "j.pbm", "k.eps"]


def test_several_sources_keep_their_order(tmp_path: Path) -> None:
    write(tmp_path, "b/1.jpg", "a/2.jpg", "3.png")
    assert [Path(name).name for name in names(tmp_path / "b", tmp_path / "a", tmp_path / "3.png")] == ["1.jpg", "2.jpg", "3.png"]


def test_patterns(tmp_path: Path) -> None:
    write(tmp_path, *(f"d{i}/{j}.jpg" for i in range(3) for j in range(2)), "d[1]/x.jpg")
    assert names(f"{tmp_path}/d{{0..1}}/1.jpg") == names(f"{tmp_path}/d{{0,1}}/1.jpg") == [f"{tmp_path}/d{i}/1.jpg" for i in (0, 1)]
    assert names(f"{tmp_path}/d?/0.jpg") == [f"{tmp_path}/d{i}/0.jpg" for i in range(3)]
    assert len(names(f"{tmp_path}/**/*.jpg")) == 7
    assert names(f"{tmp_path}/d[1]") == [f"{tmp_path}/d[1]/x.jpg"], "a path that exists is no pattern"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: folder / "nowhere", "nowhere: "),
        (lambda folder: f"{folder}/t{{0..2}}.tar", r"t0.tar: .*t\{0..2\}.tar\)"),
        (lambda folder: f"{folder}/*.tar", r"\*.tar: "),
        (lambda folder: write(folder, "notes.md"), "{folder}: .*jpg"),
        (lambda folder: write(folder, "a.tar", "b.tar"), r"2 tars are read by giving '.*/\*.tar'"),
        (lambda folder: write(folder, "records.json") / "records.json", "records.json"),
        (lambda folder: write(folder, "x/empty.txt") / "nothing", "nothing"),
        (lambda folder: [], "no images: give a folder"),
    ],
)
def test_what_holds_no_images_is_refused(make, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message.replace("{folder}", str(tmp_path))):
        ImageSources(make(tmp_path))


def test_empty_list_is_refused(tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_text("\n\n")
    with pytest.raises(ValueError, match=r"list\.txt"):
        ImageSources(tmp_path / "list.txt")


@pytest.mark.parametrize("pattern", ["{a}", "{}", "a{1..}", "}{", "a{", "x"])
def test_braces_that_stand_for_nothing_are_part_of_a_name(pattern: str, tmp_path: Path) -> None:
    (tmp_path / f"{pattern}.png").touch()
    assert names(tmp_path / f"{pattern[:-1]}?.png") == [str(tmp_path / f"{pattern}.png")]


def test_braces_expand_as_in_bash(tmp_path: Path) -> None:
    write(tmp_path, *(f"{folder}{number}.png" for folder in ("a/", "b/") for number in ("00", "01", "02", "9")))
    folders, numbers = ("a", "b"), ("02", "01", "00", "9", "01")  # a name that comes out twice counts once
    wanted = dict.fromkeys(str(tmp_path / folder / f"{number}.png") for folder in folders for number in numbers)
    assert names(f"{tmp_path}/{{a,b}}/{{{{02..00}},9,01}}.png") == list(wanted)


# --- tars ---


@pytest.mark.parametrize(
    ("name", "mode"), [("t.tar", "w"), ("t.tar.gz", "w:gz"), ("T.TGZ", "w:gz"), ("t.tar.bz2", "w:bz2"), ("t.txz", "w:xz")]
)
def test_tar_gives_its_images_in_order(name: str, mode: str, tmp_path: Path) -> None:
    tar = make_tar(tmp_path / name, {**MEMBERS, "._0.jpg": b"fork"}, mode)
    assert list(ImageSources(tar)) == [(f"{tar}/{i}.jpg", MEMBERS[f"{i}.jpg"]) for i in range(4)]
    assert ImageSources([tar, write(tmp_path, "d/a.jpg")]).total is None


def test_tars_by_braces(tmp_path: Path) -> None:
    for i in range(3):
        make_tar(tmp_path / f"s-{i:03d}.tar", {"x.png": bytes([i])})
    assert [data for _, data in ImageSources(f"{tmp_path}/s-{{000..002}}.tar")] == [b"\0", b"\1", b"\2"]


@given(cut=st.integers(0, 40960))
@settings(max_examples=80, deadline=None)
def test_cut_tar_gives_what_is_whole_and_names_the_rest(cut: int, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.getbasetemp()
    whole = make_tar(folder / "whole.tar", MEMBERS).read_bytes()
    (folder / "cut.tar").write_bytes(whole[:cut])
    found = list(tar_images(folder / "cut.tar"))
    # A member takes a block of 512 bytes and 6 for its 3000 bytes, of which the last need not be whole; images are every other.
    images = sum(cut >= 2 * i * 3584 + 512 + 3000 for i in range(4))
    assert [name for name, data in found if isinstance(data, bytes)] == [f"{folder}/cut.tar/{i}.jpg" for i in range(images)]
    lost = [str(data) for _, data in found if isinstance(data, ImageError)]
    assert len(lost) == (cut < 8 * 3584 + 512), "unless its end marker has been reached"
    assert all("cut.tar: cannot be read on after" in text for text in lost)


def test_damaged_header_does_not_look_like_the_end(tmp_path: Path) -> None:
    data = bytearray(make_tar(tmp_path / "t.tar", MEMBERS).read_bytes())
    data[4 * 3584 + 10] ^= 255  # the header of 2.jpg
    (tmp_path / "t.tar").write_bytes(data)
    *images, (name, error) = tar_images(tmp_path / "t.tar")
    assert len(images) == 2
    assert name == str(tmp_path / "t.tar")
    assert isinstance(error, ImageError) and "after 1.json, what follows is lost" in str(error)


def test_cut_compressed_tar(tmp_path: Path) -> None:
    raw = gzip.compress(make_tar(tmp_path / "t.tar", {f"{i}.jpg": os.urandom(5000) for i in range(10)}).read_bytes())
    (tmp_path / "t.tar.gz").write_bytes(raw[: len(raw) // 2])
    *images, (_, error) = tar_images(tmp_path / "t.tar.gz")
    assert 3 <= len(images) <= 5
    assert isinstance(error, ImageError)


@pytest.mark.parametrize("content", [b"", b"no tar at all" * 100])
def test_what_is_no_tar_is_named(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "t.tar").write_bytes(content)
    ((name, error),) = ImageSources(tmp_path / "t.tar")
    assert name == str(tmp_path / "t.tar") and isinstance(error, ImageError)


def test_members_of_one_name_are_all_read_under_names_of_their_own(tmp_path: Path) -> None:
    tar = tar_of(
        tmp_path / "t.tar", [("a.jpg", b"1"), ("a.jpg (2)", b"x"), ("b.jpg", b"2"), ("a.jpg", b"3"), ("a.jpg", b"4"), ("\udcff.jpg", b"5")]
    )
    expected = {"a.jpg": b"1", "b.jpg": b"2", "a.jpg (2)": b"3", "a.jpg (3)": b"4", "\\xff.jpg": b"5"}
    assert dict(ImageSources(tar)) == {f"{tar}/{name}": data for name, data in expected.items()}
    assert dict(ImageSources(tar)) == dict(ImageSources(tar)), "in each run the same"


def test_a_member_that_is_too_large_costs_itself_alone(tmp_path: Path) -> None:
    tar = make_tar(tmp_path / "t.tar", {"a.jpg": bytes(10), "b.jpg": bytes(2**21), "c.jpg": bytes(20)})
    found = dict(ImageSources(tar, ImageLimits(max_bytes=2**20)))
    assert found[f"{tar}/a.jpg"] == bytes(10) and found[f"{tar}/c.jpg"] == bytes(20)
    assert isinstance(found[f"{tar}/b.jpg"], ImageError) and "2,097,152 bytes" in str(found[f"{tar}/b.jpg"])


@pytest.mark.parametrize("kind", [b"S", tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE, tarfile.REGTYPE])
def test_a_header_that_claims_terabytes_costs_neither_time_nor_memory(kind: bytes, tmp_path: Path) -> None:
    header = tarfile.TarInfo("a.jpg")
    header.size, header.type = 2**42, kind
    (tmp_path / "t.tar").write_bytes(
        make_tar(tmp_path / "u.tar", {"0.jpg": b"0"}).read_bytes()[:1024] + header.tobuf(tarfile.GNU_FORMAT) + bytes(4096)
    )
    tracemalloc.start()
    (_, first), *rest = ImageSources(tmp_path / "t.tar")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert first == b"0" and rest and all(not data or isinstance(data, ImageError) for _, data in rest) and peak < 2**24


@given(place=st.integers(0, 6000), value=st.integers(0, 255), cut=st.none() | st.integers(0, 9000))
@settings(max_examples=150, deadline=None)
def test_a_changed_byte_of_a_tar_ends_in_no_other_error(
    place: int, value: int, cut: int | None, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Headers have valid checksums, so that a change reaches the code behind: names, sizes, holes, further headers."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for name in ("a.jpg", "ü" * 60 + ".jpg", "c.json", "d.png"):
            header = tarfile.TarInfo(name)
            header.size, header.pax_headers = 600, {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.realsize": "900"}
            archive.addfile(header, io.BytesIO(b"3\n1\n2\n" * 100))
    data = bytearray(buffer.getvalue())
    data[place] = value
    for start in range(0, 6144, 512):
        header_bytes = data[start : start + 148] + b" " * 8 + data[start + 156 : start + 512]
        data[start + 148 : start + 156] = b"%06o\0 " % sum(header_bytes)
    file = tmp_path_factory.getbasetemp() / "changed.tar"
    file.write_bytes(data[:cut])
    assert all(isinstance(content, bytes | ImageError) for _, content in ImageSources(file))


def test_a_huge_member_without_use_is_not_decompressed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    members = {"0.jpg": b"first", "zeros.bin": bytes(2**20), "1.jpg": b"last"}
    plain, compressed = make_tar(tmp_path / "a.tar", members), make_tar(tmp_path / "a.tar.gz", members, "w:gz")
    assert [content for _, content in tar_images(compressed)] == [b"first", b"last"]
    monkeypatch.setattr("encoders.images.sources.MOST_SKIPPED", 2**19)
    assert [content for _, content in tar_images(plain)] == [b"first", b"last"]  # nothing is expanded
    (_, first), (name, error) = tar_images(compressed)
    assert first == b"first" and name == str(compressed) and "after 0.jpg" in str(error) and "1,048,576 bytes; unpack" in str(error)


def test_tar_without_images_is_named(tmp_path: Path) -> None:
    ((_, error),) = ImageSources(make_tar(tmp_path / "t.tar", {"a.json": b"{}"}))
    assert isinstance(error, ImageError) and "holds no images" in str(error)


def test_tar_is_never_whole_in_memory(tmp_path: Path) -> None:
    tar = make_tar(tmp_path / "t.tar", {f"{i}.jpg": bytes(2**20) for i in range(32)} | {"movie.mp4": bytes(2**25)})
    tracemalloc.start()
    assert sum(len(data) for _, data in ImageSources(tar) if isinstance(data, bytes)) == 32 * 2**20
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 5 * 2**20


@given(data=st.binary(max_size=100))
def test_content_key(data: bytes) -> None:
    assert content_key(data) == hashlib.sha256(data).digest()[:16].hex()
