"""The multimodal model against the bare language model on embeddings put together by hand."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image
from support.tiny import build_llm, build_model
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    DynamicCache,
    Gemma2Config,
    GPT2Config,
    LlamaForCausalLM,
    Mamba2Config,
    MambaConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    pipeline,
)

from encoders import Encoder
from mof import ConcatMoF, InterleavedMoF, MoFConfig, MoFForConditionalGeneration, MoFProcessor

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "initializer_range": 0.2}
GATED = {**SIZES, "intermediate_size": 64, "num_key_value_heads": 2}
RECURRENT = {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 8, "initializer_range": 0.2}

LLMS: dict[str, Callable[[PreTrainedTokenizerFast], PreTrainedModel]] = {
    "llama": build_llm,
    "tied llama": lambda tokenizer: build_llm(tokenizer, tie_word_embeddings=True),
    "qwen2": lambda tokenizer: _build(Qwen2Config(vocab_size=len(tokenizer), **GATED)),
    "gemma2 (soft caps)": lambda tokenizer: _build(Gemma2Config(vocab_size=len(tokenizer), head_dim=8, **GATED)),
    "gpt2 (learned positions)": lambda tokenizer: _build(GPT2Config(vocab_size=len(tokenizer), **SIZES)),
    "bloom (no positions)": lambda tokenizer: _build(BloomConfig(vocab_size=len(tokenizer), **SIZES)),
    "mamba (no attention)": lambda tokenizer: _build(MambaConfig(vocab_size=len(tokenizer), **RECURRENT)),
    "mamba2": lambda tokenizer: _build(Mamba2Config(vocab_size=len(tokenizer), num_heads=4, head_dim=16, n_groups=1, **RECURRENT)),
}


def _build(config: object) -> PreTrainedModel:
    return AutoModelForCausalLM.from_config(config).eval()


@pytest.fixture(params=LLMS)
def model(request: pytest.FixtureRequest, tiny_tokenizer: PreTrainedTokenizerFast) -> MoFForConditionalGeneration:
    return build_model(tiny_tokenizer, LLMS[request.param](tiny_tokenizer))


@pytest.fixture
def processor(model: MoFForConditionalGeneration, tiny_tokenizer: PreTrainedTokenizerFast) -> MoFProcessor:
    return MoFProcessor.from_parts(model, tiny_tokenizer)


def noise(seed: int) -> Image.Image:
    pixels = torch.randint(0, 256, (32, 32, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    return Image.fromarray(pixels.numpy())


TEXTS = ["<image>\nWhat is it?", "No image at all here.", "First <image> then <image>, which?"]
IMAGES = [[noise(1)], [], [noise(2), noise(3)]]


def prompt(processor: MoFProcessor, side: str = "left") -> dict[str, Tensor]:
    images = [image for record in IMAGES for image in record]
    return processor(images=images, text=TEXTS, padding=True, padding_side=side, return_tensors="pt")


def embed(model: MoFForConditionalGeneration, token: int) -> Tensor:
    """[D]; through the module, since Gemma's scales."""
    return model.language_model.get_input_embeddings()(torch.tensor(token))


def by_hand(model: MoFForConditionalGeneration, ids: Tensor, images: Tensor) -> Tensor:
    """Embeddings [L, D] of one unpadded record: text embeddings, with image features written over them one by one."""
    features = [feature for image in images for feature in model.mixer(image[None])[0]]
    rows = []
    for token in ids.tolist():
        own = token == model.config.image_token_id
        rows.append(features.pop(0) if own else embed(model, token))
    assert not features
    return torch.stack(rows)


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
def test_batch_with_one_several_and_no_images(model: MoFForConditionalGeneration, processor: MoFProcessor, side: str) -> None:
    batch = prompt(processor, side)
    logits = model(**batch).logits
    start = 0
    for row, images in enumerate(IMAGES):
        real = batch["attention_mask"][row].bool()
        pixels = batch["pixel_values"][start : start + len(images)]
        start += len(images)
        embeds = by_hand(model, batch["input_ids"][row][real], pixels)
        alone = model.language_model(inputs_embeds=embeds[None]).logits[0]
        torch.testing.assert_close(logits[row][real], alone, atol=2e-5, rtol=2e-5)


