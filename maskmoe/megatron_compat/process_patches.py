"""Patches of Megatron-Core and torch that every process needs, on CPU and GPU alike.

Each function replaces something of megatron-core 0.19.2 or torch 2.15 and says what, why, and when the patch can go.
The patches that concern checkpoints are in `checkpoint_patches`.
"""

import importlib.util
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, ExitStack
from itertools import accumulate
from types import ModuleType
from typing import Any

import torch
from megatron.core.datasets import utils
from megatron.core.optimizer.distrib_optimizer import HAVE_APEX_OR_TE, DistributedOptimizer
from megatron.core.optimizer.optimizer import ChainedOptimizer
from megatron.core.ssm.gated_delta_net import common
from megatron.core.transformer.moe import token_dispatcher

from maskmoe.errors import UserError
from maskmoe.megatron_compat import replace, replacing

_LARGEST_WEIGHT = 1000.0  # remainders are up to 32,768


def use_compiled_helpers_of_wheel() -> None:
    """Do not compile Megatron's dataset helpers.

    Replaces: `megatron.core.datasets.utils.compile_helpers`, which `initialize_megatron` calls.
    Why: The function runs `make` in the folder of the package. The wheel holds no Makefile, so every run would fail,
        but the wheel holds the compiled module.
    Can go: When `compile_helpers` does nothing if the module can be imported.
    """
    importlib.import_module("megatron.core.datasets.helpers_cpp")  # fails here rather than in the first dataset
    replace(utils, "compile_helpers", lambda: None)


def make_optimizer_state_loadable() -> None:
    """Let the distributed optimizer save and load its state without Apex and Transformer Engine.

    Replaces: `__init__`, `state_dict`, `load_state_dict` and `_set_main_param_and_optimizer_states` of
        `megatron.core.optimizer.distrib_optimizer.DistributedOptimizer`, unless Apex or Transformer Engine is
        installed.
    Why: With torch's Adam, the stock methods fail or compute wrong results in five ways.

        - `state_dict` wants exactly one value of `step` among all parameters. Before the first step, which is when a
          checkpoint is loaded, there is none. So allocate the state as Adam would at its first step.
        - An optimizer without parameters never has a `step`: the optimizer of the experts on a pipeline stage without
          experts, or any optimizer on a rank whose share of a small buffer is padding. So count the steps in an entry
          of the state that belongs to no parameter. torch saves and loads such an entry unchanged.
        - `load_state_dict` copies into views of fp32 parameters, which autograd forbids.
        - `load_state_dict` gives all parameters one `step` tensor, which every parameter's update then advances.
        - Loading then overwrites the loaded `step` by the `step` of the state that was allocated for loading.
    Can go: When Megatron saves, loads and resumes bit for bit with torch's Adam (tests/training/test_resume.py).
    """
    if HAVE_APEX_OR_TE:
        return
    stock_init = DistributedOptimizer.__init__
    stock_state_dict = DistributedOptimizer.state_dict
    stock_load_state_dict = DistributedOptimizer.load_state_dict
    stock_set_states = DistributedOptimizer._set_main_param_and_optimizer_states

    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        stock_init(self, *args, **kwargs)
        if not self.is_stub_optimizer and not any(group["params"] for group in self.optimizer.param_groups):
            _count_steps_without_parameters(self.optimizer)

    def state_dict(self: Any) -> dict[str, Any]:
        inner = self.optimizer
        if not inner.state:
            for parameter in (p for group in inner.param_groups for p in group["params"]):
                inner.state[parameter]["step"] = torch.tensor(0.0)
                for key in self.optimizer_state_keys:
                    inner.state[parameter][key] = torch.zeros_like(parameter)
        return stock_state_dict(self)

    @torch.no_grad()
    def load_state_dict(self: Any, state_dict: dict[str, Any]) -> None:
        stock_load_state_dict(self, state_dict)
        for state in self.optimizer.state.values():
            state["step"] = state["step"].clone()

    def set_states(self: Any, model_param: torch.nn.Parameter, tensors: Mapping[str, Any]) -> None:
        # The stock method copies tensors only, so None keeps the loaded step.
        stock_set_states(self, model_param, {**tensors, "step": None})

    replace(DistributedOptimizer, "__init__", init)
    replace(DistributedOptimizer, "state_dict", state_dict)
    replace(DistributedOptimizer, "load_state_dict", load_state_dict)
    replace(DistributedOptimizer, "_set_main_param_and_optimizer_states", set_states)


