"""The job array of a comparison, with stand-ins for Slurm's commands; tests/slurm has a real cluster."""

import re
import shlex
from dataclasses import replace

import pytest
from support.command_lines import run_command, writing_nothing
from support.real_suite import SUITE as REAL_SUITE
from support.system import write_script

from maskmoe.comparison.comparison import Comparison
from maskmoe.comparison.data import Dataset
from maskmoe.comparison.slurm import check_queue, submission, submit
from maskmoe.comparison.suite import Suite
from maskmoe.errors import UserError
from maskmoe.launch.machine import Devices


@pytest.fixture
def comparison(suite_file, tmp_path):
    """A comparison in a folder whose name has a space."""
    suite, folder = Suite.read(suite_file(), {}), tmp_path / "a run"
    data = Dataset(folder / "data", "300", suite.seq_length, text=(tmp_path / "text" / "a.txt",))
    return Comparison(suite, "small", folder, folder / "results.jsonl", data, Devices(0, 2))


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    """Put stand-ins for sbatch and squeue on PATH, which print the files `sbatch.out` and `squeue.out`."""
    programs = tmp_path / "bin"
    for name in ("sbatch", "squeue"):
        text = f'#!/bin/sh\nprintf "%s\\n" "$@" > {tmp_path}/{name}.in\ncat {tmp_path}/{name}.out\n'
        write_script(programs / name, text)
        (tmp_path / f"{name}.out").write_text("")
    monkeypatch.setenv("PATH", f"{programs}:/usr/bin:/bin")
    return tmp_path


def job_name(command):
    """Return the name of the jobs that a command submits."""
    (name,) = [word.removeprefix("--job-name=") for word in command if word.startswith("--job-name=")]
    return name


def test_each_run_is_an_element_of_one_array(comparison, slurm):
    runs = comparison.selected(["smoe", "hash"], [])
    command = submission(comparison, runs, ["suite.yaml", "--jobs", "2"], ["--nodes=2", "--time=1:00"], 2)
    (slurm / "sbatch.out").write_text("Submitted batch job 7\n")
    assert submit(comparison, runs, command) == "Submitted batch job 7\n"
    given = (slurm / "sbatch.in").read_text().splitlines()
    assert {"--array=1-4%2", "--nodes=2", "--time=1:00"} <= set(given)
    links = comparison.folder / "slurm" / "1"
    assert given[given.index("--run-dir") + 1] == f"{links}/%a"
    assert given[-1] == f"{links}/%a/run.yaml"
    then = shlex.split(given[given.index("--then") + 1])
    assert then == ["launch/compare.sh", "suite.yaml", "--jobs", "2", "--run", f"{links}/%a"]
    assert [(links / str(n)).resolve() for n in (1, 2, 3, 4)] == [run.folder for run in runs]
    mounts = [given[number + 1] for number, word in enumerate(given) if word == "--mount"]
    assert mounts == [str(comparison.data.folder), str(slurm / "text"), f"{comparison.folder}:rw"]


def test_folders_of_programs_and_of_the_suite_are_mounted(comparison, suite_file, tmp_path_factory):
    """Also those of variants whose runs are finished: every job reads the whole suite."""
    programs, folder = tmp_path_factory.mktemp("programs"), suite_file().parent
    (programs / "own.py").touch()
    (folder / "models").mkdir()
    (folder / "models" / "m.yaml").write_text("num-layers: 2\n")
    text = {"data:": "model: models/m.yaml\ndata:", " smoe: {": f" smoe: {{program: {programs}/own.py, "}
    comparison = replace(comparison, suite=Suite.read(suite_file(replace=text), {}))
    run = next(run for run in comparison.runs if run.name != "smoe")
    command = submission(comparison, [run], [str(suite_file())], [], None)
    assert {str(programs), str(folder), str(folder / "models")} < set(command)
    assert "--array=1-1" in command


def test_jobs_get_absolute_paths(suite_file, texts, tmp_path, monkeypatch):
    """A file with the name of a variant changes nothing."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "maskmoe").touch()
    words = [suite_file().name, f"--input={texts[0].name}", "--held-out", f"a={texts[1].name}", "--vocab-size", "400"]
    outcome = run_command("compare", *words, "--only", "maskmoe", "--seeds", "1", "--slurm", "--dry-run")
    own = f"{tmp_path}/small.yaml --run-dir {tmp_path}/runs/suites/small"
    data = f"--vocab-size 400 --input {texts[0]} --held-out a={texts[1]}"
    printed = shlex.split(outcome.output)
    assert printed[printed.index("--then") + 1].startswith(f"launch/compare.sh {own} {data} --run ")
    assert "--array=1-1" in printed
    assert not (tmp_path / "runs").exists()


def test_a_dry_run_of_a_finished_suite_submits_nothing(comparison, suite_file, monkeypatch):
    monkeypatch.setattr(Comparison, "unfinished", lambda comparison, runs: [])
    outcome = run_command("compare", suite_file(), "--run-dir", comparison.folder, "--slurm", "--dry-run")
    assert outcome.output == "all runs are finished\n"
    assert not comparison.folder.exists()


def test_an_installed_package_cannot_submit(suite_file, monkeypatch, tmp_path):
    monkeypatch.setattr("maskmoe.command_line.compare.SUBMIT_SCRIPT", tmp_path / "submit.sh")
    outcome = run_command("compare", suite_file(), "--slurm")
    outcome.assert_refused("--slurm needs a checkout of the repository: start launch/compare.sh there")


def test_a_second_array_is_refused_while_the_first_is_queued(comparison, slurm):
    """A comparison of the same suite in another folder is none of its business."""
    other = replace(comparison, folder=comparison.folder.with_name("other"))
    first, second = (job_name(submission(each, each.runs, [], [], None)) for each in (comparison, other))
    assert re.fullmatch("small-[0-9a-f]{8}", first)
    assert first != second
    write_script(slurm / "bin" / "squeue", f'#!/bin/sh\n[ "$2" != --name={first} ] || echo "7_[1-4] {first}"\n')
    with pytest.raises(UserError, match=f"to end them: scancel --name={first}$"):
        check_queue(comparison)
    check_queue(other)


def test_files_of_a_queued_array_stay_as_they_are(slurm, texts, tmp_path):
    """The settings have changed since the job began, so that another submission would set its checkpoints aside."""
    (tmp_path / "suite.yaml").write_text(REAL_SUITE)
    run = tmp_path / "run" / "runs" / "dense.seed-1"
    for path in (run / "run.yaml", run / "checkpoints" / "latest_checkpointed_iteration.txt"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("of the job")
    words = ("suite.yaml", "--input", texts[0], "--run-dir", "run", "--only", "dense", "--slurm")
    (slurm / "squeue.out").write_text("7_[1-4]\n")
    with writing_nothing(tmp_path / "run" / "runs"):
        run_command("compare", *words, folder=tmp_path).assert_refused("to end them: scancel --name=suite-")
    assert not (tmp_path / "run" / "data").exists()


def test_without_slurm_the_error_says_so(comparison, monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(UserError, match="sbatch is missing"):
        check_queue(comparison)


def test_a_refusal_of_slurm_is_one_line(comparison, slurm):
    (slurm / "bin" / "sbatch").write_text("#!/bin/sh\necho 'sbatch: error: invalid partition' >&2\nexit 1\n")
    command = submission(comparison, comparison.runs, [], ["--partition=none"], None)
    with pytest.raises(UserError, match="invalid partition"):
        submit(comparison, comparison.runs, command)
