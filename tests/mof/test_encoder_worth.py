"""The worth of encoders: replacements against logits computed by hand, rates against counts, an encoder that is useless on purpose."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from support.commands import mof
from support.tiny import build_llm, build_model
from torch import Tensor
from transformers import AutoModelForCausalLM, MambaConfig, PreTrainedTokenizerFast

import vig
from encoders.images.reading import blur
from encoders.whole_files import read_sealed_lines
from mof import ConcatMoF, MoFForConditionalGeneration, MoFProcessor
from mof.cli.encoder_worth import worth_tables
from mof.evals.answerers import LocalModel
from mof.evals.answering import Answer, Prompt
from mof.evals.captions import eval_captions, read_captions
from mof.evals.encoder_worth import EncoderWorth, Replacement, WithoutEncoder, Worth, _compared, encoder_worth
from mof.evals.intervals import Difference, Tally
from mof.evals.mmvp import eval_mmvp, read_mmvp
from mof.evals.other_pictures import OtherPictures
from mof.evals.outcomes import read_outcome
from mof.evals.pope import PopeQuestion, eval_pope
from mof.evals.run import Run
from mof.evals.text_tables import TextTable
from mof.miniature.benchmarks import write_benchmarks

OPTIONS = ("(a)", "(b) or longer")


@pytest.fixture
def images(tmp_path: Path) -> list[str]:
    rng = np.random.default_rng(0)
    (tmp_path / "photos").mkdir()
    files = [tmp_path / "photos" / f"{i}.png" for i in range(6)]
    for file in files:
        Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(file)
    return [str(file) for file in files]


@pytest.fixture
def local(tiny_model: MoFForConditionalGeneration, tiny_processor: MoFProcessor) -> LocalModel:
    return LocalModel(tiny_model, tiny_processor, "tiny", batch_size=3, max_new_tokens=4)


def pixels_of(local: LocalModel, file: str) -> Tensor:
    return local.processor.image_processor(Image.open(file), return_tensors="pt")["pixel_values"]


def likelihoods_by_hand(local: LocalModel, file: str, replacement: Replacement, mean: Tensor) -> list[float]:
    """Each option's log-likelihood, one record at a time and without padding, with encoder b's tokens replaced or left out."""
    model = local.model
    mixer = model.mixer
    features = mixer.encode(pixels_of(local, file))
    if replacement != "mask":
        features["b"] = mean[None] if replacement == "mean" else torch.zeros_like(features["b"])
    tokens = torch.stack([mixer.adapters[name](features[name]) for name in ("a", "b")], dim=2).flatten(1, 2)  # [1, T, D]
    likelihoods = []
    for option in OPTIONS:
        question = [{"type": "image", "image": Image.open(file)}, {"type": "text", "text": "Which?"}]
        chat = [{"role": "user", "content": question}, {"role": "assistant", "content": [{"type": "text", "text": option}]}]
        encode = {"tokenize": True, "return_dict": True, "return_tensors": "pt"}
        prompt = local.processor.apply_chat_template([chat[:1]], add_generation_prompt=True, **encode)["input_ids"][0]
        ids = local.processor.apply_chat_template([chat], continue_final_message=True, **encode)["input_ids"][0]  # [L]
        places = (ids == model.config.image_token_id).nonzero().flatten()  # [T]
        embeds = model.get_input_embeddings()(ids).clone()  # [L, D]
        embeds[places] = tokens[0]
        kept = torch.ones(len(ids), dtype=torch.bool)
        if replacement == "mask":
            kept[places[1::2]] = False
        logits = model.language_model(inputs_embeds=embeds[kept][None]).logits[0].log_softmax(-1)  # [L, V]
        count = len(ids) - len(prompt)
        likelihoods.append(float(logits[-count - 1 : -1].gather(1, ids[-count:, None]).sum()))
    return likelihoods


@pytest.mark.parametrize("replacement", ["mean", "zero", "mask"])
@torch.no_grad()
def test_replaced_tokens_give_the_likelihoods_computed_by_hand(replacement: Replacement, local: LocalModel, images: list[str]) -> None:
    mean = torch.stack([local.model.mixer.encode(pixels_of(local, file))["b"][0] for file in images]).mean(0)
    prompts = [Prompt.about(file, file, "Which?", OPTIONS) for file in images]
    before = [answer for _, answer in local.answer(prompts)]
    without = WithoutEncoder(local, "b", replacement, images)
    answers = dict(without.answer(prompts))
    for i, file in enumerate(images):
        assert answers[i].log_likelihoods == pytest.approx(likelihoods_by_hand(local, file, replacement, mean), abs=1e-4)
    assert [answer for _, answer in local.answer(prompts)] == before  # nothing is left behind
    assert without.settings != local.settings


def test_other_pictures(local: LocalModel, images: list[str]) -> None:
    prompts = [Prompt.about(file, file, "Which?", OPTIONS) for file in images]
    swapped = dict(OtherPictures(local, "swapped", images).answer(prompts[:4]))
    plain = dict(local.answer([Prompt.about(file, file, "Which?", OPTIONS) for file in images[3:] + images[:1]]))
    for i in range(4):
        assert swapped[i].log_likelihoods == pytest.approx(plain[i].log_likelihoods, abs=1e-4)
    blurred = dict(OtherPictures(local, "blurred", images).answer(prompts))
    own = dict(local.answer([Prompt.about(file, blur(Image.open(file)), "Which?", OPTIONS) for file in images]))
    assert blurred == own
    with pytest.raises(ValueError, match="1"):
        OtherPictures(local, "swapped", images[:1])


def test_blurred_images_are_in_memory_piece_by_piece(images: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mof.evals.other_pictures.PIECE", 2)
    sizes = []

    class Counting:
        name, settings = "counting", {}

        def answer(self, prompts: Sequence[Prompt]) -> Iterator[tuple[int, Answer]]:
            sizes.append(len(prompts))
            yield from ((i, Answer(prompt.id)) for i, prompt in reversed(list(enumerate(prompts))))

    prompts = [Prompt.about(file, file, "?") for file in images[:5]]
    answers = dict(OtherPictures(Counting(), "blurred", images).answer(prompts))
    assert sizes == [2, 2, 1] and [answers[i].text for i in range(5)] == images[:5]


class Reader(LocalModel):
    """Says yes where the first channel of encoder a's tokens is above the median over the images."""

    threshold = 0.0

    def reading(self, image: object) -> float:
        features = self.model.mixer.encode(pixels_of(self, image) if isinstance(image, str) else self._pixels(image))
        return float(self.model.mixer.fuse(features)[:, 0::2, 0].mean())

    def _pixels(self, image: object) -> Tensor:
        return self.processor.image_processor(image, return_tensors="pt")["pixel_values"]

    @torch.no_grad()
    def answer(self, prompts: Sequence[Prompt]) -> Iterator[tuple[int, Answer]]:
        yield from enumerate(Answer("Yes" if self.reading(prompt.images[0]) > self.threshold else "No") for prompt in prompts)


