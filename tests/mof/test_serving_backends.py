"""The calls that vLLM's and SGLang's backends for models of transformers make, on models with embedded encoders.

They make the base model from its config, on the meta device; fill it from the checkpoint by transformers' mapping of names; encode images
by `get_image_features`; put them into the embeddings themselves; and take hidden states. Prompts are expanded by the processor's offsets.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from accelerate import init_empty_weights
from safetensors.torch import load_file
from support.tiny import build_llm, build_tokenizer
from transformers import AutoConfig, AutoModel, AutoProcessor
from transformers.conversion_mapping import get_model_conversion_mapping

from encoders import Encoder
from mof import InterleavedMoF, MoFForConditionalGeneration, MoFModel, MoFProcessor

TEXT = "First <image> and <image>?"


@pytest.fixture
def saved(tiny_encoders: dict[str, Encoder], tmp_path: Path) -> tuple[MoFForConditionalGeneration, Path]:
    tokenizer = build_tokenizer()
    mixer = InterleavedMoF(tiny_encoders, hidden_size=32)
    model = MoFForConditionalGeneration.from_parts(mixer, build_llm(tokenizer), tokenizer, embed_encoders=True).eval()
    model.save_pretrained(tmp_path)
    MoFProcessor.from_parts(model, tokenizer).save_pretrained(tmp_path)
    return model, tmp_path


@torch.no_grad()
def test_the_base_model_is_filled_and_called(saved: tuple[MoFForConditionalGeneration, Path]) -> None:
    model, folder = saved
    config = AutoConfig.from_pretrained(folder)
    with torch.device("meta"):
        assert type(AutoModel.from_config(config).get_decoder()).__name__ == "LlamaModel"
    with init_empty_weights(include_buffers=False):
        base = AutoModel.from_config(config, dtype=torch.float32)
    assert isinstance(base, MoFModel) and base.is_backend_compatible() and base.get_encoder(modality="image") is base.mixer
    state, head = {}, {}
    for key, value in load_file(folder / "model.safetensors").items():
        for renaming in get_model_conversion_mapping(base):
            key, _ = renaming.rename_source_key(key)
        (head if "lm_head" in key else state)[key] = value
    base.load_state_dict(state, assign=True)
    base.eval().set_input_embeddings(torch.nn.Embedding.from_pretrained(state["language_model.embed_tokens.weight"]))
    processor = AutoProcessor.from_pretrained(folder)
    pixels = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    batch = processor(images=list(pixels), text=TEXT, return_tensors="pt")
    images = base.get_image_features(batch["pixel_values"], return_dict=True).pooler_output.flatten(0, 1)  # [2 * T, D]
    embeds = base.get_input_embeddings()(batch["input_ids"])
    embeds = embeds.masked_scatter((batch["input_ids"] == config.image_token_id).unsqueeze(-1), images)
    positions = torch.arange(embeds.shape[1])[None]
    hidden = base(input_ids=None, inputs_embeds=embeds, position_ids=positions, use_cache=False, return_dict=False)[0]
    expected = model(**batch).logits
    torch.testing.assert_close(hidden @ head["language_model.lm_head.weight"].T, expected)
    assert config.get_text_config().vocab_size == config.vocab_size == 260 and not config.tie_word_embeddings


def test_prompts_are_expanded_by_the_offsets(saved: tuple[MoFForConditionalGeneration, Path]) -> None:
    processor = AutoProcessor.from_pretrained(saved[1])
    pixels = [torch.randint(0, 256, (3, 32, 32), dtype=torch.uint8)] * 2
    options = {"return_mm_token_type_ids": True, "return_text_replacement_offsets": True, "truncation": False, "add_special_tokens": False}
    inputs = processor(images=pixels, text=TEXT, return_tensors="pt", **options)
    whole = TEXT
    for entry in reversed(inputs["text_replacement_offsets"][0]):
        assert entry["type"] == "image" and entry["text"] == processor.image_token == TEXT[slice(*entry["span"])]
        assert processor.tokenizer.encode(entry["replacement"], add_special_tokens=False) == [processor.image_token_id] * 32
        whole = whole[: entry["span"][0]] + entry["replacement"] + whole[entry["span"][1] :]
    assert [whole[slice(*entry["new_span"])] for entry in inputs["text_replacement_offsets"][0]] == ["<image>" * 32] * 2
    assert inputs["input_ids"][0].tolist() == processor.tokenizer.encode(whole, add_special_tokens=False)
    assert torch.equal(inputs["mm_token_type_ids"].bool(), inputs["input_ids"] == processor.image_token_id)
    counts = processor._get_num_multimodal_tokens(image_sizes=[(10_000, 10_000), (30, 20)])
    assert counts["num_image_tokens"] == [32, 32] and counts["num_image_patches"] == [1, 1]
    assert processor._get_num_multimodal_tokens()["num_image_tokens"] is None
    assert "pixel_values" in processor.image_processor.model_input_names


def test_truncation_that_cuts_an_image_is_refused(tiny_processor: MoFProcessor) -> None:
    image = torch.zeros(3, 32, 32, dtype=torch.uint8)
    options = {"images": [image], "text": "<image> and many words", "truncation": True}
    kept = tiny_processor(**options, max_length=36)
    assert kept["input_ids"][0].count(tiny_processor.image_token_id) == 32 and len(kept["input_ids"][0]) == 36
    with pytest.raises(ValueError, match="max_length"):
        tiny_processor(**options, max_length=31)
