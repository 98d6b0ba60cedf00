"""transformers' Trainer: the gradients of a step do not depend on how its samples are divided."""

import pytest
import torch
from safetensors.torch import load_file
from support.launchers import RANK_SCRIPTS
from support.ranks.trainer_ranks import NUM_SAMPLES, train_one_step
from support.tiny_maskmoe import make_model, random_ids
from torch import Tensor


def assert_same_gradients(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """The order of additions differs: 1e-5 of the largest gradient of a parameter is allowed."""
    assert actual.keys() == expected.keys()
    for name, gradient in expected.items():
        tolerance = 1e-5 * float(gradient.abs().max())
        torch.testing.assert_close(actual[name], gradient, rtol=0, atol=tolerance, msg=name)


@pytest.mark.parametrize("coefficient", [0.0, 1.0])
def test_gradient_accumulation_changes_nothing(coefficient, tmp_path) -> None:
    """All micro-batches are equal, so that the load-balancing loss of a micro-batch is that of the step."""
    samples = random_ids(2, 10).repeat(4, 1)
    settings = {"output_router_logits": True, "router_aux_loss_coef": coefficient}
    _, loss, gradients = train_one_step(make_model(**settings), tmp_path, samples, 8)
    _, accumulated_loss, accumulated = train_one_step(make_model(**settings), tmp_path, samples, 2, accumulation=4)
    assert accumulated_loss == pytest.approx(loss, rel=1e-6)
    assert_same_gradients(accumulated, gradients)


def test_data_parallelism_changes_nothing(run_ranks, tmp_path) -> None:
    """DistributedDataParallel broadcasts all buffers. The saved model has the types of the original."""
    model = make_model()
    model.save_pretrained(tmp_path / "model")
    run_ranks(RANK_SCRIPTS / "trainer_ranks.py", tmp_path)
    _, _, gradients = train_one_step(model, tmp_path / "alone", random_ids(NUM_SAMPLES, 10), NUM_SAMPLES)
    assert_same_gradients(load_file(tmp_path / "gradients.safetensors"), gradients)
    original, saved = (load_file(tmp_path / name / "model.safetensors") for name in ("model", "saved"))
    for name, tensor in original.items():
        assert saved[name].dtype == tensor.dtype
        assert "routing_mask" not in name or torch.equal(saved[name], tensor)
