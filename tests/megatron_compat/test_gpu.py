"""Defaults on GPUs by the installed packages, and flags that need a missing package."""

import io
import sys
from dataclasses import fields

import pytest
from megatron.core import utils
from megatron.core.tensor_parallel import layers
from megatron.core.transformer.moe import moe_utils
from megatron.training.arguments import parse_args, validate_args

from maskmoe.errors import UserError
from maskmoe.megatron_compat import cpu, gpu
from maskmoe.megatron_compat.gpu import GpuPackages
from maskmoe.training.settings import setup
from maskmoe.training.settings.arguments import add_maskmoe_arguments
from maskmoe.training.settings.refusals import check_supported, unavailable_settings
from maskmoe.training.settings.setup import model_config_from_args
from maskmoe.training.watch.console import Console

# Megatron's defaults that fail without Transformer Engine or Apex, and the values that work.
WITHOUT_PACKAGES = {
    "transformer_impl": "local",
    "gradient_accumulation_fusion": False,
    "masked_softmax_fusion": False,
    "apply_rope_fusion": False,
    "no_persist_layer_norm": True,
    "moe_permute_fusion": False,
}
NOTHING = GpuPackages(*[False] * len(fields(GpuPackages)))


@pytest.fixture
def on_a_gpu(monkeypatch):
    """Return a function that makes Megatron believe in a GPU with the given packages."""

    def pretend(packages: GpuPackages) -> None:
        monkeypatch.setattr(cpu, "is_installed", lambda: False)
        monkeypatch.setattr(moe_utils, "HAVE_TE", packages.transformer_engine)
        monkeypatch.setattr(utils, "is_te_min_version", lambda version: packages.permutation)
        for name in gpu._PERMUTATION_KERNELS:
            monkeypatch.setattr(moe_utils, name, print if packages.permutation else None)
        monkeypatch.setattr(layers, "_grad_accum_fusion_available", packages.gradient_accumulation)
        found = object() if packages.masked_softmax else None
        monkeypatch.setattr(gpu.importlib.util, "find_spec", lambda name: found)

    return pretend


@pytest.fixture
def said(monkeypatch) -> io.StringIO:
    """Return the text that the console of this process prints."""
    stdout = io.StringIO()
    monkeypatch.setattr(sys, "stdout", stdout)
    monkeypatch.setattr(setup, "console", Console())  # a console keeps the stdout that it finds
    return stdout


@pytest.fixture
def parse(monkeypatch):
    def parse(*flags: str):
        monkeypatch.setattr(sys, "argv", ["pretrain", "--num-experts", "8", *flags])
        return parse_args(add_maskmoe_arguments)

    return parse


def values(args) -> dict[str, object]:
    return {name: getattr(args, name) for name in WITHOUT_PACKAGES}


def test_without_packages_the_defaults_need_none(on_a_gpu, parse) -> None:
    on_a_gpu(NOTHING)
    args = parse()
    assert values(args) == WITHOUT_PACKAGES
    assert args.distributed_backend == "nccl"
    check_supported(args)


def test_with_all_packages_all_fusions_are_on(on_a_gpu, parse) -> None:
    on_a_gpu(GpuPackages())
    args = parse()
    assert values(args) == {
        "transformer_impl": "transformer_engine",
        "gradient_accumulation_fusion": True,
        "masked_softmax_fusion": True,
        "apply_rope_fusion": True,
        "no_persist_layer_norm": False,
        "moe_permute_fusion": True,
    }
    check_supported(args)


@pytest.mark.parametrize("packages", [NOTHING, GpuPackages()], ids=["without packages", "with all packages"])
@pytest.mark.parametrize(
    ("flags", "fuses"),
    [
        ("", False),
        ("--quick-geglu", True),
        ("--swiglu", True),
        ("--num-experts 0", True),
    ],
)
def test_only_gated_activations_of_experts_are_fused(on_a_gpu, parse, packages, flags, fuses) -> None:
    """Megatron's default for MLPs with biases is a fused GELU, which cannot weigh the rows of experts."""
    on_a_gpu(packages)
    sizes = "--num-layers 1 --hidden-size 32 --num-attention-heads 4 --seq-length 8 --max-position-embeddings 8"
    sizes += " --micro-batch-size 1 --vocab-size 100"
    args = validate_args(parse(*f"--routing-mask mask.safetensors {sizes} {flags}".split()))
    assert args.bias_gelu_fusion
    assert model_config_from_args(args).transformer.bias_activation_fusion is fuses


def test_transformer_engine_without_apex(on_a_gpu, parse) -> None:
    """Megatron's output layer takes Apex's kernels, also beside layers of Transformer Engine."""
    on_a_gpu(GpuPackages(gradient_accumulation=False, masked_softmax=False, permutation=False))
    args = parse()
    assert args.transformer_impl == "transformer_engine"
    assert not any((args.gradient_accumulation_fusion, args.masked_softmax_fusion, args.moe_permute_fusion))


def test_flags_override_the_defaults(on_a_gpu, parse) -> None:
    on_a_gpu(GpuPackages())
    args = parse("--transformer-impl", "local", "--no-moe-permute-fusion", "--no-rope-fusion")
    assert (args.transformer_impl, args.moe_permute_fusion, args.apply_rope_fusion) == ("local", False, False)


@pytest.mark.parametrize(
    "flags", ["--transformer-impl transformer_engine", "--moe-permute-fusion", "--use-precision-aware-optimizer"]
)
def test_a_flag_that_needs_transformer_engine_is_refused_without_it(on_a_gpu, parse, flags) -> None:
    on_a_gpu(NOTHING)
    with pytest.raises(UserError, match=f"^{flags} needs Transformer Engine, which is not installed: .*$"):
        check_supported(parse(*flags.split()))
    on_a_gpu(GpuPackages())
    check_supported(parse(*flags.split()))


def test_old_transformer_engine_does_not_permute(on_a_gpu, parse) -> None:
    on_a_gpu(GpuPackages(permutation=False))
    with pytest.raises(UserError, match=r"^--moe-permute-fusion needs Transformer Engine 2\.6 or newer, .*$"):
        check_supported(parse("--moe-permute-fusion"))
    check_supported(parse())


def test_every_flag_that_needs_transformer_engine_is_known(parse) -> None:
    assert list(unavailable_settings(parse("--tp-comm-overlap", "--qk-clip"), NOTHING)) == [
        f"{flag} needs Transformer Engine, which is not installed: install it, or leave the flag out"
        for flag in ("--tp-comm-overlap", "--qk-clip")
    ]


@pytest.mark.parametrize(
    ("packages", "rank", "named"),
    [
        (NOTHING, "0", "note: Transformer Engine is not installed, so the default is --transformer-impl local"),
        (GpuPackages(gradient_accumulation=False), "0", "note: Apex is not installed, so the default is --no-grad"),
        (NOTHING, "1", ""),
        (GpuPackages(), "0", ""),
    ],
)
def test_the_first_rank_reports_what_is_missing_in_one_line(on_a_gpu, monkeypatch, said, packages, rank, named):
    on_a_gpu(packages)
    monkeypatch.setenv("RANK", rank)
    setup._report_missing_packages()
    printed = said.getvalue()
    assert printed.startswith(named)
    assert printed.count("\n") == bool(named)


@pytest.mark.skipif(not cpu.is_installed(), reason="needs a CPU")
def test_nothing_is_reported_on_a_cpu(said) -> None:
    setup._report_missing_packages()
    assert said.getvalue() == ""