def test_an_encoder_that_is_not_read_is_worth_nothing(
    tiny_model: MoFForConditionalGeneration, tiny_processor: MoFProcessor, images: list[str], tmp_path: Path
) -> None:
    reader = Reader(tiny_model, tiny_processor, "reader")
    with torch.no_grad():
        readings = {file: reader.reading(file) for file in images}
    reader.threshold = float(np.median(list(readings.values())))
    questions = [PopeQuestion(f"random/{i}", "random", file, "Is it?", readings[file] > reader.threshold) for i, file in enumerate(images)]
    # A wrong label: the whole model is right in 5 of 6.
    questions[0] = PopeQuestion("random/0", "random", images[0], "Is it?", not questions[0].present)

    def measured(run):
        return eval_pope(run, questions, tmp_path / "photos")

    result = encoder_worth(reader, measured, images, tmp_path / "worth")
    assert result.measure == "POPE accuracy, %" and result.score == pytest.approx(5 / 6)
    useless, useful = result.encoders["b"], result.encoders["a"]
    assert (useless.score, useless.loss.value, useless.rate) == (result.score, 0, 0) and useless.rate_interval == (0, 0)
    # Without encoder a, all images get the same answer.
    answers = read_sealed_lines(tmp_path / "worth" / "without-a" / "answers.jsonl")
    assert len({row["yes"] for row in answers}) == 1
    right = np.mean([row["yes"] == question.present for row, question in zip(answers, questions, strict=True)])
    assert useful.score == pytest.approx(right) and useful.loss.value == pytest.approx(5 / 6 - right)
    assert useful.rate == pytest.approx((5 / 6 - right) / (5 / 6))
    assert result.information_gap == pytest.approx(useful.rate)
    swapped = [readings[images[(i + 3) % 6]] > reader.threshold for i in range(6)]
    right = np.mean([yes == question.present for yes, question in zip(swapped, questions, strict=True)])
    assert result.pictures["swapped"].score == pytest.approx(right)
    reader.answer = lambda prompts: iter([pytest.fail("asked again") for _ in prompts])  # the answers of the first run are kept
    assert encoder_worth(reader, measured, images, tmp_path / "worth") == result


