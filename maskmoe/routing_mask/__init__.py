"""Make routing masks before training from the frequency of each token id.

This package imports neither torch nor Megatron.
"""
