from study.study_table import spread, study_tables


def row(name, accuracy, seed):
    return {
        "name": name, "pair_accuracy": accuracy, "question_accuracy": accuracy, "visual_tokens": 25, "active_tokens": 1000,
        "seconds": 2.0, "seed": seed, "by_pattern": {} if accuracy is None else {"Text": accuracy},
    }  # fmt: skip


def test_mean_and_spread_over_seeds():
    assert spread([0.1, 0.3]) == "20.0 ±14.1"
    assert spread([0.25]) == "25.0"
    assert spread([None]) == "-"


def test_one_line_per_name_and_a_table_of_patterns():
    tables = study_tables([row("clip", 0.1, 0), row("interleaved", 0.2, 0), row("clip", 0.3, 1)])
    assert [table.row_count for table in tables] == [2, 2]
    assert list(tables[0].columns[1].cells) == ["20.0 ±14.1", "20.0"]
    assert list(tables[1].columns[1].cells) == ["20", "20"]


def test_questions_after_a_false_statement_have_a_column_where_they_were_asked():
    table = study_tables([row("clip", 0.1, 0) | {"misled_accuracy": 0.25}])[0]
    assert [column.header for column in table.columns][3] == "misled" and list(table.columns[3].cells) == ["25.0"]


def test_without_pairs_there_is_no_table_of_patterns():
    assert len(study_tables([row("photos", None, 0)])) == 1
