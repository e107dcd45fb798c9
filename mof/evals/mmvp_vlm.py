"""MMVP-VLM measures the pairs of images that an image-text encoder tells apart (arXiv 2401.06209, section 2.3).

A folder holds `Questions.csv` (Question ID, Type, Statement) and an image for each row, `<image folder>/<Type>/<id>.jpg`. Rows come
in pairs. Each of a pair's two statements is matched with the more similar of the pair's two images; the pair counts when both
statements find their own image.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torchvision.transforms.functional import pil_to_tensor

from encoders import Encoder, FeatureStore, read_image
from encoders.csv_cells import write_csv
from encoders.images.opening import inside, open_image, read_file
from encoders.progress import tracked
from encoders.whole_files import write_sealed
from mof.evals.benchmark import Measure, Measured, Row
from mof.evals.intervals import Figure, Given, Tally
from mof.evals.patterns import PATTERNS, pattern_type
from mof.evals.question_files import check_pairs, find_files, find_image, read_rows

# Shapes: H, W = rows and columns of an image, S = side of an encoder's input, E = width of the joint embedding.

NAME = "mmvp-vlm"
MEASURES = {
    "mmvp-vlm pairs": Measure(
        "MMVP-VLM", "right pairs, %", "pairs of photos whose two captions each find their photo", chance=0.25, compared=True
    ),
    "mmvp-vlm likeness": Measure(
        "MMVP-VLM", "likeness", "mean cosine of a pair's two photos x 100; near 100, the encoder is blind to the difference", "lower"
    ),
}
HEADLINE = "mmvp-vlm pairs", "average"
IMAGE_FOLDERS = ("MLLM_VLM Images", "MLLM_VLM_Images", "MMVP_VLM_Images")
"""Names of the image folder in the known copies."""
COLUMNS = 3  # Question ID, Type, Statement: read by position, since copies differ in spelling
PAIRS = 135  # in the whole benchmark
TIE = 1e-9
"""Cosines closer than this are equal: the same image under two names may differ by the rounding of a sum in float64."""
FORMAT = 1  # version of the .json of results
OWN_PAIRS = "ABOUT.txt"
"""A file beside pairs that a person described: `mof blind-pairs export` writes it."""
SMALLEST_PHOTO = 100  # pixels of the shorter side, far below MMVP-VLM's photos
PROMPT = "a photo of "  # then the statement, without a full stop


class ImageTextEncoder(Protocol):
    """The probe needs these methods. An `encoders.Encoder` gets preprocessed images, any other object the unchanged pixels."""

    def embed_image(self, pixels: Tensor) -> Tensor:
        """Return the embedding [1, E] of pixels [1, 3, H, W], uint8."""

    def embed_text(self, texts: list[str]) -> Tensor:
        """Return the embeddings [T, E] of T texts."""


@dataclass(frozen=True)
class Item:
    """An item is a row of `Questions.csv`."""

    id: int
    type: str
    statement: str
    image: Path


@dataclass(frozen=True)
class PairResult:
    """PairResult holds a pair and its similarities in the encoder's space."""

    type: str
    ids: tuple[int, int]
    statements: tuple[str, str]
    image_similarity: float
    """Cosine of the two images. It is near 1 for a blind pair."""
    similarities: tuple[tuple[float, float], tuple[float, float]] | None
    """Cosine of statement (row) and image (column); None for an encoder without a text tower."""

    @property
    def right(self) -> bool:
        """Return True if both statements find their own image; at a tie, the second image is taken, as the released rule does."""
        if self.similarities is None:
            raise ValueError("an encoder without a text tower matches no statements: only image_similarity is measured")
        (first_own, first_other), (second_other, second_own) = self.similarities
        return first_own - first_other > TIE and not second_other - second_own > TIE


