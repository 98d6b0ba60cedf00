"""The mixture-of-experts layer whose router knows the ids of its tokens."""

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from megatron.core import tensor_parallel
from megatron.core.extensions.transformer_engine import te_checkpoint
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.moe import moe_layer
from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
from megatron.core.transformer.moe.moe_utils import get_default_pg_collection
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from maskmoe.megatron_compat.process_patches import building_replicated_linears_of
from maskmoe.transformer.dispatch.choose import build_dispatcher, choose_dispatch
from maskmoe.transformer.router import MaskMoERouter
from maskmoe.transformer.token_ids import from_arguments
from maskmoe.transformer.torch_modules.linear import ReplicatedLinear


class MaskMoELayer(MoELayer):
    """`MoELayer` with a masked router and a dispatcher that uses the mask.

    Token ids arrive as `input_ids` or in `padding_mask`, see `token_ids`.

    Attributes:
        dispatcher: Sends tokens to their experts and outputs back, see `dispatch.protocol`.
        token_dispatcher: Megatron's own dispatcher, which only `StockDispatcher` uses; None with another `dispatcher`.
    """

    router: MaskMoERouter  # pyrefly: ignore[bad-override-mutable-attribute]
    experts: torch.nn.Module  # pyrefly: ignore[bad-override-mutable-attribute]
    _chunk_state: Any  # of the micro-batch whose node of an overlapped schedule calls `route`

    def __init__(
        self,
        config: TransformerConfig,
        submodules: MoESubmodules | None = None,
        layer_number: int | None = None,
        pg_collection: ProcessGroupCollection | None = None,
        is_mtp_layer: bool = False,
        name: str | None = None,
    ) -> None:
        if pg_collection is None:
            pg_collection = get_default_pg_collection()
        is_local = config.transformer_impl == "local"
        with building_replicated_linears_of(ReplicatedLinear, moe_layer) if is_local else nullcontext():
            super().__init__(config, submodules, layer_number, pg_collection, is_mtp_layer, name)
        if layer_number is not None:
            self.set_layer_number(layer_number)  # `MoELayer` leaves that to the transformer layer
        # `MoELayer` always builds a token dispatcher. `StockDispatcher` builds the one that this layer needs.
        self.token_dispatcher = None
        kind = choose_dispatch(config, pg_collection, self.router.visible_experts.is_rank_local, is_mtp_layer)
        self.dispatcher = build_dispatcher(kind, self, pg_collection)
        self.experts.register_forward_pre_hook(self._count_rows)
        # Megatron-Core gives experts their own optimizer only under expert parallelism, and a checkpoint with one
        # optimizer cannot be loaded into a run with two. So experts always get their own optimizer.
        for parameter in self.experts.parameters():
            parameter.allreduce = False  # pyrefly: ignore[missing-attribute]
            # Under sequence parallelism, Megatron-Core marks the biases of second linear layers as shared by all
            # tensor-parallel ranks and adds up their gradients. But each rank has its own experts.
            parameter.sequence_parallel = False  # pyrefly: ignore[missing-attribute]

    def forward(
        self,
        hidden_states: Tensor,
        intermediate_tensors: None = None,
        padding_mask: Tensor | None = None,
        input_ids: Tensor | None = None,
    ) -> tuple[Tensor, None]:
        """Route, dispatch, compute the experts, and combine.

        Args:
            hidden_states: [sequence, batch, hidden].
            intermediate_tensors: Must be None; the overridden method uses it for CUDA graphs of parts of the layer.
            padding_mask: Bool [batch, sequence], True where a token is padding; None if no token is padding. Without
                `input_ids`, the token ids as `pack_token_ids` packs them.
            input_ids: Token ids, int64 [batch, sequence].

        Returns:
            The output [sequence, batch, hidden], and None in place of a bias.

        Raises:
            ValueError: No token ids, ids or padding of another shape, no layer number, intermediate tensors, or
                tensor-parallel training without sequence parallelism.
        """
        if intermediate_tensors is not None:
            raise ValueError("a MaskMoE layer cannot be captured in CUDA graphs: it was given intermediate tensors")
        token_ids = from_arguments(padding_mask, input_ids)
        if token_ids is None:
            raise ValueError(
                "a MaskMoE layer got no token ids. Build a MaskMoEGPTModel or MaskMoEHybridModel, or pass input_ids; "
                "inside these models, something between the model and the layer drops the ids"
            )
        if self.training and self.attn_tp_group.size() > 1 and not self.config.sequence_parallel:
            raise ValueError("mixture-of-experts training with tensor parallelism needs --sequence-parallel")
        token_ids = token_ids.transpose()

        def compute(hidden_states: Tensor) -> Tensor:
            finish_dispatch = self.dispatcher.start_dispatch(hidden_states, token_ids, self.router)
            # While tokens travel, compute the shared experts.
            shared_expert_output: Tensor | None = self.shared_experts_compute(hidden_states)  # pyrefly: ignore[bad-assignment]
            dispatched = finish_dispatch()
            del finish_dispatch  # which holds the received rows
            expert_output, bias = self.experts(
                dispatched.expert_input, dispatched.tokens_per_expert, dispatched.weights
            )
            if bias is not None:
                raise ValueError("experts with biases that are added later are not supported")
            output = dispatched.combine(expert_output)
            return output if shared_expert_output is None else output + shared_expert_output

        # Recomputation calls the same closure again, so it sees the token ids of its own micro-batch.
        if self.moe_layer_recompute and self.training:
            if self.config.fp8 or self.config.fp4:
                # As in `MoELayer`: only Transformer Engine's checkpointing restores the state of quantization.
                tracker = tensor_parallel.random.get_cuda_rng_tracker
                return te_checkpoint(compute, False, tracker, self.tp_group, hidden_states), None
            return tensor_parallel.checkpoint(compute, False, hidden_states), None
        return compute(hidden_states), None

    def give_ids_to(self, node: Any) -> None:
        """Let a node of Megatron's overlapped schedule route by the token ids of its micro-batch.

        The nodes call the layer's steps, but pass no ids to `route`. `node` is the one that calls `route`.
        """
        node.submodule = partial(self._call_with_ids, node.submodule)

    def _call_with_ids(self, submodule: Callable[..., Any], node: Any, *inputs: Tensor) -> Any:
        """Call the submodule of a node. Multi-token prediction shifts the ids in between, so give their place."""
        self._chunk_state = node.chunk_state
        try:
            return submodule(node, *inputs)
        finally:
            self._chunk_state = None

    def route(self, hidden_states: Tensor, padding_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Route tokens [sequence, batch, hidden] in a node of an overlapped schedule, see `give_ids_to`."""
        token_ids = from_arguments(self._chunk_state.padding_mask, None)
        assert token_ids is not None
        return self.router(hidden_states, token_ids.transpose())

    def _count_rows(self, experts: torch.nn.Module, inputs: tuple[Tensor, ...]) -> None:
        """Count the rows of this rank's experts, before the experts are computed."""
        if self.router.is_recording:
            self.router.statistics.count_rows(len(inputs[0]))
