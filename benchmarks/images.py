"""From a JPEG file to pixel tensors: ours against Pillow's decoder and bicubic filter, used as the encoders' own processors do.

    python benchmarks/images.py                      # every kind of photo under ../shared/data, and large ones made of them
    python benchmarks/images.py --folder my/photos   # JPEGs of one's own
    python benchmarks/images.py --threads            # also: images/s of ImageLoader with 1 and 2 threads
    python benchmarks/images.py --torchvision        # the resize alone, ours against torchvision's antialiased one of uint8

One process, one thread. All photos go through one method and then through the other, round after round; a method's time is the
mean over the photos of the least of its rounds, in processor time, which other processes on the same cores disturb less than
the clock. Ratios are what to read. The last column is the largest difference of any pixel, in grey levels.
"""

import argparse
import os
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"

import numpy as np
import torch
from PIL import Image
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2.functional import resize

from encoders import ImageLoader, read_image
from encoders.images.reading import _simplejpeg, to_pixels
from encoders.images.resizing import compiled_resize

DATA = Path(__file__).parents[2] / "shared" / "data"
MEAN = (122, 116, 104)  # LLaVA's background
BICUBIC = Image.Resampling.BICUBIC


def tensor(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


def pad_by_pillow(image: Image.Image, size: int) -> torch.Tensor:
    side = max(image.size)
    canvas = Image.new("RGB", (side, side), MEAN)
    canvas.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return tensor(canvas.resize((size, size), BICUBIC))


def crop_by_pillow(image: Image.Image, size: int, short: int) -> torch.Tensor:
    width, height = (short * length // min(image.size) for length in image.size)
    left, top = round((width - size) / 2), round((height - size) / 2)
    return tensor(image.resize((width, height), BICUBIC).crop((left, top, left + size, top + size)))


def squash_by_pillow(image: Image.Image, size: int) -> torch.Tensor:
    return tensor(image.resize((size, size), BICUBIC))


def open_by_pillow(file: Path) -> Image.Image:
    return Image.open(file).convert("RGB")


Pixels = Callable[[Path], list[Any]]

# what is made of one decoded image -> (Pillow's way, ours)
TASKS: dict[str, tuple[Pixels, Pixels]] = {
    "decode only": (
        lambda file: [open_by_pillow(file)],
        lambda file: [read_image(file)],
    ),
    "pad 336 (LLaVA)": (
        lambda file: [pad_by_pillow(open_by_pillow(file), 336)],
        lambda file: [to_pixels(read_image(file), 336, "pad", MEAN)],
    ),
    "crop 336 (CLIP)": (
        lambda file: [crop_by_pillow(open_by_pillow(file), 336, 336)],
        lambda file: [to_pixels(read_image(file), 336, "crop")],
    ),
    "crop 224 of 256 (DINOv2)": (
        lambda file: [crop_by_pillow(open_by_pillow(file), 224, 256)],
        lambda file: [to_pixels(read_image(file), 224, "crop", crop_pct=0.875)],
    ),
    "squash 384 (SigLIP)": (
        lambda file: [squash_by_pillow(open_by_pillow(file), 384)],
        lambda file: [to_pixels(read_image(file), 384, "squash")],
    ),
    "the last three, one decode": (
        lambda file: [
            crop_by_pillow(image := open_by_pillow(file), 336, 336),
            crop_by_pillow(image, 224, 256),
            squash_by_pillow(image, 384),
        ],
        lambda file: [
            to_pixels(image := read_image(file), 336, "crop"),
            to_pixels(image, 224, "crop", crop_pct=0.875),
            to_pixels(image, 384, "squash"),
        ],
    ),
}


def compare(files: list[Path], rounds: int) -> None:
    for name, methods in TASKS.items():
        best = np.full((len(files), 2), np.inf)
        largest = 0
        for file in files:
            outcomes = [method(file) for method in methods]
            for theirs, ours in zip(*outcomes, strict=True):
                largest = max(largest, int(np.abs(np.asarray(theirs).astype(int) - np.asarray(ours)).max()))
        for _ in range(rounds):
            for column, method in enumerate(methods):
                for index, file in enumerate(files):
                    start = time.thread_time()
                    method(file)
                    best[index, column] = min(best[index, column], time.thread_time() - start)
        theirs, ours = 1000 * best.mean(axis=0)
        print(f"    {name:28} Pillow {theirs:7.2f} ms   ours {ours:7.2f} ms   ratio {theirs / ours:5.2f}   difference {largest}")


def by_torchvision(image: Image.Image, size: int, fit: str, crop_pct: float = 1.0) -> torch.Tensor:
    """What `to_pixels` would be with torchvision's resize, which is fastest on images whose channels lie together."""
    x = torch.from_numpy(np.array(image)).permute(2, 0, 1)  # [3, H, W]
    if fit == "pad":
        side = max(image.size)
        canvas = torch.tensor(MEAN, dtype=torch.uint8).expand(side, side, 3).contiguous().permute(2, 0, 1)  # [3, side, side]
        top, left = (side - image.height) // 2, (side - image.width) // 2
        canvas[:, top : top + image.height, left : left + image.width] = x
        x = canvas
    short = int(size / crop_pct)
    height, width = (short * image.height // min(image.size), short * image.width // min(image.size)) if fit == "crop" else (short, short)
    x = resize(x, [height, width], InterpolationMode.BICUBIC, antialias=True)
    top, left = round((height - size) / 2), round((width - size) / 2)
    return x[:, top : top + size, left : left + size].contiguous()  # [3, S, S]


def against_torchvision(files: list[Path], rounds: int) -> None:
    images = [read_image(file) for file in files]
    for size, fit, crop_pct in ((336, "pad", 1.0), (336, "crop", 1.0), (224, "crop", 0.875), (384, "squash", 1.0)):
        methods = (
            lambda image, size=size, fit=fit, crop_pct=crop_pct: by_torchvision(image, size, fit, crop_pct),
            lambda image, size=size, fit=fit, crop_pct=crop_pct: to_pixels(image, size, fit, MEAN, crop_pct=crop_pct),
        )
        differences = [int((methods[0](image).int() - methods[1](image)).abs().max()) for image in images]
        figures = []
        for workers in (1, 2):
            best = [np.inf, np.inf]
            with ThreadPoolExecutor(workers) as pool:
                for _ in range(rounds):
                    for column, method in enumerate(methods):
                        start = time.perf_counter()
                        list(pool.map(method, images * 4))
                        best[column] = min(best[column], 1000 * (time.perf_counter() - start) / len(images) / 4)
            figures.append(f"{workers} threads: torchvision {best[0]:6.2f} ms   ours {best[1]:6.2f} ms   ratio {best[0] / best[1]:5.2f}")
        print(f"    {fit + ' ' + str(size):12} {'   '.join(figures)}   difference {max(differences)}")


def describe(files: list[Path]) -> str:
    sizes = np.array([Image.open(file).size for file in files])
    kilobytes = np.mean([file.stat().st_size for file in files]) / 1024
    width, height = np.median(sizes, axis=0)
    return f"{len(files)} photos, {width:.0f} x {height:.0f} at the median, {kilobytes:.0f} KB on average"


def enlarged(files: list[Path], folder: Path, quality: int) -> list[Path]:
    """Photos of 1600 x 1200 made of smaller ones, with grain, because enlarging leaves none and JPEG would be too fast."""
    rng = np.random.default_rng(0)
    out = []
    for file in files:
        image = np.asarray(Image.open(file).convert("RGB").resize((1600, 1200), BICUBIC), np.float32)
        grain = rng.normal(0, 4, (1200, 1600, 1))
        path = folder / f"{quality}-{file.name}"
        Image.fromarray((image + grain).clip(0, 255).astype(np.uint8)).save(path, "JPEG", quality=quality)
        out.append(path)
    return out


def threads(files: list[Path], rounds: int) -> None:
    contents = [(str(file), file.read_bytes()) for file in files] * 4
    times = {1: np.inf, 2: np.inf}
    for _ in range(rounds):
        for workers in times:
            loader = ImageLoader(contents, workers=workers, transform=lambda image: to_pixels(image, 336, "pad", MEAN))
            start = time.perf_counter()
            count = sum(1 for _ in loader)
            times[workers] = min(times[workers], time.perf_counter() - start)
    one, two = (count / times[workers] for workers in times)
    print(f"    ImageLoader, pad 336: {one:.0f} images/s with 1 thread, {two:.0f} with 2, ratio {two / one:.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="JPEGs to take in place of the shared data")
    parser.add_argument("--photos", type=int, default=12, help="of each kind")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--threads", action="store_true")
    parser.add_argument("--torchvision", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(f"decoder: {'simplejpeg' if _simplejpeg() else 'Pillow'}; resize: {'compiled' if compiled_resize() else 'Pillow'}")
    roots = {options.folder.name: options.folder} if options.folder else {name: DATA / name for name in ("coco", "flickr8k", "photos")}
    with tempfile.TemporaryDirectory() as scratch:
        kinds = {}
        for name, root in roots.items():
            found = sorted(file for file in root.rglob("*") if file.suffix.lower() in (".jpg", ".jpeg"))
            kinds[name] = found[:: max(1, len(found) // options.photos)][: options.photos]
        if not options.folder:
            kinds |= {f"coco as 1600 x 1200, quality {q}": enlarged(kinds["coco"][:6], Path(scratch), q) for q in (75, 90)}
        for name, files in kinds.items():
            print(f"{name}: {describe(files)}")
            if options.torchvision:
                against_torchvision(files, options.rounds)
                continue
            compare(files, options.rounds)
            if options.threads:
                threads(files, options.rounds)


if __name__ == "__main__":
    main()
