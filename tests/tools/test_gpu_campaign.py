"""The campaign on GPUs: failed steps, comparisons that must be able to fail, and its dry run on the CPU."""

import math
import re
import subprocess
import sys
from pathlib import Path

import pytest
from device_meter import DeviceCost, cost_in_trace
from gpu_campaign.production import read_overlap
from gpu_campaign.results import Campaign, Findings, Status
from gpu_campaign.runner import run_campaign
from gpu_campaign.step import Command, Context, Step
from gpu_campaign.steps import GPU_TESTS, STEPS
from gpu_campaign.training import ITERATIONS, TOLERANCE, read_training
from support.paths import ROOT
from support.runs import write_scalars

from maskmoe.launch.machine import Devices
from maskmoe.routing_mask.dispatch_kind import DispatchKind

SCRIPT = ROOT / "tools" / "gpu_campaign.sh"
FOUND = Findings(notes=("A note.",))


def make_context(folder: Path, num_gpus: int = 0) -> Context:
    return Context(ROOT, folder, Devices(num_gpus, num_cores=2), has_transformer_engine=num_gpus > 1)


def make_step(name: str, code: str, findings: Findings = FOUND, share: float = 5, measures: bool = False) -> Step:
    """Return a step that runs Python code."""
    commands = [Command((sys.executable, "-c", code))]
    return Step(name, f"Step {name}", share, lambda _: commands, lambda _: findings, measures)


def test_a_failed_step_does_not_stop_the_others(tmp_path: Path) -> None:
    steps = [
        make_step("bad", "raise SystemExit('the reason')"),
        make_step("slow", "import time; time.sleep(99)", share=0.1),
        make_step("wrong", "pass", Findings(problems=("losses differ",))),
        make_step("tried", "pass", measures=True),
        make_step("good", "pass"),
    ]
    run_campaign(steps, make_context(tmp_path), 20, lambda _: None)
    campaign = Campaign.model_validate_json((tmp_path / "campaign.json").read_text())
    assert [step.name for step in campaign.failed] == ["bad", "slow", "wrong"]
    # A dry run keeps no measurement.
    tried, good = campaign.steps[3:]
    assert (tried.status, tried.findings) == (Status.TRIED, Findings())
    assert (good.status, good.findings) == (Status.PASSED, FOUND)
    page = (tmp_path / "campaign.md").read_text()
    for text in ("nothing ran on a GPU", "A note.", "**Failed:** losses differ", "    the reason"):
        assert text in page


def test_all_tests_of_gpus_run() -> None:
    with_place = {
        path
        for path in (ROOT / "tests").rglob("test_*.py")
        if re.search(r"\nfrom support.places import .*\b(PLACES|Place)\b", path.read_text())
    }
    assert with_place == {
        path for name in GPU_TESTS for path in (ROOT / name, *(ROOT / name).glob("*.py")) if path.is_file()
    }


def test_kernels_and_waits_of_a_trace() -> None:
    """Waits before and after the work do not count, but kernels do that run after the work was submitted."""
    events = [
        ("user_annotation", "measured work", 100.0, 50.0),
        ("gpu_user_annotation", "measured work", 100.0, 90.0),
        ("cuda_runtime", "cudaLaunchKernel", 102.0, 1.0),
        ("kernel", "gemm", 105.0, 20.0),
        ("kernel", "triton_sum", 160.0, 10.0),
        ("gpu_memcpy", "Memcpy DtoH (Device -> Pageable)", 120.0, 2.0),
        ("gpu_memset", "Memset (Device)", 121.0, 1.0),
        *(("cuda_runtime", "cudaStreamSynchronize", start, 1.0) for start in (99.0, 123.0)),
        *(("cuda_runtime", "cudaEventSynchronize", start, 1.0) for start in (130.0, 151.0)),
    ]
    names = ("cat", "name", "ts", "dur")
    cost = cost_in_trace({"ph": "X", **dict(zip(names, event, strict=True))} for event in events)
    assert cost == DeviceCost(kernels=2, copies=2, host_waits=2, device_seconds=33e-6)


def write_run(folder: Path, losses: list[float], **facts: str) -> None:
    """Write TensorBoard's events and the log of a run."""
    log = folder / "logs" / "node0" / "attempt_0" / "0" / "stdout.log"
    log.parent.mkdir(parents=True)
    write_scalars(folder / "tensorboard", {"lm loss": [*enumerate(losses, start=1)]})
    log.write_text("".join(f"  {name} ............................. {value}\n" for name, value in facts.items()))


@pytest.mark.parametrize(
    ("shift", "backend", "is_problem"),
    [
        (0.9 * TOLERANCE, "gloo", False),
        (-1.1 * TOLERANCE, "gloo", True),
        (math.nan, "gloo", True),
        (1e-3, "nccl", True),  # another backend than the device's
        (0.0, "gloo", True),  # both runs did the same
    ],
)
def test_losses_are_compared(shift: float, backend: str, is_problem: bool, tmp_path: Path) -> None:
    losses = [8 - 0.1 * number for number in range(1, ITERATIONS + 1)]
    write_run(tmp_path / "training" / "float32-on-the-CPU", losses)
    shifted = [*losses[:-1], losses[-1] + shift]
    write_run(tmp_path / "training" / "bf16-on-the-CPU", shifted, distributed_backend=backend)
    assert len(read_training(make_context(tmp_path)).problems) == is_problem


PLANNED = "rank-local"


@pytest.mark.parametrize(
    ("run", "change"),
    [
        (None, {}),
        (f"{PLANNED}-on", {"losses": [8.0, 7.0000005]}),
        ("balanced-on", {"overlap_param_gather": "False"}),
        ("balanced-off", {"dispatch": DispatchKind.PLANNED.value}),
    ],
)
def test_overlap_is_compared_bit_by_bit(run: str | None, change: dict, tmp_path: Path) -> None:
    """Both sides must have run what their names say."""
    for name, gathers, loss in (
        (f"{PLANNED}-off", False, 7.0),
        (f"{PLANNED}-on", True, 7.0),
        ("balanced-off", False, 6.0),
        ("balanced-on", True, 6.0),
    ):
        kind = DispatchKind.PLANNED if name.startswith(PLANNED) else DispatchKind.ONE_COPY
        facts = {"losses": [8.0, loss], "dispatch": kind.value, "overlap_param_gather": str(gathers)}
        write_run(tmp_path / "overlap" / name, **facts | (change if name == run else {}))
    assert len(read_overlap(make_context(tmp_path)).problems) == (run is not None)


@pytest.mark.slow
@pytest.mark.timeout(2000)
def test_every_step_of_a_dry_run(tmp_path: Path) -> None:
    """Without a GPU, all steps are tried; with a GPU, all steps measure."""
    completed = subprocess.run([SCRIPT, "--output", tmp_path], check=False)
    campaign = Campaign.model_validate_json((tmp_path / "campaign.json").read_text())
    assert completed.returncode == 0, [(step.name, step.problem, step.output_end) for step in campaign.failed]
    assert [step.name for step in campaign.steps] == [step.name for step in STEPS]
    page = (tmp_path / "campaign.md").read_text()
    assert ("nothing ran on a GPU" in page) is not campaign.ran_on_gpu
    for step in campaign.steps:
        assert all((tmp_path / plot.file).exists() for plot in step.findings.plots)
