"""Original LLaVA-1.5 and released MoF folders in, against CLIP, DINOv2 and Llama put together here by the rules alone."""

from __future__ import annotations

import codecs
import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter
from support.tiny_checkpoints import (
    PATCH,
    SIZE,
    WIDTH,
    build_dino,
    build_parts,
    build_projector,
    llava_state,
    mof_state,
    prefixed,
    write_clip,
    write_original,
    write_weights,
)
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import Tensor
from torch.nn import functional as F
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    CLIPVisionModel,
    LlamaForCausalLM,
    LlamaTokenizer,
    PreTrainedTokenizerFast,
    ProcessorMixin,
)

from mof import MoFForConditionalGeneration, MoFProcessor
from mof.llava.loading import Loaded, load_checkpoint

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
OWN_MEAN, OWN_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
NOISE = Image.effect_noise((90, 120), 200).convert("RGB").filter(ImageFilter.GaussianBlur(2))
IMAGES = [NOISE.crop((0, 0, *size)) for size in ((60, 40), (28, 28), (56, 100))]
PROMPTS = ["USER: <image>\nWhat? ASSISTANT:", "USER: <image> and <image>\nWhich of these two? ASSISTANT:", "No image."]


def normalised(pixels: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    return (pixels.float() / 255 - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]


def clip_features(clip: CLIPVisionModel, pixels: Tensor) -> Tensor:
    """hidden_states[-2] without the class token."""
    return clip(normalised(pixels, CLIP_MEAN, CLIP_STD), output_hidden_states=True).hidden_states[-2][:, 1:]


def dino_features(state: dict[str, Tensor], x: Tensor) -> Tensor:
    """`x_prenorm` of torch.hub's DINOv2, written down from its definition: pre-norm blocks with layer scale, no final norm."""

    def norm(x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, (WIDTH,), state[f"{name}.weight"], state[f"{name}.bias"], eps=1e-6)

    def linear(x: Tensor, name: str) -> Tensor:
        return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]

    x = F.conv2d(x, state["patch_embed.proj.weight"], state["patch_embed.proj.bias"], stride=PATCH).flatten(2).transpose(1, 2)
    count, table = x.shape[1], state["pos_embed"]
    n, side = math.isqrt(table.shape[1] - 1), math.isqrt(count)
    patches = table[:, 1:].reshape(1, n, n, WIDTH).permute(0, 3, 1, 2)
    if n != side:
        patches = F.interpolate(patches, scale_factor=(float(side + 0.1) / n,) * 2, mode="bicubic", antialias=False)
    patches = patches.permute(0, 2, 3, 1).reshape(1, count, WIDTH)
    x = torch.cat([state["cls_token"].expand(len(x), -1, -1), x], 1) + torch.cat([table[:, :1], patches], 1)
    for i in range(len([key for key in state if key.endswith("norm1.weight")])):
        name = f"blocks.{i}"
        qkv = linear(norm(x, f"{name}.norm1"), f"{name}.attn.qkv")
        q, k, v = (third.unflatten(-1, (-1, 64)).transpose(1, 2) for third in qkv.chunk(3, -1))  # heads of 64
        mixed = ((q @ k.mT / 8).softmax(-1) @ v).transpose(1, 2).flatten(2)
        x = x + linear(mixed, f"{name}.attn.proj") * state[f"{name}.ls1.gamma"]
        hidden = F.gelu(linear(norm(x, f"{name}.norm2"), f"{name}.mlp.fc1"))
        x = x + linear(hidden, f"{name}.mlp.fc2") * state[f"{name}.ls2.gamma"]
    return x[:, 1:]


def project(state: dict[str, Tensor], features: Tensor) -> Tensor:
    if "weight" in state:
        return features @ state["weight"].T + state["bias"]
    return F.gelu(features @ state["0.weight"].T + state["0.bias"]) @ state["2.weight"].T + state["2.bias"]


