"""The paper's analyses, on the tiny random LLaVA of transformers' own classes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from transformers import LlavaForConditionalGeneration, LlavaProcessor

from mof.data.digests import record_id
from mof.data.records import images_of, to_record
from vig import score
from vig.analyses.comparison import attention_table, match_table, misleading_table
from vig.analyses.image_attention import image_attention
from vig.analyses.image_match import auroc, image_match, right_against_other_image, with_other_images
from vig.analyses.misleading_text import misleading_text, named_option

Llava = tuple[LlavaForConditionalGeneration, LlavaProcessor]


def caption(id: str, image: str, text: str) -> dict[str, Any]:
    turns = [{"from": "human", "value": "<image>\nSay."}, {"from": "gpt", "value": text}]
    return {"id": id, "image": image, "conversations": turns}


# --- images of other records
def test_other_images_by_hand() -> None:
    records = [
        caption("1", "a", "A red dog runs."),
        caption("2", "b", "The red dog and the cat sleep."),
        caption("3", "c", "A kite flies."),
        caption("4", "a", "Grass"),  # a second answer on the first image
        caption("5", "d", "It is on the grass."),
        {"id": "text", "conversations": records_without_image()},
        caption("two", "a", "dog") | {"image": ["a", "b"]},
    ]
    groups = with_other_images(records)
    images = {name: {record["id"]: images_of(record)[0] for record in group} for name, group in groups.items()}
    assert images["matching"] == {"1": "a", "2": "b", "4": "a", "5": "d"}  # no other image has a kite
    assert images["partly matching"]["1"] == "b" and images["conflicting"]["1"] in "cd"
    assert images["partly matching"]["2"] == "a" and images["conflicting"]["2"] in "cd"
    assert images["partly matching"]["4"] == "d" and images["conflicting"]["4"] in "bc"
    assert images["partly matching"]["5"] == "a" and images["conflicting"]["5"] in "bc"
    assert groups == with_other_images(records)
    assert groups["conflicting"][0]["conversations"] == records[0]["conversations"]


def records_without_image() -> list[dict[str, str]]:
    return [{"from": "human", "value": "Say."}, {"from": "gpt", "value": "red dog"}]


def test_the_seed_draws_the_images() -> None:
    records = [caption(str(i), f"{i}", f"word{i % 7} thing{i % 5}") for i in range(120)]
    drawn = [[images_of(record) for record in with_other_images(records, seed)["conflicting"]] for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]
    own = [images_of(record) for record in with_other_images(records)["matching"]]
    assert all(image != other for image, other in zip(own, drawn[0], strict=True))


def test_open_images_and_messages() -> None:
    pictures = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue", "green")]
    texts = ["A red dog", "red cat", "blue"]
    records = [
        {"messages": [
            {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "?"}]},
            {"role": "assistant", "content": [{"type": "text", "text": text}]},
        ], "images": [picture]}
        for text, picture in zip(texts, pictures, strict=True)
    ]  # fmt: skip
    groups = with_other_images(records)
    assert [images_of(record) for record in groups["partly matching"]] == [[pictures[1]], [pictures[0]]]
    ids = [[record["id"] for record in group] for group in groups.values()]
    assert ids[0] == ids[1] == ids[2] and len(set(ids[0])) == 2
    assert all(len(to_record(record).images) == 1 for group in groups.values() for record in group)


def test_records_of_tables_and_images_in_messages() -> None:
    """A table has all of its columns in every row, and messages may hold their images; both forms are read as `to_record` reads them."""
    texts = {"a": "A red dog", "b": "red cat", "c": "blue"}
    wide = [caption(name, name, text) | {"messages": None, "images": None} for name, text in texts.items()]
    user = {name: {"role": "user", "content": [{"type": "image", "image": name}, {"type": "text", "text": "?"}]} for name in texts}
    said = [[user[name], {"role": "assistant", "content": text}] for name, text in texts.items()]
    for records in (wide, said, [{"messages": messages, "conversations": None, "image": None} for messages in said]):
        groups = with_other_images([*records, {"id": "broken", "image": "a", "conversations": [{"from": "cat"}]}])
        assert [images_of(record) for record in groups["matching"]] == [["a"], ["b"]]
        assert [images_of(record) for record in groups["partly matching"]] == [["b"], ["a"]]
        assert [images_of(record) for record in groups["conflicting"]] == [["c"], ["c"]]
        assert [record["id"] for record in groups["matching"]] == list(map(record_id, records[:2]))


@pytest.mark.parametrize("records", [[], [caption("1", "a", "dog")], [caption("1", "a", "dog"), caption("2", "b", "cat")]])
def test_nothing_in_common_is_refused(records: list[dict[str, Any]]) -> None:
    with pytest.raises(ValueError, match=str(len(records))):
        with_other_images(records)


def test_image_match_is_the_mean_of_the_scores(llava: Llava, records: list[dict[str, Any]], image_folder: Path, tmp_path: Path) -> None:
    model, processor = llava
    swapped = [one | {"image": f"{(i + 1) % 5}.png"} for i, one in enumerate(records)]
    swapped[2] = records[2] | {"image": "missing.png"}  # then record 2 counts in neither group
    rows = image_match(model, processor, {"own": records, "other": swapped[::-1]}, tmp_path, image_folder=image_folder)
    vigs = {}
    for name, group in (("own", records), ("other", swapped)):
        vig = vigs[name] = [score(model, processor, [one], image_folder=image_folder)[0].vig for i, one in enumerate(group) if i != 2]
        assert rows[name].vig.mean == pytest.approx(np.mean(vig), abs=1e-5) and rows[name].vig.n == 4
        assert rows[name].vig.error == pytest.approx(np.std(vig, ddof=1) / 2, abs=1e-5)
        assert rows[name].positive == np.mean(np.array(vig) > 0)
        assert (tmp_path / name / "_manifest.json").is_file()
    assert match_table(rows, "m").row_count == 2
    higher = [own > other for own in vigs["own"] for other in vigs["other"]]
    assert rows["own"].auroc is None and rows["other"].auroc is not None and rows["other"].auroc.mean == np.mean(higher)


def test_the_error_of_auroc_is_the_spread_over_samples_of_records() -> None:
    rng = np.random.default_rng(0)

    def draw() -> np.ndarray:  # two values of each record that have much in common
        own = rng.normal(size=(1, 100))
        return np.round(np.concatenate([own + 0.3, own + rng.normal(scale=0.5, size=(1, 100))]), 1)  # with ties

    drawn = [auroc(*draw()) for _ in range(300)]
    assert np.mean([result.error for result in drawn]) == pytest.approx(np.std([result.mean for result in drawn]), rel=0.15)
    own, other = draw()
    by_hand = np.mean((own[:, None] > other) + 0.5 * (own[:, None] == other))
    assert auroc(own, other).mean == pytest.approx(by_hand)


def test_groups_of_other_records_are_refused(llava: Llava, records: list[dict[str, Any]], text_only: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="'own'.*'other'"):
        image_match(*llava, {"own": records, "other": records[1:]})
    with pytest.raises(ValueError, match="text-only"):
        image_match(*llava, {"own": [text_only], "other": [text_only]})


def test_right_against_other_image(llava: Llava, records: list[dict[str, Any]], image_folder: Path) -> None:
    found = right_against_other_image(*llava, records, image_folder=image_folder)
    scores = score(*llava, records, null="shuffle", image_folder=image_folder)
    vig = np.array([score.token_vig.mean() for score in scores])
    assert found["captions"] == len(records)
    assert (found["mean_vig"], found["std_vig"]) == pytest.approx((vig.mean(), vig.std()), abs=1e-5)
    assert found["share_positive"] == np.mean(vig > 0)
    assert found["loss_other_photo"] - found["loss_right_photo"] == pytest.approx(found["mean_vig"], abs=1e-5)
    assert found["vig_by_word_class"]


# --- attention
def test_attention_layer_by_layer(llava: Llava, records: list[dict[str, Any]], text_only: dict[str, Any], image_folder: Path) -> None:
    """Against the same sums, written as loops over a plain forward pass."""
    model, processor = llava
    model.set_attn_implementation("eager")
    sums, even, count = np.zeros(2), 0.0, 0
    for raw in records:
        record = to_record(raw, image_folder)
        images = [Image.open(image).convert("RGB") for image in record.images]
        text = processor.apply_chat_template(record.messages)
        inputs = processor(text=text, images=images, return_tensors="pt", add_special_tokens=False)
        ids = inputs["input_ids"][0].tolist()
        with torch.no_grad():
            attentions = model(**inputs, output_attentions=True).attentions
        is_answer, inside = [], False
        tokens = [processor.tokenizer.decode([id]) for id in ids]
        for i, token in enumerate(tokens):  # an answer is what stands between "ASSISTANT:" and </s>, this included
            inside = inside or "".join(tokens[:i]).endswith("ASSISTANT:")
            is_answer.append(inside)
            inside = inside and token != "</s>"
        for i, answer in enumerate(is_answer):
            if answer:
                image = [j for j in range(i) if ids[j] == processor.image_token_id]
                sums += [sum(float(layer[0, head, i - 1, j]) for head in range(2) for j in image) / 2 for layer in attentions]
                even += len(image) / i
                count += 1
    found = image_attention(model, processor, [*records, text_only, caption("bad", "no.png", "x")], image_folder=image_folder)
    assert (found.answer_tokens, found.records, list(found.failures)) == (count, 5, ["bad"])
    np.testing.assert_allclose(found.layers, sums / count, rtol=1e-4)
    assert found.even == pytest.approx(even / count)
    table = attention_table({"one": found, "two": found})
    assert table.row_count == 4 and len(table.columns) == 4


def test_attention_that_is_not_there(llava: Llava, records: list[dict[str, Any]], text_only: dict[str, Any], image_folder: Path) -> None:
    model, processor = llava
    with pytest.raises(ValueError, match="of 1 records"):
        image_attention(model, processor, [text_only])
    model.set_attn_implementation("sdpa")
    try:
        with pytest.raises(ValueError, match='attn_implementation="eager"'):
            image_attention(model, processor, records[:1], image_folder=image_folder)
    finally:
        model.set_attn_implementation("eager")


# --- misleading text
class Gullible(nn.Module):
    """Answers "yes" when the text before the question says so, otherwise what the image's brightness says."""

    def __init__(self, processor: LlavaProcessor) -> None:
        super().__init__()
        self.tokenizer, self.device, self.seen = processor.tokenizer, torch.device("cpu"), []

    def generate(self, input_ids: torch.Tensor, pixel_values: torch.Tensor, **options: Any) -> torch.Tensor:
        assert options["do_sample"] is False
        said = []
        for ids, pixels in zip(input_ids, pixel_values, strict=True):
            assert ids[-1] != self.tokenizer.pad_token_id  # padded on the left
            text = self.tokenizer.decode(ids)
            self.seen.append(text)
            says = "It is yes." in text or (pixels.mean() > 0 and "It is no." not in text)
            said.append("Yes, it is" if says else "No it isn't")
        answers = self.tokenizer(said, return_tensors="pt", padding=True, padding_side="right", add_special_tokens=False)
        return torch.cat([input_ids, answers["input_ids"]], dim=1)


