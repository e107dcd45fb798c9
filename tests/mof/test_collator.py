"""Answer tokens against concatenated pieces and decoded text, for three kinds of tokenizer and two processors."""

from __future__ import annotations

import dataclasses
import math
import random
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch.utils.data import DataLoader
from transformers import CLIPImageProcessor, LlavaProcessor, PreTrainedTokenizerFast, ProcessorMixin

from encoders.images.reading import ImageError
from mof import MoFProcessor
from mof.chat_templates import CHATML, VICUNA
from mof.data.answer_tokens import encode_record
from mof.data.collator import SupervisedCollator, collate
from mof.data.records import RecordError, to_record
from mof.data.rows import read_records
from mof.image_processor import MoFImageProcessor

SPECIALS = ["<pad>", "<s>", "</s>", "<image>", "<|im_start|>", "<|im_end|>"]
CORPUS = [
    "The cat sat on the mat. Yes, it is red!\n\nNo.",
    "USER: What is it? ASSISTANT: A cat.",
    "user\nassistant\nthe red cat",
    "\n\n",
    "\n\n",
]
IMAGE = Image.new("RGB", (40, 20), (200, 0, 0))
TOKENS_PER_IMAGE = 4


def byte_level(trim_offsets: bool) -> PreTrainedTokenizerFast:
    """A tokenizer like those of GPT-2, Llama 3 and Qwen: it merges inside words, with white space in front of them."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.ByteLevel(trim_offsets=trim_offsets)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=330, special_tokens=SPECIALS, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator(CORPUS, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="</s>")


def sentencepiece() -> PreTrainedTokenizerFast:
    """A tokenizer like Llama 2's: a space becomes a letter, unknown characters become bytes, every text begins with <s>."""
    byte_tokens = [f"<0x{value:02X}>" for value in range(256)]
    backend = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    trainer = trainers.BpeTrainer(vocab_size=420, special_tokens=[*SPECIALS, "<unk>", *byte_tokens], show_progress=False)
    backend.train_from_iterator([word for text in CORPUS for word in text.replace(" ", " ▁").split(" ")], trainer)
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", bos_token="<s>", eos_token="</s>")
    tokenizer.add_special_tokens({"additional_special_tokens": SPECIALS[3:]})
    return tokenizer


TOKENIZERS = {
    "byte-level": lambda: byte_level(trim_offsets=False),
    "byte-level, trimmed": lambda: byte_level(trim_offsets=True),
    "sentencepiece": sentencepiece,
}


