"""Reading images in every state that files come in, fitting them to a square, and VIG's blur."""

from __future__ import annotations

import io
import pickle
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps
from support.pictures import encoded
from torchvision.transforms import CenterCrop, InterpolationMode, Resize
from torchvision.transforms.functional import gaussian_blur, pil_to_tensor, to_pil_image

from encoders import ImageError, read_image
from encoders.images.reading import blur
from encoders.images.resizing import to_pixels

SIZES = st.integers(1, 40)


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def smooth(width: int, height: int) -> Image.Image:
    """A photo-like image: noise without the highest frequencies."""
    return noise(7, 5).resize((width, height), Image.Resampling.BICUBIC)


# --- read_image ---


def test_grey_with_premultiplied_transparency() -> None:
    grey = Image.new("LA", (2, 1), (100, 255))
    grey.putpixel((1, 0), (100, 0))
    assert list(read_image(grey.convert("La")).get_flattened_data()) == [(100, 100, 100), (255, 255, 255)]


@pytest.mark.parametrize("mode", ["RGB", "L", "1", "P", "CMYK", "RGBA", "LA", "I;16", "YCbCr"])
@pytest.mark.parametrize("size", [(1, 1), (5, 3)])
def test_every_mode_becomes_rgb_of_the_same_size(mode: str, size: tuple[int, int], tmp_path: Path) -> None:
    source = Image.new("I;16", size, 1000) if mode == "I;16" else noise(*size).convert(mode)
    path = tmp_path / ("image.tiff" if mode in ("CMYK", "YCbCr", "LA") else "image.png")
    source.save(path)
    image = read_image(path)
    assert (image.mode, image.size) == ("RGB", size)


def test_content_is_read_as_the_file_is(tmp_path: Path) -> None:
    content = encoded(smooth(30, 20), "JPEG")
    (tmp_path / "image.jpg").write_bytes(content)
    assert np.array_equal(read_image(content), read_image(tmp_path / "image.jpg"))
    with pytest.raises(ImageError, match="tar/17.jpg"):
        read_image(content[:100], name="tar/17.jpg")
    with pytest.raises(ImageError, match="100 bytes"):
        read_image(content[:100])


def test_plain_rgb_is_read_exactly(tmp_path: Path) -> None:
    noise(9, 7).save(tmp_path / "image.png")
    assert np.array_equal(read_image(tmp_path / "image.png"), noise(9, 7))
    assert np.array_equal(read_image(str(tmp_path / "image.png")), noise(9, 7))
    assert np.array_equal(read_image(noise(9, 7)), noise(9, 7))


def lying(upright: np.ndarray, orientation: int) -> np.ndarray:
    """EXIF: where row 0 and column 0 of the stored image are in the upright one."""
    turn = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: np.rot90(upright, 1),
        7: upright[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(upright, -1),
    }
    return np.ascontiguousarray(turn[orientation])


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation_is_applied(orientation: int, tmp_path: Path) -> None:
    upright = np.zeros((4, 6, 3), np.uint8)
    upright[0, 0] = 255  # a mark in the upper left corner
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(lying(upright, orientation)).save(tmp_path / "image.png", exif=exif)
    image = read_image(tmp_path / "image.png")
    assert np.array_equal(image, upright)
    assert np.array_equal(read_image(image), upright)  # turned once, not again


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation_of_a_jpeg(orientation: int) -> None:
    upright = np.asarray(smooth(48, 32))
    exif = Image.Exif()
    exif[0x0112] = orientation
    content = encoded(Image.fromarray(lying(upright, orientation)), "JPEG", quality=95, exif=exif)
    got = np.asarray(read_image(content))
    assert got.shape == upright.shape
    assert np.abs(got.astype(int) - upright).mean() < 4  # a wrong turn is off by tens


def test_rotated_palette_keeps_its_transparency() -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 40, 50, 60])
    image.putdata([0, 1])
    exif = Image.Exif()
    exif[0x0112] = 6
    got = np.asarray(read_image(encoded(image, "PNG", transparency=0, exif=exif)))
    assert got.tolist() == [[[255, 255, 255]], [[40, 50, 60]]]


