"""The campaign on GPUs: its steps, time limits, results and page, and its dry run on the CPU."""

import json
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest
from device_meter import DeviceCost, cost_in_trace
from gpu_campaign.production import read_overlap
from gpu_campaign.results import Campaign, Findings, Plot, Status, Table
from gpu_campaign.runner import run_campaign
from gpu_campaign.step import Command, Context, Step
from gpu_campaign.steps import GPU_TESTS, STEPS
from gpu_campaign.training import ITERATIONS, TOLERANCE, read_training
from support.paths import ROOT
from support.runs import write_scalars

from maskmoe.launch.machine import Devices
from maskmoe.routing_mask.dispatch_kind import DispatchKind

SCRIPT = ROOT / "tools" / "gpu_campaign.sh"


def make_context(folder: Path, num_gpus: int = 0) -> Context:
    return Context(ROOT, folder, Devices(num_gpus, num_cores=2), has_transformer_engine=num_gpus > 1)


def make_step(name: str, code: str, findings: Findings | None = None, share: float = 2, measures: bool = False) -> Step:
    """Return a step that runs Python code."""
    commands = [Command((sys.executable, "-c", code), {"VARIABLE": "a value"})]
    return Step(name, f"Step {name}", share, lambda _: commands, lambda _: findings or Findings(), measures)


FOUND = Findings(
    notes=("A note.",),
    facts={"GPU 0": "a | b", "ratio": 0.123456, "nothing": None},
    tables=(Table(title="Times", columns=("case", "ms"), rows=(("first | case", 1.5), ("second", 2))),),
    plots=(Plot(file="good/picture.png", caption="A picture"),),
)
HANG = """import subprocess, sys
try:
    subprocess.run([sys.executable, "-c", "import time; print(7, flush=True); time.sleep(99)"])
except KeyboardInterrupt:
    print("the report")"""


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Campaign, Path, list[str]]:
    """Run steps of every kind in 120 s; return the results, the output folder and the lines of progress."""
    output, lines = tmp_path_factory.mktemp("campaign"), []
    steps = [
        make_step("good", "import os; assert os.environ['VARIABLE'] == 'a value'", FOUND),
        make_step("bad", "print('x' * 9000); raise SystemExit('the reason')"),
        make_step("slow", HANG, FOUND),
        make_step("wrong", "pass", Findings(problems=("losses differ",)), share=30),
        make_step("measured", "print(1)", FOUND, measures=True),
        Step("broken", "A step with an error", 22, lambda _: [], lambda _: json.loads("")),
    ]
    return run_campaign(steps, make_context(output), 120, lines.append), output, lines


def test_a_failed_step_does_not_stop_the_others(finished) -> None:
    campaign, _, _ = finished
    failed = {"bad", "slow", "wrong", "broken"}
    assert [step.name for step in campaign.steps] == ["good", "bad", "slow", "wrong", "measured", "broken"]
    assert {step.name for step in campaign.failed} == failed
    assert {step.name for step in campaign.steps if step.problem} == failed
    bad, slow, wrong, _, broken = campaign.steps[1:]
    assert bad.problem.startswith("exit code 1 of: VARIABLE='a value'")
    assert bad.output_end.endswith("the reason")
    assert len(bad.output_end) <= 6000
    assert wrong.problem == "losses differ"
    assert broken.problem.startswith("JSONDecodeError")
    assert slow.problem.startswith("the time limit was reached after")
    assert slow.output_end.endswith("7\nthe report")  # pytest reports on the tests that have run


def test_page_and_json_have_what_the_steps_found(finished) -> None:
    campaign, output, _ = finished
    written = Campaign.model_validate_json((output / "campaign.json").read_text())
    assert written.steps == campaign.steps
    assert written.is_complete
    assert not written.ran_on_gpu
    page = (output / "campaign.md").read_text()
    assert "**Dry run on the CPU: nothing ran on a GPU, and nothing was measured.**" in page
    assert "a \\| b" in page
    assert "A note.\n" in page
    assert "0.1235" in page
    assert "| first \\| case | 1.5 |" in page
    assert "![A picture](good/picture.png)" in page
    assert "**Failed:** losses differ" in page
    assert "    the reason" in page
    for step in campaign.steps:
        assert f"## {step.title}" in page
        assert (output / step.log).exists()


def test_a_dry_run_keeps_no_measurement(finished, tmp_path: Path) -> None:
    campaign, _, _ = finished
    tried = campaign.steps[4]
    assert (tried.status, tried.findings) == (Status.TRIED, Findings())
    killed = make_step("killed", HANG, FOUND, measures=True)
    (result,) = run_campaign([killed], make_context(tmp_path), 3, lambda _: None).steps
    assert (result.status, result.findings) == (Status.FAILED, Findings())
    step = make_step("measured", "pass", FOUND, measures=True)
    on_gpu = run_campaign([step], make_context(tmp_path, num_gpus=1), 60, lambda _: None)
    assert on_gpu.ran_on_gpu
    assert "1 GPU" in on_gpu.statement
    assert (on_gpu.steps[0].status, on_gpu.steps[0].findings) == (Status.PASSED, FOUND)


