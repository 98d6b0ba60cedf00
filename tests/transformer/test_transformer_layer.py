"""CUDA graphs of attention leave the token ids to the MoE layers; eager calls stand in for captured graphs."""

from typing import Any

import pytest
import torch
from megatron.core.transformer.module import GraphableMegatronModule
from megatron.core.transformer.transformer_layer import TransformerLayer
from support.small_moe import DEVICE, make_config, make_mask, make_model, random_visible_sets
from torch import Tensor

from maskmoe.transformer.token_ids import takes_token_ids
from maskmoe.transformer.transformer_layer import MaskMoETransformerLayer

NUM_LAYERS, VOCAB_SIZE, SEQUENCE = 3, 20, 8
MASK = make_mask(random_visible_sets(3, NUM_LAYERS, VOCAB_SIZE, 4))


@pytest.fixture(autouse=True)
def _no_transformer_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pass the arguments of a graph on as they are; Transformer Engine would only add an attention mask."""
    if takes_token_ids(TransformerLayer):
        pytest.skip("graphs are refused where layers take ids, which Megatron-Core 0.19 does not have")
    arguments = GraphableMegatronModule._get_te_cuda_graph_replay_args
    monkeypatch.setattr(TransformerLayer, "_get_te_cuda_graph_replay_args", arguments)


class Graph:
    """Stands in for the graph of one layer, which computes what the layer would have captured.

    Attributes:
        layer: The layer.
        calls: Number of replays.
    """

    def __init__(self, layer: MaskMoETransformerLayer) -> None:
        self.layer = layer
        self.calls = 0

    def __call__(self, hidden_states: Tensor, *, is_first_microbatch: bool, **inputs: Any) -> tuple[Tensor, ...]:
        assert "padding_mask" not in inputs, "token ids must not be an input of a graph"
        self.calls += 1
        return self.layer._te_cuda_graph_capture(hidden_states, **inputs)


def train(modules: list[str] | None, num_micro_batches: int = 2) -> tuple[list[Tensor], list[Graph]]:
    """Run all forward passes before the backward passes, and return losses and gradients, and the graphs."""
    settings = {} if modules is None else {"cuda_graph_impl": "transformer_engine", "cuda_graph_modules": modules}
    config = make_config(num_layers=NUM_LAYERS, hidden_size=16, moe_layer_freq=[0, 1, 1], **settings)
    torch.manual_seed(0)
    model = make_model(config, MASK, SEQUENCE)
    graphs = []
    for layer in model.decoder.layers if modules is not None else ():
        if "attn" in modules or not layer.is_moe_layer:
            graphs.append(Graph(layer))
            layer.cuda_graphs = [graphs[-1]]
    generator = torch.Generator().manual_seed(1)
    positions = torch.arange(SEQUENCE, device=DEVICE).expand(2, -1)
    losses = []
    for _ in range(num_micro_batches):
        ids = torch.randint(0, VOCAB_SIZE, (2, SEQUENCE), generator=generator).to(DEVICE)
        losses.append(model(ids, positions, None, labels=ids.roll(-1, dims=1)).mean())
    sum(losses).backward()
    return [*(loss.detach() for loss in losses), *(parameter.grad for parameter in model.parameters())], graphs


@pytest.mark.parametrize("modules", [["attn"], ["mlp"], ["attn", "mlp"]], ids=" ".join)
def test_routing_is_as_without_graphs(modules: list[str]) -> None:
    plain, _ = train(None)
    graphed, graphs = train(modules)
    assert [graph.calls for graph in graphs] == [2] * (1 if modules == ["mlp"] else NUM_LAYERS)
    torch.testing.assert_close(graphed, plain, rtol=0, atol=0)
