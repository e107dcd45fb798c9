"""A scoring run that is killed and resumed gives what one run gives; a folder of another run is refused."""

import copy
import json
import random
import shutil
import time
from importlib.metadata import version

import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image, ImageOps
from support import launch
from support.same_scores import assert_same
from support.tiny_llava import build_records

import vig.scoring.passes
from vig import load_scores, score


def test_saved_scores_load_as_they_were(llava, records, image_folder, text_only, tmp_path) -> None:
    records[3]["image"] = "missing.png"
    scores = score(*llava, [*records, text_only], tmp_path / "scores", image_folder=image_folder)
    loaded = load_scores(tmp_path / "scores")
    assert_same(loaded, scores)
    assert loaded.manifest == scores.manifest
    assert loaded.manifest["text_only"] == ["text"] and list(loaded.failures) == ["r3"]
    memory = score(*llava, [*records, text_only], image_folder=image_folder)
    assert_same(memory, scores)
    memory.save(tmp_path / "saved")
    assert_same(load_scores(tmp_path / "saved"), scores)
    with pytest.raises(ValueError, match="4 scores"):
        memory.save(tmp_path / "saved")
    assert load_scores(tmp_path / "saved").manifest == scores.manifest  # the refusal left it alone


def test_manifest_says_what_was_run(llava, records, image_folder, tmp_path) -> None:
    score(*llava, records, tmp_path, image_folder=image_folder, seed=3, max_length=100)
    manifest = json.loads((tmp_path / "_manifest.json").read_text())
    identity = manifest["identity"]
    assert manifest["complete"] is True and manifest["format"] == 1
    assert identity["model"] == "LlavaForConditionalGeneration"
    assert identity["null"] == {"name": "blur", "kernel_by_width": [[2000, 501], [800, 301], [500, 201], [0, 101]]}
    assert identity["seed"] == 3 and identity["max_length"] == 100
    assert identity["versions"]["torch"] == version("torch")


def raise_after(monkeypatch, batches: int) -> None:
    original, calls = vig.scoring.passes.TwoPasses._batch, []

    def limited(*args):
        calls.append(args)
        if len(calls) > batches:
            raise KeyboardInterrupt
        return original(*args)

    monkeypatch.setattr(vig.scoring.passes.TwoPasses, "_batch", limited)


@pytest.mark.parametrize("batches", [0, 1, 2, 4])
def test_interrupted_and_resumed_equals_one_run(llava, records, image_folder, tmp_path, monkeypatch, batches) -> None:
    whole = score(*llava, records, tmp_path / "one", image_folder=image_folder, batch_size=1)
    with monkeypatch.context() as patch:
        raise_after(patch, batches)
        with pytest.raises(KeyboardInterrupt):
            score(*llava, records, tmp_path / "two", image_folder=image_folder, batch_size=1)
    assert len(load_scores(tmp_path / "two")) == batches
    resumed = score(*llava, records, tmp_path / "two", image_folder=image_folder, batch_size=1)
    assert_same(resumed, whole)
    assert_same(load_scores(tmp_path / "two"), whole)


def test_scored_records_are_not_scored_again(llava, records, image_folder, tmp_path, monkeypatch) -> None:
    first = score(*llava, records[:3], tmp_path, image_folder=image_folder)
    raise_after(monkeypatch, 1)  # the two others fit in one batch
    both = score(*llava, records, tmp_path, image_folder=image_folder)
    assert both.ids == [record["id"] for record in records]
    assert_same(both[:3], first)
    assert_same(score(*llava, records[1:3], tmp_path, image_folder=image_folder), first[1:3])  # only what was asked for