@pytest.mark.parametrize("num_gpus", [0, 1, 8])
def test_steps_have_different_names_and_existing_programs(num_gpus: int, tmp_path: Path) -> None:
    assert len({step.name for step in STEPS}) == len(STEPS)
    context = make_context(tmp_path, num_gpus)
    for step in STEPS:
        commands = step.commands(context)
        assert commands
        for command in commands:
            assert all(Path(word).exists() for word in command.words if word.startswith(str(ROOT)))
    text = " ".join(str(command) for step in STEPS for command in step.commands(context))
    assert set(re.findall(r"--nproc-per-node (\d+)", text)) == {0: {"1", "2"}, 1: {"1"}, 8: {"1", "8"}}[num_gpus]


def test_tests_must_pass(tmp_path: Path) -> None:
    """Tests that are all skipped show nothing."""
    context = make_context(tmp_path, num_gpus=1)
    read = next(step.read for step in STEPS if step.name == "tests")
    report = context.folder("tests") / "junit.xml"
    skipped = '<testcase classname="c" name="b" time="0"><skipped message="one GPU"/></testcase>'
    passed = '<testcase classname="c" name="a" time="1.23"/>'
    failed = '<testcase classname="c" name="d" time="2"><failure message="assert 1 == 2">text</failure></testcase>'
    interrupted = '<testcase time="0.000" />'
    report.write_text(f"<testsuites><testsuite>{passed}{skipped}{failed}{interrupted}</testsuite></testsuites>")
    findings = read(context)
    assert findings.facts == {"passed": 1, "skipped": 1, "failure": 1}
    assert findings.tables[0].rows == (
        ("c.a", "passed", 1.2),
        ("c.b", "skipped: one GPU", 0.0),
        ("c.d", "failure: assert 1 == 2", 2.0),
    )
    assert findings.problems == ()
    report.write_text(f"<testsuites><testsuite>{skipped}</testsuite></testsuites>")
    assert read(context).problems == ("no test passed",)


def test_all_tests_of_gpus_run() -> None:
    with_place = {
        path
        for path in (ROOT / "tests").rglob("test_*.py")
        if re.search(r"\nfrom support.places import .*\b(PLACES|Place)\b", path.read_text())
    }
    assert with_place == {
        path for name in GPU_TESTS for path in (ROOT / name, *(ROOT / name).glob("*.py")) if path.is_file()
    }


def trace_event(category: str, name: str, start: float, duration: float = 1.0) -> dict:
    return {"ph": "X", "cat": category, "name": name, "ts": start, "dur": duration}


def test_kernels_and_waits_of_a_trace() -> None:
    """Waits before and after the work do not count, but kernels do that run after the work was submitted."""
    events = [
        {"ph": "M", "name": "process_name"},
        trace_event("user_annotation", "measured work", 100.0, 50.0),
        trace_event("gpu_user_annotation", "measured work", 100.0, 90.0),
        trace_event("cpu_op", "aten::mm", 101.0),
        trace_event("cuda_runtime", "cudaLaunchKernel", 102.0),
        trace_event("cuda_driver", "cuLaunchKernelEx", 103.0),
        trace_event("kernel", "gemm", 105.0, 20.0),
        trace_event("kernel", "triton_sum", 160.0, 10.0),
        trace_event("gpu_memcpy", "Memcpy DtoH (Device -> Pageable)", 120.0, 2.0),
        trace_event("gpu_memset", "Memset (Device)", 121.0, 1.0),
        trace_event("cuda_runtime", "cudaMemcpyAsync", 122.0),
        trace_event("cuda_runtime", "cudaStreamSynchronize", 123.0),
        trace_event("cuda_runtime", "cudaEventSynchronize", 130.0),
        trace_event("cuda_runtime", "cudaStreamSynchronize", 99.0),
        trace_event("cuda_runtime", "cudaDeviceSynchronize", 151.0),
    ]
    assert cost_in_trace(events) == DeviceCost(kernels=2, copies=2, host_waits=2, device_seconds=33e-6)


def write_run(folder: Path, losses: list[float], **facts: str) -> None:
    """Write TensorBoard's events and the log of a run; an underscore in the name of a fact is kept."""
    (folder / "logs" / "node0" / "attempt_0" / "0").mkdir(parents=True)
    write_scalars(folder / "tensorboard", {"lm loss": [*enumerate(losses, start=1)]})
    lines = [f"  {name} ............................. {value}\n" for name, value in facts.items()]
    (folder / "logs" / "node0" / "attempt_0" / "0" / "stdout.log").write_text("".join(lines))


