"""Trains and evaluates with a builder of models of the user's own, see `run_program`."""

import sys
from collections.abc import Callable
from functools import partial
from importlib import import_module
from typing import TYPE_CHECKING

from maskmoe.training.rank_process import prepare_helper, run_rank

if TYPE_CHECKING:
    from maskmoe.training.model.model_builder import StageBuilder


def run_program(module_name: str, builder: Callable[[], type["StageBuilder"]]) -> None:
    """Train or evaluate with another builder of models: `FILE pretrain FLAGS…` or `FILE evaluate FLAGS…`.

    A Python file ends with this call. It is the `program` of a suite or of a model file.

    Args:
        module_name: `__name__` of the file. Megatron's helper processes import the file by another name.
        builder: Returns the class of the builder, a subclass of `MaskMoEHybridModelBuilder` or, for models without
            `--hybrid-layer-pattern`, of `MaskMoEGPTModelBuilder`. Megatron can be imported when this function is
            called, and not before.
    """
    if module_name == "__mp_main__":
        prepare_helper()
    if module_name != "__main__":
        return
    if sys.argv[1:2] not in (["pretrain"], ["evaluate"]):
        sys.exit(f"usage: {sys.argv[0]} pretrain|evaluate FLAGS…")
    task = sys.argv.pop(1)
    run_rank(partial(import_module(f"maskmoe.training.{task}").main, builder), task)
