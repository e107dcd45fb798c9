"""`mof convert` as a user calls it: in, out and back again, bit-equal; and the folders that it refuses."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import open_clip
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file
from support.commands import mof
from support.tiny import build_llm
from support.tiny_checkpoints import LLAMA, SIZE, build_parts, llava_state, mof_state, randomise, write_hf_llava, write_original
from torch import Tensor
from transformers import AutoProcessor, LlavaForConditionalGeneration, PreTrainedTokenizerFast

from encoders import build_encoder
from encoders.backends.timm import TimmEncoder
from mof import InterleavedMoF, MoFForConditionalGeneration, MoFProcessor
from mof.llava.loading import Loaded, load_checkpoint, save_checkpoint

IMAGE = Image.radial_gradient("L").convert("RGB")


def convert(*arguments: object) -> str:
    result = mof("convert", *arguments)
    assert result.exit_code == 0, result.output
    return " ".join(result.output.split())


def weights(folder: Path) -> dict[str, Tensor]:
    files = sorted(folder.glob("model*.safetensors"))
    assert files
    return {key: value for file in files for key, value in load_file(file).items()}


def assert_equal(before: dict[str, Tensor], after: dict[str, Tensor]) -> None:
    assert before.keys() == after.keys()
    for key, value in before.items():
        assert value.dtype == after[key].dtype and torch.equal(value, after[key]), key


def same_logits(model: MoFForConditionalGeneration, processor: MoFProcessor, folder: Path) -> None:
    again = load_checkpoint(folder)
    inputs = processor(images=[IMAGE], text="<image>What?", return_tensors="pt")
    with torch.no_grad():
        expected, actual = model.eval()(**inputs).logits, again.model(**inputs).logits
    rows = min(expected.shape[-1], actual.shape[-1]) - 1  # without the image token
    assert (expected - actual)[..., :rows].abs().max() < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", ["llava", "released-mof"])
def test_original_round_trip(layout: str, dtype: torch.dtype, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    """The model survives the way out, directly and through our own layout; the unused second CLIP is named and left out."""
    parts = build_parts(tiny_tokenizer)
    state = llava_state(parts) if layout == "llava" else mof_state(parts)
    state = {key: value.to(dtype) for key, value in state.items()}
    write_original(tmp_path / "source", tiny_tokenizer, state, shards=3)
    output = convert(tmp_path / "source", tmp_path / "ours")
    assert f"found: layout {layout}, {len(state)} tensors, {dtype}, language model llama" in output
    assert "encoder clip: hf:openai/clip-vit-tiny, 28 px, 4 x 4 patches, layer -2, inside the checkpoint" in output
    used = {key: value for key, value in state.items() if "clip_vision_tower" not in key}
    if layout == "released-mof":
        assert f"{len(state) - len(used)} unused tensors, not kept: model.dino_tower.clip_vision_tower.vision_model." in output
    for number, source in enumerate(("source", "ours")):
        out = tmp_path / f"back{number}"
        convert(tmp_path / source, out, "--to", layout)
        assert_equal(weights(out), used)
        before, after = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("source", out.name))
        said = [key for key in before if key.startswith("mm_")] + ["vocab_size", "image_aspect_ratio", "model_type", *LLAMA]
        assert {key: before[key] for key in said} == {key: after[key] for key in said}
    convert(tmp_path / "back0", tmp_path / "again")
    assert_equal(weights(tmp_path / "again"), weights(tmp_path / "ours"))


@pytest.mark.slow
@pytest.mark.parametrize("spelling", ["transformers 5", "transformers 4"])
@pytest.mark.parametrize("vision", ["clip", "siglip"])
def test_hf_round_trip(vision: str, spelling: str, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    model = write_hf_llava(tmp_path / "source", tiny_tokenizer, vision=vision, dtype=torch.bfloat16)
    saved = weights(tmp_path / "source")
    if spelling == "transformers 4":  # its vision towers were models within models
        for file in (tmp_path / "source").glob("*.safetensors"):
            file.unlink()
        old = {key.replace("vision_tower.", "vision_tower.vision_model."): value for key, value in saved.items()}
        write_shards(tmp_path / "source", old)
    convert(tmp_path / "source", tmp_path / "ours")
    for number, source in enumerate(("source", "ours")):
        out = tmp_path / f"back{number}"
        convert(tmp_path / source, out, "--to", "hf-llava")
        assert_equal(weights(out), saved)
        again = LlavaForConditionalGeneration.from_pretrained(out)
        assert_equal(again.state_dict(), model.state_dict())
        before, after = (AutoProcessor.from_pretrained(folder) for folder in (tmp_path / "source", out))
        before.tokenizer.padding_side = "left"
        inputs = [processor(images=[IMAGE], text=["<image>What?"], return_tensors="pt") for processor in (before, after)]
        assert all(torch.equal(inputs[0][key], inputs[1][key]) for key in inputs[0])
        assert before.chat_template == after.chat_template


def write_shards(folder: Path, state: dict[str, Tensor]) -> None:
    from support.tiny_checkpoints import write_weights

    write_weights(folder, state, shards=3, ending=".safetensors")


def test_original_becomes_hugging_face(tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    """Check that transformers' own model and processor give the same logits."""
    write_original(tmp_path / "source", tiny_tokenizer, llava_state(build_parts(tiny_tokenizer)))
    convert(tmp_path / "source", tmp_path / "hf", "--to", "hf-llava")
    model, processor = LlavaForConditionalGeneration.from_pretrained(tmp_path / "hf").eval(), AutoProcessor.from_pretrained(tmp_path / "hf")
    wide = IMAGE.resize((112, 56))
    inputs = processor(images=[wide], text=["<image>What?"], return_tensors="pt")
    loaded = load_checkpoint(tmp_path / "source")
    own = loaded.processor(images=[wide], text=["<image>What?"], return_tensors="pt")
    assert torch.equal(inputs["input_ids"], own["input_ids"])
    with torch.no_grad():
        difference = model(**inputs).logits - loaded.model(**own).logits
    assert difference.abs().max() < 0.05  # pixels differ by up to a grey level
    same_logits(loaded.model, loaded.processor, tmp_path / "hf")


