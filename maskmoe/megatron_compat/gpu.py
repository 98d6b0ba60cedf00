"""Chooses Megatron's arguments on GPUs: its defaults fail on a machine without Transformer Engine."""

from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

LEAST_VERSION_OF_PERMUTATION = "2.20.2"
"""Before this version of Transformer Engine, the kernel stores zeros and gradients without a barrier between them."""


@dataclass(frozen=True)
class GpuPackages:
    """The parts of Transformer Engine and Apex that a machine can use.

    Attributes:
        transformer_engine: Transformer Engine is installed.
        grouped_experts: Transformer Engine can compute the experts of a rank together, which needs Ampere or newer.
        fused_permutation: Transformer Engine's fused permutation computes all gradients of the router.
        fused_accumulation: Apex is installed, whose kernels Megatron's output layer takes to add gradients of weights.
        deep_ep: DeepEP is installed.
    """

    transformer_engine: bool = True
    grouped_experts: bool = True
    fused_permutation: bool = True
    fused_accumulation: bool = True
    deep_ep: bool = False

    @classmethod
    def installed(cls) -> "GpuPackages":
        """Return what Megatron finds on this machine."""
        # These modules import megatron, so they must come after `prepare_process`.
        import torch
        from megatron.core.tensor_parallel import layers
        from megatron.core.transformer.moe import moe_utils
        from megatron.core.utils import is_te_min_version

        return cls(
            transformer_engine=moe_utils.HAVE_TE,
            grouped_experts=moe_utils.HAVE_TE and torch.cuda.get_device_capability() >= (8, 0),
            fused_permutation=moe_utils.HAVE_TE and is_te_min_version(LEAST_VERSION_OF_PERMUTATION),
            fused_accumulation=layers._grad_accum_fusion_available,
            deep_ep=find_spec("deep_ep") is not None,
        )

    def argument_defaults(self) -> dict[str, Any]:
        """Return the fastest defaults that work with these packages, in the form of `args_defaults`."""
        return {
            "transformer_impl": "transformer_engine" if self.transformer_engine else "local",
            "apply_rope_fusion": self.transformer_engine,
            "no_persist_layer_norm": not self.transformer_engine,
            "moe_permute_fusion": self.fused_permutation,
            "moe_grouped_gemm": self.grouped_experts,
            "gradient_accumulation_fusion": self.fused_accumulation,
        }

    def describe_missing(self) -> str | None:
        """Return one line about the packages that are missing and what is lost; None if nothing is missing."""
        if self.transformer_engine:
            return None
        return (
            "Transformer Engine is not installed, so the default is --transformer-impl local: layers are slower, "
            "rotary embedding is not fused, and precision-aware optimizers are unavailable"
        )
