"""Checkpoints that are damaged, incomplete or ambiguous: refused, each key or file named."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support.tiny_checkpoints import (
    build_dino,
    build_parts,
    llava_state,
    mof_state,
    prefixed,
    write_clip,
    write_hf_llava,
    write_original,
    write_weights,
)
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from encoders.weight_files import WeightsError
from mof.llava.loading import load_checkpoint

State = dict[str, Tensor]
EXPLANATION = "saved stage-1 files by the substring 'mm_projector', which also matches 'dino_mm_projector'"


@pytest.fixture
def parts(tiny_tokenizer: PreTrainedTokenizerFast) -> dict:
    return build_parts(tiny_tokenizer)


@pytest.fixture
def stage_1(parts: dict, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> Callable[..., object]:
    """Loads `mm_projector.bin` of a state on top of a Llama."""
    write_clip(tmp_path / "clip", parts["clip"])
    torch.save(parts["dino"], tmp_path / "dino.pth")
    parts["llama"].save_pretrained(tmp_path / "llama")
    tiny_tokenizer.save_pretrained(tmp_path / "llama")
    write_original(tmp_path / "stage-1", tiny_tokenizer, {})

    def load(state: State, **options: object) -> object:
        torch.save(state, tmp_path / "stage-1" / "mm_projector.bin")
        return load_checkpoint(tmp_path / "stage-1", base=tmp_path / "llama", vision_tower=tmp_path / "clip", **options)

    return load


def test_collision_of_projector_names(stage_1: Callable[..., object], parts: dict, tmp_path: Path) -> None:
    clip, dino = parts["projector"], parts["dino projector"]
    clip_only, dino_only = prefixed("model.mm_projector.", clip), prefixed("model.dino_mm_projector.", dino)
    towers = {"dino_tower": tmp_path / "dino.pth"}
    refused: list[tuple[State, dict, str]] = [
        (clip_only | dino_only, {"layout": "llava"}, "model.mm_projector.*model.dino_mm_projector"),
        (clip, {}, "0.weight"),
        (clip, towers, "0.weight"),
        (clip_only | prefixed("mm_projector.", dino), {}, "model.mm_projector.0.weight.* mm_projector.0.weight"),
        (clip_only, towers, r"model.mm_projector.\*"),
        (clip_only, {"layout": "released-mof"}, r"model.mm_projector.\*"),
        (dino_only, {}, r"model.dino_mm_projector.\*"),
        (clip_only | prefixed("model.dino_mm_projector.", clip), towers, "stage-1"),
    ]
    for state, options, match in refused:
        with pytest.raises(WeightsError, match=match) as error:
            stage_1(state, **options)
        assert (EXPLANATION in str(error.value) and "mm_projector.bin" in str(error.value)) or "stage-1" in str(error.value)
    stage_1(clip_only | dino_only, **towers)
    stage_1(clip_only, layout="llava")
    stage_1(prefixed("base_model.model.model.mm_projector.", clip))
    with pytest.raises(WeightsError, match="1 unexpected: model.embed_tokens.weight"):
        stage_1(clip_only | {"model.embed_tokens.weight": torch.zeros(3)})


def test_collision_in_a_whole_checkpoint(parts: dict, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    parts["dino projector"] = parts["projector"]
    write_original(tmp_path, tiny_tokenizer, mof_state(parts))
    with pytest.raises(WeightsError, match="CLIP and DINOv2"):
        load_checkpoint(tmp_path)
    with pytest.raises(ValueError, match="dino_tower"):
        load_checkpoint(tmp_path, layout="llava", dino_tower="dinov2-vit-l14")


@pytest.mark.parametrize(
    "key",
    [
        "model.layers.1.mlp.up_proj.weight",
        "model.mm_projector.2.bias",
        "model.dino_mm_projector.0.weight",
        "model.vision_tower.vision_tower.vision_model.encoder.layers.1.mlp.fc1.bias",
        "model.dino_tower.vision_tower.blocks.1.ls2.gamma",
    ],
)
def test_every_key_is_accounted_for(key: str, parts: dict, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    stem, _, last = key.rpartition(".")
    own = stem.removeprefix("model.vision_tower.vision_tower.vision_model.").removeprefix("model.dino_tower.vision_tower.")
    own = own.removeprefix("model.mm_projector.").removeprefix("model.dino_mm_projector.")
    for change in ("missing", "unexpected", "misshapen"):
        state = mof_state(parts)
        if change == "missing":
            del state[key]
        elif change == "unexpected":
            state[f"{stem}.extra"] = torch.zeros(3)
        else:
            state[key] = state[key][..., :-1]
        write_original(tmp_path / change, tiny_tokenizer, state)
        with pytest.raises(WeightsError) as error:
            load_checkpoint(tmp_path / change)
        named = f"{own}.extra" if change == "unexpected" else f"{own}.{last}"
        assert named in str(error.value) and str(tmp_path / change) in str(error.value), error.value


def test_hugging_face_keys(tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    write_hf_llava(tmp_path, tiny_tokenizer)
    good = load_file(tmp_path / "model.safetensors")
    for change, match in {
        "image_newline": "1 unexpected: image_newline",
        "language_model.model.layers.0.extra": "1 unexpected: model.layers.0.extra",
        "vision_tower.extra": "1 unexpected: extra",
    }.items():
        write_weights(tmp_path, good | {change: torch.zeros(3)}, ending=".safetensors")
        with pytest.raises(WeightsError, match=match):
            load_checkpoint(tmp_path)
    write_weights(tmp_path, good | {"model.language_model.norm.weight": torch.zeros(32)}, ending=".safetensors")
    with pytest.raises(WeightsError, match="norm.weight.*norm.weight"):
        load_checkpoint(tmp_path)


def test_hugging_face_configs_that_cannot_be_met(tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    for number, (vision, changes, match) in enumerate(
        [
            ("clip", {"vision_feature_select_strategy": "full"}, "'clip_vision_model' with vision_feature_select_strategy 'full'"),
            ("siglip", {"vision_feature_select_strategy": "default"}, "'siglip_vision_model' with .* 'default'"),
            ("clip", {"image_token_index": 7}, "7.*259"),
            ("clip", {"projector_hidden_act": "relu", "multimodal_projector_bias": False}, "0.bias"),
        ]
    ):
        write_hf_llava(tmp_path / str(number), tiny_tokenizer, vision=vision, **changes)
        with pytest.raises(ValueError, match=match):
            load_checkpoint(tmp_path / str(number))
    write_hf_llava(tmp_path / "sizes", tiny_tokenizer)
    for name in ("preprocessor_config.json", "processor_config.json"):
        file = tmp_path / "sizes" / name
        if file.is_file():
            file.write_text(file.read_text().replace('"shortest_edge": 28', '"shortest_edge": 32'))
    with pytest.raises(ValueError, match="32.*28 x 28"):
        load_checkpoint(tmp_path / "sizes")


def test_damaged_files(parts: dict, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    for ending in (".bin", ".safetensors"):
        folder = tmp_path / ending
        write_original(folder, tiny_tokenizer, llava_state(parts), shards=3, ending=ending)
        shard = next(folder.glob(f"*-00002-of-00003{ending}"))
        whole = shard.read_bytes()
        for bad in (
            whole[: len(whole) // 2],
            b"",
            b"no weights at all",
            whole[:-200] if ending == ".bin" else whole[:8] + bytes(50) + whole[58:],
        ):
            shard.write_bytes(bad)
            with pytest.raises(WeightsError, match=shard.name):
                load_checkpoint(folder)
        shard.unlink()
        with pytest.raises(WeightsError, match=f"index.json.*{shard.name}"):
            load_checkpoint(folder)
        index = next(folder.glob("*.index.json"))
        index.unlink()
        with pytest.raises(WeightsError, match=f"{shard.name}.*3"):
            load_checkpoint(folder)
        for text in ("{", '{"weight_map": 3}', "[]"):
            index.write_text(text)
            with pytest.raises(WeightsError, match="index.json"):
                load_checkpoint(folder)


def test_wrong_folders(parts: dict, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nowhere"):
        load_checkpoint(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="config.json"):
        load_checkpoint(tmp_path / "empty")
    folder = tmp_path / "llava"
    write_original(folder, tiny_tokenizer, llava_state(parts))
    config = json.loads((folder / "config.json").read_text())
    for changes, match in [
        ({"model_type": "llava_mpt"}, "'llava_mpt'"),
        ({"mm_vision_tower": None, "model_type": "llama"}, "'llama'"),
        ({"image_aspect_ratio": "anyres"}, "'anyres'"),
        ({"mm_vision_select_feature": "cls_patch"}, "'cls_patch'"),
        ({"mm_projector_type": "resampler"}, "'resampler'"),
        ({"mm_projector_type": "linear"}, "0.weight"),
        ({"hidden_size": 64}, "model.embed_tokens.weight"),
        ({"mm_vision_tower": "someone/unknown-clip"}, "someone/unknown-clip"),
    ]:
        (folder / "config.json").write_text(json.dumps(config | changes))
        with pytest.raises(ValueError, match=match):
            load_checkpoint(folder)
    for text in ("{", "[]"):
        (folder / "config.json").write_text(text)
        with pytest.raises(ValueError, match="config.json"):
            load_checkpoint(folder)
    (folder / "config.json").write_text(json.dumps(config))
    for file in folder.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(ValueError, match="llava.*tokenizer.json"):
        load_checkpoint(folder)


def test_sentencepiece_is_asked_for(
    parts: dict, tiny_tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    write_original(tmp_path, tiny_tokenizer, llava_state(parts))
    (tmp_path / "tokenizer.json").rename(tmp_path / "tokenizer.model")
    monkeypatch.setattr("mof.llava.original.find_spec", lambda _name: None)
    with pytest.raises(ValueError, match=r"tokenizer.model.*sentencepiece.*mof-vig\[llava\]"):
        load_checkpoint(tmp_path)


def test_code_in_weight_files_is_not_run(parts: dict, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    class Code:
        def __reduce__(self) -> tuple:
            return (Path.touch, (tmp_path / "ran",))

    write_original(tmp_path / "llava", tiny_tokenizer, {})
    torch.save({"model.norm.weight": Code()}, tmp_path / "llava" / "pytorch_model.bin")
    with pytest.raises(WeightsError, match="pytorch_model.bin"):
        load_checkpoint(tmp_path / "llava")
    assert not (tmp_path / "ran").exists()


def test_dino_whose_heads_cannot_be_counted(parts: dict, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    from encoders.backends.torch_hub import sizes_of

    with pytest.raises(WeightsError, match="96.*64"):
        sizes_of({key: value[..., :96] if key == "cls_token" else value for key, value in build_dino().items()}, "file")
    with pytest.raises(WeightsError, match="'cls_token'"):
        sizes_of({}, "file")
