"""The stages of a run."""

from maskmoe.comparison.data import open_data
from maskmoe.comparison.plan import RunPlan
from maskmoe.comparison.runs import choose_learning_rates, whole_runs
from maskmoe.comparison.suite import Suite
from maskmoe.launch.devices import Devices


def test_evaluation_gets_the_weights_of_a_blend(suite_file, tmp_path, monkeypatch):
    """`maskmoe.training.evaluate` ignores them, see tests/training/test_evaluate.py."""
    monkeypatch.chdir(tmp_path)
    given = {"data-path": ("0.7", "a", "0.3", "b"), "split": ("9,1,0",), "tokenizer-model": ("model",)}
    suite = Suite.read(suite_file(), {})
    run = whole_runs(suite, choose_learning_rates(suite, {}))[0]
    data = open_data({**suite.data, **given}, tmp_path, 16)
    stage = RunPlan(suite, run, data, tmp_path / "run", Devices(0, 2)).evaluate()
    words = [str(word) for word in stage.command]
    assert "maskmoe.training.evaluate" in words
    position = words.index("--data-path")
    assert words[position + 1 : position + 5] == ["0.7", str(tmp_path / "a"), "0.3", str(tmp_path / "b")]