def test_each_pattern_has_its_rates_and_intervals(
    tiny_model: MoFForConditionalGeneration, tiny_processor: MoFProcessor, tmp_path: Path
) -> None:
    write_benchmarks(tmp_path / "data", pairs=3, scenes=1)
    questions = [question for question in read_mmvp(tmp_path / "data" / "MMVP") if question.pattern in ("Color", "Text")]
    missed = {"Color": 1, "Text": 0}  # pairs that the whole model gets wrong

    class Knowing(LocalModel):
        """Answers all questions but the first pairs of a pattern, and knows nothing of texts without encoder b."""

        def answer(self, prompts: Sequence[Prompt]) -> Iterator[tuple[int, Answer]]:
            features = self.model.mixer.fuse({"a": torch.zeros(1, 16, 16), "b": torch.ones(1, 16, 24)})
            sighted = features[0, 1, 0] != self.model.mixer.adapters["b"](torch.zeros(24))[0]
            for place, prompt in enumerate(prompts):
                question = next(question for question in questions if str(question.id) == prompt.id)
                pair = [q for q in questions if q.pattern == question.pattern].index(question) // 2
                knows = pair >= missed[question.pattern] and (sighted or question.pattern != "Text")
                letter = question.labels["released"]
                yield place, Answer(f"({letter})" if knows else f"({'ab'.replace(letter, '')})")

    local = Knowing(tiny_model, tiny_processor, "knowing")
    images = [str(question.image) for question in questions]
    with torch.no_grad():
        result = encoder_worth(local, lambda run: eval_mmvp(run, questions), images, tmp_path / "worth", replacement="zero")
    assert result.parts == {"Color": pytest.approx(2 / 3), "Text": 1} and result.scale == 100
    parts = result.encoders["b"].parts
    assert (parts["Text"].score, parts["Text"].loss.value, parts["Text"].rate, parts["Text"].rate_interval) == (0, 1, 1, (1, 1))
    assert (parts["Color"].loss.value, parts["Color"].loss.interval, parts["Color"].rate) == (0, (0, 0), 0)
    assert result.encoders["b"].rate == pytest.approx(3 / 5) and result.encoders["a"].rate == 0
    low, high = result.encoders["b"].loss.interval
    assert low < 0.5 < high  # the loss is 3 of 6 pairs


def test_vig_of_captions_is_that_of_the_scorer(local: LocalModel, images: list[str], tmp_path: Path) -> None:
    records = [
        {
            "id": str(i),
            "image": Path(file).name,
            "conversations": [{"from": "human", "value": f"<image>\n{'What? ' * (i + 1)}"}, {"from": "gpt", "value": f"It is {i}."}],
        }
        for i, file in enumerate(images)
    ]
    records.append({"id": "text", "conversations": [{"from": "human", "value": "?"}, {"from": "gpt", "value": "!"}]})
    captions = read_captions(records, tmp_path / "photos")
    assert [caption.prompt.id for caption in captions] == [str(i) for i in range(6)]
    result = eval_captions(Run(tmp_path / "vig", local), captions)
    own = {row["id"]: row["null_loss"] - row["loss"] for row in read_sealed_lines(tmp_path / "vig" / "answers.jsonl")}
    for score in vig.score(local.model, local.processor, records, image_folder=tmp_path / "photos"):
        of_text = np.delete(score.token_vig, score.turn_ends)
        assert own[score.id] == pytest.approx(float(of_text.mean()), abs=2e-5) and abs(own[score.id]) > 1e-4
    assert result["vig"] == pytest.approx(np.mean(list(own.values())))
    with pytest.raises(ValueError, match="none of the 1 records"):
        read_captions(records[-1:], tmp_path / "photos")