@torch.no_grad()
def test_image_matters_and_only_where_it_stands(tiny_model: MoFForConditionalGeneration, tiny_processor: MoFProcessor) -> None:
    inputs = tiny_processor(images=[noise(1)], text="before<image>after", return_tensors="pt")
    changed = {**inputs, "pixel_values": tiny_processor(images=[noise(2)], text="<image>", return_tensors="pt")["pixel_values"]}
    moved = (tiny_model(**inputs).logits - tiny_model(**changed).logits).abs().amax(-1)[0] > 0
    assert not moved[: len("before")].any() and moved[len("before") :].all()


@torch.no_grad()
def test_features_in_place_of_pixels(tiny_model: MoFForConditionalGeneration, tiny_processor: MoFProcessor) -> None:
    batch = dict(prompt(tiny_processor))
    expected = tiny_model(**batch).logits
    features = tiny_model.get_image_features(batch.pop("pixel_values")).pooler_output
    assert features.shape == (3, tiny_model.mixer.tokens_per_image, 32)
    assert torch.equal(tiny_model(**batch, image_features=features).logits, expected)


@torch.no_grad()
def test_stored_encoder_features_in_place_of_pixels(tiny_model: MoFForConditionalGeneration, tiny_processor: MoFProcessor) -> None:
    """Stored features are the tokens of each encoder at its own grid, flattened; the encoders do not run."""
    batch = dict(prompt(tiny_processor))
    expected = tiny_model(**batch).logits
    options = {"max_new_tokens": 4, "num_beams": 2, "do_sample": False}
    written = tiny_model.generate(**batch, **options)
    pixels = batch.pop("pixel_values")
    stored = torch.cat([encoder(pixels).tokens.flatten(1) for encoder in tiny_model.mixer.encoders.values()], dim=1)  # [3, F]
    for encoder in tiny_model.mixer.encoders.values():
        encoder.patch_tokens = None
    assert torch.equal(tiny_model(**batch, encoder_features=stored).logits, expected)
    assert torch.equal(tiny_model.generate(**batch, encoder_features=stored, **options), written)
    with pytest.raises(ValueError, match=rf"{stored.shape[1]}\].*\[3, {stored.shape[1] - 1}\]"):
        tiny_model(**batch, encoder_features=stored[:, 1:])
    with pytest.raises(ValueError, match="input_ids"):
        tiny_model(**batch, encoder_features=stored[1:])
    with pytest.raises(ValueError, match="input_ids"):
        tiny_model(**batch, encoder_features=stored, pixel_values=pixels)


def test_loss_is_the_language_models(tiny_model: MoFForConditionalGeneration, tiny_processor: MoFProcessor) -> None:
    batch = prompt(tiny_processor, "right")
    labels = batch["input_ids"].masked_fill(torch.rand(batch["input_ids"].shape) < 0.5, -100)
    labels[batch["attention_mask"] == 0] = -100
    logits = tiny_model(**batch).logits[:, :-1]
    chosen = labels[:, 1:] != -100
    losses = -logits[chosen].log_softmax(-1).gather(1, labels[:, 1:][chosen][:, None])
    torch.testing.assert_close(tiny_model(**batch, labels=labels).loss, losses.mean())
    torch.testing.assert_close(tiny_model(**batch, labels=labels, num_items_in_batch=7).loss, losses.sum() / 7)


@torch.no_grad()
def test_logits_to_keep(model: MoFForConditionalGeneration, processor: MoFProcessor) -> None:
    batch = prompt(processor)
    torch.testing.assert_close(model(**batch, logits_to_keep=3).logits, model(**batch).logits[:, -3:])


