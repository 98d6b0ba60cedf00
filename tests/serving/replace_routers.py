"""Check that a model whose routers vLLM replaces does not run; its folder is the argument; runs in build/serving."""

import sys

import torch
from transformers import AutoModel
from vllm.model_executor.models.transformers.fusers.moe import MoEBlockFuser

# The class of the blocks comes from a module in the folder, so it is recognised by its name.
BLOCK = "MaskMoESparseMoeBlock"

if __name__ == "__main__":
    model = AutoModel.from_pretrained(sys.argv[1], trust_remote_code=True)
    ids = torch.arange(5)[None]
    model(ids)
    blocks = [module for module in model.modules() if type(module).__name__ == BLOCK]
    assert blocks
    for block in blocks:
        MoEBlockFuser("gate", "softmax", None, None).rewrite_forward(block)
    try:
        model(ids)
    except TypeError as error:
        if "positional argument" not in str(error):
            raise
    else:
        raise AssertionError("a model whose routers were replaced ran")
