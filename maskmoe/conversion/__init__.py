"""Checkpoints move between Megatron's `torch_dist` format, Hugging Face's safetensors, and other mixtures.

Every conversion is a view: a `TensorSource` that reads blocks of tensors on demand, under the names and shapes of the
target, out of the source's files (`blocks`). A writer goes through a view tensor by tensor. No model is built.
"""
