"""Folders that bring Python files of their own: no loader runs them, or asks on the terminal, unless the user wants it."""

from __future__ import annotations

import builtins
import json
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from support.commands import mof

from encoders import build_encoder
from encoders.saved_models import load_network, load_processor
from mof import MoFConfig
from mof.checkpoints import build_configured_mixer
from mof.evals.answerers import LocalModel
from mof.language_models import load_language_model

CODE = """
from pathlib import Path
Path(__file__).with_name("ran").touch()
Path({marker!r}).touch()
from transformers import PreTrainedConfig
class OddConfig(PreTrainedConfig):
    model_type = "odd"
"""
CLASSES = ("AutoConfig", "AutoModelForCausalLM", "AutoModelForImageTextToText", "AutoProcessor", "AutoTokenizer", "AutoImageProcessor")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model's folder whose every class lies in its own Python file; the file leaves a mark when it runs."""
    own = tmp_path / "odd"
    own.mkdir()
    (own / "odd.py").write_text(CODE.format(marker=str(tmp_path / "ran")))
    classes = {name: ["odd.OddTokenizer", None] if name == "AutoTokenizer" else "odd.OddConfig" for name in CLASSES}
    (own / "config.json").write_text(json.dumps({"model_type": "odd", "auto_map": classes}))
    for name in ("tokenizer_config.json", "preprocessor_config.json", "processor_config.json"):
        (own / name).write_text(json.dumps({"auto_map": classes}))
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(builtins, "input", lambda *_: pytest.fail("the terminal is asked"))
    return own


def _encoder_of_a_config(folder: str) -> Any:
    return build_configured_mixer(MoFConfig(encoders={"clip": {"name": f"hf:{folder}"}}))


LOADERS: dict[str, Callable[[str], Any]] = {
    "encoder": lambda folder: build_encoder(f"hf:{folder}"),
    "encoder of a config": _encoder_of_a_config,
    "language model": load_language_model,
    "processor": lambda folder: load_processor(Path(folder)),
    "network": lambda folder: load_network(Path(folder)),
    "evaluation": lambda folder: LocalModel.load(folder),
}


@pytest.mark.parametrize("name", LOADERS)
def test_no_code_of_the_folder_runs(name: str, folder: Path) -> None:
    with pytest.raises(ValueError):
        LOADERS[name](str(folder))
    assert not (folder.parent / "ran").exists()


TRUSTING: dict[str, Callable[[Path], Any]] = {
    "network": lambda folder: load_network(folder, trust_remote_code=True),
    "evaluation": lambda folder: LocalModel.load(folder, trust_remote_code=True),
    "mof chat": lambda folder: mof("chat", "--model", folder, "Hi", "--trust-remote-code"),
    "mof train": lambda folder: mof(
        "train", "--model", folder, "--records", "r.json", "--images", ".", "--output", folder / "o", "--trust-remote-code"
    ),
}


@pytest.mark.parametrize("name", TRUSTING)
def test_it_runs_where_the_user_wants_it(name: str, folder: Path) -> None:
    with suppress(Exception):  # the file holds a configuration and no model
        TRUSTING[name](folder)
    assert (folder.parent / "ran").exists()