def _count_steps_without_parameters(optimizer: torch.optim.Optimizer) -> None:
    """Keep the number of steps in the state of an optimizer that has no parameters."""
    key: Any = "steps of an optimizer without parameters"
    optimizer.state[key]["step"] = torch.tensor(0.0)

    def count_step(stepped: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        stepped.state[key]["step"] += 1

    optimizer.register_step_post_hook(count_step)


def save_states_of_padded_buckets() -> None:
    """Save each parameter's own state of the distributed optimizer also if buckets of gradients are padded.

    Replaces: `sharded_param_state_fully_reshardable` of
        `megatron.core.optimizer.distrib_optimizer.DistributedOptimizer`.
    Why: The gathered state has no padding between buckets, but the method looks up parameters as if it had. So after
        the first padded bucket each parameter would be saved with numbers of its neighbours. A bucket is padded if its
        size is no multiple of the data-parallel size and of 128. The resumed run would train wrong fp32 weights.
    Can go: With megatron-core after 0.19, which has the correction (Megatron's pull request 5077).
    """
    stock = DistributedOptimizer.sharded_param_state_fully_reshardable

    def sharded_state(self: Any, *args: Any, **kwargs: Any) -> Any:
        with ExitStack() as stack:
            for buffer in self.buffers:
                paddings = (bucket.grad_data.numel() - bucket.numel_unpadded for bucket in buffer.buckets)
                before = [*accumulate(paddings, initial=0)]  # [buckets + 1]
                places = {
                    parameter: (start - before[bucket], end - before[bucket], bucket)
                    for parameter, (start, end, bucket) in buffer.param_index_map.items()
                }
                stack.enter_context(replacing(buffer, param_index_map=places))
            return stock(self, *args, **kwargs)

    replace(DistributedOptimizer, "sharded_param_state_fully_reshardable", sharded_state)


def save_whole_weights_of_precision_aware_optimizers() -> None:
    """Save fp32 weights of which the optimizer stores only the bits that bf16 weights lack.

    Replaces: `_get_main_param_and_optimizer_states` and `_set_main_param_and_optimizer_states` of
        `megatron.core.optimizer.distrib_optimizer.DistributedOptimizer`.
    Why: Transformer Engine's FusedAdam stores these bits as int16, because Megatron-Core sets `store_param_remainders`,
        for which there is no flag. The stock methods save the int16 numbers as fp32 weights. A resumed run fails, or
        without `--use-precision-aware-optimizer` trains these numbers.
    Can go: When a run with `--use-precision-aware-optimizer` and bf16 can resume (Megatron's pull request 4222).
    """
    stock_get = DistributedOptimizer._get_main_param_and_optimizer_states
    stock_set = DistributedOptimizer._set_main_param_and_optimizer_states

    def own_weight(self: Any, model_param: torch.nn.Parameter) -> torch.Tensor:
        group, order = self.model_param_group_index_map[model_param]
        return self.optimizer.param_groups[group]["params"][order]

    def get_states(self: Any, model_param: torch.nn.Parameter) -> dict[str, torch.Tensor]:
        tensors = stock_get(self, model_param)
        if tensors["param"].dtype == torch.int16:
            upper = own_weight(self, model_param).detach().view(torch.int16).int() << 16
            tensors["param"] = (upper + tensors["param"].int()).view(torch.float32)
        return tensors

    @torch.no_grad()
    def set_states(self: Any, model_param: torch.nn.Parameter, tensors: Mapping[str, Any]) -> None:
        weight, own = tensors["param"], own_weight(self, model_param)
        has_remainders = getattr(self.optimizer, "store_param_remainders", False) and own.dtype == torch.bfloat16
        if has_remainders and isinstance(weight, torch.Tensor) and weight.dtype == torch.float32:
            if weight.numel() and weight.abs().max() > _LARGEST_WEIGHT:
                raise UserError(
                    "the checkpoint holds remainders in place of fp32 weights, as those of MaskMoE up to 0.2.1 do: "
                    "pass --no-load-optim"
                )
            bits = weight.contiguous().view(torch.int32)
            remainders = bits.to(torch.int16)
            own.copy_(((bits - remainders.int()) >> 16).to(torch.int16).view(torch.bfloat16))
            tensors = {**tensors, "param": remainders}
        stock_set(self, model_param, tensors)

    replace(DistributedOptimizer, "_get_main_param_and_optimizer_states", get_states)
    replace(DistributedOptimizer, "_set_main_param_and_optimizer_states", set_states)


def resume_steps_of_stages_without_experts() -> None:
    """Resume with the number of steps of all optimizers also if a pipeline stage has no experts.

    Replaces: `_synchronize_steps` and `load_state_dict` of `megatron.core.optimizer.optimizer.ChainedOptimizer`.
    Why: The first rank saves what ranks do not divide, such as numbers of steps. If its stage has no experts, its
        optimizer of experts has counted none. A resumed run would then fail in its first step (torch's Adam without the
        distributed optimizer), or count the experts' steps from 1 and fail at its next save (FusedAdam before
        Transformer Engine 2.19). All optimizers of a run make the same steps, so take the number of another one, also
        for checkpoints that lack a number.
    Can go: When Megatron-Core resumes such runs (tests/training/test_resume.py).
    """
    stock_synchronize_steps = ChainedOptimizer._synchronize_steps
    stock_load_state_dict = ChainedOptimizer.load_state_dict

    def synchronize_steps(self: Any) -> Any:
        """Give groups without parameters the step of the others; FusedAdam counts in groups."""
        step = stock_synchronize_steps(self)
        if step is None:
            return None
        members = [chained.optimizer for chained in self.chained_optimizers]
        counting = {type(member) for member in members if any("step" in group for group in member.param_groups)}
        for member in members:
            if type(member) in counting:
                for group in member.param_groups:
                    group["step"] = step
        return step

    def load_state_dict(self: Any, state_dict: Any) -> None:
        """Give states without a step the step of another optimizer of their kind; torch's Adam counts in the state."""
        states = [state for _, state in sorted(state_dict.items())] if isinstance(state_dict, dict) else state_dict
        if 1 < len(self.chained_optimizers) == len(states):
            kinds = [type(chained.optimizer) for chained in self.chained_optimizers]
            # Half-precision models have the state in a further dictionary, and the distributed optimizer has none here.
            inner = [state.get("optimizer", state).get("state", {}) for state in states]
            # Find the step of each kind of optimizer, then give it to the states of the same kind.
            steps = {
                kind: state["common_step"] for kind, state in zip(kinds, inner, strict=True) if "common_step" in state
            }
            for kind, state in zip(kinds, inner, strict=True):
                if kind in steps:
                    state["common_step"] = steps[kind]
        stock_load_state_dict(self, state_dict)

    replace(ChainedOptimizer, "_synchronize_steps", synchronize_steps)
    replace(ChainedOptimizer, "load_state_dict", load_state_dict)


def leave_slots_of_flex_dispatcher_empty() -> None:
    """Let the flex dispatcher send a token to fewer than k experts.

    Replaces: `setup_metadata` of `_DeepepManager` and `_NCCLEPManager` in
        `megatron.core.transformer.moe.token_dispatcher`. HybridEP reads the routing map.
    Why: DeepEP and NCCL-EP take k expert indices for each token, and skip an index of -1. The stock methods fill all k
        slots with the experts of the largest weights, so tokens would go to experts that they have not selected.
    Can go: When these methods read the routing map.
    """

    def setup_metadata(self: Any, routing_map: torch.Tensor, probs: torch.Tensor) -> None:
        """Store weights and indices of the selected experts; both arguments are [tokens, ranks, local experts]."""
        self.token_probs, self.token_indices = select_slots(routing_map.flatten(1), probs.flatten(1), self.router_topk)
        self.num_local_tokens = len(routing_map)

    replace(token_dispatcher._DeepepManager, "setup_metadata", setup_metadata)
    replace(token_dispatcher._NCCLEPManager, "setup_metadata", setup_metadata)


def select_slots(routing_map: torch.Tensor, probs: torch.Tensor, num_slots: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Turn a routing map into the form of DeepEP and NCCL-EP: slots for the selected experts of each token.

    Args:
        routing_map: Bool [tokens, experts], with at most `num_slots` experts per token.
        probs: [tokens, experts], the weights.
        num_slots: Slots of each token.

    Returns:
        [tokens, slots] each: weights, 0 in an unused slot; and expert indices (int64), -1 in an unused slot.
    """
    slot_probs, slot_experts = probs.masked_fill(~routing_map, -torch.inf).topk(num_slots, dim=-1)
    # The weight of a selected expert can be 0, too, so the routing map decides which slots are unused.
    unused = ~routing_map.gather(-1, slot_experts)
    return slot_probs.masked_fill(unused, 0), slot_experts.masked_fill(unused, -1)


EVERY_PROCESS = (
    *(use_compiled_helpers_of_wheel, make_optimizer_state_loadable, save_states_of_padded_buckets),
    *(save_whole_weights_of_precision_aware_optimizers, resume_steps_of_stages_without_experts),
    leave_slots_of_flex_dispatcher_empty,
)
"""The patches that `prepare_process` applies once megatron is imported."""


def building_replicated_linears_of(
    linear: Callable[..., torch.nn.Module], module: ModuleType
) -> AbstractContextManager:
    """Let a module of Megatron build its replicated linear layers without Transformer Engine.

    Replaces: `HAVE_TE` and `TELinear` in `megatron.core.transformer.moe.moe_layer` or in
        `megatron.core.transformer.multi_latent_attention`, inside a `with` block only.
    Why: `MoELayer` builds the projections of latent experts of `TELinear` alone. `MLASelfAttention` refuses every other
        class that does not divide its output over the tensor-parallel ranks; and if the output is divided, the gradient
        of the keys' shared positional part covers the heads of one rank only.
    Can go: When `MoELayer` and `MLASelfAttention` accept any class from the layer's spec.

    Args:
        linear: Builds a linear layer; takes the arguments of `TELinear`.
        module: The module of Megatron.
    """
    return replacing(module, HAVE_TE=True, TELinear=linear)


def building_gated_delta_net_without_fla() -> AbstractContextManager:
    """Let a subclass of Megatron's gated delta net be built without fla.

    Replaces: `HAVE_FLA` in `megatron.core.ssm.gated_delta_net.common`, inside a `with` block only.
    Why: The constructor raises an ImportError without fla, also in deterministic mode, whose convolution and delta rule
        are plain torch. The subclass replaces the remaining call of fla, which normalizes queries and keys.
    Can go: When `GatedDeltaNet` can be built and computes without fla.
    """
    return replacing(common, HAVE_FLA=True)
