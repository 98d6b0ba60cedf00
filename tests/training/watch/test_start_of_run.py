"""The header of a run, and its saved arguments."""

import shlex
import sys
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace

import pytest
from megatron.training.arguments import parse_args, validate_args

from maskmoe.arguments.flags import flag_words, split_flags
from maskmoe.launch.command import split_program
from maskmoe.launch.model_file import ModelFile
from maskmoe.training.settings.arguments import add_maskmoe_arguments, add_pretraining_arguments
from maskmoe.training.watch import start_of_run
from maskmoe.training.watch.start_of_run import arguments_text, describe_run

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
    assert header["folder"].startswith("run: args.yaml, ")
    assert header["folder"].endswith("; no checkpoints without --save")


def test_saved_arguments_are_a_model_file(tmp_path):
    words = [
        *("--save", str(tmp_path / "checkpoints"), "--lr", "4e-3", "--swiglu", "--data-path", "0.3", "a", "0.7", "b"),
        *("--hybrid-layer-pattern", "M*E-", "--wandb-project", "true", "--split=90,10,0", "--seed", "0"),
        *("--moe-layer-freq", "([0]+[1]*3)", "--note", "a $HOME: # 'text'", "--bias=-0.5,1"),
    ]
    text = arguments_text(Namespace(lr=0.004, rank=0, notes="two\nlines"), words, tmp_path)
    (tmp_path / "args.yaml").write_text(text)
    assert "\n# lr: 0.004\n# notes: two lines\n# rank: 0\n" in text
    read = ModelFile.read(tmp_path / "args.yaml", {"RUN_DIR": "/other"}).flags_for(1)
    expected = {**split_flags(words), "save": ("/other/checkpoints",)}
    assert split_flags(flag_words(read)) == expected


@pytest.mark.parametrize("name", ["own.py", "run/own.py", "maskmoe.training.pretrain"])
def test_saved_arguments_name_the_program_that_runs_instead_of_the_entry_point(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    spec = None if name.endswith("own.py") else SimpleNamespace(name=name)
    monkeypatch.setitem(sys.modules, "__main__", SimpleNamespace(__spec__=spec))
    monkeypatch.setattr(sys, "argv", [name, *shlex.split(MODEL), "--global-batch-size", "8", "--train-iters", "5"])
    args = parse_args(lambda parser: add_pretraining_arguments(add_maskmoe_arguments(parser)))
    args.rank, args.world_size = 0, 1
    validate_args(args)
    start_of_run._write_arguments(args, tmp_path / "run")
    if name == "run/own.py":  # a second start writes the file again
        start_of_run._write_arguments(args, tmp_path / "run")
    program, flags = split_program(ModelFile.read(tmp_path / "run" / "args.yaml", {}).flags)
    assert program == (str(tmp_path / name) if name.endswith("own.py") else "")
    assert flags["num-layers"] == ("2",)


def test_file_that_no_run_has_written_is_not_replaced(tmp_path, monkeypatch, capsys):
    (tmp_path / "args.yaml").write_text("# my model\nnum-layers: 2\n")
    monkeypatch.setattr(start_of_run, "training_iterations", lambda _: 5)
    start_of_run._write_arguments(Namespace(), tmp_path)
    assert (tmp_path / "args.yaml").read_text() == "# my model\nnum-layers: 2\n"
    assert "args.yaml is not written: no run has written" in capsys.readouterr().out


def test_saved_arguments_with_relative_paths_do_not_write_into_the_folder_of_the_first_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ["--save", "run/checkpoints", "--load", "../elsewhere", "--tensorboard-dir", "run/tensorboard"]
    words += ["--data-path", "run/data", "--data-cache-path", "cache"]
    (tmp_path / "args.yaml").write_text(arguments_text(Namespace(), words, Path("run")))
    read = ModelFile.read(tmp_path / "args.yaml", {"RUN_DIR": "/other"}).flags_for(1)
    assert split_flags(flag_words(read)) == {
        "save": ("/other/checkpoints",),
        "load": (str(tmp_path.parent / "elsewhere"),),
        "tensorboard-dir": ("/other/tensorboard",),
        "data-path": ("run/data",),
        "data-cache-path": (str(tmp_path / "cache"),),
    }


def test_saved_arguments_of_a_run_folder_with_dots_are_those_of_another_run(tmp_path):
    folder = tmp_path / "work" / ".." / "run"
    text = arguments_text(Namespace(), ["--save", str(folder / "checkpoints"), "--note", str(folder / "a")], folder)
    (tmp_path / "args.yaml").write_text(text)
    read = ModelFile.read(tmp_path / "args.yaml", {"RUN_DIR": "/other"}).flags_for(1)
    assert split_flags(flag_words(read)) == {"save": ("/other/checkpoints",), "note": ("/other/a",)}
