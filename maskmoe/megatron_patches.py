"""The one place where functions of Megatron-Core are replaced, on CPU and GPU alike.

Written for megatron-core 0.19.2; each entry says what goes wrong without it.
"""

import torch


def apply() -> None:
    """Replace what is listed in this module; call before `megatron.training.pretrain`."""
    _use_helpers_of_the_wheel()
    _make_optimizer_state_loadable()


def _use_helpers_of_the_wheel() -> None:
    """`initialize_megatron` runs `make` in its own folder, but the wheel has no Makefile there: every run would end.

    The wheel ships the module that `make` would build.
    """
    from megatron.core.datasets import helpers_cpp, utils

    assert helpers_cpp is not None
    utils.compile_helpers = lambda: None


def _make_optimizer_state_loadable() -> None:
    """Without Apex and Transformer Engine, `DistributedOptimizer` cannot load what it saved, for four reasons.

    - `state_dict` wants the step that all parameters share, and there is none before the first step, which is when a
      checkpoint is loaded. So allocate the state first, as Adam itself would at its first step.
    - `load_state_dict` copies into views of fp32 parameters, which autograd forbids.
    - It gives all parameters one and the same `step` tensor, so that every parameter's update advances it for all.
    - It then overwrites the step with that of the state that was allocated for loading, or misses it.
    """
    from megatron.core.optimizer import distrib_optimizer

    if distrib_optimizer.HAVE_APEX_OR_TE:
        return
    stock_state_dict = distrib_optimizer.DistributedOptimizer.state_dict
    stock_load_state_dict = distrib_optimizer.DistributedOptimizer.load_state_dict
    stock_set_states = distrib_optimizer.DistributedOptimizer._set_main_param_and_optimizer_states

    def state_dict(self):
        inner = self.optimizer
        if not inner.state:
            for parameter in (p for group in inner.param_groups for p in group["params"]):
                inner.state[parameter]["step"] = torch.tensor(0.0)
                for key in self.optimizer_state_keys:
                    inner.state[parameter][key] = torch.zeros_like(parameter)
        return stock_state_dict(self)

    @torch.no_grad()
    def load_state_dict(self, state_dict):
        stock_load_state_dict(self, state_dict)
        for state in self.optimizer.state.values():
            state["step"] = state["step"].clone()

    def set_states(self, model_param, tensors):
        # What is no tensor is left as it is.
        stock_set_states(self, model_param, tensors | {"step": None})

    distrib_optimizer.DistributedOptimizer._set_main_param_and_optimizer_states = set_states
    distrib_optimizer.DistributedOptimizer.state_dict = state_dict
    distrib_optimizer.DistributedOptimizer.load_state_dict = load_state_dict