def check(loaded: Loaded, llama: LlamaForCausalLM, features: Tensor) -> None:
    """Logits and greedy answers of the loaded model against `llama` on `features` [M, T, D] put in by hand, row by row."""
    inputs = loaded.processor(images=IMAGES, text=PROMPTS, padding=True, return_tensors="pt")
    with torch.no_grad():
        logits = loaded.model(**inputs).logits
    written = loaded.model.generate(**inputs, do_sample=False, max_new_tokens=6)[:, inputs["input_ids"].shape[1] :]
    images = iter(features)
    vocabulary = llama.config.vocab_size
    for row, prompt in enumerate(PROMPTS):
        pieces = [loaded.processor.tokenizer(piece, return_tensors="pt")["input_ids"].long() for piece in prompt.split("<image>")]
        embeds = [llama.get_input_embeddings()(pieces[0])]
        for piece in pieces[1:]:
            embeds += [next(images)[None], llama.get_input_embeddings()(piece)]
        embeds = torch.cat(embeds, dim=1)
        with torch.no_grad():
            expected = llama(inputs_embeds=embeds).logits[0]
            answer = llama.generate(inputs_embeds=embeds, do_sample=False, max_new_tokens=6, pad_token_id=0)[0]
        kept = inputs["attention_mask"][row].bool()
        assert expected.std() > 0.1 and kept.sum() == len(expected)
        assert (logits[row, kept, :vocabulary] - expected).abs().max() < 1e-4
        assert torch.equal(written[row, : len(answer)], answer)


@pytest.fixture
def parts(tiny_tokenizer: PreTrainedTokenizerFast) -> dict:
    return build_parts(tiny_tokenizer)


def pixels_of(loaded: Loaded) -> Tensor:
    return loaded.processor(images=IMAGES, text="<image>" * 3, return_tensors="pt")["pixel_values"]


