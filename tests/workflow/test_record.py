"""The record of finished stages, and the reasons to repeat a stage."""

import json
from dataclasses import replace

import pytest

from maskmoe.errors import UserError
from maskmoe.workflow.record import RunRecord, describe_change
from maskmoe.workflow.stage import Stage


@pytest.fixture
def stage(tmp_path):
    text, out = tmp_path / "text", tmp_path / "out"
    text.write_text("text")
    command = ("python", "-m", "maskmoe", "tool", "--input", str(text), "--setting", "1", "--ranks", "2")
    return Stage("tool", command, (text,), (out,), machine_flags=frozenset({"--ranks"}))


@pytest.fixture
def record(tmp_path, stage):
    """A record in which the stage is finished."""
    record = RunRecord(tmp_path / "stages.json")
    record.begin(stage)
    stage.outputs[0].write_text("output")
    record.finish(stage, 2.5)
    return record


def test_finished_stage_is_known_when_the_record_is_read_again(record, stage):
    again = RunRecord(record.path)
    assert again.is_finished(stage)
    assert again["tool"] == record["tool"]
    assert again["tool"].seconds == 2.5
    assert "other" not in again


def test_duration_adds_up_over_all_starts(tmp_path, stage):
    record = RunRecord(tmp_path / "new.json")
    record.begin(stage)
    record.pause(stage, 1.0)
    assert "tool" in record
    assert not record.is_finished(stage)
    record = RunRecord(record.path)
    record.finish(stage, 2.0)
    assert record["tool"].seconds == 3.0


def test_changed_setting_is_a_reason_to_repeat(record, stage):
    changed = replace(stage, command=(*stage.command, "--more"))
    assert record.reason_to_repeat(changed) == "its settings changed (--more: not given → )"


def test_changed_input_is_a_reason_to_repeat(record, stage):
    stage.inputs[0].write_text("other text")
    assert record.reason_to_repeat(stage) == "its input changed"


@pytest.mark.parametrize("change", ["other output", None])
def test_changed_output_is_a_reason_to_repeat(record, stage, change):
    if change is None:
        stage.outputs[0].unlink()
    else:
        stage.outputs[0].write_text(change)
    assert record.reason_to_repeat(stage) == "its output was changed or removed"


def test_a_change_inside_a_folder_is_a_change(tmp_path, record, stage):
    folder = tmp_path / "folder"
    folder.mkdir()
    stage = replace(stage, outputs=(folder,))
    record.finish(stage, 1.0)
    assert record.is_finished(stage)
    (folder / "file").write_text("")
    assert not record.is_finished(stage)


def test_flags_of_the_machine_are_no_reason_to_repeat(record, stage):
    assert record.is_finished(replace(stage, command=(*stage.command[:-1], "8")))


def test_spelling_of_program_and_folders_is_no_reason_to_repeat(record, stage):
    """A record made in another current folder, or by `python tools/tool.py`, stays valid."""
    content = json.loads(record.path.read_text())
    assert content["stages"]["tool"]["command"][:4] == ["python", "-m", "maskmoe", "tool"]
    content["stages"]["tool"]["command"][:6] = [".venv/bin/python", "tools/tool.py", "--input", "text"]
    record.path.write_text(json.dumps(content))
    assert RunRecord(record.path).is_finished(stage)


def test_changed_flags_are_named():
    old = ("python", "tool.py", "--vocab-size", "512", "--gone", "--prompt=a b")
    new = ("python", "tool.py", "--vocab-size", "600", "--prompt=c")
    assert describe_change(old, new) == "--vocab-size: 512 → 600, --gone:  → not given, --prompt: a b → c"


@pytest.mark.parametrize("text", ["{", "[]", '{"stages": {"a": {}}}', '{"stages": {"a": {"command": 1}}}'])
def test_damaged_record_is_refused(tmp_path, text):
    path = tmp_path / "stages.json"
    path.write_text(text)
    with pytest.raises(UserError, match=r"stages.json is damaged \(.+\); delete the file to start") as error:
        RunRecord(path)
    assert "\n" not in str(error.value)
