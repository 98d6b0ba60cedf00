"""The page about extending a run: its learning rates, and its commands one after the other."""

import re
from argparse import Namespace
from pathlib import Path

import pytest
from support.documentation import DOCS, bash_blocks, run_script
from support.paths import ROOT

from maskmoe.training.resume.changed_settings import schedule_of

PAGE = DOCS / "extending.md"
BATCH = 8
SAVED = {
    "train_iters": 12,
    "lr": 2e-3,
    "min_lr": 2e-4,
    "lr_decay_style": "cosine",
    "lr_warmup_iters": 3,
    "global_batch_size": BATCH,
    "weight_decay": 0.01,
    "start_weight_decay": 0.01,
    "end_weight_decay": 0.01,
    "weight_decay_incr_style": "constant",
    "lr_warmup_init": 0.0,
    "lr_warmup_samples": 0,
}
UNSET = ("train_samples", "lr_decay_iters", "lr_decay_samples", "lr_warmup_fraction")
UNSET += ("lr_wsd_decay_iters", "lr_wsd_decay_samples", "lr_wsd_decay_style")
FLAGS = ("override_opt_param_scheduler", "use_checkpoint_opt_param_scheduler", "no_load_optim")
ROW = re.compile(r"^\| (\d+) \| (.+?) \| (.+) \|$", re.MULTILINE)
COLUMNS = (7, 9, 12, 13, 15, 18)


@pytest.mark.parametrize("row", ROW.findall(PAGE.read_text()), ids=lambda row: f"{row[1]} from {row[0]}")
def test_learning_rates_are_those_of_megatrons_scheduler(row):
    start, flags, cells = int(row[0]), row[1], row[2].split("|")
    given = {
        name.replace("-", "_"): float(value) if "e" in value else int(value)
        for name, value in re.findall(r"--([\w-]+) (\d\S*?)(?=[ `])", flags)
    }
    args = Namespace(**SAVED | dict.fromkeys(UNSET) | dict.fromkeys(FLAGS, False))
    kept = "--use-checkpoint" in flags
    vars(args).update({} if kept else given)
    schedule = schedule_of(args)
    batch, begins = args.global_batch_size, 0 if "--no-load-optim" in flags else start * BATCH
    shown = {column: int(cell) for column, cell in zip(COLUMNS, cells, strict=True) if cell.strip()}
    last = given.get("train_iters", 12)
    assert list(shown) == [column for column in COLUMNS if start < column <= last]
    for iteration, rate in shown.items():
        schedule.num_steps = begins + (iteration - start) * batch
        assert round(schedule.get_lr({}) * 1e6) == rate


@pytest.mark.slow
def test_commands_work_one_after_the_other(tmp_path: Path):
    script = "\n".join(block.text for block in bash_blocks(PAGE)).replace("launch/", f"{ROOT}/launch/")
    result = run_script(script, tmp_path, timeout=600)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    ends = {"first": 40, "short": 30, "branch": 30, "tuned": 20}
    for run, end in ends.items():
        tracker = tmp_path / "runs" / run / "checkpoints" / "latest_checkpointed_iteration.txt"
        assert tracker.read_text().strip() == str(end), run
