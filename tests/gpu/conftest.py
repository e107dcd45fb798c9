"""`device` is the CPU in every run, and the GPU where there is a GPU: `pytest -m gpu` runs the tests on the GPU alone.

So the bodies of all tests run on every machine, and a GPU's first run finds no mistakes but its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support.devices import exact_products
from support.tiny_llava import build_llava, build_records


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> Iterator[str]:
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    torch.compiler.reset()
    with exact_products():
        yield request.param


@pytest.fixture
def llava() -> tuple[Any, Any]:
    return build_llava()


@pytest.fixture
def records(tmp_path: Path) -> list[dict[str, Any]]:
    return build_records(tmp_path / "images", 12)
