"""Further values of each answer token in a score file, and the published measures that are made of them."""

from __future__ import annotations

import copy
import math
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from support.tiny_llava import build_records

from encoders.images.reading import blur, read_image
from mof.data.answer_tokens import encode_record
from mof.data.records import to_record
from vig import Scores, load_scores, score, select
from vig.output_head import loss_logit_entropy

ALL = ("loss", "logit", "entropy")


def plain_values(model, processor, record, image):
    """Loss, logit and entropy of every answer token, each [T] in float64, from all logits of a plain forward pass."""
    example = encode_record(processor, record, images=None if image is None else [image])
    with torch.no_grad():
        logits = model(input_ids=example.input_ids[None], **example.images).logits[0].double()
    places = example.answer_mask.nonzero().flatten()
    rows, targets = logits[places - 1], example.input_ids[places]
    probabilities = rows.exp() / rows.exp().sum(1, keepdim=True)
    chosen = torch.arange(len(targets)), targets
    values = -probabilities[chosen].log(), rows[chosen], -(probabilities * probabilities.log()).sum(1)
    return dict(zip(ALL, (value.numpy() for value in values), strict=True))


@pytest.fixture(scope="module")
def both(llava, image_folder):
    """id -> values with the image and with the blurred image."""
    from support.tiny_llava import build_records

    values = {}
    for raw in build_records(image_folder):
        image = read_image(image_folder / raw["image"])
        record = to_record(raw, image_folder)
        values[raw["id"]] = tuple(plain_values(*llava, record, shown) for shown in (image, blur(image)))
    return values


def test_values_of_two_plain_forwards_are_saved(llava, records, image_folder, tmp_path, both) -> None:
    made = score(*llava, records, tmp_path / "scores", image_folder=image_folder, measures=ALL)
    for scores in (made, load_scores(tmp_path / "scores")):
        for s in scores:
            for name in ALL:
                for start, expected in zip(("token_", "null_token_"), both[s.id], strict=True):
                    np.testing.assert_allclose(getattr(s, start + name), expected[name], atol=2e-5)
        flat = np.concatenate([both[id][1]["entropy"] for id in scores.ids])
        np.testing.assert_allclose(scores.column("null_token_entropy"), flat, atol=2e-5)
    assert score(*llava, records, tmp_path / "scores", image_folder=image_folder, measures=ALL).vig.tolist() == made.vig.tolist()
    made.save(tmp_path / "copy")
    assert load_scores(tmp_path / "copy").table().equals(made.table())


def test_values_are_absent_unless_they_are_asked_for(llava, records, image_folder, tmp_path) -> None:
    plain = score(*llava, records, tmp_path / "plain", image_folder=image_folder)
    some = score(*llava, records, tmp_path / "some", image_folder=image_folder, measures=["entropy"])
    assert plain[0].token_loss is None and some[0].token_loss is None and len(some[0].token_entropy) == len(some[0].token_vig)
    np.testing.assert_allclose(some.token_vig, plain.token_vig, atol=1e-5)
    with pytest.raises(ValueError, match=r"'token_logit'; score again into a new folder with measures=\('logit',\)"):
        load_scores(tmp_path / "some").column("token_logit")
    with pytest.raises(ValueError, match="measures"):  # another run
        score(*llava, records, tmp_path / "plain", image_folder=image_folder, measures=["entropy"])
    with pytest.raises(ValueError, match="unknown measures entropie; expected some of loss, logit, entropy"):
        score(*llava, records, image_folder=image_folder, measures=["entropie"])


def test_masked_logits_have_an_entropy() -> None:
    logits = torch.tensor([[0.0, 0.0, -torch.inf]])
    torch.testing.assert_close(loss_logit_entropy(logits, torch.tensor([1])), torch.tensor([[np.log(2), 0.0, np.log(2)]]).float())


@pytest.fixture(scope="module")
def measured(llava, image_folder):
    return score(*llava, build_records(image_folder), image_folder=image_folder, measures=ALL)


def expected_tokens(by: str, clean: dict, null: dict) -> np.ndarray:
    """[T], a measure of the tokens of a record by its formula."""
    if by == "cal":
        weight = torch.from_numpy(clean["logit"] - null["logit"]).clamp(1, 5)
        return torch.nn.AvgPool1d(3, stride=1, padding=1)(weight[None])[0].numpy()
    if by == "entropy":
        return null["entropy"] - clean["entropy"]
    if by == "gain":
        return np.exp(-clean["loss"]) - np.exp(-null["loss"])
    log_ratio = (clean["loss"] - null["loss"]).clip(-20, 20)  # log p_null - log p
    return {"vig": -log_ratio, "vppo": np.exp(log_ratio) - log_ratio - 1}[by]


