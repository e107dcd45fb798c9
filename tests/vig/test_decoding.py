"""Each step of a contrast against two plain passes over the whole sequence, for our model and other classes of transformers."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.families import build
from support.two_passes import TOKENS, chats, encoder, next_logits, settings
from torch import Tensor
from transformers import StopStringCriteria
from transformers.generation import BaseStreamer

from vig.decoding import ICD, LACING, M3ID, PAI, VCD, Decoding, build_decoding

FAMILIES = ("llava", "llava_onevision", "qwen2_5_vl", "qwen3_vl", "idefics3", "internvl", "aya_vision", "paligemma", "gemma3", "ovis2")


def cut(scores: Tensor, logits: Tensor, beta: float) -> Tensor:
    p = logits.softmax(-1)
    return torch.where(p < beta * p.max(-1, keepdim=True).values, -torch.inf, scores)


def m3id(a: Tensor, b: Tensor, t: int) -> Tensor:
    kept = math.exp(-0.3 * t)
    return torch.where(a.softmax(-1).max(-1, keepdim=True).values < 0.4, a + (1 - kept) / kept * (a - b), a)


def pai(a: Tensor, b: Tensor, t: int) -> Tensor:
    p, u = a.log_softmax(-1), b.log_softmax(-1)
    return cut(2 * (p - u) + u, a, 0.1)


METHODS: dict[str, tuple[Decoding, Callable[[Tensor, Tensor, int], Tensor]]] = {
    "vcd": (VCD(), lambda a, b, t: cut(2 * a - b, a, 0.1)),
    "icd": (ICD(alpha=0.5, beta=0.2), lambda a, b, t: cut(1.5 * a - 0.5 * b, a, 0.2)),
    "m3id": (M3ID(decay=0.3), m3id),
    "pai": (PAI(alpha=0, gamma=2), pai),
    "lacing": (LACING(scale=2.5), lambda a, b, t: b + 2.5 * (a - b)),
}


def check(model: Any, processor: Any, method: Decoding, formula: Any, asked: list[Any], **options: Any) -> None:
    """Compare all rows of a batch with each record alone, so without padding."""
    encode = encoder(processor)
    inputs = encode(asked)
    output = model.generate(**inputs, **settings(processor), **method.options(asked, encode), **options)
    for row, chat in enumerate(asked):
        clean, null = encode([chat]), encode([method.null_chat(chat)])
        for step in range(TOKENS):
            start = inputs["input_ids"].shape[1]
            generated = output.sequences[row : row + 1, start : start + step]
            logits = next_logits(model, clean, generated)
            expected = formula(logits, next_logits(model, null, generated), step + 1)
            torch.testing.assert_close(output.logits[step][row : row + 1].double(), expected, atol=1e-4, rtol=1e-4)
            assert not torch.allclose(expected, logits)


@pytest.mark.parametrize("family", FAMILIES)
def test_vcd_in_other_families(family: str) -> None:
    model, processor = build(family)
    check(model, processor, *METHODS["vcd"], chats())


def test_vcd_where_images_are_no_tokens_of_the_text() -> None:
    model, processor = build("mllama")
    check(model, processor, *METHODS["vcd"], chats())


@pytest.mark.parametrize("method", list(METHODS))
@pytest.mark.parametrize("cached", [True, False])
def test_each_method_in_our_model(method: str, cached: bool, tiny_model: Any, tiny_processor: Any) -> None:
    check(tiny_model, tiny_processor, *METHODS[method], chats((1, 2)), use_cache=cached)


def test_a_static_cache(tiny_model: Any, tiny_processor: Any) -> None:
    check(tiny_model, tiny_processor, *METHODS["icd"], chats((1, 2)), cache_implementation="static")


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
@pytest.mark.parametrize("method", ["icd", "pai"])
def test_null_prompts_of_another_length(family: str, method: str) -> None:
    model, processor = build(family)
    check(model, processor, *METHODS[method], chats((1, 2)))


@pytest.mark.parametrize("family", ["ours", "llava", "qwen2_5_vl", "gemma3"])
@pytest.mark.parametrize("sample", [False, True])
def test_the_null_branch_follows_beams(family: str, sample: bool, tiny_model: Any, tiny_processor: Any) -> None:
    model, processor = (tiny_model, tiny_processor) if family == "ours" else build(family)
    method, formula = METHODS["m3id" if family == "ours" else "icd"]
    encode, asked = encoder(processor), chats()
    inputs = encode(asked)
    torch.manual_seed(0)
    options = {**settings(processor), "num_beams": 3, "num_return_sequences": 2, "do_sample": sample}
    output = model.generate(**inputs, **options, **method.options(asked, encode))
    assert len({tuple(beams) for beams in output.beam_indices.tolist()}) > 2  # beams crossed
    for row, (tokens, beams) in enumerate(zip(output.sequences, output.beam_indices, strict=True)):
        clean, null = encode([asked[row // 2]]), encode([method.null_chat(asked[row // 2])])
        for step, beam in enumerate(beams.tolist()):
            start = inputs["input_ids"].shape[1]
            generated = tokens[None, start : start + step]
            expected = formula(next_logits(model, clean, generated), next_logits(model, null, generated), step + 1)
            torch.testing.assert_close(output.logits[step][beam : beam + 1].double(), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    "text", ["vcd:alpha=0", "icd:alpha=0", "m3id:decay=0", "pai:alpha=0:gamma=1", "var:keep=1:first_layer=0", "lacing:scale=1"]
)
@pytest.mark.parametrize("search", [{}, {"do_sample": True}, {"num_beams": 2}, {"num_return_sequences": 3, "do_sample": True}])
def test_strength_0_is_plain_decoding(text: str, search: dict[str, Any], tiny_model: Any, tiny_processor: Any) -> None:
    encode, asked = encoder(tiny_processor), chats()
    inputs, options = encode(asked), {**settings(tiny_processor), **search}
    torch.manual_seed(3)
    plain = tiny_model.generate(**inputs, **options)
    torch.manual_seed(3)
    made = tiny_model.generate(**inputs, **options, **build_decoding(text).options(asked, encode))
    assert torch.equal(plain.sequences, made.sequences)
    assert all(map(torch.equal, plain.logits, made.logits))


def test_sampling_is_seeded_and_draws_from_the_contrast(tiny_model: Any, tiny_processor: Any) -> None:
    encode, asked, (method, _) = encoder(tiny_processor), chats(), METHODS["vcd"]
    options = {**settings(tiny_processor), "do_sample": True, "num_return_sequences": 4, "output_scores": True}
    drawn = []
    for _ in range(2):
        torch.manual_seed(7)
        drawn.append(tiny_model.generate(**encode(asked), **options, **method.options(asked, encode)))
    assert torch.equal(drawn[0].sequences, drawn[1].sequences)
    for step, scores in enumerate(drawn[0].scores):
        tokens = drawn[0].sequences[:, step - TOKENS]
        assert scores.gather(1, tokens[:, None]).isfinite().all()  # no token below the cut


class Heard(BaseStreamer):
    """Keeps the tokens that it is told."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.ended = False

    def put(self, value: Tensor) -> None:
        self.tokens += value.flatten().tolist()

    def end(self) -> None:
        self.ended = True


