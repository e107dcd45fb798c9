"""Which kinds of noise a model tells from true answers, measured end to end on an untrained model."""

import json

import pytest

import measure_noise
from mof.miniature.noise import KINDS


@pytest.mark.slow
def test_every_kind_null_image_and_measure_has_a_figure(untrained, tmp_path, monkeypatch, capsys):
    arguments = [str(untrained), "--records", "60", "--nulls", "blur", "drop", "--output", str(tmp_path / "figures.json")]
    monkeypatch.setattr("sys.argv", ["measure_noise.py", *arguments])
    measure_noise.main()
    blur, drop = json.loads((tmp_path / "figures.json").read_text())
    assert (blur["null"], drop["null"]) == ("blur", "drop")
    assert drop["table"]["span"].keys() - blur["table"]["span"].keys() == {"visnec"}  # this measure needs the null image drop
    for row in (blur, drop):
        assert row["table"].keys() == set(KINDS)
        assert all(0 <= value <= 1 for figures in row["table"].values() for value in figures.values())
    assert drop["table"]["span"]["visnec"] == drop["table"]["span"]["vig"] != blur["table"]["span"]["vig"]
    printed = capsys.readouterr().out
    assert "AUROC of records, null image blur" in printed and "AUROC of tokens, null image drop" in printed
