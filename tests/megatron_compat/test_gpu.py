"""Defaults on GPUs by the installed packages, and flags that need a missing package."""

import sys
from dataclasses import fields

import pytest
from megatron.core import utils
from megatron.core.tensor_parallel import layers
from megatron.core.transformer.moe import moe_utils
from megatron.training.argument_utils import gpt_config_from_args
from megatron.training.arguments import parse_args, validate_args

from maskmoe.megatron_compat import cpu
from maskmoe.megatron_compat.gpu import GpuPackages
from maskmoe.training.model.model_builder import MaskMoEModelConfig
from maskmoe.training.settings.arguments import add_maskmoe_arguments

PERMUTATION_KERNELS = (
    *("fused_permute", "fused_permute_with_probs", "fused_unpermute"),
    *("fused_sort_chunks_by_index", "fused_sort_chunks_by_index_with_probs"),
)
NOTHING = GpuPackages(*[False] * len(fields(GpuPackages)))


@pytest.fixture
def on_a_gpu(monkeypatch):
    """Return a function that makes Megatron believe in a GPU with the given packages."""

    def pretend(packages: GpuPackages) -> None:
        monkeypatch.setattr(cpu, "is_installed", lambda: False)
        monkeypatch.setattr(moe_utils, "HAVE_TE", packages.transformer_engine)
        monkeypatch.setattr(layers, "_grad_accum_fusion_available", packages.fused_accumulation)
        monkeypatch.setattr(utils, "is_te_min_version", lambda _: packages.fused_permutation)
        for name in PERMUTATION_KERNELS:
            monkeypatch.setattr(moe_utils, name, print if packages.transformer_engine else None)

    return pretend


@pytest.fixture
def parse(monkeypatch):
    def parse(*flags: str):
        monkeypatch.setattr(sys, "argv", ["pretrain", "--num-experts", "8", *flags])
        return parse_args(add_maskmoe_arguments)

    return parse


@pytest.mark.parametrize("packages", [NOTHING, GpuPackages()], ids=["without packages", "with all packages"])
@pytest.mark.parametrize(
    ("flags", "fuses"),
    [
        ("", False),
        ("--quick-geglu", False),
        ("--quick-geglu --num-experts 0", False),
        ("--swiglu", True),
        ("--swiglu --num-experts 0", True),
        ("--swiglu --activation-func-clamp-value 7", False),
        ("--swiglu --activation-func-clamp-value 7 --num-experts 0", False),
        ("--num-experts 0", True),
    ],
)
def test_only_activations_that_megatron_fuses_right_are_fused(on_a_gpu, parse, packages, flags, fuses) -> None:
    """A fused GELU cannot weigh rows, a fused quick GELU must weigh them, and a fused SwiGLU ignores the clamp."""
    on_a_gpu(packages)
    sizes = "--num-layers 1 --hidden-size 32 --num-attention-heads 4 --seq-length 8 --max-position-embeddings 8"
    sizes += " --micro-batch-size 1 --vocab-size 100"
    args = validate_args(parse(*f"--routing-mask mask.safetensors {sizes} {flags}".split()))
    assert args.bias_gelu_fusion
    assert args.bias_swiglu_fusion
    assert MaskMoEModelConfig(megatron=gpt_config_from_args(args)).transformer.bias_activation_fusion is fuses


def test_flags_override_the_defaults(on_a_gpu, parse) -> None:
    on_a_gpu(GpuPackages())
    args = parse(
        *("--transformer-impl", "local", "--no-moe-permute-fusion", "--no-moe-grouped-gemm", "--no-rope-fusion")
    )
    assert args.transformer_impl == "local"
    assert not any((args.moe_permute_fusion, args.moe_grouped_gemm, args.apply_rope_fusion))
