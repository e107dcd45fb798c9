from pathlib import Path

import pytest

from study.rows import COMPARISONS, KEEPS, WAYS, table_rows
from study.settings import read_setting

CONFIGS = Path(__file__).parents[2] / "recipes" / "configs"


@pytest.fixture
def setting():
    return read_setting(CONFIGS / "miniature.yaml")


def test_a_plain_run_has_three_rows(setting):
    assert [row.name for row in table_rows(setting)] == ["clip", "interleaved", "interleaved+vig"]


@pytest.mark.parametrize("study", COMPARISONS)
def test_rows_have_names_of_their_own_and_share_stage_1_where_they_may(study, setting):
    rows = COMPARISONS[study](setting)
    assert len({row.name for row in rows}) == len(rows)
    stage_1 = {row.aligned: (row.encoders, row.fusion, row.options) for row in rows}
    assert all(stage_1[row.aligned] == (row.encoders, row.fusion, row.options) for row in rows)
    assert {row.aligned for row in rows} <= {row.name for row in rows}


def test_every_way_at_every_share_starts_from_one_stage_1(setting):
    everything, *rows = COMPARISONS["selection"](setting)
    assert (everything.name, everything.selection, everything.keep) == ("interleaved", None, None)
    assert {(row.selection, row.keep) for row in rows} == {(way, keep) for way in WAYS for keep in KEEPS}
    assert {row.aligned for row in rows} == {"interleaved"}


@pytest.mark.parametrize("study", COMPARISONS)
def test_a_study_without_pairs_is_refused(study):
    with pytest.raises(ValueError, match="held-out pairs"):
        COMPARISONS[study](read_setting(CONFIGS / "smollm2_photos.yaml"))
