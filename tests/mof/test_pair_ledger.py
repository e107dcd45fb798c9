"""The ledger of a search: killed, damaged, of earlier releases and of other searches, the result is always that of a single run."""

import multiprocessing
import pickle
import random
import time

import numpy as np
import pytest
import torch
from support.launch import held_after
from support.spectra import embeddings

from encoders.runs import RunLock
from mof import blind_pairs
from mof.pairs import comparison as pair_comparison
from mof.pairs import ledger as pair_ledger
from mof.pairs.comparison import PairComparison
from mof.pairs.embedding_rows import EmbeddingRows
from mof.pairs.ledger import square_size

THRESHOLDS = (0.6, 0.2)


@pytest.fixture(autouse=True)
def small_squares(monkeypatch):
    monkeypatch.setattr(pair_ledger, "square_size", lambda images: 128)
    monkeypatch.setattr(pair_comparison, "TILE", 32)


def collection(count: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    return embeddings(rng, count, 24, "usual"), embeddings(rng, count, 24, "flat")


def arrays(pairs) -> list[np.ndarray]:
    return [pairs.i, pairs.j, pairs.clip_similarity, pairs.dino_similarity, np.array([pairs.images, pairs.total])]


def work(folder, result, count):
    torch.set_num_threads(1)  # a pool of threads does not outlive a fork
    PairComparison.within = held_after(8, PairComparison.within)
    pairs = blind_pairs(*collection(count), *THRESHOLDS, ledger=folder)
    np.savez(result, *arrays(pairs))


@pytest.mark.multiprocess
def test_a_killed_search_goes_on(tmp_path):
    count, folder = 1200, tmp_path / "ledger"
    single = blind_pairs(*collection(count), *THRESHOLDS)
    assert len(single) > 1000
    worker = multiprocessing.get_context("fork").Process(target=work, args=(folder, tmp_path / "never.npz", count))
    worker.start()
    while len(list(folder.glob("*-*.npz"))) < 5:
        assert worker.is_alive()
        time.sleep(0.01)
    worker.kill()
    worker.join()
    before = {path.name: path.stat().st_mtime_ns for path in folder.glob("[0-9]*.npz")}
    squares = 10 * 11 // 2
    assert len(before) < squares, "all was over before it was killed"
    again = blind_pairs(*collection(count), *THRESHOLDS, ledger=folder)
    assert {name: (folder / name).stat().st_mtime_ns for name in before} == before
    assert len(list(folder.glob("*.npz"))) == squares
    for ours, theirs in zip(arrays(single), arrays(again), strict=True):
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
    (tmp_path / results[2].with_suffix(".claim").name).write_text("host 17")  # of an earlier release
    monkeypatch.setattr(pair_comparison, "TILE", 96)  # a machine of another kind may compare in other tiles
    again = search(tmp_path)
    assert len(compared) == 7
    for ours, theirs in zip(arrays(whole), arrays(again), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert not list(tmp_path.glob("*.claim"))


@pytest.mark.parametrize(
    ("change", "message"),
    [({"above": 0.61}, "clip_above"), ({"below": 0.1}, "dino_below"), ({"max_pairs": 3}, "kept_per_square")],
)
def test_the_ledger_of_another_search_is_refused(tmp_path, change, message):
    search(tmp_path)
    with pytest.raises(ValueError, match=rf"\n  {message}: "):
        search(tmp_path, **change)


def test_a_ledger_of_an_earlier_release_is_continued_in_its_own_squares(tmp_path, compared, monkeypatch):
    whole = search(tmp_path)
    (tmp_path / "128-128.npz").unlink()
    monkeypatch.setattr(pair_ledger, "square_size", lambda images: 32)
    for ours, theirs in zip(arrays(whole), arrays(search(tmp_path)), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert len(compared) == 7


def test_two_searches_do_not_write_at_the_same_time(tmp_path):
    search(tmp_path)
    with RunLock(tmp_path), pytest.raises(ValueError, match="another run is writing"):
        search(tmp_path)


def test_few_squares_for_few_images():
    assert [square_size(images) for images in (0, 100, 5000, 100_000, 400_000, 10**7)] == [256, 256, 320, 6272, 8192, 156256]


def test_a_file_of_embeddings_is_mapped_by_other_processes(tmp_path):
    clip, _ = collection(4000)
    np.save(tmp_path / "clip.npy", clip)
    mapped = np.load(tmp_path / "clip.npy", mmap_mode="c")
    content = pickle.dumps(EmbeddingRows(mapped, "clip"))
    assert len(content) < 10_000 < clip.nbytes
    index = torch.arange(5)
    assert torch.equal(pickle.loads(content).take(index), EmbeddingRows(clip, "clip").take(index))
    assert len(pickle.dumps(EmbeddingRows(mapped[5:], "clip"))) > clip.nbytes / 2, "a part of a file is sent"
    mapped[7] *= 2  # in memory only
    with pytest.raises(ValueError, match=r"clip\.npy is not the same"):
        pickle.loads(pickle.dumps(EmbeddingRows(mapped, "clip")))


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
