"""`--decoding` of `mof chat` and `mof eval`: the answers of the method, and its name in everything that is written."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from typing import Any

import pytest
from support.commands import mof
from support.two_passes import chats, encoder

from encoders.terminal import plain as shown
from mof.evals.answerers import LocalModel
from mof.evals.answering import Prompt
from vig.decoding import VCD

ROOT = Path(__file__).parent.parent.parent
VCD_HALF = "vcd:null=noise:seed=0:alpha=3.0:beta=0.1"


@pytest.fixture(autouse=True)
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The entry points of pyproject.toml, also where an older state of the project is installed."""
    group = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]["mof.decoding"]
    folder = tmp_path / "site" / "decoding_of_this_tree-0.dist-info"
    folder.mkdir(parents=True)
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: decoding-of-this-tree\nVersion: 0\n")
    (folder / "entry_points.txt").write_text("[mof.decoding]\n" + "".join(f"{key} = {value}\n" for key, value in group.items()))
    monkeypatch.syspath_prepend(str(folder.parent))


def test_chat_prints_the_answer_of_the_method(tiny_folder: Path, tmp_path: Path, tiny_model: Any, tiny_processor: Any) -> None:
    (chat,) = chats((1,))
    chat[0]["content"][0]["image"].save(tmp_path / "photo.png")
    question = chat[0]["content"][1]["text"]
    asked = ("chat", "--model", tiny_folder, "--image", tmp_path / "photo.png", "--max-new-tokens", "8")
    plain, made = mof(*asked, question), mof(*asked, "--decoding", "vcd:null=noise:alpha=3", question)
    assert plain.exit_code == made.exit_code == 0, made.output
    encode = encoder(tiny_processor)
    tokens = tiny_model.generate(
        **encode([chat]), max_new_tokens=8, do_sample=False, **VCD(null="noise", alpha=3.0).options([chat], encode)
    )
    expected = tiny_processor.decode(tokens[0, encode([chat])["input_ids"].shape[1] :], skip_special_tokens=True).strip()
    assert made.stdout.strip() == shown(expected) != plain.stdout.strip()
    without_image = [mof("chat", "--model", tiny_folder, "--max-new-tokens", "8", *more, "Hello?") for more in ((), ("--decoding", "vcd"))]
    assert without_image[0].stdout == without_image[1].stdout
    refused = mof(*asked, "--decoding", "vcdd", question)
    assert refused.exit_code == 2 and "'vcdd'" in refused.output


def test_answers_of_a_batch(tiny_model: Any, tiny_processor: Any) -> None:
    prompts = [Prompt.about(str(i), chat[0]["content"][0]["image"], "Which? " + "really " * i) for i, chat in enumerate(chats((1, 1, 1)))]
    options = {"max_new_tokens": 8, "decoding": VCD(null="noise", alpha=3.0)}
    made = [dict(LocalModel(tiny_model, tiny_processor, "tiny", batch_size=size, **options).answer(prompts)) for size in (1, 3)]
    plain = dict(LocalModel(tiny_model, tiny_processor, "tiny", max_new_tokens=8).answer(prompts))
    assert made[0] == made[1] != plain and not any(answer.error for answer in made[0].values())


def test_eval_names_the_method_everywhere(tiny_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (chat,) = chats((1,))
    chat[0]["content"][0]["image"].save(tmp_path / "photos" / "a.png")
    (tmp_path / "pope").mkdir()
    question = {"question_id": 1, "image": "a.png", "text": "Is there a dog?", "label": "no"}
    (tmp_path / "pope" / "coco_pope_random.json").write_text(json.dumps(question))
    asked = ("eval", "pope", "--data", tmp_path / "pope", "--images", tmp_path / "photos", "--model", tiny_folder, "--name", "tiny")
    asked = (*asked, "--max-new-tokens", "4")
    run = mof(*asked, "--output", tmp_path / "run", "--decoding", "vcd:null=noise:alpha=3")
    assert run.exit_code == 0, run.output
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["decoding"] == VCD_HALF and result["model"] == f"tiny ({VCD_HALF})"
    assert json.loads((tmp_path / "run" / "settings.json").read_text())["identity"]["answerer"]["decoding"] == VCD_HALF
    other = mof(*asked, "--output", tmp_path / "run")
    assert other.exit_code == 2 and "decoding" in other.output
    assert mof(*asked, "--output", tmp_path / "plain").exit_code == 0
    page = mof("eval", "report", tmp_path / "run", tmp_path / "plain", "-o", tmp_path / "evals.html")
    assert page.exit_code == 0, page.output
    rows = (tmp_path / "evals.csv").read_text().splitlines()
    assert [row.split(",")[0] for row in rows[1:]] == [f"tiny ({VCD_HALF})", "tiny"]
