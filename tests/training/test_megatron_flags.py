"""Every flag of Megatron-Core's parser against the reviewed lists in `megatron_flags.yaml`."""

import argparse
import shlex
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml
from megatron.training.arguments import add_megatron_arguments

from maskmoe.command_line.convert_checkpoint import parse_arguments, upcycle_settings
from maskmoe.training.settings import refusals as refusals_module
from maskmoe.training.settings.arguments import add_maskmoe_arguments
from maskmoe.training.settings.refusals import missing_libraries, unsupported_settings

REVIEWED: dict[str, Any] = yaml.safe_load(Path(__file__).with_name("megatron_flags.yaml").read_text(encoding="utf-8"))
# The flex dispatcher needs bf16 and expert-parallel ranks.
FOR_FLEX = ["--bf16", "--expert-model-parallel-size", "2"]
# Muon, divided among ranks, needs bf16 and experts without biases.
MODEL = ["--num-experts", "8", "--routing-mask", "mask.safetensors", "--disable-bias-linear"]
BASE = [*MODEL, *FOR_FLEX, "--transformer-impl", "transformer_engine", "--cuda-graph-modules", "attn"]
# Settings that a switch needs.
NEEDED = {
    "--reset-attention-mask": ["--transformer-impl", "local"],
    "--fim-data": ["--tokenizer-type", "HuggingFaceTokenizer"],
    "--full-validation": ["--multiple-validation-sets"],
}


@cache
def parser() -> argparse.ArgumentParser:
    complete = add_maskmoe_arguments(add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False)))
    complete.set_defaults(gradient_accumulation_fusion=True)  # as on a GPU
    return complete


def actions() -> dict[str, argparse.Action]:
    """Return the arguments of Megatron's own parser by their first flag."""
    megatron = add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False))
    return {action.option_strings[0]: action for action in megatron._actions if action.option_strings[0] != "-h"}


def listed(name: str) -> list[str]:
    """Return the flags of `works` or `no_bearing`, which are grouped as in Megatron's help."""
    return [flag for flags in REVIEWED[name].values() for flag in flags]


def refusals(arguments: list[str]) -> list[str]:
    return list(unsupported_settings(parser().parse_args([*BASE, *arguments])))


def accepted_settings() -> Iterator[list[str]]:
    """Yield every switch and every choice of the flags that are not refused."""
    for flag, action in actions().items():
        if flag in REVIEWED["refused"]:
            continue
        if action.nargs == 0 or isinstance(action, argparse.BooleanOptionalAction):
            yield [flag, *NEEDED.get(flag, [])]
        for choice in action.choices or []:
            value = getattr(choice, "name", str(choice))
            if value not in REVIEWED["refused_values"].get(flag, []):
                yield [flag, value]


def test_every_flag_of_megatron_is_reviewed() -> None:
    """A flag that is missing here is new in this release of Megatron-Core; a surplus flag is gone."""
    reviewed = [*listed("works"), *REVIEWED["refused"], *listed("no_bearing")]
    assert len(reviewed) == len(set(reviewed))
    assert set(reviewed) == set(actions())


def test_the_base_is_supported() -> None:
    assert not refusals([])


@pytest.mark.parametrize("flag", REVIEWED["refused"])
def test_flag_is_refused(flag: str) -> None:
    errors = refusals([flag, *REVIEWED["refused"][flag]])
    assert any(flag in error for error in errors), errors


@pytest.mark.parametrize(
    ("flag", "value"), [(flag, value) for flag, values in REVIEWED["refused_values"].items() for value in values]
)
def test_value_is_refused(flag: str, value: str) -> None:
    assert any(flag in error for error in refusals([flag, value]))


def test_other_switches_and_choices_are_accepted() -> None:
    refused = {" ".join(setting): errors for setting in accepted_settings() if (errors := refusals(setting))}
    assert not refused


@pytest.mark.parametrize(
    "flags", [["--cuda-graph-impl", "transformer_engine"], ["--external-cuda-graph"]], ids=" ".join
)
@pytest.mark.parametrize("option", ["--cuda-graph-modules", "--cuda-graph-scope"])
@pytest.mark.parametrize(
    ("modules", "captured"),
    [
        ("", "capture whole layers, because no modules are named."),
        ("full", "capture whole layers, because no modules are named."),
        ("attn moe", "capture moe."),
        ("attn moe_router moe_preprocess", "capture moe_router, moe_preprocess."),
        ("attn mlp", None),
        ("mlp", None),
    ],
)
def test_graphs_of_moe_layers_are_refused_and_named(
    flags: list[str], option: str, modules: str, captured: str | None
) -> None:
    arguments = [*MODEL, *flags, *([option, *modules.split()] if modules else [])]
    errors = list(unsupported_settings(parser().parse_args([*arguments, "--transformer-impl", "transformer_engine"])))
    if captured is None:
        assert not errors
    else:
        assert len(errors) == 1
        assert captured in errors[0]
        assert "--cuda-graph-modules attn" in errors[0]


