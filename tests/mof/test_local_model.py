"""Models in this process: ours, LLaVA and InstructBLIP, all tiny and random."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from support.tiny import TinyEncoder, build_llm
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    InstructBlipConfig,
    InstructBlipForConditionalGeneration,
    InstructBlipProcessor,
    InstructBlipQFormerConfig,
    InstructBlipVisionConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from mof import MoFForConditionalGeneration, MoFProcessor
from mof.chat_templates import VICUNA
from mof.data.collator import SupervisedCollator
from mof.data.records import RecordError
from mof.evals.answerers import LocalModel
from mof.evals.answering import Answer, Prompt

TWO = [{"type": "image"}, {"type": "image"}, {"type": "text", "text": "Which?"}]
OPTIONS = ("(a)", "(b) or longer")


def answers_of(asked: LocalModel, prompts: list[Prompt]) -> list[Answer]:
    answers = dict(asked.answer(prompts))
    return [answers[i] for i in range(len(prompts))]


@pytest.fixture
def prompts() -> list[Prompt]:
    rng = np.random.default_rng(0)
    images = [Image.fromarray(rng.integers(0, 256, (20 + i, 30, 3), dtype=np.uint8)) for i in range(7)]
    return [Prompt.about(str(i), image, "Which? " + "really " * i, OPTIONS) for i, image in enumerate(images)]


@pytest.fixture
def llava(tiny_tokenizer: PreTrainedTokenizerFast) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    tiny_tokenizer.add_tokens(["<image>"], special_tokens=True)
    text = build_llm(tiny_tokenizer).config
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=14
    )
    image_token = tiny_tokenizer.convert_tokens_to_ids("<image>")
    model = LlavaForConditionalGeneration(LlavaConfig(vision_config=vision, text_config=text, image_token_index=image_token))
    model.generation_config.update(eos_token_id=2, pad_token_id=0, do_sample=True, temperature=0.2, repetition_penalty=1.3)
    images = CLIPImageProcessor(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    processor = LlavaProcessor(
        images, tiny_tokenizer, patch_size=14, vision_feature_select_strategy="default", num_additional_image_tokens=1, chat_template=VICUNA
    )
    return model.eval(), processor


@pytest.fixture(params=["ours", "llava"])
def make(request: pytest.FixtureRequest) -> Callable[..., LocalModel]:
    if request.param == "ours":
        parts = request.getfixturevalue("tiny_model"), request.getfixturevalue("tiny_processor")
    else:
        parts = request.getfixturevalue("llava")
    return lambda **options: LocalModel(*parts, "tiny", **{"max_new_tokens": 12} | options)


def test_a_broken_image_costs_its_own_prompt(make: Callable[..., LocalModel], prompts: list[Prompt], tmp_path: Path) -> None:
    (tmp_path / "broken.png").write_bytes(b"no image")
    broken = Prompt.about("broken", str(tmp_path / "broken.png"), "Which?", OPTIONS)
    asked = make(batch_size=3)
    answers = answers_of(asked, [prompts[0], broken, prompts[1]])
    assert answers[1].text == "" and "broken.png" in str(answers[1].error)
    assert [answers[0].text, answers[2].text] == [answer.text for answer in answers_of(asked, prompts[:2])]
    assert answers[0].log_likelihoods and answers[1].log_likelihoods is None


def test_a_template_or_processor_that_raises_costs_its_own_prompt(
    make: Callable[..., LocalModel], prompts: list[Prompt], monkeypatch
) -> None:
    asked = make(batch_size=4)
    expected = answers_of(asked, [prompts[0], prompts[3]])
    processor = asked.processor
    template = processor.chat_template
    processor.chat_template = (
        "{% for message in messages %}{% for part in message.content %}{% if 'really really' in (part.text or '') and "
        "'really really really' not in part.text %}{{ raise_exception('no twice') }}{% endif %}{% endfor %}{% endfor %}" + template
    )
    image_processor, refused = type(processor.image_processor), prompts[1].images[0].size
    sound = image_processor.__call__

    def call(self, images, *args, **options):
        if "size={}x{} ".format(*refused) in repr(images):
            raise OverflowError("no such size")
        return sound(self, images, *args, **options)

    monkeypatch.setattr(image_processor, "__call__", call)
    answers = answers_of(asked, prompts[:4])
    assert [answers[0], answers[3]] == expected
    assert "no such size" in str(answers[1].error) and "no twice" in str(answers[2].error)


def test_weights_that_are_not_finite_are_refused_by_name(
    tmp_path: Path, tiny_model: MoFForConditionalGeneration, tiny_processor: MoFProcessor
) -> None:
    with torch.no_grad():
        tiny_model.get_output_embeddings().weight[0, 0] = float("nan")
    tiny_model.save_pretrained(tmp_path)
    tiny_processor.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"(lm_head|embed_tokens).*not finite"):
        LocalModel.load(tmp_path)


def test_options_without_a_likelihood_cost_their_own_prompt(make: Callable[..., LocalModel], prompts: list[Prompt]) -> None:
    asked = make(batch_size=2)
    head = asked.model.get_output_embeddings()
    head.register_forward_hook(lambda module, inputs, logits: torch.where(torch.tensor(len(logits) == len(OPTIONS)), torch.nan, logits))
    options, free = answers_of(asked, [prompts[0], dataclasses.replace(prompts[0], id="free", options=())])
    assert "NaN" in str(options.error) and options.log_likelihoods is None
    assert free.error is None


def test_the_batch_size_changes_no_answer(make: Callable[..., LocalModel], prompts: list[Prompt]) -> None:
    alone = answers_of(make(batch_size=1), prompts)
    assert len({answer.text for answer in alone}) > 1  # the model tells the prompts apart
    for size in (2, 3, 7, 50):
        many = answers_of(make(batch_size=size), prompts)
        assert [answer.text for answer in many] == [answer.text for answer in alone]
        assert [answer.input_tokens for answer in many] == [answer.input_tokens for answer in alone]
        for a, b in zip(alone, many, strict=True):
            assert a.log_likelihoods == pytest.approx(b.log_likelihoods, abs=1e-4)


def test_greedy_word_by_word(make: Callable[..., LocalModel], prompts: list[Prompt]) -> None:
    """What `generate` says is what the likeliest next token makes, without cache, padding, penalties or batches."""
    asked = make()
    tokenizer = asked.processor.tokenizer
    for prompt, answer in zip(prompts[:3], answers_of(asked, prompts[:3]), strict=True):
        inputs = plain_inputs(asked, prompt, "")
        suppressed = asked.model.generation_config.suppress_tokens or []
        new: list[int] = []
        while len(new) < 12 and 2 not in new:
            logits = asked.model(**inputs).logits[0, -1]
            logits[suppressed] = -torch.inf
            new.append(int(logits.argmax()))
            inputs["input_ids"] = torch.cat([inputs["input_ids"], torch.tensor([new[-1:]])], dim=1)
            inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        assert answer.text == tokenizer.decode(new, skip_special_tokens=True).strip()
        assert answer.output_tokens == len(new) - new.count(0)


def plain_inputs(asked: LocalModel, prompt: Prompt, answer: str) -> dict[str, torch.Tensor]:
    """VICUNA's words by hand."""
    text = "USER: <image>\n" + prompt.messages[0]["content"][1]["text"] + " ASSISTANT:" + answer
    inputs = dict(asked.processor(text=[text], images=[image.convert("RGB") for image in prompt.images], return_tensors="pt"))
    return {key: value for key, value in inputs.items() if key != "token_type_ids"}


