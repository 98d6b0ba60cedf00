"""Every command that the pages about measurements tell a reader to run, runs: here in its smallest size."""

import re
import shlex
from pathlib import Path

import pytest
from support.documentation import DOCS, README, bash_blocks, commands, prose, run_script
from support.paths import ROOT
from training_runs import laptop_flags, write_inputs

PAGES = [README, *(DOCS / name for name in ("measurements.md", "gpus.md", "dispatch.md"))]
# Text and tables name a command that a reader may run by its program; other code there is a mention.
PROGRAMS = ("bash ", "python ", "torchrun ", "pytest ")
STEP = "--num-layers 1 --hidden-size 64 --num-experts 4 --vocab-size 128 --seq-length 32 --batch-size 2 --topk 2"
LAYER = "--tokens 64 --hidden-size 64 --experts 2/4"
ZIPF = "--data-path {tmp}/zipf --routing-mask {tmp}/mask.safetensors"
TEXT = "README.md CHANGELOG.md docs/data.md docs/check.md"
# The flags that give a program its smallest size; a later flag overrides an earlier one.
SMALL = {
    "launch/quickstart.sh": f"--input {TEXT} --run-dir {{tmp}}/run --train-iters 1 --vocab-size 512",
    "tests/run.sh": "tests/test_release.py -k version",
    "tools/gpu_campaign.sh": "--output {tmp}/campaign --only cuda",
    "pretrain": f"{ZIPF} --tokenizer-type NullTokenizer --tokenizer-model {{tmp}}/mask.safetensors --vocab-size 4096",
    "tools/studies/simulate_dispatch.py": f"{ZIPF} --output {{tmp}}/d.csv --plot {{tmp}}/d.png --tokens-per-rank 8",
    "tools/benchmarks/pages.py": "--check",
    "tools/benchmarks/train_step.py": f"--repeats 1 --frequent-visible-experts 2 {STEP}",
    "tools/benchmarks/local_backend.py": "--repeats 1 --seq-length 64 --cases laptop memory-4096-tokens",
    "tools/benchmarks/quickstart_step.py": "--repeats 1 --iterations 4 --layouts 1x1",
    "tools/benchmarks/preprocess.py": "--repeats 1 --megabytes 1 --vocab-size 512",
    "tools/benchmarks/count_frequency.py": "--repeats 1 --megabytes 10 --mask-layers 2",
    "tools/benchmarks/dispatcher.py": f"--repeats 1 {LAYER}",
    "tools/benchmarks/moe_layer.py": f"--repeats 1 {LAYER} --ffn-hidden-size 32",
}


def commands_of(page: Path) -> list[str]:
    """Return the commands in the code blocks, the tables and the text of a page."""
    in_text = [code for code in re.findall(r"`([^`]+)`", prose(page)) if code.startswith(PROGRAMS)]
    return [*(shlex.join(words) for block in bash_blocks(page) for words in commands(block)), *in_text]


COMMANDS = list(dict.fromkeys(command for page in PAGES for command in commands_of(page)))


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.partition(" --")[0])
def test_command_runs_in_its_smallest_size(command: str, tmp_path: Path) -> None:
    programs = [word for word in command.split() if word in SMALL]
    assert len(programs) == 1, "add the program with its smallest size to SMALL"
    words = command.replace(" --measure", "").replace("runs/measurements", str(tmp_path))
    small = SMALL[programs[0]].format(tmp=tmp_path)
    if "/zipf" in small:
        write_inputs(tmp_path, laptop_flags(), 4096, 20 * 512)
    result = run_script(f"{words} {small}", ROOT, timeout=200)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-4000:]
    for path in re.findall(r"--json (\S+)", words):
        assert re.findall(r" ratio=[\d.]+ \(ours .* baseline ", result.stdout.splitlines()[-1])
        assert Path(path).stat().st_size > 0