def build_processor(kind: str, tokenizer: PreTrainedTokenizerFast, template: str) -> ProcessorMixin:
    if kind == "ours":
        return MoFProcessor(MoFImageProcessor(28), tokenizer, chat_template=template, tokens_per_image=TOKENS_PER_IMAGE)
    images = CLIPImageProcessor(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    return LlavaProcessor(images, tokenizer, patch_size=14, vision_feature_select_strategy="full", chat_template=template)


@pytest.fixture(params=TOKENIZERS)
def tokenizer(request: pytest.FixtureRequest) -> PreTrainedTokenizerFast:
    return TOKENIZERS[request.param]()


@pytest.fixture(params=["ours", "llava"])
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


def conversation(*turns: str, images: int = 1, **more: Any) -> dict[str, Any]:
    turns = [{"from": ("human", "gpt")[i % 2], "value": turn} for i, turn in enumerate(turns)]
    return {"id": "r", "image": [IMAGE] * images, "conversations": turns, **more}


def spell(tokenizer: PreTrainedTokenizerFast, ids: torch.Tensor) -> str:
    """Tokens to text without any of the clean-ups of decoding a sentence."""
    text = tokenizer.backend_tokenizer.decoder.decode(tokenizer.convert_ids_to_tokens(ids.tolist()))
    return text


def answers_of(example: Any) -> torch.Tensor:
    return example.input_ids[example.answer_mask]


@pytest.mark.parametrize(("template", "end"), [(VICUNA, "</s>"), (CHATML, "<|im_end|>")])
def test_answers_are_spelled_exactly(kind: str, tokenizer: PreTrainedTokenizerFast, template: str, end: str) -> None:
    raw = conversation("<image>\nWhat is it?", "A cat.", "And <image> this?", "The mat 🙂.", "Sure?", "Yes", images=2)
    example = encode_record(build_processor(kind, tokenizer, template), to_record(raw))
    space = " " if template == VICUNA else ""
    assert spell(tokenizer, answers_of(example)) == "".join(space + text + end for text in ("A cat.", "The mat 🙂.", "Yes"))
    assert int((example.input_ids == tokenizer.convert_tokens_to_ids("<image>")).sum()) == 2 * TOKENS_PER_IMAGE
    assert len(example.images["pixel_values"]) == 2


def test_the_first_word_of_a_turn_is_no_answer(kind: str, tokenizer: PreTrainedTokenizerFast) -> None:
    """LLaVA-1.5's own template marks the space behind an answer, which shares a token with the next word."""
    answer = "{% generation %}{{ m.content[0].text + ' ' }}{% endgeneration %}"
    user = "{{ 'USER: ' }}{% for c in m.content %}{{ '<image>' if c.type == 'image' else c.text + ' ' }}{% endfor %}"
    template = (
        "{% for m in messages %}{% if m.role == 'user' %}" + user + "{% else %}{{ 'ASSISTANT: ' }}" + answer + "{% endif %}{% endfor %}"
    )
    raw = conversation("<image>\nWhat is it?", "A cat.", "Sure?", "Yes")
    answers = spell(tokenizer, answers_of(encode_record(build_processor(kind, tokenizer, template), to_record(raw))))
    assert "US" not in answers and "".join(answers.split()) == "Acat.Yes"


def test_an_answer_behind_max_length_is_left_out(kind: str, tokenizer: PreTrainedTokenizerFast, caplog: pytest.LogCaptureFixture) -> None:
    collator = SupervisedCollator(build_processor(kind, tokenizer, VICUNA), max_length=40)
    batch = collator([conversation("<image>\nIs it?", "A"), conversation("<image>\n" + "What is it? " * 40, "A cat.") | {"id": "long"}])
    assert len(batch["labels"]) == 1 and collator.left_out == 1 and "'long'" in caplog.text and "max_length=40" in caplog.text


@pytest.mark.parametrize("trimmed", [True, False])
def test_ids_are_the_concatenated_pieces(kind: str, trimmed: bool) -> None:
    """Special tokens part the pieces, so each can be tokenised alone."""
    tokenizer = byte_level(trimmed)
    raw = conversation("<image>\nWhat is it?", "A  cat.\n", "Sure?", " Yes ")
    example = encode_record(build_processor(kind, tokenizer, CHATML), to_record(raw))
    pieces = [
        ("<|im_start|>user\n" + "<image>" * TOKENS_PER_IMAGE + "\nWhat is it?<|im_end|>\n<|im_start|>assistant\n", False),
        ("A  cat.\n<|im_end|>", True),
        ("\n<|im_start|>user\nSure?<|im_end|>\n<|im_start|>assistant\n", False),
        (" Yes <|im_end|>", True),
        ("\n", False),
    ]
    ids, mask = [], []
    for text, answer in pieces:
        piece = tokenizer(text, add_special_tokens=False)["input_ids"]
        ids += piece
        mask += [answer] * len(piece)
    assert example.input_ids.tolist() == ids
    assert example.answer_mask.tolist() == mask


def test_random_answers_are_found(tokenizer: PreTrainedTokenizerFast) -> None:
    processor = build_processor("ours", tokenizer, VICUNA)
    rng = random.Random(0)
    for _ in range(40):
        answers = ["".join(rng.choices("aet  \n.,:é🙂日ASIN", k=rng.randint(1, 12))) for _ in range(3)]
        raw = conversation("<image>\nq:", answers[0], "q \n", answers[1], " ", answers[2])
        example = encode_record(processor, to_record(raw))
        assert spell(tokenizer, answers_of(example)) == "".join(f" {answer}</s>" for answer in answers)


@pytest.mark.parametrize("answer", ["A cat.\n", "\n", " ", "\n\n A  cat. \n", "cat"])
def test_white_space_at_the_ends_of_an_answer(answer: str) -> None:
    """Trimmed offsets leave nothing of such tokens; here no end-of-turn token lies in the span to hold them together."""
    template = CHATML.replace("+ '<|im_end|>' }}{% endgeneration %}", "}}{% endgeneration %}{{ '<|im_end|>' }}")
    assert template != CHATML
    raw = conversation("<image>\nWhat? \n", answer, "Sure?\n", answer)
    examples = [encode_record(build_processor("ours", byte_level(trim), template), to_record(raw)) for trim in (True, False)]
    assert torch.equal(examples[0].input_ids, examples[1].input_ids)
    assert torch.equal(examples[0].answer_mask, examples[1].answer_mask)
    # What may merge with the prompt's line break is the answer's token too.
    spelled = spell(byte_level(False), answers_of(examples[0]))
    assert spelled.replace("\n", "") == (answer + answer).replace("\n", "") and len(spelled) - 2 * len(answer) in (0, 2)


def test_token_across_the_border_is_an_answer_token() -> None:
    """Two line breaks are one token here: half of it prompt, half answer."""
    tokenizer = byte_level(trim_offsets=False)
    assert "ĊĊ" in tokenizer.get_vocab()
    example = encode_record(build_processor("ours", tokenizer, CHATML), to_record(conversation("?", "\n", images=0)))
    assert spell(tokenizer, answers_of(example)) == "\n\n<|im_end|>"


def test_bos_is_written_once(kind: str) -> None:
    tokenizer = sentencepiece()
    raw = conversation("<image>\nWhat?", "A cat.")
    for template in (VICUNA, "{{ bos_token }}" + VICUNA):
        example = encode_record(build_processor(kind, tokenizer, template), to_record(raw))
        assert (example.input_ids == tokenizer.bos_token_id).nonzero().flatten().tolist() == [0]


def test_ids_are_those_of_generation(kind: str, tokenizer: PreTrainedTokenizerFast) -> None:
    """The prompt part equals what apply_chat_template makes of the same chat for generate()."""
    processor = build_processor(kind, tokenizer, VICUNA)
    example = encode_record(processor, to_record(conversation("<image>\nWhat is it?", "A cat.")))
    chat = [{"role": "user", "content": [{"type": "image", "image": IMAGE}, {"type": "text", "text": "What is it?"}]}]
    prompt = processor.apply_chat_template(chat, tokenize=True, return_dict=True, add_generation_prompt=True, return_tensors="pt")
    length = int(example.answer_mask.nonzero()[0])
    assert torch.equal(example.input_ids[:length], prompt["input_ids"][0])


def test_other_images_replace_the_records_own(tiny_processor: MoFProcessor) -> None:
    record = to_record(conversation("<image>\nWhat?", "A cat."))
    blue = Image.new("RGB", (40, 20), (0, 0, 200))
    own, replaced = encode_record(tiny_processor, record), encode_record(tiny_processor, record, images=[blue])
    assert torch.equal(own.input_ids, replaced.input_ids) and torch.equal(own.answer_mask, replaced.answer_mask)
    assert own.images["pixel_values"][0, 0, 16, 16] == 200 and replaced.images["pixel_values"][0, 2, 16, 16] == 200


def test_long_conversations_are_cut(tiny_processor: MoFProcessor) -> None:
    record = to_record(conversation("<image>\nWhat?", "A cat.", "Sure?", "Yes."))
    whole = encode_record(tiny_processor, record)
    cut = encode_record(tiny_processor, record, max_length=60)
    assert torch.equal(cut.input_ids, whole.input_ids[:60]) and torch.equal(cut.answer_mask, whole.answer_mask[:60])
    images_end = 6 + 32
    with pytest.raises(RecordError, match=f"'r'.*answer tokens.*max_length={images_end}"):
        encode_record(tiny_processor, record, max_length=images_end)
    with pytest.raises(RecordError, match=f"'r'.*{images_end}.*{images_end - 1}"):
        encode_record(tiny_processor, record, max_length=images_end - 1)


def test_batches(tiny_processor: MoFProcessor) -> None:
    records = [
        conversation("<image>\nWhat?", "A cat."),
        conversation("Hi", "Hello there, how are you?", images=0),
        conversation("<image> <image>", "Two", images=2),
    ]
    examples = [encode_record(tiny_processor, to_record(raw)) for raw in records]
    batch = SupervisedCollator(tiny_processor)(records)
    assert sorted(batch) == ["attention_mask", "input_ids", "labels", "pixel_values"]
    assert len(batch["pixel_values"]) == 3
    longest = max(len(example.input_ids) for example in examples)
    for side in ("right", "left"):
        batch = collate(examples, tiny_processor.tokenizer.pad_token_id, side)
        for row, example in enumerate(examples):
            length = len(example.input_ids)
            real = slice(0, length) if side == "right" else slice(longest - length, longest)
            assert torch.equal(batch["input_ids"][row, real], example.input_ids)
            assert batch["attention_mask"][row].sum() == batch["attention_mask"][row, real].sum() == length
            expected = torch.where(example.answer_mask, example.input_ids, -100)
            assert torch.equal(batch["labels"][row, real], expected)
            assert (batch["labels"][row] != -100).sum() == example.answer_mask.sum()
    assert "pixel_values" not in SupervisedCollator(tiny_processor)(records[1:2])


def test_per_token_outputs_are_cut_and_padded(tiny_processor: MoFProcessor) -> None:
    first = encode_record(tiny_processor, to_record(conversation("<image>\nWhat?", "A cat.")))
    second = encode_record(tiny_processor, to_record(conversation("Hi", "Ho", images=0)))
    kinds = [(example.input_ids == tiny_processor.image_token_id).long() for example in (first, second)]
    examples = [
        dataclasses.replace(example, images={**example.images, "mm_token_type_ids": kind})
        for example, kind in zip((first, second), kinds, strict=True)
    ]
    batch = collate(examples, 0, "left")
    assert torch.equal(batch["mm_token_type_ids"], (batch["input_ids"] == tiny_processor.image_token_id).long())


def test_token_masks_silence_answer_tokens(tiny_processor: MoFProcessor) -> None:
    raw = conversation("<image>\nWhat?", "A cat.", "Sure?", "Yes.")
    plain = SupervisedCollator(tiny_processor)([raw])["labels"]
    answers = plain[plain != -100]
    keep = [index % 3 == 0 for index in range(len(answers))]
    labels = SupervisedCollator(tiny_processor)([{**raw, "token_mask": keep}])["labels"]
    assert torch.equal(labels[labels != -100], answers[::3])
    assert (SupervisedCollator(tiny_processor)([{**raw, "token_mask": [False] * len(keep)}])["labels"] == -100).all()
    with pytest.raises(RecordError, match=f"'r'.*token_mask.*2 .*{len(answers)} "):
        SupervisedCollator(tiny_processor, strict=True)([{**raw, "token_mask": [True, False]}])


def test_token_weights_lie_at_their_tokens(tiny_processor: MoFProcessor) -> None:
    raw = conversation("<image>\nWhat?", "A cat.", "Sure?", "Yes.")
    collator = SupervisedCollator(tiny_processor, strict=True)
    plain = collator([raw])
    answers = plain["labels"] != -100
    weights = [0.5 * (index % 3) for index in range(int(answers.sum()))]
    batch = collator([{**raw, "token_weights": weights}, raw])
    assert batch["token_weights"][0, : answers.shape[1]][answers[0]].tolist() == weights
    assert torch.equal(batch["token_weights"][0] > 0, batch["labels"][0] != -100)  # a weight of 0 is no loss
    assert torch.equal(batch["token_weights"][1] == 1, batch["labels"][1] != -100) and "token_weights" not in plain
    for wrong in (-0.5, math.nan, math.inf):
        with pytest.raises(RecordError, match="'r'.*token_weights"):
            collator([{**raw, "token_weights": [*weights[:-1], wrong]}])
    with pytest.raises(RecordError, match="'r'.*token_weights.*2"):
        collator([{**raw, "token_weights": [1.0, 1.0]}])
    with pytest.raises(RecordError, match="'r'.*token_mask.*token_weights"):
        collator([{**raw, "token_weights": weights, "token_mask": [True] * len(weights)}])


def test_errors(tiny_processor: MoFProcessor) -> None:
    record = to_record(conversation("<image>\nWhat?", "A cat."))
    with pytest.raises(RecordError, match="'r'"):
        encode_record(tiny_processor, to_record(conversation("<image>\nWhat?")))
    tiny_processor.chat_template = None
    with pytest.raises(ValueError, match="chat template"):
        encode_record(tiny_processor, record)
    last_only = "> {% for m in messages %}{% if loop.last %}{% generation %}x{% endgeneration %}{% endif %}{% endfor %}"
    tiny_processor.chat_template = last_only
    with pytest.raises(ValueError, match="'r'.*2 .*1"):
        encode_record(tiny_processor, to_record(conversation("<image>", "a", "b", "c")))


def test_an_image_that_cannot_be_read_names_record_and_file(tiny_processor: MoFProcessor, tmp_path: Path) -> None:
    (tmp_path / "broken.png").write_bytes(b"no picture")
    raw = conversation("<image>\nWhat?", "A cat.") | {"image": "broken.png"}
    with pytest.raises(ImageError, match=r"'r'.*broken\.png"):
        SupervisedCollator(tiny_processor, image_folder=tmp_path, strict=True)([raw])


def test_records_of_unreadable_images_are_left_out_named_and_counted(
    tiny_processor: MoFProcessor, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "broken.png").write_bytes(b"no picture")
    good, broken = conversation("<image>\nWhat?", "A cat."), conversation("<image>\nWhat?", "A dog.") | {"id": "r2", "image": "broken.png"}
    collator = SupervisedCollator(tiny_processor, image_folder=tmp_path)
    weights = [0.5] * int((collator([good])["labels"] != -100).sum())
    for first in (good, {**good, "token_weights": weights}):
        got, expected = collator([broken, first, broken]), collator([first])
        assert got.keys() == expected.keys() and all(torch.equal(got[key], expected[key]) for key in got)
    assert collator.left_out == 4
    assert all(re.search(r"record 'r2': .*broken\.png", message) for message in caplog.messages) and len(caplog.messages) == 4
    batch = collator([broken])  # nothing is left: a step without a loss
    assert batch["input_ids"].shape == batch["labels"].shape and (batch["labels"] == -100).all()
    assert "pixel_values" not in batch


def test_left_out_records_of_worker_processes_are_counted(tiny_processor: MoFProcessor, tmp_path: Path) -> None:
    (tmp_path / "broken.png").write_bytes(b"no picture")
    good, broken = conversation("<image>\nWhat?", "A cat."), conversation("<image>\nWhat?", "A dog.") | {"image": "broken.png"}
    collator = SupervisedCollator(tiny_processor, image_folder=tmp_path)
    loader = DataLoader([good, broken] * 3, batch_size=2, collate_fn=collator, num_workers=1)
    assert [len(batch["labels"]) for batch in loader] == [1, 1, 1]
    assert collator.left_out == 3


def test_images_none_of_which_can_be_read_are_no_accident(tiny_processor: MoFProcessor, tmp_path: Path) -> None:
    (tmp_path / "broken.png").write_bytes(b"no picture")
    good, broken = conversation("<image>\nWhat?", "A cat."), conversation("<image>\nWhat?", "A dog.") | {"image": "broken.png"}
    with pytest.raises(ImageError, match=r"broken\.png"):
        SupervisedCollator(tiny_processor, image_folder=tmp_path)([broken] * 50)
    collator = SupervisedCollator(tiny_processor, image_folder=tmp_path)
    collator([good] + [broken] * 100)
    assert collator.left_out == 100


def test_what_a_processor_refuses_names_the_record(tiny_processor: MoFProcessor, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise ValueError("no such picture")

    monkeypatch.setattr(type(tiny_processor), "__call__", refuse)
    record = to_record({"id": "r7", "conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Yes"}]})
    with pytest.raises(RecordError, match="'r7': no such picture"):
        encode_record(tiny_processor, record)


def test_processor_that_changes_text_is_refused(tiny_processor: MoFProcessor) -> None:
    tiny_processor.tokens_per_image = 2

    class Rows(MoFProcessor):
        def __call__(self, images: Any = None, text: Any = None, **kwargs: Any) -> Any:
            return super().__call__(images, [text[0].replace("?", "!")], **kwargs)

    tiny_processor.__class__ = Rows
    with pytest.raises(RecordError, match="'r'"):
        encode_record(tiny_processor, to_record(conversation("<image>\nWhat?", "A cat.")))


@pytest.mark.data
def test_real_records(tiny_processor: MoFProcessor, shared_data: Path) -> None:
    for raw in read_records(shared_data / "coco/llava_instruct.json")[::10]:
        record = to_record(raw, shared_data / "coco/train2017")
        example = encode_record(tiny_processor, record)
        assert tiny_processor.decode(answers_of(example)) == "".join(f" {answer}</s>" for answer in record.answers)
