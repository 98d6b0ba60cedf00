"""The GPU for which the cost of a run is stated in GPU-hours. This module imports neither torch nor Megatron."""

import argparse
from dataclasses import dataclass

from maskmoe.command_line import ranges

PEAK_TFLOPS = 989.0  # of an H100 SXM in bf16, without sparsity
UTILIZATION = 0.35


@dataclass(frozen=True)
class AssumedGpu:
    """The throughput that a GPU is assumed to achieve; nothing is measured.

    Attributes:
        peak_tflops: the peak of the GPU, in TFLOP/s.
        utilization: the share of the peak that training achieves.
    """

    peak_tflops: float = PEAK_TFLOPS
    utilization: float = UTILIZATION

    def hours(self, flops: float) -> float:
        """Return the GPU-hours that a number of floating-point operations takes."""
        return flops / (self.peak_tflops * 1e12 * self.utilization) / 3600

    def __str__(self) -> str:
        return f"{self.utilization:.0%} of {self.peak_tflops:,.5g} TFLOP/s a GPU, which is assumed, not measured"


def format_gpu_hours(hours: float) -> str:
    """Write a number of GPU-hours with three digits, or in full if it has more."""
    return f"{hours:,.0f}" if hours >= 100 else f"{hours:.3g}"


def add_assumed_gpu_arguments(parser: argparse._ActionsContainer) -> None:
    """Add the flags from which `assumed_gpu` is made."""
    parser.add_argument(
        "--assumed-mfu",
        type=ranges.UTILIZATION,
        default=UTILIZATION,
        metavar="U",
        help="share of a GPU's peak that training achieves, for the GPU-hours: an assumption; small models and experts "
        "usually achieve less (default: %(default)s)",
    )
    parser.add_argument(
        "--assumed-peak-tflops",
        type=ranges.TFLOPS,
        default=PEAK_TFLOPS,
        metavar="T",
        help="peak of a GPU in TFLOP/s, for the GPU-hours (default: %(default)s, an H100 in bf16)",
    )


def assumed_gpu(arguments: argparse.Namespace) -> AssumedGpu:
    """Return the GPU that parsed arguments describe."""
    return AssumedGpu(arguments.assumed_peak_tflops, arguments.assumed_mfu)
