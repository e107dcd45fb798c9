"""The shared ledger: with killed workers, other machines, restarts and other searches, the result is always that of a single run."""

import json
import multiprocessing
import os
import random
import socket
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from support.spectra import embeddings

from encoders.runs import RunFile
from mof import blind_pairs
from mof.pairs import comparison as pair_comparison
from mof.pairs import ledger as pair_ledger
from mof.pairs.comparison import PairComparison

THRESHOLDS = (0.6, 0.2)


@pytest.fixture(autouse=True)
def small_squares(monkeypatch):
    monkeypatch.setattr(pair_ledger, "SMALLEST", 128)
    monkeypatch.setattr(pair_comparison, "TILE", 32)


def collection(count: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    return embeddings(rng, count, 24, "usual"), embeddings(rng, count, 24, "flat")


def arrays(pairs) -> list[np.ndarray]:
    return [pairs.i, pairs.j, pairs.clip_similarity, pairs.dino_similarity, np.array([pairs.images, pairs.total])]


def work(folder, result, count):
    torch.set_num_threads(1)  # a pool of threads does not outlive a fork
    within = PairComparison.within
    PairComparison.within = lambda self, *square: (time.sleep(0.03), within(self, *square))[1]  # long enough to be killed in
    pairs = blind_pairs(*collection(count), *THRESHOLDS, ledger=folder)
    np.savez(result, *arrays(pairs))


@pytest.mark.multiprocess
def test_four_processes_two_of_them_killed(tmp_path):
    count, folder = 1200, tmp_path / "ledger"
    single = blind_pairs(*collection(count), *THRESHOLDS)
    assert len(single) > 1000
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=work, args=(folder, tmp_path / f"{n}.npz", count)) for n in range(4)]
    for worker in workers:
        worker.start()
    while len(list(folder.glob("*.npz"))) < 5:
        time.sleep(0.01)
    doomed = random.sample(range(4), 2)
    for n in doomed:
        time.sleep(random.uniform(0, 0.1))
        workers[n].kill()
        workers[n].join()
    killed_at = len(list(folder.glob("*.npz")))
    for worker in workers:
        worker.join(60)  # far less than the time-out of a claim
    squares = 10 * 11 // 2
    assert killed_at < squares, "all was over before the second was killed"
    assert len([path for path in folder.glob("*-*.npz") if not path.name.startswith(".tmp-")]) == squares
    for n in set(range(4)) - set(doomed):
        assert workers[n].exitcode == 0
        with np.load(tmp_path / f"{n}.npz") as found:
            for ours, theirs in zip(arrays(single), found.values(), strict=True):
                np.testing.assert_array_equal(ours, theirs)


@pytest.fixture
def compared(monkeypatch) -> list:
    """Return the list of squares that are compared, not read from the ledger."""
    squares, within = [], PairComparison.within
    monkeypatch.setattr(PairComparison, "within", lambda self, *square: (squares.append(square[:2]), within(self, *square))[1])
    return squares


def search(folder, above=0.6, below=0.2, **arguments):
    clip, dino = collection(300)
    return blind_pairs(clip, dino, above, below, ledger=folder, **arguments)


