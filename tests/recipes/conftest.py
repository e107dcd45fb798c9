"""Fixtures of the recipes' tests."""

from pathlib import Path

import pytest

from encoders import build_encoder
from mof import InterleavedMoF, MoFForConditionalGeneration, MoFProcessor
from mof.language_models import load_language_model


@pytest.fixture(scope="session")
def untrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved model of the miniature whose adapter was never trained. No test may change it."""
    folder = tmp_path_factory.mktemp("saved") / "untrained"
    llm, tokenizer = load_language_model("mini-lm")
    mixer = InterleavedMoF({"clip": build_encoder("mini-clip")}, hidden_size=llm.config.hidden_size)
    model = MoFForConditionalGeneration.from_parts(mixer, llm, tokenizer)
    model.save_pretrained(folder)
    MoFProcessor.from_parts(model, tokenizer).save_pretrained(folder)
    return folder
