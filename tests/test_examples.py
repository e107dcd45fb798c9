"""The scripts and notebooks of `examples/`: all run on the miniature, and are committed without outputs."""

from __future__ import annotations

import csv
import json
import runpy
from pathlib import Path
from typing import Any

import pytest
from support.code_blocks import ROOT

from encoders import registry
from mof import MoFForConditionalGeneration
from mof.miniature import write_dataset

EXAMPLES = ROOT / "examples"
SHOWN = {"blind_pairs": ["mini-dino", "blind pairs among 216 images"], "vig_in_ten_minutes": ["Scores of 40 records", "of 40 samples"]}


def run(name: str, monkeypatch: pytest.MonkeyPatch, *arguments: str | Path) -> None:
    monkeypatch.setattr(registry, "_FACTORIES", dict(registry._FACTORIES))  # an example registers an encoder
    monkeypatch.setattr("sys.argv", [name, *map(str, arguments)])
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")


def test_own_encoder(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    run("own_encoder.py", monkeypatch)
    assert "an image becomes 50 tokens" in capsys.readouterr().out


@pytest.mark.slow
def test_score_select_train(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    run("score_select_train.py", monkeypatch, tmp_path)
    assert "31 of 44 samples" in capsys.readouterr().out
    assert MoFForConditionalGeneration.from_pretrained(tmp_path / "model").config.encoder_order == ["clip", "dinov2"]


@pytest.mark.slow
def test_blind_pairs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    write_dataset(tmp_path / "drawn", align=1, finetune=1, pairs=2)
    run("blind_pairs.py", monkeypatch, tmp_path / "drawn" / "MMVP", tmp_path / "out")
    assert "blind pairs among 36 images" in capsys.readouterr().out
    with (tmp_path / "out" / "pairs.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert rows and all(float(row["clip_similarity"]) > 0.9 and float(row["dino_similarity"]) < 0.6 for row in rows)
    assert all(Path(row[name]).is_file() for row in rows for name in ("image_i", "image_j"))


@pytest.mark.parametrize("name", SHOWN)
def test_notebooks_hold_no_outputs(name: str) -> None:
    cells = json.loads((EXAMPLES / f"{name}.ipynb").read_text())["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert code and all(cell["outputs"] == [] and cell["execution_count"] is None for cell in code)


@pytest.mark.slow
@pytest.mark.parametrize("name", SHOWN)
def test_notebook(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nbformat = pytest.importorskip("nbformat", reason='notebooks need the extra dev: pip install "mof-vig[dev]"')
    client = pytest.importorskip("nbclient", reason='notebooks need the extra dev: pip install "mof-vig[dev]"')
    pytest.importorskip("ipykernel", reason='notebooks need the extra dev: pip install "mof-vig[dev]"')
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    notebook = nbformat.read(EXAMPLES / f"{name}.ipynb", as_version=4)
    client.NotebookClient(notebook, timeout=900, resources={"metadata": {"path": str(tmp_path)}}).execute()  # a cell's error is raised
    pages = [page for cell in notebook.cells for page in html(cell)]
    assert len(pages) >= 3 and all(any(text in page for page in pages) for text in SHOWN[name])
    if name == "blind_pairs":
        assert max(page.count("<img ") for page in pages) == 16  # eight pairs
    else:
        assert sum(page.count('class="t help"') for page in pages) > 20  # coloured tokens


def html(cell: dict[str, Any]) -> list[str]:
    """Return what our objects show of themselves in a cell."""
    shown = [output.get("data", {}).get("text/html", "") for output in cell.get("outputs", [])]
    return [text for text in shown if 'class="mof-vig"' in text]
