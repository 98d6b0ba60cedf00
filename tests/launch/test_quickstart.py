"""launch/quickstart.sh: what it refuses before the installation, its report, and the way from text to a sample."""

import importlib.util
import json
import math
import os
import signal
import subprocess
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support.datasets import build_mask, frequency_of
from support.paths import ROOT
from support.runs import write_scalars
from support.system import wait_until, write_script


@pytest.fixture
def quickstart(tmp_path):
    """Run the script in a checkout with the environment of this test, and without a set-up."""
    root = tmp_path / "checkout"
    for name in ("models", "quickstart.py"):
        (root / "launch").mkdir(parents=True, exist_ok=True)
        (root / "launch" / name).symlink_to(ROOT / "launch" / name)
    script = write_script(root / "launch" / "quickstart.sh", (ROOT / "launch" / "quickstart.sh").read_text())
    write_script(root / "launch" / "setup.sh", f"#!/bin/sh\necho setup\nln -sfn {ROOT}/.venv {root}/.venv\n")

    def start(*arguments):
        words, pipes = [script, *map(str, arguments)], {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        return subprocess.Popen(words, **pipes, text=True, cwd=tmp_path)

    return start


def refused(process):
    output, errors = process.communicate(timeout=60)
    assert (process.returncode, output) == (2, ""), errors
    assert errors.count("\n") == 1
    return errors


def test_input_is_looked_at_before_the_installation(quickstart, tmp_path):
    (tmp_path / "latin.txt").write_bytes("für".encode("latin-1"))
    (tmp_path / "empty.txt").touch()
    (tmp_path / "text.txt").write_text("für")
    for arguments, words in (
        (("--input", "nowhere.txt"), "nowhere.txt is not a file that can be read"),
        (("--input", "text.txt", "empty.txt"), "empty.txt is empty"),
        (("--input", "latin.txt"), "is not text in UTF-8: convert it, for instance by iconv -f latin1"),
        (("--train-iters", "ten"), "whole numbers, not 'ten'"),
        (("--seed",), "--seed needs a value"),
        (("--layers", "2"), "unknown argument --layers"),
        (("--run-dir", "text.txt"), "cannot make the folder --run-dir"),
        (("--run-dir", "."), "has files of something else"),
    ):
        assert words in refused(quickstart(*arguments))
    assert {path.name for path in tmp_path.iterdir()} == {"checkout", "latin.txt", "empty.txt", "text.txt"}


def test_one_folder_holds_one_quickstart(quickstart):
    first = quickstart("--run-dir", "run")
    assert any("$ maskmoe corpus" in line for line in first.stdout)
    assert "another quickstart works in" in refused(quickstart("--run-dir", "run"))
    first.send_signal(signal.SIGTERM)
    assert first.wait(timeout=60) == 130
    assert "of another text" in refused(quickstart("--run-dir", "run", "--seed", "7"))


@pytest.mark.slow
def test_quickstart_from_text_to_a_sample(quickstart, tmp_path):
    text, run = tmp_path / "text.jsonl", tmp_path / "a run"
    sources = sorted(Path(os.__file__).parent.glob("*.py"))[:60]
    text.write_text("".join(json.dumps({"text": source.read_text()}) + "\n" for source in sources))
    arguments = ("--input", text, "--run-dir", run, "--vocab-size", 512, "--train-iters", 30)
    # A signal stops the training with a checkpoint, and the same command resumes.
    process = quickstart(*arguments)
    wait_until((run / "checkpoints" / "iter_0000003").exists, timeout=300, has_ended=lambda: process.poll() is not None)
    process.send_signal(signal.SIGTERM)
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 130, output + errors
    process = quickstart(*arguments)
    output, errors = process.communicate(timeout=600)
    assert process.returncode == 0, output + errors
    assert "tokenizer" not in output.partition("maskmoe pretrain")[0]
    assert json.loads((run / "evaluation-held-out.json").read_text())["perplexity"] < 400
    assert (run / "report.md").read_text() in output
    with Image.open(run / "loss.png") as image:
        image.load()
    assert json.loads((run / "model" / "config.json").read_text())["architectures"] == ["MaskMoEForCausalLM"]
    sample = (run / "sample.txt").read_text()
    assert sample.startswith(sources[0].read_text().lstrip()[:32].rstrip())
    # Nothing is repeated.
    output, _ = quickstart(*arguments).communicate(timeout=120)
    assert "$ maskmoe" not in output


@pytest.fixture
def parts():
    """The module launch/quickstart.py."""
    spec = importlib.util.spec_from_file_location("quickstart_parts", ROOT / "launch" / "quickstart.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def finished(tmp_path):
    """The folder of a finished quickstart, with the files that the report reads."""
    # The evaluation writes null for NaN.
    bands = [
        {"name": "top 40 %", "share": 0.4, "loss": 2.0, "perplexity": math.exp(2.0), "tokens": 4000},
        {"name": "last 10 %", "share": 0.6, "loss": None, "perplexity": None, "tokens": 0},
    ]
    load = {"layer": 2, "max_over_mean": 1.25, "tokens_per_expert": [5000, 3000, 1000, 1000]}
    evaluation = {"loss": 3.0, "perplexity": math.exp(3.0), "tokens": 10000, "tokens_per_second": 1234.5}
    content = {**evaluation, "bands": bands, "expert_load": [load]}
    (tmp_path / "evaluation-held-out.json").write_text(json.dumps(content))
    (tmp_path / "model").mkdir()
    sizes = {"num_hidden_layers": 4, "hidden_size": 128, "num_experts": 8}
    (tmp_path / "model" / "config.json").write_text(json.dumps(sizes))
    (tmp_path / "sample.txt").write_text("def f():\n```\n    pass\n")
    (tmp_path / "seconds.txt").write_text("tokenizer 1\npretrain 66\n")
    scalars = {
        "lm loss": [(step, 9 - step / 50) for step in range(1, 251)],
        "lm loss validation": [(125, 6.5), (250, 6.5)],
    }
    write_scalars(tmp_path / "tensorboard", scalars, seconds=0.25)
    counts = np.zeros(4096, np.int64)
    counts[1:501] = 7
    frequency_of(counts).save(tmp_path / "token_frequency.safetensors")
    build_mask(frequency_of(counts), 8, 4, frequent_visible_experts=4).save(tmp_path / "routing_mask.safetensors")
    return tmp_path


def test_report_has_the_numbers(finished, parts):
    report = parts.write_report(finished, 2)
    for row in (
        "\n4 layers, width 128, 8 experts in each, 4,096 token ids; the ids that make up 40% of the text see 4 "
        "experts, all other ids see one (balanced); trained by 2 processes.\n",
        "| top 40 %     |  40.0% |  4,000 | 2.000 |        7.4 |",
        "| last 10 %    |  60.0% |      0 |     – |          – |",
        "| all          | 100.0% | 10,000 | 3.000 |       20.1 |",
        "| 2     |     1.25 |                50 30 10 10 |",
        # 8 samples of 256 tokens take a quarter of a second.
        "| training   | 512,000 |    8,192 |",
        "| evaluation |  10,000 |    1,234 |",
        "Seconds: tokenizer 1, pretrain 66.",
        "````text\ndef f():\n```\n    pass\n````",
    ):
        assert row in report
    assert "token frequencies only: 500.0" in report
    assert (finished / "report.md").read_text() == report
    with Image.open(finished / "loss.png") as image:
        # Both curves are visible: pixels of their colors are there.
        colors = {color for _, color in image.convert("RGB").getcolors(image.width * image.height)}
    assert {(0x9D, 0xB4, 0xD6), (0x1F, 0x4E, 0x9C)} <= colors


def test_prompt_is_the_start_of_the_text(parts, tmp_path):
    (tmp_path / "book.txt").write_text(f"\0{' ' * 70}THE TITLE {'x' * 90}\n")
    (tmp_path / "blank.jsonl").write_text('{"text": " \\n"}\n')
    assert parts.choose_prompt([tmp_path / "blank.jsonl", tmp_path / "book.txt"]) == f"THE TITLE {'x' * 22}"
    assert parts.choose_prompt([tmp_path / "corpus.jsonl"]).startswith("def ")
