"""Comparisons whose runs are finished without any training."""

import json
import re
from pathlib import Path

from maskmoe.comparison.comparison import Comparison
from maskmoe.comparison.data import open_data
from maskmoe.comparison.suite import Suite
from maskmoe.launch.devices import Devices
from maskmoe.workflow.record import RunRecord

SUITE = """
data: {vocab-size: 300}
flags: {num-layers: 1, hidden-size: 8, seq-length: 16, train-iters: 4, global-batch-size: 2}
learning-rates: {values: [1e-3, 1e-2], iterations: 2}
variants: {one: {}, two: {flags: {weight-decay: 0.2}}}
"""
ITERATION = (
    "[rank0]:  [2026-01-01 00:00:00.000000] iteration {0:8d}/       2 | consumed samples: 4 | elapsed time per "
    "iteration (ms): 1500.0 | learning rate: 1.0E-03 | global batch size:     2 | lm loss: 5.0E+00 |"
)
VALIDATION = "[rank0]:  validation loss at iteration 2 on validation set | lm loss value: {} | lm loss PPL: 2 |"


def make_comparison(suite: Path, folder: Path) -> Comparison:
    """Return a comparison of a suite in a new folder; the dataset, beside the suite, is empty."""
    dataset = suite.with_name("dataset")
    for end in (".bin", ".idx"):
        dataset.with_suffix(end).touch()
    (folder / "data").mkdir(parents=True)
    files = {"data-path": (str(dataset),), "split": ("9,1,0",), "tokenizer-model": ("model",), "vocab-size": ("300",)}
    return Comparison(Suite.read(suite, {}), folder, open_data(files, folder / "data", 16), Devices(0, 2))


def finish_stages(comparison, run):
    """Record all stages of a run as finished, and write the part of the run."""
    plan = comparison.plan(run)
    plan.prepare()
    evaluation = {"loss": 2.5, "bands": [{"name": "all", "share": 1.0, "loss": 2.5}], "expert_load": []}
    plan.files.evaluation.write_text(json.dumps(evaluation))
    record = RunRecord(plan.files.record)
    for make_stage in plan.stages:
        if not record.is_finished(stage := make_stage()):
            record.begin(stage)
            record.finish(stage, 0)
    if run.kind != "check":
        comparison.write_part(run)


def leave_by_job(comparison, run, job="21", loss="2.5"):
    """Write the files of a job that has trained a run on two nodes."""
    files = comparison.plan(run).files
    logs = files.slurm / job
    logs.mkdir(parents=True)
    (logs / "attempt0.n1.log").write_text("launch: …\n")
    (logs / "attempt0.n2.log").write_text("\n".join([*map(ITERATION.format, (1, 2)), VALIDATION.format(loss), ""]))
    (files.slurm / f"{job}.finished").touch()
    files.checkpoint(2).mkdir(parents=True)


def without_command(report):
    """Return a report without the command that made it."""
    return re.sub(r"```bash\n.*?```", "", report, flags=re.DOTALL)
