"""`mof vig report` and the analyses, called as a user would, on a tiny model saved in a temporary folder."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import xxhash
from PIL import Image
from support.commands import mof, refused

from encoders.digests import DamagedError
from mof.data import read_records
from vig import load_scores

COLOURS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255)}


run = partial(mof, "vig")


@pytest.fixture
def folder(tiny_folder: Path, tmp_path: Path) -> Path:
    """model/, records.json, questions.json and the images."""
    records, questions = [], []
    for name, colour in COLOURS.items():
        image = Image.new("RGB", (32, 32), colour)
        image.paste((255, 255, 255), (0, 0, 16, 16))
        image.save(tmp_path / f"{name}.png")
        turns = [{"from": "human", "value": "<image>\nColour?"}, {"from": "gpt", "value": f"It is {name}."}]
        records.append({"id": name, "image": f"{name}.png", "conversations": turns})
        questions.append({"question": "Red?", "image": f"{name}.png", "options": ["yes", "no"], "answer": "yes"})
    (tmp_path / "records.json").write_text(json.dumps(records))
    (tmp_path / "questions.json").write_text(json.dumps(questions))
    return tmp_path


def score(folder: Path, null: str, records: str = "records.json", exit_code: int = 0) -> Path:
    output = folder / f"scores-{null}-{records}"
    inputs = ("--model", folder / "model", "--records", folder / records, "--image-folder", folder)
    result = run("score", *inputs, "--output-dir", output, "--null", null)
    assert result.exit_code == exit_code, result.output
    return output


def test_report(folder: Path) -> None:
    blurred, dropped = score(folder, "blur"), score(folder, "drop")
    inputs = ("--records", folder / "records.json")
    more = ("--keep", "0.5", "--source-key", "id", "--samples", "1", "--images", folder)
    result = run("report", blurred, dropped, *inputs, *more, "-o", folder / "x.html")
    assert result.exit_code == 0, result.output
    assert "x.html: 3 records; 2 of 3 samples" in result.stdout
    page = (folder / "x.html").read_text()
    assert page.count("<article") == 2 and page.count("data:image/png;base64,") == 4
    assert "<td>drop</td>" in page and "<td>green</td>" in page
    assert run("report", blurred, *inputs, "--floor", "-o", folder / "y.html").exit_code == 0
    page = (folder / "y.html").read_text()
    assert "made without images" in page and "At or above +0.000 nats" in page


def test_report_of_nothing_or_of_the_wrong_things(folder: Path) -> None:
    text = [{"id": "t", "conversations": [{"from": "human", "value": "?"}, {"from": "gpt", "value": "!"}]}]
    (folder / "text.json").write_text(json.dumps(text))
    broken = json.loads((folder / "records.json").read_text())[:1]
    broken[0]["image"] = "no.png"
    (folder / "broken.json").write_text(json.dumps(broken))
    inputs = ("-o", folder / "x.html", "--records")
    refused(run("report", score(folder, "blur", "text.json"), *inputs, folder / "text.json"), "no scores to show", "1 text-only")
    refused(run("report", score(folder, "blur", "broken.json", exit_code=2), *inputs, folder / "broken.json"), "1 that could not", "no.png")
    scores = score(folder, "blur")
    refused(run("report", folder, *inputs, folder / "records.json"), "manifest.json")
    refused(run("report", scores, *inputs, folder / "text.json"), "give the records that were scored")
    refused(run("report", scores, *inputs, folder / "records.json", "--images", folder / "nowhere"), "no folder", "--images")
    refused(run("report", scores, *inputs, folder / "records.json", "--keep", "3"), "[0, 1]")
    assert not (folder / "x.html").exists()


def test_an_occupied_output_is_refused_before_the_model_is_loaded(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scores = score(folder, "blur")
    for loader in ("load_processor", "load_network"):
        monkeypatch.setattr(f"vig.cli.score.{loader}", lambda *_, **__: pytest.fail("a model was loaded"))
        monkeypatch.setattr(f"vig.cli.train.{loader}", lambda *_, **__: pytest.fail("a model was loaded"))
    inputs = ("--model", folder / "model", "--records", folder / "records.json", "--image-folder", folder, "--output-dir")
    refused(run("score", *inputs, scores, "--null", "zero"), "null.name: 'blur' there, 'zero' now")
    refused(run("score", *inputs, scores, "--max-length", "99"), "max_length: 2048 there, 99 now")
    refused(run("score", *inputs, folder / "model"), "no scoring run")


def test_a_report_reads_its_records_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = []
    monkeypatch.setattr("vig.cli.report.stream_rows", lambda path: read.append(path) or iter(json.loads(path.read_text())))
    inputs = ("--records", folder / "records.json", "--source-key", "image", "-o", folder / "x.html")
    assert run("report", score(folder, "blur"), *inputs).exit_code == 0 and len(read) == 1


def test_image_match(folder: Path) -> None:
    records = json.loads((folder / "records.json").read_text())
    images = [record["image"] for record in records]
    for name, shift in (("partly", 1), ("wrong", 2)):
        moved = [one | {"image": images[(i + shift) % 3]} for i, one in enumerate(records)]
        (folder / f"{name}.json").write_text(json.dumps(moved))
    inputs = ("image-match", "--model", folder / "model", "--images", folder, "-o", folder / "x.json", "--records", folder / "records.json")
    files = ("--partly", folder / "partly.json", "--conflicting", folder / "wrong.json")
    result = run(*inputs, *files, "--score-dir", folder / "kept")
    assert result.exit_code == 0, result.output
    figures = json.loads((folder / "x.json").read_text())
    assert list(figures["groups"]) == ["matching", "partly matching", "conflicting"]
    assert all(group["n"] == 3 for group in figures["groups"].values())
    assert f"{figures['groups']['matching']['mean']:+.3f}" in result.stdout
    again = run(*inputs, *files, "--score-dir", folder / "kept")
    assert again.exit_code == 0 and json.loads((folder / "x.json").read_text()) == figures
    refused(run(*inputs, *files[:2]), "--conflicting")
    refused(run(*inputs), "share more than others")  # no two captions have a word in common
    for one, word in zip(records, ("cat", "cat", "dog"), strict=True):
        one["conversations"][1]["value"] += f" a {word}"
    (folder / "records.json").write_text(json.dumps(records))
    assert run(*inputs, "--limit", "1", "--seed", "3").exit_code == 0
    figures = json.loads((folder / "x.json").read_text())
    assert figures["seed"] == 3 and figures["groups"]["matching"]["n"] == 1


def test_attention(folder: Path) -> None:
    inputs = ("attention", "--model", folder / "model", "--images", folder, "-o", folder / "x.json")
    result = run(*inputs, "--model", folder / "." / "model", "--records", folder / "records.json", "--limit", "2")
    assert result.exit_code == 0, result.output
    figures = json.loads((folder / "x.json").read_text())
    [found] = figures.values()  # the same model, named twice
    assert found["records"] == 2 and len(found["layers"]) == 2 and all(0 < share < 1 for share in found["layers"])
    (folder / "copy").symlink_to(folder / "model")
    result = run(*inputs, "--model", folder / "copy", "--records", folder / "records.json")
    assert "difference" in result.stdout and "+0.0" in result.stdout
    refused(run("attention", "--model", folder, "--images", folder, "--records", folder / "records.json"), "config.json")


def test_misleading(folder: Path) -> None:
    inputs = ("misleading", "--model", folder / "model", "--images", folder, "-o", folder / "x.json", "--questions")
    result = run(*inputs, folder / "questions.json")
    assert result.exit_code == 0, result.output
    figures = json.loads((folder / "x.json").read_text())
    assert figures["model"]["alone"]["questions"] == 3 and figures["model"]["misled"]["pair_accuracy"] is None
    refused(run(*inputs, folder / "records.json"), "question 1 has no 'question'")
    refused(run(*inputs, folder / "none.json"), "none.json")


def test_calibration_floor_and_card(folder: Path) -> None:
    output = folder / "scores"
    inputs = ("--records", folder / "records.json")
    said = run("score", "--model", folder / "model", *inputs, "--images", folder, "--output", output, "--measures", "logit").stdout
    assert "right against swapped images (3 records)" in said
    assert "right against swapped images (3 records)" in _report(folder, output, *inputs)
    result = run("select", "--scores", output, *inputs, "--by", "vig", "--floor", "--source-key", "id", "--output", folder / "chosen.json")
    assert result.exit_code == 0, result.output
    card, chosen = json.loads((folder / "chosen.card.json").read_text()), json.loads((folder / "chosen.json").read_text())
    scores = load_scores(output)
    assert [record["id"] for record in chosen] == [s.id for s in scores if s.vig >= 0]
    assert (card["threshold"], card["measure"], card["null"]["name"]) == (0, "vig", "blur")
    assert card["model"]["name"] == str(folder / "model") and card["settings"]["floor"]
    assert card["counts"]["samples_kept"] == len(chosen) == card["data"]["records"]
    assert {name: row["samples_kept"] for name, row in card["counts"]["sources"].items()} == {s.id: int(s.vig >= 0) for s in scores}
    assert card["data"]["xxh3"] == xxhash.xxh3_128_hexdigest((folder / "chosen.json").read_bytes())
    names = [raw["id"] for raw in json.loads((folder / "records.json").read_text())]  # scores may have another order
    kept = [row for row, name in enumerate(names) if scores[name].vig >= 0]
    assert pq.read_table(folder / "chosen.rows.parquet").to_pydict() == {"row": kept, "id": [names[row] for row in kept]}
    for record in chosen:  # what LLaVA's trainer reads
        assert (folder / record["image"]).is_file() and [turn["from"] for turn in record["conversations"]] == ["human", "gpt"]
    refused(run("select", "--scores", output, *inputs, "--by", "entropy", "--output", folder / "x.json"), "--measures entropy")
    mask = chosen[0]["token_mask"]
    chosen[0]["token_mask"] = [not mask[0], *mask[1:]]  # the record itself is unchanged
    (folder / "chosen.json").write_text(json.dumps(chosen))
    with pytest.raises(DamagedError, match=r"chosen\.json is damaged.*chosen\.card\.json has another digest; select the records again"):
        read_records(folder / "chosen.json")


def test_a_share_of_each_cluster_of_questions(folder: Path) -> None:
    raws = json.loads((folder / "records.json").read_text())
    many = [
        {**raw, "id": f"{raw['id']}{place}", "conversations": [{"from": "human", "value": f"<image>\n{question}"}, raw["conversations"][1]]}
        for raw in raws
        for place, question in enumerate(("Colour?", "How many are there now?"))
    ]
    (folder / "many.json").write_text(json.dumps(many))
    scores = load_scores(score(folder, "blur", "many.json"))
    inputs = ("--scores", folder / "scores-blur-many.json", "--records", folder / "many.json", "--output", folder / "out.json")
    result = run("select", *inputs, "--clusters", "2", "--keep", "0.3")
    assert result.exit_code == 0, result.output
    best = {max((s for s in scores if s.id.endswith(place)), key=lambda s: s.vig).id for place in "01"}
    assert {record["id"] for record in json.loads((folder / "out.json").read_text())} == best
    assert set(json.loads((folder / "out.card.json").read_text())["counts"]["sources"]) == {"cluster 0", "cluster 1"}
    refused(run("select", *inputs, "--clusters", "3"), "3 clusters need as many different instructions", "have 2")


def _report(folder: Path, scores: Path, *inputs: str | Path) -> str:
    result = run("report", scores, *inputs, "--images", folder, "-o", folder / "x.html")
    assert result.exit_code == 0, result.output
    return (folder / "x.html").read_text()


def test_calibration_can_be_turned_off(folder: Path) -> None:
    inputs = ("--model", folder / "model", "--records", folder / "records.json", "--images", folder, "--output", folder / "off")
    result = run("score", *inputs, "--no-calibrate")
    assert result.exit_code == 0 and "swapped" not in result.output
    assert load_scores(folder / "off").manifest["calibration"] == {}
