"""Scoring by two real processes: the same scores as by one, killed and resumed by another number of them."""

from __future__ import annotations

import json
import os
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from mof.data.records import images_of
from vig import load_scores, score
from vig.processes import Processes

HERE = Path(__file__).parent
SAME = runpy.run_path(str(HERE / "test_resume.py"))["assert_same"]
TOOLS = runpy.run_path(str(HERE / "conftest.py"))

SCRIPT = """
import json, os, runpy, sys, time
from pathlib import Path
import torch
torch.set_num_threads(1)
import vig.scoring.passes
here, images, output, delay = sys.argv[1:]
tools = runpy.run_path(here + "/conftest.py")
test = runpy.run_path(here + "/test_processes.py")
vig.scoring.passes.SHARD_RECORDS = 2
original = vig.scoring.passes.Scorer._batch
def slow(*args):
    time.sleep(float(delay))
    return original(*args)
vig.scoring.passes.Scorer._batch = slow
records = test["many_records"](Path(images))
rank = int(os.environ["RANK"])
Path(output + f".pid{rank}").write_text(str(os.getpid()))
model, processor = tools["build_llava"]()
for records, folder in ((records, output), (iter(records), None)):
    scores = vig.score(model, processor, records, folder, image_folder=images, batch_size=1)
    manifest = {key: scores.manifest[key] for key in ("failures", "text_only")}
    kind = "folder" if folder else "none"
    Path(output + f".{kind}{rank}.json").write_text(json.dumps({"ids": scores.ids, "vig": scores.vig.tolist(), **manifest}))
"""


def many_records(folder: Path) -> list[dict]:
    """Twelve images, two records on each; one record without an image, and two that cannot be scored."""
    records = TOOLS["build_records"](folder, 12)
    again = [record | {"id": record["id"] + "-again"} for record in records]
    text = {"id": "text", "conversations": [{"from": "human", "value": "Two and two?"}, {"from": "gpt", "value": "Four."}]}
    bad = [records[0] | {"id": "missing", "image": "missing.png"}, records[0] | {"id": "empty", "conversations": []}]
    return [*records[:6], text, *again, bad[0], *records[6:], bad[1]]


def command(folder: Path, delay: float = 0.0) -> list[str]:
    """Two processes that score what `many_records(folder / "images")` gives into folder / "scores"."""
    script = folder / "score.py"
    script.write_text(SCRIPT)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(script)]
    return [*launch, str(HERE), str(folder / "images"), str(folder / "scores"), str(delay)]


ENVIRONMENT = {**os.environ, "PYTHONPATH": str(HERE.parents[1]), "OMP_NUM_THREADS": "1"}


@pytest.fixture
def one(llava, tmp_path):
    """The scores of one process, and what became of the other records."""
    return score(*llava, many_records(tmp_path / "images"), image_folder=tmp_path / "images", batch_size=1)


def owners(folder: Path) -> dict[str, set[str]]:
    """Image -> the processes whose shards hold records on it."""
    images = {record["id"]: images_of(record) for record in many_records(folder.parent / "images")}
    found: dict[str, set[str]] = {}
    for path in folder.glob("shard-*.parquet"):
        for id in pq.read_table(path)["id"].to_pylist():
            found.setdefault(images[id][0], set()).add(path.name.split("-")[1])
    return found


def test_two_processes_give_what_one_gives(one, tmp_path) -> None:
    run = subprocess.run(command(tmp_path), env=ENVIRONMENT, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    results = [json.loads(path.read_text()) for path in tmp_path.glob("scores.*.json")]
    assert len(results) == 4 and all(result == results[0] for result in results)  # two processes, with a folder and without
    assert results[0]["ids"] == one.ids and len(one) == 24  # order too
    assert results[0]["vig"] == pytest.approx(one.vig.tolist(), abs=1e-5)
    assert results[0]["text_only"] == ["text"] and results[0]["failures"] == one.failures
    loaded = load_scores(tmp_path / "scores")
    SAME(loaded, one, atol=1e-5)
    assert loaded.failures == one.failures and loaded.manifest["text_only"] == ["text"]
    of_image = owners(tmp_path / "scores")
    assert set.union(*of_image.values()) == {"0000", "0001"}
    assert all(len(processes) == 1 for processes in of_image.values())  # of one image all in one


def start_and_kill(folder: Path, shards: int, *, all: bool) -> set[str]:
    """Kill one of two processes or all, once both have saved so many shards in all; the ids that are then saved."""
    with subprocess.Popen(
        command(folder, delay=0.15), env=ENVIRONMENT, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True
    ) as run:
        deadline = time.monotonic() + 240
        while len(list((folder / "scores").glob("shard-*.parquet"))) < shards:
            assert run.poll() is None and time.monotonic() < deadline, run.communicate()[1]
            time.sleep(0.02)
        processes = [int((folder / f"scores.pid{rank}").read_text()) for rank in (0, 1)]
        for pid in [run.pid, *processes] if all else processes[1:]:
            os.kill(pid, signal.SIGKILL)
        run.communicate(timeout=60)
    return {score.id for score in load_scores(folder / "scores")}


def test_killed_and_resumed_by_another_number_of_processes(llava, one, tmp_path) -> None:
    first = start_and_kill(tmp_path, 3, all=False)
    second = start_and_kill(tmp_path, 8, all=True)
    assert 4 <= len(first) < len(second) < 24 and first < second
    records, output = many_records(tmp_path / "images"), tmp_path / "scores"
    resumed = score(*llava, records, output, image_folder=tmp_path / "images", batch_size=1)
    assert resumed.ids == one.ids and resumed.failures == one.failures
    SAME(resumed, one, atol=1e-5)
    assert sum(pq.read_metadata(path).num_rows for path in output.glob("shard-*.parquet")) == 24  # none was scored twice
    assert not list(output.glob("*.tmp"))


class Two(Processes):
    """The first of two processes, where the other always gives another value."""

    def gather(self, value):
        return [value, "another"]


def test_processes_that_do_not_agree_are_refused() -> None:
    with pytest.raises(ValueError, match="2 processes score together, but the records are not the same on all of them"):
        Two(0, 2).require_equal("one", "the records")
    Processes().require_equal("one", "the records")


def test_what_the_first_process_finds_is_raised_by_all(monkeypatch) -> None:
    refusal = ValueError("holds another run")
    monkeypatch.setattr(Processes, "gather", lambda self, value: [refusal, value])
    with pytest.raises(ValueError, match="holds another run"):
        Processes(1, 2).on_first(lambda: pytest.fail("this is not the first process"))
