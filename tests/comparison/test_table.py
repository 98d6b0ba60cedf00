"""The table of results: it is read as it was written, merges by content, and damaged lines are named."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.runs import write_scalars
from support.suites import result

from maskmoe.comparison.table import RunResult, read_table, scalars, training_seconds, write_table
from maskmoe.errors import UserError


@given(
    st.lists(st.tuples(st.integers(0, 9), st.floats(allow_infinity=False)), max_size=5, unique_by=lambda run: run[0])
)
def test_a_table_is_read_as_it_was_written(tmp_path_factory, runs):
    results = [result("sm\u2028oe", seed, loss) for seed, loss in runs]  # a line end for `str.splitlines`
    path = tmp_path_factory.mktemp("table") / "results.jsonl"
    write_table(path, results)
    assert str(read_table(path)) == str(results)
    assert path.read_text().count("\n") == len(results)


def test_equal_runs_of_several_tables_count_once(tmp_path):
    one, two, without_tokens = result("smoe", 1, 3.0), result("smoe", 2, 3.5), result("smoe", 3, math.nan)
    same = one.model_copy(update={"suite": "another", "variant": "renamed", "seconds": 7.0})
    tables = [tmp_path / "a", tmp_path / "b", tmp_path / "absent"]
    write_table(tables[0], [one, two])
    write_table(tables[1], [same, one, without_tokens, without_tokens])
    assert str(read_table(*tables)) == str([one, two, without_tokens])
    # Keys of other versions are kept.
    tables[0].write_text(one.model_dump_json()[:-1] + ', "load": [[1, 2]]}')
    write_table(tables[1], read_table(tables[0]))
    assert read_table(tables[1]) == [RunResult(**one.model_dump(), load=[[1, 2]])]
    write_table(tables[1], [result("smoe", 1, 3.1)])
    with pytest.raises(UserError, match=r"two results of smoe with seed 1 differ \(3\.0 and 3\.1\)"):
        read_table(*tables)


@pytest.mark.parametrize(
    ("line", "message"),
    [("{", "line 2 is damaged"), ('{"suite": "a"}', "line 2 is damaged: variant: is miss")],
)
def test_a_damaged_line_is_named(tmp_path, line, message):
    path = tmp_path / "results.jsonl"
    write_table(path, [result("smoe", 1, 3.0)])
    with path.open("a", errors="surrogateescape") as stream:
        stream.write(line)
    with pytest.raises(UserError, match=message):
        read_table(path)


def test_scalars_of_a_resumed_run(tmp_path):
    write_scalars(tmp_path, {"lm loss": [(1, 8.0), (2, 7.0), (3, 6.0)]}, start=1000)
    write_scalars(tmp_path, {"lm loss": [(3, 6.5), (4, 6.0)]}, start=9000)
    assert scalars(tmp_path, "lm loss") == [(1, 8.0), (2, 7.0), (3, 6.5), (4, 6.0)]
    assert scalars(tmp_path, "nothing") == []
    assert training_seconds(tmp_path) == 4.0
