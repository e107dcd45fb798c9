"""Without a network: random encoders need none, real ones say within seconds which file is missing and how to supply it."""

from __future__ import annotations

import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub import constants

from encoders import build_encoder, weight_files

ROOT = Path(__file__).parents[2]

# What has to be named in the message.
MISSING = {
    "clip-vit-l14-336": ["ViT-L-14-336-quickgelu/openai", "timm/vit_large_patch14_clip_336.openai"],
    "siglip-so400m-14-384": ["ViT-SO400M-14-SigLIP-384/webli", "timm/ViT-SO400M-14-SigLIP-384"],
    "dinov2-vit-l14": ["model.safetensors of timm/vit_large_patch14_dinov2.lvd142m on the hub"],
    "laion-clip-convnext-xxl": ["open_clip_pytorch_model.bin", "laion/CLIP-convnext_xxlarge-laion2B-s34B-b82K-augreg-soup"],
    "mocov3-vit-b16": ["https://dl.fbaipublicfiles.com/moco-v3/vit-b-300ep/vit-b-300ep.pth.tar"],
    "hf:facebook/dinov2-large": ["config.json or preprocessor_config.json of facebook/dinov2-large"],
    "open_clip:hf-hub:laion/CLIP-ViT-B-32-laion2B-s34B-b79K": ["open_clip_config.json", "laion/CLIP-ViT-B-32-laion2B-s34B-b79K"],
}
SCRIPT = """
import socket
def refuse(*args, **kwargs):
    raise OSError("no network here")
socket.socket.connect = socket.getaddrinfo = socket.create_connection = refuse
from encoders import build_encoder
for name in {names!r}:
    try:
        {call}
    except ValueError as error:
        print("=====", name, type(error).__name__, " ".join(str(error).split()), flush=True)
"""


def run(call: str, names: list[str], cache: Path) -> dict[str, str]:
    """The messages of a fresh process with an empty cache and no network, by name."""
    environment = {"PATH": "/usr/bin:/bin", "HF_HUB_OFFLINE": "1", "HF_HOME": str(cache), "HOME": str(cache), "TORCH_HOME": str(cache)}
    words = [sys.executable, "-c", SCRIPT.format(names=names, call=call)]
    done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=True)
    lines = [line.split(" ", 3) for line in done.stdout.splitlines() if line.startswith("=====")]
    return {name: f"{kind} {message}" for _, name, kind, message in [line[:2] + line[2:4] for line in lines]}


def test_real_weights_say_what_is_missing(tmp_path: Path) -> None:
    messages = run("build_encoder(name)", list(MISSING), tmp_path)
    for name, parts in MISSING.items():
        for part in ("WeightsError", *remedy(name), *parts):
            assert part in messages[name], (name, messages[name])


def remedy(name: str) -> list[str]:
    """What helps: of transformers' models the config is missing too, which no weight file brings."""
    return ["hf:FOLDER"] if name.startswith("hf:") else ["weights=PATH", "pretrained=False"]


def test_text_tower_that_a_file_on_the_hub_defines_is_named(tmp_path: Path) -> None:
    messages = run("build_encoder(name, pretrained=False)", ["open_clip:roberta-ViT-B-32"], tmp_path)
    assert "config.json of roberta-base" in messages["open_clip:roberta-ViT-B-32"]


def test_text_of_a_random_encoder_does_not_fetch_its_tokenizer(tmp_path: Path) -> None:
    siglip = "open_clip:ViT-B-16-SigLIP"
    messages = run("build_encoder(name, pretrained=False).embed_text(['a dog'])", [siglip, "clip-vit-b32"], tmp_path)
    assert list(messages) == [siglip]  # the tokenizer of CLIP comes with open_clip
    assert "tokenizer.json" in messages[siglip] and "timm/ViT-B-16-SigLIP" in messages[siglip]
    assert "weights=PATH" not in messages[siglip] and "pretrained=False" not in messages[siglip]  # neither brings a tokenizer


@pytest.mark.parametrize("name", ["clip-vit-b32", "dinov2-vit-s14", "hf:facebook/dinov2-large"])
def test_a_hub_that_does_not_answer_is_asked_once(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Left alone, its client waits for half a minute with every file that a backend looks for."""
    asked: list[float] = []

    def refuse(*_: object, **options: float) -> None:
        asked.append(options["timeout"])
        raise OSError("no network here")

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(weight_files, "get_session", lambda: SimpleNamespace(head=refuse))
    monkeypatch.setattr(socket.socket, "connect", refuse)
    with pytest.raises(ValueError, match=remedy(name)[0]):
        build_encoder(name)
    assert asked == [5] and constants.HF_HUB_OFFLINE is False


def test_a_mistyped_folder_and_a_file_without_names_are_named(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=f"config.json or preprocessor_config.json of {tmp_path}/none.*local folder that exists: hf:FOLDER"
    ):
        build_encoder(f"hf:{tmp_path}/none")
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(ValueError, match="list.pt cannot be loaded: expected a mapping of names to tensors, found a list"):
        build_encoder("mini-dino", weights=tmp_path / "list.pt")
