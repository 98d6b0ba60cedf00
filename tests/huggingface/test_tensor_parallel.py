"""Exported models on two ranks under transformers' `tp_plan="auto"` equal the same models on one rank."""

from pathlib import Path

import pytest
import torch
from support.tiny_maskmoe import VARIANTS, make_model, random_ids
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, PreTrainedModel

import maskmoe.huggingface  # noqa: F401  registers the model


def outcome_of(model: PreTrainedModel) -> dict[str, Tensor]:
    """Return logits, loss and the gradients of all parameters, with the parts of all ranks, for fixed tokens."""
    token_ids = random_ids(2, 10)
    outputs = model.train()(token_ids, labels=token_ids, output_router_logits=True)
    outputs.loss.backward()
    values = {"logits": outputs.logits, "loss": outputs.loss}
    values |= {name: parameter.grad for name, parameter in model.named_parameters()}
    whole = {name: value.full_tensor() if isinstance(value, DTensor) else value for name, value in values.items()}
    return {name: value.detach().contiguous() for name, value in whole.items()}


def outcomes_of_rank(folder: Path) -> dict[str, dict[str, Tensor]]:
    """Return the outcomes of a rank that shares the models in a folder, by variant."""
    return {name: outcome_of(AutoModelForCausalLM.from_pretrained(folder / name, tp_plan="auto")) for name in VARIANTS}


@pytest.fixture(scope="module")
def outcomes(run_ranks, tmp_path_factory):
    """Return, by variant, the outcome on one rank and the outcomes of the ranks that share the model."""
    folder = tmp_path_factory.mktemp("tensor_parallel")
    models = {name: make_model(**settings) for name, settings in VARIANTS.items()}
    for name, model in models.items():
        model.save_pretrained(folder / name)
    of_ranks = run_ranks(outcomes_of_rank, folder, folder)
    return {name: (outcome_of(model), [of_rank[name] for of_rank in of_ranks]) for name, model in models.items()}


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_and_gradients_are_those_of_one_rank(outcomes, variant) -> None:
    """The order of additions differs: 1e-4 of the largest value of a tensor is allowed."""
    alone, of_ranks = outcomes[variant]
    for values in of_ranks:
        assert values.keys() == alone.keys()
        for name, expected in alone.items():
            tolerance = 1e-4 * float(expected.abs().max())
            torch.testing.assert_close(values[name], expected, rtol=0, atol=tolerance, msg=name)
