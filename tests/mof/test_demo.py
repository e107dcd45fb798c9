"""The page of `mof demo`: answers and comparisons over HTTP, the encoders of several kinds of models, and the page in a browser."""

from __future__ import annotations

import base64
import html
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from support.annotation_folder import TOKEN, ask, port_of, running
from support.commands import mof
from support.families import build
from support.pictures import encoded, noise
from support.tiny_llava import build_llava
from torch.nn.functional import cosine_similarity
from transformers import GenerationConfig

from encoders import build_encoder
from mof import InterleavedMoF, MoFForConditionalGeneration
from mof.demo import LONGEST_QUESTION, Demo, DemoServer, own_encoders
from mof.pairs.image_collection import encode_collection
from vig.report.explanation import explain, write_explanation


def given(image: Image.Image | bytes, name: str = "photo.png") -> dict[str, str]:
    data = image if isinstance(image, bytes) else encoded(image)
    return {"name": name, "content": base64.b64encode(data).decode()}


def demo_of(model: Any, processor: Any, **options: Any) -> Demo:
    """Return the demo of a model that answers by letters."""
    texts = map(processor.tokenizer.decode, range(len(processor.tokenizer)))
    silent = [token for token, text in enumerate(texts) if not (text.isascii() and text.isalpha())]
    model.generation_config = GenerationConfig(suppress_tokens=silent, eos_token_id=2, pad_token_id=0)
    return Demo(model, processor, write_explanation, own_encoders(model, processor), max_new_tokens=4, name="runs/<tiny>", **options)


@pytest.fixture
def server(tiny_model: Any, tiny_processor: Any) -> Iterator[DemoServer]:
    server = DemoServer(demo_of(tiny_model, tiny_processor), token=TOKEN)
    with running(server):
        yield server