@torch.no_grad()
def test_generation_cached_uncached_and_by_hand(model: MoFForConditionalGeneration, processor: MoFProcessor) -> None:
    """Greedy: with and without KV cache, in a left-padded batch and record by record, all equal to a loop of argmax."""
    model.generation_config.eos_token_id = None
    options = {"max_new_tokens": 6, "do_sample": False}
    batch = prompt(processor)
    cached = model.generate(**batch, **options)
    assert torch.equal(cached, model.generate(**batch, **options, use_cache=False))
    for row, (text, images) in enumerate(zip(TEXTS, IMAGES, strict=True)):
        alone = processor(images=images or None, text=text, return_tensors="pt")
        embeds = by_hand(model, alone["input_ids"][0], alone.get("pixel_values", torch.empty(0)))
        tokens: list[int] = []
        for _ in range(options["max_new_tokens"]):
            logits = model.language_model(inputs_embeds=embeds[None]).logits[0, -1]
            logits[model.config.image_token_id] = -torch.inf
            tokens.append(int(logits.argmax()))
            embeds = torch.cat([embeds, embed(model, tokens[-1])[None]])
        assert cached[row, -len(tokens) :].tolist() == tokens
        assert model.generate(**alone, **options)[0, -len(tokens) :].tolist() == tokens


@torch.no_grad()
@pytest.mark.parametrize("use_cache", [True, False])
def test_beams_see_their_own_images(tiny_model: MoFForConditionalGeneration, tiny_processor: MoFProcessor, use_cache: bool) -> None:
    """Records with one, no and two images: the batch gives what the bare language model makes of the embeddings of each record."""
    with torch.no_grad():
        for adapter in tiny_model.mixer.adapters.values():
            adapter[2].weight *= 10  # so that images decide what is written
    options = {"max_new_tokens": 5, "num_beams": 3, "num_return_sequences": 2, "do_sample": False, "use_cache": use_cache}
    batch = dict(prompt(tiny_processor))
    together = tiny_model.generate(**batch, **options)[:, batch["input_ids"].shape[1] :]
    features = tiny_model.get_image_features(batch.pop("pixel_values")).pooler_output
    again = tiny_model.generate(**batch, image_features=features, **options)[:, batch["input_ids"].shape[1] :]
    assert torch.equal(together, again)
    for row, (text, images) in enumerate(zip(TEXTS, IMAGES, strict=True)):
        alone = tiny_processor(images=images or None, text=text, return_tensors="pt")
        embeds = by_hand(tiny_model, alone["input_ids"][0], alone.get("pixel_values", torch.empty(0)))
        expected = tiny_model.language_model.generate(
            inputs_embeds=embeds[None], **options, suppress_tokens=[tiny_model.config.image_token_id]
        )
        mine = together[2 * row : 2 * row + 2, : expected.shape[1]]
        assert torch.equal(mine, expected)


@torch.no_grad()
def test_recurrent_language_model(tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    """Mamba keeps one state under another name: it must be passed on, hold for beams, and not be rolled back."""
    model = build_model(tiny_tokenizer, LLMS["mamba (no attention)"](tiny_tokenizer))
    processor = MoFProcessor.from_parts(model, tiny_tokenizer)
    lengths: list[int] = []
    model.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: lengths.append(kwargs["inputs_embeds"].shape[1]), with_kwargs=True
    )
    batch = prompt(processor)
    options = {"max_new_tokens": 5, "do_sample": False}
    beams = model.generate(**batch, **options, num_beams=3)
    assert lengths == [batch["input_ids"].shape[1], 1, 1, 1, 1]
    assert torch.equal(beams, model.generate(**batch, **options, num_beams=3, use_cache=False))
    with pytest.raises(ValueError, match="stateful"):
        model.generate(**processor(text="Hi", return_tensors="pt"), **options, prompt_lookup_num_tokens=2)
    model.save_pretrained(tmp_path)
    again = MoFForConditionalGeneration.from_pretrained(tmp_path)
    assert torch.equal(again(**batch).logits, model(**batch).logits)