@pytest.fixture
def questions(tmp_path: Path) -> list[dict[str, Any]]:
    for name, level in (("dark", 0), ("bright", 255)):
        Image.new("RGB", (28, 28), (level,) * 3).save(tmp_path / f"{name}.png")
    asked = {"question": "Is it bright?", "options": ["no", "yes"]}
    bright = asked | {"image": "bright.png", "answer": "yes", "false_statement": "It is no."}
    dark = asked | {"image": "dark.png", "answer": "no", "false_statement": "It is yes."}
    unmoved = asked | {"image": Image.new("RGB", (28, 28)), "answer": "no", "question": "A much longer question: is it bright?"}
    return [bright | {"pair": "p"}, dark | {"pair": "p"}, unmoved | {"pair": "q"}, dark | {"pair": "q", "false_statement": "Hm."}]


def test_accuracy_with_and_without_false_text(llava: Llava, questions: list[dict[str, Any]], tmp_path: Path) -> None:
    model = Gullible(llava[1])
    found = misleading_text(model, llava[1], questions, image_folder=tmp_path, batch_size=3)  # type: ignore[arg-type]
    alone, misled = found["alone"], found["misled"]
    assert (alone.question_accuracy, alone.pair_accuracy, alone.wrong_option, alone.questions) == (1, 1, 0, 4)
    assert (misled.question_accuracy, misled.pair_accuracy, misled.wrong_option) == (0.5, 0.5, 0.5)
    assert "It is yes.\nIs it bright?" in model.seen[5] and "It is yes." not in model.seen[1]
    assert "The answer is yes.\nA much" in model.seen[6]
    assert misleading_table({"m": found}).row_count == 3
    unpaired = misleading_text(model, llava[1], [questions[0] | {"pair": "p"}, *map(without_pair, questions[1:])], image_folder=tmp_path)  # type: ignore[arg-type]
    assert unpaired["alone"].pair_accuracy is None


