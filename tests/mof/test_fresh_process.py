"""Saved folders opened where this package was never imported: by the Auto classes, the pipelines, and OpenAI's client at `mof serve`."""

from __future__ import annotations

import base64
import json
import runpy
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from support.launch import FRESH, kill, run, start
from support.tiny import build_llm, build_tokenizer
from transformers import AutoModelForImageTextToText, AutoProcessor
from transformers.dynamic_module_utils import get_class_from_dynamic_module

from encoders import build_encoder
from encoders.saved_folders import DIGESTS
from mof import InterleavedMoF, MoFForConditionalGeneration, MoFProcessor
from mof.auto_map import AUTO_MAP, CODE

LENGTH = 6


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A model with the encoders that ship with the package, its processor, and an image. New processes keep code in a folder beside it."""
    torch.manual_seed(0)
    tokenizer = build_tokenizer()
    encoders = {"clip": build_encoder("mini-clip"), "dino": build_encoder("mini-dino")}
    model = MoFForConditionalGeneration.from_parts(InterleavedMoF(encoders, 32), build_llm(tokenizer), tokenizer)
    folder = tmp_path_factory.mktemp("fresh") / "model"
    model.save_pretrained(folder)
    MoFProcessor.from_parts(model, tokenizer).save_pretrained(folder)
    Image.effect_noise((48, 40), 90).save(folder.parent / "noise.png")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_MODULES_CACHE", str(folder.parent / "modules"))
        yield folder


def chat(folder: Path, *further: str) -> list[dict[str, Any]]:
    """A question about the image in OpenAI's form; `further` are an answer, a question, and so on."""
    url = f"data:image/png;base64,{base64.b64encode((folder.parent / 'noise.png').read_bytes()).decode()}"
    question = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "What?"}]
    turns = [{"role": role, "content": text} for role, text in zip(("assistant", "user") * 2, further, strict=False)]
    return [{"role": "user", "content": question}, *turns]


def answer(folder: Path, messages: list[dict[str, Any]]) -> str:
    """The greedy answer of the model in this process."""
    model, processor = MoFForConditionalGeneration.from_pretrained(folder), MoFProcessor.from_pretrained(folder)
    image = {"type": "image", "image": str(folder.parent / "noise.png")}
    texts = [message["content"] if isinstance(message["content"], str) else "What?" for message in messages]
    contents = [[*([] if i else [image]), {"type": "text", "text": text}] for i, text in enumerate(texts)]
    turns = [{"role": message["role"], "content": content} for message, content in zip(messages, contents, strict=True)]
    options = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
    inputs = processor.apply_chat_template(turns, **options)
    tokens = model.generate(**inputs, max_new_tokens=LENGTH, do_sample=False)
    return processor.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def test_files_name_classes_and_lie_beside_the_code(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path))
    assert (folder / CODE.name).read_bytes() == CODE.read_bytes()
    assert CODE.name in json.loads((folder / DIGESTS).read_text())["files"]
    for file in ("config.json", "processor_config.json"):
        assert json.loads((folder / file).read_text())["auto_map"] == AUTO_MAP
    for name in AUTO_MAP.values():
        assert get_class_from_dynamic_module(name, str(folder)).__name__ == name.partition(".")[2]


def test_a_processor_alone_brings_the_code(tiny_processor: MoFProcessor, tmp_path: Path) -> None:
    tiny_processor.save_pretrained(tmp_path / "processor")
    tiny_processor.image_processor.save_pretrained(tmp_path / "images")
    assert {(tmp_path / name / CODE.name).is_file() for name in ("processor", "images")} == {True}


@pytest.mark.parametrize("missing", ["mof", "mof.auto_classes"])  # the second where another package is called mof
def test_without_the_package_the_command_that_installs_it_is_named(missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "mof.auto_classes")
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(ImportError, match="pip install mof-vig"):
        runpy.run_path(str(CODE))


def test_another_missing_library_is_named_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "mof.auto_classes")
    monkeypatch.setitem(sys.modules, "mof.config", None)
    with pytest.raises(ModuleNotFoundError, match=r"mof\.config"):
        runpy.run_path(str(CODE))


def test_a_folder_of_an_earlier_release_opens(folder: Path, tmp_path: Path) -> None:
    for path in folder.iterdir():
        if path.name not in (CODE.name, DIGESTS):
            (tmp_path / path.name).write_bytes(path.read_bytes())
    for name in ("config.json", "processor_config.json"):
        content = json.loads((tmp_path / name).read_text())
        del content["auto_map"]
        (tmp_path / name).write_text(json.dumps(content))
    assert type(AutoProcessor.from_pretrained(tmp_path)) is MoFProcessor
    assert type(AutoModelForImageTextToText.from_pretrained(tmp_path)) is MoFForConditionalGeneration


PIPELINES = """
import json, sys
from transformers import AutoProcessor, pipeline
processor = AutoProcessor.from_pretrained({folder!r}, trust_remote_code=True)
chat = [{{"role": "user", "content": [{{"type": "image", "path": {image!r}}}, {{"type": "text", "text": "What?"}}]}}]
texts = []
for task in ("image-text-to-text", "any-to-any"):
    run = pipeline(task, model={folder!r}, processor=processor, trust_remote_code=True)
    texts.append(run(text=chat, return_full_text=False, max_new_tokens={length}, generate_kwargs={{"do_sample": False}})[0]["generated_text"])
run.model.save_pretrained({again!r})
processor.save_pretrained({again!r})
print(json.dumps(texts))
"""


@pytest.mark.slow
def test_a_process_that_never_imported_us(folder: Path) -> None:
    """Both pipelines answer, and the folders that such a process saves are the same again."""
    again = folder.parent / "again"
    code = PIPELINES.format(folder=str(folder), image=str(folder.parent / "noise.png"), again=str(again), length=LENGTH)
    (printed,) = run(code, by=FRESH)
    assert json.loads(printed.splitlines()[-1]) == [answer(folder, chat(folder))] * 2
    assert sorted(path.name for path in again.iterdir()) == sorted(path.name for path in folder.iterdir())
    for name in ("config.json", "processor_config.json", CODE.name):
        assert (folder / name).read_bytes() == (again / name).read_bytes()


@pytest.fixture
def address(folder: Path) -> Iterator[str]:
    """The address of a server, a process of its own."""
    pytest.importorskip("fastapi")
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    main = "from mof.cli.app import main; main()"
    (server,) = start(main, "serve", folder, "--port", port, "--device", "cpu")
    try:
        while server.exitcode is None:
            with socket.socket() as probe:
                if probe.connect_ex(("localhost", port)) == 0:
                    break
            time.sleep(0.2)
        assert server.exitcode is None
        yield f"http://localhost:{port}/v1"
    finally:
        kill([server])


@pytest.mark.slow
def test_the_client_of_openai(folder: Path, address: str) -> None:
    openai = pytest.importorskip("openai")
    client = openai.OpenAI(base_url=address, api_key="none", max_retries=0)
    (served,) = client.models.list()
    options: dict[str, Any] = {"model": served.id, "max_tokens": LENGTH, "temperature": 0}
    for messages in (chat(folder), chat(folder, "Noise.", "Sure?")):
        expected = answer(folder, messages)
        assert client.chat.completions.create(messages=messages, **options).choices[0].message.content == expected
        pieces = [
            chunk.choices[0].delta.content or "" for chunk in client.chat.completions.create(messages=messages, stream=True, **options)
        ]
        # A stream that ends within a character keeps its first bytes back. The number of pieces is the server's affair.
        assert "".join(pieces).rstrip("\ufffd") == expected.rstrip("\ufffd")
