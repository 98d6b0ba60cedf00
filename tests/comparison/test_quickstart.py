"""launch/quickstart.sh: its command line, the commands of its stages, its report, and the whole pipeline."""

import itertools
import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support.datasets import frequency_of, write_documents
from support.paths import ROOT
from support.runs import write_scalars
from support.system import wait_until, write_script

from maskmoe.command_line.quickstart import parse_settings
from maskmoe.comparison.quickstart import Quickstart, quickstart_suite, write_report
from maskmoe.comparison.run import OWN_TEXT
from maskmoe.comparison.stage import Stage
from maskmoe.launch.machine import Devices
from maskmoe.launch.model_file import ModelFile

# ---- Settings and commands -------------------------------------------------------------------------------------------

CPU_ENVIRONMENT = {"OMP_NUM_THREADS": "4", "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}


@pytest.fixture
def plan(tmp_path):
    """Make a quickstart on a dataset of two documents."""
    write_documents(tmp_path / "dataset_text_document", [[0] * 5000] * 2)

    def plan(*arguments, num_gpus=0):
        devices = Devices(num_gpus=num_gpus, num_cores=8)
        return Quickstart(parse_settings(["--run-dir", str(tmp_path), *arguments]), devices)

    return plan


def flags_of(stage: Stage):
    return dict(itertools.pairwise(stage.command))


def test_training_follows_settings_and_devices(plan):
    made = plan("--num-experts", "6", "--global-batch-size", "6", "--hidden-size", "64", num_gpus=4)
    flags = flags_of(made.training_stage())
    assert flags["--nproc-per-node"] == "4"
    assert (
        flags["--expert-model-parallel-size"]
        == flags_of(made.run.mask_stage(Path("mask")))["--expert-model-parallel-size"]
        == "2"
    )
    assert (flags["--micro-batch-size"], flags["--global-batch-size"]) == ("2", "8")
    assert (flags["--num-attention-heads"], flags["--moe-ffn-hidden-size"]) == ("2", "128")
    assert "--bf16" in made.training_stage().command
    made = plan()
    for stage in (made.training_stage(), made.run.evaluation_stage(OWN_TEXT, made.devices.num_processes)):
        assert stage.environment == CPU_ENVIRONMENT
        assert "--bf16" not in stage.command
        assert flags_of(stage)["--nproc-per-node"] == "2"


def test_settings_reach_their_stages(plan):
    made = plan("--lr", "0.01", "--seed", "7", "--train-iters", "600", "--frequent-mass", "0.25", "--num-layers", "3")
    train, mask = flags_of(made.training_stage()), flags_of(made.run.mask_stage(Path("mask")))
    assert (train["--lr"], train["--min-lr"], train["--seed"]) == ("0.01", "0.0005", "7")
    assert (train["--train-iters"], train["--save-interval"]) == ("600", "30")
    assert (train["--eval-interval"], train["--log-interval"]) == ("60", "3")
    assert train["--hybrid-layer-pattern"] == "*E*E*E"
    assert (mask["--frequent-mass"], mask["--seed"], mask["--num-layers"]) == ("0.25", "7", "3")
    tokenizer = next(stage for stage in plan("--vocab-size", "500").data.stages() if stage.name == "tokenizer")
    assert flags_of(tokenizer)["--vocab-size"] == "500"


def test_defaults_are_those_of_the_suite(plan):
    """The suite file states the flags that follow from other flags, too."""
    made, (variant,) = plan(), quickstart_suite().variants.values()
    own = {"expert-model-parallel-size": ("2",), "save-interval": ("40",), "lr": ("0.004",)}
    assert made.run.variant.flags == {**variant.flags, **own}
    assert made.run.variant.mask == {**variant.mask, "expert-model-parallel-size": ("2",)}


def test_model_file_of_the_laptop_describes_the_same_model():
    model = ModelFile.read(ROOT / "launch" / "models" / "laptop.yaml", {})
    (variant,) = quickstart_suite().variants.values()
    differing = {"lr", "min-lr", "num-workers", "log-interval", "eval-interval", "save-interval"}
    own = {name: words for name, words in model.flags.items() if name not in differing | {"keep-last-checkpoints"}}
    assert {name: words for name, words in variant.flags.items() if name not in differing} == own


def test_stages_go_from_text_to_a_sample(plan, tmp_path):
    made = plan("--prompt", "-- import")
    assert [stage.name for stage in made.data.stages()] == ["corpus", "tokenizer", "dataset", "frequency"]
    names = [stage.name for stage in made.model_stages()]
    assert names == ["mask", "train", "evaluate-held-out", "export", "sample"]
    assert "--prompt=-- import" in made.sample_stage().command
    # A training that was ended resumes from its own checkpoints; tests/comparison/test_stage.py ends stages.
    flags = flags_of(made.training_stage())
    assert made.training_stage().is_resumable
    assert flags["--load"] == flags["--save"] == str(tmp_path / "checkpoints")


def run_quickstart(*arguments, **options):
    command = [sys.executable, "-P", "-m", "maskmoe", "quickstart", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, **options)


def test_two_ways_to_a_text_are_one_path(plan, tmp_path):
    (tmp_path / "else").mkdir()
    assert plan("--input", f"{tmp_path}/else/../text.jsonl").data.text == (tmp_path / "text.jsonl",)


def test_a_signal_ends_the_stage_before_the_command(tmp_path):
    command = [sys.executable, "-P", "-m", "maskmoe", "quickstart", "--run-dir", tmp_path / "run"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    wait_until((tmp_path / "run" / "logs" / "corpus.log").exists, has_ended=lambda: process.poll() is not None)
    process.terminate()
    assert "stopping: the stage in progress ends first" in process.communicate(timeout=60)[1]
    assert process.returncode == 128 + signal.SIGTERM


def test_the_prompt_leaves_room_for_the_sample(plan, tmp_path):
    (tmp_path / "text.jsonl").write_text('{"text": ""}\n{"text": "Some words of the text"}\n')
    made = plan("--input", str(tmp_path / "text.jsonl"), "--seq-length", "64")
    flags = flags_of(made.sample_stage())
    assert "--prompt=Some wor" in made.sample_stage().command
    assert flags["--max-new-tokens"] == "32"


def test_the_prompt_is_no_white_space(plan, tmp_path):
    (tmp_path / "book.txt").write_text(f"\0{' ' * 70}THE TITLE\n")
    (tmp_path / "blank.jsonl").write_text('{"text": " \\n"}\n')
    made = plan("--input", str(tmp_path / "blank.jsonl"), str(tmp_path / "book.txt"))
    assert "--prompt=THE TITLE\n" in made.sample_stage().command


def test_script_sets_up_and_passes_its_arguments_on(tmp_path):
    quickstart = write_script(tmp_path / "launch/quickstart.sh", (ROOT / "launch" / "quickstart.sh").read_text())
    write_script(tmp_path / "launch/setup.sh", "#!/bin/sh\necho setup\n")
    write_script(tmp_path / ".venv/bin/python", '#!/bin/sh\nprintf "<%s>" "$@"; exit 3\n')
    result = subprocess.run([quickstart, "--prompt", "a b"], capture_output=True, text=True, cwd="/")
    words = f"<-P><{tmp_path}/launch/run_checkout.py><quickstart><--prompt><a b>"
    assert (result.stdout, result.returncode) == (f"setup\n{words}", 3)
    result = subprocess.run([quickstart, "--help"], capture_output=True, text=True)
    assert result.stdout.startswith("usage: launch/quickstart.sh")
    assert result.returncode == 0


# ---- The report ------------------------------------------------------------------------------------------------------


@pytest.fixture
def finished(plan):
    """A quickstart with the files that it leaves when it is finished."""
    # The evaluation writes null for NaN.
    bands = [
        {"name": "top 40 %", "share": 0.4, "loss": 2.0, "perplexity": math.exp(2.0), "tokens": 4000},
        {"name": "last 10 %", "share": 0.6, "loss": None, "perplexity": None, "tokens": 0},
    ]
    load = {"layer": 2, "max_over_mean": 1.25, "tokens_per_expert": [5000, 3000, 1000, 1000]}
    evaluation = {"loss": 3.0, "perplexity": math.exp(3.0), "tokens": 10000, "tokens_per_second": 1234.5}
    finished = plan("--train-iters", "250", "--seq-length", "128")
    content = {**evaluation, "bands": bands, "expert_load": [load]}
    finished.run.evaluation(OWN_TEXT).write_text(json.dumps(content))
    finished.sample.write_text("def f():\n```\n    pass\n")
    training = [(step, 9 - step / 50) for step in range(1, 251)]
    held_out = [(step, 6.5) for step in (125, 250)]
    scalars = {"lm loss": training, "lm loss validation": held_out}
    write_scalars(finished.run.tensorboard, scalars, seconds=0.25)
    counts = np.zeros(4096, np.int64)
    counts[1:501] = 7
    frequency_of(counts).save(finished.data.token_frequency)
    return finished


def test_report_holds_the_numbers(finished, tmp_path):
    report = write_report(finished, {"corpus": 1.0, "train": 66.0, "sample": 7.0})
    for row in (
        "\n4 layers, width 128, 8 experts in each, 4,096 token ids; the ids that make up 40% of the text see 4 "
        "experts, all other ids see one (balanced); 2 processes, expert parallel 2.\n",
        "| top 40 %     |  40.0% |  4,000 | 2.000 |        7.4 |",
        "| last 10 %    |  60.0% |      0 |     – |          – |",
        "| all          | 100.0% | 10,000 | 3.000 |       20.1 |",
        "| 2     |     1.25 |                50 30 10 10 |",
        # 8 samples of 128 tokens take a quarter of a second.
        "| training   | 256,000 |    4,096 |",
        "| evaluation |  10,000 |    1,234 |",
        "Time: 01:14 (corpus 00:01, train 01:06, sample 00:07).",
        f"- checkpoint: {tmp_path / 'checkpoints'}\n",
        f"- loss curve: {tmp_path / 'loss.png'}\n",
        "````text\ndef f():\n```\n    pass\n````",
    ):
        assert row in report
    assert "token frequencies only: 500.0" in report
    assert (tmp_path / "report.md").read_text() == report
    with Image.open(tmp_path / "loss.png") as image:
        # Both curves are visible: pixels of their colors are there.
        colors = {color for _, color in image.convert("RGB").getcolors(image.width * image.height)}
    assert {(0x9D, 0xB4, 0xD6), (0x1F, 0x4E, 0x9C)} <= colors


def test_training_of_one_iteration_has_no_speed(finished):
    write_scalars(finished.run.tensorboard, {"lm loss": [(1, 9.0)]}, seconds=0.25)
    assert "| training   | 256,000 |        – |" in write_report(finished, {"train": 1.0})


# ---- The whole pipeline ----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_quickstart_from_text_to_a_sample(tmp_path):
    text, run_dir = tmp_path / "text.jsonl", tmp_path / "a run"
    sources = sorted(Path(os.__file__).parent.glob("*.py"))[:60]
    text.write_text("".join(json.dumps({"text": source.read_text()}) + "\n" for source in sources))
    arguments = [
        *("--input", text, "--run-dir", run_dir, "--vocab-size", 512, "--train-iters", 60, "--hidden-size", 64),
        *("--num-layers", 2, "--seq-length", 64, "--num-experts", 4, "--frequent-visible-experts", 2),
    ]
    first = run_quickstart(*arguments, cwd=tmp_path)
    assert first.returncode == 0, first.stdout + first.stderr
    evaluation = json.loads((run_dir / "evaluation-held-out.json").read_text())
    assert evaluation["perplexity"] < 300
    assert len(evaluation["expert_load"]) == 2
    assert sorted(path.name for path in (run_dir / "checkpoints").glob("iter_*")) == ["iter_0000060"]
    assert (run_dir / "report.md").read_text() in first.stdout
    with Image.open(run_dir / "loss.png") as image:
        image.load()
    assert json.loads((run_dir / "model" / "config.json").read_text())["architectures"] == ["MaskMoEForCausalLM"]

    # Another prompt needs only another sample.
    second = run_quickstart(*arguments, "--prompt", "-- import", cwd=tmp_path)
    assert second.returncode == 0
    assert next(line for line in second.stdout.splitlines() if "finished in" in line).startswith("sample")
    assert (run_dir / "previous" / "1" / "sample.txt").exists()
    assert (run_dir / "sample.txt").read_text().startswith("-- import")
