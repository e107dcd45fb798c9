"""The page that explains an answer: contrasts and attention against plain passes, and the page in a browser."""

from __future__ import annotations

import copy
import html
import json
import re
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from support.commands import mof
from support.families import build
from support.tiny import build_model, build_tokenizer
from support.two_passes import TOKENS, chats, encoder, next_logits, settings
from transformers import AutoModelForCausalLM, GenerationConfig, MambaConfig

from encoders.terminal import plain
from mof import MoFProcessor
from mof.chat_templates import VICUNA
from vig import score
from vig.decoding import PAI, VAR, VCD, Decoding, build_decoding
from vig.report.encoder_parts import encoder_parts
from vig.report.explanation import UNIT, Explanation, explain, write_explanation

METHODS = {"vcd": VCD(null="noise", alpha=3.0), "pai": PAI(alpha=0.7, gamma=2, first_layer=1), "var": VAR(tau=2, first_layer=0, mass=0)}


def quiet(model: Any, processor: Any) -> None:
    """Let the model answer by five ordinary tokens."""
    options = settings(processor)
    model.generation_config = GenerationConfig(**{name: options[name] for name in ("suppress_tokens", "eos_token_id", "pad_token_id")})


def attention(model: Any, inputs: Any, generated: torch.Tensor) -> torch.Tensor:
    """Mean attention [P] of a plain eager pass from the last token to the prompt."""
    other = copy.deepcopy(model)
    for config in (other.config.get_text_config(decoder=True), *(m.config for m in other.modules() if getattr(m, "config", None))):
        config._attn_implementation = "eager"
    grown = dict(inputs) | {"input_ids": torch.cat([inputs["input_ids"], generated], dim=1)}
    grown["attention_mask"] = torch.ones_like(grown["input_ids"])
    if "mm_token_type_ids" in grown:
        grown["mm_token_type_ids"] = torch.cat([inputs["mm_token_type_ids"], torch.zeros_like(generated)], dim=1)
    with torch.no_grad():
        layers = other(**grown, output_attentions=True, use_cache=False).attentions
    return torch.stack([layer[0, :, -1].mean(0) for layer in layers]).mean(0)[: inputs["input_ids"].shape[1]]


@pytest.mark.parametrize("method", list(METHODS))
@pytest.mark.parametrize("family", ["ours", "llava", "qwen2_5_vl"])
def test_contrasts_and_attention(family: str, method: str, tiny_model: Any, tiny_processor: Any) -> None:
    model, processor = (tiny_model, tiny_processor) if family == "ours" else build(family)
    quiet(model, processor)
    encode, (chat,), chosen = encoder(processor), chats((1,)), METHODS[method]
    inputs = encode([chat])
    null = encode([(chosen if method != "var" else VCD(null="blur")).null_chat(chat)])
    explanation = explain(model, processor, chat, chosen, max_new_tokens=TOKENS)
    assert (explanation.question, len(explanation.answers)) == (chat[0]["content"][1]["text"], 2)
    for answer, options in zip(explanation.answers, ({}, chosen.options([chat], encode)), strict=True):
        ids = model.generate(**inputs, **options, do_sample=False, max_new_tokens=TOKENS)[:, -TOKENS:]
        assert "".join(token.text for token in answer.tokens) == processor.tokenizer.decode(ids[0])
        if answer.decoding == "greedy":
            for step, token in enumerate(answer.tokens):
                losses = [-next_logits(model, branch, ids[:, :step]).log_softmax(-1)[0, ids[0, step]] for branch in (inputs, null)]
                assert token.contrast == pytest.approx(float(losses[1] - losses[0]), abs=1e-4)
            check_attention(explanation, model, inputs, ids)


def check_attention(explanation: Explanation, model: Any, inputs: Any, ids: torch.Tensor) -> None:
    image = (inputs["input_ids"][0] == model.config.image_token_id).nonzero().flatten()
    places = {1: [image], 2: [image[0::2], image[1::2]], 0: []}[len(explanation.panels)]
    answer = explanation.answers[0]
    for step, token in enumerate(answer.tokens):
        expected = attention(model, inputs, ids[:, :step])
        for look, place in zip(token.looks, places, strict=True):
            assert torch.tensor(look) * UNIT == pytest.approx(expected[place], abs=2 * UNIT)
    for share, looks in zip(answer.shares, zip(*(token.looks for token in answer.tokens), strict=True), strict=True):
        assert share == pytest.approx(sum(map(sum, looks)) * UNIT / TOKENS, abs=1e-3)