def test_upcycling_is_answered_with_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    flags = [*MODEL, "--moe-use-upcycling"]
    (error,) = unsupported_settings(parser().parse_args(flags))
    command = "maskmoe convert upcycle --load DENSE_CHECKPOINT --save MOE_CHECKPOINT"
    assert error.endswith(f": {command} --routing-mask mask.safetensors --num-experts 8 --topk 2")
    flags += ["--load", "dense", "--save", "new runs/moe", "--moe-router-topk", "4", "--moe-layer-freq", "[0]+[1]*3"]
    (error,) = unsupported_settings(parser().parse_args([*flags, "--moe-upcycling-granularity", "2"]))
    words = shlex.split(error.split("The command is: ")[1])
    assert words[:2] == ["maskmoe", "convert"]
    monkeypatch.setattr(sys, "argv", words[1:])
    parsed = parse_arguments()
    assert (parsed.command, parsed.load, parsed.save) == ("upcycle", Path("dense"), Path("new runs/moe"))
    assert (parsed.num_experts, parsed.topk, parsed.granularity) == (8, 4, 2)
    assert upcycle_settings(parsed).moe_layer_freq == [0, 1, 1, 1]


def test_missing_optimizers_are_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    args = parser().parse_args([*BASE, "--optimizer", "muon"])
    assert not list(missing_libraries(args))
    monkeypatch.setattr(refusals_module, "HAVE_EMERGING_OPTIMIZERS", False)
    (error,) = missing_libraries(args)
    assert "--optimizer muon needs the Python package emerging-optimizers" in error


@pytest.mark.parametrize("missing", ["--bf16", "--disable-bias-linear"])
def test_muon_is_divided_only_with(missing: str) -> None:
    kept = [word for word in BASE if word != missing]
    for flags in (["--optimizer", "muon", "--use-distributed-optimizer"], ["--optimizer", "dist_muon"]):
        assert not refusals(flags)
        assert any(missing in error for error in unsupported_settings(parser().parse_args([*kept, *flags])))


@pytest.mark.parametrize(
    ("flags", "writes"),
    [
        ("--moe-grouped-gemm", True),
        ("", False),
        ("--moe-grouped-gemm --transformer-impl local", False),
        ("--moe-grouped-gemm --use-transformer-engine-op-fuser", False),
    ],
)
def test_counts_of_experts_are_refused_where_megatron_would_not_write_them(flags: str, writes: bool) -> None:
    assert bool(refusals(["--save-tokens-per-expert-interval", "10", *flags.split()])) is not writes


@pytest.mark.parametrize(
    ("dtype", "eps", "vanishes"),
    [
        ("--bf16", "1e-3", True),
        ("--bf16", "3.9e-3", True),  # 1 - eps does not round to 1, but 1 + eps does
        ("--bf16", "4e-3", False),
        ("--bf16", "0", False),
        ("--fp16", "4e-4", True),
        ("--fp16", "1e-3", False),
        ("--bf16", "1e-2", False),
    ],
)
def test_jitter_that_vanishes_in_the_dtype_of_the_input_is_refused(dtype: str, eps: str, vanishes: bool) -> None:
    flags = [*MODEL, dtype, "--moe-input-jitter-eps", eps]
    errors = list(unsupported_settings(parser().parse_args(flags)))
    assert [error.split(":")[0] for error in errors] == [
        f"--moe-input-jitter-eps {float(eps):g} vanishes in {dtype[2:]}, where 1 + {float(eps):g} is 1"
    ] * vanishes


def test_deferred_weight_gradients_are_refused_where_data_parallelism_misses_them() -> None:
    """`test_deferred_gradients` shows that these combinations compute wrong gradients."""
    flag = "--overlap-dispatch-backward-with-experts-wgrad"
    assert not refusals([flag])
    for other in ("--overlap-grad-reduce", "--no-gradient-accumulation-fusion"):
        assert any(flag in error for error in refusals([flag, other]))