def test_damaged_exif_leaves_the_pixels() -> None:
    content = encoded(smooth(48, 32), "JPEG")
    damaged = content[:2] + b"\xff\xe1\x00\x10Exif\x00\x00not TIFF" + content[2:]
    assert np.array_equal(read_image(damaged), read_image(content))


def test_transparency_lies_over_white(tmp_path: Path) -> None:
    pixels = np.array([[[255, 0, 0, 0], [255, 0, 0, 255], [0, 0, 0, 51]]], np.uint8)
    Image.fromarray(pixels).save(tmp_path / "image.png")
    assert np.asarray(read_image(tmp_path / "image.png")).tolist() == [[[255, 255, 255], [255, 0, 0], [204, 204, 204]]]


def test_transparent_palette_colour_lies_over_white(tmp_path: Path) -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 40, 50, 60])
    image.putdata([0, 1])
    image.save(tmp_path / "image.gif", transparency=0)
    assert np.asarray(read_image(tmp_path / "image.gif")).tolist() == [[[255, 255, 255], [40, 50, 60]]]


def test_16_bit_grey_is_scaled_not_clipped(tmp_path: Path) -> None:
    Image.fromarray(np.array([[0, 255, 32768, 65535]], np.uint16)).save(tmp_path / "image.png")
    assert np.asarray(read_image(tmp_path / "image.png"))[0, :, 0].tolist() == [0, 1, 128, 255]
    assert np.asarray(read_image(Image.fromarray(np.array([[0, 65535]], np.int32))))[0, :, 0].tolist() == [0, 255]