def test_the_parts_of_encoders_are_their_vig(tiny_model: Any, tiny_processor: Any, tmp_path: Path) -> None:
    """`vig.score` with per_encoder goes another way to the same numbers."""
    (chat,), encode = chats((1,)), encoder(tiny_processor)
    record = {"id": "own", "messages": [*chat, {"role": "assistant", "content": [{"type": "text", "text": "Red."}]}]}
    (scored,) = score(tiny_model, tiny_processor, [record], tmp_path / "scores", per_encoder=True)
    inputs, null, ids = encode([chat]), encode([VCD(null="blur").null_chat(chat)]), torch.tensor(scored.token_ids)
    losses = [-next_logits(tiny_model, inputs, ids[None, :step]).log_softmax(-1)[0, token] for step, token in enumerate(ids)]
    parts = encoder_parts(tiny_model, inputs, null, ids, torch.stack(losses))
    assert list(parts) == list(tiny_model.mixer.encoders)
    for name, values in parts.items():
        assert values == pytest.approx(scored.encoder_vig[name].tolist(), abs=1e-4)
    quiet(tiny_model, tiny_processor)
    (answer,) = explain(tiny_model, tiny_processor, chat, max_new_tokens=3).answers
    assert {name: len(values) for name, values in answer.by_encoder.items()} == dict.fromkeys(parts, 3)


@pytest.mark.parametrize("method", [VCD(null="drop"), build_decoding("icd")], ids=["drop", "same"])
def test_null_images_that_no_encoder_could_see_have_no_parts(method: Decoding, tiny_model: Any, tiny_processor: Any) -> None:
    quiet(tiny_model, tiny_processor)
    assert all(answer.by_encoder == {} for answer in explain(tiny_model, tiny_processor, chats((1,))[0], method, max_new_tokens=2).answers)


def test_panels(tiny_model: Any, tiny_processor: Any) -> None:
    (chat,) = chats((2,))
    quiet(tiny_model, tiny_processor)
    explanation = explain(tiny_model, tiny_processor, chat, max_new_tokens=2)
    encoders = list(tiny_model.mixer.encoders)
    assert [panel.encoder for panel in explanation.panels] == 2 * encoders and len(explanation.answers) == 1
    assert len(set(explanation.pictures)) == 2
    looks = explanation.answers[0].tokens[0].looks
    assert [len(look) for look in looks] == [panel.grid[0] * panel.grid[1] for panel in explanation.panels]
    assert explanation.panels[0].picture == explanation.panels[1].picture != explanation.panels[2].picture
    llava, processor = build("llava")
    assert [panel.encoder for panel in explain(llava, processor, chats((1,))[0], max_new_tokens=2).panels] == ["the image"]


@pytest.mark.parametrize("family", ["idefics3", "mllama"])
def test_images_in_tiles_or_aside_are_not_drawn(family: str) -> None:
    model, processor = build(family)
    quiet(model, processor)
    explanation = explain(model, processor, chats((1,))[0], max_new_tokens=3)
    assert explanation.panels == [] and len(explanation.answers[0].tokens) == 3


def test_attention_that_cannot_be_seen_is_not_drawn() -> None:
    """Mamba has none."""
    words, sizes = build_tokenizer(), {"vocab_size": 300, "hidden_size": 32, "state_size": 8, "num_hidden_layers": 2, "pad_token_id": 0}
    model = build_model(words, AutoModelForCausalLM.from_config(MambaConfig(**sizes, initializer_range=0.3)).eval())
    processor = MoFProcessor.from_parts(model, words, chat_template=VICUNA)
    quiet(model, processor)
    explanation = explain(model, processor, chats((1,))[0], VCD(null="noise"), max_new_tokens=3)
    assert explanation.panels == [] and [len(answer.tokens) for answer in explanation.answers] == [3, 3]
    with pytest.raises(ValueError, match="pai.*mamba"):
        explain(model, processor, chats((1,))[0], PAI(first_layer=0), max_new_tokens=3)


def test_what_is_left_behind_and_refused(tiny_model: Any, tiny_processor: Any) -> None:
    (chat,) = chats((1,))
    names = [getattr(getattr(module, "config", None), "_attn_implementation", None) for module in tiny_model.modules()]
    stop = tiny_model.language_model.lm_head.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        explain(tiny_model, tiny_processor, chat)
    stop.remove()
    assert names == [getattr(getattr(module, "config", None), "_attn_implementation", None) for module in tiny_model.modules()]
    with pytest.raises(ValueError, match="no image"):
        explain(tiny_model, tiny_processor, [{"role": "user", "content": "Hello?"}])


