"""Pretraining with a mistake that the tests of recomputation must notice.

Routers take the token ids from a global variable that the model sets, instead of the argument that comes with the
hidden states. During recomputation in a pipeline, the variable holds the ids of another micro-batch.
"""

from maskmoe.megatron_compat import prepare_process

prepare_process()
from maskmoe.command_line.run_tool import run_tool
from maskmoe.training.trainer import main
from maskmoe.transformer.models import RoutesByTokenId
from maskmoe.transformer.moe_layer import MaskMoELayer
from maskmoe.transformer.token_ids import pack_token_ids

newest_ids = None
ids_of_layers = RoutesByTokenId.ids_of_layers
layer_forward = MaskMoELayer.forward


def remember(self, input_ids, padding_mask):
    global newest_ids
    newest_ids = ids_of_layers(self, input_ids, padding_mask)
    return newest_ids


def forward(self, hidden_states, intermediate_tensors=None, padding_mask=None, input_ids=None):
    return layer_forward(self, hidden_states, intermediate_tensors, pack_token_ids(newest_ids))


if __name__ == "__main__":
    RoutesByTokenId.ids_of_layers = remember
    MaskMoELayer.forward = forward
    run_tool(main)
