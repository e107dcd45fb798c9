"""OtherPictures shows an answerer blurred or swapped images, to measure how much its answers depend on the images."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Literal

from PIL import Image

from encoders import ImageError, read_image
from encoders.images.reading import blur
from mof.data.records import ImageSource
from mof.evals.answering import Answer, Answerer, Prompt

Picture = Literal["blurred", "swapped"]
PIECE = 64  # prompts whose blurred images are in memory at a time


class OtherPictures:
    """OtherPictures shows an answerer the blurred image, or another image: the image half the benchmark's list of images further on.

    An image that cannot be read stays as it is, and is never shown in place of another.

    Args:
        images: the benchmark's image files, without repetition. Other images stay as they are.

    Raises:
        ValueError: for fewer than two images, which cannot be swapped.
    """

    def __init__(self, answerer: Answerer, picture: Picture, images: Sequence[ImageSource]) -> None:
        self._answerer, self._picture = answerer, picture
        if picture == "swapped" and len(images) < 2:
            raise ValueError(f"images can be swapped if there are at least two, got {len(images)}")
        self._images = list(images)
        self._places = {str(image): place for place, image in enumerate(images)}
        self.name, self.settings = f"{answerer.name}, {picture} images", answerer.settings | {"images": picture}
        if "images" in answerer.settings:  # blurred images in place of the images of an answerer that is shown other images itself
            self.settings["images"] = f"{picture}, {answerer.settings['images']}"

    def answer(self, prompts: Sequence[Prompt]) -> Iterator[tuple[int, Answer]]:
        for start in range(0, len(prompts), PIECE):
            piece = [replace(prompt, images=[self._shown(image) for image in prompt.images]) for prompt in prompts[start : start + PIECE]]
            for place, answer in self._answerer.answer(piece):
                yield start + place, answer

    def _shown(self, image: ImageSource) -> ImageSource:
        own = _read(image) if str(image) in self._places else None
        if own is None:
            return image
        if self._picture == "blurred":
            return blur(own)
        place = self._places[str(image)] + len(self._images) // 2  # neighbours are often the two images of a pair
        further = [*self._images, *self._images][place : place + len(self._images)]
        return next((other for other in further if str(other) != str(image) and _read(other) is not None), image)


def _read(image: ImageSource) -> Image.Image | None:
    """Return the image, or None if it cannot be read."""
    try:
        return read_image(image)
    except ImageError:
        return None