@pytest.mark.parametrize(
    ("shift", "backend", "problem"),
    [
        (0.9 * TOLERANCE, "gloo", None),
        (-1.1 * TOLERANCE, "gloo", "losses differ by 0.033 nats"),
        (math.nan, "gloo", "losses differ by inf nats"),
        (1e-3, "nccl", "did not use the backend gloo"),
        (0.0, "gloo", "both runs did the same"),
    ],
)
def test_losses_are_compared(shift: float, backend: str, problem: str | None, tmp_path: Path) -> None:
    context = make_context(tmp_path)
    losses = [8 - 0.1 * number for number in range(1, ITERATIONS + 1)]
    write_run(tmp_path / "training" / "float32-on-the-CPU", losses)
    shifted = [*losses[:-1], losses[-1] + shift]
    write_run(tmp_path / "training" / "bf16-on-the-CPU", shifted, distributed_backend=backend)
    findings = read_training(context)
    assert (tmp_path / findings.plots[0].file).read_bytes().startswith(b"\x89PNG")
    assert findings.tables[0].rows[0] == (1, pytest.approx(7.9), pytest.approx(7.9))
    assert len(findings.problems) == (problem is not None)
    assert problem is None or problem in findings.problems[0]


PLANNED = "rank-local"
CONTROL = f"{PLANNED}-small-buckets-late-gathers-no-waits"


@pytest.mark.parametrize(
    ("run", "change", "problem"),
    [
        (None, {}, None),
        (f"{PLANNED}-on", {"losses": [8.0, 7.0000005]}, "1 losses differ"),
        (f"{PLANNED}-on", {"losses": [8.0]}, "did not log its losses"),
        ("balanced-on", {"overlap_param_gather": "False"}, "overlap_param_gather was not True"),
        ("balanced-off", {"dispatch": DispatchKind.PLANNED.value}, "did not dispatch by one copy of a token for each"),
        (CONTROL, {"losses": [8.0, 7.0]}, "0 losses differ"),
    ],
)
def test_overlap_is_compared_bit_by_bit(run: str | None, change: dict, problem: str | None, tmp_path: Path) -> None:
    """The negative control must differ, and both sides must have run what their names say."""
    for name, gathers, losses in (
        (f"{PLANNED}-off", False, [8.0, 7.0]),
        (f"{PLANNED}-on", True, [8.0, 7.0]),
        ("balanced-off", False, [8.0, 6.0]),
        ("balanced-on", True, [8.0, 6.0]),
        (f"{PLANNED}-small-buckets-gathers-at-once", False, [8.0, 7.0]),
        (f"{PLANNED}-small-buckets-late-gathers", True, [8.0, 7.0]),
        (CONTROL, True, [8.0, 7.1]),
    ):
        kind = DispatchKind.PLANNED if name.startswith(PLANNED) else DispatchKind.ONE_COPY
        facts = {"losses": losses, "dispatch": kind.value, "overlap_param_gather": str(gathers)}
        write_run(tmp_path / "overlap" / name, **facts | (change if name == run else {}))
    problems = read_overlap(make_context(tmp_path)).problems
    assert len(problems) == (problem is not None), problems
    assert problem is None or problem in problems[0]


def run_script(*arguments: object) -> subprocess.CompletedProcess:
    return subprocess.run([SCRIPT, *map(str, arguments)], capture_output=True, text=True, check=False)


def test_bad_arguments_and_failed_steps_have_exit_codes(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    completed = run_script("--output", tmp_path / "file", "--only", "cuda")
    assert (completed.returncode, completed.stderr.count("\n")) == (2, 1)
    completed = run_script("--output", tmp_path, "--only", "cuda")
    assert (completed.returncode, completed.stderr.count("\n")) == (2, 1)
    assert "has files that no campaign has made" in completed.stderr
    completed = run_script("--output", tmp_path / "out", "--only", "cuda", "speed")
    assert (completed.returncode, completed.stderr.count("\n")) == (2, 1)
    assert "--only speed needs the step data" in completed.stderr
    completed = run_script("--output", tmp_path / "out", "--only", "cudas")
    assert (completed.returncode, completed.stderr.count("\n")) == (2, 1)
    completed = run_script("--output", tmp_path / "out", "--only", "cuda", "--minutes", "0")
    assert completed.returncode == 1
    assert "1 of 1 steps failed: cuda" in completed.stderr


@pytest.mark.slow
@pytest.mark.timeout(2000)
def test_every_step_of_a_dry_run(tmp_path: Path) -> None:
    """Without a GPU, all steps are tried; with a GPU, all steps measure."""
    completed = run_script("--output", tmp_path)
    campaign = Campaign.model_validate_json((tmp_path / "campaign.json").read_text())
    assert completed.returncode == 0, [(step.name, step.problem, step.output_end) for step in campaign.failed]
    assert [step.name for step in campaign.steps] == [step.name for step in STEPS]
    page = (tmp_path / "campaign.md").read_text()
    assert ("nothing ran on a GPU" in page) is not campaign.ran_on_gpu
    for step in campaign.steps:
        assert all((tmp_path / plot.file).exists() for plot in step.findings.plots)
