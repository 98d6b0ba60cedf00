"""Converts models between Megatron's `torch_dist` format and transformers' format, and upcycles dense models.

Every conversion is a view: a `TensorSource` (module `tensor_sources`) that has the names and shapes of the target
format and reads blocks of tensors on demand from the input's files. A writer goes through the view tensor by tensor or
block by block, so that no model is built and memory does not grow with the number of layers.

The modules that know Megatron's models import Megatron, so a process calls `maskmoe.megatron_compat.prepare_process`
before it imports them. `settings` imports neither Megatron nor torch, so that a command line can print its help at
once.
"""
