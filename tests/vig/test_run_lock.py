"""Two scoring runs at once on one folder: the second is refused and touches nothing; a dead one is no hindrance."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from support.launch import held_lock

import vig.scoring.passes
from encoders.runs import RunLock
from vig import load_scores, score


@pytest.mark.parametrize("null", ["blur", "zero"])  # the second run may be the same or another one
def test_a_second_run_is_refused_while_the_first_is_alive(llava, records, image_folder, tmp_path, monkeypatch, null) -> None:
    output, seen, batch = tmp_path / "scores", [], vig.scoring.passes.TwoPasses._batch

    def meanwhile(*arguments: Any) -> Any:
        monkeypatch.setattr(vig.scoring.passes.TwoPasses, "_batch", batch)
        (output / ".tmp-7-shard-0000-00007.parquet").write_bytes(b"being written by the first")
        before = {path.name: path.read_bytes() for path in output.iterdir()}
        with pytest.raises(ValueError, match=str(tmp_path / "scores")):
            score(*llava, records, output, null, image_folder=image_folder)
        assert {path.name: path.read_bytes() for path in output.iterdir()} == before
        seen.append(True)
        return batch(*arguments)

    monkeypatch.setattr(vig.scoring.passes.TwoPasses, "_batch", meanwhile)
    first = score(*llava, records, output, image_folder=image_folder)
    assert seen and first.ids == [record["id"] for record in records] and set(load_scores(output).ids) == set(first.ids)
    again = score(*llava, records, output, image_folder=image_folder)  # both are over
    assert again.ids == first.ids


def test_a_refused_run_holds_nothing(llava, records, image_folder, tmp_path) -> None:
    score(*llava, records, tmp_path, image_folder=image_folder)
    with pytest.raises(ValueError, match="null.name"):  # whose traceback lives on
        score(*llava, records, tmp_path, "zero", image_folder=image_folder)
    score(*llava, records, tmp_path, image_folder=image_folder)


@pytest.mark.parametrize("rank", [0, 3])
def test_no_process_of_another_run_may_be_alive(tmp_path: Path, rank: int) -> None:
    lock = RunLock(tmp_path, 0)
    with held_lock(tmp_path / f"_lock-{rank:04d}"):
        with pytest.raises(ValueError, match=str(tmp_path)):
            lock.take()
        lock.release()
    lock.take()
    locks = [lock, *(RunLock(tmp_path, rank) for rank in (1, 2, 3))]  # of the same run
    for other in locks[1:]:
        other.take()
    with pytest.raises(ValueError, match=str(tmp_path)):
        RunLock(tmp_path, 0).take()
    for held in locks:
        held.release()
    RunLock(tmp_path, 0).take()
