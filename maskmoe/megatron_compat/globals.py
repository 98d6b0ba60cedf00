"""Megatron's global variables, with the types that its own functions do not declare.

This module imports megatron, so import it only after `prepare_process()`.
"""

from argparse import Namespace
from typing import Any, cast

from megatron.core.timers import Timers
from megatron.training import global_vars
from megatron.training.dist_signal_handler import DistributedSignalHandler


def get_args() -> Namespace:
    """Return the command line arguments."""
    return cast(Namespace, global_vars.get_args())


def get_tokenizer() -> Any:
    """Return the tokenizer."""
    return global_vars.get_tokenizer()


def get_timers() -> Timers:
    """Return the timers of the training loop."""
    return cast(Timers, global_vars.get_timers())


def get_signal_handler() -> DistributedSignalHandler:
    """Return the handler of `--exit-signal`."""
    return cast(DistributedSignalHandler, global_vars.get_signal_handler())
