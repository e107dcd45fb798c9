"""MoFProcessor turns text and images into model inputs: placeholders are expanded, and images become a uint8 tensor."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from transformers import AutoProcessor, BatchFeature, PreTrainedTokenizerBase
from transformers.processing_utils import MultiModalData, ProcessorMixin

from encoders.saved_folders import WEIGHTS, check_folder, recording
from mof.auto_map import NamesCode
from mof.chat_templates import choose_chat_template
from mof.config import MoFConfig
from mof.data.prompts import ready_for_prompts
from mof.data.records import IMAGE_PLACEHOLDER
from mof.image_processor import MoFImageProcessor, flatten

if TYPE_CHECKING:
    from mof.model import MoFForConditionalGeneration


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
        images = None if images is None else flatten(images)
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
