import copy
import io
import logging
import math
import re

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from torch.nn import functional as F

import encoders.progress
from encoders.images.reading import blur, read_image
from mof.data.answer_tokens import encode_record
from mof.data.records import to_record
from vig import load_scores, score, select


def reference_losses(model, processor, record, image):
    """One record, one full forward, labels by hand from the concatenated pieces: loss and id of every answer token."""

    def ids(text):
        return processor.tokenizer(text, add_special_tokens=False)["input_ids"]

    tokens, answers = ids("<s>"), [False]
    for turn in record["conversations"]:
        if turn["from"] == "human":
            image_tokens = [processor.image_token_id] * 4 if "<image>" in turn["value"] else []
            piece = ids("USER:") + image_tokens + ids(" " + turn["value"].removeprefix("<image>\n"))
        else:
            tokens += ids(" ASSISTANT:")
            answers += [False] * len(ids(" ASSISTANT:"))
            piece = ids(" " + turn["value"] + "</s>")
        tokens += piece
        answers += [turn["from"] == "gpt"] * len(piece)
    pixels = processor.image_processor(image, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([tokens]), pixel_values=pixels).logits[0]
    positions = [t for t, answer in enumerate(answers) if answer]
    losses = [F.cross_entropy(logits[t - 1][None], torch.tensor([tokens[t]])).item() for t in positions]
    return np.array(losses), [tokens[t] for t in positions]


def tokens_of(scores):
    return np.concatenate([s.token_vig for s in scores])


def test_score_matches_plain_forwards(llava, records, image_folder) -> None:
    scores = score(*llava, records, image_folder=image_folder, batch_size=3)
    assert scores.ids == [record["id"] for record in records]
    for record, s in zip(records, scores, strict=True):
        image = read_image(image_folder / record["image"])
        loss, token_ids = reference_losses(*llava, record, image)
        null_loss, _ = reference_losses(*llava, record, blur(image))
        assert s.token_ids.tolist() == token_ids
        np.testing.assert_allclose(s.token_vig, null_loss - loss, atol=2e-5)
        assert s.loss == pytest.approx(loss.mean(), abs=1e-5)
        # mean of the tokens == sample == log of the ratio of perplexities
        ratio = math.exp(null_loss.mean()) / math.exp(loss.mean())
        assert s.vig == pytest.approx(math.log(ratio), abs=1e-5)
        assert s.vig == pytest.approx(s.token_vig.mean(dtype=np.float64), abs=1e-6)
        assert s.vig == pytest.approx(s.null_loss - s.loss, abs=1e-5)
    assert np.abs(tokens_of(scores)).max() > 0.05  # the image matters to this model, so the above says something
    assert scores.vig.tolist() == [s.vig for s in scores]


def test_same_image_scores_exactly_zero(llava, records, image_folder) -> None:
    assert not tokens_of(score(*llava, records, null="same", image_folder=image_folder, batch_size=2)).any()


def test_turn_ends_are_the_end_of_turn_tokens(llava, records, image_folder) -> None:
    for record, s in zip(records, score(*llava, records, image_folder=image_folder), strict=True):
        eos = llava[1].tokenizer.eos_token_id
        assert s.turn_ends.tolist() == [i for i, token in enumerate(s.token_ids) if token == eos]
        assert len(s.turn_ends) == len(record["conversations"]) // 2


@pytest.mark.parametrize("null", ["blur", "noise", "shuffle"])
def test_batched_equals_one_by_one(llava, records, image_folder, null) -> None:
    batched = score(*llava, records, null=null, image_folder=image_folder, batch_size=len(records))
    single = score(*llava, records, null=null, image_folder=image_folder, batch_size=1)
    np.testing.assert_allclose(tokens_of(batched), tokens_of(single), atol=1e-5)


def test_padding_side_does_not_matter(llava, records, image_folder) -> None:
    model, processor = llava
    left = copy.deepcopy(processor)
    left.tokenizer.padding_side = "left"
    right = copy.deepcopy(processor)
    right.tokenizer.padding_side = "right"
    a, b = (tokens_of(score(model, p, records, image_folder=image_folder)) for p in (left, right))
    np.testing.assert_allclose(a, b, atol=1e-5)


def test_model_without_logits_to_keep(llava, records, image_folder, monkeypatch) -> None:
    model, processor = llava
    expected = tokens_of(score(model, processor, records, image_folder=image_folder))
    forward = model.forward

    def plain(input_ids, attention_mask=None, pixel_values=None, **kwargs):
        assert "logits_to_keep" not in kwargs
        return forward(input_ids=input_ids, attention_mask=attention_mask, pixel_values=pixel_values, **kwargs)

    monkeypatch.setattr(model, "forward", plain)
    full = tokens_of(score(model, processor, records, image_folder=image_folder))
    np.testing.assert_allclose(full, expected, atol=1e-5)


