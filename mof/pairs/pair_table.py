"""Blind pairs are written to the tables `pairs.parquet` and `pairs.csv`, and read from them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.csv
from numpy.typing import NDArray

from encoders.csv_cells import plain_cell, write_csv
from encoders.digests import DamagedError
from encoders.saved_folders import DIGESTS, check_listed
from encoders.tables import read_table, write_table

# Shapes: N images, M pairs.

FILES = ("pairs.parquet", "pairs.csv")
FORMAT, FORMAT_KEY = b"1", b"blind_pairs_format"
"""Version of the table, and its key in the metadata of the Parquet file. Tables of earlier releases have none."""
NUMBERS = ("clip_similarity", "dino_similarity", "gap")
COLUMNS = ("image_i", "image_j", *NUMBERS)


class BlindPair(NamedTuple):
    """BlindPair holds a pair of images."""

    i: int
    j: int
    clip_similarity: float
    dino_similarity: float

    @property
    def gap(self) -> float:
        return self.clip_similarity - self.dino_similarity


@dataclass(frozen=True)
class BlindPairs:
    """BlindPairs holds M pairs of images, sorted by gap (CLIP's cosine less DINOv2's), largest first; equal gaps by i, then j."""

    i: NDArray[np.int64]
    """[M], index of the first image"""
    j: NDArray[np.int64]
    """[M], index of the second image; i < j"""
    clip_similarity: NDArray[np.float32]
    """[M], cosine; with several encoders, the least"""
    dino_similarity: NDArray[np.float32]
    """[M], cosine; with several encoders, the largest"""
    images: int
    """N, the number of images that were compared"""
    total: int
    """Number of all blind pairs; these M were kept"""
    files: Sequence[str | Path] | None = field(default=None, compare=False)
    """[N], the images' files, which a notebook shows; see `with_files`"""

    def __len__(self) -> int:
        return len(self.i)

    def __getitem__(self, index: Any) -> Any:  # a BlindPair, or BlindPairs for a slice, a mask or indices
        names = BlindPair._fields
        columns = {name: getattr(self, name)[index] for name in names}
        return replace(self, **columns) if columns["i"].ndim else BlindPair(**{name: columns[name].item() for name in names})

    def __repr__(self) -> str:
        head = "{:>9} {:>9} {:>8} {:>8} {:>8}".format("i", "j", "CLIP", "DINO", "gap")
        rows = [f"{i:>9} {j:>9} {clip:8.3f} {dino:8.3f} {clip - dino:8.3f}" for i, j, clip, dino in self[:5]]
        more = [f"{'...':>9}"] if len(self) > 5 else []
        return "\n".join([self.summary(), head, *rows, *more])

    def _repr_html_(self) -> str:
        from mof.pairs.pictures import pairs_html  # slow to import

        def shown(image: int) -> str | Path:
            return str(image) if self.files is None else Path(self.files[image])

        pairs = (((shown(i), shown(j)), (clip, dino)) for i, j, clip, dino in self[:])
        return pairs_html(self.summary(), pairs, len(self))

    def with_files(self, files: Sequence[str | Path]) -> BlindPairs:
        """Return these pairs with the files [N] of all images that were compared, so that a notebook shows the pictures.

        Raises:
            ValueError: for another number of files.
        """
        self._check_count(files)
        return replace(self, files=files)

    @property
    def gap(self) -> NDArray[np.float32]:
        """Return [M], CLIP's cosine less DINOv2's, by which the pairs are sorted."""
        return self.clip_similarity - self.dino_similarity

    def summary(self) -> str:
        """Return one line: the numbers of all pairs, of blind pairs and of kept pairs, and the width of the gap."""
        possible = self.images * (self.images - 1) // 2
        found = f"{self.total:,} blind pairs among {self.images:,} images ({possible:,} pairs)"
        kept = f"; {len(self):,} kept" if len(self) < self.total else ""
        return f"{found}{kept}" + (f"; gap {self.gap.min():.3f} to {self.gap.max():.3f}" if len(self) else "")

    def to_parquet(self, path: str | Path, names: Sequence[str] | None = None) -> None:
        """Write columns i, j, clip_similarity, dino_similarity, gap; with the `names` [N] of the images also image_i, image_j."""
        write_table(Path(path), self.table(names))

    def to_csv(self, path: str | Path, names: Sequence[str] | None = None) -> None:
        """Write the columns of `to_parquet` as text, with a header."""
        columns = self.table(names).to_pydict()
        write_csv(Path(path), [tuple(columns), *zip(*columns.values(), strict=True)])

    def table(self, names: Sequence[str] | None = None) -> pa.Table:
        """Return the columns of `to_parquet` as an Arrow table with M rows."""
        return pa.table(self._columns(names), metadata={FORMAT_KEY: FORMAT})

    def _columns(self, names: Sequence[str] | None) -> dict[str, NDArray[Any] | list[str]]:
        images: dict[str, NDArray[Any] | list[str]] = {}
        if names is not None:
            self._check_count(names)
            images = {"image_i": [names[i] for i in self.i], "image_j": [names[j] for j in self.j]}
        similarities = {"clip_similarity": self.clip_similarity, "dino_similarity": self.dino_similarity, "gap": self.gap}
        return {"i": self.i, "j": self.j, **images, **similarities}

    def _check_count(self, names: Sequence[Any]) -> None:
        if len(names) != self.images:
            raise ValueError(f"{len(names)} names for {self.images} images: expected one for each row of the embeddings")


