"""The header of a run, and its saved arguments."""

import shlex
import sys
from argparse import Namespace
from pathlib import Path

import pytest
from megatron.training.arguments import parse_args, validate_args

from maskmoe.training.settings.arguments import add_maskmoe_arguments, add_pretraining_arguments
from maskmoe.training.watch import start_of_run
from maskmoe.training.watch.start_of_run import describe_run

MODEL = """
    --num-layers 2 --hidden-size 32 --num-attention-heads 4 --seq-length 16 --max-position-embeddings 16 --mock-data
    --padded-vocab-size 256 --micro-batch-size 2 --lr 1e-3 --distributed-backend gloo
"""


@pytest.mark.parametrize(
    ("flags", "step", "tokens"),
    [
        ("--global-batch-size 8 --train-iters 5", "8 samples × 16 = 128 tokens", "640"),
        ("--global-batch-size 8 --train-samples 40", "8 samples × 16 = 128 tokens", "640"),
        # Three iterations of 4 samples, and two of 1,000 samples.
        (
            "--step-batch-size-schedule '0:4 160:1000' --train-samples 2012",
            "4 to 1,000 samples × 16 = 64 to 16,000 tokens",
            "32,192",
        ),
    ],
)
def test_header_describes_steps_and_length(flags, step, tokens, monkeypatch):
    """Megatron computes the iterations of --train-samples only after the header."""
    monkeypatch.setattr(sys, "argv", ["pretrain", *shlex.split(f"{MODEL} {flags}")])
    args = parse_args(lambda parser: add_pretraining_arguments(add_maskmoe_arguments(parser)))
    args.rank, args.world_size = 0, 1
    validate_args(args)
    header = describe_run(args, None, None, 1000, None)
    assert header["step"] == f"{step}, in micro-batches of 2; 5 iterations"
    assert header["data"] == f"mock data; {tokens} tokens in all"
    header = describe_run(args, None, Path("run"), 1000, None)
    assert header["folder"].startswith("run: args.yaml")
    assert header["folder"].endswith("; no checkpoints without --save")


def test_command_and_arguments_are_saved(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["own.py", "--data-path", "a b"])
    monkeypatch.setattr(start_of_run, "training_iterations", lambda _: 5)
    for lr in (0.1, 0.004):  # a second start writes the file again
        start_of_run._write_arguments(Namespace(lr=lr, notes="two\nlines"), tmp_path / "run")
    text = (tmp_path / "run" / "args.yaml").read_text()
    assert text.startswith("# The flags of a run: own.py --data-path 'a b'\n")
    assert text.endswith("\nlr: 0.004\nnotes: two lines\ntrain_iters: 5\n")


def test_file_that_no_run_has_written_is_not_replaced(tmp_path, monkeypatch, capsys):
    (tmp_path / "args.yaml").write_text("# my model\nnum-layers: 2\n")
    monkeypatch.setattr(start_of_run, "training_iterations", lambda _: 5)
    start_of_run._write_arguments(Namespace(), tmp_path)
    assert (tmp_path / "args.yaml").read_text() == "# my model\nnum-layers: 2\n"
    assert "args.yaml is not written: no run has written" in capsys.readouterr().out
