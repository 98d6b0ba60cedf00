"""The page of a run has the values that the run has logged, and loads nothing from elsewhere."""

import json
import subprocess
import sys

import pytest
from support.report_pages import Page
from support.run_folders import write_checkpoint
from support.training_lines import iteration_line, validation_line

from maskmoe.command_line import report
from maskmoe.errors import UserError
from maskmoe.processes.folder_lock import LOCK_NAME


@pytest.fixture
def maskmoe_report(monkeypatch):
    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["maskmoe report", *map(str, arguments)])
        report.main()

    return run


def test_page_of_a_resumed_run(maskmoe_report, resumed_run, capsys):
    maskmoe_report(resumed_run)
    path = resumed_run / "report.html"
    assert capsys.readouterr().out == f"written {path}\n"
    page = Page(path)
    page.assert_self_contained()
    losses = {step: float(values["loss"]) for step, values in page.values.items()}
    assert losses == {step: pytest.approx(1 / step + (step > 7), rel=1e-5) for step in range(1, 16)}
    held_out = {step: float(v["held-out loss"]) for step, v in page.values.items() if "held-out loss" in v}
    assert held_out == {step: pytest.approx(2 / step + (step > 7), rel=1e-5) for step in (5, 10, 15)}
    assert {values["tokens/s"] for values in page.values.values()} == {str(16 * 32 * 4)}
    assert page.titles == ["Loss", "Speed", "Learning rate", "Memory", "Load by layer"]
    assert "15 of 20" in page.text
    assert "after 2 starts" in page.text
    assert "Training is" not in page.text  # the run folder has neither checkpoints nor a lock
    assert "http://" not in path.read_text()
    assert "https://" not in path.read_text()


def test_page_says_whether_the_run_trains(maskmoe_report, resumed_run):
    path = resumed_run / "report.html"
    lock = resumed_run / "checkpoints" / LOCK_NAME
    write_checkpoint(lock.parent, 12)
    maskmoe_report(resumed_run)
    page = Page(path)
    assert "Training is not running." in page.text
    assert "time left" not in page.text
    # A lock of another host counts as held if it was touched a short time ago.
    lock.write_text(json.dumps({"host": "elsewhere", "pid": 1, "started": 0.0}))
    maskmoe_report(resumed_run)
    page = Page(path)
    assert "Training is running." in page.text
    assert "time left" in page.text


def test_settings_are_shown_as_they_are(maskmoe_report, resumed_run):
    maskmoe_report(resumed_run, "--output", resumed_run / "other.html")
    page = Page(resumed_run / "other.html")
    assert page.settings["command"] == 'pretrain --lr "1e-3"'
    assert page.settings["model"] == "4 layers, 8 experts"
    assert page.settings["checkpoints"] == "/runs/<b>&'run'"
    assert dict(page.tables[1])["hidden_size"] == "None"
    assert "b" not in page.tags
    assert not (resumed_run / "report.html").exists()


def test_page_of_a_run_without_events(maskmoe_report, tmp_path):
    (tmp_path / "train.log").write_text("\n".join([iteration_line(1), iteration_line(2, "4.5"), validation_line(2)]))
    maskmoe_report(tmp_path)
    values = Page(tmp_path / "report.html").values
    assert [values[step]["loss"] for step in (1, 2)] == ["5", "4.5"]
    assert values[2]["held-out loss"] == "6.66348"


@pytest.mark.parametrize(
    ("folder", "message"), [("nowhere", "is not a folder"), (".", "neither TensorBoard's event files nor logs")]
)
def test_folder_without_a_run_is_refused(maskmoe_report, tmp_path, folder, message):
    with pytest.raises(UserError, match=message):
        maskmoe_report(tmp_path / folder)
    assert not [*tmp_path.iterdir()]


def test_damaged_event_file_is_read_up_to_the_damage(maskmoe_report, resumed_run):
    newest = max((resumed_run / "tensorboard").iterdir())
    newest.write_bytes(newest.read_bytes()[:-100])
    maskmoe_report(resumed_run)
    assert 8 in Page(resumed_run / "report.html").values


def test_needs_no_torch():
    check = "import maskmoe.run_report.follow, maskmoe.command_line.report, sys; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", check], check=True)
