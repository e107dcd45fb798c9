"""These functions write MMVP and MMVP-VLM folders in their released layouts, from pairs of images that were described."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from encoders import read_image
from encoders.csv_cells import write_csv
from encoders.images.opening import read_file
from encoders.saved_folders import DIGESTS, record
from mof.evals.mmvp import IMAGE_FOLDERS as MMVP_IMAGES
from mof.evals.mmvp_vlm import IMAGE_FOLDERS as MMVP_VLM_IMAGES
from mof.evals.option_matching import parse_options
from mof.evals.patterns import PATTERNS

JPEG_QUALITY = 100  # with full colour resolution, for images that are not JPEG files

JPEG_START = b"\xff\xd8\xff"

ImageOrFile = Path | Image.Image


@dataclass(frozen=True)
class DescribedPair:
    """DescribedPair holds two images that differ in a visual pattern, and a description of the difference."""

    pattern: str
    """One of `mof.evals.patterns.PATTERNS`."""
    images: tuple[ImageOrFile, ImageOrFile]
    statements: tuple[str, str]
    """For each image a statement that is true of it and not of the other image."""
    question: str
    options: tuple[str, str]
    """Answers (a) and (b)."""
    right: tuple[str, str]
    """For each image the letter of the right option: "a", "b" or "b", "a"."""

    @property
    def options_text(self) -> str:
        return options_text(self.options)


def options_text(options: tuple[str, str]) -> str:
    """Return the options as MMVP spells them: "(a) Open (b) Closed"."""
    return f"(a) {options[0]} (b) {options[1]}"


def options_problem(options: tuple[str, str]) -> str | None:
    """Return why the options cannot be read back from their line; None if they can."""
    try:
        parsed = parse_options(options_text(options))
    except ValueError as error:
        return str(error)
    return None if tuple(parsed.values()) == options else f"options that hold a letter in brackets cannot be read back: {options}"


def write_mmvp(folder: Path, pairs: Iterable[DescribedPair], suffix: str = ".jpg") -> None:
    """Write `Questions.csv` and `MMVP Images/{n}.jpg`; rows 2k-1 and 2k are pair k.

    The columns are MMVP's (`lndex` is its spelling), then `Category` and `Corrected Answer`. The latter equals the answer, so that
    readers do not apply corrections of the original file to these rows.

    Args:
        suffix: ".png" keeps the pixels of images that are no JPEG; `read_mmvp` takes either, the released script ".jpg" only.
    """
    place = folder / MMVP_IMAGES[0]
    place.mkdir(parents=True, exist_ok=True)
    rows = []
    for number, (pair, k) in enumerate(_images(pairs), start=1):
        save_image(pair.images[k], place / f"{number}{suffix}")
        answer = f"({pair.right[k]})"
        rows.append((number, pair.question, pair.options_text, answer, pair.pattern, answer))
    header = ("lndex", "Question", "Options", "Correct Answer", "Category", "Corrected Answer")
    write_csv(folder / "Questions.csv", [header, *rows])
    _record(folder)


def write_mmvp_vlm(folder: Path, pairs: Sequence[DescribedPair]) -> None:
    """Write `Questions.csv` and `MLLM_VLM Images/<Type>/<id>.jpg`, with the patterns in their official order."""
    order = list(PATTERNS)
    ordered = sorted(pairs, key=lambda pair: order.index(pair.pattern))
    rows = []
    for number, (pair, k) in enumerate(_images(ordered), start=1):
        place = folder / MMVP_VLM_IMAGES[0] / pair.pattern
        place.mkdir(parents=True, exist_ok=True)
        save_image(pair.images[k], place / f"{number}.jpg")
        rows.append((number, pair.pattern, pair.statements[k]))
    write_csv(folder / "Questions.csv", [("Question ID", "Type", "Statement"), *rows])
    _record(folder)


def _record(folder: Path) -> None:
    """Record the digests of all files, which `mof.evals.question_files.find_files` compares."""
    record(folder, [str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file() and file.name != DIGESTS])


def save_image(image: ImageOrFile, file: Path) -> None:
    """Write an image. A JPEG file is copied byte by byte into a .jpg; other images are encoded.

    Raises:
        ImageError: for an image that cannot be read.
    """
    if file.suffix == ".png":
        read_image(image).save(file)
    elif isinstance(image, Path) and (content := read_file(image)).startswith(JPEG_START):
        file.write_bytes(content)
    else:
        read_image(image).save(file, "JPEG", quality=JPEG_QUALITY, subsampling=0)


def _images(pairs: Iterable[DescribedPair]) -> Iterable[tuple[DescribedPair, int]]:
    return ((pair, k) for pair in pairs for k in (0, 1))
