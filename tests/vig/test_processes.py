"""Scoring by two real processes: the same scores as by one, killed and resumed by another number of them."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from support import launch
from support.same_scores import assert_same
from support.tiny_llava import many_records

from mof.data.records import images_of
from vig import load_scores, score
from vig.processes import Processes

SCRIPT = """
import json, os, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
import vig.scoring.passes
from support.launch import held_after
from support.tiny_llava import build_llava, many_records
folder, batches = Path(sys.argv[1]), int(sys.argv[2])
vig.scoring.passes.TwoPasses._batch = held_after(batches, vig.scoring.passes.TwoPasses._batch)
records, rank = many_records(folder / "images"), os.environ["RANK"]
model, processor = build_llava()
for given, output in ((records, folder / "scores"), (iter(records), None)):
    scores = vig.score(model, processor, given, output, image_folder=folder / "images", batch_size=1)
    manifest = {key: scores.manifest[key] for key in ("failures", "text_only")}
    kind = "folder" if output else "none"
    (folder / f"{kind}{rank}.json").write_text(json.dumps({"ids": scores.ids, "vig": scores.vig.tolist(), **manifest}))
"""


@pytest.fixture
def alone(llava, tmp_path):
    """The scores of one process, and what became of the other records."""
    return score(*llava, many_records(tmp_path / "images"), image_folder=tmp_path / "images", batch_size=1)


def owners(folder: Path) -> dict[str, set[str]]:
    """Image -> the processes whose shards hold records on it."""
    images = {record["id"]: images_of(record) for record in many_records(folder.parent / "images")}
    by_image: dict[str, set[str]] = {}
    for path in folder.glob("shard-*.parquet"):
        for id in pq.read_table(path)["id"].to_pylist():
            by_image.setdefault(images[id][0], set()).add(path.name.split("-")[1])
    return by_image


@pytest.mark.slow
@pytest.mark.multiprocess
def test_two_processes_give_what_one_gives(alone, tmp_path) -> None:
    launch.run(SCRIPT, tmp_path, 0, count=2)
    results = [json.loads(path.read_text()) for path in tmp_path.glob("*[01].json")]
    assert len(results) == 4 and all(result == results[0] for result in results)  # two processes, with a folder and without
    assert results[0]["ids"] == alone.ids and len(alone) == 24  # order too
    assert results[0]["vig"] == pytest.approx(alone.vig.tolist(), abs=1e-5)
    assert results[0]["text_only"] == ["text"] and results[0]["failures"] == alone.failures
    loaded = load_scores(tmp_path / "scores")
    assert_same(loaded, alone, atol=1e-5)
    assert loaded.failures == alone.failures and loaded.manifest["text_only"] == ["text"]
    of_image = owners(tmp_path / "scores")
    assert set.union(*of_image.values()) == {"0000", "0001"}
    assert all(len(processes) == 1 for processes in of_image.values())  # of one image all in one


def start_and_kill(folder: Path, batches: int, shards: int, *, all_of_them: bool) -> set[str]:
    """Kill one of two processes or all, once there are so many shards; each stops after so many batches. The ids that are then saved."""
    processes = launch.start(SCRIPT, folder, batches, count=2)
    while len(list((folder / "scores").glob("shard-*.parquet"))) < shards:
        assert all(process.poll() is None for process in processes), launch.kill(processes)
        time.sleep(0.02)
    if not all_of_them:
        launch.kill(processes[1:])
        processes[0].terminate()  # as torchrun ends the others
        processes[0].wait()
    launch.kill(processes)
    return {score.id for score in load_scores(folder / "scores")}


@pytest.mark.slow
@pytest.mark.multiprocess
def test_killed_and_resumed_by_another_number_of_processes(llava, alone, tmp_path) -> None:
    first = start_and_kill(tmp_path, 2, 3, all_of_them=False)
    second = start_and_kill(tmp_path, 4, 8, all_of_them=True)
    assert 3 <= len(first) < len(second) < 24 and first < second
    records, output = many_records(tmp_path / "images"), tmp_path / "scores"
    resumed = score(*llava, records, output, image_folder=tmp_path / "images", batch_size=1)
    assert resumed.ids == alone.ids and resumed.failures == alone.failures
    assert_same(resumed, alone, atol=1e-5)
    assert sum(pq.read_metadata(path).num_rows for path in output.glob("shard-*.parquet")) == 24  # none was scored twice
    assert not list(output.glob(".tmp-*"))


class Two(Processes):
    """The first of two processes, where the other always gives another value."""

    def gather(self, value):
        return [value, "another"]


def test_processes_that_do_not_agree_are_refused() -> None:
    with pytest.raises(ValueError, match="2 processes.*the records"):
        Two(0, 2).require_equal("one", "the records")
    Processes().require_equal("one", "the records")


def test_what_the_first_process_finds_is_raised_by_all(monkeypatch) -> None:
    refusal = ValueError("holds another run")
    monkeypatch.setattr(Processes, "gather", lambda self, value: [refusal, value])
    with pytest.raises(ValueError, match="holds another run"):
        Processes(1, 2).on_first(lambda: pytest.fail("this is not the first process"))