def test_another_image_under_the_same_path_is_noticed(llava, records, image_folder, tmp_path) -> None:
    images = shutil.copytree(image_folder, tmp_path / "images")
    first = score(*llava, records, tmp_path / "scores", image_folder=images)
    changed = images / records[1]["image"]
    changed.touch()  # the same pixels at another time
    assert_same(score(*llava, records, tmp_path / "scores", image_folder=images), first)
    ImageOps.invert(Image.open(changed).convert("RGB")).save(changed)
    with pytest.raises(ValueError, match=f"record '{records[1]['id']}' was replaced"):
        score(*llava, records, tmp_path / "scores", image_folder=images)
    changed.unlink()  # the score stands
    assert_same(score(*llava, records, tmp_path / "scores", image_folder=images), first)


def test_a_failed_record_is_tried_again(llava, records, image_folder, tmp_path) -> None:
    name, records[0]["image"] = records[0]["image"], "missing.png"
    assert list(score(*llava, records, tmp_path, image_folder=image_folder).failures) == ["r0"]
    records[0]["image"] = name
    mended = score(*llava, records, tmp_path, image_folder=image_folder)
    assert not mended.failures and not load_scores(tmp_path).failures
    assert_same(mended, score(*llava, records, image_folder=image_folder), atol=1e-5)


def test_a_run_that_saved_nothing_gives_way(llava, records, image_folder, tmp_path) -> None:
    processor = copy.deepcopy(llava[1])
    processor.chat_template = None
    with pytest.raises(ValueError, match="chat template"):
        score(llava[0], processor, records, tmp_path, image_folder=image_folder)
    whole = score(*llava, records, tmp_path, image_folder=image_folder)
    with pytest.raises(ValueError, match="null.name"):
        score(*llava, records, tmp_path, "zero", image_folder=image_folder)
    assert_same(load_scores(tmp_path), whole)


