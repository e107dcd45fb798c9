"""The README's code blocks run, in their order, in one empty folder: later blocks use what earlier ones wrote."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from support.code_blocks import ROOT, Block, blocks, run

PAGE = ROOT / "README.md"
README = PAGE.read_text()
BLOCKS = blocks(PAGE)
NAMES: dict[str, Any] = {"__name__": "__main__"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("readme")
    (path / "recipes").symlink_to(ROOT / "recipes")
    return path


@pytest.mark.slow
@pytest.mark.parametrize("block", BLOCKS, ids=[f"block{i}-{block.language}" for i, block in enumerate(BLOCKS)])
def test_block(block: Block, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    run(block, NAMES, monkeypatch)


def test_python_example_stands_in_the_first_40_lines() -> None:
    assert re.search(r"^```python\n.*?^```$", "\n".join(README.splitlines()[:40]), re.DOTALL | re.MULTILINE)


def test_is_read_in_a_minute() -> None:
    assert len(README.splitlines()) <= 150


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md", "CODE_OF_CONDUCT.md"])
def test_linked_files_exist(page: str) -> None:
    text = (ROOT / page).read_text()
    targets = re.findall(r"\]\(([^)#\s]+)", text) + re.findall(r'(?:src|srcset|href)="([^"#]+)"', text)
    missing = [target for target in targets if "://" not in target and not (ROOT / target).exists()]
    assert not missing


def test_pictures_are_small() -> None:
    pictures = [ROOT / source for source in re.findall(r'(?:src|srcset)="([^"]+)"', README)]
    assert len(pictures) >= 3 and all(picture.stat().st_size < 300_000 for picture in pictures)