def test_text_only_records_are_exempt(llava, records, image_folder, text_only) -> None:
    scores = score(*llava, [text_only, *records], image_folder=image_folder)
    assert scores.ids == [record["id"] for record in records]
    assert scores.manifest["text_only"] == ["text"]
    assert not scores.failures


def test_text_only_records_that_training_would_refuse_are_failures(llava, records, image_folder, text_only) -> None:
    question = {"id": "question", "conversations": text_only["conversations"][:1]}
    scores = score(*llava, [question, *records, text_only], image_folder=image_folder)
    assert scores.manifest["text_only"] == ["text"]
    assert "no assistant message" in scores.failures["question"]
    chosen = select(scores, 1).apply([question, *records, text_only])
    assert [record["id"] for record in chosen] == [*scores.ids, "text"]


def test_bad_records_are_listed_not_fatal(llava, records, image_folder, tmp_path, caplog) -> None:
    (tmp_path / "broken.png").write_bytes(b"\x89PNG broken")
    records[0]["image"] = "missing.png"
    records[1]["image"] = str(tmp_path / "broken.png")
    records[2]["conversations"][0]["from"] = "alien"
    with caplog.at_level(logging.WARNING):
        scores = score(*llava, records, image_folder=image_folder)
    assert scores.ids == ["r3", "r4"]
    assert list(scores.failures) == ["r0", "r1", "r2"]
    for name, failure in zip(["missing.png", "broken.png", "alien"], scores.failures.values(), strict=True):
        assert name in failure and failure in caplog.text


@pytest.mark.parametrize("null", ["blur", "shuffle"])
def test_what_is_no_record_is_a_failure(llava, records, image_folder, null) -> None:
    odd = [None, "hi", {"id": "no turns", "conversations": ["hi"]}, {"id": "no part", "messages": [{"role": "user", "content": ["hi"]}]}]
    for record in records[:2]:
        record["id"] = None
    scores = score(*llava, [*odd, *records], null=null, image_folder=image_folder)
    assert len(scores) == len(records) and scores.ids[2:] == ["r2", "r3", "r4"]
    assert len(scores.failures) == len(odd) and {"no turns", "no part"} < set(scores.failures)


def test_truncation(llava, records, image_folder) -> None:
    full = score(*llava, records, image_folder=image_folder)
    length = 45
    cut = score(*llava, records, image_folder=image_folder, max_length=length)
    assert any(len(a.token_vig) < len(b.token_vig) for a, b in zip(cut, full, strict=False))
    by_id = {s.id: s for s in full}
    for s in cut:
        np.testing.assert_allclose(s.token_vig, by_id[s.id].token_vig[: len(s.token_vig)], atol=1e-5)
    nothing = score(*llava, records[:1], image_folder=image_folder, max_length=20)
    assert "max_length=20" in nothing.failures["r0"]
    too_short = score(*llava, records[:1], image_folder=image_folder, max_length=5)  # inside the image tokens
    assert "r0" in too_short.failures


def test_non_finite_loss_is_a_failure(llava, records, image_folder) -> None:
    model, processor = copy.deepcopy(llava[0]), llava[1]
    tokens = [set(encode_record(processor, to_record(record, image_folder)).input_ids.tolist()) for record in records[:3]]
    only = (tokens[1] - tokens[0] - tokens[2]).pop()
    with torch.no_grad():
        model.get_input_embeddings().weight[only] = float("inf")
    scores = score(model, processor, records[:3], image_folder=image_folder)
    assert scores.ids == ["r0", "r2"] and "not finite" in scores.failures["r1"]


def test_equal_ids_are_numbered(llava, records, image_folder, tmp_path) -> None:
    """LLaVA's own files name several records after their image; every reader of the records gives them the same names."""
    for record in records:
        record["id"] = "000000033471"
    scores = score(*llava, records, tmp_path, image_folder=image_folder)
    names = ["000000033471", *(f"000000033471#{number}" for number in range(2, 6))]
    assert scores.ids == names == sorted(load_scores(tmp_path).ids)
    chosen = select(scores, keep=1.0).apply(records)
    assert [record["id"] for record in chosen] == names
    assert [record["conversations"] for record in chosen] == [record["conversations"] for record in records]
    assert score(*llava, records, tmp_path, image_folder=image_folder).ids == names  # resumed: nothing has changed


