"""The study of swapped photos: which records are swapped and held out, and its tables."""

import json
from collections import Counter

import numpy as np
import pytest
import yaml
from PIL import Image

import swap_photos
from study.run_data import RunData


@pytest.fixture
def data():
    records = [{"id": f"{photo}-{i}", "images": [f"{photo:02}.jpg"]} for photo in range(20) for i in range(3)]
    return RunData([{"id": "a", "images": []}], [*records, {"id": "text", "images": []}], [], [], {})


@pytest.mark.parametrize("seed", [0, 1])
def test_a_share_of_the_records_gets_another_photo(data, seed):
    own = {record["id"]: record["images"] for record in data.finetune}
    swapped = swap_photos.with_swaps(data, seed)
    assert len(swapped.finetune) == 3 * 16 + 1 and len(swapped.held_out) == 3 * 4
    unseen = {record["images"][0] for record in swapped.held_out}
    assert unseen.isdisjoint(image for record in swapped.finetune for image in record["images"])
    other = {record["id"] for record in swapped.finetune if record["images"] != own[record["id"]]}
    assert len(other) == round(0.4 * 48)
    assert {id for id, true in swapped.truth.items() if true["noise"] == "swapped"} == other and "text" in swapped.truth
    shown = Counter(image for record in swapped.finetune for image in record["images"])
    assert set(shown.values()) == {3}  # photos are shifted, so each is as frequent as before
    assert {record["id"]: record["images"] for record in data.finetune} == own


def test_a_photo_in_more_than_half_of_the_drawn_records_cannot_be_swapped():
    records = [{"id": str(i), "images": [f"{min(i, 4):02}.jpg"]} for i in range(48)]
    with pytest.raises(ValueError, match=r"more than half .* 04\.jpg"):
        swap_photos.with_swaps(RunData([], records, [], [], {}), 0)


def test_a_seed_draws_other_records_in_another_order(data):
    first, again, other = (swap_photos.with_swaps(data, seed) for seed in (0, 0, 1))
    assert first == again and first.truth != other.truth
    assert [record["id"] for record in first.finetune] != [record["id"] for record in other.finetune]
    assert first.held_out == other.held_out


def test_differences_are_paired_over_seeds():
    rows = [
        {"selection": way, "noise": f"swapped-{seed}", "active_tokens": 10 * seed, "held_out": dict.fromkeys(keys, value + seed)}
        for keys in [swap_photos.MEASURES.values()]
        for seed in (1, 2)
        for way, value in (("vig", 0.5 * seed), ("random", 0.0))
    ]
    means, minus_random, minus_everything = swap_photos.tables(rows)
    assert means.rows["vig"][0] == "2.250" and means.rows["vig"][3:] == ["15", "2"]
    assert minus_random.rows.keys() == {"vig"} and minus_random.rows["vig"][0] == "+0.750 [-2.427, +3.927]"  # .75 +- 12.706 * .25
    assert not minus_everything.rows


@pytest.mark.slow
def test_the_study_end_to_end(tmp_path, monkeypatch, capsys):
    colours = ["red", "blue", "green", "white", "black"]
    records, rng = [], np.random.default_rng(0)
    for i in range(20):
        Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(tmp_path / f"{i}.png")
        turns = [{"from": "human", "value": "<image>\nSay."}, {"from": "gpt", "value": f"A {colours[i % 5]} dog {'runs' * (i % 3)}"}]
        records.append({"id": str(i), "image": f"{i}.png", "conversations": turns})
    for name, part in (("captions", records[:10]), ("mix", records[10:])):
        (tmp_path / f"{name}.json").write_text(json.dumps(part))
    stage = {"learning_rate": 1e-2, "batch_size": 2}
    setting = {
        "name": "tiny", "encoders": {"clip": {"name": "mini-clip"}}, "llm": "mini-lm", "align": stage, "finetune": {**stage, "lora": 2},
        "data": {"align": ["captions.json"], "finetune": ["mix.json"], "held_out": 0.5}, "workers": 0,
    }  # fmt: skip
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(setting))
    options = ["--config", tmp_path / "tiny.yaml", "--data-dir", tmp_path, "--output", tmp_path / "run", "--figures", tmp_path / "x.json"]
    monkeypatch.setattr("sys.argv", ["recipe", *map(str, options), "--seeds", "0", "--ways", "vig", "random", "grounded"])
    swap_photos.main()
    figures = json.loads((tmp_path / "x.json").read_text())
    vig, random, grounded = figures["rows"]
    assert vig["active_tokens"] == random["active_tokens"] > 0 and grounded["active_tokens"] > 0
    assert vig["held_out"]["loss_right_photo"] != random["held_out"]["loss_right_photo"]
    assert figures["auroc"]["swapped-0"].keys() == {"vig", "lowest loss", "highest null loss"}
    captions = figures["before"]["captions"]
    assert captions["at random"]["auroc"] and captions["own"]["auroc"] is None
    assert "minus random" in capsys.readouterr().out