@pytest.mark.parametrize("method", [VCD(), VCD(alpha=0), PAI(gamma=1, first_layer=0)], ids=["contrast", "plain", "attention"])
def test_a_streamer_hears_the_answer(method: Decoding, tiny_model: Any, tiny_processor: Any) -> None:
    encode, asked, heard = encoder(tiny_processor), chats((1,)), Heard()
    made = tiny_model.generate(**encode(asked), **settings(tiny_processor), **method.options(asked, encode), streamer=heard)
    assert heard.tokens == made.sequences[0].tolist() and heard.ended


def test_arguments_that_transformers_keeps_back(tiny_model: Any, tiny_processor: Any) -> None:
    encode, asked, words = encoder(tiny_processor), chats((1,)), tiny_processor.tokenizer
    arguments = {**encode(asked), **settings(tiny_processor), **VCD(alpha=0).options(asked, encode)}
    for further, said in (
        ({"stop_strings": ["a"], "tokenizer": words}, r"vcd.*stop_strings=\['a'\].*StopStringCriteria"),
        ({"assistant_model": tiny_model}, "vcd.*assisted_generation"),
        ({"prompt_lookup_num_tokens": 2}, "vcd.*assisted_generation"),
        ({"streamer": Heard(), "num_beams": 2}, "streamer.*beam"),
    ):
        with pytest.raises(ValueError, match=said):
            tiny_model.generate(**arguments, **further)
    made = tiny_model.generate(**arguments)
    strings = sorted(set(words.decode(made.sequences[0, -TOKENS:])))
    plain = tiny_model.generate(**encode(asked), **settings(tiny_processor), stop_strings=strings, tokenizer=words)
    stopped = tiny_model.generate(**arguments, stopping_criteria=[StopStringCriteria(words, strings)])
    assert torch.equal(stopped.sequences, plain.sequences) and not torch.equal(stopped.sequences, made.sequences)