@pytest.mark.parametrize("by", ["vig", "cal", "entropy", "vppo", "gain"])
def test_token_measures_follow_their_formulas(measured, both, by) -> None:
    expected, slack = [expected_tokens(by, *both[id]) for id in measured.ids], 1e-7 if by == "gain" else 5e-5  # gains are small here
    selection = select(measured, 0.4, by=by, token_keep=0.5, keep_end_of_turn=False)
    np.testing.assert_allclose(selection.values, np.concatenate(expected), atol=slack)
    ranked = sorted(range(5), key=lambda i: -expected[i].mean())[:2]
    assert selection.sample_ids == [measured.ids[i] for i in sorted(ranked)]
    assert selection.threshold == pytest.approx(expected[ranked[1]].mean(), abs=slack)
    pool = np.sort(np.concatenate([expected[i] for i in ranked]))
    kept = pool[-math.ceil(len(pool) / 2)]
    assert all((selection.token_masks[measured.ids[i]] == (expected[i] > kept - 2 * slack)).all() for i in ranked)
    assert f"with {'VIG' if by == 'vig' else by} >=" in str(selection.summary())


def test_cal_as_token_weights(measured, both) -> None:
    weights = select(measured, 1, by="cal", token_threshold=None, keep_end_of_turn=False).weighted(1 / 3, 5).token_weights
    ends = np.zeros(len(measured.token_vig), bool)
    ends[measured.turn_ends] = True
    expected = np.concatenate([expected_tokens("cal", *both[id]) for id in measured.ids])
    np.testing.assert_allclose(np.concatenate(list(weights.values())), np.where(ends, 1, expected / expected[~ends].mean()), atol=5e-5)


def test_visnec_and_vic_choose_whole_records(llava, image_folder, measured, both) -> None:
    with pytest.raises(ValueError, match="visnec compares with null 'drop', these scores are of null 'blur'"):
        select(measured, by="visnec")
    dropped = score(*llava, build_records(image_folder), image_folder=image_folder, null="drop")
    assert select(dropped, 0.4, by="visnec").sample_ids == [id for id in dropped.ids if dropped[id].vig >= np.sort(dropped.vig)[-2]]
    expected = {}
    for s in measured:
        function = {"A", "on", "are", "of", "in", "a", "the", "And"}
        starts = [(m.start(), m.end()) for m in re.finditer(r"\w+", s.answer) if m.group() not in function]
        chosen = [any(a < end and b > start for start, end in starts) for a, b in zip(s.token_starts, s.token_ends, strict=True)]
        chosen = np.array(chosen) & ~np.isin(np.arange(len(chosen)), s.turn_ends)
        clean, null = both[s.id]
        expected[s.id] = math.exp((null["loss"] - clean["loss"])[chosen].mean())
    selection = select(measured, 0.4, by="vic")
    assert selection.sample_ids == [id for id in measured.ids if expected[id] >= sorted(expected.values())[-2]]
    assert selection.threshold == pytest.approx(sorted(expected.values())[-2], abs=1e-4)
    assert all(mask.all() for mask in selection.token_masks.values())
    with pytest.raises(ValueError, match=r"^vic\b"):
        select(measured, by="vic", token_keep=0.5)


def test_floor_drops_what_the_image_harmed(measured) -> None:
    selection = select(measured, 0.1, floor=True, keep_end_of_turn=False)
    assert selection.threshold == 0 and 0 < len(selection.sample_ids) < 5
    for s in measured:
        assert (s.id in selection.token_masks) == (s.vig >= 0)
        assert s.vig < 0 or (selection.token_masks[s.id] == (s.token_vig >= 0)).all()
    assert select(measured, floor=True, by="vic").threshold == 1
    with pytest.raises(ValueError, match=r"\bcal\b"):
        select(measured, floor=True, by="cal")


def test_loss_above_a_reference(llava, image_folder, measured) -> None:
    raws = build_records(image_folder)
    other = copy.deepcopy(llava[0])
    torch.nn.init.normal_(other.get_output_embeddings().weight, std=0.3, generator=torch.Generator().manual_seed(1))
    reference = score(other, llava[1], raws[::-1], image_folder=image_folder, measures=["loss"])
    selection = select(measured, 1, token_keep=0.6, keep_end_of_turn=False, reference=reference)
    excess = np.concatenate([s.token_loss - reference[s.id].token_loss for s in measured])
    kept = np.concatenate(list(selection.token_masks.values()))
    assert (kept == (excess >= np.sort(excess)[-math.ceil(0.6 * len(excess))])).all()
    others = [replace(s, token_ids=s.token_ids[::-1] if s.id == "r2" else s.token_ids) for s in reference]
    with pytest.raises(ValueError, match=r"'r2' has other answer tokens"):
        select(measured, reference=Scores(others, reference.manifest))
    others = [replace(s, token_ids=s.token_ids[1:], token_vig=s.token_vig[1:]) if s.id == "r3" else s for s in reference]
    with pytest.raises(ValueError, match=r"'r3' has other answer tokens"):
        select(measured, reference=Scores(others, reference.manifest))
    with pytest.raises(ValueError, match=r"no score of 1 records, the first is 'r4'"):
        select(measured, reference=score(*llava, raws[:4], image_folder=image_folder, measures=["loss"]))
    with pytest.raises(ValueError, match=r"measures=\('loss',\)"):
        select(score(*llava, raws, image_folder=image_folder), reference=reference)


def test_unknown_measure(measured) -> None:
    with pytest.raises(ValueError, match="unknown measure 'vigg'; expected one of vig, cal, visnec, vic, entropy, vppo"):
        select(measured, by="vigg")
