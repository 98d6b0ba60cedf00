"""transformers' Trainer, on one process: the gradients of a step do not depend on how its samples are divided."""

from pathlib import Path

import pytest
import torch
from support.tiny_maskmoe import make_model, random_ids
from torch import Tensor
from transformers import Trainer, TrainerCallback, TrainingArguments


class KeepGradients(TrainerCallback):
    """Keeps the gradients with which the optimizer makes its step."""

    def __init__(self) -> None:
        self.gradients: dict[str, Tensor] = {}

    def on_pre_optimizer_step(self, *_args, model, **_) -> None:
        self.gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def train_one_step(folder: Path, samples: Tensor, batch_size: int, **settings) -> tuple[float, dict[str, Tensor]]:
    """Return the loss and the gradients of a step on all samples, in micro-batches of `batch_size`."""
    keep = KeepGradients()
    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=batch_size,
        gradient_accumulation_steps=len(samples) // batch_size,
        max_steps=1,
        max_grad_norm=0.0,
        train_sampling_strategy="sequential",
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
    )
    data = [{"input_ids": sample.tolist(), "labels": sample.tolist()} for sample in samples]
    model = make_model(**settings)
    result = Trainer(model=model, args=arguments, train_dataset=data, callbacks=[keep]).train()
    return result.training_loss, keep.gradients


@pytest.mark.parametrize("coefficient", [0.0, 1.0])
def test_gradient_accumulation_changes_nothing(coefficient, tmp_path) -> None:
    """All micro-batches are equal, so that the load-balancing loss of a micro-batch is that of the step.

    The order of additions differs: 1e-5 of the largest gradient of a parameter is allowed.
    """
    samples = random_ids(2, 10).repeat(4, 1)
    settings = {"output_router_logits": True, "router_aux_loss_coef": coefficient}
    loss, gradients = train_one_step(tmp_path, samples, 8, **settings)
    accumulated_loss, accumulated = train_one_step(tmp_path, samples, 2, **settings)
    assert accumulated_loss == pytest.approx(loss, rel=1e-6)
    for name, gradient in gradients.items():
        tolerance = 1e-5 * float(gradient.abs().max())
        torch.testing.assert_close(accumulated[name], gradient, rtol=0, atol=tolerance, msg=name)
