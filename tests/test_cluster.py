"""The jobs on two nodes of a Ray cluster, one of which is lost in the middle, give the bytes that one process gives."""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from PIL import Image
from support.cluster_jobs import JOBS, both_embeddings, files_of, numbered_tar, picture, results, write_data
from support.killing_encoder import KillingEncoder
from support.pictures import encoded
from support.tiny import TinyEncoder
from support.tiny_llava import build_llava

from encoders import FeatureStore, encode_images
from encoders.cluster import Cluster, GivenUp, file_number, grown, worked
from encoders.cluster.actor import Parcel
from encoders.cluster.pool import Actors
from encoders.command_options import ClusterOptions


class Numbers(list):
    """An item of numbers."""

    def halves(self) -> list[Numbers]:
        middle = len(self) // 2
        return [Numbers(self[:middle]), Numbers(self[middle:])] if middle else []


def test_items_are_done_in_order_and_taken_as_they_are_needed() -> None:
    taken = []

    def items() -> Iterator[Numbers]:
        for number in range(40):
            taken.append(number)
            yield Numbers([number])

    for lanes in (1, 3):
        taken.clear()
        work = worked(lambda: sum, items(), lanes=lanes)
        assert next(work) == ([0], [([0], 0)]) and len(taken) <= lanes + 1
        assert [item[0] for item, _ in work] == list(range(1, 40))


def test_an_item_is_a_small_part_of_the_work_before_it() -> None:
    starts = [0]
    while starts[-1] < 100_000:
        starts.append(starts[-1] + grown(starts[-1], 8, 1000))
    sizes = np.diff(starts)
    assert sizes[:32].tolist() == [8] * 32 and sizes.max() == 1000 and all(size % 8 == 0 for size in sizes)
    assert all(size <= max(8, start / 32) for start, size in zip(starts, sizes, strict=False))
    assert grown(0, 64, 10) == 64


def test_parts_of_items_have_numbers_of_their_own() -> None:
    numbers = [file_number(item, part) for item in (0, 1, 10**6) for part in range(1, 2**12)]
    assert len(set(numbers)) == len(numbers) and file_number(7) == 7


def test_options_of_a_cluster() -> None:
    assert ClusterOptions(None, None, None).cluster() is None
    assert ClusterOptions("", None, "2:8").cluster() == Cluster("", None, 2, 8)
    assert ClusterOptions("host:1", 0.5, None).cluster() == Cluster("host:1", 0.5)
    for actors in ("8", "2:1", "0:1", "a:b", ""):
        with pytest.raises(ValueError, match=f"--actors {actors}.*MIN:MAX"):
            ClusterOptions("", None, actors).cluster()
    with pytest.raises(ValueError, match="--ray"):
        ClusterOptions(None, 1.0, None).cluster()


def test_a_dead_cluster_is_found_out_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray tries a dead address for a quarter of an hour, also the address that `ray start` left behind before it crashed."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    assert Cluster().reachable() == "local" and Cluster("auto").reachable() == "auto"
    (tmp_path / "ray").mkdir()
    with socket.create_server(("127.0.0.1", 0)) as server:
        alive = f"127.0.0.1:{server.getsockname()[1]}"
        (tmp_path / "ray/ray_current_cluster").write_text(alive)
        assert Cluster().reachable() == Cluster(alive).reachable() == alive
    assert Cluster().reachable() == "local"
    with pytest.raises(ConnectionError, match=f"no Ray cluster answers at {alive}"):
        Cluster(alive).reachable()
    monkeypatch.setenv("RAY_ADDRESS", alive)
    with pytest.raises(ConnectionError, match=alive):
        Cluster().reachable()


@pytest.mark.slow
def test_a_model_that_has_run_works_in_another_process(tmp_path: Path) -> None:
    """Transformers keeps hooks on it, which record hidden states, and a registry of the hidden states that it can give."""
    cloudpickle = pytest.importorskip("ray.cloudpickle")
    model, _ = build_llava()
    inputs = {"input_ids": torch.arange(5, 15)[None], "output_hidden_states": True}
    expected = model(**inputs).hidden_states
    (tmp_path / "parcel").write_bytes(cloudpickle.dumps(Parcel(partial(model, **inputs))))
    load = "import sys, torch, ray.cloudpickle as c; p = sys.argv[1]; torch.save(c.load(open(p, 'rb'))().hidden_states, p + '.pt')"
    subprocess.run([sys.executable, "-c", load, str(tmp_path / "parcel")], check=True)
    sent = torch.load(tmp_path / "parcel.pt")
    assert len(sent) == len(expected) > 1 and all(torch.equal(a, b) for a, b in zip(sent, expected, strict=True))


