"""Which files are opened as images: no pipes, devices and giants, no formats that start programs, no bytes of a file in its error."""

from __future__ import annotations

import ast
import base64
import os
import re
import struct
import threading
import zlib
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFile
from support.pictures import encoded

from encoders import ImageError, read_image
from encoders.images.opening import ImageLimits, inside, open_image, read_address, read_file, suffixes

ROOT = Path(__file__).parents[2]
RED = Image.new("RGB", (40, 30), "red")
EPS = encoded(RED, "EPS")


# --- files ---


@pytest.mark.parametrize("kind", ["pipe", "device", "link to a device", "holes", "folder", "link to nowhere"])
def test_what_is_no_regular_file_of_a_sane_size_is_refused_at_once(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "x.jpg"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path = Path("/dev/zero")
    elif kind == "link to a device":
        path.symlink_to("/dev/zero")
    elif kind == "holes":
        with path.open("wb") as file:
            file.truncate(30 * 2**30)
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to(tmp_path / "nowhere")
    with pytest.raises(ImageError, match=str(path)):
        read_image(path)


def test_tiles_of_a_small_tiff_are_limited() -> None:
    """A kilobyte can ask libtiff for a tile of gigabytes, whatever the size of the image."""
    data = zlib.compress(bytes(2**20))
    tags = {256: 16, 257: 16, 258: 8, 259: 8, 262: 1, 277: 1, 322: 40_000, 323: 40_000, 324: 134, 325: len(data)}  # 324: after the tags
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    tiled = struct.pack("<2sHIH", b"II", 42, 8, len(tags)) + entries + bytes(4) + data
    with pytest.raises(ImageError, match=r"x\.tiff: its tiles of 1,600,000,000 pixels are more than the allowed"):
        read_image(tiled, name="x.tiff")


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads every file")
def test_a_file_without_permission_is_named(tmp_path: Path) -> None:
    RED.save(tmp_path / "x.png")
    (tmp_path / "x.png").chmod(0)
    with pytest.raises(ImageError, match="x.png: .*Permission"):
        read_image(tmp_path / "x.png")


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="counts the open files of Linux")
def test_refused_files_are_closed(tmp_path: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    for path in [tmp_path, Path("/dev/zero"), tmp_path / "no"] * 5:
        with pytest.raises(ImageError):
            read_file(path)
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_file_that_holds_more_than_its_size_says_is_not_read_on(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ImageError, match="/proc/self/maps"):  # its size is 0 for the system
        read_file("/proc/self/maps", ImageLimits(max_bytes=100))


# --- limits ---


def test_limits_of_bytes_and_pixels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    RED.save(tmp_path / "x.png")
    size = (tmp_path / "x.png").stat().st_size
    for limits in (ImageLimits(max_bytes=size - 1), ImageLimits(max_pixels=40 * 30 - 1)):
        for source in (tmp_path / "x.png", (tmp_path / "x.png").read_bytes(), Image.open(tmp_path / "x.png")):
            if not isinstance(source, Image.Image) or limits.max_pixels < 40 * 30:
                allowed = min(limits.max_bytes, limits.max_pixels)
                with pytest.raises(ImageError, match=f" {allowed:,};"):
                    read_image(source, limits=limits)
    assert read_image(tmp_path / "x.png", limits=ImageLimits(size, 40 * 30)).size == (40, 30)
    monkeypatch.setenv("MOF_MAX_IMAGE_PIXELS", "1199")
    with pytest.raises(ImageError, match="40 x 30 pixels.*1,199"):
        read_image(tmp_path / "x.png")
    monkeypatch.setenv("MOF_MAX_IMAGE_PIXELS", "many")
    with pytest.raises(ValueError, match="MOF_MAX_IMAGE_PIXELS .*'many'"):
        read_image(tmp_path / "x.png")
    with pytest.raises(ValueError, match=r"\b0 bytes"):
        ImageLimits(max_bytes=0, max_pixels=1)


def test_a_small_file_of_many_pixels_is_refused_by_default_and_read_on_demand(monkeypatch: pytest.MonkeyPatch) -> None:
    content = encoded(Image.new("1", (13_000, 13_000)), "PNG")
    with pytest.raises(ImageError, match="13000 x 13000 pixels"):
        read_image(content)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 80_000_000)  # below half of them, Pillow refuses itself
    with open_image(content, "large", ImageLimits(max_pixels=170_000_000)) as image:
        assert image.size == (13_000, 13_000)


# --- formats ---


@pytest.mark.parametrize("name", ["x.eps", "x.png", "x.jpg"])
def test_no_format_that_starts_a_program_is_opened(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / name).write_bytes(EPS)
    monkeypatch.setattr("PIL.EpsImagePlugin.Ghostscript", lambda *_, **__: pytest.fail("a program is started"))
    with pytest.raises(ImageError, match=f"{name}: .*format EPS"):
        read_image(tmp_path / name)
    with pytest.raises(ImageError, match="EPS"), Image.open(tmp_path / name) as opened:
        read_image(opened)


