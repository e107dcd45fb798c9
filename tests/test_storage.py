"""The four jobs write to S3, which moto's server stands in for, the bytes that they write to a folder."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fsspec.registry import _registry
from support.cluster_jobs import JOBS, files_of, write_data
from support.commands import mof
from support.tiny import TinyEncoder
from support.tiny_llava import build_llava

from encoders import FeatureStore, encode_images, storage
from encoders.cluster import Cluster, worked
from encoders.storage import fetched, located
from encoders.whole_files import write_text
from mof.evals.answerers import LocalModel
from mof.evals.answering import Answer, AnswerCache, Prompt
from mof.evals.run import Run
from vig import load_scores

pytest.importorskip("s3fs")
server = pytest.importorskip("moto.server")


@pytest.fixture(scope="module")
def s3() -> Iterator[Any]:
    """The storage, with an empty bucket."""
    import s3fs

    moto = server.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    moto.start()
    with pytest.MonkeyPatch.context() as patch:
        names = {"AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b", "AWS_DEFAULT_REGION": "us-east-1"}
        for name, value in (names | {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{moto.get_host_and_port()[1]}"}).items():
            patch.setenv(name, value)
        s3fs.S3FileSystem.clear_instance_cache()
        files = s3fs.S3FileSystem(use_listings_cache=False)
        files.mkdir("bucket")
        yield files
        s3fs.S3FileSystem.clear_instance_cache()
    moto.stop()


@pytest.fixture(autouse=True)
def machine(s3: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("MOF_COPIES", str(tmp_path / "machine"))
    yield
    type(s3).clear_instance_cache()  # they keep the credentials that a test took away


@pytest.fixture(scope="module")
def cluster(s3: Any) -> Iterator[Cluster]:
    """A cluster of this machine, which knows the storage."""
    pytest.importorskip("ray")
    with Cluster("local").connected():
        yield Cluster()


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module", params=JOBS)
def alone(request: pytest.FixtureRequest, data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[str, bytes], Any]:
    """The name of a job, the files that it writes to a folder, and what it returns."""
    out = tmp_path_factory.mktemp(request.param) / "alone"
    result = JOBS[request.param][0](data, out, None)
    return request.param, files_of(out), result


def objects(s3: Any, folder: str) -> dict[str, bytes]:
    return {name.removeprefix(f"{folder}/"): s3.cat_file(name) for name in s3.find(folder)}


def results(s3: Any, name: str, folder: str) -> int:
    there = s3.glob(f"{folder}/{JOBS[name][1]}")
    return sum(len(s3.cat_file(file).splitlines()) for file in there) if name == "answer" else len(there)


@pytest.mark.slow
@pytest.mark.multiprocess
def test_a_killed_job_goes_on_on_another_machine(s3: Any, alone: tuple[str, dict[str, bytes], Any], data: Path, tmp_path: Path) -> None:
    name, expected_files, expected = alone
    root = Path(__file__).parents[1]
    environment = {**os.environ, "PYTHONPATH": f"{root}:{root}/tests", "OMP_NUM_THREADS": "1", "MOF_COPIES": str(tmp_path / "killed")}
    command = [sys.executable, "-m", "support.cluster_jobs", name, data, f"s3://bucket/killed-{name}"]
    job = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE)
    while results(s3, name, f"bucket/killed-{name}") < JOBS[name][2]:
        assert job.poll() is None, job.communicate()[1]
        time.sleep(0.02)
    job.kill()
    job.wait()
    half = s3.find(f"bucket/killed-{name}", detail=True)
    done = results(s3, name, f"bucket/killed-{name}")
    result = JOBS[name][0](data, located(f"s3://bucket/killed-{name}"), None)
    assert done < results(s3, name, f"bucket/killed-{name}"), "all was over before the job was killed"
    assert objects(s3, f"bucket/killed-{name}") == expected_files
    assert result.encoded < result.images if name == "encode" else result[0] == expected[0]
    kept = [file for file in half if Path(file).match(JOBS[name][1]) and name != "answer"]
    assert all(s3.info(file)["LastModified"] == half[file]["LastModified"] for file in kept), "finished files stay"


@pytest.mark.slow
@pytest.mark.multiprocess
def test_the_actors_of_a_cluster_write_to_storage(s3: Any, alone: tuple[str, dict[str, bytes], Any], data: Path, cluster: Cluster) -> None:
    name, expected_files, expected = alone
    result = JOBS[name][0](data, located(f"s3://bucket/ray-{name}"), cluster)
    assert objects(s3, f"bucket/ray-{name}") == expected_files and result == expected


@pytest.mark.slow
def test_files_that_other_machines_wrote_are_fetched(
    s3: Any, alone: tuple[str, dict[str, bytes], Any], data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, expected_files, expected = alone
    folder = located(f"s3://bucket/others-{name}")

    def elsewhere(*arguments: Any) -> Iterator[Any]:
        for done in worked(*arguments):
            for file in folder.glob(JOBS[name][1]):
                file.unlink()  # as if this machine had not written it
            yield done

    for module in ("encoders.store.writer", "mof.pairs.ledger", "vig.scoring.run"):
        monkeypatch.setattr(f"{module}.worked", elsewhere)
    result = JOBS[name][0](data, folder, None)
    assert result == expected and objects(s3, f"bucket/others-{name}") == expected_files == files_of(folder)


def damage(s3: Any, file: str) -> None:
    content = bytearray(s3.cat_file(file))
    content[len(content) // 2] ^= 1
    s3.pipe_file(file, bytes(content))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["encode", "score"])
def test_a_damaged_object_is_named_and_repaired(s3: Any, name: str, data: Path) -> None:
    folder, job = f"bucket/damaged-{name}", JOBS[name][0]
    job(data, located(f"s3://{folder}"), None)
    assert "0 damaged" in mof("verify", f"s3://{folder}").output
    damaged = s3.glob(f"{folder}/{JOBS[name][1]}")[0]
    damage(s3, damaged)
    result = mof("verify", f"s3://{folder}")
    assert result.exit_code == 1 and f"s3://{damaged} " in result.output and "1 damaged" in result.output
    job(data, located(f"s3://{folder}"), None)
    result = mof("verify", f"s3://{folder}")
    assert result.exit_code == 0 and "0 damaged" in result.output


@pytest.mark.slow
def test_readers_open_urls(s3: Any, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("encode", "score"):
        for out in (tmp_path / name, located(f"s3://bucket/read-{name}")):
            JOBS[name][0](data, out, None)
    monkeypatch.setenv("MOF_COPIES", str(tmp_path / "another machine"))
    stores = FeatureStore("s3://bucket/read-encode"), FeatureStore(tmp_path / "encode")
    assert stores[0].names == stores[1].names and (stores[0].embeddings("a") == stores[1].embeddings("a")).all()
    assert "s3://bucket/read-encode" in repr(stores[0])
    assert load_scores("s3://bucket/read-score").table().equals(load_scores(tmp_path / "score").table())
    records = data / "records.json"
    for scores, chosen in (("s3://bucket/read-score", "there.json"), (tmp_path / "score", "here.json")):
        assert mof("vig", "select", "--scores", scores, "--records", records, "--keep", "0.5", "-o", tmp_path / chosen).exit_code == 0
    assert (tmp_path / "there.json").read_bytes() == (tmp_path / "here.json").read_bytes()


def test_only_changed_files_are_downloaded(s3: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    s3.pipe({f"bucket/changing/{name}": b"old" for name in "abc"})
    folder = fetched("s3://bucket/changing")
    write_text(folder / "d", "ours")
    s3.pipe_file("bucket/changing/b", b"new")
    downloaded, fetch = [], storage._fetch
    monkeypatch.setattr(storage, "_fetch", lambda place, file, info: (downloaded.append(file.name), fetch(place, file, info)))
    fetched(folder)
    assert downloaded == ["b"] and files_of(folder) == objects(s3, "bucket/changing")
    downloaded.clear()
    fetched(folder, again=True)
    assert sorted(downloaded) == ["a", "b", "c", "d"]


def test_objects_that_stand_for_folders_are_left_out(s3: Any) -> None:
    for name in ("", "sub/", "sub/a"):
        s3.call_s3("put_object", Bucket="bucket", Key=f"console/{name}", Body=b"a" if name == "sub/a" else b"")
    for _ in range(2):
        assert files_of(fetched("s3://bucket/console")) == {"sub/a": b"a"}


def test_an_evaluation(s3: Any, tmp_path: Path) -> None:
    prompts = [Prompt.about(str(number), None, f"{number}?", ("yes", "no")) for number in range(4)]
    for out in ("s3://bucket/evaluation", tmp_path / "evaluation", "s3://bucket/evaluation"):
        run = Run(out, LocalModel(*build_llava(), "tiny", batch_size=2, max_new_tokens=4))  # type: ignore[arg-type]
        result = run.measure(
            "test", prompts, [1], lambda answers: ([{"text": answer.text} for answer in answers], {}, []), decoding="", refused=""
        )
    assert result["usage"]["asked"] == 0, "the answers were kept"
    written = objects(s3, "bucket/evaluation")
    assert written.keys() == {"settings.json", "cache.jsonl", "answers.jsonl", "result.json"}
    assert {name: content for name, content in files_of(tmp_path / "evaluation").items() if name != "result.json"} == {
        name: content for name, content in written.items() if name != "result.json"
    }  # of the second run, which asked nothing


def test_a_reader_takes_no_answers_from_a_run(s3: Any) -> None:
    cache = AnswerCache(fetched("s3://bucket/read-cache") / "cache.jsonl")
    for number in range(4):
        cache.put(str(number), Answer(str(number)))
        if number == 0:
            cache.upload()
        elif number % 2:
            fetched("s3://bucket/read-cache")
    cache.upload()
    kept = AnswerCache(fetched("s3://bucket/read-cache") / "cache.jsonl")
    assert [kept.get(str(number)) for number in range(4)] == [Answer(str(number)) for number in range(4)]


@pytest.mark.slow
def test_blind_pairs(s3: Any, tmp_path: Path, data: Path) -> None:
    common = ["blind-pairs", "--images", data / "photos.tar", "--clip", "mini-clip", "--dino", "mini-dino", "--clip-above", "0.5"]
    for out in ("s3://bucket/pairs", tmp_path / "pairs"):
        result = mof(*common, "--dino-below", "0.9", "-o", out)
        assert result.exit_code == 0 and f"{out}/gallery.html" in result.output, result.output
    assert objects(s3, "bucket/pairs") == files_of(tmp_path / "pairs")


def test_what_is_wrong_is_told_in_a_line(s3: Any, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def said(url: str) -> str:
        result = mof("encode", "--images", data / "photos.tar", "--encoder", "mini-clip", "--output", url)
        assert result.exit_code == 2 and result.output.count("\n") == 1
        return result.output

    assert "s3://nobucket/x cannot be reached" in (text := said("s3://nobucket/x")) and "bucket does not exist" in text
    type(s3).clear_instance_cache()
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    assert "NoCredentialsError" in (text := said("s3://bucket/x")) and "AWS_ACCESS_KEY_ID" in text
    monkeypatch.setitem(sys.modules, "s3fs", None)
    monkeypatch.delitem(_registry, "s3")
    assert 'pip install "mof-vig[s3]"' in said("s3://bucket/x")


def test_an_encoder_is_added_to_a_store(s3: Any, data: Path, tmp_path: Path) -> None:
    for out in ("s3://bucket/grown", tmp_path / "grown"):
        for name, encoder in (("a", TinyEncoder(16, 8, 32, 0.5, 1)), ("b", TinyEncoder(24, 4, 24, 0.4, 3))):
            encode_images(data / "photos.tar", {name: encoder}, out, progress=False, prune=name == "b")
    assert objects(s3, "bucket/grown") == files_of(tmp_path / "grown")