class StandInRay:
    """Stands in for Ray on one node: an actor dies, with all that it works on, when it works on an item with a number of `killers`."""

    class exceptions:
        RayError = type("RayError", (Exception,), {})
        RayTaskError = type("RayTaskError", (RayError,), {})

    def __init__(self, killers: set[int], seed: int) -> None:
        self.killers, self.random, self.running, self.dead = killers, random.Random(seed), dict[object, tuple[Any, Any]](), set[Any]()

    def nodes(self) -> list[dict[str, Any]]:
        return [{"Alive": True, "Resources": {"CPU": 1}}]

    def remote(self, **needs: Any) -> Any:
        return lambda _: SimpleNamespace(remote=self._new)

    def _new(self, *_: Any) -> Any:
        method = SimpleNamespace(remote=partial(self._begin, object()))
        return SimpleNamespace(start=method, work=method)

    def _begin(self, actor: object, item: Any = ()) -> object:
        reference = object()
        self.running[reference] = actor, item
        return reference

    def wait(self, references: list[object], timeout: float) -> tuple[list[object], list[object]]:
        if not references:
            return [], []
        actor, _ = self.running[self.random.choice(references)]
        beside = [reference for reference in references if self.running[reference][0] == actor]
        if any(self.killers.intersection(self.running[reference][1]) for reference in beside):
            self.dead.add(actor)
            return beside, []
        return beside[:1], []

    def get(self, reference: object) -> int:
        actor, item = self.running.pop(reference)
        if actor in self.dead:
            raise self.exceptions.RayError("the actor died")
        return sum(item)

    def put(self, value: Any) -> Any:
        return value

    def kill(self, actor: Any) -> None:
        pass


@pytest.mark.parametrize("actors", [1, 3])
def test_work_beside_an_item_that_kills_is_not_given_up(actors: int) -> None:
    """An actor with two lanes loses both of its items at a time."""
    for seed in range(5):
        killers = {7 + seed, 100, 101}
        work = Actors(StandInRay(killers, seed), lambda: sum, Cluster(most=actors), lanes=2)
        parts = [part for _, parts in work.run(Numbers(range(start, start + 16)) for start in range(0, 128, 16)) for part in parts]
        assert [number for part, _ in parts for number in part] == list(range(128))
        assert {number for part, result in parts if isinstance(result, GivenUp) for number in part} == killers
        assert sum(result for _, result in parts if not isinstance(result, GivenUp)) == sum(set(range(128)) - killers)


# --- on two nodes ---

needs_ray = pytest.mark.skipif("not __import__('importlib.util').util.find_spec('ray')", reason="ray is not installed")
NODE = {"num_cpus": 1, "object_store_memory": 150 * 2**20}


class Nodes:
    """A cluster of two nodes with a core each."""

    def __init__(self) -> None:
        import ray
        from ray.cluster_utils import Cluster as RayCluster

        self.cluster, self.second = RayCluster(), None
        for left in (2, 1, 0):  # on a busy machine, Ray's 30 seconds for a start may be over too soon
            try:
                self.cluster.add_node(**NODE, include_dashboard=False)
                break
            except Exception:
                if not left:
                    raise
        ray.init(self.cluster.address, log_to_driver=False, logging_level="ERROR")
        self.grow()

    def grow(self) -> None:
        if self.second is None:
            self.second = self.cluster.add_node(**NODE)
            self.cluster.wait_for_nodes()

    def remove_second(self) -> None:
        self.cluster.remove_node(self.second, allow_graceful=False)
        self.second = None

    def kill_an_actor(self) -> None:
        raylets = [psutil.Process(node.all_processes["raylet"][0].process.pid) for node in self.cluster.list_all_nodes()]
        workers = [process for raylet in raylets for process in raylet.children() if "::_Actor" in " ".join(process.cmdline())]
        workers[0].kill()

    @contextmanager
    def losing(self, lose: Callable[[], None], results: Callable[[], int], after: int) -> Iterator[None]:
        """Call `lose` once there are so many results; the work must not be over then."""
        self.grow()
        over, lost_at = threading.Event(), list[int]()

        def watch() -> None:
            while results() < after and not over.is_set():
                time.sleep(0.02)
            lost_at.append(results())
            lose()

        thread = threading.Thread(target=watch)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()
        assert lost_at[0] < results(), "all was over before the loss"


@pytest.fixture(scope="module")
def nodes() -> Iterator[Nodes]:
    root = Path(__file__).parents[1]  # actors find the helpers of tests
    os.environ.update(RAY_USAGE_STATS_ENABLED="0", RAY_DEDUP_LOGS="0", PYTHONPATH=f"{root}{os.pathsep}{root / 'tests'}")
    nodes = Nodes()
    yield nodes
    import ray

    ray.shutdown()
    nodes.cluster.shutdown()


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module", params=JOBS)
def alone(request: pytest.FixtureRequest, data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path, Any]:
    """The name of a job, the folder that this process filled, and what the job returned."""
    out = tmp_path_factory.mktemp(request.param) / "alone"
    return request.param, out, JOBS[request.param][0](data, out, None)


