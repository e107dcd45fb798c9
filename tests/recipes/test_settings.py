"""Settings: every YAML of the recipes is read, and whatever else a file may hold is refused with a ValueError."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from encoders import available_encoders
from study.settings import Data, Setting, Stage, read_setting

CONFIGS = Path(__file__).parents[2] / "recipes" / "configs"
LLAVA = ("llava15_7b", "llava15_13b", "llava15_7b_sharegpt4v", "llava15_13b_sharegpt4v")
SMALL = {
    "name": "small",
    "encoders": {"clip": {"name": "mini-clip"}},
    "llm": "mini-lm",
    "align": {"learning_rate": 1.0e-3, "batch_size": 8},
    "finetune": {"learning_rate": 1.0e-4, "batch_size": 8},
}


def read(folder: Path, **changes: object) -> Setting:
    path = folder / "setting.yaml"
    path.write_text(yaml.safe_dump(SMALL | changes))
    return read_setting(path)


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_config_is_read_and_bears_its_name(path: Path):
    setting = read_setting(path)
    assert setting.name == path.stem
    assert {spec["name"] for spec in setting.encoders.values()} <= set(available_encoders()) | {"mini-clip", "mini-dino"}


@pytest.mark.parametrize("name", LLAVA)
def test_the_published_hyperparameters(name: str):
    setting = read_setting(CONFIGS / f"{name}.yaml")
    align, finetune = setting.align, setting.finetune
    assert (align.learning_rate, align.batch_size, align.epochs, align.warmup_ratio, align.weight_decay) == (1e-3, 256, 1, 0.03, 0)
    assert (finetune.learning_rate, finetune.batch_size, finetune.epochs) == (2e-5, 128, 1)
    assert (finetune.warmup_ratio, finetune.weight_decay) == (0.03, 0)
    assert (setting.fusion, setting.keep, setting.null, setting.max_length, setting.bf16) == ("interleaved", 0.7, "blur", 2048, True)
    assert setting.encoders == {"clip": {"name": "clip-vit-l14-336"}, "dinov2": {"name": "dinov2-vit-l14", "image_size": 336}}
    assert setting.llm == ("lmsys/vicuna-7b-v1.5" if "7b" in name else "lmsys/vicuna-13b-v1.5")


def test_yaml_reads_the_key_null_as_nothing(tmp_path):
    (tmp_path / "own.yaml").write_text((CONFIGS / "miniature.yaml").read_text() + "null: drop\n")
    assert read_setting(tmp_path / "own.yaml").null == "drop"


@pytest.mark.parametrize("size", ["7b", "13b"])
def test_the_sharegpt4v_variant_differs_in_its_data_only(size: str):
    plain, variant = (dataclasses.asdict(read_setting(CONFIGS / f"llava15_{size}{end}.yaml")) for end in ("", "_sharegpt4v"))
    assert {key for key in plain if plain[key] != variant[key]} == {"name", "data"}
    changed = {key for key in plain["data"] if plain["data"][key] != variant["data"][key]}
    assert changed == {"captions", "image_folders"}


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"align": None}, ["align", "None"]),
        ({"align": {"learning_rate": 1.0}}, ["align.batch_size", "missing"]),
        ({"align": {"learning_rate": "1e-3", "batch_size": 8}}, ["align.learning_rate", "'1e-3'", "1.0e-3"]),
        ({"align": {"learning_rate": None, "batch_size": 8}}, ["align.learning_rate", "None"]),
        ({"align": {"learning_rate": math.nan, "batch_size": 8}}, ["align.learning_rate", "nan"]),
        ({"align": {"learning_rate": 0, "batch_size": 8}}, ["align.learning_rate", "greater than 0"]),
        ({"align": {"learning_rate": 1.0, "batch_size": True}}, ["align.batch_size", "integer", "True"]),
        ({"align": {"learning_rate": 1.0, "batch_size": 8, "epochs": 0}}, ["align", "epochs > 0 or max_steps > 0"]),
        ({"align": {"learning_rate": 1.0, "batch_size": 8, "warmup_ratio": 3}}, ["align.warmup_ratio", "3"]),
        ({"align": {"learning_rate": 1.0, "batch_size": 8, "weight_decay": -1}}, ["align.weight_decay", "-1"]),
        ({"align": {"learning_rate": 1.0, "batch_size": 8, "per_device_batch_size": 0}}, ["align.per_device_batch_size", "0"]),
        ({"encoders": {}}, ["encoders", "at least 1"]),
        ({"encoders": {"clip": "mini-clip"}}, ["encoders.clip", "'mini-clip'"]),
        ({"encoders": {"clip": {"image_size": 40}}}, ["encoders.clip", "build_encoder"]),
        ({"encoders": {"clip": {"name": "mini-clip", "imagesize": 40}}}, ["encoders.clip", "'imagesize'", "image_size"]),
        ({"encoders": {"clip": {"name": "mini-clip", "pretrained": False}}}, ["encoders.clip", "'pretrained'"]),
        ({"fusion": "stirred"}, ["fusion", "'stirred'", "interleaved"]),
        ({"null": "blurr"}, ["null", "'blurr'", "'blur'"]),
        ({"keep": 70}, ["keep", "70"]),
        ({"pool": [1]}, ["pool.1", "missing"]),
        ({"pool": [1, 1, 1]}, ["pool", "2", "[1, 1, 1]"]),
        ({"pool": ["1", "1"]}, ["pool.0", "integer", "'1'"]),
        ({"grid": [0, 4]}, ["grid.0", "0"]),
        ({"data": {"align": "align.json"}}, ["data.align", "'align.json'"]),
        ({"data": {"held_out": 1}}, ["data.held_out", "1"]),
        ({"data": {"finetune_records": 5, "text_records": 6}}, ["text_records", "6", "finetune_records"]),
        ({"data": {"align_records": 0}}, ["data.align_records", "0"]),
        ({"llm_config": {"hidden_size": 8}}, ["llm_config", "model_type"]),
        ({"max_length": 0}, ["max_length", "0"]),
        ({"bf16": "yes"}, ["bf16", "boolean", "'yes'"]),
        ({"rate": 1}, ["rate", "unknown"]),
        ({"data": {"held_uot": 0.1}}, ["data.held_uot", "held_out"]),
        ({"keep": 70, "null": None}, ["keep", "70", "null", "None"]),
    ],
)  # fmt: skip
def test_nonsense_is_refused_by_name(tmp_path: Path, changes: dict, named: list[str]):
    with pytest.raises(ValueError, match=r"setting\.yaml") as caught:
        read(tmp_path, **changes)
    assert all(part in str(caught.value) for part in named), caught.value


@pytest.mark.parametrize("text", ["", "- a", "name: [", "just words", "{1: 2}"])
def test_files_that_hold_no_setting_are_refused(tmp_path: Path, text: str):
    path = tmp_path / "setting.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"setting\.yaml"):
        read_setting(path)


positive = st.floats(1e-8, 1e3)
stages = st.builds(
    Stage,
    learning_rate=positive,
    batch_size=st.integers(1, 512),
    epochs=positive,
    max_steps=st.integers(-1, 100),
    per_device_batch_size=st.none() | st.integers(1, 64),
    warmup_ratio=st.floats(0, 1),
    gradient_checkpointing=st.booleans(),
)
names = st.lists(st.text(st.characters(codec="utf-8", exclude_categories=["C"])), max_size=3)
whole = st.builds(
    Setting,
    name=st.text(st.characters(codec="utf-8", exclude_categories=["C"])),
    encoders=st.just({"clip": {"name": "mini-clip", "layer": -2, "image_size": None}}),
    llm=st.just("mini-lm"),
    align=stages,
    finetune=stages,
    data=st.builds(Data, align=names, captions=names, held_out=st.floats(0, 0.9), align_records=st.none() | st.integers(1, 10)),
    pool=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    grid=st.none() | st.tuples(st.integers(1, 24), st.integers(1, 24)),
    keep=st.floats(0, 1),
)


@settings(max_examples=50, deadline=None)
@given(whole)
def test_a_written_setting_is_read_back_equal(tmp_path_factory: pytest.TempPathFactory, setting: Setting):
    path = tmp_path_factory.mktemp("setting") / "setting.yaml"
    path.write_text(yaml.safe_dump(dataclasses.asdict(setting), allow_unicode=True), encoding="utf-8")
    assert read_setting(path) == setting


scalars = st.none() | st.booleans() | st.integers(-3, 3) | st.floats() | st.sampled_from(["", "clip", "1e-3"])
anything = st.recursive(scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["name", "a"]), inner))


@settings(max_examples=200, deadline=None)
@given(field=st.sampled_from([field.name for field in dataclasses.fields(Setting)]), value=anything)
def test_any_value_is_taken_or_refused_with_a_value_error(tmp_path_factory: pytest.TempPathFactory, field: str, value: object):
    path = tmp_path_factory.mktemp("setting") / "setting.yaml"
    path.write_text(yaml.safe_dump(SMALL | {field: value}))
    try:
        assert isinstance(read_setting(path), Setting)
    except ValueError as error:
        assert "setting.yaml" in str(error)


@settings(deadline=None)
@given(batch=st.integers(1, 300), per_device=st.none() | st.integers(1, 40), devices=st.integers(1, 40))
def test_a_split_makes_up_the_batch_or_is_refused(batch: int, per_device: int | None, devices: int):
    stage = Stage(1e-3, batch, per_device_batch_size=per_device)
    try:
        records, passes = stage.split(devices)
    except ValueError as error:
        share = batch // devices
        most = share if per_device is None else min(share, per_device)
        assert str(batch) in str(error) and (most == 0 or batch % (most * devices))
        return
    assert records * passes * devices == batch and (per_device is None or records <= per_device)


@settings(deadline=None)
@given(records=st.integers(1, 1000), batch=st.integers(1, 64), epochs=st.integers(1, 4))
def test_steps_are_the_batches_of_a_loader_that_drops_nothing(records: int, batch: int, epochs: int):
    assert Stage(1e-3, batch, epochs=epochs).steps(records) == len(range(0, records, batch)) * epochs
    assert Stage(1e-3, batch, epochs=epochs, max_steps=7).steps(records) == 7


@pytest.mark.parametrize(("records", "text", "selected"), [(10, 0, 7), (11, 0, 8), (11, 1, 8), (3, 3, 3)])
def test_the_share_of_records_is_rounded_up_and_text_only_records_stay(records: int, text: int, selected: int):
    setting = read_setting(CONFIGS / "llava15_7b.yaml")
    data = dataclasses.replace(setting.data, finetune_records=records, text_records=text)
    assert dataclasses.replace(setting, keep=0.7, data=data).selected_records == selected
