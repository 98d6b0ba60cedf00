"""One rank of transformers' Trainer: `python trainer_ranks.py FOLDER`, with RANK and WORLD_SIZE set.

Each rank makes one step with the model FOLDER/model under DistributedDataParallel. The first rank writes the gradients
to FOLDER/gradients.safetensors, and the model to FOLDER/saved.
"""

import os
import sys
from pathlib import Path
from typing import Any

from maskmoe.megatron_compat import prepare_process

prepare_process()
from safetensors.torch import save_file
from support.rank_program import run_as_rank
from support.tiny_maskmoe import random_ids
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


def main() -> None:
    folder, num_ranks = Path(sys.argv[1]), int(os.environ["WORLD_SIZE"])
    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    samples = random_ids(NUM_SAMPLES, 10)
    batch_size = NUM_SAMPLES // num_ranks
    trainer, _, gradients = train_one_step(model, folder / "run", samples, batch_size, ddp_backend="gloo")
    assert isinstance(trainer.model_wrapped, DistributedDataParallel)
    if trainer.is_world_process_zero():
        save_file(
            {name.removeprefix("module."): value for name, value in gradients.items()}, folder / "gradients.safetensors"
        )
    trainer.save_model(str(folder / "saved"))


if __name__ == "__main__":
    run_as_rank(main)