def test_log_likelihoods_are_those_of_the_whole_sequence(make: Callable[..., LocalModel], prompts: list[Prompt]) -> None:
    asked = make()
    for prompt, answer in zip(prompts, answers_of(asked, prompts), strict=True):
        start = plain_inputs(asked, prompt, "")["input_ids"].shape[1]
        expected = []
        for option in OPTIONS:
            inputs = plain_inputs(asked, prompt, f" {option}")
            with torch.no_grad():
                scores = asked.model(**inputs).logits[0].log_softmax(-1)  # [L, V]
            ids = inputs["input_ids"][0]
            assert asked.processor.tokenizer.decode(ids[start:]) == f" {option}"
            expected.append(sum(float(scores[i - 1, ids[i]]) for i in range(start, len(ids))))
        assert answer.log_likelihoods == pytest.approx(expected, abs=1e-3)


def test_no_options_no_likelihoods(make: Callable[..., LocalModel]) -> None:
    [answer] = answers_of(make(), [Prompt.about("1", Image.new("RGB", (20, 20)), "What?")])
    assert answer.log_likelihoods is None


def test_a_saved_model_is_loaded_and_known_by_its_weights_and_files(
    tiny_folder: Path, tmp_path: Path, tiny_model: MoFForConditionalGeneration, tiny_processor: MoFProcessor, prompts: list[Prompt]
) -> None:
    loaded = LocalModel.load(tmp_path / "model", max_new_tokens=12)
    expected = answers_of(LocalModel(tiny_model, tiny_processor, "tiny", max_new_tokens=12), prompts)
    assert [answer.text for answer in answers_of(loaded, prompts)] == [answer.text for answer in expected]
    assert loaded.settings == LocalModel.load(tmp_path / "model", batch_size=3, max_new_tokens=12).settings
    folder = shutil.copytree(tmp_path / "model", tmp_path / "moved")
    assert loaded.settings == LocalModel.load(folder, max_new_tokens=12).settings
    edited = MoFProcessor.from_pretrained(folder)
    edited.chat_template += " "
    edited.save_pretrained(folder)
    assert loaded.settings != LocalModel.load(folder, max_new_tokens=12).settings
    with torch.no_grad():
        tiny_model.get_output_embeddings().weight[0, 0] += 1
    tiny_model.save_pretrained(tmp_path / "model")
    assert loaded.settings != LocalModel.load(tmp_path / "model", max_new_tokens=12).settings