def test_the_jobs_alone(alone: tuple[str, Path, Any]) -> None:
    """The results that those of a cluster are compared with."""
    name, out, result = alone
    if name == "encode":
        assert (result.images, result.duplicates, result.unreadable) == (137, 9, 4)  # a double of image 3 is sound
    elif name == "search":
        cosines = [x.astype(np.float64) @ x.T.astype(np.float64) for x in both_embeddings()]
        assert result[0] == int(np.triu((cosines[0] > 0.6) & (cosines[1] < 0.2), 1).sum())
        assert len(files_of(out)) == 19 * 20 // 2 + 1
    elif name == "score":
        assert len(result[0]) == 24
    else:
        assert len(result[0]) == 25 and result[0][5].error


@needs_ray
@pytest.mark.slow
@pytest.mark.multiprocess
def test_a_lost_node(nodes: Nodes, alone: tuple[str, Path, Any], data: Path, tmp_path: Path) -> None:
    name, folder, expected = alone
    job, _, middle = JOBS[name]
    with nodes.losing(nodes.remove_second, partial(results, name, tmp_path / "nodes"), middle):
        result = job(data, tmp_path / "nodes", Cluster())
    assert result == expected and files_of(tmp_path / "nodes") == files_of(folder)


@needs_ray
@pytest.mark.slow
@pytest.mark.multiprocess
def test_a_killed_actor(nodes: Nodes, data: Path, tmp_path: Path) -> None:
    job, _, middle = JOBS["encode"]
    expected = job(data, tmp_path / "alone", None)
    with nodes.losing(nodes.kill_an_actor, partial(results, "encode", tmp_path / "nodes"), middle):
        assert job(data, tmp_path / "nodes", Cluster()) == expected
    assert files_of(tmp_path / "nodes") == files_of(tmp_path / "alone")


@needs_ray
@pytest.mark.slow
@pytest.mark.multiprocess
def test_a_killed_driver_goes_on_from_the_finished_files(nodes: Nodes, alone: tuple[str, Path, Any], data: Path, tmp_path: Path) -> None:
    (name, folder, expected), out = alone, tmp_path / "nodes"
    job, pattern, middle = JOBS[name]
    nodes.grow()
    root = Path(__file__).parents[1]
    environment = {**os.environ, "PYTHONPATH": f"{root}:{root}/tests", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "support.cluster_jobs", name, data, out, nodes.cluster.address]
    driver = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE)
    while results(name, out) < middle:
        assert driver.poll() is None, driver.communicate()[1]
        time.sleep(0.02)
    driver.send_signal(signal.SIGKILL)
    driver.wait()
    time.sleep(1)  # its actors end
    before = {path: path.stat().st_mtime_ns for path in out.glob(pattern)}
    done = results(name, out)
    result = job(data, out, Cluster())
    assert middle <= done < results(name, out), "all was over before the driver was killed"
    assert name == "answer" or {path: path.stat().st_mtime_ns for path in before} == before, "finished files stay"
    assert files_of(out) == files_of(folder)
    assert result.encoded < result.images if name == "encode" else result[0] == expected[0]


@needs_ray
@pytest.mark.slow
@pytest.mark.multiprocess
def test_an_image_that_kills_every_process_is_listed_and_costs_itself_alone(nodes: Nodes, tmp_path: Path) -> None:
    """It stands beside images that only cannot be read: damaged, far too large, empty, a pipe; and beside sound images."""
    sound = [picture(number) for number in range(4)]
    grey, huge = encoded(Image.new("RGB", (40, 40), "grey")), encoded(Image.new("1", (20_000, 20_000)))
    tar = numbered_tar(tmp_path / "photos.tar", [*sound[:2], grey, sound[2][:90], huge, b"", *sound[2:]])
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "folder/pipe.png")
    images = [tar, tmp_path / "folder"]
    nodes.grow()
    report = encode_images(images, {"a": KillingEncoder()}, tmp_path / "store", progress=False, cluster=Cluster())
    assert (report.images, report.unreadable) == (4, 5)
    failures = {row["name"]: row["reason"] for row in map(json.loads, (tmp_path / "store/failures.jsonl").read_text().splitlines())}
    assert "every process that worked on it died, 3 in all" in failures.pop(f"{tar}/0002.png")
    encode_images(images, {"a": TinyEncoder(16, 8, 32, 0.5, 1)}, tmp_path / "plain", progress=False)
    store, expected = FeatureStore(tmp_path / "store"), FeatureStore(tmp_path / "plain")
    plain_failures = {row["name"]: row["reason"] for row in map(json.loads, (tmp_path / "plain/failures.jsonl").read_text().splitlines())}
    assert failures == plain_failures and sorted(failures) == sorted(
        [str(tmp_path / "folder/pipe.png"), *(f"{tar}/{number:04d}.png" for number in (3, 4, 5))]
    )
    for name in store.names:
        ours, theirs = (of.embeddings("a")[of.names.index(name)] for of in (store, expected))
        np.testing.assert_allclose(ours, theirs, atol=1e-6)
