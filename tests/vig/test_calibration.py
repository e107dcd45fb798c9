"""The calibration of a scoring run: right against swapped images, without labels."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.stats import mannwhitneyu
from support.tiny_llava import build_records

from encoders import build_encoder
from mof import InterleavedMoF, MoFForConditionalGeneration, MoFProcessor
from mof.data.records import to_record
from mof.data.rows import read_records
from mof.language_models import load_language_model
from mof.miniature import write_dataset
from vig import load_scores, score
from vig.scoring import run
from vig.scoring.calibration import Sample, calibration, diagnosis, verdict, with_swapped_images
from vig.selection.measures import measure_named


def test_sample_is_one_per_cent_of_the_records_with_images() -> None:
    for count, expected in ((20, 20), (3_000, 100), (20_000, 200), (150_000, 1_000)):
        sample, again = Sample(), Sample()
        for index in range(count):
            sample.add(str(index), {"image": "a.png"})
            again.add(str(index), {"image": "a.png"})
        assert len(sample.records) == expected and sample.digest == again.digest
    sample.add("text", {})
    assert len(sample.records) == 1_000


def test_swapped_records_keep_their_words_and_get_other_images(image_folder, monkeypatch) -> None:
    monkeypatch.chdir(image_folder.parent)
    image_folder = Path(image_folder.name)  # images are named relative to a folder that is itself relative
    raws = [raw | {"image": f"{place // 2}.png"} for place, raw in enumerate(build_records(image_folder))]  # neighbours share images
    swapped = with_swapped_images([*raws, {"id": "broken"}], image_folder)
    assert [row["id"] for row in swapped] == [raw["id"] for raw in raws]
    for raw, row in zip(raws, swapped, strict=True):
        own, other = to_record(raw, image_folder), to_record(row, image_folder)
        assert other.messages == own.messages and len(other.images) == 1 and other.images != own.images
    assert with_swapped_images(raws[:2], image_folder) == []  # both are on one image


def test_auroc_is_that_of_records_scored_with_other_images(llava, records, image_folder, tmp_path, monkeypatch) -> None:
    scores = score(*llava, records, tmp_path, image_folder=image_folder, calibrate=True)
    swapped = [raw | {"image": records[(place + 1) % 5]["image"]} for place, raw in enumerate(records)]
    other = score(*llava, swapped, image_folder=image_folder)
    found = scores.manifest["calibration"]
    assert found["records"] == 5
    assert found["auroc"] == pytest.approx(mannwhitneyu(scores.vig, other.vig).statistic / 25)
    assert found == load_scores(tmp_path).manifest["calibration"]
    assert all(f"\n  {line}" in repr(scores) for line in diagnosis(found).splitlines()) and "swapped" not in repr(other)
    monkeypatch.setattr(run, "with_swapped_images", lambda *_: pytest.fail("it is calibrated already"))
    assert score(*llava, records, tmp_path, image_folder=image_folder, calibrate=True).manifest["calibration"] == found
    assert score(*llava, records, image_folder=image_folder).manifest["calibration"] == {}


def test_auroc_of_the_rise_of_probability_needs_the_losses(llava, records, image_folder) -> None:
    scores = score(*llava, records, image_folder=image_folder, calibrate=True, measures=["loss"])
    swapped = [raw | {"image": records[(place + 1) % 5]["image"]} for place, raw in enumerate(records)]
    other = score(*llava, swapped, image_folder=image_folder, measures=["loss"])
    gains = [measure_named("gain", side).of(side)[1] for side in (scores, other)]
    found = scores.manifest["calibration"]
    assert found["gain"] == pytest.approx(mannwhitneyu(*gains).statistic / 25)
    assert f", {found['gain']:.2f} by `gain` of right" in diagnosis(found)


def made(vig: list[float], word: str) -> list:
    from vig import Score

    ids, none = np.zeros(1, np.int64), np.empty(0, np.int64)
    ends = np.array([len(word)])
    return [Score(str(i), v, 1.0, 1.0 + v, np.array([v], np.float32), ids, none, "", word, ids, ends) for i, v in enumerate(vig)]


def test_diagnosis_names_what_the_model_reads() -> None:
    numbers = made([0, 1, 0, 1, 0, 1] * 5, "two")
    right = made([1, 2, 3, 4, 5, 6, 7, 8], "red") + numbers + made([0.0], "left")
    swapped = made([-1, 0, -1, 0, -1, 0, 0, 0], "red") + numbers + made([0.0], "left")
    found = calibration(right, swapped)
    assert found["classes"]["colour"] == {"auroc": 1.0, "words": 8, "reads": True}
    assert found["classes"]["number"] == {"auroc": 0.5, "words": 30, "reads": False}
    said = diagnosis(found)
    assert "it reads: colour 1.00; does not read, or the question tells: number 0.50; uncertain: spatial" in said
    assert "miniature study" in said
    assert "uncertain use: 14 records are too few" in diagnosis({**found, "records": 14})
    assert "to gain nothing or to hurt" in diagnosis({**found, "auroc": 0.55})
    earlier = {key: value for key, value in found.items() if not key.startswith("alike") and key != "error"}  # of an earlier version
    assert "of uncertain use; --floor" in diagnosis({**earlier, "auroc": 0.7})
    assert diagnosis({}) == verdict({}) == ""


def test_a_scorer_is_judged_by_its_records_where_no_word_is_in_a_list() -> None:
    """Answers in other languages, and bare letters of options, hold no word of the English classes."""
    rng = np.random.default_rng(0)
    found = calibration(made(rng.normal(0.7, 1, 200).tolist(), "rot"), made(rng.normal(0, 1, 200).tolist(), "rot"))
    assert "hold no word of the (English) word classes" in diagnosis(found) and "expected to help" in diagnosis(found)
    blind = calibration(made(rng.normal(0, 1, 40).tolist(), "rot"), made(rng.normal(0, 1, 40).tolist(), "rot"))
    assert "to gain nothing or to hurt: align the model longer and score again (the" in verdict(blind)
    weak = calibration(made(rng.normal(0.3, 1, 400).tolist(), "rot"), made(rng.normal(0, 1, 400).tolist(), "rot"))
    assert "unless the answers of most records are wrong" in verdict(weak)  # both lower AUROC


def test_the_error_of_auroc_is_the_standard_deviation_over_samples() -> None:
    rng = np.random.default_rng(0)
    sides = [[made(rng.normal(shift, 1, 80).tolist(), "rot") for _ in range(60)] for shift in (0.6, 0)]
    found = [calibration(right, swapped) for right, swapped in zip(*sides, strict=True)]
    assert found[0]["error"] == pytest.approx(np.std([row["auroc"] for row in found]), rel=0.2)


@pytest.mark.parametrize(
    ("share", "said"),
    [
        (0.0, "expected to hurt with --keep: only"),
        (0.22, "of uncertain use with --keep: about"),  # the interval holds the limit, 25 %
        (0.4, "expected to help"),
        (1.0, "expected to gain nothing or to hurt"),
    ],
)
def test_diagnosis_estimates_the_share_of_records_that_no_image_supports(share, said) -> None:
    """Records whose answers no image supports have the distribution of swapped records."""
    rng = np.random.default_rng(0)
    every = np.where(np.arange(4000) < 4000 * share, rng.normal(0, 1, 4000), rng.normal(3, 1, 4000))
    right, swapped = rng.choice(every, 100), rng.normal(0, 1, 100)
    found = calibration(made(right.tolist(), "red"), made(swapped.tolist(), "red"), every)
    low, high = found["alike_interval"]
    assert low - 0.01 <= share <= high + 0.01 and low <= found["alike"] <= high and high - low < 0.25
    assert said in diagnosis(found)
    assert share == 1 or f"{found['alike']:.0%} ({low:.0%} to {high:.0%}) of the records look as if" in diagnosis(found)


def test_records_with_equal_vig_look_as_if_their_image_was_swapped() -> None:
    assert calibration(made([0.0] * 40, "red"), made([0.0] * 40, "red"))["alike"] == 1
    some = made([0.0] * 10 + [1.0] * 30, "red")  # a quarter is like the swapped records, of which most are equal
    assert calibration(some, made([-1.0] * 4 + [0.0] * 36, "red"))["alike"] == pytest.approx(0.25, abs=0.03)
    assert calibration([], [])["alike"] is None


@pytest.mark.slow
def test_a_model_without_stage_1_is_said_to_be_unfit(tmp_path) -> None:
    """mini-lm reads soft tokens, but its adapter is random."""
    torch.manual_seed(0)
    llm, tokenizer = load_language_model("mini-lm")
    mixer = InterleavedMoF({"dino": build_encoder("mini-dino")}, llm.config.hidden_size)
    model = MoFForConditionalGeneration.from_parts(mixer, llm, tokenizer)
    write_dataset(tmp_path, align=0, finetune=40, pairs=0)
    records = list(read_records(tmp_path / "finetune.json"))
    scores = score(model, MoFProcessor.from_parts(model, tokenizer), records, image_folder=tmp_path / "images", calibrate=True)
    found = scores.manifest["calibration"]
    assert abs(found["auroc"] - 0.5) < 0.15 and sum(row["reads"] for row in found["classes"].values()) <= 1  # by chance
    assert "to gain nothing or to hurt: align the model longer" in diagnosis(found)


def test_one_image_cannot_be_swapped(llava, tmp_path) -> None:
    Image.new("RGB", (28, 28), "red").save(tmp_path / "a.png")
    turns = [{"from": "human", "value": "<image>\nColour?"}, {"from": "gpt", "value": "Red."}]
    scores = score(*llava, [{"id": "a", "image": "a.png", "conversations": turns}], image_folder=tmp_path, calibrate=True)
    assert "fewer than two" in diagnosis(scores.manifest["calibration"])
