"""One rank of transformers' tensor parallelism: `python …_ranks.py FOLDER`, with RANK and WORLD_SIZE set.

For each model in FOLDER/models, the rank writes logits, loss and gradients to FOLDER/rank{RANK}-{model}.safetensors.
"""

import os
import sys
from pathlib import Path

from maskmoe.megatron_compat import prepare_process

prepare_process()
import torch
from safetensors.torch import save_file
from support.rank_program import run_as_rank
from support.tiny_maskmoe import random_ids
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


def main() -> None:
    folder, rank, num_ranks = Path(sys.argv[1]), int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=num_ranks
    )
    for path in sorted((folder / "models").iterdir()):
        model = AutoModelForCausalLM.from_pretrained(path, tp_plan="auto")
        save_file(outcome_of(model), folder / f"rank{rank}-{path.name}.safetensors")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    run_as_rank(main)
