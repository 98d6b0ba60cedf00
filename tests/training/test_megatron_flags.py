"""Every flag of Megatron-Core's parser against the reviewed lists in `megatron_flags.yaml`."""

import argparse
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml
from megatron.training.arguments import add_megatron_arguments

from maskmoe.training.arguments import add_maskmoe_arguments
from maskmoe.training.refusals import unsupported_settings

REVIEWED: dict[str, Any] = yaml.safe_load(Path(__file__).with_name("megatron_flags.yaml").read_text(encoding="utf-8"))
# The flex dispatcher needs bf16 and expert-parallel ranks.
FOR_FLEX = ["--bf16", "--expert-model-parallel-size", "2"]
MODEL = ["--num-experts", "8", "--routing-mask", "mask.safetensors"]
BASE = [*MODEL, *FOR_FLEX, "--transformer-impl", "transformer_engine"]
# Settings that a switch needs.
NEEDED = {"--reset-attention-mask": ["--transformer-impl", "local"]}


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


def test_deferred_weight_gradients_are_refused_where_data_parallelism_misses_them() -> None:
    """`test_deferred_gradients` shows that these combinations compute wrong gradients."""
    flag = "--overlap-dispatch-backward-with-experts-wgrad"
    assert not refusals([flag])
    for other in ("--overlap-grad-reduce", "--no-gradient-accumulation-fusion"):
        assert any(flag in error for error in refusals([flag, other]))
