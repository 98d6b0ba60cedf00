"""Waits for gathered parameters that are read without a call of the module that holds them."""

from megatron.core.distributed import DistributedDataParallel
from torch.nn import Module


def wait_for_parameters(module: Module) -> None:
    """Wait until data parallelism has gathered a module's own parameters, as a call of the module would.

    With `--overlap-param-gather`, `DistributedDataParallel` gathers parameters during the forward pass and waits for
    them in a forward pre-hook of each module, which ignores the module's input.

    Args:
        module: a module whose parameters are read without calling it.
    """
    for hook in module._forward_pre_hooks.values():
        if waits_for_parameters(hook):
            hook(module, ())


def waits_for_parameters(hook: object) -> bool:
    """Return whether a forward pre-hook is the hook of `DistributedDataParallel` that waits for parameters."""
    return getattr(hook, "__module__", None) == DistributedDataParallel.__module__
