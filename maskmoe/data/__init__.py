"""Turn text into token ids on disk: corpora, tokenizers and Megatron-Core's indexed dataset format.

This package imports neither torch nor Megatron, so that its command line tools start quickly.
"""
