"""The rows of a run and of the studies, and the tables of their results."""

import statistics
from pathlib import Path

import pytest

from encoders import build_encoder
from mof.adapter import FUSIONS, build_mixer
from study.result_tables import contrasts, spread, study_tables
from study.rows import COMPARISONS, table_rows
from study.settings import read_setting
from study.ways import KEEPS, NOISE, NOISE_WAYS, WAYS

CONFIGS = Path(__file__).parents[2] / "recipes" / "configs"


@pytest.fixture
def setting():
    return read_setting(CONFIGS / "miniature.yaml")


def test_a_plain_run_has_a_random_control_where_scenes_are_drawn(setting):
    assert [row.name for row in table_rows(setting)] == ["clip", "interleaved", "interleaved+random", "interleaved+vig"]
    assert all(row.heeds for row in table_rows(setting)[1:])  # whole samples where the paper's rule warns
    assert not any(row.heeds for study in ("noise", "selection") for row in COMPARISONS[study](setting))  # these look at the rule itself
    real = read_setting(CONFIGS / "llava15_7b.yaml")
    assert [row.name for row in table_rows(real)] == ["clip", "interleaved", "interleaved+vig"]


@pytest.mark.parametrize("study", COMPARISONS)
def test_rows_have_names_of_their_own_and_share_stage_1_where_they_may(study, setting):
    rows = COMPARISONS[study](setting)
    assert len({row.name for row in rows}) == len(rows)
    stage_1 = {row.aligned: (row.encoders, row.fusion, row.options, row.layer) for row in rows}
    assert all(stage_1[row.aligned] == (row.encoders, row.fusion, row.options, row.layer) for row in rows)
    assert all(row.like in (None, "interleaved") for row in rows)


def test_every_fusion_has_a_row_with_as_many_tokens_as_two_encoders(setting):
    rows = {row.name: row for row in COMPARISONS["fusion"](setting)}
    tokens = {}
    for name, row in rows.items():
        encoders = {
            f"{part}{k}": build_encoder(part, pretrained=False) for k, part in enumerate(setting.encoders[n]["name"] for n in row.encoders)
        }
        options = dict(row.options)
        if "weights" in options:
            options["weights"] = dict(zip(encoders, options["weights"].values(), strict=True))
            assert sum(options["weights"].values()) == 1
        tokens[name] = build_mixer(row.fusion, encoders, 192, **options).tokens_per_image
    assert set(FUSIONS) < rows.keys() and {row.noise for row in rows.values()} == {"0"}
    equal = [name if FUSIONS[name].side_by_side else f"{name}-equal" for name in FUSIONS]
    assert {tokens[name] for name in (*equal, "clipx2")} == {50}
    assert {tokens[name] for name in rows.keys() - {*equal, "clipx2"}} == {25}
    assert {name for name, row in rows.items() if row.worth} == set(FUSIONS)
    assert {name for name, row in rows.items() if not row.stored} == {"clip", "dinov2", "clipx2"}  # the store holds both encoders


def test_rows_with_tiles_read_no_store(setting):
    setting.max_tiles = 4
    assert not any(row.stored for row in COMPARISONS["fusion"](setting))


def test_every_layer_of_the_first_encoder_has_a_row(setting):
    rows = COMPARISONS["layers"](setting)
    assert {row.name: row.layer for row in rows} == {
        **{f"clip-{layer}": layer for layer in (1, 2, 3, 4)},
        "clip-joined": (1, 2, 3, 4),
        "clip-weighed": (1, 2, 3, 4),
    }
    assert {(row.encoders, row.noise, row.worth, row.stored) for row in rows} == {(("clip",), "0", False, False)}
    setting.encoders["clip"] = {"name": "timm:resnet18"}  # its stages lie on different grids
    with pytest.raises(ValueError, match="different strides"):
        COMPARISONS["layers"](setting)
    setting.data.scenes = None
    with pytest.raises(ValueError, match="pairs"):
        COMPARISONS["layers"](setting)


