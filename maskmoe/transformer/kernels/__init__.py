"""Triton kernels for GPUs. Each module's functions have counterparts in plain torch, which run everywhere else."""
