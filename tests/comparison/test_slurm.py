"""A comparison in Slurm jobs: the command lines, by a stand-in for sbatch, and the trainings that jobs complete."""

import errno
import json
import os
import shlex
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from support.comparisons import SUITE, finish_stages, leave_by_job, make_comparison
from support.paths import ROOT

from maskmoe.command_line import compare as command
from maskmoe.comparison.parts import Part, read_parts
from maskmoe.comparison.slurm import (
    SlurmJobs,
    Submission,
    next_runs,
    record_training,
    refuse_while_jobs_are_queued,
)
from maskmoe.comparison.slurm_options import SlurmOptions
from maskmoe.comparison.suite import Suite
from maskmoe.errors import RunFailure, UserError
from maskmoe.launch.devices import Devices
from maskmoe.workflow.progress import ProgressLine
from maskmoe.workflow.record import RunRecord

# Appends its arguments, the variables of Slurm and the script to a file, and numbers jobs from 11.
SBATCH = """#!/usr/bin/env python3
import json, os, sys
path = os.environ["SBATCH_CALLS"]
calls = open(path).readlines() if os.path.exists(path) else []
variables = {name: value for name, value in os.environ.items() if name.startswith("SLURM_")}
script = None if "--" in sys.argv else sys.stdin.read()  # pretrain.sbatch has arguments after `--`
with open(path, "a") as stream:
    print(json.dumps([sys.argv[1:], variables, script]), file=stream)
print(f"{11 + len(calls)};cluster")
"""


def program(folder: Path, name: str, text: str) -> None:
    (folder / name).write_text(text)
    (folder / name).chmod(0o755)


@pytest.fixture
def calls(tmp_path, monkeypatch):
    """Put a stand-in for sbatch on PATH; return a function that returns the arguments of all its calls."""
    (tmp_path / "bin").mkdir()
    program(tmp_path / "bin", "sbatch", SBATCH)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setenv("SBATCH_CALLS", str(tmp_path / "calls"))

    def calls() -> list[list[str]]:
        return [json.loads(line)[0] for line in (tmp_path / "calls").read_text().splitlines()]

    return calls


@pytest.fixture
def scripts(calls, tmp_path):
    """Return a function that returns the scripts of all calls of sbatch, None for a call with a file."""
    return lambda: [json.loads(line)[2] for line in (tmp_path / "calls").read_text().splitlines()]


@pytest.fixture
def suite_path(tmp_path):
    (tmp_path / "pair.yaml").write_text(SUITE)
    return tmp_path / "pair.yaml"


@pytest.fixture
def comparison(tmp_path, suite_path):
    """A comparison of two checked dense variants in a folder with a blank in its name; the dataset is empty."""
    comparison = make_comparison(suite_path, tmp_path / "its folder")
    for run in comparison.check_runs():
        finish_stages(comparison, run)
    return comparison


def make_jobs(comparison, words=("--nodes=2", "--partition=p"), throttle=None):
    return SlurmJobs(
        comparison=comparison,
        options=SlurmOptions.parse(words),
        inputs=(Path("/data"),),
        arguments=("pair.yaml", "--run-dir", "its folder"),
        throttle=throttle,
        cwd=comparison.folder.parent,
    )


def submit(comparison, **options) -> None:
    line = ProgressLine(sys.stdout)
    make_jobs(comparison, **options).submit(next_runs(comparison), line)


def options_of(call: list[str]) -> dict[str, str]:
    """Return the options of a call; the last value of a repeated option counts, as for sbatch."""
    return dict(word.removeprefix("--").partition("=")[::2] for word in call if word.startswith("--") and "=" in word)


def command_of(script: str) -> list[str]:
    """Return the command line of a script."""
    assert script.startswith("#!/bin/sh\nexec ")
    return shlex.split(script, comments=True)[1:]


