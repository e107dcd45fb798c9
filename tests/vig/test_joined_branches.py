"""Both prompts of a contrast in one batch, for classes of transformers that keep image features and states in different ways."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as tf
from support.families import TEXT as SIZES
from support.families import VISION, build
from support.two_passes import chats, encoder, next_logits, settings
from torch import Tensor

from vig.decoding import ICD, M3ID, PAI, VCD
from vig.scoring.prefix_cache import cache_name

IMAGE, TOKENS = 98, 4
TEXT = {**SIZES, "vocab_size": 99, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SQUARE = {**VISION, "image_size": 28, "patch_size": 14}
Pixels = Callable[[int], dict[str, Tensor]]


def mistral3() -> tuple[Any, int, Pixels]:
    """A list with the features of each image."""
    parts = {"vision_config": tf.PixtralVisionConfig(**SQUARE, head_dim=8), "text_config": tf.MistralConfig(**TEXT)}
    config = tf.Mistral3Config(**parts, image_token_index=IMAGE, spatial_merge_size=1, vision_feature_layer=-1)
    sizes = {"image_sizes": torch.tensor([[28, 28]])}
    return tf.Mistral3ForConditionalGeneration(config), 4, lambda n: {"pixel_values": torch.randn(n, 3, 28, 28), **_each(n, sizes)}


def idefics2() -> tuple[Any, int, Pixels]:
    """Images of a row beside each other."""
    perceiver = {"resampler_n_latents": 3, "resampler_depth": 1, "hidden_size": 32, "resampler_n_heads": 4, "resampler_head_dim": 8}
    config = tf.Idefics2Config(vision_config=SQUARE, perceiver_config=perceiver | {"num_key_value_heads": 2},
                               text_config=tf.MistralConfig(**TEXT), image_token_id=IMAGE)  # fmt: skip
    return tf.Idefics2ForConditionalGeneration(config), 3, lambda n: {"pixel_values": torch.randn(n, 1, 3, 28, 28)}


def perception_lm() -> tuple[Any, int, Pixels]:
    """An output of features that cannot be made of the features alone."""
    sizes = {"embed_dim": 32, "img_size": [28, 28], "depth": 2, "num_heads": 4, "ref_feat_shape": [2, 2], "global_pool": ""}
    vision = {"architecture": "vit_pe_core_large_patch14_336", "model_args": {**sizes, "use_post_transformer_norm": False}}
    config = tf.PerceptionLMConfig(vision_config=vision, text_config=tf.LlamaConfig(**TEXT), image_token_id=IMAGE, video_token_id=97,
                                   projector_pooling_ratio=1, vision_use_cls_token=True)  # fmt: skip
    return tf.PerceptionLMForConditionalGeneration(config), 4, lambda n: {"pixel_values": torch.randn(n, 1, 3, 28, 28)}


def glm4v() -> tuple[Any, int, Pixels]:
    """Patches of all images in one row, and places in the image."""
    vision = {"depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 4, "out_hidden_size": 32, "image_size": 28}
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0, "partial_rotary_factor": 1.0}
    marks = {f"{kind}_{place}_token_id": 90 + i for i, (kind, place) in enumerate([("image", "start"), ("image", "end"), ("video", "start"),
                                                                                 ("video", "end")])}  # fmt: skip
    text = {**TEXT, "head_dim": 8, "rope_parameters": rope}
    config = tf.Glm4vConfig(vision_config=vision, text_config=text, image_token_id=IMAGE, video_token_id=95, **marks)
    grid = {"image_grid_thw": torch.tensor([[1, 4, 4]])}
    return tf.Glm4vForConditionalGeneration(config), 4, lambda n: {"pixel_values": torch.randn(n * 16, 3 * 2 * 14 * 14), **_each(n, grid)}


def lfm2_vl() -> tuple[Any, int, Pixels]:
    """Recurrent layers, which padding must not enter."""
    vision = tf.Siglip2VisionConfig(**VISION, patch_size=14, num_patches=16, vision_use_head=False)
    text = tf.Lfm2Config(**TEXT, layer_types=["conv", "full_attention"], block_auto_adjust_ff_dim=False)
    config = tf.Lfm2VlConfig(vision_config=vision, text_config=text, image_token_id=IMAGE, downsample_factor=2)
    shapes = {"spatial_shapes": torch.tensor([[4, 4]]), "pixel_attention_mask": torch.ones(1, 16, dtype=torch.long)}
    return tf.Lfm2VlForConditionalGeneration(config), 4, lambda n: {"pixel_values": torch.randn(n, 16, 3 * 14 * 14), **_each(n, shapes)}


def _each(count: int, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.repeat(count, 1) for name, value in inputs.items()}


def prompts(model: Any, image_tokens: int, lengths: tuple[int, ...], instruction: int) -> dict[str, Tensor]:
    """Prompts of different lengths, padded on the left, behind an image and so many tokens of an instruction."""
    rows = [[1, *[IMAGE] * image_tokens, *range(20, 20 + instruction), *range(40, 40 + length)] for length in lengths]
    ids = torch.tensor([[0] * (max(map(len, rows)) - len(row)) + row for row in rows])
    kinds = {"mm_token_type_ids": (ids == IMAGE).long()} if "Glm" in type(model).__name__ else {}
    return {"input_ids": ids, "attention_mask": (ids != 0).long(), **kinds}


def alone(inputs: dict[str, Tensor], row: int) -> dict[str, Tensor]:
    """The inputs of a row, without padding."""
    count, kept = len(inputs["input_ids"]), inputs["attention_mask"].bool()[row]
    own = {name: value.view(count, -1, *value.shape[1:])[row] for name, value in inputs.items()}
    return {name: value[:, kept] if name in ("input_ids", "attention_mask", "mm_token_type_ids") else value for name, value in own.items()}


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("instruction", [0, 3])
@pytest.mark.parametrize("family", [mistral3, idefics2, perception_lm, glm4v, lfm2_vl])
def test_two_prompts_in_one_batch(family: Any, instruction: int, beams: int) -> None:
    torch.manual_seed(0)
    model, image_tokens, pixels = family()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.2)
    model.eval().generation_config.update(eos_token_id=None, pad_token_id=0)
    clean, null = ({**prompts(model, image_tokens, (9, 4), words), **pixels(2)} for words in (0, instruction))
    calls: list[int] = []
    model.lm_head.register_forward_hook(lambda *_: calls.append(1))
    options = {"max_new_tokens": TOKENS, "num_beams": beams, "do_sample": False, "suppress_tokens": [IMAGE, 0], "output_logits": True}
    made = model.generate(**clean, **options, return_dict_in_generate=True, custom_generate=VCD(beta=0), null_inputs=null)
    assert len(calls) == TOKENS * (2 if instruction else 1)
    for row, tokens in enumerate(made.sequences):
        for step in range(TOKENS):
            generated = tokens[None, clean["input_ids"].shape[1] :][:, :step]
            logits, null_logits = (next_logits(model, alone(inputs, row), generated) for inputs in (clean, null))
            place = row if beams == 1 else int(made.beam_indices[row][step])
            torch.testing.assert_close(made.logits[step][place].double(), (2 * logits - null_logits)[0], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("method", "passes"), [(VCD(), 1), (ICD(), 2), (M3ID(decay=0.3), 2), (PAI(alpha=0, gamma=2), 2)], ids=lambda x: str(x)[:4]
)
def test_null_prompts_with_other_tokens_have_their_own_passes(method: Any, passes: int, tiny_model: Any, tiny_processor: Any) -> None:
    encode, asked, calls = encoder(tiny_processor), chats((1, 2)), []
    counter = tiny_model.language_model.lm_head.register_forward_hook(lambda *_: calls.append(1))
    made = tiny_model.generate(**encode(asked), **settings(tiny_processor), **method.options(asked, encode))
    counter.remove()
    assert len(calls) == passes * len(made.logits)


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "gemma3"])
def test_a_conversation_goes_on_with_the_cache_of_the_rows_with_images(family: str) -> None:
    model, processor = build(family)
    encode, asked = encoder(processor), chats((1,)) * 2
    inputs = encode(asked)
    first = model.generate(**inputs, **settings(processor), **VCD().options(asked, encode))
    longer = torch.cat([first.sequences, torch.full((2, 3), 120)], dim=1)
    kinds = {"mm_token_type_ids": torch.zeros_like(longer)} if "mm_token_type_ids" in inputs else {}
    cache = {cache_name(first): first[cache_name(first)]}
    again = {"input_ids": longer, "attention_mask": torch.ones_like(longer), **cache, **kinds}
    made = model.generate(**again, **settings(processor))
    for step in range(2):
        generated = made.sequences[:, inputs["input_ids"].shape[1] : longer.shape[1] + step]
        torch.testing.assert_close(made.logits[step].double(), next_logits(model, inputs, generated), atol=1e-4, rtol=1e-4)


class Broken(tf.LogitsProcessor):
    """Raises at the second token."""

    def __init__(self, error: BaseException) -> None:
        self.error, self.seen = error, 0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.seen += 1
        if self.seen == 2:
            raise self.error
        return scores


@pytest.mark.parametrize("error", [KeyboardInterrupt(), ZeroDivisionError()], ids=["interrupted", "failed"])
@pytest.mark.parametrize("method", [VCD(), PAI(alpha=0.7, gamma=2, first_layer=0)], ids=["vcd", "pai"])
def test_a_stop_between_tokens_leaves_nothing_behind(method: Any, error: BaseException) -> None:
    model, processor = build("qwen2_5_vl")
    encode, asked = encoder(processor), chats()
    plain = model.generate(**encode(asked), **settings(processor))
    offsets, names = model.model.rope_deltas, [getattr(module, "config", None) for module in model.modules()]
    kept = [config._attn_implementation for config in names if config is not None]
    with pytest.raises(type(error)):
        model.generate(**encode(asked), **settings(processor), logits_processor=[Broken(error)], **method.options(asked, encode))
    assert torch.equal(model.model.rope_deltas, offsets)
    assert [config._attn_implementation for config in names if config is not None] == kept
    again = model.generate(**encode(asked), **settings(processor))
    assert all(map(torch.equal, plain.logits, again.logits))
