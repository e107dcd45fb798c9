"""Model cards: what they say of a saved and a trained model, and that they keep what people write."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from huggingface_hub import ModelCard
from support.commands import mof
from support.tiny import build_model
from support.tiny_llava import build_records
from transformers import PreTrainedTokenizerFast
from transformers.utils import hub

from encoders.model_cards import CARD, write_section
from mof import MoFForConditionalGeneration, MoFProcessor

HEAD = {"library_name": "x", "tags": ["y"]}


def rows(card: ModelCard, title: str) -> dict[str, str]:
    _, _, section = card.text.partition(f"## {title}\n")
    table = [line.strip("| ").split(" | ") for line in section.partition("<!--")[0].splitlines() if line.startswith("| ")]
    return dict(row for row in table if len(row) == 2 and row[0] != "---")


def test_section_is_replaced_and_the_rest_stays(tmp_path: Path) -> None:
    (tmp_path / CARD).write_bytes(b"---\nlicense: mit\n---\n# Mine \xe4\r\n\ntext")
    write_section(tmp_path, "A", {"n": 1}, HEAD)
    write_section(tmp_path, "B", {"n": 2}, HEAD)
    write_section(tmp_path, "A", {"n": r"\1 3"}, HEAD)
    content = (tmp_path / CARD).read_bytes()
    assert (
        content.startswith(b"---\nlicense: mit\n---\n# Mine \xe4\r\n\ntext\n\n<!--")
        and content.count(b"## A") == content.count(b"## B") == 1
    )
    assert content.index(b"## A") < content.index(b"## B") and b"| n | 1 |" not in content and rb"\\1 3" in content


def test_hostile_values_stay_in_their_cells(tmp_path: Path) -> None:
    write_section(tmp_path, "A", {"a|b": "x | y\n\n# big <script> `z` **w** [l](http://e) <!-- mof-vig: end -->"}, HEAD)
    text = (tmp_path / CARD).read_text()
    assert text.count("\n|") == 3 and "<script>" not in text and "\n#" not in text.partition("## A")[2] and r"\[l\](" in text
    write_section(tmp_path, "A", {"n": 1}, HEAD)
    assert "big" not in (tmp_path / CARD).read_text()


def test_saved_model_has_a_card(tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    model = build_model(tiny_tokenizer)
    model.save_pretrained(tmp_path, is_main_process=False)
    assert not (tmp_path / CARD).exists()
    model.save_pretrained(tmp_path)
    card = ModelCard.load(tmp_path / CARD)
    assert card.data.library_name == "mof-vig" and card.data.pipeline_tag == "image-text-to-text"
    facts = rows(card, "Model")
    assert facts["encoder a"] == "tiny-a, 32 pixels, 4 x 4 tokens of 16 channels, frozen"
    assert facts["fusion"].startswith("interleaved") and facts["tokens of an image"] == "32"
    assert facts["language model"].startswith("LlamaForCausalLM, 0.0 M parameters, width 32, 2 layers")
    (tmp_path / CARD).write_text("mine")
    MoFForConditionalGeneration.from_pretrained(tmp_path).save_pretrained(tmp_path)  # an edited card is no damage
    assert (tmp_path / CARD).read_text().startswith("mine\n\n<!-- mof-vig: Model -->")


def test_pushed_model_has_its_card(tiny_tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch) -> None:
    """The hub's card, which transformers downloads or makes, gets our section before the upload."""
    uploaded: list[str] = []

    def upload(_: object, folder: str, *args: object, **kwargs: object) -> None:
        uploaded.append((Path(folder) / CARD).read_text())

    monkeypatch.setattr(hub, "hf_api", lambda: SimpleNamespace(create_repo=lambda name, **_: SimpleNamespace(repo_id=name)))
    monkeypatch.setattr(hub, "create_and_tag_model_card", lambda *_, **__: ModelCard("---\nlicense: mit\n---\nof the hub\n"))
    monkeypatch.setattr(hub.PushToHubMixin, "_upload_modified_files", upload)
    build_model(tiny_tokenizer).push_to_hub("me/model")
    [text] = uploaded
    assert "license: mit" in text and "of the hub" in text and rows(ModelCard(text), "Model")["tokens of an image"] == "32"


@pytest.mark.slow
def test_trained_model_has_a_card_with_its_selection(tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    model = build_model(tiny_tokenizer)
    model.save_pretrained(tmp_path / "model")
    MoFProcessor.from_parts(model, tiny_tokenizer).save_pretrained(tmp_path / "model")
    (tmp_path / "records.json").write_text(json.dumps(build_records(tmp_path / "images", 8)))

    def call(*words: str) -> None:
        result = mof(*(word.replace("@", f"{tmp_path}/") for word in words))
        assert result.exit_code == 0, result.output

    records = ("--records", "@records.json")
    call("vig", "score", "--model", "@model", *records, "--images", "@images", "--output", "@scores")
    call("vig", "select", "--scores", "@scores", *records, "--keep", "0.5", "--output", "@selected.json")
    call("train", "--model", "@model", "--records", "@selected.json", "--images", "@images", "--output", "@tuned", "--batch-size", "2")
    card = ModelCard.load(tmp_path / "tuned" / CARD)
    selection = json.loads((tmp_path / "selected.card.json").read_text())
    counts = selection.get("counts") or selection["content"]["counts"]
    facts = rows(card, "Training")
    assert rows(card, "Model")["tokens of an image"] == "32"
    assert (
        facts["records"] == f"{counts['samples_kept']} of selected.json" and facts["scored by"] == "model" and facts["null image"] == "blur"
    )
    assert facts["supervised tokens"] == str(counts["tokens_kept"])
    assert facts["selection"].startswith(
        f"{counts['samples_kept']} of 8 records, {counts['tokens_kept']} of {counts['tokens_total']} tokens"
    )
