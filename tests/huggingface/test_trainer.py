"""transformers' Trainer: the gradients of a step do not depend on how its samples are divided."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.tiny_maskmoe import make_model, random_ids
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModelForCausalLM, PreTrainedModel, Trainer, TrainerCallback, TrainingArguments

import maskmoe.huggingface  # noqa: F401  registers the model

NUM_SAMPLES = 4


class KeepGradients(TrainerCallback):
    """Keeps the gradients with which the optimizer makes its step."""

    def __init__(self) -> None:
        self.gradients: dict[str, Tensor] = {}

    def on_pre_optimizer_step(self, *_args, model, **_) -> None:
        self.gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def train_one_step(
    model: PreTrainedModel, folder: Path, samples: Tensor, batch_size: int, accumulation: int = 1, **arguments: Any
) -> tuple[Trainer, float, dict[str, Tensor]]:
    """Train a model for one step; return the Trainer, the loss, and the gradients of the step.

    Args:
        model: the model.
        folder: Trainer's folder.
        samples: int64 [samples, length].
        batch_size: number of samples in a micro-batch of a process.
        accumulation: number of micro-batches.
        arguments: further `TrainingArguments`.
    """
    keep = KeepGradients()
    training = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=batch_size,
        gradient_accumulation_steps=accumulation,
        max_steps=1,
        max_grad_norm=0.0,
        train_sampling_strategy="sequential",
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        **arguments,
    )
    data = [{"input_ids": sample.tolist(), "labels": sample.tolist()} for sample in samples]
    trainer = Trainer(model=model, args=training, train_dataset=data, callbacks=[keep])
    return trainer, trainer.train().training_loss, keep.gradients


def train_in_parallel(folder: Path) -> dict[str, Tensor]:
    """Make one step with the model FOLDER/model under DistributedDataParallel, and save the model to FOLDER/saved.

    Returns:
        The gradients of the step by parameter.
    """
    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    batch_size = NUM_SAMPLES // int(os.environ["WORLD_SIZE"])
    samples = random_ids(NUM_SAMPLES, 10)
    trainer, _, gradients = train_one_step(model, folder / "run", samples, batch_size, ddp_backend="gloo")
    assert isinstance(trainer.model_wrapped, DistributedDataParallel)
    trainer.save_model(str(folder / "saved"))
    return {name.removeprefix("module."): value for name, value in gradients.items()}


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


def test_label_smoothing_predicts_the_next_token(tmp_path) -> None:
    samples = random_ids(2, 10)
    _, loss, gradients = train_one_step(make_model(), tmp_path, samples, 2)
    _, smoothed_loss, smoothed = train_one_step(make_model(), tmp_path, samples, 2, label_smoothing_factor=1e-9)
    assert smoothed_loss == pytest.approx(loss, rel=1e-6)
    assert_same_gradients(smoothed, gradients)


def test_data_parallelism_changes_nothing(run_ranks, tmp_path) -> None:
    """DistributedDataParallel broadcasts all buffers. The saved model has the types of the original."""
    model = make_model()
    model.save_pretrained(tmp_path / "model")
    parallel, _ = run_ranks(train_in_parallel, tmp_path, tmp_path, joins=False)
    _, _, gradients = train_one_step(model, tmp_path / "alone", random_ids(NUM_SAMPLES, 10), NUM_SAMPLES)
    assert_same_gradients(parallel, gradients)
    original, saved = (load_file(tmp_path / name / "model.safetensors") for name in ("model", "saved"))
    for name, tensor in original.items():
        assert saved[name].dtype == tensor.dtype
        assert "routing_mask" not in name or torch.equal(saved[name], tensor)
