"""The one place where functions of Megatron-Core are replaced, on CPU and GPU alike.

Written for megatron-core 0.19.2; each entry says what goes wrong without it.
"""

import torch


def apply() -> None:
    """Replace what is listed in this module; call before `megatron.training.pretrain`."""
    _use_helpers_of_the_wheel()
    _allow_optimizer_state_before_first_step()


def _use_helpers_of_the_wheel() -> None:
    """`initialize_megatron` runs `make` in its own folder, but the wheel has no Makefile there: every run would end.

    The wheel ships the module that `make` would build.
    """
    from megatron.core.datasets import helpers_cpp, utils

    assert helpers_cpp is not None
    utils.compile_helpers = lambda: None


def _allow_optimizer_state_before_first_step() -> None:
    """Without Apex and Transformer Engine, `DistributedOptimizer.state_dict` wants the step that all parameters share.

    There is none before the first step, which is when a checkpoint is loaded. So allocate the state first, as Adam
    itself would at its first step.
    """
    from megatron.core.optimizer import distrib_optimizer

    if distrib_optimizer.HAVE_APEX_OR_TE:
        return
    original = distrib_optimizer.DistributedOptimizer.state_dict

    def state_dict(self):
        inner = self.optimizer
        if not inner.state:
            for parameter in (p for group in inner.param_groups for p in group["params"]):
                inner.state[parameter]["step"] = torch.tensor(0.0)
                for key in self.optimizer_state_keys:
                    inner.state[parameter][key] = torch.zeros_like(parameter)
        return original(self)

    distrib_optimizer.DistributedOptimizer.state_dict = state_dict
