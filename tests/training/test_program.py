"""A program of the user's own trains and evaluates with its builder of models."""

import json
import shlex

import pytest
from support.documentation import DOCS, blocks
from support.training import VOCAB_SIZE, Run


@pytest.mark.runs("start")
def test_documented_program_replaces_the_router(runs, workplace, tmp_path):
    """With other weights of the experts, the losses are others from the first step on."""
    (stock,) = runs
    (text,) = (each.text for each in blocks(DOCS / "changing-the-code.md") if "run_program(" in each.text)
    program = tmp_path / "unit_weight.py"
    program.write_text(text)
    run = Run("--exit-interval 1", saves=True, program=(str(program), "pretrain"))
    with workplace.start(run, tmp_path / "run") as processes:
        outcome = processes.wait()
    assert outcome.iterations == [1]
    assert outcome.difference(stock, ["lm loss"]) > 1e-6

    losses = []
    for name, evaluate in (("own", [str(program), "evaluate"]), ("stock", ["-m", "maskmoe.training.evaluate"])):
        flags = f"--load {outcome.checkpoints} --use-checkpoint-args --data-path data --split 60,40,0"
        flags += f" --tokenizer-type NullTokenizer --vocab-size {VOCAB_SIZE} --output {tmp_path / name}.json"
        flags += f" --data-cache-path {tmp_path / 'cache'}"
        (tmp_path / name).mkdir()
        evaluated = workplace.execute([*evaluate, *shlex.split(flags)], tmp_path / name)
        assert not any(evaluated.exit_codes), evaluated.report()
        losses.append(json.loads((tmp_path / f"{name}.json").read_text())["loss"])
    assert abs(losses[0] - losses[1]) > 1e-6
