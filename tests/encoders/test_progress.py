"""Progress without a terminal: a line a minute in a log, and a single output in a notebook."""

from __future__ import annotations

import pytest

from encoders import progress


@pytest.mark.parametrize(("total", "shown"), [(100, True), (None, True), (100, False)])
def test_a_log_gets_a_line_a_minute(
    total: int | None, shown: bool, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    clock = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock[0])
    with progress.progress_bar("images", total, shown) as advance:
        for done in range(1, 101):
            clock[0] += 2
            advance(done, "3 unreadable")
    out, err = capfd.readouterr()
    lines = err.splitlines()
    assert out == "" and len(lines) == (3 if shown else 0), "100 images of two seconds each"
    if shown:
        assert lines[0].startswith("30 of 100 images" if total else "30 images")
        assert "0.5 images/s, 3 unreadable" in lines[0] and ("2 minutes left" in lines[0]) == (total is not None)


CELL = """
from encoders import progress
clock = [0.0]
progress.time.monotonic = lambda: clock[0]
with progress.progress_bar("<images>", 100) as advance:
    for done in range(1, 101):
        clock[0] += 2
        advance(done, "3 unreadable")
"""


@pytest.mark.slow
def test_a_notebook_gets_one_bar_that_moves() -> None:
    nbformat = pytest.importorskip("nbformat", reason='notebooks need the extra dev: pip install "mof-vig[dev]"')
    client = pytest.importorskip("nbclient", reason='notebooks need the extra dev: pip install "mof-vig[dev]"')
    pytest.importorskip("ipykernel", reason='notebooks need the extra dev: pip install "mof-vig[dev]"')
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(CELL)])
    client.NotebookClient(notebook, timeout=300).execute()
    (output,) = notebook.cells[0].outputs
    assert output.data["text/plain"] == "100 of 100 <images>, 0.5 <images>/s, 3 unreadable, 0 minutes left"
    assert output.data["text/html"].startswith('<progress value="100" max="100"></progress> 100 of 100 &lt;images&gt;')
