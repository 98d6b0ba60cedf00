"""A plan is run in this process: which stages are run, repeated or resumed, and what is written."""

import io
import subprocess
import sys
from types import SimpleNamespace

import pytest

from maskmoe.errors import RunFailure, UserError
from maskmoe.workflow.files import StageFiles
from maskmoe.workflow.progress import ProgressLine
from maskmoe.workflow.runner import format_command, run_stages
from maskmoe.workflow.stage import Stage


def test_stages_run_in_order_once(stub_run, capsys):
    stub_run.run()
    assert stub_run.take_starts() == ["first", "steps", "last"]
    assert stub_run.output("last").read_text() == "10"
    output = capsys.readouterr().out
    assert output.endswith("\nthe report\n")
    assert "[2/3] steps     done in 0:0" in output
    assert (stub_run.folder / "logs" / "first.log").read_text() == "output of first\n"
    stub_run.run()
    assert stub_run.take_starts() == []
    assert capsys.readouterr().out.count("finished earlier") == 3


def test_commands_of_a_run_repeat_the_run_by_hand(stub_run):
    stub_run.run()
    stub_run.take_starts()
    subprocess.run(["bash", stub_run.files.commands], check=True, cwd="/")
    assert stub_run.take_starts() == ["first", "steps", "last"]


def test_paths_of_commands_are_relative_to_the_current_folder(stub_run, monkeypatch):
    monkeypatch.chdir(stub_run.folder.parent)
    stub_run.run()
    commands = stub_run.files.commands.read_text()
    assert f"cd {stub_run.folder.parent}\n" in commands
    assert "    --folder run \\\n    --input run/steps.out" in commands


def test_changed_setting_repeats_the_stage_and_later_stages(stub_run, capsys):
    stub_run.run()
    stub_run.take_starts()
    stub_run.flags["steps"] = ["--setting", "new"]
    stub_run.run()
    assert stub_run.take_starts() == ["steps", "last"]
    output = capsys.readouterr().out
    assert "steps     is repeated: its settings changed (--setting: not given → new)" in output
    assert "last      is repeated: its input changed" in output
    assert f"steps     earlier output is kept in {stub_run.files.previous}" in output
    # The stage starts from nothing and the earlier result is kept.
    assert (stub_run.files.previous / "steps.out").read_text() == "10"
    assert (stub_run.files.previous / "steps.log").exists()


def test_changed_input_repeats_all_stages_that_depend_on_it(stub_run):
    stub_run.run()
    stub_run.take_starts()
    stub_run.text.write_text("other text")
    stub_run.run()
    assert stub_run.take_starts() == ["first", "steps", "last"]
    assert stub_run.output("first").read_text() == "other text"


def test_lost_output_is_made_again(stub_run, capsys):
    stub_run.run()
    stub_run.take_starts()
    stub_run.output("last").unlink()
    stub_run.run()
    assert stub_run.take_starts() == ["last"]
    assert "its output was changed or removed" in capsys.readouterr().out


@pytest.mark.parametrize(("message", "kind"), [("error: no such thing", UserError), ("ValueError: broken", RunFailure)])
def test_failure_is_one_line_and_the_next_run_starts_there(stub_run, message, kind):
    stub_run.flags["last"] = ["--fail", message]
    with pytest.raises(kind) as error:
        stub_run.run()
    assert str(error.value) == (
        f"stage last failed: {message.removeprefix('error: ')} (full output: {stub_run.files.log('last')})"
    )
    assert stub_run.take_starts() == ["first", "steps", "last"]
    stub_run.flags["last"] = []
    stub_run.run()
    assert stub_run.take_starts() == ["last"]


def test_folder_that_cannot_be_made_is_bad_input(stub_run):
    stub_run.folder.rmdir()
    stub_run.folder.write_text("a file")
    with pytest.raises(UserError, match="cannot work in --run-dir"):
        stub_run.run()


def test_stage_that_starts_elsewhere_is_prepared(stub_run):
    record = run_stages(stub_run, ProgressLine(io.StringIO()), before="steps")
    assert stub_run.take_starts() == ["first"]
    assert record["first"].is_finished
    assert not record["steps"].is_finished
    assert "last" not in record


def test_scratch_of_an_earlier_start_is_removed(tmp_path):
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    (scratch / "incomplete").touch()
    program = f"import os; assert not os.path.exists({str(scratch)!r})"
    stage = Stage("stub", (sys.executable, "-c", program), (), (), scratch=(scratch,))
    plan = SimpleNamespace(files=StageFiles(tmp_path), stages=(lambda: stage,))
    assert run_stages(plan, ProgressLine(io.StringIO()))["stub"].is_finished


def test_command_can_be_pasted_into_a_shell():
    words = ("-c", "import sys; print(sys.argv[1:])", "--prompt=it's\n$HOME", "--n", "1")
    stage = Stage("stub", (sys.executable, *words), (), (), environment={"A": "b c"})
    text = format_command(stage)
    assert text.startswith("A='b c' ")
    shown = subprocess.run(["bash", "-c", text], capture_output=True, text=True, check=True).stdout
    assert shown.strip() == str(list(words[2:]))
