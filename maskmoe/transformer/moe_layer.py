"""The mixture-of-experts layer whose router knows the ids of its tokens."""

from megatron.core import tensor_parallel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
from megatron.core.transformer.moe.moe_utils import get_default_pg_collection
from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher, MoETokenDispatcher
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.utils import get_pg_size
from torch import Tensor

from maskmoe.transformer.dispatch.kind import DispatchKind
from maskmoe.transformer.dispatch_plan import LayerPlan, plan_of
from maskmoe.transformer.one_copy_dispatcher import Dispatch, OneCopyDispatcher
from maskmoe.transformer.token_dispatcher import MaskMoEAlltoAllTokenDispatcher


class MaskMoELayer(MoELayer):
    """`MoELayer` with a masked router.

    Token ids arrive in `padding_mask`, the one per-token side tensor that Megatron-Core hands from the model through
    the block, the layers, recomputation and multi-token prediction down to `MoELayer.forward`; see `MaskMoEGPTModel`.

    Args: those of `MoELayer`.
    """

    def __init__(
        self,
        config: TransformerConfig,
        submodules: MoESubmodules | None = None,
        layer_number: int | None = None,
        pg_collection: ProcessGroupCollection | None = None,
        is_mtp_layer: bool = False,
        name: str | None = None,
    ):
        if pg_collection is None:
            pg_collection = get_default_pg_collection()
        super().__init__(config, submodules, layer_number, pg_collection, is_mtp_layer, name)
        self.one_copy_dispatcher = None
        kind = dispatch_kind(config, pg_collection, self.router.visible_experts.is_rank_local)
        if kind is not DispatchKind.STOCK:
            self.one_copy_dispatcher = OneCopyDispatcher(config.num_moe_experts, pg_collection.ep)
        # MoELayer chooses its dispatcher's class by name and cannot be told of another. That of all-gather goes by the
        # routing map alone.
        elif isinstance(self.token_dispatcher, MoEAlltoAllTokenDispatcher):
            self.token_dispatcher = self._build_token_dispatcher(pg_collection)
        if self.use_shared_expert and self.shared_expert_overlap:
            self.token_dispatcher.set_shared_experts(self.shared_experts)
        # Megatron-Core gives experts an optimizer of their own under expert parallelism only, and a checkpoint of one
        # arrangement cannot be loaded into the other. So they always get one.
        for parameter in self.experts.parameters():
            parameter.allreduce = False
        self.experts.register_forward_pre_hook(self.router.statistics.count_rows)

    def _build_token_dispatcher(self, pg_collection: ProcessGroupCollection) -> MoETokenDispatcher:
        return MaskMoEAlltoAllTokenDispatcher(
            self.num_local_experts,
            self.local_expert_indices,
            config=self.config,
            pg_collection=pg_collection,
            min_visible=self.router.visible_experts.min_visible,
        )

    def forward(
        self, hidden_states: Tensor, intermediate_tensors: None = None, padding_mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Route, dispatch, compute and combine.

        Args:
            hidden_states: [sequence, batch, hidden].
            intermediate_tensors: part of the signature this method overrides, for CUDA graphs, which are not supported.
            padding_mask: the token ids, int64 [batch, sequence], or ids and padding as `pack_token_ids` makes them.

        Returns:
            the output [sequence, batch, hidden] and the bias, None.

        Raises:
            ValueError: no token ids, intermediate tensors, or tensor parallel training without sequence parallel.
        """
        if intermediate_tensors is not None:
            raise ValueError("a MaskMoE layer cannot be captured in CUDA graphs: it was given intermediate tensors")
        if padding_mask is None:
            raise ValueError(
                "a MaskMoE layer got no token ids. Something between MaskMoEGPTModel and the layer drops `padding_mask`"
            )
        if self.training and self.attn_tp_group.size() > 1 and not self.config.sequence_parallel:
            raise ValueError("mixture-of-experts training with tensor parallelism needs --sequence-parallel")

        plan = plan_of(padding_mask)

        def layer_forward(hidden_states: Tensor, token_ids: Tensor) -> tuple[Tensor, Tensor | None]:
            shared_expert_output = self.shared_experts_compute(hidden_states)
            if self.one_copy_dispatcher is None:
                probs, routing_map = self.route(hidden_states, token_ids)
                permuted_tokens, probs = self.preprocess(hidden_states, probs, routing_map)
                dispatched_tokens, probs = self.dispatch(permuted_tokens, probs)
                output, bias = self.routed_experts_compute(dispatched_tokens, probs)
                return self.postprocess(self.combine(output), shared_expert_output), bias
            if plan is None:
                output = self._compute_with_one_copy(hidden_states, token_ids)
            else:
                output = self._compute_as_planned(hidden_states, token_ids, plan.of_table[self.router.table])
            return output if shared_expert_output is None else output + shared_expert_output, None

        token_ids = padding_mask.transpose(-2, -1)  # [..., sequence, batch]
        if self.moe_layer_recompute and self.training:
            # The ids are an argument, hence saved: recomputation sees those of its own micro-batch.
            return tensor_parallel.checkpoint(layer_forward, False, hidden_states, token_ids)
        return layer_forward(hidden_states, token_ids)

    def _compute_with_one_copy(self, hidden_states: Tensor, token_ids: Tensor) -> Tensor:
        """The routed experts' output [sequence, batch, hidden]; experts are chosen here, and then sent to."""
        probs, routing_map = self.route(hidden_states, token_ids)
        tokens = hidden_states.flatten(0, 1)
        received = self.one_copy_dispatcher.dispatch(tokens, probs, routing_map)
        return self._compute_experts(*received).view_as(hidden_states)

    def _compute_as_planned(self, hidden_states: Tensor, token_ids: Tensor, plan: LayerPlan) -> Tensor:
        """The same; tokens are sent first, and experts chosen by the rank that has all that their ids see."""
        rows = self.one_copy_dispatcher.send(hidden_states.flatten(0, 1), plan)
        probs, routing_map = self.router(rows.unsqueeze(1), plan.received_ids.unsqueeze(1), attaches_losses=False)
        output = self._compute_experts(*self.one_copy_dispatcher.dispatch_received(rows, probs, routing_map, plan))
        # The losses are over the tokens of this rank, which others have routed.
        return self.router.attach_losses(output, hidden_states, token_ids).view_as(hidden_states)

    def _compute_experts(self, expert_input: Tensor, weights: Tensor, dispatch: Dispatch) -> Tensor:
        """What the experts of all ranks make of this rank's tokens: [tokens, hidden]."""
        expert_output, bias = self.experts(expert_input, dispatch.tokens_per_expert, weights)
        if bias is not None:
            raise ValueError("experts with biases that are added later are not supported")
        return self.one_copy_dispatcher.combine(expert_output, dispatch)


def dispatch_kind(
    config: TransformerConfig, pg_collection: ProcessGroupCollection, is_rank_local: bool
) -> DispatchKind:
    """The best kind of dispatch that does all that the settings ask for.

    Args:
        config: of the model.
        pg_collection: process groups of its MoE layers.
        is_rank_local: every id sees experts of one expert-parallel rank only.
    """
    if (
        config.moe_token_dispatcher_type != "alltoall"
        or get_pg_size(pg_collection.ep) == 1
        or get_pg_size(pg_collection.expt_tp) > 1
        or config.moe_pad_expert_input_to_capacity
        or config.moe_shared_expert_overlap
        or config.moe_latent_size
    ):
        return DispatchKind.STOCK
    # Where logits are changed at random, or tokens are dropped, it matters which rank chooses.
    chooses_anywhere = (
        config.moe_expert_capacity_factor is None
        and config.moe_input_jitter_eps is None
        and not config.moe_router_force_load_balancing
        and config.moe_router_force_biased is None
    )
    if is_rank_local and chooses_anywhere:
        return DispatchKind.PLANNED
    # With one expert a token, what Megatron sends is one copy.
    return DispatchKind.STOCK if config.moe_router_topk == 1 else DispatchKind.ONE_COPY
