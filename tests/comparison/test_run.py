"""The steps of a run, its model file, and the settings that decide its result."""

from dataclasses import replace

import pytest
import yaml
from support.datasets import write_documents

from maskmoe.comparison.data import Dataset
from maskmoe.comparison.run import OWN_TEXT, runs_of
from maskmoe.comparison.suite import Suite
from maskmoe.launch.machine import Devices


@pytest.fixture
def runs(suite_file, tmp_path):
    """Return the runs of a suite by title, on a dataset of two documents."""
    data = Dataset(tmp_path / "data", "300", 16, held_out={"other": tmp_path / "other.jsonl"})
    data.folder.mkdir()
    write_documents(data.prefix, [[0] * 5000] * 2)

    def runs(num_gpus=0, **changes):
        suite = Suite.read(suite_file(**changes), {})
        return {run.title: run for run in runs_of(suite, tmp_path / "run", data, Devices(num_gpus, 2))}

    return runs


def test_runs_go_seed_by_seed(runs):
    assert list(runs()) == [
        *(f"{name}.seed-1" for name in ("dense", "smoe", "hash", "maskmoe")),
        "maskmoe-uniform.seed-2",
        *(f"{name}.seed-2" for name in ("dense", "smoe", "hash", "maskmoe")),
    ]


def test_the_seed_is_that_of_the_mask_too(runs):
    (step,) = runs()["maskmoe.seed-2"].mask_steps()
    command = step.command
    assert command[command.index("--seed") + 1] == "2"
    assert command[command.index("--frequent-visible-experts") + 1] == "2"


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("lr: 1e-2", "lr: 1e-2"),
        ("{mask: {}}", "{mask: {}, flags: {hybrid-layer-pattern: false, num-layers: 2}}"),
        ("{mask: {}}", '{mask: {}, flags: {hybrid-layer-pattern: "*-|*E"}}'),
    ],
)
def test_the_mask_has_a_table_for_each_feed_forward_layer(runs, old, new):
    flags = runs(replace={old: new})["maskmoe.seed-1"].mask_flags
    assert flags["num-layers"] == ("2",)


def test_a_program_makes_the_mask(runs, tmp_path):
    (tmp_path / "own.py").write_text("1")
    mask = "maskmoe: {mask: {program: own.py, preset: hash, width: 2}, program: own.py}"
    run = runs(replace={"maskmoe: {mask: {}}": mask})["maskmoe.seed-2"]
    (step,) = run.mask_steps()
    assert step.command[1:3] == ("-P", str(tmp_path / "own.py"))
    assert {"--width", "--preset", "--token-frequency", "--output"} <= {*step.command}
    assert "--program" not in step.command
    assert (run.settings["mask.program"], run.settings["mask.width"]) == ("own.py", "2")
    before, _ = run.variant.program_sha256, (tmp_path / "own.py").write_text("2")
    assert runs(replace={"maskmoe: {mask: {}}": mask})["maskmoe.seed-2"].variant.program_sha256 != before


def test_the_model_file_starts_the_run(runs):
    run = runs()["maskmoe.seed-2"]
    content = yaml.load(run.files()[run.model_file], yaml.BaseLoader)
    assert (content["seed"], content["lr"], content["min-lr"]) == ("2", "1e-2", "0.001")
    assert (content["save-interval"], content["keep-last-checkpoints"]) == ("40", "1")
    assert content["routing-mask"] == str(run.routing_mask)


def test_settings_are_what_decides_the_result(runs):
    run = runs()["maskmoe.seed-2"]
    assert run.settings["mask.frequent-mass"] == "0.4"
    faster = {**run.variant.flags, "num-workers": ("4",), "save-interval": ("10",)}
    assert replace(run, variant=run.variant.model_copy(update={"flags": faster})).settings == run.settings
    other = replace(run, variant=run.variant.model_copy(update={"flags": {**run.variant.flags, "clip-grad": ("2",)}}))
    assert other.settings != run.settings


def test_a_program_trains_and_evaluates(runs, tmp_path):
    (tmp_path / "own.py").touch()
    run = runs(replace={"maskmoe: {mask: {}}": "maskmoe: {mask: {}, program: own.py}"})["maskmoe.seed-1"]
    assert yaml.safe_load(run.files()[run.model_file])["program"] == str(tmp_path / "own.py")
    command = run.evaluation_step(OWN_TEXT).command
    assert command[command.index(str(tmp_path / "own.py")) + 1] == "evaluate"
    assert run.settings["program"] == "own.py"
    assert len(run.identity["program"]) == 64


@pytest.mark.parametrize(("num_gpus", "processes", "expert_parallel"), [(0, "1", "1"), (6, "6", "2")])
def test_evaluation_suits_the_devices(runs, num_gpus, processes, expert_parallel):
    command = runs(num_gpus)["smoe.seed-1"].evaluation_step("other").command
    assert command[command.index("--nproc-per-node") + 1] == processes
    assert command[command.index("--expert-model-parallel-size") + 1] == expert_parallel
    assert ("--bf16" in command) == bool(num_gpus)


def test_evaluation_cuts_documents_as_training_does(runs):
    flags = {"--reset-attention-mask", "--eod-mask-loss", "--transformer-impl"}
    suite = {"flags: {": "flags: {reset-attention-mask: true, eod-mask-loss: true, transformer-impl: local, "}
    both = runs(replace=suite), runs()
    with_flags, without = (each["smoe.seed-1"].evaluation_step("other").command for each in both)
    assert flags <= {*with_flags}
    assert flags.isdisjoint(without)