def open_clip_encoder(name: str = "ViT-B-32-quickgelu", **changes: Any) -> Any:
    """A tiny vision transformer of open_clip with everything that OpenAI's has."""
    sizes = {"image_size": SIZE, "patch_size": 7, "width": 128, "layers": 3, "head_width": 64}
    config = {**open_clip.get_model_config(name), "embed_dim": 16, "vision_cfg": {**sizes, **changes}}
    open_clip.factory._MODEL_CONFIGS["tiny-clip"] = {**config, "text_cfg": {**config["text_cfg"], "width": 32, "heads": 1, "layers": 1}}
    encoder = build_encoder("open_clip:tiny-clip", pretrained=False)
    randomise(encoder.tower)
    return encoder


@pytest.fixture
def clean_open_clip() -> Any:
    yield
    open_clip.factory._MODEL_CONFIGS.pop("tiny-clip", None)


@pytest.mark.parametrize("name", ["ViT-B-32-quickgelu", "ViT-B-32"])
def test_open_clip_becomes_hugging_face(name: str, clean_open_clip: None, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    mixer = InterleavedMoF({"clip": open_clip_encoder(name)}, 32)
    model = MoFForConditionalGeneration.from_parts(mixer, build_llm(tiny_tokenizer), tiny_tokenizer, embed_encoders=True)
    processor = MoFProcessor.from_parts(model, tiny_tokenizer)
    save_checkpoint(Loaded(model, processor, "mof", 0), tmp_path, "hf-llava")
    activation = json.loads((tmp_path / "config.json").read_text())["vision_config"]["hidden_act"]
    assert activation == ("quick_gelu" if "quick" in name else "gelu")
    same_logits(model, processor, tmp_path)


def test_timm_dinov2_becomes_torch_hub(tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    """A model of this library is written in the released layout, and gives the same when it is read back."""
    write_original(tmp_path / "llava", tiny_tokenizer, llava_state(build_parts(tiny_tokenizer)))
    clip = load_checkpoint(tmp_path / "llava").model.mixer.encoders["clip"]
    for size, match in ((28, None), (56, "28 .*56")):
        sizes = {"embed_dim": 128, "depth": 2, "num_heads": 2, "patch_size": size // 4, "img_size": size}
        dino = TimmEncoder(randomise(timm.create_model("vit_small_patch14_dinov2", num_classes=0, **sizes)), layer=-1)
        mixer = InterleavedMoF({"a": clip, "b": dino}, 32)
        model = MoFForConditionalGeneration.from_parts(mixer, build_llm(tiny_tokenizer), tiny_tokenizer, embed_encoders=True)
        processor = MoFProcessor.from_parts(model, tiny_tokenizer)
        if match is None:
            save_checkpoint(Loaded(model, processor, "mof", 0), tmp_path, "released-mof")
            same_logits(model, processor, tmp_path)
        else:
            with pytest.raises(ValueError, match=match):
                save_checkpoint(Loaded(model, processor, "mof", 0), tmp_path, "released-mof")


def test_chat_on_the_result(tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    write_original(tmp_path / "source", tiny_tokenizer, mof_state(build_parts(tiny_tokenizer)))
    convert(tmp_path / "source", tmp_path / "ours", "--own-preprocessing")
    shutil.rmtree(tmp_path / "source")
    IMAGE.save(tmp_path / "image.png")
    result = mof("chat", "--model", tmp_path / "ours", "--image", tmp_path / "image.png", "--max-new-tokens", 4, "What?")
    assert result.exit_code == 0, result.output
    spec = MoFForConditionalGeneration.from_pretrained(tmp_path / "ours").config.encoders["dinov2"]
    assert "mean" not in spec  # its own
    convert(tmp_path / "ours", tmp_path / "back", "--to", "released-mof")
    assert "mean" not in load_checkpoint(tmp_path / "back").model.config.encoders["dinov2"]  # the folder remembers


def test_folders_that_are_refused(tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    write_original(source, tiny_tokenizer, llava_state(build_parts(tiny_tokenizer)))

    def refused(*arguments: object, match: str) -> None:
        before = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
        result = mof("convert", *arguments)
        assert result.exit_code == 2 and match in result.output, result.output
        assert before == {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}

    for arguments in ((source,), (source, out, "--output", out)):
        refused(*arguments, match="--output")
    refused(source, source, match=str(source))
    refused(source, tmp_path, match=str(source))
    out.mkdir()
    (out / "mine.txt").write_text("precious")
    for more in ((), ("--overwrite",)):
        refused(source, out, *more, match=str(out))
    (out / "mine.txt").unlink()
    convert(source, out)
    refused(source, out, match="--overwrite")
    (out / "mine.txt").write_text("precious")
    refused(source, out, "--overwrite", match="mine.txt")
    (out / "mine.txt").unlink()
    convert(source, "--output", out, "--overwrite", "--to", "hf-llava")
    assert json.loads((out / "config.json").read_text())["model_type"] == "llava"
    refused(source, tmp_path / "new", "--to", "released-mof", match="released-mof")
    assert not (tmp_path / "new").exists()
    refused(tmp_path / "nowhere", tmp_path / "new", match="nowhere")


def test_models_that_no_layout_holds(tiny_model: MoFForConditionalGeneration, tiny_processor: MoFProcessor, tmp_path: Path) -> None:
    for layout, match in {
        "hf-llava": "hf-llava",
        "llava": "llava holds 1 ",
        "released-mof": "tiny-a .TinyEncoder.",
    }.items():
        with pytest.raises(ValueError, match=match):
            save_checkpoint(Loaded(tiny_model, tiny_processor, "mof", 0), tmp_path, layout)
