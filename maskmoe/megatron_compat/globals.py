"""Megatron's functions that return global variables, with the types that Megatron does not declare.

This module imports megatron, so import it only after `prepare_process()`.
"""

from argparse import Namespace
from collections.abc import Callable
from typing import Any, cast

from megatron.core.timers import Timers
from megatron.training import global_vars
from megatron.training.dist_signal_handler import DistributedSignalHandler

get_args = cast(Callable[[], Namespace], global_vars.get_args)
"""Returns the command line arguments."""

get_tokenizer = cast(Callable[[], Any], global_vars.get_tokenizer)
"""Returns the tokenizer."""

get_timers = cast(Callable[[], Timers], global_vars.get_timers)
"""Returns the timers of the training loop."""

get_signal_handler = cast(Callable[[], DistributedSignalHandler], global_vars.get_signal_handler)
"""Returns the handler of `--exit-signal`."""

open_tensorboard_writer = cast(Callable[[Namespace], None], global_vars._set_tensorboard_writer)
"""Opens TensorBoard's writer on the last rank. Megatron itself does this only for `--tensorboard-dir`."""
