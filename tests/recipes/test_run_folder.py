import json
from pathlib import Path

import pytest

from study.run_folder import RunFolder
from study.settings import identity, read_setting

MINIATURE = Path(__file__).parents[2] / "recipes/configs/miniature.yaml"


def test_a_finished_stage_is_not_done_again(tmp_path):
    done = []

    def work(folder):
        done.append(folder)
        return {"loss": 1.5}

    run = RunFolder(tmp_path / "run", {"a": 1})
    assert run.stage("align", work) == {"loss": 1.5} == run.stage("align", work)
    resumed = RunFolder(tmp_path / "run", {"a": 1}, resume=True)
    assert resumed.stage("align", work) == {"loss": 1.5}
    assert done == [tmp_path / "run/align"]


def test_a_stage_that_died_is_done_again_in_the_same_folder(tmp_path):
    run = RunFolder(tmp_path / "run", {})

    def dies(folder):
        (folder / "checkpoint").touch()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run.stage("align", dies)
    resumed = RunFolder(tmp_path / "run", {}, resume=True)
    assert resumed.stage("align", lambda folder: {"found": (folder / "checkpoint").exists()}) == {"found": True}


def test_another_run_and_the_same_run_without_resume_are_refused(tmp_path):
    RunFolder(tmp_path / "run", {"setting": {"keep": 0.7}})
    with pytest.raises(ValueError, match=r"setting\.keep: 0\.7 there, 0\.5 now"):
        RunFolder(tmp_path / "run", {"setting": {"keep": 0.5}}, resume=True)
    with pytest.raises(ValueError, match="--resume"):
        RunFolder(tmp_path / "run", {"setting": {"keep": 0.7}})


def test_a_folder_with_something_else_is_refused(tmp_path):
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(ValueError, match=r"thesis\.tex"):
        RunFolder(tmp_path, {})


def test_what_is_written_is_json_and_whole(tmp_path):
    run = RunFolder(tmp_path / "run", {})
    run.write("results.json", {"rows": [1, 2]})
    assert run.read("results.json", None) == json.loads((tmp_path / "run/results.json").read_text()) == {"rows": [1, 2]}
    assert run.read("plots.json", None) is None
    assert {path.name for path in (tmp_path / "run").iterdir()} == {"run.json", "results.json"}


def test_a_folder_of_another_format_is_refused(tmp_path):
    RunFolder(tmp_path / "run", {})
    (tmp_path / "run/run.json").write_text(json.dumps({"format": 0, "identity": {}}))
    with pytest.raises(ValueError, match="format 0"):
        RunFolder(tmp_path / "run", {}, resume=True)


def test_a_run_begun_before_formats_were_numbered_goes_on(tmp_path):
    (tmp_path / "align").mkdir()
    (tmp_path / "align/stage.json").write_text('{"loss": 1.5}')
    (tmp_path / "run.json").write_text(json.dumps({"setting": {"keep": 0.7}, "data_dir": "/data"}))
    with pytest.raises(ValueError, match=r"keep: 0\.7 there, 0\.5 now"):
        RunFolder(tmp_path, {"setting": {"keep": 0.5}, "data_dir": "/data"}, resume=True)
    run = RunFolder(tmp_path, {"setting": {"keep": 0.7}, "data_dir": "/data"}, resume=True)
    assert run.stage("align", lambda folder: {}) == {"loss": 1.5}


def test_a_run_begun_before_a_setting_existed_goes_on_with_its_default(tmp_path):
    setting = identity(read_setting(MINIATURE))
    old = json.loads(json.dumps(setting))
    del old["max_tiles"], old["finetune"]["lora"], old["data"]["scenes"]["seed"]
    run = RunFolder(tmp_path / "run", {"setting": old})
    run.stage("align", lambda folder: {"loss": 1.5})
    with pytest.raises(ValueError, match=r"max_tiles: 1 there, 4 now"):
        RunFolder(tmp_path / "run", {"setting": setting | {"max_tiles": 4}}, resume=True)
    resumed = RunFolder(tmp_path / "run", {"setting": setting}, resume=True)
    assert resumed.stage("align", lambda folder: {}) == {"loss": 1.5}


def test_a_run_begun_before_warnings_were_heeded_is_refused_where_they_are_heeded_now(tmp_path):
    setting = identity(read_setting(MINIATURE))
    RunFolder(tmp_path / "run", {"setting": {name: value for name, value in setting.items() if name != "heed_warning"}})
    with pytest.raises(ValueError, match=r"heed_warning: False there, True now"):
        RunFolder(tmp_path / "run", {"setting": setting}, resume=True)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"setting"'])
def test_a_damaged_run_file_is_refused(tmp_path, text):
    (tmp_path / "run.json").write_text(text)
    with pytest.raises(ValueError, match=r"run\.json"):
        RunFolder(tmp_path, {"setting": {}}, resume=True)
