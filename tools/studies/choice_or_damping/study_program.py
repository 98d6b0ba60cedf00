"""Runs MaskMoE's entry points with another builder of models; the programs of this folder name the builder."""

import importlib
import sys
from functools import partial

from maskmoe.training.loop.rank_process import prepare_rank, run_rank


def run(builder: str, module_name: str) -> None:
    """Train or evaluate with a builder of `interventions`, as the first word of the command line says.

    Args:
        builder: name of the class.
        module_name: `__name__` of the program. Megatron's helper processes import the program by another name.
    """
    if module_name == "__mp_main__":
        from maskmoe.megatron_compat import prepare_process

        prepare_process()
    if module_name == "__main__":
        task = sys.argv.pop(1)
        run_rank(partial(_main, task, builder), task)


def _main(task: str, builder: str) -> None:
    prepare_rank()
    from maskmoe.training.loop.model_builder import MaskMoEModelConfig

    builder_class = getattr(importlib.import_module("interventions"), builder)
    MaskMoEModelConfig.get_builder_cls = lambda config: builder_class
    importlib.import_module(f"maskmoe.training.{task}").main()
