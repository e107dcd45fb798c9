"""Without a network: random encoders need none, real ones say within seconds which file is missing and how to supply it."""

from __future__ import annotations

import json
import shutil
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import timm
import torch
from huggingface_hub import constants
from safetensors.torch import save_file

from encoders import build_encoder, weight_files
from encoders.backends import open_clip as open_clip_backend
from encoders.presets import WEIGHTS

# What has to be named in the message.
MISSING = {
    "clip-vit-l14-336": ["ViT-L-14-336-quickgelu/openai", "timm/vit_large_patch14_clip_336.openai"],
    "siglip-so400m-14-384": ["ViT-SO400M-14-SigLIP-384/webli", "timm/ViT-SO400M-14-SigLIP-384"],
    "dinov2-vit-s14": ["model.safetensors of timm/vit_small_patch14_dinov2.lvd142m on the hub"],
    "laion-clip-convnext-xxl": ["open_clip_pytorch_model.bin", "laion/CLIP-convnext_xxlarge-laion2B-s34B-b82K-augreg-soup"],
    "mocov3-vit-s16": ["https://dl.fbaipublicfiles.com/moco-v3/vit-s-300ep/vit-s-300ep.pth.tar"],
    "torch_hub:dinov2_vits14": ["https://dl.fbaipublicfiles.com/dinov2/dinov2_vits14/dinov2_vits14_pretrain.pth"],
    "hf:facebook/dinov2-large": ["cannot get config.json of facebook/dinov2-large"],
    "open_clip:hf-hub:laion/CLIP-ViT-B-32-laion2B-s34B-b79K": ["open_clip_config.json", "laion/CLIP-ViT-B-32-laion2B-s34B-b79K"],
}


@pytest.fixture(params=[True, False], ids=["offline", "unreachable"])
def cache(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty cache of the hub, no network, and the hub's client told so or not."""

    def refuse(*_: object, **__: object) -> None:
        raise OSError("no network here")

    for name in ("getaddrinfo", "create_connection"):
        monkeypatch.setattr(socket, name, refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", request.param)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    asked: list[float] = []

    def head(_: str, timeout: float) -> None:
        asked.append(timeout)
        refuse()

    monkeypatch.setattr(weight_files, "get_session", lambda: SimpleNamespace(head=head))
    yield tmp_path / "hub"
    assert constants.HF_HUB_OFFLINE is request.param, "a setting of the whole process was changed"
    assert set(asked) <= (set() if request.param else {5}), "the hub is given five seconds"


def put(cache: Path, repository: str) -> Path:
    """An empty folder in the cache, as the hub's client lays it out."""
    root = cache / f"models--{repository.replace('/', '--')}"
    (root / "refs").mkdir(parents=True)
    (root / "refs/main").write_text("0" * 40)
    (root / "snapshots" / ("0" * 40)).mkdir(parents=True)
    return root / "snapshots" / ("0" * 40)


@pytest.mark.parametrize("name", MISSING)
def test_real_weights_say_what_is_missing(name: str, cache: Path) -> None:
    with pytest.raises(weight_files.WeightsError) as error:
        build_encoder(name)
    message = " ".join(str(error.value).split())
    # Of transformers' models the config is missing too, which no weight file brings.
    for part in (*(["hf:FOLDER"] if name.startswith("hf:") else ["weights=PATH", "pretrained=False"]), *MISSING[name]):
        assert part in message


def test_text_tower_that_a_file_on_the_hub_defines_is_named(cache: Path) -> None:
    with pytest.raises(weight_files.WeightsError, match="config.json of roberta-base"):
        build_encoder("open_clip:roberta-ViT-B-32", pretrained=False)


def test_text_tower_whose_config_is_cached_is_built(cache: Path) -> None:
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48, "vocab_size": 99}
    (put(cache, "roberta-base") / "config.json").write_text(json.dumps({"model_type": "roberta", **sizes}))
    with torch.device("meta"):
        encoder = build_encoder("open_clip:roberta-ViT-B-32", pretrained=False)
    assert encoder.tower.text.transformer.embeddings.word_embeddings.weight.shape == (99, 32)


def test_text_of_a_random_encoder_does_not_fetch_its_tokenizer(cache: Path) -> None:
    assert open_clip_backend._tokenizer("ViT-B-32-quickgelu", offline=True)(["a dog"]).shape == (1, 77)  # comes with open_clip
    with pytest.raises(weight_files.WeightsError) as error:
        open_clip_backend._tokenizer("ViT-B-16-SigLIP", offline=True)
    assert "tokenizer.json" in str(error.value) and "timm/ViT-B-16-SigLIP" in str(error.value)
    assert "weights=PATH" not in str(error.value) and "pretrained=False" not in str(error.value)  # neither brings a tokenizer


def test_cached_weights_load(cache: Path, hf_folder: Callable[[str], str]) -> None:
    shutil.copytree(hf_folder("Dinov2Model"), put(cache, "nobody/dino"), dirs_exist_ok=True)
    shutil.copytree(WEIGHTS / "mini-clip", put(cache, "nobody/clip"), dirs_exist_ok=True)
    network = timm.create_model("test_vit")
    save_file(network.state_dict(), put(cache, "timm/test_vit.r160_in1k") / "model.safetensors", {"format": "pt"})
    folder = put(cache, "nobody/vit")
    save_file(network.state_dict(), folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps({"architecture": "test_vit", "pretrained_cfg": {"input_size": [3, 160, 160]}}))
    for name, key, expected in [
        ("timm:test_vit.r160_in1k", "blocks.0.attn.qkv.weight", network.blocks[0].attn.qkv.weight),
        ("timm:hf-hub:nobody/vit", "blocks.0.attn.qkv.weight", network.blocks[0].attn.qkv.weight),
        ("open_clip:hf-hub:nobody/clip", "logit_scale", build_encoder("mini-clip").tower.logit_scale),
        ("hf:nobody/dino", "layernorm.weight", build_encoder(f"hf:{hf_folder('Dinov2Model')}").tower.layernorm.weight),
    ]:
        assert torch.equal(build_encoder(name).tower.state_dict()[key], expected), name


def test_a_mistyped_folder_and_a_file_without_names_are_named(tmp_path: Path) -> None:
    with pytest.raises(weight_files.WeightsError, match=f"{tmp_path}/none.*hf:FOLDER"):
        build_encoder(f"hf:{tmp_path}/none")
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(weight_files.WeightsError, match=r"list\.pt.*list"):
        build_encoder("mini-dino", weights=tmp_path / "list.pt")
