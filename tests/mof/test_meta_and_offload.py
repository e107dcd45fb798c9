"""Models without memory (the meta device), and models whose parts lie on disk."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from accelerate import init_empty_weights, load_checkpoint_and_dispatch
from support.tiny import build_llm, build_tokenizer
from torch import Tensor
from transformers import AutoConfig, AutoModelForImageTextToText, BatchFeature, PreTrainedTokenizerFast

import encoders
from encoders import Encoder
from mof import InterleavedMoF, MoFForConditionalGeneration, MoFModel, MoFProcessor


@pytest.fixture(params=[False, True], ids=["by reference", "embedded"])
def saved(request: pytest.FixtureRequest, tiny_encoders: dict[str, Encoder], tmp_path: Path) -> tuple[Path, BatchFeature, Tensor]:
    """A folder, a batch, and the logits that the saved model has for it."""
    tokenizer = build_tokenizer()
    mixer = InterleavedMoF(tiny_encoders, hidden_size=32)
    model = MoFForConditionalGeneration.from_parts(mixer, build_llm(tokenizer), tokenizer, embed_encoders=request.param).eval()
    pixels = torch.randint(0, 256, (3, 32, 32), dtype=torch.uint8)
    batch = MoFProcessor.from_parts(model, tokenizer)(images=[pixels], text="<image>What?", return_tensors="pt")
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        return tmp_path, batch, model(**batch).logits


def test_without_memory(saved: tuple[Path, BatchFeature, Tensor]) -> None:
    folder, batch, logits = saved
    config = AutoConfig.from_pretrained(folder)
    with torch.device("meta"):
        whole = AutoModelForImageTextToText.from_config(config)
        assert isinstance(MoFModel(config), MoFModel)
    assert all(tensor.is_meta for tensor in [*whole.parameters(), *whole.buffers()])
    with init_empty_weights(include_buffers=False):
        empty = AutoModelForImageTextToText.from_config(config)
    assert all(parameter.is_meta for parameter in empty.parameters())
    if config.embed_encoders:
        filled = load_checkpoint_and_dispatch(empty, folder, device_map={"": "cpu"}).eval()
        torch.testing.assert_close(filled(**batch).logits, logits)


@torch.no_grad()
@pytest.mark.parametrize("place", ["disk", "cpu"])
def test_the_mixer_lies_elsewhere(saved: tuple[Path, BatchFeature, Tensor], place: str, tmp_path: Path) -> None:
    folder, batch, logits = saved
    places = {"mixer": place, "language_model": "cpu"}
    model = MoFForConditionalGeneration.from_pretrained(folder, device_map=places, offload_folder=str(tmp_path / "offload"))
    assert model.mixer.adapters["a"][0].weight.is_meta == (place == "disk")
    torch.testing.assert_close(model.eval()(**batch).logits, logits)


def test_an_encoder_that_needs_memory_says_so(
    saved: tuple[Path, BatchFeature, Tensor], tiny_tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its library looks at the values of a new parameter."""

    def needs_values(*_: object, **__: object) -> Encoder:
        return torch.nn.Linear(1, 1).weight.item()

    config = AutoConfig.from_pretrained(saved[0])
    monkeypatch.setitem(encoders.registry._FACTORIES, "tiny-b", needs_values)
    with init_empty_weights(), pytest.raises(ValueError, match=r"'b' \(tiny-b\).*meta device.*from_pretrained"):
        AutoModelForImageTextToText.from_config(config)
