"""The steps of a campaign. A new step is one more entry in `STEPS`; page and JSON file show whatever the step finds."""

import json
import sys
from collections import Counter
from xml.etree import ElementTree

from gpu_campaign.measuring import measuring_command, read_measurements
from gpu_campaign.production import overlap_commands, read_overlap, read_speed, speed_commands
from gpu_campaign.results import Cell, Findings, Table
from gpu_campaign.runs import data_commands, read_data
from gpu_campaign.step import Command, Context, Step
from gpu_campaign.training import read_training, training_commands

# Importing all other tests would take long, and needs packages that no GPU needs.
GPU_TESTS = ("tests/gpu",)
"""The folders and the files whose tests have the mark `gpu`."""


def _probe(context: Context) -> list[Command]:
    return [Command((sys.executable, "-m", "gpu_campaign.probe", str(context.folder("cuda") / "facts.json")))]


def _read_probe(context: Context) -> Findings:
    facts = json.loads((context.folder("cuda") / "facts.json").read_text())
    missed = facts["GPUs"] != context.devices.num_gpus
    problem = f"torch computes on {facts['GPUs']} GPUs, but {context.devices.num_gpus} were found"
    return Findings(facts=facts, problems=(problem,) if missed else ())


def _tests(context: Context) -> list[Command]:
    """Run the tests with the mark `gpu`; in a dry run, the tests that differ from them only in the device."""
    report = context.folder("tests") / "junit.xml"
    selection = ("-m", "not gpu", "tests/gpu") if context.is_dry_run else ("-m", "gpu", *GPU_TESTS)
    return [Command((sys.executable, "-m", "pytest", "-v", "--no-header", f"--junitxml={report}", *selection))]


def _read_tests(context: Context) -> Findings:
    outcomes, rows = Counter[str](), list[tuple[Cell, ...]]()
    # A test that was interrupted has no name.
    for case in ElementTree.parse(context.folder("tests") / "junit.xml").iterfind(".//testcase[@name]"):
        notes = [(note.tag, note.get("message") or "") for note in case if note.tag in ("failure", "error", "skipped")]
        outcome, message = notes[0] if notes else ("passed", "")
        outcomes[outcome] += 1
        name = f"{case.get('classname')}.{case.get('name')}"
        rows.append(
            (name, f"{outcome}: {message[:200]}" if message else outcome, round(float(case.get("time", "0")), 1))
        )
    return Findings(
        facts=dict(outcomes),
        tables=(Table(title="Tests", columns=("test", "result", "seconds"), rows=tuple(rows)),),
        problems=() if outcomes["passed"] else ("no test passed",),
    )


# The most valuable steps come first. A share of 1 is a second of ten minutes.
STEPS = (
    Step("cuda", "CUDA is used", 30, _probe, _read_probe),
    Step("data", "Data, made on this machine", 40, data_commands, read_data),
    Step(
        "speed",
        "Speed and memory of training on all GPUs",
        80,
        speed_commands,
        read_speed,
        measures=True,
        needs=("cuda", "data"),
    ),
    Step("overlap", "Overlapped communication changes no bit", 90, overlap_commands, read_overlap, needs=("data",)),
    Step("benchmarks", "Against stock Megatron-Core", 100, measuring_command, read_measurements, measures=True),
    Step("tests", "Tests on one GPU and on all GPUs", 180, _tests, _read_tests),
    Step("training", "The laptop model in bf16 against the CPU", 80, training_commands, read_training, needs=("data",)),
)
