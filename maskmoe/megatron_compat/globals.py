"""Megatron's functions that return global variables, with types; import this module after `prepare_process()`."""

from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, cast

from megatron.core.timers import Timers
from megatron.training import global_vars
from megatron.training.dist_signal_handler import DistributedSignalHandler

from maskmoe.megatron_compat import replacing

get_args = cast(Callable[[], Namespace], global_vars.get_args)
"""Returns the command line arguments."""

get_tokenizer = cast(Callable[[], Any], global_vars.get_tokenizer)
"""Returns the tokenizer."""

get_timers = cast(Callable[[], Timers], global_vars.get_timers)
"""Returns the timers of the training loop."""

get_signal_handler = cast(Callable[[], DistributedSignalHandler], global_vars.get_signal_handler)
"""Returns the handler of `--exit-signal`."""


@contextmanager
def global_args(args: Namespace) -> Iterator[None]:
    """Let `get_args` return other arguments during the block; Megatron's global variables may not exist yet."""
    before = None
    with suppress(AssertionError):
        before = get_args()
    global_vars.set_args(args)
    try:
        yield
    finally:
        global_vars.set_args(before)


def set_globals_without_writers(args: Namespace) -> None:
    """Set all global variables but the tokenizer, which exists, and the writers, which open when all is checked.

    One-logger, which only NVIDIA has, stays off.
    """
    writers = ("_set_tensorboard_writer", "_set_wandb_writer", "_set_one_logger")
    with replacing(global_vars, **dict.fromkeys(writers, lambda args: None)):
        global_vars.set_global_variables(args, build_tokenizer=False)


def open_writers(args: Namespace) -> None:
    """Open the writers of TensorBoard and Weights & Biases that the arguments ask for, on the last rank."""
    for set_writer in (global_vars._set_tensorboard_writer, global_vars._set_wandb_writer):
        set_writer(args)