@pytest.mark.parametrize(
    ("suffix", "format"),
    [
        *[("jp2", "JPEG2000"), ("tga", "TGA"), ("jpe", "JPEG"), ("ico", "ICO"), ("pcx", "PCX"), ("sgi", "SGI"), ("dib", "DIB")],
        *[
            ("pbm", "PPM"),
            ("qoi", "QOI"),
            ("tiff", "TIFF"),
            ("webp", "WEBP"),
            ("avif", "AVIF"),
            ("mpo", "MPO"),
            ("bmp", "BMP"),
            ("apng", "PNG"),
        ],
    ],
)
def test_formats_of_pillow_are_read(suffix: str, format: str) -> None:
    assert f".{suffix}" in suffixes()
    image = read_image(encoded(Image.new("RGB", (32, 32), "red"), format), name=f"x.{suffix}")
    assert image.size == (32, 32)
    if format != "PPM":
        assert max(abs(a - b) for a, b in zip(image.getpixel((9, 9)), (255, 0, 0), strict=True)) < 6  # type: ignore[arg-type]


def test_formats_of_plug_ins_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    class Plain(ImageFile.ImageFile):
        format = "PLAIN"

        def _open(self) -> None:
            self.fp.seek(5)
            self._size, self._mode = struct.unpack(">HH", self.fp.read(4)), "L"
            self.tile = [ImageFile._Tile("raw", (0, 0, *self._size), 9, ("L", 0, 1))]

    for table in ("ID", "OPEN", "EXTENSION"):
        monkeypatch.setattr(Image, table, getattr(Image, table).copy())
    Image.register_open("PLAIN", Plain, lambda start: start.startswith(b"PLAIN"))
    Image.register_extension("PLAIN", ".plain")
    assert ".plain" in suffixes()
    assert read_image(b"PLAIN\0\3\0\2" + bytes(range(6))).getpixel((2, 1)) == (5, 5, 5)


def test_heic_without_its_plug_in_says_what_to_install() -> None:
    assert {".heic", ".heif"} <= suffixes()
    with pytest.raises(ImageError, match="pip install pillow-heif"):
        read_image(b"\0\0\0\x18ftypheic" + bytes(40), name="x.heic")


def test_no_other_module_opens_images() -> None:
    """Limits and formats hold wherever an image may come from."""
    openers = set()
    for path in (path for package in ("encoders", "mof", "vig", "recipes") for path in (ROOT / package).rglob("*.py")):
        calls = {ast.unparse(node.func) for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)}
        openers |= {str(path.relative_to(ROOT)) for call in calls if call in ("Image.open", "PIL.Image.open", "load_image", "decode_image")}
    assert openers == {"encoders/images/opening.py"}


# --- errors ---


@given(
    prefix=st.sampled_from(
        [b"", b"P1 ", b"P3\n", b"P6 ", b"Pf\n", b"BM", b"GIF89a", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"II*\0", b"qoif"]
    )
)
@settings(max_examples=40, deadline=None)
def test_errors_show_no_bytes_of_a_file(prefix: bytes) -> None:
    with pytest.raises(ImageError) as error:
        read_image(prefix + b"correct-horse battery staple " * 40, name="x.png")
    assert "horse" not in str(error.value) and "battery" not in str(error.value)


# --- paths and addresses ---


@pytest.mark.parametrize("path", ["/etc/passwd", "../x.png", "a/../../x.png", "/imagesX/a.png", "a/../../images2/x.png"])
def test_paths_that_lead_out_of_the_folder_are_refused(path: str, tmp_path: Path) -> None:
    with pytest.raises(ImageError, match=re.escape(repr(path))):
        inside(tmp_path / "images", path)


def test_paths_inside_the_folder_and_any_path_under_the_root() -> None:
    assert inside("images", "a/../b.png") == "images/a/../b.png"
    assert inside("/data", "/data/a.png") == "/data/a.png" and inside("/", "/etc/x.png") == "/etc/x.png"


def test_addresses() -> None:
    content = encoded(RED, "PNG")

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200 if self.path == "/red.png" else 404)
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    try:
        assert read_address(f"{address}/red.png") == content
        with pytest.raises(ImageError, match="/blue.png"):
            read_address(f"{address}/blue.png")
        with pytest.raises(ImageError, match=r"/red\.png.*\b10\b"):
            read_address(f"{address}/red.png", ImageLimits(max_bytes=10))
    finally:
        server.shutdown()
        server.server_close()
    assert read_address(f"data:image/png;base64,{base64.b64encode(content).decode()}") == content
    with pytest.raises(ImageError, match="file:///etc/hostname"):
        read_address("file:///etc/hostname")
    with pytest.raises(ImageError) as error:
        read_address("data:image/png;base64," + "A" * 10_001)
    assert len(str(error.value)) < 300