def test_tuning_is_an_array_and_a_job_that_continues(comparison, calls, scripts):
    submit(comparison)
    training, continuation = calls()
    phase = comparison.folder / "slurm" / "tuning-1"
    options = options_of(training)
    assert (options["array"], options["nodes"], options["partition"]) == ("1,2,3,4", "2", "p")
    assert options["output"] == f"{phase}/%a/slurm/%j.log"
    assert training[training.index("--run-dir") + 1] == f"{phase}/%a"
    assert training[training.index("--") + 1 :] == [f"{phase}/%a/run.yaml"]
    for element, run in enumerate(comparison.runs_of_next_phase(), start=1):
        folder = comparison.folder / run.name
        assert (phase / str(element)).resolve() == folder
        assert (folder / "slurm").is_dir()
        assert (phase / str(element) / "run.yaml").is_file()
        assert "train" in RunRecord(folder / "stages.json")
    options = options_of(continuation)
    assert options["dependency"] == "afterany:11"
    assert (options["partition"], options["nodes"], options["ntasks"]) == ("p", "1", "1")
    assert command_of(scripts()[1]) == [
        *(sys.executable, "-P", "-m", "maskmoe", "compare", "pair.yaml", "--run-dir", "its folder"),
        *("--slurm", "--", "--nodes=2", "--partition=p"),
    ]
    assert Submission.read(comparison).jobs == ("11", "12")


def test_losses_are_read_from_the_logs_of_jobs(comparison, calls):
    submit(comparison)
    losses = {"tuning/one.lr-1e-3": "2.5", "tuning/one.lr-1e-2": "2.4", "tuning/two.lr-1e-3": "2.3"}
    for run in comparison.runs_of_next_phase():
        leave_by_job(comparison, run, loss=losses.get(run.name, "nan"))
    runs = next_runs(comparison)
    assert [run.name for run in runs] == ["runs/one.seed-1", "runs/two.seed-1"]
    assert [run.learning_rate for run in runs] == ["1e-2", "1e-3"]
    tuned = comparison.find_run("tuning/one.lr-1e-3")
    assert RunRecord(comparison.plan(tuned).files.record)["train"].seconds == 3.0


def test_each_whole_run_is_evaluated_after_its_training(comparison, calls, scripts):
    for run in comparison.runs_of_next_phase():
        finish_stages(comparison, run)
    submit(comparison, throttle=1)
    training, evaluation, continuation = calls()
    assert options_of(training)["array"] == "1,2%1"
    options = options_of(evaluation)
    assert (options["array"], options["dependency"]) == ("1,2%1", "aftercorr:11")
    assert (options["nodes"], options["ntasks-per-node"]) == ("1", "1")
    assert "--kill-on-invalid-dep=yes" in evaluation
    assert options_of(continuation)["dependency"] == "afterany:11:12"
    # The name of the second element's run, as the shell of the job expands the name.
    script = scripts()[1].replace("exec ", "printf '%s\\n' ", 1)
    words = os.popen(f"SLURM_ARRAY_TASK_ID=2; {script}").read().splitlines()
    assert words[-2:] == ["--run", "runs/two.seed-1"]


def test_trained_runs_are_only_evaluated(comparison, calls):
    for run in comparison.runs_of_next_phase():
        finish_stages(comparison, run)
    submit(comparison)
    leave_by_job(comparison, comparison.find_run("runs/two.seed-1"))
    submit(comparison)
    training, first, rest, continuation = calls()[3:]
    assert options_of(training)["array"] == options_of(first)["array"] == "1"
    assert options_of(rest)["array"] == "2"
    assert "dependency" not in options_of(rest)
    assert options_of(continuation)["dependency"] == "afterany:14:15:16"


def test_training_by_a_job_counts_only_for_the_submitted_run(comparison, calls):
    submit(comparison)
    run, other, *_ = comparison.runs_of_next_phase()
    assert not record_training(comparison.plan(run))
    leave_by_job(comparison, run)
    assert record_training(comparison.plan(run))
    assert not record_training(comparison.plan(run))
    leave_by_job(comparison, other)
    assert not record_training(comparison.plan(replace(other, seed=5)))


def test_training_with_other_settings_is_set_aside(comparison, calls, suite_path):
    submit(comparison)
    leave_by_job(comparison, comparison.runs_of_next_phase()[0])
    suite_path.write_text(SUITE.replace("iterations: 2", "iterations: 3"))
    changed = replace(comparison, suite=Suite.read(suite_path, {}))
    submit(changed)
    run = changed.runs_of_next_phase()[0]
    files = changed.plan(run).files
    assert run.kind == "tuning"
    assert not changed.plan(run).history().iterations
    assert (files.previous / "slurm" / "21.finished").exists()
    assert (files.previous / "checkpoints" / "iter_0000002").exists()
    assert list(files.slurm.iterdir()) == []


