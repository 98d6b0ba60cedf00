"""MaskMoE: token-aware mixture-of-experts pretraining on Megatron-Core."""

__version__ = "0.2.1"
