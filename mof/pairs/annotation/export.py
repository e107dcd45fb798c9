"""`export_annotations` writes annotations as MMVP and MMVP-VLM folders."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from encoders import ImageError, read_image
from encoders.progress import tracked
from encoders.whole_files import unfinished_folder, write_text
from mof.evals.benchmark_folders import DescribedPair, write_mmvp, write_mmvp_vlm
from mof.evals.mmvp_vlm import OWN_PAIRS
from mof.pairs.annotation.annotated_pairs import AnnotatedPairs
from mof.pairs.annotation.annotation import Annotation

MMVP, MMVP_VLM = "MMVP", "MMVP_VLM"


@dataclass(frozen=True)
class Export:
    """An export reports the pairs that were written, and the pairs that were left out."""

    by_pattern: dict[str, int]
    """Pattern -> number of pairs that were written."""
    left_out: list[tuple[int, str]]
    """(number of the pair, from 1 as on the page; reason) for each pair that somebody began and that was left out."""
    untouched: int
    """Number of pairs that nobody began."""
    elsewhere: list[tuple[str, str]]
    """Names of the pairs with complete annotations that are not in the table any more."""


def export_annotations(folder: str | Path, out: str | Path, *, progress: bool = False) -> Export:
    """Write `out/MMVP` and `out/MMVP_VLM` from the complete annotations of a folder; all others are left out.

    Raises:
        ValueError: if no annotation is complete, for an `out` that is not empty, or a folder that cannot be read.
    """
    pairs, out = AnnotatedPairs(folder), Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} is not empty: choose another folder to write")
    chosen, left_out, untouched = [], list[tuple[int, str]](), 0
    for number in tracked(range(len(pairs)), "pairs", shown=progress):
        annotation = pairs.saved(number).annotation
        if annotation == Annotation():
            untouched += 1
        elif annotation.mark is not None:
            left_out.append((number + 1, annotation.mark))
        elif missing := annotation.missing():
            left_out.append((number + 1, f"lacks {', '.join(missing)}"))
        else:
            described = _described(annotation, (pairs.table.image(number, 0), pairs.table.image(number, 1)))
            try:
                for image in described.images:
                    read_image(image)
                chosen.append(described)
            except ImageError as error:
                left_out.append((number + 1, str(error)))
    if not chosen:
        raise ValueError(f"{folder}: no annotation is complete ({len(left_out)} begun); call `mof blind-pairs annotate {folder}`")
    _write(chosen, out)
    return Export(dict(Counter(pair.pattern for pair in chosen)), left_out, untouched, pairs.elsewhere())


def _write(pairs: list[DescribedPair], out: Path) -> None:
    """Write both folders aside and rename them, so that an interrupted export never looks whole."""
    with unfinished_folder(out) as whole:
        write_mmvp(whole / MMVP, pairs)
        write_mmvp_vlm(whole / MMVP_VLM, pairs)
        write_text(whole / MMVP_VLM / OWN_PAIRS, f"{len(pairs)} pairs in the layout of MMVP-VLM, which a person described with mof-vig.\n")
        if out.exists():
            out.rmdir()
        whole.rename(out)


def _described(annotation: Annotation, images: tuple[Path, Path]) -> DescribedPair:
    """Return the pair of a complete annotation."""
    first, second = annotation.right
    assert annotation.pattern is not None and first is not None and second is not None
    return DescribedPair(annotation.pattern, images, annotation.statements, annotation.question, annotation.options, (first, second))