def test_jobs_without_progress_are_not_submitted_again(comparison, calls, monkeypatch):
    submit(comparison)
    runs = comparison.runs_of_next_phase()
    log = comparison.plan(runs[0]).files.slurm / "21.log"
    log.write_text("slurm: job 21\nerror: --num-layers is no number\nslurm: the run failed with exit code 2\n")
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    with pytest.raises(RunFailure) as failure:
        submit(comparison)
    message = str(failure.value)
    assert f"tuning/one.lr-1e-3: --num-layers is no number (full output: {log})" in message
    assert "tuning/two.lr-1e-2: no job has started the run" in message
    assert "\n" not in message
    assert len(calls()) == 2
    leave_by_job(comparison, runs[0])
    submit(comparison)
    assert options_of(calls()[2])["array"] == "1,2,3"


def test_a_user_may_submit_failed_jobs_again(comparison, calls):
    submit(comparison)
    submit(comparison)
    assert len(calls()) == 4


def test_jobs_do_not_inherit_the_variables_of_this_job(comparison, calls, monkeypatch, tmp_path):
    monkeypatch.setenv("SLURM_RESTART_COUNT", "3")
    monkeypatch.setenv("SLURM_CONF", "/etc/slurm.conf")
    submit(comparison)
    assert json.loads((tmp_path / "calls").read_text().splitlines()[0])[1] == {"SLURM_CONF": "/etc/slurm.conf"}


def test_nothing_else_starts_while_jobs_are_in_the_queue(comparison, calls, tmp_path, monkeypatch):
    submit(comparison)
    # Only another cluster than the default one has the jobs.
    script = "#!/bin/sh\ncase $* in *--clusters=cluster) printf '11\\n12\\n99\\n' ;; esac\n"
    program(tmp_path / "bin", "squeue", script)
    with pytest.raises(UserError, match=r"; to end the jobs: scancel --clusters=cluster 12 11$"):
        refuse_while_jobs_are_queued(comparison)
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    refuse_while_jobs_are_queued(comparison)
    monkeypatch.delenv("SLURM_JOB_ID")
    program(tmp_path / "bin", "squeue", "#!/bin/sh\necho 99\n")
    refuse_while_jobs_are_queued(comparison)
    program(tmp_path / "bin", "squeue", "#!/bin/sh\necho 'squeue: error: no controller' >&2\nexit 1\n")
    with pytest.raises(UserError, match="queue: squeue: error: no controller"):
        refuse_while_jobs_are_queued(comparison)


def test_submission_without_a_cluster(comparison, calls, tmp_path):
    (comparison.folder / "slurm").mkdir()
    (comparison.folder / "slurm" / "submission.json").write_text('{"jobs": ["11", "12"], "todo": {}}')
    program(tmp_path / "bin", "squeue", "#!/bin/sh\ncase $* in *--clusters*) ;; *) printf '11\\n12\\n' ;; esac\n")
    with pytest.raises(UserError, match=r"in Slurm's queue, and go on by themselves; to end the jobs: scancel 12 11$"):
        refuse_while_jobs_are_queued(comparison)


def test_jobs_of_a_submission_are_on_one_cluster(comparison, calls):
    submit(comparison, words=("--nodes=2", "--clusters=cluster,other"))
    assert [options_of(call)["clusters"] for call in calls()] == ["cluster,other", "cluster"]


def test_an_old_array_keeps_its_runs(comparison, calls):
    submit(comparison)
    first = comparison.folder / "slurm" / "tuning-1"
    before = {link.name: link.resolve() for link in first.iterdir()}
    finish_stages(comparison, comparison.runs_of_next_phase()[0])
    submit(comparison)
    assert {link.name: link.resolve() for link in first.iterdir()} == before
    assert options_of(calls()[2])["output"] == f"{first.with_name('tuning-2')}/%a/slurm/%j.log"


def test_long_command_line(comparison, calls, scripts):
    """A word of a command has at most 128 KiB on Linux."""
    for run in comparison.runs_of_next_phase():
        finish_stages(comparison, run)
    inputs = tuple(f"/corpus/{'x' * 120}/train-{number:05d}.parquet" for number in range(1200))
    jobs = replace(make_jobs(comparison), arguments=("pair.yaml", "--input", *inputs))
    jobs.submit(next_runs(comparison), ProgressLine(sys.stdout))
    _, evaluation, continuation = scripts()
    for script in (evaluation, continuation):
        words = command_of(script)
        assert words[words.index("--input") + 1 :][: len(inputs)] == list(inputs)


