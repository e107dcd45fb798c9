"""MoFProcessor turns text and images into model inputs: placeholders are expanded, and images become a uint8 tensor."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar, TypedDict

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import AutoImageProcessor, AutoProcessor, BatchFeature, PreTrainedTokenizerBase
from transformers.image_processing_utils import BaseImageProcessor
from transformers.processing_utils import MultiModalData, ProcessorMixin

from encoders import StoredImage, View
from encoders.images.opening import ADDRESSES, read_address
from encoders.images.reading import read_image
from encoders.images.resizing import Centre, Fit, Interpolation
from encoders.saved_folders import WEIGHTS, check_folder, recording
from mof.auto_map import NamesCode
from mof.chat_templates import choose_chat_template
from mof.config import MoFConfig
from mof.data.prompts import ready_for_prompts
from mof.data.records import IMAGE_PLACEHOLDER
from mof.tiles import count_tiles, tiled_pixels

if TYPE_CHECKING:
    from mof.model import MoFForConditionalGeneration

# Shapes: M images of all texts in order (with tiles, an image counts once for its thumbnail and once for each tile), S the side of an
# image, H, W = rows and columns of an image as given.


class MoFImagesKwargs(TypedDict, total=False):
    """MoFImagesKwargs names the options of a call for images. transformers finds them among the arguments of a processor by these names."""

    image_size: int
    fit: Fit
    background: Sequence[int]
    max_tiles: int
    return_tensors: str | None


class MoFImageProcessor(NamesCode, BaseImageProcessor):
    """MoFImageProcessor turns images into uint8 pixels of a single size. It does not normalise them, because each encoder does this.

    Args:
        image_size: S, in pixels.
        fit: the way in which an image becomes square: "pad", "crop" or "squash", as in `encoders.preprocessing.Preprocessing`.
        background: RGB in 0..255, around padded images.
        interpolation, centre: the filter, and the rounding of the crop's place, as in `encoders.preprocessing.Preprocessing`.
        max_tiles: the largest number of tiles of an image. An image of more than S x S pixels gives its thumbnail and its tiles
            (`mof.tiles`), each with the tokens of an image. By default there are no tiles.

    Raises:
        ValueError: for `max_tiles` below 1.
    """

    model_input_names: ClassVar[list[str]] = ["pixel_values"]
    valid_kwargs = MoFImagesKwargs

    def __init__(
        self,
        image_size: int = 336,
        fit: Fit = "pad",
        background: Sequence[int] = (122, 116, 104),
        interpolation: Interpolation = "bicubic",
        centre: Centre = "round",
        max_tiles: int = 1,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if max_tiles < 1:
            raise ValueError(f"max_tiles must be at least 1, got {max_tiles}; 1 makes no tiles")
        self.max_tiles = max_tiles
        self.image_size, self.fit, self.background = image_size, fit, list(background)
        self.interpolation, self.centre = interpolation, centre

    @property
    def view(self) -> View:
        """Return the view through which the model sees images. Features in a store must come from the same view."""
        red, green, blue = self.background
        return View(self.image_size, self.fit, (red, green, blue), interpolation=self.interpolation, centre=self.centre)

    def fetch_images(self, images: Any) -> Any:
        """Return RGB images for a single image or nested lists of images, in the same nesting.

        An image is a file, an address, a PIL image, a NumPy array [H, W, 3] or a torch tensor [3, H, W]; arrays and tensors are uint8.

        Raises:
            TypeError: for another object; the message names its type.
            ValueError: for an array or a tensor of another shape or dtype.
        """
        if isinstance(images, (list, tuple)):
            return [self.fetch_images(image) for image in images]
        if isinstance(images, str) and images.startswith(ADDRESSES):
            images = read_image(read_address(images))
        if isinstance(images, (np.ndarray, Tensor)):
            images = _from_array(images)
        if not isinstance(images, (str, os.PathLike, Image.Image)):
            raise TypeError(
                f"an image cannot be a {type(images).__name__}: give a file, an address, a PIL image, a NumPy array [H, W, 3] "
                "or a torch tensor [3, H, W] of uint8"
            )
        return read_image(images)

    def preprocess(
        self,
        images: Any,
        *,
        image_size: int | None = None,
        fit: Fit | None = None,
        background: Sequence[int] | None = None,
        max_tiles: int | None = None,
        return_tensors: str | None = None,
    ) -> BatchFeature:
        """Return pixel_values [M, 3, S, S] uint8 of a single image or nested lists of images.

        An option that is None has the processor's value. Images from a feature store (`encoders.StoredImage`) give encoder_features
        [M, F] instead. With tiles, `tile_counts` says how many of the M belong to each image.

        Raises:
            ValueError: for a batch of stored and other images, and for tiles of stored images.
        """
        most = self.max_tiles if max_tiles is None else max_tiles
        flat = _flatten(images)
        if stored := [image.features for image in flat if isinstance(image, StoredImage)]:
            if len(stored) != len(flat):
                raise ValueError(
                    f"{len(stored)} of {len(flat)} images come out of a feature store; a batch takes all of its images from there, or none"
                )
            if most > 1:
                raise ValueError(
                    f"a feature store holds whole images, without tiles: set max_tiles=1 (now {most}) or encode while training"
                )
            return BatchFeature({"encoder_features": torch.stack(stored)}, tensor_type=return_tensors)  # [M, F]
        flat = self.fetch_images(flat)
        chosen: dict[str, Any] = {"image_size": image_size, "fit": fit, "background": background}
        view = replace(self.view, **{name: value for name, value in chosen.items() if value is not None})
        if most == 1:
            return BatchFeature({"pixel_values": torch.stack([view.pixels(image) for image in flat])}, tensor_type=return_tensors)
        tiles = [tiled_pixels(image, view, most) for image in flat]  # of [K, 3, S, S]
        counts = [len(pixels) for pixels in tiles]
        return BatchFeature({"pixel_values": torch.cat(tiles), "tile_counts": counts}, tensor_type=return_tensors)  # [M, 3, S, S]

    def get_number_of_image_patches(self, height: int, width: int, images_kwargs: dict[str, Any] | None = None) -> int:
        """Return the number of rows of pixel_values that an image of this size gives. Servers ask for it by this name."""
        options = images_kwargs or {}
        return count_tiles(height, width, options.get("image_size") or self.image_size, options.get("max_tiles") or self.max_tiles)


AutoImageProcessor.register(MoFConfig, image_processor_classes=dict.fromkeys(("torchvision", "pil"), MoFImageProcessor), exist_ok=True)


class MoFProcessor(NamesCode, ProcessorMixin):
    """MoFProcessor joins a tokenizer and an image processor, and expands each placeholder to the image tokens of an image.

    It pads on the left. The tokenizer is changed to put nothing behind a text (`mof.data.prompts`), so that a model goes on where a
    prompt ends.

    Args:
        tokens_per_image: the number of image tokens that replace a placeholder, for an image without tiles: the mixer's
            `tokens_per_image`.
        image_token: the placeholder, which is a single token of the tokenizer.
    """

    def __init__(
        self,
        image_processor: MoFImageProcessor,
        tokenizer: PreTrainedTokenizerBase,
        chat_template: str | None = None,
        tokens_per_image: int = 576,
        image_token: str = IMAGE_PLACEHOLDER,
    ) -> None:
        self.tokens_per_image = tokens_per_image
        self.image_token = image_token
        self.image_token_id = tokenizer.convert_tokens_to_ids(image_token)
        tokenizer.padding_side = "left"  # generation continues after the last token; SupervisedCollator pads on the right
        super().__init__(image_processor, tokenizer, chat_template=chat_template)
        ready_for_prompts(self)

    @classmethod
    def from_parts(
        cls, model: MoFForConditionalGeneration, tokenizer: PreTrainedTokenizerBase, chat_template: str | None = None, max_tiles: int = 1
    ) -> MoFProcessor:
        """Return the processor of a model. A tokenizer without padding token pads with its end-of-sequence token.

        Args:
            chat_template: a Jinja template; by default `mof.chat_templates` chooses the template.
            max_tiles: the largest number of tiles of an image, see `MoFImageProcessor`.

        Raises:
            ValueError: for a tokenizer other than the model's.
        """
        mixer = model.mixer
        first = next(iter(mixer.encoders.values()))
        background = [round(255 * mean) for mean in first.mean]  # padding is then near zero for the first encoder, as in LLaVA
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        processor = cls(
            MoFImageProcessor(mixer.image_size, background=background, max_tiles=max_tiles),
            tokenizer,
            chat_template=chat_template or choose_chat_template(tokenizer),
            tokens_per_image=mixer.tokens_per_image,
        )
        if processor.image_token_id != model.config.image_token_id:
            raise ValueError(
                f"{IMAGE_PLACEHOLDER} has id {processor.image_token_id} in this tokenizer and {model.config.image_token_id} in "
                "the model; give the tokenizer that the model's from_parts was given"
            )
        return processor

    def save_pretrained(self, save_directory: str | os.PathLike[str], **kwargs: Any) -> list[str]:
        """Save as transformers does, and record digests."""
        with recording(save_directory):
            return super().save_pretrained(save_directory, **kwargs)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike[str], **kwargs: Any) -> Any:
        """Load as transformers does.

        Raises:
            DamagedError: for a folder with a file, other than weights, that was changed since it was saved.
        """
        check_folder(pretrained_model_name_or_path, without=WEIGHTS)
        return super().from_pretrained(pretrained_model_name_or_path, **kwargs)

    # The call is transformers' own: it takes images and texts with a placeholder per image, all images in order, and options of both.
    # It brings `return_mm_token_type_ids`, `return_text_replacement_offsets`, and the refusal of truncation that cuts an image.

    def prepare_inputs_layout(self, images: Any = None, text: str | list[str] | None = None, **kwargs: Any) -> tuple[Any, ...]:
        """Return images and texts as flat lists, or None if there are none, and None for videos and for audio."""
        images = None if images is None else _flatten(images)
        return images or None, [text] if isinstance(text, str) else None if text is None else list(text), None, None

    def validate_inputs(self, images: Any = None, text: list[str] | None = None, **kwargs: Any) -> None:
        """Raise a ValueError when placeholders and images differ in number, and when neither is given."""
        if images is None and text is None:
            raise ValueError("give images, text or both")
        placeholders, count = sum(part.count(self.image_token) for part in text or []), len(images or [])
        if text is not None and placeholders != count:
            raise ValueError(f"{placeholders} {self.image_token} placeholders in the text, but {count} images")

    def _process_images(self, images: list[Any], **options: Any) -> tuple[BatchFeature, list[str]]:
        """Return the model's image inputs, and the text that replaces the placeholder of each image."""
        processed = self.image_processor(images, **options)
        texts = [self.replace_image_token(processed, index) for index in range(len(images))]
        processed.pop("tile_counts", None)  # the model does not take it
        return processed, texts

    def replace_image_token(self, image_inputs: Any, image_idx: int, **kwargs: Any) -> str:
        """Return the text that replaces the placeholder of an image: the tokens of its thumbnail and of its tiles."""
        tiles = int(image_inputs["tile_counts"][image_idx]) if "tile_counts" in image_inputs else 1
        return self.image_token * (tiles * self.tokens_per_image)

    def _get_num_multimodal_tokens(self, image_sizes: Sequence[Sequence[int]] | None = None, **kwargs: Any) -> MultiModalData:
        """Return the tokens and the rows of pixel_values that each image takes, for sizes (rows, columns); servers ask for them."""
        if image_sizes is None:
            return MultiModalData()
        tiles = [self.image_processor.get_number_of_image_patches(height, width, kwargs) for height, width in image_sizes]
        return MultiModalData(num_image_tokens=[self.tokens_per_image * count for count in tiles], num_image_patches=tiles)


AutoProcessor.register(MoFConfig, MoFProcessor, exist_ok=True)


def _from_array(array: np.ndarray | Tensor) -> Image.Image:
    """Return the image of a NumPy array [H, W, 3] or a torch tensor [3, H, W] of uint8."""
    channels, expected = (0, "[3, H, W]") if isinstance(array, Tensor) else (-1, "[H, W, 3]")
    if str(array.dtype).removeprefix("torch.") != "uint8" or array.ndim != 3 or array.shape[channels] != 3:
        raise ValueError(
            f"an image as {type(array).__name__} must be {expected} of uint8, got {list(array.shape)} of {array.dtype}; "
            "scale other numbers to 0..255 and round them first, and give several images as a list"
        )
    pixels = array.permute(1, 2, 0).cpu().numpy() if isinstance(array, Tensor) else array
    return Image.fromarray(np.ascontiguousarray(pixels))


def _flatten(images: Any) -> list[Any]:
    """Return a flat list of images, given a single image, a list or nested lists."""
    if not isinstance(images, (list, tuple)):
        return [images]
    return [leaf for image in images for leaf in _flatten(image)]
