"""`mof chat`: one question or a conversation, with an image or without, also for models in half precision."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from support.commands import mof, refused
from support.families import build
from typer.testing import Result

from encoders.saved_folders import recording
from mof import MoFProcessor


def chat(model: Path, *arguments: str | Path, typed: str | None = None) -> Result:
    return mof("chat", "--model", model, "--max-new-tokens", "5", *arguments, typed=typed)


@pytest.fixture
def image(tmp_path: Path) -> Path:
    Image.new("RGB", (40, 30), "red").save(tmp_path / "red.png")
    return tmp_path / "red.png"


@pytest.mark.parametrize("with_image", [True, False])
def test_a_conversation(
    with_image: bool,
    image: Path,
    tiny_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[Any] = []
    original = MoFProcessor.apply_chat_template

    def keep(self: MoFProcessor, messages: list[dict[str, Any]], **options: Any) -> Any:
        asked.append(copy.deepcopy(messages))
        return original(self, messages, **options)

    monkeypatch.setattr(MoFProcessor, "apply_chat_template", keep)
    arguments = ("--image", image) if with_image else ()
    single = chat(tmp_path / "model", *arguments, "Colour?")
    talk = chat(tmp_path / "model", *arguments, typed="Colour?\n\nAnd now?\n")
    assert single.exit_code == talk.exit_code == 0, talk.output
    assert talk.stdout.startswith(single.stdout)  # greedy, and nothing but the answers
    (first,), (again,), (second,) = asked
    assert first == again and [part["type"] for part in first[0]["content"]] == ["image", "text"][not with_image :]
    question, answer, further = second
    assert [question] == first and further == {"role": "user", "content": [{"type": "text", "text": "And now?"}]}
    assert answer == {"role": "assistant", "content": [{"type": "text", "text": single.stdout.strip()}]}


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "idefics3"])
def test_half_precision(family: str, image: Path, tmp_path: Path) -> None:
    """The processors of other models give float32 pixels."""
    model, processor = build(family)
    model.bfloat16().save_pretrained(tmp_path / "half")
    processor.chat_template += "{{ 'assistant:' if add_generation_prompt else '' }}"
    processor.save_pretrained(tmp_path / "half")
    result = chat(tmp_path / "half", "--image", image, "What?")
    assert result.exit_code == 0, result.output


def test_a_trained_model_of_another_library_that_was_changed_is_refused(tmp_path: Path) -> None:
    model, processor = build("llava")
    with recording(tmp_path / "tuned"):  # as training does
        model.save_pretrained(tmp_path / "tuned")
        processor.save_pretrained(tmp_path / "tuned")
    weights = tmp_path / "tuned" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"!")
    refused(chat(tmp_path / "tuned", "What?"), "model.safetensors")
