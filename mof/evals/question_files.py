"""These functions read `Questions.csv` and image folders of MMVP and MMVP-VLM. Two rows are a pair: an odd id and the next id."""

from __future__ import annotations

import csv
import io
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from encoders.csv_cells import plain_cell
from encoders.text_files import parse_json, read_utf8

SUFFIXES = (".jpg", ".jpeg", ".png", ".JPG")


def read_rows(file: Path) -> list[list[str]]:
    """Return the rows of a CSV file that are not empty. ValueError for any other file."""
    lines = io.StringIO(read_utf8(file), newline="")
    try:
        return [[plain_cell(cell) for cell in row] for row in csv.reader(lines) if any(cell.strip() for cell in row)]
    except csv.Error as error:
        raise ValueError(f"{file}: cannot be read as CSV ({error})") from None


def read_patterns(file: Path) -> dict[str, str]:
    """Return id -> pattern from a .json object or a .csv of ids and patterns. ValueError for any other file."""
    if file.suffix == ".json":
        mapping = parse_json(read_utf8(file), file, unique=True)
        if not isinstance(mapping, dict) or not all(isinstance(pattern, str) for pattern in mapping.values()):
            raise ValueError(f"{file}: expected an object of ids and patterns")
        return mapping
    rows = read_rows(file)
    if any(len(row) < 2 for row in rows):
        raise ValueError(f"{file}: expected an id and a pattern in each row")
    return {row[0].strip(): row[1].strip() for row in rows}


def find_files(folder: Path, benchmark: str, image_folders: Sequence[str], images: bool = True) -> tuple[Path, Path | None]:
    """Return the folder's `Questions.csv` and its image folder, which may lack if `images` is False.

    Raises:
        ValueError: for a folder that is not the benchmark's.
    """
    questions = folder / "Questions.csv"
    place = next((folder / name for name in image_folders if (folder / name).is_dir()), None)
    if not questions.is_file() or (images and place is None):
        wanted = f" and an image folder called {' or '.join(image_folders)}" if images else ""
        raise ValueError(f"{folder} is not {benchmark}: expected Questions.csv{wanted}")
    return questions, place


def find_image(questions: Path, id: int, folders: Sequence[Path]) -> Path:
    """Return the image of a row, which lies in one of the folders. ValueError if there is none."""
    places = [folder / f"{id}{suffix}" for folder in folders for suffix in SUFFIXES]
    image = next((place for place in places if place.is_file()), None)
    if image is None:
        raise ValueError(f"{questions}: row {id} has no image; expected {places[0]}")
    return image


def check_pairs(questions: Path, rows: Sequence[tuple[int, str | None]]) -> None:
    """Raise ValueError unless these (id, pattern) are pairs."""
    if not rows or len(rows) % 2:
        raise ValueError(f"{questions} has {len(rows)} rows; rows come in pairs")
    for (first, pattern), (second, next_pattern) in zip(rows[0::2], rows[1::2], strict=True):
        if first % 2 == 0 or second != first + 1 or pattern != next_pattern:
            raise ValueError(
                f"{questions}: rows {first} ({pattern}) and {second} ({next_pattern}) are no pair; expected an odd id, then the next "
                "one, of the same pattern"
            )
    id, count = Counter(id for id, _ in rows).most_common(1)[0]
    if count > 1:
        raise ValueError(f"{questions}: the index {id} stands twice")