def test_several_turns(tiny_model: Any, tiny_processor: Any) -> None:
    encode, (asked, _), (method, _) = encoder(tiny_processor), chats(), METHODS["vcd"]
    first = tiny_model.generate(**encode([asked]), **settings(tiny_processor), **method.options([asked], encode))
    answer = tiny_processor.decode(first.sequences[0, -TOKENS:])
    longer = [*asked, {"role": "assistant", "content": [{"type": "text", "text": answer}]}]
    longer.append({"role": "user", "content": [{"type": "text", "text": "And now?"}]})
    check(tiny_model, tiny_processor, *METHODS["vcd"], [longer])


def test_qwen_forgets_the_null_prompts_places() -> None:
    model, processor = build("qwen2_5_vl")
    encode, asked = encoder(processor), chats((1,))
    model.generate(**encode(asked), **settings(processor))
    plain = model.model.rope_deltas
    model.generate(**encode(asked), **settings(processor), **METHODS["pai"][0].options(asked, encode))
    assert torch.equal(model.model.rope_deltas, plain)


def test_refusals(tiny_model: Any, tiny_processor: Any) -> None:
    encode, asked = encoder(tiny_processor), chats()
    inputs, options = encode(asked), settings(tiny_processor)
    with pytest.raises(ValueError, match="vcd.*null_inputs"):
        tiny_model.generate(**inputs, **options, custom_generate=VCD())
    with pytest.raises(ValueError, match="1 rows.*2"):
        tiny_model.generate(**inputs, **options, custom_generate=VCD(), null_inputs=encode(asked[:1]))
    for text, said in {
        "vcdd": "'vcdd'.*vcd, icd", "vcd:alpa=1": "alpa=1.*alpha", "vcd:alpha=x": "alpha.*'x'", "vcd:alpha=-1": "alpha.*-1",
        "vcd:null=shuffle": "'shuffle'.*blur", "vcd:alpha": "alpha", "m3id:decay=nan": "nan", "vcd:seed=1.5": "seed.*int",
    }.items():  # fmt: skip
        with pytest.raises(ValueError, match=said):
            build_decoding(text)
    assert str(build_decoding("vcd:alpha=0.5")) == "vcd:null=diffusion:seed=0:alpha=0.5:beta=0.1"
    assert build_decoding(str(M3ID(decay=0.1))) == M3ID(decay=0.1)
    blip2, processor = build("blip2")
    inputs = encoder(processor)(asked[:1])
    with pytest.raises(ValueError, match="OPTForCausalLM does not take pixel_values"):
        blip2.generate(**inputs, max_new_tokens=2, custom_generate=VCD(), null_inputs=inputs)
    text_only = [{"role": "user", "content": [{"type": "text", "text": "Which?"}]}]
    assert VCD().options([text_only], encode) == {}
