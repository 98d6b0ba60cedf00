"""A program of the user's own trains and evaluates with its builder of models."""

import json
import shlex
import subprocess
import sys

import pytest
from support.documentation import DOCS, blocks
from support.training import VOCAB_SIZE, Run

HYBRID = {"flags": "--hybrid-layer-pattern *E*E*E*E --exit-interval 1", "omits": "--num-layers"}


@pytest.fixture
def program(tmp_path) -> str:
    """The program of the documentation, in a file."""
    (text,) = (each.text for each in blocks(DOCS / "changing-the-code.md") if "run_program(" in each.text)
    path = tmp_path / "unit_weight.py"
    path.write_text(text)
    return str(path)


def test_documented_program_replaces_the_router(workplace, program, tmp_path):
    """With other weights of the experts, the losses are others from the first step on."""
    outcomes = []
    for name, own in (("stock", {}), ("run", {"saves": True, "program": (program, "pretrain")})):
        with workplace.start(Run(**HYBRID, **own), tmp_path / name, are_preloaded=True) as processes:
            outcomes.append(processes.wait())
    stock, outcome = outcomes
    assert outcome.iterations == [1]
    assert outcome.difference(stock, ["lm loss"]) > 1e-6

    losses = []
    for name, evaluate in (("own", [program, "evaluate"]), ("packages", ["-m", "maskmoe.training.evaluate"])):
        flags = f"--load {outcome.checkpoints} --use-checkpoint-args --data-path data --split 60,40,0"
        flags += f" --tokenizer-type NullTokenizer --vocab-size {VOCAB_SIZE} --output {tmp_path / name}.json"
        flags += f" --data-cache-path {tmp_path / 'cache'}"
        (tmp_path / name).mkdir()
        evaluated = workplace.execute([*evaluate, *shlex.split(flags)], tmp_path / name)
        assert not any(evaluated.exit_codes), evaluated.report()
        losses.append(json.loads((tmp_path / f"{name}.json").read_text())["loss"])
    assert abs(losses[0] - losses[1]) > 1e-6


def test_builder_of_another_kind_of_model_is_refused(workplace, program, tmp_path):
    with workplace.start(Run(program=(program, "pretrain")), tmp_path / "run", are_preloaded=True) as processes:
        outcome = processes.wait(all_end=True)
    assert outcome.exit_codes == (2,)
    assert "UnitWeightBuilder must be a MaskMoEGPTModelBuilder" in outcome.errors[0]


@pytest.mark.parametrize("words", [[], ["--help"], ["program"], ["generate"]])
def test_other_tasks_are_refused(program, words):
    outcome = subprocess.run([sys.executable, program, *words], capture_output=True, text=True)
    assert outcome.returncode == 1
    assert outcome.stderr == f"usage: {program} pretrain|evaluate FLAGS…\n"