def without_pair(question: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in question.items() if key != "pair"}


def test_a_real_model_answers(llava: Llava, questions: list[dict[str, Any]], tmp_path: Path) -> None:
    found = misleading_text(*llava, questions, image_folder=tmp_path, max_new_tokens=3)
    assert found["alone"].questions == 4
    assert misleading_text(*llava, questions, image_folder=tmp_path, max_new_tokens=3, ways=["misled"]) == {"misled": found["misled"]}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image": None}, "'image'"),
        ({"answer": "maybe"}, "'maybe'"),
        ({"options": ["yes"]}, r"\['yes'.*\]"),
        ({"options": ["yes", "yes"]}, r"\['yes'.*\]"),
    ],
)
def test_bad_questions_are_refused(llava: Llava, change: dict[str, Any], message: str) -> None:
    question = {"question": "?", "image": "x.png", "options": ["yes", "no"], "answer": "yes"} | change
    question = {key: value for key, value in question.items() if value is not None}
    with pytest.raises(ValueError, match=message):
        misleading_text(*llava, [question])
    with pytest.raises(ValueError, match="no questions"):
        misleading_text(*llava, [])


@pytest.mark.parametrize(
    ("answer", "expected"),
    [("It is RED.", "red"), ("reddish", None), ("red or blue", None), ("", None), ("c++", "c++"), ("blue-ish", "blue")],
)
def test_named_option(answer: str, expected: str | None) -> None:
    assert named_option(answer, ["red", "blue", "c++"]) == expected


def test_results_are_json(llava: Llava, records: list[dict[str, Any]], image_folder: Path) -> None:
    llava[0].set_attn_implementation("eager")
    found = image_attention(*llava, records, image_folder=image_folder)
    assert json.loads(json.dumps(vars(found)))["layers"] == found.layers
