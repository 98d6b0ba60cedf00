"""Waits for gathered parameters that are read without a call of the module that holds them."""

from functools import partial
from typing import Any

from megatron.core.distributed import DistributedDataParallel
from megatron.core.ssm.gated_delta_net import GatedDeltaNet
from torch.nn import Module


def wait_for_parameters(module: Module) -> None:
    """Wait until data parallelism has gathered a module's own parameters, as a call of the module would.

    With `--overlap-param-gather`, `DistributedDataParallel` gathers parameters during the forward pass and waits for
    them in a forward pre-hook of each module, which ignores the module's input.
    """
    for hook in module._forward_pre_hooks.values():
        if getattr(hook, "__module__", None) == DistributedDataParallel.__module__:
            hook(module, ())


def wait_for_convolutions(model: Module) -> None:
    """Let gated delta nets wait for the parameters of their convolution, which they read without calling it.

    Mamba layers hold these parameters themselves, so a call of the layer waits for them.
    """
    mixers: list[Any] = [each for each in model.modules() if isinstance(each, GatedDeltaNet)]
    for mixer in mixers:
        # The convolution follows `in_proj`, so wait in the order in which the parameters are gathered.
        mixer.in_proj.register_forward_hook(partial(_wait_after_call, mixer.conv1d))


def _wait_after_call(other: Module, *_unused: object) -> None:
    """Wait until the parameters of another module are gathered; a forward hook if `other` is bound."""
    wait_for_parameters(other)
