"""A model with hash layers below other layers is evaluated; test_composition.py compares its layouts."""

import json

import numpy as np
import pytest

from maskmoe.checkpoint.routing_mask import read_routing_mask
from maskmoe.checkpoint.series import checkpoint_path
from maskmoe.data.indexed_dataset import open_tokens, read_index


@pytest.mark.slow
@pytest.mark.runs("hash layers")
def test_evaluation_routes_by_the_table(runs, workplace, tmp_path):
    """In hash layers with V = k every token goes to all experts of its table; in the other layers to any k experts."""
    (run,) = runs
    program = f"""
        -m maskmoe.training.evaluate --load {run.checkpoints} --use-checkpoint-args --data-path data --split 60,40,0
        --tokenizer-type NullTokenizer --vocab-size 510 --eval-output {tmp_path / "evaluation.json"}
        --data-cache-path {tmp_path / "cache"}
    """
    outcome = workplace.execute(program.split(), tmp_path, 1)
    assert not any(outcome.exit_codes), outcome.report()
    evaluation = json.loads((tmp_path / "evaluation.json").read_text())
    mask = read_routing_mask(checkpoint_path(run.checkpoints, 8))
    lengths = read_index(workplace.folder / "data").sequence_lengths
    held_out = np.asarray(open_tokens(workplace.folder / "data"))[lengths[: round(0.6 * len(lengths))].sum() :]
    left_out = len(held_out) - evaluation["tokens"]  # too few for a sample
    for load in evaluation["expert_load"]:
        counts = np.array(load["tokens_per_expert"])
        assert counts.sum() == 2 * evaluation["tokens"]
        of_table = mask.visible_sets(load["layer"] - 1)[held_out].sum(axis=0)
        follows_table = ((counts <= of_table) & (counts >= of_table - left_out)).all()
        assert follows_table == (load["layer"] <= 2)