@pytest.mark.slow
def test_a_useless_encoder_is_worth_nothing_on_every_benchmark(
    tiny_model: MoFForConditionalGeneration, tiny_processor: MoFProcessor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Encoder b has random weights that its adapter ignores. Without it, nothing changes."""
    monkeypatch.setenv("COLUMNS", "200")
    with torch.no_grad():
        tiny_model.mixer.adapters["b"][0].weight.zero_()
    tiny_model.save_pretrained(tmp_path / "model")
    tiny_processor.save_pretrained(tmp_path / "model")
    data = tmp_path / "data"
    write_benchmarks(data, pairs=1, scenes=3)
    files = [file.name for file in sorted((data / "images").iterdir())]
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A ball."}]
    (tmp_path / "records.json").write_text(json.dumps([{"id": name, "image": name, "conversations": turns} for name in files]))
    chair = ["--instances", data / "CHAIR" / "instances.json", "--captions", data / "CHAIR" / "captions.json"]
    benchmarks = {
        "MMVP right pairs": ["--mmvp", data / "MMVP"],
        "POPE accuracy": ["--pope", data / "POPE", "--images", data / "images"],
        "CHAIR CHAIR s": [*chair, "--synonyms", data / "CHAIR" / "synonyms.txt", "--images", data / "images", "--count", "2"],
        "Captions VIG, nats": ["--records", tmp_path / "records.json", "--images", data / "images"],
    }
    for number, (title, options) in enumerate(benchmarks.items()):
        command = ["eval", "encoders", "--model", tmp_path / "model", "-o", tmp_path / str(number), "--max-new-tokens", "2", *options]
        result = mof(*command)
        assert result.exit_code == 0, result.output
        assert title in result.output
        useless = [line.split() for line in result.output.splitlines() if line.strip().startswith("without b")]
        assert len(useless) == 1 + {"MMVP right pairs": 9, "POPE accuracy": 3}.get(title, 0)
        assert all(float(line[3]) == 0 and set(line[4]) <= set("[0.,-]") for line in useless), useless
    whole, blind = (read_outcome(tmp_path / "3" / name).figures["caption vig"].value for name in ("all", "blurred"))
    assert blind == 0 != whole


def test_what_cannot_be_taken_away_is_refused(
    local: LocalModel, images: list[str], tiny_model: MoFForConditionalGeneration, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="'c'.*a or b"):
        WithoutEncoder(local, "c", "zero", images)
    with pytest.raises(ValueError, match="got none"):
        WithoutEncoder(local, "a", "mean", [])
    with pytest.raises(ValueError, match="'drop'"):
        encoder_worth(local, lambda run: {}, images, tmp_path, replacement="drop")
    tiny_model.mixer = ConcatMoF(dict(tiny_model.mixer.encoders), 32)
    with pytest.raises(ValueError, match="'concat'"):
        WithoutEncoder(local, "a", "mask", images)
    local.model = build_llm(local.processor.tokenizer)
    with pytest.raises(ValueError, match="LlamaForCausalLM"):
        WithoutEncoder(local, "a", "zero", images)


def test_a_state_that_masked_tokens_change_is_not_masked(tiny_tokenizer: PreTrainedTokenizerFast, images: list[str]) -> None:
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "state_size": 4, "time_step_rank": 2}
    llm = AutoModelForCausalLM.from_config(MambaConfig(vocab_size=len(tiny_tokenizer), **sizes))
    model = build_model(tiny_tokenizer, llm)
    local = LocalModel(model, MoFProcessor.from_parts(model, tiny_tokenizer), "mamba", max_new_tokens=2)
    with pytest.raises(ValueError, match=r"MambaForCausalLM.*'a'.*mean or zero"):
        WithoutEncoder(local, "a", "mask", images)
    prompts = [Prompt.about(file, file, "Which?", OPTIONS) for file in images[:2]]
    assert all(answer.error is None for _, answer in WithoutEncoder(local, "a", "zero", images).answer(prompts))


def records_about(images: list[str]) -> list[dict[str, Any]]:
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A ball."}]
    return [{"id": f"r{i}", "image": Path(file).name, "conversations": turns} for i, file in enumerate(images)]


def test_a_damaged_image_costs_its_own_prompts_only(local: LocalModel, images: list[str], tmp_path: Path) -> None:
    """Nor is it shown in place of another image, which would cost that image's prompts."""
    Path(images[1]).write_bytes(Path(images[1]).read_bytes()[:900])
    captions = read_captions(records_about(images), tmp_path / "photos")
    result = encoder_worth(local, lambda run: eval_captions(run, captions), images, tmp_path / "worth")
    for name in ("all", "without-a", "without-b", "blurred", "swapped"):
        rows = read_sealed_lines(tmp_path / "worth" / name / "answers.jsonl")
        assert [row["id"] for row in rows if row["error"]] == ["r1"], name
    readable = images[:1] + images[2:]
    mean = torch.stack([local.model.mixer.encode(pixels_of(local, file))["b"][0] for file in readable]).double().mean(0)
    torch.testing.assert_close(WithoutEncoder(local, "b", "mean", images)._mean, mean)
    swapped = [OtherPictures(local, "swapped", images)._shown(file) for file in images]
    assert swapped == [images[3], images[1], images[5], images[0], images[2], images[2]]
    few = [images[0], images[2], images[1], images[1] + ".missing"]
    assert OtherPictures(local, "swapped", few)._shown(images[0]) == images[2]  # not the image itself
    missing = WithoutEncoder(local, "b", "mean", [*readable, few[3]])
    assert missing.settings == WithoutEncoder(local, "b", "mean", readable).settings
    questions = [PopeQuestion(f"random/{i}", "random", file, "Is it?", True) for i, file in enumerate(images)]
    by_pope = encoder_worth(local, lambda run: eval_pope(run, questions, tmp_path / "photos"), images, tmp_path / "pope")
    assert set(result.encoders) == set(by_pope.encoders) == {"a", "b"}
    for file in images:
        Path(file).write_bytes(b"no image")
    with pytest.raises(ValueError, match="6 that cannot be read"):
        WithoutEncoder(local, "b", "mean", images)


def test_captions_that_are_all_refused_are_no_mean_of_nothing(local: LocalModel, images: list[str], tmp_path: Path) -> None:
    captions = read_captions(records_about(images[:2]), tmp_path / "photos")

    class Picky:
        """Refuses the first caption with its image, and the second with the blurred image."""

        name, settings = "picky", {}

        def answer(self, prompts: Sequence[Prompt]) -> Iterator[tuple[int, Answer]]:
            for place, prompt in enumerate(prompts):
                blurred = not isinstance(prompt.images[0], str)
                refused = blurred == (prompt.id == "r1")
                yield place, Answer("", error="too picky") if refused else Answer("", (-1.0,), option_tokens=(2,))

    with pytest.raises(ValueError, match=r"none of the 2 captions.*r0.*too picky"):
        eval_captions(Run(tmp_path / "vig", Picky()), captions)


def test_a_prompt_that_one_run_refused_counts_in_neither() -> None:
    whole = Tally.of(("x", "y", "z"), (1, 0, 1), 1)
    other = Tally.of(("x", "z"), (0, 1), 1)
    worth = _compared(whole, other, lower=False)
    assert (worth.score, worth.loss.value, worth.rate) == (0.5, 0.5, 0.5)
    assert whole.among(("z", "y", "x")) is whole


def test_nothing_is_a_share_of_a_score_that_is_not_above_zero() -> None:
    units = tuple("abcd")
    worth = _compared(Tally.of(units, (-0.2, -0.1, 0.1, 0.0), 1), Tally.of(units, (-0.4, -0.2, 0.1, 0.1), 1), lower=False)
    assert worth.loss.value == pytest.approx(0.05)  # the model is worse without
    assert np.isnan(worth.rate) and np.isnan(worth.rate_interval).all()
    lost = _compared(Tally.of(units, (2, 1, 3, 2), 1), Tally.of(units, (4, 2, 6, 4), 1), lower=True)
    assert (lost.loss.value, lost.rate, lost.rate_interval) == (2, 1, (1, 1))


def test_the_command(images: list[str], tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    lines = [f'{{"question_id": {i}, "image": "{i}.png", "text": "Is it?", "label": "yes"}}\n' for i in range(6)]
    (tmp_path / "coco_pope_random.json").write_text("".join(lines))
    common = ["eval", "encoders", "--model", str(tmp_path / "model"), "-o", str(tmp_path / "out"), "--max-new-tokens", "3"]
    result = mof(*common, "--pope", tmp_path, "--images", tmp_path / "photos", "--name", "tiny")
    assert result.exit_code == 0, result.output
    for line in ("without a", "without b", "blurred images", "swapped images", "information gap: 0.00"):
        assert line in result.output
    assert sorted(folder.name for folder in (tmp_path / "out").iterdir()) == ["all", "blurred", "swapped", "without-a", "without-b"]
    refused = mof(*common, "--pope", tmp_path)
    assert refused.exit_code != 0 and "--images" in refused.output + str(refused.exception)


def test_a_score_of_nothing_has_no_rates_and_no_gap() -> None:
    nothing = Worth(0.0, Difference(0.0, (0.0, 0.0)), float("nan"), (float("nan"), float("nan")))
    table, gap = worth_tables(EncoderWorth("pairs, %", 100, 0.0, {"a": nothing, "b": nothing}, {}, {}), "tiny")
    assert isinstance(table, TextTable) and table.rows["without a"] == ["0.0", "0.0", "[0.0,0.0]", "-", "-"]
    assert gap == "information gap: none, as there are no utilisation rates for a score that is not above 0"
    known = Worth(0.0, Difference(0.0, (0.0, 0.0)), 0.5, (0.5, 0.5))
    assert np.isnan(EncoderWorth("pairs, %", 100, 0.0, {"a": known, "b": nothing}, {}, {}).information_gap)
