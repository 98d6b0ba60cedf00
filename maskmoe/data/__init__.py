"""From text to token ids on disk: corpora, tokenizers and Megatron-Core's indexed dataset format.

Nothing here imports torch or Megatron, so the tools built on it start at once.
"""