def test_partial_files_never_count(llava, records, image_folder, tmp_path) -> None:
    whole = score(*llava, records, tmp_path, image_folder=image_folder)
    shard = (tmp_path / "shard-0000-00000.parquet").read_bytes()
    (tmp_path / ".tmp-7-shard-0000-00009.parquet").write_bytes(shard[: len(shard) // 2])
    assert_same(load_scores(tmp_path), whole)
    assert_same(score(*llava, records, tmp_path, image_folder=image_folder), whole)
    assert not list(tmp_path.glob(".tmp-*"))
    (tmp_path / "shard-0000-00000.parquet").write_bytes(shard[: len(shard) // 2])  # a damaged disk
    with pytest.raises(ValueError, match=r"shard-0000-00000\.parquet "):
        load_scores(tmp_path)


def test_a_damaged_shard_never_gives_other_scores(llava, records, image_folder, tmp_path) -> None:
    whole = score(*llava, records, tmp_path, image_folder=image_folder, batch_size=2)
    shard = tmp_path / "shard-0000-00001.parquet"
    sound = shard.read_bytes()
    for place in range(4, len(sound) - 8, 29):
        shard.write_bytes(sound[:place] + bytes([sound[place] ^ 0x55]) + sound[place + 1 :])
        try:
            assert_same(load_scores(tmp_path), whole)  # it was a byte of no account
        except ValueError:
            continue


@pytest.mark.parametrize("content", ["", "{", "{}", "[]", '{"format": 1, "complete": true}'])
def test_a_damaged_manifest_is_named(llava, records, image_folder, tmp_path, content) -> None:
    score(*llava, records, tmp_path, image_folder=image_folder)
    whole = load_scores(tmp_path)
    (tmp_path / "_manifest.json").write_text(content)
    with pytest.raises(ValueError, match=r"manifest\.json"):
        load_scores(tmp_path)
    with pytest.raises(ValueError, match=r"manifest\.json"):
        score(*llava, records, tmp_path, image_folder=image_folder, seed=1)  # nobody knows whether it is the same run
    assert_same(score(*llava, records, tmp_path, image_folder=image_folder), whole)  # the shards say that it is
    assert_same(load_scores(tmp_path), whole)


@pytest.mark.parametrize(("lost", "left"), [([1], 3), ([0, 1, 2], 0)])
def test_a_missing_shard_is_not_fewer_scores(llava, records, image_folder, tmp_path, lost, left) -> None:
    whole = score(*llava, records, tmp_path, image_folder=image_folder, batch_size=2)
    for number in lost:
        (tmp_path / f"shard-0000-{number:05d}.parquet").unlink()
    with pytest.raises(ValueError, match=f"5 scores.* {left};"):
        load_scores(tmp_path)
    assert_same(score(*llava, records, tmp_path, image_folder=image_folder, batch_size=2), whole, atol=1e-5)  # as it says
    assert len(load_scores(tmp_path)) == 5


def test_shards_and_lists_of_another_run_are_refused(llava, records, image_folder, text_only, tmp_path) -> None:
    blur, zero = tmp_path / "blur", tmp_path / "zero"
    whole = score(*llava, [*records, text_only], blur, image_folder=image_folder, batch_size=2)
    score(*llava, [*records, text_only], zero, "zero", image_folder=image_folder, batch_size=2)
    shard = blur / "shard-0000-00001.parquet"
    sound = shard.read_bytes()
    shard.write_bytes((zero / shard.name).read_bytes())
    for use in (lambda: load_scores(blur), lambda: score(*llava, [*records, text_only], blur, image_folder=image_folder)):
        with pytest.raises(ValueError, match=r"shard-0000-00001\.parquet belongs to another run.*delete it"):
            use()
    shard.write_bytes(sound)
    (blur / "shard-0000-00009.parquet").write_bytes(sound)
    with pytest.raises(ValueError, match=r"shard-0000-00009\.parquet is a copy of shard-0000-00001\.parquet"):
        load_scores(blur)
    (blur / "shard-0000-00009.parquet").unlink()
    for name in ("_text_only.jsonl", "_rejected.jsonl"):
        (blur / name).unlink()
        with pytest.raises(ValueError, match=rf"{name} is missing; score again"):
            load_scores(blur)
        assert_same(score(*llava, [*records, text_only], blur, image_folder=image_folder), whole)
    assert load_scores(blur).manifest == whole.manifest


def test_every_flipped_bit_is_noticed_and_repaired(llava, records, image_folder, text_only, tmp_path) -> None:
    records[3]["image"] = "missing.png"
    whole = score(*llava, [*records, text_only], tmp_path, image_folder=image_folder, batch_size=2)
    rng = random.Random(0)
    for path in sorted(path for path in tmp_path.iterdir() if path.suffix in (".json", ".jsonl", ".parquet")):
        sound = path.read_bytes()
        for _ in range(40):
            damaged = bytearray(sound)
            damaged[rng.randrange(len(damaged))] ^= 1 << rng.randrange(8)
            path.write_bytes(damaged)
            with pytest.raises(ValueError, match=path.name):
                load_scores(tmp_path)
        assert_same(score(*llava, [*records, text_only], tmp_path, image_folder=image_folder, batch_size=2), whole, atol=1e-5)
        assert load_scores(tmp_path).manifest == whole.manifest


def test_another_run_in_the_folder_is_refused(llava, records, image_folder, tmp_path) -> None:
    model, processor = llava
    score(model, processor, records[:2], tmp_path, image_folder=image_folder)

    def refuses(match: str, model=model, processor=processor, records=records, **options) -> None:
        with pytest.raises(ValueError, match=match):
            score(model, processor, records, tmp_path, **{"image_folder": image_folder, **options})

    refuses(r"null\.name: 'blur' there, 'mean' now", null="mean")
    refuses(r"max_length: 2048 there, 77 now", max_length=77)
    refuses(r"seed: 0 there, 1 now", seed=1)
    trained = copy.deepcopy(model)
    with torch.no_grad():
        trained.lm_head.weight[3, 5] += 1e-3
    refuses(r"weights: '\w+' there, '\w+' now", model=trained)
    other = copy.deepcopy(processor)
    other.chat_template += " "
    refuses(r"chat_template:", processor=other)
    other = copy.deepcopy(processor)
    other.tokenizer.add_tokens(["<more>"])
    refuses(r"tokenizer:", processor=other)
    other = copy.deepcopy(processor)
    other.image_processor.image_mean = [0.0, 0.0, 0.0]
    refuses(r"processor:", processor=other)
    changed = copy.deepcopy(records)
    changed[1]["conversations"][1]["value"] = "Something else."
    refuses(r"r1$", records=changed)
    assert len(load_scores(tmp_path)) == 2
    assert load_scores(tmp_path).manifest["complete"]  # still as it was


def test_a_folder_without_a_format_is_of_the_first(llava, records, image_folder, tmp_path) -> None:
    whole = score(*llava, records, tmp_path, image_folder=image_folder)
    manifest = json.loads((tmp_path / "_manifest.json").read_text())
    assert manifest.pop("format") == 1 and "mof-digest" in manifest.pop("digest")  # nor a digest, in the first releases
    (tmp_path / "_manifest.json").write_text(json.dumps(manifest))
    assert_same(load_scores(tmp_path), whole)
    (tmp_path / "_manifest.json").write_text(json.dumps(manifest | {"format": 2}))
    with pytest.raises(ValueError, match="format 2"):
        load_scores(tmp_path)


def test_a_trainer_made_meanwhile_does_not_make_it_another_run(llava, records, image_folder, tmp_path, monkeypatch) -> None:
    first = score(*llava, records, tmp_path / "scores", image_folder=image_folder)
    monkeypatch.setattr(llava[0].config, "use_cache", False, raising=False)  # as transformers' Trainer does
    assert_same(score(*llava, records, tmp_path / "scores", image_folder=image_folder), first)


def test_the_same_model_and_processor_loaded_again_resume(llava, records, image_folder, tmp_path) -> None:
    model, processor = llava
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    first = score(model, processor, records, tmp_path / "scores", image_folder=image_folder)
    again = (type(part).from_pretrained(tmp_path / "model") for part in (model, processor))
    assert_same(score(*again, records, tmp_path / "scores", image_folder=image_folder), first)


def test_a_folder_of_something_else_is_refused(llava, records, image_folder, tmp_path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"precious")
    (tmp_path / "draft.tmp").write_bytes(b"precious too")
    with pytest.raises(ValueError, match="(model.safetensors|draft.tmp)"):
        score(*llava, records, tmp_path, image_folder=image_folder)
    with pytest.raises(ValueError, match="_manifest.json"):
        load_scores(tmp_path)
    assert len(list(tmp_path.iterdir())) == 2


KILLED = """
import sys
from pathlib import Path
import torch
torch.set_num_threads(1)
import vig.scoring.passes
from support.launch import held_after
from support.tiny_llava import build_llava, build_records
images, output = sys.argv[1:]
vig.scoring.passes.TwoPasses._batch = held_after(4, vig.scoring.passes.TwoPasses._batch)
records = build_records(Path(images), 12)
vig.score(*build_llava(), records, output, image_folder=images, batch_size=1)
"""


@pytest.mark.slow
def test_sigkill_and_resume_equals_one_run(llava, tmp_path) -> None:
    images, output = tmp_path / "images", tmp_path / "scores"
    (process,) = processes = launch.start(KILLED, images, output)
    while not list(output.glob("shard-*.parquet")):
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.02)
    launch.kill(processes)
    saved = len(load_scores(output))
    assert 1 <= saved < 12
    records = build_records(images, 12)
    resumed = score(*llava, records, output, image_folder=images, batch_size=1)
    whole = score(*llava, records, tmp_path / "one", image_folder=images, batch_size=1)
    assert_same(resumed, whole, atol=1e-5)
    assert sum(pq.read_metadata(path).num_rows for path in output.glob("shard-*.parquet")) == 12
