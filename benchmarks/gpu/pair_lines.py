"""Blind pairs: all images compared with all, with embeddings on the device, and from files."""

from __future__ import annotations

import os
import shutil
import time
from functools import partial

import numpy as np
import torch
from measure import Bench, Figure, TooSlow
from torch import Tensor

from mof.pairs.comparison import PairComparison
from mof.pairs.embedding_rows import EmbeddingRows

ABOVE, BELOW = 0.95, 0.6
WIDTHS = (768, 1024)
CHUNK = 65_536
"""Rows that are drawn at a time. Images of a thing lie in the same chunk."""
SPREAD, OFFSET = (0.18, 1.2), (0.9, 0.0)
"""How far images of a thing lie apart, and how far all images lie from the origin, with CLIP and with DINOv2."""


def add_lines(bench: Bench) -> None:
    resident, on_disk = (9_000, 9_000) if bench.tiny else (1_280_000, 10_000_000)
    bench.add(f"{_short(resident)} images, embeddings on the device", partial(_on_device, bench, resident))
    bench.add(f"{_short(on_disk)} images, embeddings in files", partial(_in_files, bench, on_disk))


def rows(start: int, count: int, side: int, device: torch.device) -> Tensor:
    """Return unit rows [count, width] with thousands of blind pairs; the variance falls from channel to channel, as in real embeddings."""
    centres = torch.randint(max(count // 4, 1), (count,), generator=torch.Generator().manual_seed(start)).to(device)
    generator = torch.Generator(device).manual_seed(start + 1 + side)
    width = WIDTHS[side]
    scale = (1 + torch.arange(width, device=device)) ** -0.5
    things = torch.randn(max(count // 4, 1), width, device=device, generator=generator)
    x = (things[centres] + SPREAD[side] * torch.randn(count, width, device=device, generator=generator)) * (scale / scale.norm())
    x[:, 0] += OFFSET[side]
    return torch.nn.functional.normalize(x, dim=1)


def _starts(count: int) -> list[tuple[int, int]]:
    return [(start, min(CHUNK, count - start)) for start in range(0, count, CHUNK)]


def _on_device(bench: Bench, count: int) -> Figure:
    both = [torch.empty(count, width, device=bench.device) for width in WIDTHS]
    for start, size in _starts(count):
        for side, x in enumerate(both):
            x[start : start + size] = rows(start, size, side, bench.device)
    _search(bench, *(x[:8192] for x in both), share=0.2)  # a first run
    return _search(bench, *both, share=0.8)


def _in_files(bench: Bench, count: int) -> Figure:
    """Compare as many images as can be written in a third of the budget and fit into half of the free disk."""
    start, end = time.monotonic(), time.monotonic() + bench.left / 3
    count = min(count, int(shutil.disk_usage(bench.scratch).free / 2 / (2 * sum(WIDTHS))))
    paths = [bench.scratch / f"embeddings-{side}" for side in range(2)]
    written = 0
    with paths[0].open("wb") as clip, paths[1].open("wb") as dino:
        for first, size in _starts(count):
            for side, file in enumerate((clip, dino)):
                rows(first, size, side, bench.device).half().cpu().numpy().tofile(file)
            written += size
            if time.monotonic() > end:
                break
        for file in (clip, dino):
            _forget(file.fileno())
    gigabytes = written * 2 * sum(WIDTHS) / 1e9
    speed = gigabytes / (time.monotonic() - start)
    if written < 8192:
        raise TooSlow(f"{written} rows could be written")
    maps = (np.memmap(path, np.float16, "r", shape=(written, width)) for path, width in zip(paths, WIDTHS, strict=True))
    figure = _search(bench, *maps, share=0.8)
    figure.note += f"; {written:,} of {count:,} images fitted ({gigabytes:.1f} GB, drawn and written at {speed:.1f} GB/s)"
    for path in paths:
        path.unlink()
    return figure


def _forget(file: int) -> None:
    """Drop the file from the system's memory, so that it is read from the disk."""
    os.fsync(file)
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)


def _search(bench: Bench, clip: Tensor | np.memmap, dino: Tensor | np.memmap, share: float) -> Figure:
    """Search until the end, or until a share of the budget is used up; the time for the rest is then estimated."""
    end, start = time.monotonic() + share * bench.left, time.monotonic()
    comparison = PairComparison([EmbeddingRows(clip, "clip", bench.device)], [EmbeddingRows(dino, "dino", bench.device)], ABOVE, BELOW)
    assert comparison.sieve is not None
    bench.wait()
    prepared, total, compared, found = time.monotonic() - start, len(clip) * (len(clip) - 1) // 2, 0, 0

    def count(more: int, blind: int) -> None:
        nonlocal compared, found
        compared, found = compared + more, found + blind

    everything, start = range(len(clip)), time.monotonic()
    for _ in comparison.within(everything, everything, count):
        if time.monotonic() > end:
            break
    took = (time.monotonic() - start) * total / compared
    width = f"{type(comparison.sieve).__name__} of {getattr(comparison.sieve, 'left', clip).shape[1]} columns"
    note = f"{prepared:.2f} s to read and prepare, then {took:.2f} s; {width}; {found:,} blind pairs"
    if compared < total:
        note += f" in the {compared / total:.1%} that were compared, the time for all is estimated"
    return Figure(prepared + took, "s", WIDTHS[0] * len(clip) ** 2 / (prepared + took), note=note)


def _short(count: int) -> str:
    return f"{count / 1e6:g}M" if count >= 1e6 else f"{count:,}"