def test_bad_arguments(llava, records, image_folder) -> None:
    with pytest.raises(ValueError, match="batch_size"):
        score(*llava, records, image_folder=image_folder, batch_size=0)
    with pytest.raises(ValueError, match="'none'"):
        score(*llava, records, null="none", image_folder=image_folder)


def test_chat_messages_several_images_and_no_id(llava) -> None:
    rng = np.random.default_rng(0)
    images = [Image.fromarray(rng.integers(0, 256, (28, 28, 3), dtype=np.uint8)) for _ in range(2)]
    content = [
        {"type": "image"},
        {"type": "text", "text": "and"},
        {"type": "image"},
        {"type": "text", "text": "equal?"},
    ]
    messages = [{"role": "user", "content": content}, {"role": "assistant", "content": "No."}]
    scores = score(*llava, [{"messages": messages, "images": images}, {"messages": messages, "images": images[::-1]}])
    assert len(scores) == 2 and scores[0].id != scores[1].id
    assert len(scores[0].token_vig) == len(scores[0].token_ids) > 1
    assert scores[0].id == to_record({"messages": messages, "images": images}).id  # errors and scores name a record alike


def test_training_modes_are_restored(llava, records, image_folder) -> None:
    model, processor = llava
    model.train()
    model.model.vision_tower.eval()  # as a frozen encoder is
    before = [module.training for module in model.modules()]
    try:
        first = score(model, processor, records, image_folder=image_folder)
        assert [module.training for module in model.modules()] == before
    finally:
        model.eval()
    np.testing.assert_array_equal(first.vig, score(model, processor, records, image_folder=image_folder).vig)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_template_without_marks_gives_the_same_scores(llava, records, image_folder) -> None:
    processor = copy.deepcopy(llava[1])
    processor.chat_template = processor.chat_template.replace("{% generation %} ", " {% generation %}")  # the space is no answer
    marked = score(llava[0], processor, records, image_folder=image_folder)
    processor.chat_template = processor.chat_template.replace("{% generation %}", "").replace("{% endgeneration %}", "")
    plain = score(llava[0], processor, records, image_folder=image_folder)
    assert len(plain) and plain.ids == marked.ids
    for one, other in zip(plain, marked, strict=True):
        assert one.answer == other.answer and one.token_ids.tolist() == other.token_ids.tolist()
        np.testing.assert_array_equal(one.token_vig, other.token_vig)


def test_progress_bar(llava, records, image_folder, monkeypatch) -> None:
    screen = io.StringIO()
    monkeypatch.setattr(encoders.progress, "Console", lambda stderr: Console(file=screen, force_terminal=True, width=120))
    scores = score(*llava, records, image_folder=image_folder, batch_size=2)
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", screen.getvalue())
    last = [line for line in plain.replace("\r", "\n").splitlines() if line.strip()][-1]
    assert "5/5" in last
    assert "records/s" in last
    assert f"mean VIG {scores.vig.mean():.3f} nats" in last


def test_an_iterator_is_read_once_and_shows_progress_without_a_total(llava, records, image_folder, monkeypatch, tmp_path) -> None:
    screen = io.StringIO()
    monkeypatch.setattr(encoders.progress, "Console", lambda stderr: Console(file=screen, force_terminal=True, width=120))
    expected = score(*llava, records, image_folder=image_folder)
    again = copy.deepcopy(records[0])
    scores = score(*llava, (record for record in [*records, again]), tmp_path, image_folder=image_folder)
    assert scores.ids == [*expected.ids, "r0#2"]
    np.testing.assert_allclose(tokens_of(scores)[: len(tokens_of(expected))], tokens_of(expected), atol=1e-5)
    assert "6/?" in screen.getvalue()
    assert score(*llava, iter(records), tmp_path, image_folder=image_folder).ids == expected.ids  # nothing left to do
    records[1]["conversations"][1]["value"] = "Something else."
    with pytest.raises(ValueError, match="r1$"):
        score(*llava, iter(records), tmp_path, image_folder=image_folder)
    with pytest.raises(ValueError, match="shuffle"):
        score(*llava, iter(records), null="shuffle", image_folder=image_folder)


class Rows:
    """As a data set of Hugging Face: rows are made when they are asked for, and it is no Sequence."""

    def __init__(self, rows):
        self.rows = rows

    def __len__(self):
        return len(self.rows)

    def __iter__(self):
        return (copy.deepcopy(row) for row in self.rows)