GREY = np.array([[0, 1, 100, 200], [255, 40, 7, 128]], np.uint8)
WIDE = {
    "uint16": GREY.astype(np.uint16) * 257,
    "float of 0 to 1": (GREY / 255).astype(np.float32),
    "float of 0 to 255": GREY.astype(np.float32),
    "float of 0 to 65535": (GREY * 257.0).astype(np.float32),
    "int32 of 0 to 255": GREY.astype(np.int32),
    "int32 of 0 to 65535": GREY.astype(np.int32) * 257,
    "int32 of 0 to 2^31": GREY.astype(np.int32) * (2**31 // 255),
    "noise below black": np.where(GREY == 0, -0.01, GREY / 255).astype(np.float32),
    "noise above white": np.where(GREY == 255, 1.0001, GREY / 255).astype(np.float32),
    "overshoot of a resize": np.where(GREY == 255, 1.2, np.where(GREY == 0, -0.2, GREY / 255)).astype(np.float32),
}


@pytest.mark.parametrize("form", ["open", "TIFF"])
@pytest.mark.parametrize("kind", WIDE)
def test_wide_grey_keeps_its_values(kind: str, form: str) -> None:
    image = Image.fromarray(WIDE[kind])
    assert np.array_equal(np.asarray(read_image(image if form == "open" else encoded(image, form)))[..., 1], GREY)


def test_missing_pixels_of_floats_are_white_and_the_others_stay() -> None:
    pixels = (GREY / 255).astype(np.float32)
    pixels[0, 0], pixels[0, 1], pixels[1, 1] = np.nan, np.inf, -np.inf
    got = np.asarray(read_image(Image.fromarray(pixels)))[..., 0]
    assert got.tolist() == [[255, 255, 100, 200], [255, 0, 7, 128]]


@pytest.mark.parametrize(
    ("pixels", "message"),
    [([[-1.0, 1.0]], "from -1 to 1; expected 0 to 1, 255"), ([[0, 1e20]], "to 1e"), ([[np.nan, np.nan]], "none .* finite")],
)
def test_floats_of_another_range_are_refused(pixels: list[list[float]], message: str) -> None:
    with pytest.raises(ImageError, match=f"depth.tiff: .*{message}"):
        read_image(encoded(Image.fromarray(np.array(pixels, np.float32)), "TIFF"), name="depth.tiff")


def test_dark_16_bit_files_stay_dark() -> None:
    """Their format says which value is white."""
    dark = np.array([[0, 100, 200]], np.uint16)
    assert np.asarray(read_image(encoded(Image.fromarray(dark), "PNG"))).max() == 1
    assert np.asarray(read_image(b"P5 3 1 65535\n" + dark.astype(">u2").tobytes())).max() == 1


def test_an_image_that_was_turned_by_hand_is_not_turned_again() -> None:
    upright = np.asarray(noise(6, 4))
    exif = Image.Exif()
    exif[0x0112] = 6
    opened = Image.open(io.BytesIO(encoded(Image.fromarray(lying(upright, 6)), "PNG", exif=exif)))
    by_hand = (opened.transpose(Image.Transpose.ROTATE_270), opened.rotate(-90, expand=True), ImageOps.exif_transpose(opened))
    for image in (opened, *by_hand, by_hand[0].copy(), by_hand[0].convert("RGBA")):
        assert np.array_equal(read_image(image), upright)


@pytest.mark.parametrize("format", ["GIF", "WEBP", "PNG", "TIFF"])
def test_first_frame_of_an_animation(format: str) -> None:
    frames = [Image.new("RGB", (16, 16), colour) for colour in ("red", "lime")]
    options = {"lossless": True} if format == "WEBP" else {}
    content = encoded(frames[0], format, save_all=True, append_images=frames[1:], **options)
    assert np.asarray(read_image(content))[8, 8].tolist() == [255, 0, 0]


def png_of_16_bit(pixels: np.ndarray) -> bytes:
    """[H, W, C] -> a PNG of 16 bits per channel, which Pillow reads but cannot write."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    height, width, channels = pixels.shape
    kind = {1: 0, 2: 4, 3: 2, 4: 6}[channels]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    header = struct.pack(">IIBBBBB", width, height, 16, kind, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_16_bit_png_of_every_kind(channels: int) -> None:
    pixels = np.random.default_rng(0).integers(0, 65536, (5, 7, channels))
    scaled = pixels / 257
    if channels in (2, 4):
        alpha = scaled[..., -1:] / 255
        scaled = scaled[..., :-1] * alpha + 255 * (1 - alpha)
    assert np.abs(np.asarray(read_image(png_of_16_bit(pixels))) - scaled).max() <= 2


@pytest.mark.parametrize("kind", ["L", "CMYK", "progressive", "4:4:4", "one row", "one column", "MPO", "restart markers"])
def test_jpegs_of_every_kind_are_what_pillow_reads(kind: str) -> None:
    image = smooth({"one row": (50, 1), "one column": (1, 50)}.get(kind, (50, 34))[0], 1 if kind == "one row" else 34)
    options: dict = {"progressive": {"progressive": True}, "4:4:4": {"subsampling": 0}, "restart markers": {"restart_marker_rows": 1}}.get(
        kind, {}
    )
    if kind in ("L", "CMYK"):
        image = image.convert(kind)
    if kind == "MPO":
        content = encoded(image, "MPO", save_all=True, append_images=[noise(50, 34)])
    else:
        content = encoded(image, "JPEG", **options)
    assert np.array_equal(read_image(content), Image.open(io.BytesIO(content)).convert("RGB"))


def test_cmyk_jpeg_has_the_colours_that_went_in() -> None:
    """Adobe's programs, and Pillow, store CMYK inverted in a JPEG."""
    content = encoded(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "JPEG", quality=95)
    assert np.abs(np.asarray(read_image(content)).astype(int) - [255, 0, 0]).max() <= 3


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"no image at all",
        b"<!DOCTYPE html><html>404</html>",
        encoded(noise(64, 64), "JPEG")[:2000],
        encoded(noise(64, 64), "PNG")[:2000],
        encoded(noise(64, 64), "PNG")[:40],
        encoded(noise(64, 64), "JPEG")[:10],
        b"GIF89a\x01\x00\x01\x00",
    ],
    ids=["empty", "text", "html", "half a jpeg", "half a png", "png header", "jpeg header", "gif header"],
)
def test_broken_files_are_named(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "broken-17.jpg"
    path.write_bytes(content)
    with pytest.raises(ImageError, match=r"broken-17\.jpg"):
        read_image(path)


def test_missing_file_and_folder_are_named(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match="nowhere.png"):
        read_image(tmp_path / "nowhere.png")
    with pytest.raises(ImageError, match=tmp_path.name):
        read_image(tmp_path)


def test_decompression_bomb_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    noise(64, 64).save(tmp_path / "bomb.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(ImageError, match="bomb.png"):
        read_image(tmp_path / "bomb.png")


def test_jpeg_that_claims_billions_of_pixels_is_refused() -> None:
    content = bytearray(encoded(noise(64, 64), "JPEG"))
    frame = content.index(b"\xff\xc0")
    content[frame + 5 : frame + 9] = b"\xff\xdc\xff\xdc"  # height and width
    with pytest.raises(ImageError, match="bomb.jpg: .*DecompressionBomb"):
        read_image(bytes(content), name="bomb.jpg")


def test_image_without_pixels_is_refused() -> None:
    with pytest.raises(ImageError, match="0x3"):
        read_image(Image.new("RGB", (0, 3)))


def test_image_error_survives_a_worker_process() -> None:
    assert str(pickle.loads(pickle.dumps(ImageError("a.jpg: broken")))) == "a.jpg: broken"


@given(width=SIZES, height=SIZES, mode=st.sampled_from(["RGB", "L", "P", "RGBA", "CMYK", "1"]))
@settings(max_examples=30, deadline=None)
def test_any_size_and_mode_is_read(width: int, height: int, mode: str) -> None:
    image = read_image(noise(width, height).convert(mode))
    assert (image.mode, image.size) == ("RGB", (width, height))


# --- to_pixels ---


@given(width=SIZES, height=SIZES, size=st.integers(1, 50), fit=st.sampled_from(["pad", "crop", "squash"]))
@settings(max_examples=60, deadline=None)
def test_any_image_fits_any_square(width: int, height: int, size: int, fit: str) -> None:
    pixels = to_pixels(noise(width, height), size, fit)  # type: ignore[arg-type]
    assert (pixels.dtype, pixels.shape) == (torch.uint8, (3, size, size))
    assert pixels.is_contiguous()


@pytest.mark.parametrize("size", [(50, 30), (30, 50), (40, 40), (97, 31), (31, 97)])
def test_pad_is_the_square_canvas_of_llava(size: tuple[int, int]) -> None:
    image, background = smooth(*size), (122, 116, 104)
    side = max(size)
    canvas = Image.new("RGB", (side, side), background)
    canvas.paste(image, ((side - size[0]) // 2, (side - size[1]) // 2))
    expected = pil_to_tensor(canvas.resize((28, 28), Image.Resampling.BICUBIC)).int()
    # Wide images agree exactly; tall ones up to the rounding between the two passes of Pillow's resize.
    assert (to_pixels(image, 28, "pad", background).int() - expected).abs().max() <= (0 if size[0] >= size[1] else 1)


@pytest.mark.parametrize("size", [(50, 30), (30, 50), (40, 40), (97, 31), (31, 97), (20, 640)])
def test_crop_is_resize_and_center_crop(size: tuple[int, int]) -> None:
    image = smooth(*size)
    expected = CenterCrop(28)(Resize(28, InterpolationMode.BICUBIC)(image))
    assert (to_pixels(image, 28, "crop").int() - pil_to_tensor(expected).int()).abs().max() <= 1


def test_long_strip_needs_no_square_canvas() -> None:
    assert to_pixels(Image.new("RGB", (200_000, 2)), 24, "pad").shape == (3, 24, 24)
    assert to_pixels(Image.new("RGB", (2, 200_000)), 24, "pad").shape == (3, 24, 24)
    assert to_pixels(Image.new("RGB", (200_000, 2)), 24, "crop").shape == (3, 24, 24)


def test_squash_and_identity() -> None:
    image = smooth(50, 30)
    expected = pil_to_tensor(image.resize((28, 28), Image.Resampling.BICUBIC))
    assert torch.equal(to_pixels(image, 28, "squash"), expected)
    square = noise(28, 28)
    for fit in ("pad", "crop", "squash"):
        assert torch.equal(to_pixels(square, 28, fit), pil_to_tensor(square))  # type: ignore[arg-type]


def test_to_pixels_refuses_nonsense() -> None:
    with pytest.raises(ValueError, match="'stretch'"):
        to_pixels(noise(4, 4), 8, "stretch")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="0"):
        to_pixels(noise(4, 4), 0)
    with pytest.raises(ValueError, match="'L'"):
        to_pixels(noise(4, 4).convert("L"), 8)


# --- blur ---


def brute_force_blur(image: Image.Image, kernel: int) -> np.ndarray:
    """The definition: for each pixel the Gaussian-weighted mean of its k x k neighbours, mirrored at the borders."""
    pixels = np.asarray(image).astype(np.float64)
    height, width = pixels.shape[:2]
    down, right = (min(kernel // 2, length - 1) for length in (height, width))
    weight = {offset: np.exp(-0.5 * (offset / (kernel - 1)) ** 2) for offset in range(-kernel, kernel + 1)}

    def mirror(index: int, length: int) -> int:
        index = abs(index)
        return index if index < length else 2 * (length - 1) - index

    out = np.zeros_like(pixels)
    total = sum(weight[dy] * weight[dx] for dy in range(-down, down + 1) for dx in range(-right, right + 1))
    for y in range(height):
        for x in range(width):
            for dy in range(-down, down + 1):
                for dx in range(-right, right + 1):
                    neighbour = pixels[mirror(y + dy, height), mirror(x + dx, width)]
                    out[y, x] += weight[dy] * weight[dx] * neighbour / total
    return out


@pytest.mark.parametrize("size", [(6, 4), (4, 6), (1, 1), (1, 5), (5, 1)])
def test_blur_equals_brute_force_where_the_kernel_is_cut(size: tuple[int, int]) -> None:
    expected = brute_force_blur(noise(*size), 101)
    assert np.abs(np.asarray(blur(noise(*size))) - expected).max() <= 0.5 + 1e-3


def test_blur_equals_torchvision() -> None:
    image = smooth(120, 60).point(lambda value: 255 * (value > 127))  # hard edges show the width of the kernel
    expected = gaussian_blur(pil_to_tensor(image).float(), [101, 101], [100.0, 100.0])
    got = pil_to_tensor(blur(image)).float()
    assert (got - expected).abs().max() <= 0.5 + 1e-2  # rounded to uint8
    assert (got == expected.round()).float().mean() > 0.999


@pytest.mark.parametrize(("width", "kernel"), [(499, 101), (500, 201), (799, 201), (800, 301), (1999, 301), (2000, 501)])
def test_blur_takes_the_kernel_of_that_width(width: int, kernel: int) -> None:
    image, reach = noise(width, 260), kernel // 2
    weight = np.exp(-0.5 * (np.arange(-reach, reach + 1) / (kernel - 1)) ** 2)
    padded = np.pad(np.asarray(image)[..., 0].astype(np.float64), reach, mode="reflect")  # the red channel
    expected = np.stack([np.convolve(row, weight / weight.sum(), "valid") for row in padded])
    expected = np.stack([np.convolve(column, weight / weight.sum(), "valid") for column in expected.T]).T
    assert np.abs(np.asarray(blur(image))[..., 0] - expected).max() <= 0.5 + 1e-2


def test_blur_leaves_a_plain_image_and_takes_the_detail_away() -> None:
    plain = to_pil_image(torch.full((3, 70, 90), 128, dtype=torch.uint8))
    assert np.array_equal(blur(plain), plain)
    assert np.asarray(blur(noise(90, 70))).std() < 5 < 60 < np.asarray(noise(90, 70)).std()