def test_an_answer_is_explained(server: DemoServer, tiny_model: Any, tiny_processor: Any) -> None:
    image, question = noise(0), "Is the <b>door</b> open?"
    status, page, _ = ask(port_of(server), "/ask", {"question": f" {question} ", "image": given(image)})
    assert status == 200
    (shown,) = re.findall(r'<p class="answer">(.*?)</p>', page.decode())
    chat = [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": question}]}]
    expected = explain(tiny_model, tiny_processor, chat, max_new_tokens=4)
    texts = [html.unescape(text) for text in re.findall(r'nats">([^<]*)</span>', shown)]
    assert texts == [token.text for token in expected.answers[0].tokens]
    assert html.escape(question) in page.decode() and page.count(b"<canvas") == 2


@pytest.mark.parametrize("above", [-0.5, 0.9999])
def test_two_images_are_compared_as_by_mof_blind_pairs(tmp_path: Path, tiny_model: Any, tiny_processor: Any, above: float) -> None:
    images = [noise(1), noise(2)]
    for place, image in enumerate(images):
        image.save(tmp_path / f"{place}.png")
    collection = encode_collection(tmp_path, ["tiny-a"], ["tiny-b"], tmp_path / "store")
    alike = [float(rows[0] @ rows[1]) for rows in (collection.clips[0], collection.dinos[0])]
    demo = demo_of(tiny_model, tiny_processor, clip_above=above, dino_below=1.0)
    demo.encoders = {"a": build_encoder("tiny-a"), "b": build_encoder("tiny-b")}  # a mixer's take another size
    seen = demo.compare({"images": [given(image) for image in images]})
    assert [encoder["similarity"] for encoder in seen["encoders"]] == pytest.approx(alike, abs=1e-5)
    assert seen["blind"] == ([("a", "b"), ("b", "a")] if above < 0 else []) and not seen["copies"]
    assert {encoder["sees"] for encoder in seen["encoders"]} == {"takes them for the same" if above < 0 else "sees two different images"}


def test_two_copies_of_a_picture_are_told(server: DemoServer) -> None:
    image = noise(3, (64, 64)).resize((256, 256))
    smaller = image.resize((128, 128))
    assert ask(port_of(server), "/compare", {"images": [given(image), given(smaller)]})[1]["copies"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("path", "body", "status", "reason"),
    [
        ("/ask", {"question": "Colour?", "image": given(b"nothing", "cat.png")}, 422, "cat.png"),
        ("/ask", {"question": "Colour?", "image": given(encoded(noise(0))[:500], "torn.png")}, 422, "torn.png"),
        ("/ask", {"question": "Colour?", "image": given(b"", "empty.png")}, 422, "empty.png: the file is empty"),
        ("/ask", {"question": "Colour?", "image": {"name": "x", "content": "no base64!"}}, 400, "base64"),
        ("/ask", {"question": "Colour?", "image": "/etc/passwd"}, 400, "name"),
        ("/ask", {"question": "Colour?"}, 400, "name"),
        ("/ask", {"question": "  ", "image": given(noise(0))}, 400, "question"),
        ("/ask", {"question": "x" * (LONGEST_QUESTION + 1), "image": given(noise(0))}, 400, "10,001"),
        ("/ask", [], 400, "question"),
        ("/compare", {"images": [given(noise(0))]}, 400, "two images, got 1"),
        ("/compare", {"images": [given(noise(0)), given(b"GIF89a", "b.gif")]}, 422, "b.gif"),
        ("/compare", {}, 400, "images"),
        ("/nowhere", {}, 404, "nowhere"),
    ],
)
def test_what_cannot_be_answered_is_told(server: DemoServer, path: str, body: Any, status: int, reason: str) -> None:
    given_status, reply, _ = ask(port_of(server), path, body)
    assert given_status == status and reason in reply["error"]


def test_images_have_the_limits_of_all_images(monkeypatch: pytest.MonkeyPatch, tiny_model: Any, tiny_processor: Any) -> None:
    monkeypatch.setenv("MOF_MAX_IMAGE_PIXELS", "100")
    with pytest.raises(ValueError, match=r"photo\.png: its 40 x 32 pixels"):
        demo_of(tiny_model, tiny_processor).compare({"images": [given(noise(0)), given(noise(1))]})
    monkeypatch.setenv("MOF_MAX_IMAGE_BYTES", "1000")
    server = DemoServer(demo_of(tiny_model, tiny_processor), token=TOKEN)
    with running(server):
        status, reply, _ = ask(port_of(server), "/compare", {"images": [given(bytes(40_000))] * 2})
    assert status == 400 and "expected at most" in reply["error"]


def test_only_the_page_of_this_server_may_ask(server: DemoServer) -> None:
    body = {"images": [given(noise(0)), given(noise(1))]}
    for headers in ({"Cookie": ""}, {"Origin": "http://evil.example"}, {"Host": "evil.example"}):
        assert ask(port_of(server), "/compare", body, headers)[0] == 403
    assert "`mof demo`" in ask(port_of(server), "/", headers={"Cookie": ""})[1]["error"]


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), IndexError("index out of range in self")])
def test_a_model_that_fails_is_told(server: DemoServer, tiny_model: Any, error: Exception) -> None:
    def fail(*_: Any) -> None:
        raise error

    hook = tiny_model.language_model.lm_head.register_forward_hook(fail)
    status, reply, _ = ask(port_of(server), "/ask", {"question": "Colour?", "image": given(noise(0))})
    hook.remove()
    assert status == 500 and f"the model failed: {error}" in reply["error"]
    assert ask(port_of(server), "/ask", {"question": "Colour?", "image": given(noise(0))})[0] == 200


def test_a_single_encoder(tiny_llm: Any, tiny_tokenizer: Any, tiny_processor: Any) -> None:
    mixer = InterleavedMoF({"only": build_encoder("tiny-a")}, hidden_size=32)
    model = MoFForConditionalGeneration.from_parts(mixer, tiny_llm, tiny_tokenizer).eval()
    demo = demo_of(model, type(tiny_processor).from_parts(model, tiny_tokenizer))
    seen = demo.compare({"images": [given(noise(0)), given(noise(1))]})
    assert [encoder["name"] for encoder in seen["encoders"]] == ["only"] and seen["blind"] == []
    assert demo.ask({"question": "Colour?", "image": given(noise(0))}).count("<canvas") == 1


def test_a_llava_of_transformers() -> None:
    model, processor = build_llava()
    demo, images = demo_of(model, processor), [noise(5), noise(6)]
    before = demo.ask({"question": "Colour?", "image": given(images[0])})
    pixels = processor.image_processor(images, return_tensors="pt").pixel_values
    with torch.no_grad():
        pooled = model.model.vision_tower(pixels).pooler_output
    (seen,) = demo.compare({"images": [given(image) for image in images]})["encoders"]
    assert seen["name"] == "clip"
    assert seen["similarity"] == pytest.approx(float(cosine_similarity(*pooled, dim=0)), abs=1e-3)
    assert demo.ask({"question": "Colour?", "image": given(images[0])}) == before  # its tower is used as it is