@pytest.mark.slow
@pytest.mark.browser
def test_the_page_in_a_browser(browser: Any, tiny_model: Any, tiny_processor: Any, tmp_path: Path) -> None:
    (chat,), errors = chats((1,)), []
    chat[0]["content"][1]["text"] = "Which <b>& </script>one?"
    quiet(tiny_model, tiny_processor)
    write_explanation(tmp_path / "page.html", tiny_model, tiny_processor, chat, METHODS["vcd"], model_name="tiny", max_new_tokens=TOKENS)
    drawn = "[...document.querySelectorAll('canvas')].map(canvas => canvas.toDataURL())"
    page = browser.new_page(viewport={"width": 390, "height": 800})
    page.on("pageerror", lambda error: errors.append(error))
    page.goto(f"file://{tmp_path}/page.html")
    mean = page.evaluate(drawn)
    page.locator(".given >> nth=0 >> .t >> nth=0").hover()
    token, shown = page.evaluate(drawn), page.locator(".t.shown").count()
    page.mouse.move(0, 0)
    again, width = page.evaluate(drawn), page.evaluate("document.documentElement.scrollWidth")
    question = page.locator(".question").text_content()
    page.close()
    assert not errors and width == 390 and question == "Which <b>& </script>one?"
    assert len(mean) == 4 and len(set(mean)) > 1 and shown == 1 and again == mean
    assert token[:2] != mean[:2] and token[2:] == mean[2:]


@pytest.fixture
def folder(tmp_path: Path, tiny_model: Any, tiny_processor: Any) -> Path:
    """model/, photo.png and records.json."""
    quiet(tiny_model, tiny_processor)
    tiny_model.save_pretrained(tmp_path / "model")
    tiny_processor.save_pretrained(tmp_path / "model")
    chats((1,))[0][0]["content"][0]["image"].save(tmp_path / "photo.png")
    turns = [{"from": "human", "value": "<image>\nColour?"}, {"from": "gpt", "value": "Red."}, {"from": "human", "value": "Else?"}]
    records = [{"id": name, "image": "photo.png", "conversations": [*turns, {"from": "gpt", "value": name}]} for name in "abcd"]
    (tmp_path / "records.json").write_text(json.dumps(records))
    return tmp_path


@pytest.mark.parametrize("decoding", [None, VCD(null="noise", alpha=3.0)])
def test_chat_writes_the_page(folder: Path, decoding: Decoding | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mof.cli.chat.load_explainer", lambda: write_explanation)
    monkeypatch.setattr("mof.cli.chat.load_decoding", lambda text: decoding)
    asked = ("chat", "--model", folder / "model", "--image", folder / "photo.png", "--max-new-tokens", "5", "--decoding", "any")
    run = mof(*asked, "--explain", folder / "page.html", "Colour?")
    assert run.exit_code == 0, run.output
    page = (folder / "page.html").read_text()
    given = re.findall(r'<p class="answer">(.*?)</p>', page)
    texts = [re.sub("<[^>]*>", "", answer) for answer in given]
    assert len(texts) == (1 if decoding is None else 2) and "Colour?" in page
    assert plain(html.unescape(texts[-1])).strip() == run.stdout.strip()
    for words in (("Colour?",), ("--image", folder / "photo.png")):
        refused = mof("chat", "--model", folder / "model", "--explain", folder / "no.html", *words)
        assert refused.exit_code == 2 and "--image" in refused.output and not (folder / "no.html").exists()


def test_the_report_explains_the_outermost_records(
    folder: Path, tiny_model: Any, tiny_processor: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vig.report.page.EXPLAINED", 1)
    monkeypatch.setattr("vig.report.explanation.explain", partial(explain, max_new_tokens=3))
    score(tiny_model, tiny_processor, json.loads((folder / "records.json").read_text()), folder / "scores", image_folder=folder)
    inputs = ("--records", folder / "records.json", "--images", folder, "-o", folder / "page.html")
    run = mof("vig", "report", folder / "scores", *inputs, "--model", folder / "model", "--decoding", "vcd:null=noise")
    assert run.exit_code == 0, run.output
    page = (folder / "page.html").read_text().replace("<wbr>", "")  # a line may break behind a colon
    assert page.count('class="card explained"') == 2 and page.count("vcd:null=noise:seed=0:alpha=1.0:beta=0.1") == 3
    refused = mof("vig", "report", folder / "scores", *inputs, "--decoding", "vcd")
    assert refused.exit_code == 2 and "--model" in refused.output
