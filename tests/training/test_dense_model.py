"""A model without experts, for comparisons: the same builder makes what Megatron-Core's own makes."""

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.training.models.gpt import GPTModelBuilder, GPTModelConfig

from maskmoe.training.model_builder import MaskMoEGPTModelBuilder, MaskMoEGPTModelConfig

VOCAB_SIZE = 128
SEQUENCE = 16


def build(builder: type[GPTModelBuilder], config: type[GPTModelConfig]) -> GPTModel:
    transformer = TransformerConfig(
        num_layers=2,
        hidden_size=32,
        num_attention_heads=4,
        attention_dropout=0,
        hidden_dropout=0,
        use_cpu_initialization=True,
        transformer_impl="local",
    )
    settings = config(transformer=transformer, vocab_size=VOCAB_SIZE, seq_length=SEQUENCE)
    torch.manual_seed(1)
    return builder(settings).build_model(ProcessGroupCollection.use_mpu_process_groups())


def test_model_without_experts_is_megatrons(one_rank):
    ours = build(MaskMoEGPTModelBuilder, MaskMoEGPTModelConfig)
    theirs = build(GPTModelBuilder, GPTModelConfig)
    assert type(ours) is GPTModel
    states = ours.state_dict(), theirs.state_dict()
    assert list(states[0]) == list(states[1])
    tensors = [[value for value in state.values() if isinstance(value, torch.Tensor)] for state in states]
    assert all(torch.equal(one, other) for one, other in zip(*tensors, strict=True))
    ids = torch.randint(VOCAB_SIZE, (2, SEQUENCE))
    positions = torch.arange(SEQUENCE).expand(2, -1)
    losses = [model(ids, positions, None, labels=ids.roll(-1, 1)) for model in (ours, theirs)]
    assert torch.equal(*losses)