def test_a_model_without_a_known_tower_answers_without_a_comparison() -> None:
    model, processor = build("qwen2_5_vl")
    demo = demo_of(model, processor)
    assert demo.encoders == {} and "Colour?" in demo.ask({"question": "Colour?", "image": given(noise(0))})
    server = DemoServer(demo, token=TOKEN)
    with running(server):
        assert b"--encoder NAME" in ask(port_of(server), "/")[1]


def test_the_command(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    served: list[DemoServer] = []

    def serve(server: DemoServer) -> None:
        served.append(server)
        raise KeyboardInterrupt

    opened: list[str] = []
    monkeypatch.setattr(DemoServer, "serve_forever", serve)
    monkeypatch.setattr("mof.evals.decoding.load_explainer", lambda: write_explanation)
    monkeypatch.setattr("typer.launch", opened.append)
    shown = mof("demo", tiny_folder, "--encoder", "mini-dino")
    assert shown.exit_code == 0 and served[0].url in shown.output and opened == [served[0].url] and "127.0.0.1" in opened[0]
    mof("demo", tiny_folder, "--no-browser")
    assert len(served) == 2 and len(opened) == 1
    refused = mof("demo", tiny_folder.parent)
    assert refused.exit_code == 2 and "config.json" in refused.output


def test_a_missing_library_is_named(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "mof.local_server")
    monkeypatch.setitem(sys.modules, "uvicorn", None)  # as if it were not installed
    refused = mof("demo", tiny_folder)
    assert refused.exit_code == 2 and "uvicorn" in refused.output and 'pip install "mof-vig[web]"' in refused.output


@pytest.mark.slow
@pytest.mark.browser
@pytest.mark.parametrize("width", [390, 1280])
def test_the_page_in_a_browser(browser: Any, server: DemoServer, tmp_path: Path, width: int) -> None:
    from playwright.sync_api import expect

    for place in range(2):
        noise(place).save(tmp_path / f"{place}.png")
    (tmp_path / "torn.png").write_bytes(encoded(noise(0))[:500])
    errors, fetched = [], []
    page = browser.new_page(viewport={"width": width, "height": 800})
    page.set_default_timeout(20_000)
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("request", lambda request: fetched.append(request.url))
    page.goto(server.url)
    asking, comparing = page.locator("#asking"), page.locator("#comparing")
    asking.locator("button").click()
    expect(asking.locator("[role=status]")).to_have_text("Choose an image first.")
    asking.locator("[type=file]").set_input_files(tmp_path / "torn.png")
    asking.locator("[type=text]").fill("Which <b>colour?")
    asking.locator("button").click()
    expect(asking.locator("[role=status]")).to_contain_text("torn.png")
    asking.locator("[type=file]").set_input_files(tmp_path / "0.png")
    asking.locator("[type=text]").press("Enter")
    answer = page.frame_locator("iframe")
    expect(answer.locator(".question")).to_have_text("Which <b>colour?")
    expect(answer.locator(".t.shown")).to_have_count(0)
    answer.locator("[data-looks]").first.hover()
    expect(answer.locator(".t.shown")).to_have_count(1)  # its script runs
    inner, outer = (answer.locator("html").evaluate("html => html.scrollHeight"), page.locator("iframe").bounding_box())
    widths = [page.evaluate("document.documentElement.scrollWidth")]
    page.click("#tab-comparing")
    for place in range(2):
        comparing.locator("[type=file]").nth(place).set_input_files(tmp_path / f"{place}.png")
    expect(comparing.locator(".seen")).to_have_count(2)
    expect(comparing.locator(".verdict")).to_contain_text("lind pair")
    widths.append(page.evaluate("document.documentElement.scrollWidth"))
    page.close()
    assert not errors and widths == [width, width] and outer is not None and outer["height"] >= inner - 1
    assert all(url.startswith((f"http://127.0.0.1:{port_of(server)}/", "data:", "about:")) for url in fetched)
