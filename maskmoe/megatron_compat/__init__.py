"""Makes Megatron-Core run here: the CPU adapter, and the patches of Megatron-Core and torch.

Importing this package changes nothing. Each process that uses Megatron calls `prepare_process` once, before it imports
megatron.
"""

from maskmoe.megatron_compat.process import prepare_process

__all__ = ["prepare_process"]