@dataclass(frozen=True)
class MMVPVLMResult:
    """MMVPVLMResult holds the result of an encoder. Shares are in [0, 1], and chance is 0.25."""

    encoder: str
    pairs: list[PairResult]
    folder: str = ""
    """Name of the pairs' folder."""
    not_official: str | None = None
    """Why these are not the pairs of MMVP-VLM, with which the published figures were measured; None if nothing speaks against it."""

    @property
    def by_pattern(self) -> dict[str, float]:
        """Return type -> share of right pairs, in the spelling and order of the file."""
        return self._means(lambda pair: pair.right)

    @property
    def average(self) -> float:
        """Return the share of right pairs among all pairs."""
        return statistics.fmean(pair.right for pair in self.pairs)

    @property
    def image_similarity(self) -> dict[str, float]:
        """Return type -> mean cosine of a pair's two images; also for encoders without a text tower."""
        return self._means(lambda pair: pair.image_similarity)

    @property
    def deviations(self) -> list[str]:
        """Return the differences from the official protocol."""
        why = self.not_official or (None if len(self.pairs) == PAIRS else f"{len(self.pairs)} of {PAIRS} pairs")
        return [] if why is None else [f"not MMVP-VLM ({why}): published figures are of other pairs"]

    def to_json(self, path: str | Path) -> None:
        """Write the shares and every pair."""
        matched = self.pairs[0].similarities is not None
        shares = {"average": self.average, "by_pattern": self.by_pattern} if matched else {}
        pairs = [dataclasses.asdict(pair) | ({"right": pair.right} if matched else {}) for pair in self.pairs]
        document = {
            "format": FORMAT, "benchmark": NAME, "encoder": self.encoder, "folder": self.folder, **shares,
            "image_similarity": self.image_similarity, "pairs": pairs, "deviations": self.deviations,
        }  # fmt: skip
        write_sealed(Path(path), document)

    def to_csv(self, path: str | Path) -> None:
        """Write one row per pair."""
        rights = ["" if pair.similarities is None else int(pair.right) for pair in self.pairs]
        rows = [
            (self.encoder, pair.type, *pair.ids, round(pair.image_similarity, 6), right)
            for pair, right in zip(self.pairs, rights, strict=True)
        ]
        write_csv(Path(path), [("encoder", "type", "id_1", "id_2", "image_similarity", "right"), *rows])

    def _means(self, value: Callable[[PairResult], float]) -> dict[str, float]:
        types = dict.fromkeys(pair.type for pair in self.pairs)
        return {type: statistics.fmean(value(pair) for pair in self.pairs if pair.type == type) for type in types}


def probe_mmvp_vlm(
    encoder: ImageTextEncoder, folder: str | Path, *, store: FeatureStore | None = None, progress: bool = False
) -> MMVPVLMResult:
    """Run MMVP-VLM, which is deterministic. Shares are computed by `Type`, not by the position of the row.

    Args:
        encoder: any encoder of this library, or any object with `embed_image` and `embed_text`. If an encoder has no text
            tower (DINOv2), only `image_similarity` is measured.
        folder: holds `Questions.csv` and the image folder in any of its spellings.
        store: holds embeddings of the images under the encoder's name. They are used, and only texts are encoded.
        progress: show a progress bar.

    Raises:
        ValueError: for a folder that is not MMVP-VLM, naming the wrong row or image; for a store of another encoder, or one that
            lacks an image.
        ImageError: for an image that cannot be read.
    """
    items = read_mmvp_vlm(folder)
    name = encoder.name if isinstance(encoder, Encoder) else type(encoder).__name__
    embed = partial(_embed, encoder)
    if store is not None:
        if not isinstance(encoder, Encoder):
            raise ValueError(f"a feature store holds embeddings of encoders of this library, not of a {name}")
        store.check(name, encoder)
        embed = partial(_stored, store, store.embeddings(name))
    with_text = encoder.has_text if isinstance(encoder, Encoder) else True
    results = []
    for index in tracked(range(0, len(items), 2), "pairs", shown=progress):
        pair = items[index], items[index + 1]
        images = torch.cat([embed(item.image) for item in pair])  # [2, E]
        ids, statements = (pair[0].id, pair[1].id), (pair[0].statement, pair[1].statement)
        similarities = None
        if with_text:
            texts = _unit(encoder.embed_text([PROMPT + statement for statement in statements]), f"statements {statements}")  # [2, E]
            (a, b), (c, d) = (texts @ images.T).tolist()
            similarities = (a, b), (c, d)
        results.append(PairResult(pair[0].type, ids, statements, float(images[0] @ images[1]), similarities))
    return MMVPVLMResult(name, results, Path(folder).resolve().name, why_not_official(Path(folder), items))