def test_a_restart_does_what_is_missing_and_no_more(tmp_path, compared, monkeypatch):
    whole = search(tmp_path)
    assert len(compared) == 6
    results = sorted(tmp_path.glob("*.npz"))
    results[2].unlink()
    (tmp_path / f".tmp-there-17-{results[2].name}").write_bytes(b"half")  # of a worker killed while it wrote
    (tmp_path / results[2].with_suffix(".claim").name).write_text(f"{socket.gethostname()} 4194305")  # no process has that number
    monkeypatch.setattr(pair_comparison, "TILE", 96)  # a machine of another kind may compare in other tiles
    again = search(tmp_path)
    assert len(compared) == 7
    for ours, theirs in zip(arrays(whole), arrays(again), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert not list(tmp_path.glob("*.claim"))


def test_the_claim_of_another_machine_counts_while_it_is_renewed(tmp_path, monkeypatch, compared):
    monkeypatch.setattr(pair_ledger, "POLL", 0.05)
    monkeypatch.setattr(pair_ledger, "TIMEOUT", 0.4)
    search(tmp_path)
    (tmp_path / "0-128.npz").unlink()
    claim = tmp_path / "0-128.claim"
    claim.write_text("elsewhere 1")
    sleep, start, looks = time.sleep, time.monotonic(), []

    def renew(seconds: float) -> None:
        sleep(seconds)
        looks.append(len(compared))
        if len(looks) < 12:
            os.utime(claim, ns=(0, len(looks)))  # by a clock that is years behind

    monkeypatch.setattr(pair_ledger.time, "sleep", renew)
    search(tmp_path)
    assert looks[11] == 6  # not while it was renewed
    assert len(compared) == 7
    assert time.monotonic() - start > 0.4 + 11 * 0.05


def test_a_long_square_renews_its_claim(tmp_path, monkeypatch):
    monkeypatch.setattr(pair_ledger, "RENEWAL", 0.0)
    monkeypatch.setattr(pair_comparison, "GROUP", 2)
    written = []
    write = pair_ledger.write_text
    monkeypatch.setattr(pair_ledger, "write_text", lambda path, text: (written.append(path.name), write(path, text)))
    search(tmp_path)
    assert len(set(written)) == 6 < len(written)


@pytest.mark.parametrize(
    ("change", "message"),
    [({"above": 0.61}, "clip_above"), ({"below": 0.1}, "dino_below"), ({"max_pairs": 3}, "kept_per_square")],
)
def test_the_ledger_of_another_search_is_refused(tmp_path, change, message):
    search(tmp_path)
    with pytest.raises(ValueError, match=rf"\n  {message}: "):
        search(tmp_path, **change)


def test_of_two_searches_that_start_together_only_the_same_is_joined(tmp_path, monkeypatch):
    write = RunFile.write
    monkeypatch.setattr(RunFile, "write", lambda self, identity: (time.sleep(0.2), write(self, identity))[1])
    with ThreadPoolExecutor(3) as pool:
        started = [pool.submit(search, tmp_path / "new", above) for above in (0.6, 0.61, 0.6)]
    refused = [isinstance(search.exception(), ValueError) for search in started]
    assert refused in ([False, True, False], [True, False, True])


def test_a_ledger_of_an_earlier_release_is_continued(tmp_path, compared):
    search(tmp_path)
    identity = json.loads((tmp_path / "ledger.json").read_text())["identity"]
    (tmp_path / "ledger.json").write_text(json.dumps(identity, indent=1))
    search(tmp_path)
    assert len(compared) == 6
    (tmp_path / "ledger.json").write_text(json.dumps(identity, indent=1))
    with pytest.raises(ValueError, match="clip_above"):
        search(tmp_path, above=0.61)


def test_other_embeddings_are_refused_to_the_last_bit(tmp_path):
    clip, dino = collection(300)
    blind_pairs(clip, dino, ledger=tmp_path)
    dino[299, 23] = np.nextafter(dino[299, 23], np.float32(1))
    with pytest.raises(ValueError, match=r"\n  dino: "):
        blind_pairs(clip, dino, ledger=tmp_path)


@pytest.mark.parametrize(("content", "message"), [("mine", r"ledger\.json"), ('{"format": 0, "identity": {}}', "format 0")])
def test_a_folder_that_holds_something_else_is_refused(tmp_path, content, message):
    (tmp_path / "ledger.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        search(tmp_path)


@pytest.mark.parametrize("rules", [{"max_pairs": 5}, {"max_pairs": 0}, {"max_pairs": 9, "one_per_image": True}, {"per_cluster": 2}])
def test_bounded_results_come_out_the_same(tmp_path, rules):
    alone = blind_pairs(*collection(300), *THRESHOLDS, **rules)
    shared = search(tmp_path, **rules)
    assert alone.total > 20
    for ours, theirs in zip(arrays(alone), arrays(shared), strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("count", [0, 1, 2])
def test_tiny_collections(tmp_path, count):
    assert blind_pairs(*collection(count), -1, 1, ledger=tmp_path).images == count


def test_a_damaged_or_foreign_square_is_compared_again(tmp_path, compared, caplog):
    whole = search(tmp_path / "ledger")
    other = search(tmp_path / "other", 0.61)
    assert len(other) != len(whole)
    rng = random.Random(0)
    square, copied, foreign = (tmp_path / "ledger" / name for name in ("0-0.npz", "0-128.npz", "128-128.npz"))
    copied.write_bytes(square.read_bytes())
    foreign.write_bytes((tmp_path / "other" / foreign.name).read_bytes())
    for ours, theirs in zip(arrays(whole), arrays(search(tmp_path / "ledger")), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert "0-128.npz holds the square 0-0 of this search" in caplog.text
    assert "128-128.npz holds the square 128-128 of another search" in caplog.text
    sound = square.read_bytes()
    for _ in range(20):
        damaged = bytearray(sound)
        damaged[rng.randrange(len(damaged))] ^= 1 << rng.randrange(8)
        square.write_bytes(damaged)
        before = len(compared)
        for ours, theirs in zip(arrays(whole), arrays(search(tmp_path / "ledger")), strict=True):
            np.testing.assert_array_equal(ours, theirs)
        assert len(compared) == before + 1 and square.read_bytes() != damaged
