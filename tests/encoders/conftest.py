"""Tiny random models of all backends, under the names that `build_encoder` takes. None is downloaded.

    clip_config    a folder with the open_clip models "tiny-native" (own vision transformer) and "tiny-timm" (timm's)
    tiny_timm      makes timm build every vision transformer 3 blocks deep and 24 wide, at 4 x 4 patches
    hf_folder      (model class name) -> a folder that transformers saved
    encoder        one encoder after the other, of every backend; `build` builds it with options

Every tower is 3 blocks deep, 24 wide, on a grid of 4 x 4 patches.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import open_clip
import pytest
import timm
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from transformers import CLIPImageProcessor, PreTrainedTokenizerFast

from encoders import Encoder, build_encoder

DEPTH = 3
VISION = {"hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": DEPTH, "num_attention_heads": 2}
SIZES = {"image_size": 28, "patch_size": 7}
TEXT = {**VISION, "vocab_size": 10, "max_position_embeddings": 8}


def _randomised(model: nn.Module) -> nn.Module:
    """Give every parameter a size that matters: many start at zero or one, and would hide what is left out."""
    generator = torch.Generator().manual_seed(7)
    for parameter in model.parameters():
        parameter.data += torch.randn(parameter.shape, generator=generator) * 0.1
    return model


@pytest.fixture
def randomised() -> Callable[[nn.Module], nn.Module]:
    return _randomised


@pytest.fixture(scope="session")
def clip_config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("open_clip")
    _word_tokenizer().save_pretrained(folder / "tokenizer")
    text = {"context_length": 8, "vocab_size": 10, "width": 16, "heads": 2, "layers": 1}
    text["hf_tokenizer_name"] = str(folder / "tokenizer")
    native = {"layers": DEPTH, "width": 24, "head_width": 12, "patch_size": 7, "image_size": 28}
    wrapped = {"timm_model_name": "vit_tiny_patch16_224", "timm_pool": "token", "timm_proj": "linear", "image_size": 64}
    for name, vision in {"tiny-native": native, "tiny-timm": wrapped}.items():
        config = {"embed_dim": 20, "quick_gelu": name == "tiny-native", "vision_cfg": vision, "text_cfg": text}
        (folder / f"{name}.json").write_text(json.dumps(config))
    open_clip.add_model_config(folder)
    return folder


@pytest.fixture
def tiny_timm(monkeypatch: pytest.MonkeyPatch) -> Callable[..., nn.Module]:
    original = timm.create_model

    def create(name: str, **options: Any) -> nn.Module:
        patch = int(name.split("patch")[1].split("_")[0])
        small = {"depth": DEPTH, "embed_dim": 24, "num_heads": 2, "img_size": 4 * patch}
        return original(name, **{**small, **options})

    monkeypatch.setattr(timm, "create_model", create)
    return create


def _word_tokenizer() -> PreTrainedTokenizerFast:
    words = ["<pad>", "<unk>", "</s>", "a", "photo", "of", "dog", "cat", "red", "blue"]
    backend = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")


@pytest.fixture
def hf_folder(tmp_path: Path) -> Callable[[str], str]:
    def save(kind: str) -> str:
        model_class = getattr(transformers, kind)
        options: dict[str, Any] = {**VISION, **SIZES}
        if kind in ("CLIPModel", "SiglipModel", "MetaClip2Model", "Aimv2Model"):
            options = {"vision_config": {**VISION, **SIZES}, "text_config": TEXT, "projection_dim": 20}
        if kind.startswith("Aimv2"):  # the kind that takes any size
            options.get("vision_config", options)["is_native"] = True
        if kind == "SiglipModel":
            options["text_config"] = {**TEXT, "projection_size": 24}
        if kind == "DINOv3ViTModel":
            options["num_register_tokens"] = 2
        folder = tmp_path / kind
        _randomised(model_class(model_class.config_class(**options))).save_pretrained(folder)
        CLIPImageProcessor(image_mean=[0.5, 0.4, 0.3], image_std=[0.2, 0.3, 0.4]).save_pretrained(folder)
        _word_tokenizer().save_pretrained(folder)
        return str(folder)

    return save


BACKENDS = {
    "open_clip": "open_clip:tiny-native",
    "open_clip with timm": "open_clip:tiny-timm",
    "timm": "timm:vit_small_patch14_reg4_dinov2",
    "hf clip": "CLIPModel",
    "hf dinov2": "Dinov2Model",
    "torch_hub": "torch_hub:tiny",
}


@pytest.fixture(params=BACKENDS)
def build(request: pytest.FixtureRequest, clip_config: Path, tiny_timm: object, hf_folder: Callable[[str], str]) -> Callable[..., Encoder]:
    """`build_encoder` of one backend after the other, with random weights."""
    name = BACKENDS[request.param]
    if ":" not in name:
        name = f"hf:{hf_folder(name)}"

    def of_backend(**options: Any) -> Encoder:
        architecture = {"config": {"width": 24, "depth": DEPTH, "heads": 2, **SIZES}} if name.startswith("torch_hub") else {}
        encoder = build_encoder(name, **{"pretrained": False, **architecture, **options})
        _randomised(encoder.tower)
        return encoder

    return of_backend


@pytest.fixture
def encoder(build: Callable[..., Encoder]) -> Encoder:
    return build()


@pytest.fixture
def blocks_of() -> Callable[[Encoder], nn.ModuleList]:
    """Gives the transformer blocks of an encoder's vision tower, found by where each backend keeps them."""
    paths = ["visual.transformer.resblocks", "visual.trunk.blocks", "vision_model.encoder.layers", "blocks"]
    paths += ["encoder.layer", "encoder.layers", "layers", "model.layer"]

    def find(encoder: Encoder) -> nn.ModuleList:
        modules: dict[str, Any] = dict(encoder.tower.named_modules())
        return next(modules[path] for path in paths if path in modules)

    return find


@pytest.fixture
def block_outputs() -> Callable[[nn.ModuleList, Callable[[], object]], list[Tensor]]:
    """Gives what went into the first block and came out of each, in order, while `run` ran."""

    def collect(blocks: nn.ModuleList, run: Callable[[], object]) -> list[Tensor]:
        outputs: list[Tensor] = []
        hooks = [blocks[0].register_forward_pre_hook(lambda _block, inputs: outputs.append(inputs[0]))]
        hooks += [block.register_forward_hook(lambda _block, _in, out: outputs.append(out)) for block in blocks]
        with torch.no_grad():
            run()
        for hook in hooks:
            hook.remove()
        return outputs

    return collect