def test_data_set_rows_with_images_in_memory(llava, records, image_folder) -> None:
    rows = []
    for record in records:
        image = read_image(image_folder / record["image"])
        messages = []
        for index, turn in enumerate(record["conversations"]):
            # a data set has the same keys in all parts
            parts = [{"type": "text", "text": turn["value"].removeprefix("<image>\n")}]
            parts = [{"type": "image", "text": None}, *parts] if index == 0 else parts
            messages.append({"role": "user" if turn["from"] == "human" else "assistant", "content": parts})
        rows.append({"id": record["id"], "messages": messages, "images": [image]})
    expected = score(*llava, records, image_folder=image_folder)
    for null in ("blur", "shuffle"):
        scores = score(*llava, Rows(rows), null=null)
        assert scores.ids == expected.ids
        assert np.array_equal(tokens_of(scores), tokens_of(score(*llava, rows, null=null)))
        if null == "blur":
            np.testing.assert_allclose(tokens_of(scores), tokens_of(expected), atol=1e-5)


def without_image(model, processor, record):
    """The losses of `reference_losses` for the conversation without its image."""
    text = [{**turn, "value": turn["value"].removeprefix("<image>\n")} for turn in record["conversations"]]
    forward = model.forward
    try:
        model.forward = lambda input_ids, pixel_values: forward(input_ids=input_ids)
        return reference_losses(model, processor, {"conversations": text}, Image.new("RGB", (28, 28)))[0]
    finally:
        del model.forward


@pytest.mark.parametrize("max_length", [2048, 45])
def test_drop_leaves_the_image_out(llava, records, image_folder, max_length) -> None:
    scores = score(*llava, records, null="drop", image_folder=image_folder, max_length=max_length)
    for s in scores:
        record = records[int(s.id[1:])]
        loss, token_ids = reference_losses(*llava, record, read_image(image_folder / record["image"]))
        count = len(s.token_vig)  # what the cut leaves of the answers with the image, and no more of them without
        assert s.token_ids.tolist() == token_ids[:count] and (max_length < 100 or count == len(token_ids))
        np.testing.assert_allclose(s.token_vig, (without_image(*llava, record) - loss)[:count], atol=2e-5)
    assert len(scores) >= 4 and np.abs(tokens_of(scores)).max() > 0.05


@pytest.mark.parametrize("null", ["blur", "drop", "same"])
def test_one_image_of_several(llava, null) -> None:
    rng = np.random.default_rng(0)
    images = [Image.fromarray(rng.integers(0, 256, (28, 28, 3), dtype=np.uint8)).resize((40, 30)) for _ in range(3)]
    parts = [{"type": "image"}, {"type": "text", "text": "or"}, {"type": "image"}, {"type": "text", "text": "?"}]
    answer = {"role": "assistant", "content": "The second one."}
    pair = {"id": "pair", "messages": [{"role": "user", "content": parts}, answer], "images": images[:2]}
    single = {"id": "single", "messages": [{"role": "user", "content": parts[2:]}, answer], "images": images[2:]}
    first, second, both = (score(*llava, [pair, single], null=null, only_image=only) for only in (0, 1, None))
    assert second.ids == ["pair"] and "1 image(s), so none of index 1" in second.failures["single"]
    assert first.ids == both.ids == ["pair", "single"] and not first.failures
    np.testing.assert_allclose(first[1].token_vig, both[1].token_vig, atol=1e-5)  # it has only that one
    assert first.manifest["identity"]["null"] != both.manifest["identity"]["null"]
    if null == "same":
        assert not tokens_of(first).any()
        return
    blurred = score(*llava, [pair | {"images": [images[0], blur(images[1])]}], null="same")[0].loss
    dropped = score(
        *llava, [{**pair, "messages": [{"role": "user", "content": [*parts[:2], parts[3]]}, answer], "images": images[:1]}], null="same"
    )[0].loss
    assert second[0].null_loss == pytest.approx(blurred if null == "blur" else dropped, abs=1e-5)
    assert len({round(scores[0].vig, 5) for scores in (first, second, both)}) == 3
    with pytest.raises(ValueError, match="only_image"):
        score(*llava, [pair], only_image=-1)


def test_half_precision_moves_scores_a_little(llava, records, image_folder) -> None:
    model, processor = llava
    exact = score(model, processor, records, image_folder=image_folder)
    rounded = score(copy.deepcopy(model).to(torch.bfloat16), processor, records, image_folder=image_folder)
    apart = np.abs(tokens_of(rounded) - tokens_of(exact))
    assert 0 < apart.mean() < 0.1 * np.abs(tokens_of(exact)).mean()