@dataclass(frozen=True)
class Pair:
    """Pair holds a row of a table."""

    names: tuple[str, str]
    """The images' paths as the table spells them; they identify the pair."""
    clip_similarity: float
    dino_similarity: float
    gap: float


class PairTable:
    """PairTable holds the rows of a folder's `pairs.parquet`, or of its `pairs.csv` if there is no Parquet file.

    Raises:
        ValueError: for a folder without a table, a table of another format, without the columns or without rows, a pair
            that is listed twice, or a first image that cannot be found.
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

    def _repr_html_(self) -> str:
        from mof.pairs.pictures import pairs_html  # slow to import

        rows = enumerate(self.pairs)
        pairs = (((self.image(n, 0), self.image(n, 1)), (pair.clip_similarity, pair.dino_similarity)) for n, pair in rows)
        return pairs_html(f"{len(self):,} pairs in {self.folder}", pairs, len(self))

    def image(self, number: int, side: int) -> Path:
        """Return the file of one image of a pair (side 0 or 1). A relative path starts from the working directory, or from the folder."""
        given = Path(self.pairs[number].names[side])
        return given if given.is_file() else self.folder / given


def _read(file: Path) -> list[Pair]:
    try:
        if file.suffix == ".parquet":
            table = read_table(file)
        else:
            check_listed(file, file.with_name(DIGESTS), "put back a copy")
            names = pyarrow.csv.ConvertOptions(
                column_types={"image_i": pa.string(), "image_j": pa.string()}
            )  # even if they look like numbers
            table = pyarrow.csv.read_csv(file, convert_options=names, parse_options=pyarrow.csv.ParseOptions(newlines_in_values=True))
    except DamagedError as error:
        raise DamagedError(f"{error}; run the same `mof blind-pairs` again") from error
    except (pa.ArrowInvalid, OSError) as error:
        raise ValueError(f"{file} cannot be read: {error}") from None
    version = (table.schema.metadata or {}).get(FORMAT_KEY, FORMAT)
    if version != FORMAT:
        raise ValueError(f"{file} has format {version.decode()}, this version of mof-vig reads {FORMAT.decode()}: search the pairs again")
    if missing := [name for name in COLUMNS if name not in table.column_names]:
        raise ValueError(f"{file} lacks the columns {', '.join(missing)}; it has {', '.join(table.column_names)}")
    if table.num_rows == 0:
        raise ValueError(f"{file} holds no pairs: there is nothing to describe")
    columns = [table[name].to_pylist() for name in COLUMNS]
    if file.suffix == ".csv":
        columns[:2] = [[name and plain_cell(name) for name in names] for names in columns[:2]]
    pairs = []
    for row, (first, second, *numbers) in enumerate(zip(*columns, strict=True), start=1):
        good = all(isinstance(name, str) and name for name in (first, second))
        if not good or not all(isinstance(value, int | float) and math.isfinite(value) for value in numbers):
            raise ValueError(f"{file}, row {row}: expected two images and {', '.join(NUMBERS)}, got {[first, second, *numbers]}")
        pairs.append(Pair((first, second), *map(float, numbers)))
    return pairs