def padded(image: Image.Image, size: int) -> Tensor:
    """LLaVA's expand2square with CLIP's mean colour, then CLIP's resize."""
    square = Image.new("RGB", (max(image.size),) * 2, tuple(int(255 * mean) for mean in CLIP_MEAN))
    square.paste(image, tuple((max(image.size) - side) // 2 for side in image.size))
    pixels = square.resize((size, size), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(pixels)).permute(2, 0, 1).long()


@pytest.mark.parametrize(
    ("shards", "ending", "index"),
    [
        (1, ".bin", True),
        (3, ".bin", True),
        (3, ".bin", False),
        (1, ".safetensors", True),
        (2, ".safetensors", True),
        (2, ".safetensors", False),
    ],
)
def test_llava(shards: int, ending: str, index: bool, parts: dict, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    write_original(tmp_path, tiny_tokenizer, llava_state(parts), shards=shards, ending=ending, index=index)
    loaded = load_checkpoint(tmp_path)
    assert loaded.layout == "llava" and loaded.tensors == len(llava_state(parts)) and loaded.unused == []
    pixels = pixels_of(loaded)
    for image, own in zip(IMAGES, pixels, strict=True):
        assert (padded(image, SIZE) - own.long()).abs().max() <= 1
    check(loaded, parts["llama"], project(parts["projector"], clip_features(parts["clip"], pixels)))


def test_released_mof(parts: dict, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_original(tmp_path, tiny_tokenizer, mof_state(parts), shards=2)
    loaded = load_checkpoint(tmp_path)
    assert loaded.layout == "released-mof" and loaded.tensors == len(mof_state(parts))
    assert len(loaded.unused) == len(parts["clip"].state_dict()) and all("clip_vision_tower" in key for key in loaded.unused)
    assert "DINOv2 is given pixels normalised for CLIP" in caplog.text
    pixels = pixels_of(loaded)
    clip = project(parts["projector"], clip_features(parts["clip"], pixels))

    def interleaved(mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
        dino = project(parts["dino projector"], dino_features(parts["dino"], normalised(pixels, mean, std)))
        mixed = torch.empty(len(pixels), 2 * clip.shape[1], clip.shape[2])
        mixed[:, 0::2], mixed[:, 1::2] = clip, dino
        return mixed

    check(loaded, parts["llama"], interleaved(CLIP_MEAN, CLIP_STD))
    check(load_checkpoint(tmp_path, released_preprocessing=False), parts["llama"], interleaved(OWN_MEAN, OWN_STD))


def test_released_dinov2_at_another_size(parts: dict, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    """The released models have weights for 518 pixels and images of 224. Positions are interpolated as torch.hub does it."""
    parts["dino"] = build_dino(side=9)
    write_original(tmp_path, tiny_tokenizer, mof_state(parts))
    loaded = load_checkpoint(tmp_path)
    pixels = pixels_of(loaded)
    with torch.no_grad():
        features = loaded.model.mixer.encode(pixels)["dinov2"]
    assert (features - dino_features(parts["dino"], normalised(pixels, CLIP_MEAN, CLIP_STD))).abs().max() < 1e-4


def test_linear_projector_and_crop(parts: dict, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    parts["projector"] = build_projector(linear=True)
    options = {"mm_projector_type": "linear", "image_aspect_ratio": "square", "mm_vision_select_layer": -2}
    write_original(tmp_path, tiny_tokenizer, llava_state(parts), **options)
    loaded = load_checkpoint(tmp_path)
    assert loaded.processor.image_processor.fit == "crop"
    check(loaded, parts["llama"], project(parts["projector"], clip_features(parts["clip"], pixels_of(loaded))))


def test_towers_by_reference(parts: dict, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    write_clip(tmp_path / "clip", parts["clip"])
    torch.save(parts["dino"], tmp_path / "dino.pth")
    write_original(tmp_path / "mof", tiny_tokenizer, mof_state(parts, towers=False))
    with pytest.raises(ValueError, match="(?s)'openai/clip-vit-tiny'.*vision_tower=FOLDER.*--vision-tower"):
        load_checkpoint(tmp_path / "mof")
    with pytest.raises(ValueError, match="(?s)128.*dino_tower=FILE.*--dino-tower"):
        load_checkpoint(tmp_path / "mof", vision_tower=tmp_path / "clip")
    loaded = load_checkpoint(tmp_path / "mof", vision_tower=tmp_path / "clip", dino_tower=tmp_path / "dino.pth")
    assert not loaded.model.config.embed_encoders
    write_original(tmp_path / "whole", tiny_tokenizer, mof_state(parts))
    same_outputs(loaded, load_checkpoint(tmp_path / "whole"))
    loaded.model.save_pretrained(tmp_path / "saved")
    same_outputs(loaded, replace(loaded, model=MoFForConditionalGeneration.from_pretrained(tmp_path / "saved")))


def test_width_of_dinov2_does_not_depend_on_the_order_of_keys(parts: dict, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    """Shards may give the projector's second weight, as wide as the language model, before its first."""
    write_clip(tmp_path / "clip", parts["clip"])
    state = mof_state(parts, towers=False)
    write_original(tmp_path / "mof", tiny_tokenizer, dict(reversed(state.items())), shards=2)
    with pytest.raises(ValueError, match="128"):
        load_checkpoint(tmp_path / "mof", vision_tower=tmp_path / "clip")


def test_a_tower_that_is_not_the_one_named_is_refused(parts: dict, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    """The number of heads lies in no weight: to guess it from a wrong name would give wrong features in silence."""
    write_original(tmp_path / "llava", tiny_tokenizer, llava_state(parts), mm_vision_tower="openai/clip-vit-large-patch14-336")
    with pytest.raises(ValueError, match=f"{WIDTH}.*openai/clip-vit-large-patch14-336.*vision_tower=FOLDER"):
        load_checkpoint(tmp_path / "llava")
    write_clip(tmp_path / "clip", parts["clip"])
    loaded = load_checkpoint(tmp_path / "llava", vision_tower=tmp_path / "clip")
    check(loaded, parts["llama"], project(parts["projector"], clip_features(parts["clip"], pixels_of(loaded))))


def test_what_holds_its_towers_needs_no_other_file(parts: dict, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    write_original(tmp_path / "mof", tiny_tokenizer, mof_state(parts))
    loaded = load_checkpoint(tmp_path / "mof")
    loaded.model.save_pretrained(tmp_path / "saved")
    loaded.processor.save_pretrained(tmp_path / "saved")
    shutil.rmtree(tmp_path / "mof")
    again = AutoModelForImageTextToText.from_pretrained(tmp_path / "saved").eval()
    same_outputs(loaded, replace(loaded, model=again, processor=AutoProcessor.from_pretrained(tmp_path / "saved")))
    state, saved = loaded.model.state_dict(), again.state_dict()
    assert state.keys() == saved.keys() and all(torch.equal(state[key], saved[key]) for key in state)


def same_outputs(before: Loaded, after: Loaded) -> None:
    inputs = [loaded.processor(images=IMAGES, text=PROMPTS, padding=True, return_tensors="pt") for loaded in (before, after)]
    assert all(torch.equal(inputs[0][key], inputs[1][key]) for key in inputs[0])
    with torch.no_grad():
        assert torch.equal(before.model(**inputs[0]).logits, after.model(**inputs[1]).logits)


def test_files_with_a_byte_order_mark(parts: dict, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    """Editors on Windows put the mark in front when a user saves config.json or an index of shards."""
    write_original(tmp_path, tiny_tokenizer, llava_state(parts), shards=2)
    plain, edited = load_checkpoint(tmp_path), [tmp_path / "config.json", *tmp_path.glob("*.index.json")]
    assert len(edited) == 2
    for file in edited:
        file.write_bytes(codecs.BOM_UTF8 + file.read_bytes())
    same_outputs(plain, load_checkpoint(tmp_path))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dtype_is_kept(dtype: torch.dtype, parts: dict, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    state = {key: value.to(dtype) for key, value in mof_state(parts).items()}
    write_original(tmp_path, tiny_tokenizer, state, shards=2)
    model = MoFForConditionalGeneration.from_checkpoint(tmp_path)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype} == {model.dtype}
    assert torch.equal(model.mixer.adapters["dinov2"][0].weight, state["model.dino_mm_projector.0.weight"])
    assert torch.equal(model.mixer.encoders["clip"].tower.state_dict()["pre_layrnorm.bias"], parts["clip"].pre_layrnorm.bias.to(dtype))


def test_files_are_mapped_not_written(parts: dict, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    """A change of a loaded model does not reach its files."""
    for ending, name in ((".bin", "pytorch_model.bin"), (".safetensors", "model.safetensors")):
        write_original(tmp_path / ending, tiny_tokenizer, llava_state(parts), ending=ending)
        before = (tmp_path / ending / name).read_bytes()
        model = MoFForConditionalGeneration.from_checkpoint(tmp_path / ending)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(1)
        assert (tmp_path / ending / name).read_bytes() == before


def test_image_start_and_end_tokens(parts: dict, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    tiny_tokenizer.add_tokens(["<im_start>", "<im_end>"], special_tokens=True)
    parts = build_parts(tiny_tokenizer)
    write_original(tmp_path, tiny_tokenizer, llava_state(parts), mm_use_im_start_end=True)
    processor = load_checkpoint(tmp_path).processor
    content = [{"type": "image"}, {"type": "text", "text": "What?"}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    assert text == "USER: <im_start><image><im_end>\nWhat? ASSISTANT:"


def test_buffers_of_older_versions_are_unused(parts: dict, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    old = {
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4),
        "model.vision_tower.vision_tower.vision_model.embeddings.position_ids": torch.arange(17)[None],
    }
    write_original(tmp_path, tiny_tokenizer, llava_state(parts) | old)
    assert load_checkpoint(tmp_path).unused == sorted(old)


def test_stage_1(parts: dict, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    write_clip(tmp_path / "clip", parts["clip"])
    torch.save(parts["dino"], tmp_path / "dino.pth")
    parts["llama"].save_pretrained(tmp_path / "llama")
    tiny_tokenizer.save_pretrained(tmp_path / "llama")
    towers = {"vision_tower": tmp_path / "clip", "dino_tower": tmp_path / "dino.pth"}
    clip_only = prefixed("model.mm_projector.", parts["projector"])
    both = clip_only | prefixed("model.dino_mm_projector.", parts["dino projector"])
    for name, state in {"one": clip_only, "both": both}.items():
        write_original(tmp_path / name, tiny_tokenizer, {})
        torch.save(state, tmp_path / name / "mm_projector.bin")
        with pytest.raises(ValueError, match=f"{name}.*base=FOLDER"):
            load_checkpoint(tmp_path / name)
    loaded = load_checkpoint(tmp_path / "one", base=tmp_path / "llama", vision_tower=tmp_path / "clip")
    check(loaded, parts["llama"], project(parts["projector"], clip_features(parts["clip"], pixels_of(loaded))))
    loaded = load_checkpoint(tmp_path / "both", base=tmp_path / "llama", **towers)
    write_original(tmp_path / "whole", tiny_tokenizer, mof_state(parts))
    same_outputs(loaded, load_checkpoint(tmp_path / "whole"))


PROMPT = "USER: <image>\nWhat is this? ASSISTANT:"


def prompt_ids(processor: ProcessorMixin) -> list[int]:
    """PROMPT by the chat template, with -200 in place of each image, as LLaVA writes it."""
    content = [{"type": "image", "image": IMAGES[0]}, {"type": "text", "text": "What is this?"}]
    options = {"tokenize": True, "return_dict": True, "add_generation_prompt": True}
    ids = processor.apply_chat_template([{"role": "user", "content": content}], **options)["input_ids"][0]
    images = [i for i, token in enumerate(ids) if token == processor.image_token_id]
    assert images == list(range(images[0], images[0] + 16))
    return [*ids[: images[0]], -200, *ids[images[-1] + 1 :]]


def test_prompts_are_tokenized_as_by_llava(tmp_path: Path) -> None:
    """LLaVA's `tokenizer_image_token`: the texts around images one by one, for Llama's tokenizer each with its space before it."""
    trained = Tokenizer(models.BPE(unk_token="<unk>"))
    trained.pre_tokenizer = pre_tokenizers.Metaspace(split=False)
    texts = ["USER: What is this? ASSISTANT: A cat.", "USER: \nWhich of these two? ASSISTANT:"]
    trained.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=90, special_tokens=["<unk>", "<s>", "</s>"]))
    model = json.loads(trained.to_str())["model"]
    merges = [tuple(pair) for pair in model["merges"]]
    tokenizer = LlamaTokenizer(vocab=model["vocab"], merges=merges, pad_token="<unk>", add_bos_token=True)
    before, after = (tokenizer(piece)["input_ids"] for piece in PROMPT.split("<image>"))
    write_original(tmp_path, tokenizer, llava_state(build_parts(tokenizer)))
    assert prompt_ids(load_checkpoint(tmp_path).processor) == [*before, -200, *after[1:]]


def test_sentencepiece_tokenizer(tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    """tokenizer.model alone, as original folders have it; after conversion the package is needed no more."""
    sentencepiece = pytest.importorskip("sentencepiece")
    words = ["USER", "ASSISTANT", "What", "is", "this", "Which", "of", "these", "two", "A", "cat", "dog", "?", ".", ":"]
    lines = (" ".join(words[i % len(words)] for i in range(start, start + 12)) for start in range(500))
    source, stem = tmp_path / "source", str(tmp_path / "source" / "tokenizer")
    write_original(source, tiny_tokenizer, {})
    for file in source.glob("tokenizer*"):
        file.unlink()
    settings = {"model_type": "bpe", "byte_fallback": True, "normalization_rule_name": "identity", "vocab_size": 320}
    settings |= {"pad_id": -1, "unk_id": 0, "bos_id": 1, "eos_id": 2, "hard_vocab_limit": False, "minloglevel": 2}
    settings["remove_extra_whitespaces"] = False  # as in Llama's
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=lines, model_prefix=stem, **settings)
    said = {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "legacy": False, "pad_token": "<unk>"}
    (source / "tokenizer_config.json").write_text(json.dumps(said))
    pieces = sentencepiece.SentencePieceProcessor(model_file=f"{stem}.model")
    write_weights(source, llava_state(build_parts(range(pieces.get_piece_size()))))
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"vocab_size": pieces.get_piece_size()}))
    before, after = (pieces.encode(text) for text in PROMPT.split("<image>"))
    processor = load_checkpoint(source).processor
    assert prompt_ids(processor) == [1, *before, -200, *after]
    processor.save_pretrained(tmp_path / "saved")
    assert prompt_ids(MoFProcessor.from_pretrained(tmp_path / "saved")) == [1, *before, -200, *after]
