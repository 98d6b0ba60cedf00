"""Requirements of a run: flags that Megatron asks for late, and packages."""

import os
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version

from packaging.version import Version

from maskmoe.megatron_compat.gpu import LEAST_VERSION_OF_PERMUTATION, GpuPackages


def missing_flags(args: Namespace, has_checkpoint: bool) -> Iterator[str]:
    """Yield an error for each missing flag that Megatron reports late, or by another name.

    If the run loads a checkpoint, the settings of the checkpoint can replace the arguments'.
    """
    if not (args.perform_initialization or has_checkpoint):
        yield "no initial weights: leave --no-initialization out, because no checkpoint is loaded"
    if args.seq_length is None and args.encoder_seq_length is None:
        settings = ", or --use-checkpoint-args for the settings of the checkpoint" if has_checkpoint else ""
        yield f"no sequence length: pass --seq-length{settings}"
    is_evaluation = hasattr(args, "eval_split")
    if not is_evaluation and args.train_iters is None and args.train_samples is None:
        yield "no length of training: pass --train-iters or --train-samples"
    if args.lr is None and not args.skip_train:
        yield "no learning rate: pass --lr"


def missing_transformer_engine(args: Namespace, packages: GpuPackages) -> Iterator[str]:
    """Yield an error if recomputation needs Transformer Engine, but the machines that train lack it."""
    recomputed = {"layernorm", "moe_act", "mla_up_proj"}.intersection(args.recompute_modules or ())
    if recomputed and args.recompute_granularity == "selective" and not packages.transformer_engine:
        yield f"--recompute-modules {' '.join(sorted(recomputed))} needs Transformer Engine, which is not installed"


def outdated_packages(args: Namespace) -> Iterator[str]:
    """Yield an error for each package whose version on this machine silently computes something else."""
    for flags, package, least, applies in _LEAST_VERSIONS:
        with suppress(PackageNotFoundError):
            if applies(args) and Version(found := version(package)) < Version(least):
                yield f"{flags} needs {package} {least} or newer, because {found} computes something else: install it"


_GROUPED_GEMM = "NVTE_GROUPED_LINEAR_USE_FUSED_GROUPED_GEMM"


def _has_learnable_softmax(args: Namespace) -> bool:
    return args.softmax_type == "learnable" and args.transformer_impl == "transformer_engine"


def _loses_gradients_of_no_rows(args: Namespace) -> bool:
    """Return whether a grouped product of no rows could leave a gradient of weights unwritten."""
    return args.moe_grouped_gemm and os.environ.get(_GROUPED_GEMM, "0") != "0" and not args.gradient_accumulation_fusion


_LEAST_VERSIONS: tuple[tuple[str, str, str, Callable[[Namespace], bool]], ...] = (
    (
        "--hybrid-layer-pattern with G",
        "flash-linear-attention",
        "0.5.2",
        lambda args: "G" in (args.hybrid_layer_pattern or ""),
    ),
    ("--softmax-type learnable", "transformer-engine", "2.14", _has_learnable_softmax),
    (
        f"{_GROUPED_GEMM}=1 with --no-gradient-accumulation-fusion",
        "transformer-engine",
        "2.19",
        _loses_gradients_of_no_rows,
    ),
    ("--moe-permute-fusion", "transformer-engine", LEAST_VERSION_OF_PERMUTATION, lambda args: args.moe_permute_fusion),
)
