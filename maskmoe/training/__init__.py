"""The entry points under torchrun: pretrain, evaluate and generate.

Importing this package prepares the process for megatron, which must not be imported before.
"""

import torch

if not torch.cuda.is_available():
    from maskmoe import cpu

    cpu.install()

from maskmoe import megatron_patches

megatron_patches.apply()