def test_every_way_at_every_share_starts_from_one_stage_1(setting):
    everything, *rows = COMPARISONS["selection"](setting)
    assert (everything.name, everything.selection, everything.keep) == ("interleaved", None, None)
    assert {(row.selection, row.keep) for row in rows} == {(way, keep) for way in WAYS for keep in KEEPS}
    assert {row.aligned for row in rows} == {"interleaved"}


def test_ways_at_a_share_of_noise_share_their_records_and_scores(setting):
    rows = COMPARISONS["noise"](setting)
    assert {(row.selection, row.noise) for row in rows} == {(way, share) for way in NOISE_WAYS for share in NOISE}
    assert {row.mix for row in rows} == {f"finetune-{share}" for share in NOISE}


def test_contrasts_are_paired_over_seeds_and_over_held_out_pairs():
    right = {("vig", 0): [1, 1, 1, 0], ("random", 0): [1, 0, 0, 0], ("vig", 1): [1, 1, 0, 0], ("random", 1): [0, 1, 0, 0]}
    right[("everything", 0)] = [1, 1, 0, 0]
    rows = [
        row(way, sum(values) / 4, seed) | {"noise": "0.4", "selection": way, "pairs_right": values} for (way, seed), values in right.items()
    ]
    table = contrasts(rows)
    cells = {name: (random, everything) for name, random, everything in zip(*(table.columns[i].cells for i in (1, 2, 3)), strict=True)}
    seeds = 12.706 * 12.5  # t of one degree of freedom, of the differences 50 and 25
    pairs = 3.1824 * statistics.stdev([50, 50, 50, 0]) / 2  # t of three degrees of freedom, of each pair's mean over both seeds
    over_seeds, over_pairs = (f"[{37.5 - half:+.1f}, {37.5 + half:+.1f}]" for half in (seeds, pairs))
    assert cells["vig"][0] == f"+37.5 {over_seeds} {over_pairs}"
    assert cells["vig"][1].startswith("+25.0 [") and cells["vig"][1].count("[") == 1  # a single seed has no interval over seeds
    assert cells["random"][0] == ""


@pytest.mark.parametrize("study", COMPARISONS)
def test_a_study_without_pairs_is_refused(study):
    with pytest.raises(ValueError, match="held-out pairs"):
        COMPARISONS[study](read_setting(CONFIGS / "smollm2_photos.yaml"))


def row(name, accuracy, seed):
    return {
        "name": name, "pair_accuracy": accuracy, "question_accuracy": accuracy, "visual_tokens": 25, "active_tokens": 1000,
        "adapter_parameters": 74112,
        "seconds": 2.0, "seed": seed, "by_pattern": {} if accuracy is None else {"Text": accuracy},
    }  # fmt: skip


def test_mean_and_spread_over_seeds():
    assert spread([0.1, 0.3]) == "20.0 ±14.1"
    assert spread([0.25]) == "25.0"
    assert spread([None]) == "-"


def test_one_line_per_name_and_a_table_of_patterns():
    tables = study_tables([row("clip", 0.1, 0), row("interleaved", 0.2, 0), row("clip", 0.3, 1)])
    assert [list(table.rows) for table in tables] == [["clip", "interleaved"]] * 2
    assert [cells[0] for cells in tables[0].rows.values()] == ["20.0 ±14.1", "20.0"]
    assert [cells[0] for cells in tables[1].rows.values()] == ["20", "20"]
    assert tables[0].rows["clip"][tables[0].columns.index("adapters")] == "74,112"


def test_questions_after_a_false_statement_have_a_column_where_they_were_asked():
    table = study_tables([row("clip", 0.1, 0) | {"misled_accuracy": 0.25}])[0]
    assert table.columns[2] == "misled" and table.rows["clip"][2] == "25.0"


def test_without_pairs_there_is_no_table_of_patterns():
    assert len(study_tables([row("photos", None, 0)])) == 1
