"""The table of training runs: every name that a test uses is in the table, and every run is used."""

import ast

import pytest
from support.composition import BF16, COMPARED, COMPARED_IN_BF16
from support.paths import TESTS
from support.training_runs import RUNS

MODULES = sorted((TESTS / "training").glob("test_*.py"))
TREES = {path.name: ast.parse(path.read_text()) for path in MODULES}


def named_runs(tree: ast.AST) -> set[str]:
    """Return the names that marks `pytest.mark.runs("…")` and calls `start_by_name("…")` have as literals."""
    return {
        argument.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("pytest.mark.runs", "start_by_name")
        for argument in node.args
        if isinstance(argument, ast.Constant)
    }


@pytest.mark.parametrize("module", TREES)
def test_every_named_run_exists(module, request):
    marked = {
        name
        for item in request.session.items
        if item.path.name == module
        for mark in item.iter_markers("runs")
        for name in mark.args
    }
    assert named_runs(TREES[module]) | marked <= set(RUNS)


def test_every_compared_run_exists():
    assert {*COMPARED, *(name for names in COMPARED.values() for name in names), BF16} <= set(RUNS)


def test_every_run_that_is_continued_exists_and_saves():
    for name, run in RUNS.items():
        assert run.continues is None or RUNS[run.continues].saves, name


def test_every_run_is_used():
    literals = {
        node.value
        for tree in TREES.values()
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    }
    rows = COMPARED | COMPARED_IN_BF16
    compared = {*rows, *(name for names in rows.values() for name in names)}
    continued = {run.continues for run in RUNS.values()}
    assert set(RUNS) - literals - compared - continued == set()
