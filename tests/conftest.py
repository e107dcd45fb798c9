"""Small parts that the tests of several packages share: all random but seeded, all built in a moment, none downloaded.

    tiny_encoders    two encoders that differ in width, patch size, resolution and statistics
    tiny_tokenizer   byte-level tokenizer with <s>, </s> and <pad>; knows every text
    tiny_llm         Llama of 2 layers, 32 wide
    tiny_model       MoFForConditionalGeneration: tiny_encoders interleaved into tiny_llm
    tiny_processor   its MoFProcessor
    tiny_folder      the folder model/ of tmp_path, into which both are saved

    browser          a running chromium
    shared_data      the folder of real photos, captions and benchmark files beside the project; tests are skipped without it

Each test gets fresh ones. `tiny_model` adds <image> to the tokenizer. `support/tiny.py` holds what builds them.
"""

# ruff: noqa: E402
from __future__ import annotations

import gc
import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
gc.disable()  # until all tests are collected: imports leave no garbage, and looking for it takes seconds

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from shutil import which
from typing import Any

import pytest
import torch
from hypothesis import settings
from support.tiny import build_llm, build_model, build_tokenizer
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from encoders import Encoder, build_encoder
from mof import MoFForConditionalGeneration, MoFProcessor

settings.register_profile("unhurried", deadline=None)  # the first example of a test may import torch
settings.load_profile("unhurried")


def pytest_configure(config: pytest.Config) -> None:
    """Let `--dist loadfile` keep our order. By default, files with few tests come last, and a long one among them leaves a core idle."""
    config.option.loadscopereorder = False


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the files with the most slow tests first."""
    slow = Counter(item.path for item in items if item.get_closest_marker("slow"))
    items.sort(key=lambda item: -slow[item.path])


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Iterator[None]:
    yield
    gc.freeze()
    gc.enable()


@pytest.fixture(scope="module", autouse=True)
def frozen() -> None:
    """Hide everything that is alive from the garbage collector: each training runs it, which takes half a second for all libraries."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture
def tiny_encoders() -> dict[str, Encoder]:
    return {"a": build_encoder("tiny-a"), "b": build_encoder("tiny-b")}


@pytest.fixture
def tiny_tokenizer() -> PreTrainedTokenizerFast:
    return build_tokenizer()


@pytest.fixture
def tiny_llm(tiny_tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    return build_llm(tiny_tokenizer)


@pytest.fixture
def tiny_model(tiny_llm: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast) -> MoFForConditionalGeneration:
    return build_model(tiny_tokenizer, tiny_llm)


@pytest.fixture
def tiny_processor(tiny_model: MoFForConditionalGeneration, tiny_tokenizer: PreTrainedTokenizerFast) -> MoFProcessor:
    return MoFProcessor.from_parts(tiny_model, tiny_tokenizer)


@pytest.fixture
def tiny_folder(tmp_path: Path, tiny_model: MoFForConditionalGeneration, tiny_processor: MoFProcessor) -> Path:
    tiny_model.save_pretrained(tmp_path / "model")
    tiny_processor.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """A running chromium. Its tests are skipped without it, or without playwright; the environment variable CHROMIUM names its file."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="pages are tested with playwright: pip install playwright")
    chromium = os.environ.get("CHROMIUM") or next(filter(None, map(which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if chromium is None:
        pytest.skip("pages are tested in chromium, which is not installed (or set CHROMIUM)")
    with sync_api.sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield running
        running.close()


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder with the files of `../shared/data`; the environment variable MOF_SHARED names another `shared`."""
    folder = Path(os.environ.get("MOF_SHARED", Path(__file__).parents[2] / "shared")) / "data"
    if not folder.is_dir():
        pytest.skip(f"no shared data in {folder}")
    return folder
