"""Where each answer token lies in the answers' text, for tokenizers of one byte, of words, and of both."""

from __future__ import annotations

import re

import numpy as np
import pytest
from support.families import FAMILIES, build, make_records, template
from support.families import tokenizer as byte_tokenizer
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import ChameleonProcessor, CLIPImageProcessor, Emu3ImageProcessor, Emu3Processor, PreTrainedTokenizerFast

from mof.data.answer_spans import render_answers
from mof.data.answer_tokens import encode_record
from mof.data.records import to_record
from vig import load_scores, score


@pytest.mark.parametrize("family", FAMILIES)
def test_every_token_is_its_characters(family) -> None:
    """One token per byte, so each token is one character, an end of turn its whole name, and all together the answers."""
    model, processor = build(family)
    turns = 1 if family == "paligemma" else 2
    records = make_records(turns)
    eos = processor.tokenizer.eos_token
    for record, s in zip(records, score(model, processor, records), strict=True):
        said = [m["content"][0]["text"] for m in record["messages"] if m["role"] == "assistant"]
        assert s.answer == "".join(f" {text}{eos}" for text in said)
        pieces = [s.answer[start:end] for start, end in zip(s.token_starts, s.token_ends, strict=True)]
        assert pieces == [processor.tokenizer.decode([token]) for token in s.token_ids]
        assert "".join(pieces) == s.answer and len(pieces) == len(s.token_vig)


def test_characters_of_several_tokens_and_cut_answers(llava, records, image_folder, tmp_path) -> None:
    records[0]["conversations"][1]["value"] = "Grüße 😀!"
    whole = len(encode_record(llava[1], to_record(records[0], image_folder)).input_ids)
    for length in (2048, whole - 5):
        (s,) = score(*llava, records[:1], tmp_path / str(length), image_folder=image_folder, max_length=length)
        pieces = [s.answer[start:end] for start, end in zip(s.token_starts, s.token_ends, strict=True)]
        assert pieces[:8] == [" ", "G", "r", "ü", "ü", "ß", "ß", "e"] and len(pieces) == len(s.token_ids)
        assert s.answer == " Grüße 😀!</s>"[: s.token_ends[-1]]
        if length == 2048:
            assert pieces[8:] == [" ", "😀", "😀", "😀", "😀", "!", "</s>"]
        (loaded,) = load_scores(tmp_path / str(length))
        assert loaded.answer == s.answer and loaded.token_starts.tolist() == s.token_starts.tolist()


def test_words_with_a_space_that_the_tokenizer_leaves_out(llava, records, image_folder) -> None:
    """A tokenizer of whole words, whose offsets leave spaces out; the template puts one before the answer."""
    texts = " ".join(turn["value"] for turn in records[3]["conversations"]) + " ASSISTANT: USER:"
    words = dict.fromkeys(piece for piece, _ in pre_tokenizers.Whitespace().pre_tokenize_str(texts))
    names = ["<pad>", "<s>", "</s>", "<unk>", "<image>", *(word for word in words if word != "<image>")]
    backend = Tokenizer(models.WordLevel({word: index for index, word in enumerate(names)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    processor = type(llava[1])(
        llava[1].image_processor,
        tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=llava[1].chat_template,
    )
    example = encode_record(processor, to_record(records[3], image_folder))
    pieces = [example.answer[start:end] for start, end in example.characters.tolist()]
    assert pieces == [*re.findall(r"\w+|\.", records[3]["conversations"][1]["value"]), "</s>"]
    assert example.input_ids[example.answer_mask].tolist() == tokenizer.convert_tokens_to_ids(pieces)


def emu3():
    """Its processor puts <s> before the text."""
    names = {"boi_token": "<boi>", "eoi_token": "<eoi>", "image_wrapper_token": "<img>", "eof_token": "<eof>"}
    return Emu3Processor(Emu3ImageProcessor(min_pixels=28 * 28, max_pixels=56 * 56), byte_tokenizer(image_token="<image>", **names))


def chameleon():
    """Its processor puts the token of separation behind the text."""
    tokenizer = byte_tokenizer(image_token="<image>", boi_token="<boi>", eoi_token="<eoi>", sep_token="<sep>")
    images = CLIPImageProcessor(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    return ChameleonProcessor(images, tokenizer, image_seq_length=4)


@pytest.mark.parametrize("images", [0, 1, 2])
@pytest.mark.parametrize("make", [emu3, chameleon])
def test_processors_that_add_tokens_around_the_text(make, images) -> None:
    processor = make()
    processor.chat_template = template("<image>")
    record, other = make_records(turns=2)[:2]
    record["images"] = [record["images"][0], other["images"][0]][:images]
    record["messages"][0]["content"] = record["messages"][0]["content"][images == 0 :]
    record["messages"][2]["content"] = [{"type": "image"}] * (images - 1) + record["messages"][2]["content"]
    example = encode_record(processor, to_record(record))
    assert processor.tokenizer.decode(example.input_ids[example.answer_mask]) == example.answer == " Yes.</s> Yes.Yes.</s>"
    _, placeholder, after = render_answers(processor, to_record(record))[0].rpartition("<image>")
    assert (example.images_end > 0) == bool(placeholder) == bool(images)
    assert not images or processor.tokenizer.decode(example.input_ids[example.images_end :]).removesuffix("<sep>") == after


def test_as_arrow(llava, records, image_folder, tmp_path) -> None:
    scores = score(*llava, records, tmp_path, image_folder=image_folder)
    table = load_scores(tmp_path).table()
    assert table["id"].to_pylist() == load_scores(tmp_path).ids and table.num_rows == 5
    assert np.array_equal(table["vig"].to_numpy(), load_scores(tmp_path).vig)
    by_id = {s.id: s for s in scores}
    for row in table.to_pylist():
        assert row["token_vig"] == by_id[row["id"]].token_vig.tolist() and row["answer"] == by_id[row["id"]].answer