def test_weights_of_encoders_by_reference_are_part_of_the_identity(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_model: MoFForConditionalGeneration, tiny_processor: MoFProcessor
) -> None:
    tiny_model.save_pretrained(tmp_path)
    tiny_processor.save_pretrained(tmp_path)
    before = LocalModel.load(tmp_path).settings
    genuine = TinyEncoder.__init__

    def retrained(self: TinyEncoder, **options: Any) -> None:
        genuine(self, **options | {"seed": options["seed"] + 10})

    monkeypatch.setattr(TinyEncoder, "__init__", retrained)
    assert LocalModel.load(tmp_path).settings != before


def test_what_is_no_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"config\.json"):
        LocalModel.load(tmp_path / "none")


def test_an_instruct_blip_has_no_chat_template(tiny_tokenizer: PreTrainedTokenizerFast, prompts: list[Prompt]) -> None:
    tiny_tokenizer.add_tokens(["<image>"], special_tokens=True)
    text = build_llm(tiny_tokenizer).config
    small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision = InstructBlipVisionConfig(**small, image_size=28, patch_size=14)
    qformer = InstructBlipQFormerConfig(**small, vocab_size=len(tiny_tokenizer), encoder_hidden_size=16, cross_attention_frequency=1)
    config = InstructBlipConfig(
        vision_config=vision, qformer_config=qformer, text_config=text, num_query_tokens=3,
        image_token_index=tiny_tokenizer.convert_tokens_to_ids("<image>"),
    )  # fmt: skip
    model = InstructBlipForConditionalGeneration(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    images = CLIPImageProcessor(size={"height": 28, "width": 28}, do_center_crop=False)
    processor = InstructBlipProcessor(images, tiny_tokenizer, qformer_tokenizer=tiny_tokenizer, num_query_tokens=3)
    alone = answers_of(LocalModel(model, processor, "blip", batch_size=1, max_new_tokens=12), prompts)
    many = answers_of(LocalModel(model, processor, "blip", batch_size=4, max_new_tokens=12), prompts)
    assert len({answer.text for answer in alone}) > 1
    assert [answer.text for answer in many] == [answer.text for answer in alone]
    assert not any("Which?" in answer.text for answer in alone)  # the prompt is not given back
    none, two = Prompt.about("none", None, "Which?"), Prompt("two", [{"role": "user", "content": TWO}], [p.images[0] for p in prompts[:2]])
    mixed = answers_of(LocalModel(model, processor, "blip", batch_size=4, max_new_tokens=12), [none, prompts[0], two, prompts[1]])
    assert mixed[0].error and mixed[2].error and [mixed[1].text, mixed[3].text] == [alone[0].text, alone[1].text]
    processor.chat_template = VICUNA
    for count in (0, 2):
        content = [*({"type": "image"},) * count, {"type": "text", "text": "Which?"}]
        turns = [{"role": "user", "content": content}, {"role": "assistant", "content": [{"type": "text", "text": "This."}]}]
        with pytest.raises(RecordError, match=f"'many' has {count} images, but InstructBlipProcessor takes one image"):
            SupervisedCollator(processor, strict=True)([{"id": "many", "images": two.images[:count], "messages": turns}])
