"""The linear probe of layers: ridge against its normal equations, pairs against a count by hand, and planted features that it must find."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from support.commands import mof

from encoders import build_encoder
from mof.evals.layer_probe import STRENGTHS, _encoded, _groups, probe_layers, ridge, right_pairs
from mof.evals.mmvp import Question, read_mmvp


def test_ridge_equals_the_normal_equations_with_the_best_strength() -> None:
    rng = np.random.default_rng(0)
    features, unseen = rng.normal(size=(20, 6)) * [1, 5, 0.1, 1, 1, 0] + 3, rng.normal(size=(4, 6)) + 3
    targets = np.eye(3)[rng.integers(0, 3, 20)]

    def fit(x: np.ndarray, y: np.ndarray, new: np.ndarray, strength: float) -> np.ndarray:
        gram = x.T @ x + strength * np.eye(x.shape[1])
        return new @ np.linalg.solve(gram, x.T @ y)

    spread = np.where(features.std(0) > 0, features.std(0), 1) * np.sqrt(6)
    x, new, y = (features - features.mean(0)) / spread, (unseen - features.mean(0)) / spread, targets - targets.mean(0)
    errors = []
    for strength in STRENGTHS:
        left = [y[i] - fit(np.delete(x, i, 0), np.delete(y, i, 0), x[i : i + 1], strength)[0] for i in range(20)]
        errors.append(np.mean(np.square(left)))
    expected = fit(x, y, new, STRENGTHS[int(np.argmin(errors))]) + targets.mean(0)
    np.testing.assert_allclose(ridge(features, targets, unseen), expected, atol=1e-8)


def test_features_that_tell_the_answer_make_pairs_right_and_noise_leaves_them_at_chance() -> None:
    rng = np.random.default_rng(1)
    answers = [tuple(rng.permutation(["left", "right"])) for _ in range(400)]
    sign = np.array([[1 if answer == "left" else -1 for answer in pair] for pair in answers]).reshape(-1, 1)  # [N, 1]
    noise = rng.normal(size=(800, 12))
    assert right_pairs(np.hstack([noise, sign + 0.01 * noise[:, :1]]), answers).all()
    assert 0.18 < right_pairs(noise, answers).mean() < 0.32
    swapped = right_pairs(
        np.hstack([noise, sign + 0.01 * noise[:, :1]]), [pair[::-1] if k == 7 else pair for k, pair in enumerate(answers)]
    )
    assert not swapped[7] and np.delete(swapped, 7).mean() > 0.95  # the held-out pair's own label was not fitted


def write_pairs(folder: Path, layout: str = "MMVP Images") -> None:
    """Dots on the left or the right, in one of two colours; and a pair with words that no other pair has."""
    (folder / layout).mkdir(parents=True)
    rng, rows = np.random.default_rng(2), []
    for k in range(24):
        pattern, words = ("Spatial", ("left", "right")) if k % 2 else ("Color", ("red", "blue"))
        order = rng.permutation(2)
        for answer in order:
            pixels = rng.integers(0, 30, (40, 40, 3), dtype=np.uint8)
            column, channel = (30 * answer, rng.integers(0, 2) * 2) if pattern == "Spatial" else (rng.integers(0, 2) * 30, 2 * answer)
            pixels[15:25, column : column + 10, channel] = 250
            number = len(rows) + 1
            Image.fromarray(pixels).save(folder / layout / f"{number}.png")
            rows.append((number, "Which?", f"(a) {words[0]} (b) {words[1]}", f"({'ab'[answer]})", pattern))
    for answer in "ab":
        Image.new("RGB", (40, 40)).save(folder / layout / f"{len(rows) + 1}.png")
        rows.append((len(rows) + 1, "Which?", "(a) open (b) closed", f"({answer})", "State"))
    with (folder / "Questions.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("Index", "Question", "Options", "Correct Answer", "Category"), *rows])


def test_every_layer_of_an_encoder(tmp_path: Path) -> None:
    write_pairs(tmp_path)
    result = probe_layers("mini-dino", read_mmvp(tmp_path))
    assert result.layers == (1, 2, 3, 4) and result.pairs == {"Color": 12, "Spatial": 12} and result.left_out == 1
    assert max(result.by_pattern["Spatial"]) > 0.9 and max(result.by_pattern["Color"]) > 0.9
    for place in range(4):
        both = [result.by_pattern[name][place] for name in ("Color", "Spatial")]
        assert result.average[place] == pytest.approx(np.mean(both))
        low, high = result.intervals[place]
        assert low <= result.average[place] <= high
    blurred = probe_layers("mini-dino", read_mmvp(tmp_path), cells=1)
    assert blurred.by_pattern != result.by_pattern
    with pytest.raises(ValueError, match="cells"):
        probe_layers("mini-dino", read_mmvp(tmp_path), cells=0)
    with pytest.raises(ValueError, match="none of the 1 pairs"):
        probe_layers("mini-dino", read_mmvp(tmp_path)[-2:])


def test_a_pair_whose_answer_is_only_in_pairs_that_are_left_out_is_left_out_too() -> None:
    def asked(number: int, *answers: str) -> list[Question]:
        text = "(a) {} (b) {}".format(*answers)
        return [Question(2 * number + k, "Which?", text, {"released": "ab"[k], "corrected": "ab"[k]}) for k in (0, 1)]

    others = [*asked(1, "one", "two"), *asked(2, "one", "three"), *asked(3, "two", "four")]
    with pytest.raises(ValueError, match="none of the 3 pairs"):
        probe_layers("mini-dino", others)
    whole = [*asked(4, "red", "blue"), *asked(5, "blue", "red")]
    assert _groups([*others, *whole]) == {"all": [(whole[0], whole[1]), (whole[2], whole[3])]}


@torch.no_grad()
def test_features_of_each_layer_are_its_tokens_averaged_over_cells(tmp_path: Path) -> None:
    write_pairs(tmp_path)
    files = [str(tmp_path / "MMVP Images" / f"{n}.png") for n in (1, 2, 3)]
    encoder = build_encoder("mini-dino", layer=[1, 2, 3, 4])
    features = _encoded(encoder, files, 5, False)
    for layer, own in zip((1, 2, 3, 4), features, strict=True):
        single = build_encoder("mini-dino", layer=layer)
        for row, file in zip(own, files, strict=True):
            tokens, grid = single(single.pixels(file)[None])
            assert grid == (5, 5)
            np.testing.assert_allclose(row.reshape(-1, 25), tokens[0].T, atol=1e-5)


def test_an_image_whose_tokens_are_not_finite_is_named(tmp_path: Path) -> None:
    write_pairs(tmp_path)
    encoder = build_encoder("mini-dino", layer=[1, 2])
    encoder.tower.blocks[1].register_forward_hook(lambda module, inputs, output: output * torch.nan)
    with pytest.raises(ValueError, match=r"1\.png.*mini-dino.*not finite"):
        _encoded(encoder, [str(tmp_path / "MMVP Images/1.png")], 2, False)


def test_the_command_writes_table_files_and_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    write_pairs(tmp_path / "data")
    options = ["--encoder", "mini-clip", "--output", tmp_path / "out", "--plot", tmp_path / "layers.png"]
    result = mof("probe", "layers", "--data", tmp_path / "data", *options)
    assert result.exit_code == 0, result.output
    assert "best layer" in result.output and "1 of 25 pairs are left out" in result.output
    document = json.loads((tmp_path / "out" / "mini-clip.layers.json").read_text())
    rows = list(csv.DictReader((tmp_path / "out" / "mini-clip.layers.csv").open()))
    assert [row["layer"] for row in rows] == ["1", "2", "3", "4"] and document["pairs"] == {"Color": 12, "Spatial": 12}
    assert float(rows[2]["Spatial"]) == pytest.approx(100 * document["by_pattern"]["Spatial"][2], abs=0.01)
    assert Image.open(tmp_path / "layers.png").size[0] > 400