@torch.no_grad()
@pytest.mark.parametrize("name", ["mamba (no attention)", "mamba2", "llama"])
def test_left_padding_with_a_cache(name: str, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    """Token by token with a cache, a padded batch has the logits of each record alone in one pass."""
    language_model = LLMS[name](tiny_tokenizer) if name in LLMS else build_llm(tiny_tokenizer)
    model = build_model(tiny_tokenizer, language_model).eval()
    processor = MoFProcessor.from_parts(model, tiny_tokenizer)
    texts = ["Hi", "What is this? Tell me all about it."]
    padded = processor(text=texts, padding=True, return_tensors="pt")
    assert not padded["attention_mask"].all()
    options = {"max_new_tokens": 4, "do_sample": False, "output_logits": True, "return_dict_in_generate": True, "eos_token_id": None}
    together = model.generate(**padded, **options)
    for row, text in enumerate(texts):
        prompt_ids = processor(text=text, return_tensors="pt")["input_ids"]
        new = together.sequences[row : row + 1, padded["input_ids"].shape[1] :]
        expected = model(input_ids=torch.cat([prompt_ids, new], dim=1), use_cache=False).logits[0, -5:-1]  # [4, V]
        logits = torch.stack(together.logits)[:, row]  # [4, V]
        torch.testing.assert_close(logits.where(logits.isfinite(), expected), expected, rtol=0, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("argument", ["past_key_values", "cache"])
def test_a_cache_under_either_name(argument: str, tiny_model: MoFForConditionalGeneration, tiny_processor: MoFProcessor) -> None:
    inputs = tiny_processor(text="What is this?", return_tensors="pt")
    ids = inputs["input_ids"]
    whole = tiny_model(**inputs).logits
    cache = DynamicCache(config=tiny_model.config.text_config)
    tiny_model(input_ids=ids[:, :-2], **{argument: cache})
    rest = tiny_model(input_ids=ids[:, -2:], **{argument: cache}).logits
    torch.testing.assert_close(rest, whole[:, -2:])
    if argument == "past_key_values":  # the name of `generate` before transformers 5.24, which the newer ones take too
        options = {"max_new_tokens": 4, "do_sample": False}
        given = tiny_model.generate(**inputs, past_key_values=DynamicCache(config=tiny_model.config.text_config), **options)
        assert torch.equal(given, tiny_model.generate(**inputs, **options))


@torch.no_grad()
def test_prefix_tuning_takes_effect(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    """peft hands its prefix over as `past_key_values`, whatever transformers calls it."""
    from peft import PrefixTuningConfig, get_peft_model

    model = build_model(tiny_tokenizer, build_llm(tiny_tokenizer)).eval()
    processor = MoFProcessor.from_parts(model, tiny_tokenizer)
    batch = prompt(processor)
    plain = model(**batch).logits
    config = model.config.text_config
    shape = {"token_dim": config.num_key_value_heads * config.head_dim, "num_attention_heads": config.num_key_value_heads}
    tuned = get_peft_model(
        model, PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4, num_layers=config.num_hidden_layers, **shape)
    )
    torch.nn.init.normal_(tuned.prompt_encoder.default.embedding.weight, std=3.0)
    tuned.eval()
    prefixed = tuned(**batch).logits
    assert (prefixed - plain).abs().max() > 1e-3
    options = {"max_new_tokens": 3, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    generated = tuned.generate(**batch, **options)
    torch.testing.assert_close(generated.logits[0][:, :5], prefixed[:, -1, :5], rtol=0, atol=1e-4)


@torch.no_grad()
def test_images_are_encoded_once_per_generation(tiny_model: MoFForConditionalGeneration, tiny_processor: MoFProcessor) -> None:
    calls: list[int] = []
    tiny_model.mixer.register_forward_hook(lambda module, inputs, output: calls.append(len(inputs[0])))
    tiny_model.generate(**prompt(tiny_processor), max_new_tokens=5, do_sample=False)
    assert calls == [3]


def test_image_tokens_are_never_written(tiny_model: MoFForConditionalGeneration, tiny_processor: MoFProcessor) -> None:
    with torch.no_grad():
        tiny_model.get_output_embeddings().weight[:] = 0  # every token is as likely as any other
    inputs = tiny_processor(text="Hi", return_tensors="pt")
    written = tiny_model.generate(**inputs, max_new_tokens=200, do_sample=True, num_return_sequences=8)
    assert not (written == tiny_model.config.image_token_id).any()


def test_parts_are_joined(tiny_encoders: dict[str, Encoder], tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    llm = build_llm(tiny_tokenizer, tie_word_embeddings=True)
    rows = llm.get_input_embeddings().num_embeddings
    before = llm.get_input_embeddings().weight.clone()
    model = MoFForConditionalGeneration.from_parts(InterleavedMoF(tiny_encoders, 32), llm, tiny_tokenizer)
    assert tiny_tokenizer.convert_tokens_to_ids("<image>") == model.config.image_token_id == rows
    assert torch.equal(model.get_input_embeddings().weight[:rows], before)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert model.get_input_embeddings().num_embeddings == rows + 1 == model.config.text_config.vocab_size
    assert model.config.encoders["b"] == {"name": "tiny-b", "image_size": 16, "layer": -1, "norm": False, "trainable": False}
    # A second model on the same tokenizer, with room in its vocabulary, changes neither.
    roomy = build_llm(tiny_tokenizer, vocab_size=300)
    model = build_model(tiny_tokenizer, roomy)
    assert model.config.image_token_id == rows and model.get_input_embeddings().num_embeddings == 300


def test_turns_end_where_the_tokenizer_ends_them(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    llm = build_llm(tiny_tokenizer)
    llm.generation_config.eos_token_id = 7
    model = build_model(tiny_tokenizer, llm)
    assert model.generation_config.eos_token_id == [tiny_tokenizer.eos_token_id, 7]


@torch.no_grad()
def test_pipeline(tiny_model: MoFForConditionalGeneration, tiny_processor: MoFProcessor) -> None:
    chat = [{"role": "user", "content": [{"type": "image", "image": noise(1)}, {"type": "text", "text": "What?"}]}]
    asked = pipeline("image-text-to-text", model=tiny_model, processor=tiny_processor)
    answer = asked(text=chat, max_new_tokens=4, return_full_text=False)
    assert isinstance(answer[0]["generated_text"], str)


def test_count_mismatch_names_both_numbers(tiny_model: MoFForConditionalGeneration, tiny_processor: MoFProcessor) -> None:
    inputs = dict(tiny_processor(images=[noise(1)], text="<image>?", return_tensors="pt"))
    with pytest.raises(ValueError, match="32 .*64 .*2 .*32"):
        tiny_model(**{**inputs, "pixel_values": inputs["pixel_values"].repeat(2, 1, 1, 1)})
    pixels = inputs.pop("pixel_values")
    with pytest.raises(ValueError, match="32 .*0 "):
        tiny_model(**inputs)
    with pytest.raises(ValueError, match="0 .*32 "):
        tiny_model(**tiny_processor(text="no image", return_tensors="pt"), pixel_values=pixels)
    with pytest.raises(ValueError, match="input_ids.*inputs_embeds"):
        tiny_model(pixel_values=pixels)


def test_image_tokens_are_counted_before_the_encoders_run(
    tiny_model: MoFForConditionalGeneration, tiny_processor: MoFProcessor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Counting waits for a GPU; after the encoders were queued it would wait for them too."""
    order: list[str] = []
    monkeypatch.setattr("mof.base_model.torch_compilable_check", lambda *_: order.append("count"))
    tiny_model.mixer.register_forward_pre_hook(lambda module, inputs: order.append("encoders"))
    tiny_model(**tiny_processor(images=[noise(1)], text="<image>?", return_tensors="pt"))
    assert order == ["count", "encoders"]


def test_errors(tiny_encoders: dict[str, Encoder], tiny_llm: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(ValueError, match="31 .*32"):
        MoFForConditionalGeneration.from_parts(ConcatMoF(tiny_encoders, 31), tiny_llm, tiny_tokenizer)
    with pytest.raises(ValueError, match="'stacked'"):
        MoFConfig(fusion="stacked")
    with pytest.raises(ValueError, match="from_parts"):
        MoFForConditionalGeneration(MoFConfig(tiny_llm.config))