def why_not_official(folder: Path, items: Sequence[Item]) -> str | None:
    """Return why the folder's content cannot be MMVP-VLM: other numbers of pairs, small drawings, or pairs that this library wrote."""
    counts = Counter(pattern_type(item.type) for item in items)
    if len(items) != 2 * PAIRS:
        return f"{len(items) // 2} of {PAIRS} pairs"
    if counts != dict.fromkeys(PATTERNS, 2 * PAIRS // len(PATTERNS)):
        return f"its types are {', '.join(counts)}"
    if (folder / OWN_PAIRS).is_file():
        return f"{OWN_PAIRS} says who described the pairs"
    sides = []
    for item in items:
        with open_image(read_file(item.image), str(item.image)) as image:
            sides.append(min(image.size))
    return f"its images have {min(sides)} pixels" if min(sides) < SMALLEST_PHOTO else None


@torch.inference_mode()
def _embed(encoder: ImageTextEncoder, file: Path) -> Tensor:
    """Return [1, E] float64 of unit norm."""
    pixels = encoder.pixels(file) if isinstance(encoder, Encoder) else pil_to_tensor(read_image(file))
    return _unit(encoder.embed_image(pixels[None]), str(file))


def _stored(store: FeatureStore, embeddings: NDArray[np.float32], file: Path) -> Tensor:
    """Return the embedding from a store as `_embed` does."""
    return _unit(torch.tensor(embeddings[store.row_of(file)])[None], str(file))


def _unit(x: Tensor, source: str) -> Tensor:
    """Return float64 of unit norm: in float32 the order of a sum may decide a near tie. ValueError where it is not finite."""
    unit = torch.nn.functional.normalize(x.detach().double().cpu(), dim=-1)
    if not unit.isfinite().all():
        raise ValueError(f"{source}: the embedding is not finite")
    return unit


def read_mmvp_vlm(folder: str | Path) -> list[Item]:
    """Return the rows of the folder; two neighbours are a pair: an odd id, then the next even id, of the same type.

    Raises:
        ValueError: naming what is wrong with the folder or with a row.
    """
    questions, images = find_files(Path(folder), "MMVP-VLM", IMAGE_FOLDERS)
    assert images is not None
    items = [_item(questions, row, images) for row in read_rows(questions)[1:]]
    check_pairs(questions, [(item.id, item.type) for item in items])
    return items


def _item(questions: Path, row: Sequence[str], images: Path) -> Item:
    if len(row) != COLUMNS or not row[0].strip().isdecimal() or not row[2].strip():
        raise ValueError(f"{questions}: expected a number, a type and a statement in each row, got {list(row)}")
    id, type = int(row[0]), row[1].strip()
    spellings = dict.fromkeys((type, type.replace(" ", "_"), type.replace("_", " ")))  # Camera Perspective, Camera_Perspective
    image = find_image(questions, id, [Path(inside(images, spelling)) for spelling in spellings])
    return Item(id, type, row[2].strip(), image)


def measured(result: Row, rows: list[Row]) -> Measured:
    pairs = result["pairs"]
    units = [f"{pair['type']}: {pair['ids']} {pair['statements']}" for pair in pairs]
    figures: dict[str, Figure] = {"mmvp-vlm likeness": Given(statistics.fmean(pair["image_similarity"] for pair in pairs))}
    if "average" in result:
        figures["mmvp-vlm pairs"] = Tally.of(units, [pair["right"] for pair in pairs], 1)
    return Measured(f"{len(pairs)} pairs of {result['folder']}", figures, result.get("by_pattern") or {})
