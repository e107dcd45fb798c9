"""The miniature's own training, at a thousandth of its length: every network is written in the form in which it is loaded."""

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import train_miniature
from encoders import build_encoder


@pytest.mark.slow
def test_all_three_networks_train_and_load(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["train_miniature.py", "--output", str(tmp_path), "--scale", "0.001"])
    train_miniature.main()
    pixels = torch.randint(0, 256, (2, 3, 40, 40), dtype=torch.uint8)
    import encoders.miniature  # noqa: F401  registers mof_mini_vit

    clip = build_encoder(f"open_clip:local-dir:{tmp_path / 'mini-clip'}")
    dino = build_encoder("timm:mof_mini_vit", weights=tmp_path / "mini-dino/model.safetensors")
    assert clip(pixels).tokens.shape == dino(pixels).tokens.shape == (2, 25, 192)
    assert clip.embed_text(["a photo of a red fish"]).shape == (1, 128)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "mini-lm")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "mini-lm")
    assert model.config.vocab_size >= len(tokenizer)
    assert tokenizer.decode(tokenizer("The fish points leftward.").input_ids) == "The fish points leftward."