def test_jobs_that_were_submitted_before_a_failure_are_named(comparison, calls, tmp_path):
    script = "#!/bin/sh\ncase $* in *-next*) echo 'sbatch: error: limit' >&2; exit 1 ;; esac\n"
    program(tmp_path / "bin", "numbering-sbatch", SBATCH)
    program(tmp_path / "bin", "sbatch", script + 'exec numbering-sbatch "$@"\n')
    expected = (
        "the job was not submitted: sbatch: error: limit; to end the jobs that were submitted before: "
        "scancel --clusters=cluster 11"
    )
    with pytest.raises(UserError, match=f"^{expected}$"):
        submit(comparison)


def test_sbatch_that_cannot_be_started(comparison, calls, tmp_path, monkeypatch):
    def start(*_words, **_options):
        raise OSError(errno.E2BIG, os.strerror(errno.E2BIG))

    monkeypatch.setattr("subprocess.run", start)
    with pytest.raises(UserError, match=r"^the job was not submitted: cannot start \S+: Argument list too long$"):
        submit(comparison)


def test_refusal_of_sbatch_is_reported(comparison, calls, tmp_path):
    program(tmp_path / "bin", "sbatch", "#!/bin/sh\necho 'sbatch: error: invalid partition' >&2\nexit 1\n")
    with pytest.raises(UserError, match="not submitted: sbatch: error: invalid partition"):
        submit(comparison)


def test_missing_or_damaged_part_of_a_finished_run_is_written_again(comparison):
    runs = comparison.runs_of_next_phase()
    for run in runs:
        finish_stages(comparison, run)
    first, second, *_ = (comparison.part_file(run) for run in runs)
    content = first.read_text()
    first.unlink()
    second.write_text("{}")
    assert comparison.unfinished(runs) == runs[:2]
    assert [run.kind for run in next_runs(comparison)] == ["whole", "whole"]
    assert first.read_text() == content
    assert comparison.unfinished(runs) == ()


def test_merged_part_that_differs_from_the_part_of_this_machine_is_refused(comparison, tmp_path):
    run = comparison.runs_of_next_phase()[0]
    finish_stages(comparison, run)
    part = Part.read(comparison.part_file(run))
    part.write(tmp_path / "merged" / "same.json")
    merged = replace(comparison, merged=read_parts([tmp_path / "merged"], comparison.suite.name))
    merged.check_merged_parts()
    assert merged.find_part(run).part == part
    part.model_copy(update={"seconds": 1.0}).write(tmp_path / "merged" / "same.json")
    merged = replace(comparison, merged=read_parts([tmp_path / "merged"], comparison.suite.name))
    with pytest.raises(UserError, match=r"same.json and .*one.lr-1e-3.json are different parts of the run") as error:
        merged.check_merged_parts()
    assert "\n" not in str(error.value)


def test_data_are_not_read_if_no_part_names_a_text(comparison, monkeypatch):
    """The digests of a large dataset take minutes, which a command such as `--list` must not wait for."""
    monkeypatch.setattr("maskmoe.comparison.comparison.text_digests", lambda data: pytest.fail("the data are read"))
    comparison.check_merged_parts()
    comparison.check_text()


def test_merged_part_of_another_text_than_the_data_here_is_refused(comparison, tmp_path):
    run = comparison.runs_of_next_phase()[0]
    finish_stages(comparison, run)
    Part.read(comparison.part_file(run)).write(tmp_path / "merged" / "part.json")
    comparison.part_file(run).unlink()
    (tmp_path / "dataset.bin").write_text("another text")
    with pytest.raises(
        UserError, match=r"part.json belongs to another text than the data in .*: dataset.bin is e3b0c4"
    ):
        replace(comparison, merged=read_parts([tmp_path / "merged"], comparison.suite.name)).check_merged_parts()


def test_a_run_evaluated_on_gpus_is_finished_where_there_are_none(comparison):
    for run in comparison.runs_of_next_phase():
        finish_stages(comparison, run)
    on_gpus = replace(comparison, devices=Devices(8, 64))
    for run in comparison.runs_of_next_phase():
        finish_stages(on_gpus, run)
    assert comparison.runs_of_next_phase() == on_gpus.runs_of_next_phase() == ()


# ---- Options ---------------------------------------------------------------------------------------------------------


