"""Check that vLLM does not replace the routers of models, whose folders are the arguments; runs in build/serving."""

import sys

import torch
from transformers import AutoConfig, AutoModel, Qwen3MoeConfig, Qwen3MoeModel
from vllm.model_executor.models.transformers.fusers.moe import MoEBlockFuser

# The class of the blocks comes from another module for each folder, so it is recognised by its name.
BLOCK = "MaskMoESparseMoeBlock"


def main(folders: list[str]) -> None:
    """Match the routers of all models; then replace one by force and run the model."""
    # vLLM replaces other models' routers.
    sizes = {"hidden_size": 64, "num_attention_heads": 2, "num_hidden_layers": 1, "num_experts": 4, "vocab_size": 60}
    other = Qwen3MoeModel(Qwen3MoeConfig(**sizes, moe_intermediate_size=32, num_experts_per_tok=2))
    assert MoEBlockFuser.match(other.layers[0].mlp, "experts") is not None
    # vLLM finds none in MaskMoE models.
    for folder in folders:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
        model = AutoModel.from_config(config, trust_remote_code=True)
        blocks = [module for module in model.modules() if type(module).__name__ == BLOCK]
        assert blocks, folder
        for block in blocks:
            assert MoEBlockFuser.match(block, "experts") is None, folder
    # A replaced router is an error.
    model = AutoModel.from_pretrained(folders[0], trust_remote_code=True)
    ids = torch.arange(5)[None]
    model(ids)
    for module in model.modules():
        if type(module).__name__ == BLOCK:
            MoEBlockFuser("gate", "softmax", None, None).rewrite_forward(module)
    try:
        model(ids)
    except TypeError as error:
        if "positional argument" not in str(error):
            raise
    else:
        raise AssertionError("a model whose routers were replaced ran")


if __name__ == "__main__":
    main(sys.argv[1:])
