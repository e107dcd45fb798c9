"""The pairs that `mof blind-pairs` wrote into a folder."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq

FILES = ("pairs.parquet", "pairs.csv")
NUMBERS = ("clip_similarity", "dino_similarity", "gap")
COLUMNS = ("image_i", "image_j", *NUMBERS)


@dataclass(frozen=True)
class Pair:
    """One row."""

    names: tuple[str, str]
    """The images' paths as the table spells them: what the pair goes by."""
    clip_similarity: float
    dino_similarity: float
    gap: float


class PairTable:
    """The rows of `pairs.parquet`, or of `pairs.csv` where that is not there.

    Raises:
        ValueError: for a folder without either, a table without the columns or rows, a pair that stands twice, or where not even
            the first image can be found.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        file = next((self.folder / name for name in FILES if (self.folder / name).is_file()), None)
        if file is None:
            raise ValueError(f"{self.folder} holds no {' or '.join(FILES)}: expected a folder that `mof blind-pairs` wrote")
        self.pairs = _read(file)
        if len({pair.names for pair in self.pairs}) < len(self.pairs):
            raise ValueError(f"{file}: a pair of images stands twice")
        if not self.image(0, 0).is_file():
            raise ValueError(f"{file}: no image {self.pairs[0].names[0]}; call this where `mof blind-pairs` was called, and unpack tars")

    def __len__(self) -> int:
        return len(self.pairs)

    def image(self, number: int, side: int) -> Path:
        """The file of one image of a pair (side 0 or 1). Relative paths are of the working directory, or of the folder."""
        given = Path(self.pairs[number].names[side])
        return given if given.is_file() else self.folder / given


def _read(file: Path) -> list[Pair]:
    try:
        table = pq.read_table(file) if file.suffix == ".parquet" else _read_csv(file)
    except (pa.ArrowInvalid, OSError) as error:
        raise ValueError(f"{file} cannot be read: {error}") from None
    if missing := [name for name in COLUMNS if name not in table.column_names]:
        raise ValueError(f"{file} lacks the columns {', '.join(missing)}; it has {', '.join(table.column_names)}")
    if table.num_rows == 0:
        raise ValueError(f"{file} holds no pairs: there is nothing to describe")
    columns = [table[name].to_pylist() for name in COLUMNS]
    pairs = []
    for row, (first, second, *numbers) in enumerate(zip(*columns, strict=True), start=1):
        good = all(isinstance(name, str) and name for name in (first, second))
        if not good or not all(isinstance(value, int | float) and math.isfinite(value) for value in numbers):
            raise ValueError(f"{file}, row {row}: expected two images and {', '.join(NUMBERS)}, got {[first, second, *numbers]}")
        pairs.append(Pair((first, second), *map(float, numbers)))
    return pairs


def _read_csv(file: Path) -> pa.Table:
    """Names stay texts, whatever they look like."""
    options = pyarrow.csv.ConvertOptions(column_types={"image_i": pa.string(), "image_j": pa.string()})
    parsing = pyarrow.csv.ParseOptions(newlines_in_values=True)
    return pyarrow.csv.read_csv(file, convert_options=options, parse_options=parsing)
