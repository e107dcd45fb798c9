"""Tiny random models of nine families of transformers, with their processors, built without a network.

Each family has its own way: LLaVA-OneVision and InternVL cut images into tiles, Qwen-VL gives image tokens places in the image,
SmolVLM and Idefics3 put marks between tiles, Aya Vision writes another token for an image than it makes of it, and PaliGemma reads
image and question in both directions.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import transformers as tf
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

TEXT = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
VISION = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
TURN = (
    "{% for message in messages %}{{ message['role'] + ':' }}{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ ' ' + message['content'][0]['text'] + eos_token }}{% endgeneration %}{% else %}"
    "{% for part in message['content'] %}{{ 'IMAGE' if part['type'] == 'image' else ' ' + part['text'] }}{% endfor %}"
    "{% endif %}{% endfor %}"
)


def tokenizer(**specials: str) -> tf.PreTrainedTokenizerFast:
    """One token per byte, and the special tokens of a family under the names that its processor asks for."""
    extra = [f"<row_{row}_col_{column}>" for row in range(1, 4) for column in range(1, 4)]
    tokens = ["<pad>", "<s>", "</s>", *specials.values(), *extra, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    backend = Tokenizer(models.BPE({token: index for index, token in enumerate(tokens)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    made = tf.PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", bos_token="<s>", eos_token="</s>", extra_special_tokens=dict(specials)
    )
    made.add_special_tokens({"additional_special_tokens": extra}, replace_extra_special_tokens=False)
    return made


def template(image: str) -> str:
    return TURN.replace("IMAGE", image)


def llava() -> tuple[Any, Any]:
    words = tokenizer(image_token="<image>")
    images = tf.CLIPImageProcessor(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    strategy = {"vision_feature_select_strategy": "default"}
    processor = tf.LlavaProcessor(
        images, words, patch_size=14, num_additional_image_tokens=1, chat_template=template("<image>"), **strategy
    )
    vision = tf.CLIPVisionConfig(**VISION, image_size=28, patch_size=14)
    text = tf.LlamaConfig(**TEXT, vocab_size=len(words))
    return tf.LlavaForConditionalGeneration(
        tf.LlavaConfig(vision_config=vision, text_config=text, image_token_id=processor.image_token_id, **strategy)
    ), processor


def llava_onevision() -> tuple[Any, Any]:
    words = tokenizer(image_token="<image>", video_token="<video>")
    pinpoints = [[28, 28], [28, 56], [56, 28], [56, 56]]
    images = tf.LlavaOnevisionImageProcessor(size={"height": 28, "width": 28}, image_grid_pinpoints=pinpoints)
    processor = tf.LlavaOnevisionProcessor(
        images,
        words,
        tf.LlavaOnevisionVideoProcessor(size={"height": 28, "width": 28}),
        num_image_tokens=4,
        vision_feature_select_strategy="full",
        chat_template=template("<image>"),
        vision_aspect_ratio="anyres_max_9",
    )
    vision = tf.SiglipVisionConfig(**VISION, image_size=28, patch_size=14, vision_use_head=False)
    config = tf.LlavaOnevisionConfig(
        vision_config=vision,
        text_config=tf.Qwen2Config(**TEXT, vocab_size=len(words)),
        image_token_id=processor.image_token_id,
        video_token_id=processor.video_token_id,
        image_grid_pinpoints=pinpoints,
        vision_feature_select_strategy="full",
        vision_feature_layer=-1,
    )
    return tf.LlavaOnevisionForConditionalGeneration(config), processor


def _qwen_words() -> tuple[Any, dict[str, int]]:
    names = {"image": "<|image_pad|>", "video": "<|video_pad|>", "vision_start": "<|vision_start|>", "vision_end": "<|vision_end|>"}
    words = tokenizer(**{f"{key}_token": value for key, value in names.items()})
    return words, {f"{key}_token_id": words.convert_tokens_to_ids(value) for key, value in names.items()}


def qwen2_5_vl() -> tuple[Any, Any]:
    words, ids = _qwen_words()
    images = tf.Qwen2VLImageProcessor(patch_size=14, merge_size=2, size={"shortest_edge": 56 * 56, "longest_edge": 112 * 112})
    video = tf.Qwen2VLVideoProcessor(patch_size=14, merge_size=2)
    prompt = template("<|vision_start|><|image_pad|><|vision_end|>")
    processor = tf.Qwen2_5_VLProcessor(images, words, video, chat_template=prompt)
    vision = {"depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 4, "out_hidden_size": 32, "patch_size": 14}
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
    config = tf.Qwen2_5_VLConfig(
        vision_config={**vision, "window_size": 56, "fullatt_block_indexes": [1]},
        text_config={**TEXT, "vocab_size": len(words), "rope_parameters": rope},
        **ids,
    )
    return tf.Qwen2_5_VLForConditionalGeneration(config), processor


def qwen3_vl() -> tuple[Any, Any]:
    words, ids = _qwen_words()
    images = tf.Qwen2VLImageProcessor(patch_size=16, merge_size=2, size={"shortest_edge": 64 * 64, "longest_edge": 128 * 128})
    video = tf.Qwen3VLVideoProcessor(patch_size=16, merge_size=2)
    prompt = template("<|vision_start|><|image_pad|><|vision_end|>")
    processor = tf.Qwen3VLProcessor(images, words, video, chat_template=prompt)
    vision = {"depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 4, "out_hidden_size": 32, "patch_size": 16}
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0, "mrope_interleaved": True}
    config = tf.Qwen3VLConfig(
        vision_config={**vision, "num_position_embeddings": 64, "deepstack_visual_indexes": [0]},
        text_config={**TEXT, "vocab_size": len(words), "head_dim": 8, "rope_parameters": rope},
        **ids,
    )
    return tf.Qwen3VLForConditionalGeneration(config), processor


def idefics3() -> tuple[Any, Any]:
    return _of_idefics(tf.Idefics3ForConditionalGeneration, tf.Idefics3ImageProcessor, tf.Idefics3Processor)


def smolvlm() -> tuple[Any, Any]:
    pytest.importorskip("num2words")
    return _of_idefics(tf.SmolVLMForConditionalGeneration, tf.SmolVLMImageProcessor, tf.SmolVLMProcessor, tf.SmolVLMVideoProcessor())


def _of_idefics(model: Any, image_processor: Any, processor: Any, *more: Any) -> tuple[Any, Any]:
    words = tokenizer(image_token="<image>", fake_image_token="<fake_token_around_image>", global_image_token="<global-img>")
    images = image_processor(size={"longest_edge": 56}, max_image_size={"longest_edge": 28})
    built = processor(images, words, *more, image_seq_len=1, chat_template=template("<image>"))
    config = model.config_class(
        vision_config={**VISION, "image_size": 28, "patch_size": 14},
        text_config=tf.LlamaConfig(**TEXT, vocab_size=len(words)),
        image_token_id=built.image_token_id,
        scale_factor=2,
        pad_token_id=0,
    )
    return model(config), built


def internvl() -> tuple[Any, Any]:
    names = {"start_image_token": "<img>", "end_image_token": "</img>", "context_image_token": "<IMG_CONTEXT>", "video_token": "<video>"}
    words = tokenizer(**names)
    images = tf.GotOcr2ImageProcessor(size={"height": 28, "width": 28}, min_patches=1, max_patches=4, crop_to_patches=True)
    processor = tf.InternVLProcessor(
        images, words, tf.InternVLVideoProcessor(), image_seq_length=1, chat_template=template("<IMG_CONTEXT>\n")
    )
    config = tf.InternVLConfig(
        vision_config=tf.InternVLVisionConfig(**VISION, image_size=[28, 28], patch_size=[14, 14]),
        text_config=tf.Qwen2Config(**TEXT, vocab_size=len(words)),
        image_token_id=processor.image_token_id,
        image_seq_length=1,
        downsample_ratio=0.5,
    )
    return tf.InternVLForConditionalGeneration(config), processor


def paligemma() -> tuple[Any, Any]:
    words = tokenizer(image_token="<image>")
    images = tf.SiglipImageProcessor(size={"height": 28, "width": 28})
    images.image_seq_length = 4
    processor = tf.PaliGemmaProcessor(images, words, chat_template=template("<image>"))
    config = tf.PaliGemmaConfig(
        vision_config=tf.SiglipVisionConfig(**VISION, image_size=28, patch_size=14, vision_use_head=False, projection_dim=32),
        text_config=tf.GemmaConfig(**TEXT, head_dim=8, vocab_size=len(words)),
        image_token_id=processor.image_token_id,
        projection_dim=32,
    )
    return tf.PaliGemmaForConditionalGeneration(config), processor


def aya_vision() -> tuple[Any, Any]:
    marks = {
        "img_patch_token": "<|IMG_PATCH|>",
        "img_line_break_token": "<|IMG_LINE_BREAK|>",
        "tile_token": "TILE",
        "tile_global_token": "ALL",
    }
    words = tokenizer(image_token="<image>", start_of_img_token="<|START_OF_IMG|>", end_of_img_token="<|END_OF_IMG|>", **marks)
    images = tf.GotOcr2ImageProcessor(size={"height": 28, "width": 28}, min_patches=1, max_patches=4, crop_to_patches=True)
    processor = tf.AyaVisionProcessor(images, words, patch_size=14, img_size=28, downsample_factor=2, chat_template=template("<image>"))
    config = tf.AyaVisionConfig(
        vision_config=tf.SiglipVisionConfig(**VISION, image_size=28, patch_size=14, vision_use_head=False),
        text_config=tf.CohereConfig(**TEXT, vocab_size=len(words)),
        image_token_id=processor.image_token_id,
        downsample_factor=2,
    )
    return tf.AyaVisionForConditionalGeneration(config), processor


FAMILIES = {
    make.__name__: make for make in (llava, llava_onevision, qwen2_5_vl, qwen3_vl, idefics3, smolvlm, internvl, aya_vision, paligemma)
}


def mllama() -> tuple[Any, Any]:
    words = tokenizer(image_token="<|image|>", python_tag="<|python_tag|>")
    images = tf.MllamaImageProcessor(size={"height": 28, "width": 28}, max_image_tiles=4)
    processor = tf.MllamaProcessor(images, words, chat_template="<s>" + template("<|image|>"))
    vision = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_global_layers": 1, "attention_heads": 4}
    ratios = {"supported_aspect_ratios": [[1, 1], [1, 2], [1, 3], [1, 4], [2, 1], [2, 2], [3, 1], [4, 1]]}
    sizes = {"image_size": 28, "patch_size": 14, "vision_output_dim": 64, "intermediate_layers_indices": [0]}
    rope = {"rope_type": "default", "rope_theta": 10000.0}
    text = TEXT | {"num_hidden_layers": 3}  # later tokens attend to those that attended to an image
    config = tf.MllamaConfig(
        vision_config={**vision, **sizes, **ratios},
        text_config={**text, "vocab_size": len(words), "cross_attention_layers": [1], "rope_parameters": rope, "pad_token_id": 0},
        image_token_index=processor.image_token_id,
    )
    return tf.MllamaForConditionalGeneration(config), processor


def gemma3() -> tuple[Any, Any]:
    """Its placeholder is one of the marks around the image tokens."""
    words = tokenizer(image_token="<image_soft>", boi_token="<boi>", eoi_token="<eoi>")
    images = tf.Gemma3ImageProcessor(size={"height": 28, "width": 28})
    ids = {f"{name}_token_index": words.convert_tokens_to_ids(f"<{token}>") for name, token in
           {"boi": "boi", "eoi": "eoi", "image": "image_soft"}.items()}  # fmt: skip
    layers = {"sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"]}
    text = {**TEXT, "vocab_size": len(words), "head_dim": 8, "query_pre_attn_scalar": 8, **layers}
    vision = {**VISION, "image_size": 28, "patch_size": 14, "vision_use_head": False}
    config = tf.Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4, **ids)
    processor = tf.Gemma3Processor(images, words, image_seq_length=4, chat_template=template("<boi>"))
    return tf.Gemma3ForConditionalGeneration(config), processor


def ovis2() -> tuple[Any, Any]:
    """It writes several other tokens in place of its placeholder."""
    names = ("ATOM", "START", "GRID", "COL", "ROW", "END")
    words = tokenizer(image_token="<image>", **{name.lower(): f"<IMG_{name}>" for name in names})
    atom, *indicators = (words.convert_tokens_to_ids(f"<IMG_{name}>") for name in names)
    images = tf.Ovis2ImageProcessor(size={"height": 28, "width": 28}, max_patches=4)
    vision = {**VISION, "image_size": 28, "patch_size": 14, "hidden_stride": 1, "num_visual_indicator_tokens": 5}
    text = {**TEXT, "vocab_size": len(words), "model_type": "qwen2"}
    ids = {"image_token_id": atom, "visual_indicator_token_ids": indicators, "vocab_size": len(words), "hidden_size": 32}
    config = tf.Ovis2Config(vision_config=vision, text_config=text, **ids)
    return tf.Ovis2ForConditionalGeneration(config), tf.Ovis2Processor(images, words, image_seq_length=4, chat_template=template("<image>"))


def blip2() -> tuple[Any, Any]:
    """Its processor puts image tokens before the text, and keeps the token as an object."""
    words = tokenizer()
    processor = tf.Blip2Processor(tf.BlipImageProcessor(size={"height": 28, "width": 28}), words, num_query_tokens=3)
    processor.chat_template = template("")
    qformer = {**VISION, "vocab_size": len(words), "encoder_hidden_size": 32, "pad_token_id": 0}
    text = {"model_type": "opt", "vocab_size": len(words) + 8, "hidden_size": 32, "word_embed_proj_dim": 32, "ffn_dim": 48}
    text |= {"num_hidden_layers": 2, "num_attention_heads": 4}
    vision = {**VISION, "image_size": 28, "patch_size": 14}
    image_token = words.convert_tokens_to_ids("<image>")
    config = tf.Blip2Config(
        vision_config=vision, qformer_config=qformer, text_config=text, num_query_tokens=3, image_token_index=image_token
    )
    return tf.Blip2ForConditionalGeneration(config), processor


def build(family: str) -> tuple[Any, Any]:
    torch.manual_seed(0)
    model, processor = (FAMILIES | {"mllama": mllama, "gemma3": gemma3, "ovis2": ovis2, "blip2": blip2})[family]()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.2)
            elif name.endswith("attn_gate") or name.endswith("mlp_gate"):
                parameter.fill_(0.7)  # they start closed
    return model.eval(), processor


def picture(seed: int, size: tuple[int, int]) -> Image.Image:
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize(size, Image.Resampling.NEAREST)


def make_records(turns: int) -> list[dict[str, Any]]:
    """Two images of different shape with three records each, in turn; Hugging Face rows with images in memory."""
    images = [picture(0, (60, 40)), picture(1, (40, 80))]
    answers = ["Yes.", "A red bus in front of a house.", "left", "No, three dogs.", "It is blue", "Many"]
    records = []
    for index, answer in enumerate(answers):
        messages = []
        for turn in range(turns):
            content = [{"type": "image"}] if turn == 0 else []
            messages.append({"role": "user", "content": [*content, {"type": "text", "text": f"Question {index * (turn + 1)}?"}]})
            messages.append({"role": "assistant", "content": [{"type": "text", "text": answer * (turn + 1)}]})
        records.append({"id": str(index), "messages": messages, "images": [images[index % 2]]})
    return records
