"""Pretraining with a mistake that the tests of context parallelism must notice.

Each rank's routers take the token ids of a contiguous part of the sequence, but the rank's hidden states are of two
chunks in Megatron's zigzag order.
"""

from maskmoe.megatron_compat import prepare_process

prepare_process()
from maskmoe.command_line.run_tool import run_tool
from maskmoe.training.trainer import main
from maskmoe.transformer.models import MaskMoEGPTModel
from maskmoe.transformer.torch_modules.attention import gather_zigzag

pack_for_layers = MaskMoEGPTModel.pack_for_layers


def pack_contiguous_ids(self, input_ids, padding_mask):
    group = self.pg_collection.cp
    whole = gather_zigzag(input_ids.t().contiguous(), group).t()
    return pack_for_layers(self, whole.chunk(group.size(), dim=1)[group.rank()], padding_mask)


if __name__ == "__main__":
    MaskMoEGPTModel.pack_for_layers = pack_contiguous_ids
    run_tool(main)
