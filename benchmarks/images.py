"""Compare the time from a JPEG file to pixel tensors: our code against Pillow's decoder and bicubic filter.

    python benchmarks/images.py                      # photos under ../shared/data, and enlarged photos
    python benchmarks/images.py --folder my/photos   # other JPEGs
    python benchmarks/images.py --threads            # also the images/s of ImageLoader with 1 and 2 threads
    python benchmarks/images.py --torchvision        # only the resize, against torchvision's resize of uint8

The benchmark runs in a single thread. In each round, all photos go through the first method and then through the second. The time of a
photo is its fastest round, in processor time, which other processes on the same cores disturb less than the clock. The time of a method is
the mean over the photos. Compare the ratios. The last column is the largest difference of a pixel, in grey levels.
"""

import argparse
import os
import tempfile
import time
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
from encoders.images.reading import _simplejpeg
from encoders.images.resizing import compiled_resize, to_pixels

DATA = Path(__file__).parents[2] / "shared" / "data"
MEAN = (122, 116, 104)  # LLaVA's background
BICUBIC = Image.Resampling.BICUBIC


def tensor(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


def by_pillow(image: Image.Image, size: int, fit: str, crop_pct: float = 1.0) -> torch.Tensor:
    """Do the work of `to_pixels` with Pillow."""
    if fit == "pad":
        side = max(image.size)
        canvas = Image.new("RGB", (side, side), MEAN)
        canvas.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
        image = canvas
    short = int(size / crop_pct)
    width, height = (short * length // min(image.size) for length in image.size) if fit == "crop" else (short, short)
    left, top = round((width - size) / 2), round((height - size) / 2)
    return tensor(image.resize((width, height), BICUBIC).crop((left, top, left + size, top + size)))


# name of a task -> the squares that are made of a decoded image: size, fit, crop_pct
PAD, CROP, CROP_OF_256, SQUASH = (336, "pad", 1.0), (336, "crop", 1.0), (224, "crop", 0.875), (384, "squash", 1.0)
TASKS: dict[str, list[Any]] = {
    "decode only": [],
    "pad 336 (LLaVA)": [PAD],
    "crop 336 (CLIP)": [CROP],
    "crop 224 of 256 (DINOv2)": [CROP_OF_256],
    "squash 384 (SigLIP)": [SQUASH],
    "the last three, one decode": [CROP, CROP_OF_256, SQUASH],
}


def pillows(file: Path, squares: list[Any]) -> list[Any]:
    image = Image.open(file).convert("RGB")
    return [by_pillow(image, *square) for square in squares] or [image]


def ours(file: Path, squares: list[Any]) -> list[Any]:
    image = read_image(file)
    return [to_pixels(image, size, fit, MEAN, crop_pct=crop_pct) for size, fit, crop_pct in squares] or [image]


def compare(files: list[Path], rounds: int) -> None:
    for name, squares in TASKS.items():
        best = np.full((len(files), 2), np.inf)
        pairs = [pair for file in files for pair in zip(pillows(file, squares), ours(file, squares), strict=True)]
        largest = max(int(np.abs(np.asarray(theirs).astype(int) - np.asarray(mine)).max()) for theirs, mine in pairs)
        for _ in range(rounds):
            for column, method in enumerate((pillows, ours)):
                for index, file in enumerate(files):
                    start = time.thread_time()
                    method(file, squares)
                    best[index, column] = min(best[index, column], time.thread_time() - start)
        slow, fast = 1000 * best.mean(axis=0)
        print(f"    {name:28} Pillow {slow:7.2f} ms   ours {fast:7.2f} ms   ratio {slow / fast:5.2f}   difference {largest}")


def by_torchvision(image: Image.Image, size: int, fit: str, crop_pct: float = 1.0) -> torch.Tensor:
    """Do the work of `to_pixels` with torchvision's resize, which is fastest if the channels of a pixel are neighbours in memory."""
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
    for size, fit, crop_pct in (PAD, CROP, CROP_OF_256, SQUASH):
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
    """Enlarge photos to 1600 x 1200 pixels. Grain is added, because smooth images would be decoded too fast."""
    rng = np.random.default_rng(0)
    enlargements = []
    for file in files:
        image = np.asarray(Image.open(file).convert("RGB").resize((1600, 1200), BICUBIC), np.float32)
        grain = rng.normal(0, 4, (1200, 1600, 1))
        path = folder / f"{quality}-{file.name}"
        Image.fromarray((image + grain).clip(0, 255).astype(np.uint8)).save(path, "JPEG", quality=quality)
        enlargements.append(path)
    return enlargements


def threads(files: list[Path], rounds: int) -> None:
    contents = [(str(file), file.read_bytes()) for file in files] * 4
    times = {1: np.inf, 2: np.inf}
    for _ in range(rounds):
        for workers in times:
            loader = ImageLoader(contents, workers=workers, transform=lambda image: to_pixels(image, 336, "pad", MEAN))
            start = time.perf_counter()
            count = sum(1 for _ in loader)
            times[workers] = min(times[workers], time.perf_counter() - start)
    rate = {workers: count / seconds for workers, seconds in times.items()}
    print(f"    ImageLoader, pad 336: {rate[1]:.0f} images/s with 1 thread, {rate[2]:.0f} with 2, ratio {rate[2] / rate[1]:.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="folder of JPEGs, in place of the shared data")
    parser.add_argument("--photos", type=int, default=12, help="photos of each kind")
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
            photos = sorted(file for file in root.rglob("*") if file.suffix.lower() in (".jpg", ".jpeg"))
            kinds[name] = photos[:: max(1, len(photos) // options.photos)][: options.photos]
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
