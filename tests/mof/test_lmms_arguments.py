"""The model that lmms-eval builds from `--model_args`, with stand-ins for the few names of lmms-eval that it needs."""

from __future__ import annotations

import importlib
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from support.commands import mof
from support.two_passes import chats

from mof.evals.answerers import LocalModel
from mof.evals.answering import Answer, Prompt
from vig.decoding import VCD, build_decoding

METHOD = "vcd:null=noise:seed=0:alpha=3.0:beta=0.1"


class Base:
    """lmms-eval splits arguments at commas, and each at its first equals sign; whole numbers become numbers."""

    def __init__(self) -> None:
        self.task_dict: dict[str, Any] = {}

    @classmethod
    def create_from_arg_string(cls, text: str, further: dict[str, Any]) -> Any:
        pairs = (argument.split("=", 1) for argument in text.split(","))
        given = {key: int(value) if value.isnumeric() else value for key, value in pairs}
        return cls(**given, **{key: value for key, value in further.items() if value is not None})


@dataclass
class Counts:
    input_tokens: int
    output_tokens: int


@pytest.fixture
def model_class(monkeypatch: pytest.MonkeyPatch) -> Any:
    stand_ins = {
        "lmms_eval": {}, "lmms_eval.api": {}, "lmms_eval.api.model": {"lmms": Base},
        "lmms_eval.api.instance": {"GenerationResult": SimpleNamespace, "Instance": object, "TokenCounts": Counts},
    }  # fmt: skip
    stand_ins["lmms_eval.api.instance"]["GenerationResult"] = lambda text, counts: SimpleNamespace(text=text, token_counts=counts)
    for name, content in stand_ins.items():
        module = ModuleType(name)
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delitem(sys.modules, "mof.evals.lmms.model", raising=False)
    monkeypatch.setattr("mof.evals.decoding._load", lambda group, asked: build_decoding)
    yield importlib.import_module("mof.evals.lmms.model").MofLmms
    sys.modules.pop("mof.evals.lmms.model", None)  # a later test may want the real lmms-eval


def test_decoding_is_a_model_argument(model_class: Any, tiny_model: Any, tiny_processor: Any, tiny_folder: Path, tmp_path: Path) -> None:
    further = {"max_batch_size": None}
    plain, made = (
        model_class.create_from_arg_string(f"pretrained={tmp_path / 'model'},batch_size=2{more}", further)
        for more in ("", ",decoding=vcd:null=noise:alpha=3")
    )
    assert plain.settings["decoding"] == "greedy" and made.settings["decoding"] == METHOD
    documents = [{"image": chat[0]["content"][0]["image"]} for chat in chats((1, 1, 1))]
    requests = [
        SimpleNamespace(args=("Which?", {"max_new_tokens": 6}, lambda document: [document["image"]], i, "t", "test")) for i in range(3)
    ]
    prompts = [Prompt.about(str(i), document["image"], "Which?") for i, document in enumerate(documents)]
    answers = []
    for model, decoding in ((plain, None), (made, VCD(null="noise", alpha=3.0))):
        model.task_dict = {"t": {"test": documents}}
        local = LocalModel(tiny_model, tiny_processor, "tiny", max_new_tokens=6, decoding=decoding)
        answers.append([result.text for result in model.generate_until(requests)])
        assert answers[-1] == [answer.text for _, answer in sorted(local.answer(prompts), key=lambda pair: pair[0])]
    assert answers[0] != answers[1]
    for request in requests:
        request.args = ("Which?", "red", *request.args[2:])
    assert len(plain.loglikelihood(requests)) == 3
    with pytest.raises(ValueError, match="no log-likelihoods"):
        made.loglikelihood(requests)
    for text in ("vcd:alpha", "vcdd"):
        with pytest.raises(ValueError, match=f"'{text.rpartition(':')[2]}'"):
            model_class.create_from_arg_string(f"pretrained={tmp_path / 'model'},decoding={text}", {})


def test_prompts_without_an_answer_are_counted_and_have_no_likelihood(
    model_class: Any, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = model_class(str(tiny_folder))
    monkeypatch.setattr(LocalModel, "answer", lambda self, prompts: enumerate([Answer("red", (-1.0,)), Answer("", error="cut off")]))
    arguments = ("Which?", {"max_new_tokens": 6}, None, 0, "t", "test")
    assert [result.text for result in model.generate_until([SimpleNamespace(args=arguments)] * 2)] == ["red", ""]
    assert model.unanswered == {"t": ["cut off"]}
    with pytest.raises(ValueError, match="a prompt has no answer: cut off"):
        model.loglikelihood([SimpleNamespace(args=("Which?", "red", *arguments[2:]))] * 2)


def test_the_suite_gets_the_method(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs: list[Any] = []
    monkeypatch.setattr("mof.evals.lmms.suites.run_suite", lambda suite, run, console: runs.append(run) or {"figures": []})
    words = ("eval", "--suite", "vig", "--model", tmp_path, "--output", tmp_path / "out", "--decoding", "m3id:decay=0.1")
    mof(*words)
    assert [run.decoding for run in runs] == ["m3id:decay=0.1"]
