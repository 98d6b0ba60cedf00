"""Exported models on two ranks under transformers' `tp_plan="auto"` equal the same models on one rank."""

import pytest
import torch
from safetensors.torch import load_file
from support.launchers import RANK_SCRIPTS
from support.ranks.tensor_parallel_export_ranks import outcome_of
from support.tiny_maskmoe import VARIANTS, make_model

NUM_RANKS = 2


@pytest.fixture(scope="module")
def outcomes(run_ranks, tmp_path_factory):
    """Return, by variant, the outcome on one rank and the outcomes of the ranks that share the model."""
    folder = tmp_path_factory.mktemp("tensor_parallel")
    models = {name: make_model(**settings) for name, settings in VARIANTS.items()}
    for name, model in models.items():
        model.save_pretrained(folder / "models" / name)
    run_ranks(RANK_SCRIPTS / "tensor_parallel_export_ranks.py", folder, world_size=NUM_RANKS)
    return {
        name: (
            outcome_of(model),
            [load_file(folder / f"rank{rank}-{name}.safetensors") for rank in range(NUM_RANKS)],
        )
        for name, model in models.items()
    }


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_and_gradients_are_those_of_one_rank(outcomes, variant) -> None:
    """The order of additions differs: 1e-4 of the largest value of a tensor is allowed."""
    alone, of_ranks = outcomes[variant]
    for values in of_ranks:
        assert values.keys() == alone.keys()
        for name, expected in alone.items():
            tolerance = 1e-4 * float(expected.abs().max())
            torch.testing.assert_close(values[name], expected, rtol=0, atol=tolerance, msg=name)
