"""A tiny random LLaVA, records and images, which most tests here share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support.tiny_llava import build_llava, build_records
from transformers import LlavaForConditionalGeneration, LlavaProcessor


@pytest.fixture(scope="session")
def llava() -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    return build_llava()


@pytest.fixture(scope="session")
def image_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    build_records(folder, 12)
    return folder


@pytest.fixture
def records(image_folder: Path) -> list[dict[str, Any]]:
    return build_records(image_folder)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Sums in one order, here and in other processes."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def text_only() -> dict[str, Any]:
    turns = [{"from": "human", "value": "What is two and two?"}, {"from": "gpt", "value": "Four."}]
    return {"id": "text", "conversations": turns}