def test_options_of_sbatch_and_of_the_script_are_separated():
    words = ("--nodes=2", "--container", "pyxis", "--image", "a#b", "--mount", "/m:rw", "-pgpu", "--mem=1G", "--time=9")
    options = SlurmOptions.parse((*words, "--no-node-check"))
    assert options.words == (*words, "--no-node-check")
    assert options.sbatch == ("--nodes=2", "-pgpu", "--mem=1G", "--time=9")
    assert options.for_any_job == ("-pgpu", "--time=9")
    assert (options.container, options.image, options.mounts) == ("pyxis", "a#b", ("/m:rw",))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--nodes", "2"), "2 stands alone: write sbatch's options as --option=value"),
        (("--image",), "--image needs a value"),
        (("--array=1-3",), "--array=1-3 is decided by the comparison"),
        (("--run-dir", "x"), "--run-dir is decided"),
        (("-d", "afterok:1"), "-d is decided"),
        (("--container", "lxc"), "none, pyxis or apptainer, not lxc"),
        (("--container", "pyxis"), "needs an --image"),
    ],
)
def test_bad_options_are_refused(words, message):
    with pytest.raises(UserError, match=message) as error:
        SlurmOptions.parse(words)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("kind", "start", "mount"),
    [
        ("pyxis", ["srun", "--ntasks=1"], "--container-mounts="),
        ("apptainer", ["apptainer", "exec"], "--bind="),
    ],
)
def test_evaluation_runs_in_the_container_of_training(comparison, calls, scripts, kind, start, mount):
    for run in comparison.runs_of_next_phase():
        finish_stages(comparison, run)
    submit(comparison, words=("--container", kind, "--image", "an image", "--mount", "/more"))
    training = calls()[0]
    mounts = [training[i + 1] for i, word in enumerate(training) if word == "--mount"]
    assert mounts == ["/more", "/data"]
    words = command_of(scripts()[1])
    assert words[:2] == start
    bound = ",".join(word.removeprefix(mount) for word in words if word.startswith(mount)).split(",")
    folder = comparison.folder
    assert {f"{folder}:{folder}:rw", "/data:/data:ro", "/more:/more:ro", f"{ROOT}:{ROOT}:ro"} <= set(bound)
    assert bound.index(f"{folder.parent}:{folder.parent}:ro") < bound.index(f"{folder}:{folder}:rw")
    python = words.index("env")
    assert words[python : python + 5] == ["env", f"PYTHONPATH={ROOT}", "python3", "-P", "-m"]
    # Nothing is submitted from within a container.
    assert command_of(scripts()[2])[0] == sys.executable


# ---- The command -----------------------------------------------------------------------------------------------------


@pytest.fixture
def main(monkeypatch, suite_path, tmp_path):
    def main(*arguments: str) -> None:
        monkeypatch.setattr(sys, "argv", ["compare", str(suite_path), "--run-dir", str(tmp_path / "new"), *arguments])
        command.main()

    return main


def test_dry_run_prints_the_command_lines_and_writes_nothing(main, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    main("--slurm", "--dry-run", "--jobs", "2", "--", "--nodes=2", "--gpus-per-node=8")
    lines = capsys.readouterr().out.splitlines()
    training, continuation = shlex.split(lines[0]), shlex.split(lines[1])
    assert training[0] == continuation[0] == "sbatch"
    assert {"--array=1,2,3,4%2", "--nodes=2", "--gpus-per-node=8"} <= set(training)
    assert "--dependency=afterany:TRAINING" in continuation
    assert "--gpus-per-node=8" not in continuation
    assert (continuation[-1], lines[2], lines[4:]) == ("<<END", "#!/bin/sh", ["END"])
    assert command_of("\n".join(lines[2:4]))[5:] == [
        *(str(tmp_path / "pair.yaml"), "--run-dir", str(tmp_path / "new"), "--jobs", "2"),
        *("--slurm", "--", "--nodes=2", "--gpus-per-node=8"),
    ]
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--dry-run",), "--dry-run: only together with --slurm"),
        (("--", "--nodes=2"), "options after `--`: only together with --slurm"),
        (("--slurm", "--", "nodes"), "nodes stands alone"),
        (("--slurm", "--jobs", "0"), "--jobs must be at least 1"),
        (("--slurm",), "sbatch is missing"),
    ],
)
def test_bad_command_line_is_refused(main, tmp_path, monkeypatch, arguments, message):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match=message):
        main(*arguments)
    assert not (tmp_path / "new").exists()
