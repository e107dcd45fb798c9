"""The processor in the ways that LLaVA processors are used."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import processors
from transformers import AutoImageProcessor, AutoProcessor, AutoTokenizer, PreTrainedTokenizerFast

from mof import MoFForConditionalGeneration, MoFProcessor
from mof.chat_templates import CHATML, VICUNA, choose_chat_template
from mof.data.answer_tokens import encode_record
from mof.data.records import to_record
from mof.image_processor import MoFImageProcessor

RED = Image.new("RGB", (40, 20), (200, 0, 0))
GENERATE = {"tokenize": True, "return_dict": True, "add_generation_prompt": True, "return_tensors": "pt"}
ENDS = {
    "template": processors.TemplateProcessing("$A </s>", special_tokens=[("</s>", 2)]),
    "sequence": processors.Sequence(
        [processors.ByteLevel(), processors.TemplateProcessing("<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)])]
    ),
    "roberta": processors.RobertaProcessing(("</s>", 2), ("<s>", 1)),
}


def question(image: object = None, text: str = "What?") -> list[dict]:
    parts = [] if image is None else [{"type": "image", "image": image}]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]


def test_placeholder_becomes_tokens(tiny_processor: MoFProcessor, tiny_model: MoFForConditionalGeneration) -> None:
    inputs = tiny_processor(images=[RED], text="a<image>b", return_tensors="pt")
    count = tiny_model.mixer.tokens_per_image
    ids = inputs["input_ids"][0].tolist()
    assert ids[1:-1] == [tiny_model.config.image_token_id] * count
    assert tiny_processor.decode([ids[0], ids[-1]]) == "ab"
    assert inputs["pixel_values"].shape == (1, 3, 32, 32) and inputs["pixel_values"].dtype == torch.uint8


def test_pixels_are_padded_with_the_first_encoders_mean(tiny_processor: MoFProcessor) -> None:
    pixels = tiny_processor(images=RED, text="<image>", return_tensors="pt")["pixel_values"][0]
    expected = torch.full((3, 32, 32), 128, dtype=torch.uint8)  # the mean of tiny-a is 0.5
    expected[:, 8:24] = torch.tensor([200, 0, 0], dtype=torch.uint8)[:, None, None]
    rows = [*range(7), *range(9, 23), *range(25, 32)]  # the seams are resampled
    assert torch.equal(pixels[:, rows], expected[:, rows])


def test_chat_with_images_from_memory_and_file(tiny_processor: MoFProcessor, tmp_path: Path) -> None:
    RED.save(tmp_path / "red.png")
    options = {"tokenize": True, "return_dict": True, "add_generation_prompt": True, "return_tensors": "pt"}
    memory = tiny_processor.apply_chat_template(question(RED), **options)
    path = tiny_processor.apply_chat_template(question(str(tmp_path / "red.png")), **options)
    assert tiny_processor.decode(memory["input_ids"][0]) == "USER: " + "<image>" * 32 + "\nWhat? ASSISTANT:"
    assert all(torch.equal(memory[key], path[key]) for key in memory)


def test_batch_of_one_several_and_no_images(tiny_processor: MoFProcessor) -> None:
    two = [
        {
            "role": "user",
            "content": [
                {"type": "image", "image": RED},
                {"type": "text", "text": "or"},
                {"type": "image", "image": RED.rotate(90, expand=True)},
            ],
        }
    ]
    chats = [question(RED), two, question(text="A longer question without any image.")]
    texts = tiny_processor.apply_chat_template(chats)
    images = [RED, RED, RED.rotate(90, expand=True)]
    batch = tiny_processor(images=images, text=texts, padding=True, return_tensors="pt")
    assert batch["pixel_values"].shape == (3, 3, 32, 32)
    assert (batch["input_ids"] == tiny_processor.image_token_id).sum(1).tolist() == [32, 64, 0]
    assert batch["attention_mask"][:, -1].all() and not batch["attention_mask"][2, 0]  # padded on the left
    assert "pixel_values" not in tiny_processor.apply_chat_template(question(), tokenize=True, return_dict=True)


def test_string_content_and_system_message(tiny_processor: MoFProcessor) -> None:
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]
    assert tiny_processor.apply_chat_template(chat) == "Be brief. USER: Hi ASSISTANT: Ho</s>"


def test_assistant_mask_of_transformers_is_right_too(tiny_processor: MoFProcessor) -> None:
    chat = [*question(RED), {"role": "assistant", "content": "A cat."}, *question(text="Sure?"), {"role": "assistant", "content": "Yes."}]
    out = tiny_processor.apply_chat_template(chat, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
    ids = torch.tensor(out["input_ids"][0])[torch.tensor(out["assistant_masks"][0]).bool()]
    assert tiny_processor.decode(ids) == " A cat.</s> Yes.</s>"


def test_image_options_reach_the_image_processor(tiny_processor: MoFProcessor) -> None:
    def pixels(**options: object) -> torch.Tensor:
        return tiny_processor(images=RED, text="<image>", return_tensors="pt", **options)["pixel_values"][0]

    red = torch.tensor([200, 0, 0], dtype=torch.uint8)[:, None, None].expand(3, 32, 32)
    assert torch.equal(pixels(fit="squash"), red)
    assert torch.equal(pixels(images_kwargs={"fit": "squash"}), red)
    assert torch.equal(pixels(background=(200, 0, 0)), red)
    assert pixels(image_size=16).shape == (3, 16, 16)
    assert not torch.equal(pixels(), red)  # a call changes only itself
    with pytest.raises(TypeError, match="typo"):
        pixels(images_kwargs={"typo": 3})
    with pytest.raises(TypeError, match="typo"):
        tiny_processor.image_processor(RED, typo=3)
    with pytest.raises(TypeError, match="do_resize"):  # known to transformers, but not to our processor
        pixels(do_resize=False)
    with pytest.raises(ValueError, match="'stretch'"):
        pixels(fit="stretch")


def test_arrays_and_tensors_are_images(tiny_processor: MoFProcessor) -> None:
    image = Image.effect_mandelbrot((40, 20), (-2, -1, 1, 1), 50).convert("RGB")
    array = np.array(image)
    tensor = torch.from_numpy(array).permute(2, 0, 1)
    batch = tiny_processor(images=[image, array, tensor], text="<image>" * 3, return_tensors="pt")["pixel_values"]
    assert torch.equal(batch[1], batch[0]) and torch.equal(batch[2], batch[0])
    refused = [array[..., 0], array / 255, np.stack([array, array]), tensor.bfloat16(), torch.tensor(3)]
    for wrong in refused:
        with pytest.raises(ValueError, match=r"(ndarray|Tensor).*uint8"):
            tiny_processor(images=[wrong], text="<image>")
    with pytest.raises(TypeError, match="dict"):
        tiny_processor(images=[{"path": "red.png"}], text="<image>")


@pytest.mark.slow
def test_a_fresh_process_that_knows_only_the_class(tiny_processor: MoFProcessor, tmp_path: Path) -> None:
    """Nothing has registered our other classes there."""
    tiny_processor.save_pretrained(tmp_path)
    code = f"from mof.processor import MoFProcessor; print(MoFProcessor.from_pretrained({str(tmp_path)!r}).tokens_per_image)"
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["32"], done.stderr


def test_save_and_load(tiny_processor: MoFProcessor, tiny_model: MoFForConditionalGeneration, tmp_path: Path) -> None:
    tiny_processor.image_processor.fit = "crop"
    tiny_processor.save_pretrained(tmp_path)
    tiny_model.config.save_pretrained(tmp_path)
    for loaded in (MoFProcessor.from_pretrained(tmp_path), AutoProcessor.from_pretrained(tmp_path)):
        assert isinstance(loaded, MoFProcessor) and isinstance(loaded.image_processor, MoFImageProcessor)
        assert loaded.tokens_per_image == 32 and loaded.chat_template == tiny_processor.chat_template
        assert loaded.image_processor.fit == "crop" and loaded.tokenizer.padding_side == "left"
        options = {"tokenize": True, "return_dict": True, "return_tensors": "pt"}
        before = tiny_processor.apply_chat_template(question(RED), **options)
        after = loaded.apply_chat_template(question(RED), **options)
        assert all(torch.equal(before[key], after[key]) for key in before)
    assert AutoImageProcessor.from_pretrained(tmp_path).background == [128, 128, 128]
    assert AutoTokenizer.from_pretrained(tmp_path).convert_tokens_to_ids("<image>") == tiny_model.config.image_token_id


def test_chat_template_is_chosen(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    assert choose_chat_template(tiny_tokenizer) == VICUNA
    tiny_tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"  # as most published ones: plain
    assert choose_chat_template(tiny_tokenizer) == VICUNA
    own = "{% for m in messages %}<image>{% generation %}{{ m['content'] }}{% endgeneration %}{% endfor %}"
    tiny_tokenizer.chat_template = own
    assert choose_chat_template(tiny_tokenizer) == own
    tiny_tokenizer.chat_template = None
    tiny_tokenizer.add_special_tokens({"eos_token": "<|im_end|>"})
    assert choose_chat_template(tiny_tokenizer) == CHATML
    tiny_tokenizer.eos_token = None
    with pytest.raises(ValueError, match="eos_token"):
        choose_chat_template(tiny_tokenizer)


def test_chatml(tiny_model: MoFForConditionalGeneration, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    processor = MoFProcessor.from_parts(tiny_model, tiny_tokenizer, chat_template=CHATML)
    chat = [{"role": "system", "content": "Be brief."}, *question(RED), {"role": "assistant", "content": "A cat."}]
    assert processor.apply_chat_template(chat, add_generation_prompt=True) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n<image>\nWhat?<|im_end|>\n"
        "<|im_start|>assistant\nA cat.<|im_end|>\n<|im_start|>assistant\n"
    )


def test_errors(tiny_processor: MoFProcessor, tiny_model: MoFForConditionalGeneration, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(ValueError, match="2 .*1 "):
        tiny_processor(images=[RED], text="<image><image>")
    with pytest.raises(ValueError, match="1 .*0 "):
        tiny_processor(text=["<image>", "none"])
    with pytest.raises(ValueError, match="missing.png"):
        tiny_processor(images="missing.png", text="<image>")
    tiny_model.config.image_token_id = 5
    with pytest.raises(ValueError, match="259 .*5 "):
        MoFProcessor.from_parts(tiny_model, tiny_tokenizer)


@pytest.mark.parametrize("post_processor", ENDS.values(), ids=ENDS)
def test_a_prompt_ends_where_the_answer_begins(
    post_processor: processors.PostProcessor, tiny_model: MoFForConditionalGeneration, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    """Some tokenizers put the end-of-sequence token behind every text; training has none between question and answer."""
    expected = MoFProcessor.from_parts(tiny_model, tiny_tokenizer).apply_chat_template(question(RED), **GENERATE)["input_ids"][0].tolist()
    tiny_tokenizer.backend_tokenizer.post_processor = post_processor
    assert tiny_tokenizer("a")["input_ids"][-1] == tiny_tokenizer.eos_token_id
    processor = MoFProcessor.from_parts(tiny_model, tiny_tokenizer)
    ids = processor.apply_chat_template(question(RED), **GENERATE)["input_ids"][0].tolist()
    assert ids in (expected, [tiny_tokenizer.bos_token_id, *expected])
    answered = [*question(RED), {"role": "assistant", "content": "Red."}]
    example = encode_record(processor, to_record({"messages": answered}))
    assert example.input_ids[: len(ids)].tolist() == ids and int(example.answer_mask.nonzero()[0]) == len(ids)
