"""Exits 0 while the gradient of an embedding copy in a middle model chunk is not reduced, 1 once fixed."""

import sys
from types import SimpleNamespace
from unittest.mock import patch

import torch
from megatron.core.distributed.finalize_model_grads import _allreduce_word_embedding_grads
from torch.testing._internal.distributed.fake_pg import FakeStore

torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
group = torch.distributed.group.WORLD


class Chunk(torch.nn.Module):
    """A chunk of a model with the layout `Et|tt|tm|L` on two ranks: rank 0 holds the first and the third."""

    share_embeddings_and_output_weights = False
    ddp_config = SimpleNamespace(use_megatron_fsdp=False)

    def __init__(self, pre_process: bool) -> None:
        super().__init__()
        self.pre_process = pre_process
        self.embedding = torch.nn.Parameter(torch.zeros(3))
        self.embedding.main_grad = torch.ones(3)

    def shared_embedding_or_output_weight(self) -> torch.nn.Parameter:  # noqa: D102 - Megatron's method
        return self.embedding


first, with_prediction = Chunk(True), Chunk(False)
reduced = []
with patch.object(torch.distributed, "all_reduce", lambda tensor, **_: reduced.append(tensor)):
    _allreduce_word_embedding_grads([first, with_prediction], SimpleNamespace(mtp_num_layers=1), group, group)
in_first, in_prediction = (
    any(tensor is chunk.embedding.main_grad for tensor in reduced) for chunk in (first, with_prediction)
)
print(f"the gradient of the embedding is reduced: first chunk {in_first}, chunk of the prediction {in_prediction}")
sys.exit(0 if in_first and not in_prediction else 1)
