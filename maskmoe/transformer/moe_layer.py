"""The mixture-of-experts layer whose router knows the ids of its tokens."""

from megatron.core import tensor_parallel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
from megatron.core.transformer.moe.moe_utils import get_default_pg_collection
from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher, MoETokenDispatcher
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from maskmoe.transformer.one_copy_dispatcher import OneCopyDispatcher
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
        # MoELayer chooses its dispatcher's class by name and cannot be told of another. That of all-gather goes by the
        # routing map alone.
        if isinstance(self.token_dispatcher, MoEAlltoAllTokenDispatcher):
            self.token_dispatcher = self._build_token_dispatcher(pg_collection)
        self.one_copy_dispatcher = None
        if can_send_one_copy(config, pg_collection):
            self.one_copy_dispatcher = OneCopyDispatcher(config.num_moe_experts, pg_collection.ep)
        if self.use_shared_expert and self.shared_expert_overlap:
            self.token_dispatcher.set_shared_experts(self.shared_experts)
        # Megatron-Core gives experts an optimizer of their own under expert parallelism only, and a checkpoint of one
        # arrangement cannot be loaded into the other. So they always get one.
        for parameter in self.experts.parameters():
            parameter.allreduce = False

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

        def layer_forward(hidden_states: Tensor, token_ids: Tensor) -> tuple[Tensor, Tensor | None]:
            shared_expert_output = self.shared_experts_compute(hidden_states)
            probs, routing_map = self.route(hidden_states, token_ids)
            if self.one_copy_dispatcher is not None:
                output = self._compute_with_one_copy(hidden_states, probs, routing_map)
                return output if shared_expert_output is None else output + shared_expert_output, None
            permuted_tokens, probs = self.preprocess(hidden_states, probs, routing_map)
            dispatched_tokens, probs = self.dispatch(permuted_tokens, probs)
            output, bias = self.routed_experts_compute(dispatched_tokens, probs)
            output = self.postprocess(self.combine(output), shared_expert_output)
            return output, bias

        token_ids = padding_mask.transpose(-2, -1)  # [..., sequence, batch]
        if self.moe_layer_recompute and self.training:
            # The ids are an argument, hence saved: recomputation sees those of its own micro-batch.
            return tensor_parallel.checkpoint(layer_forward, False, hidden_states, token_ids)
        return layer_forward(hidden_states, token_ids)

    def _compute_with_one_copy(self, hidden_states: Tensor, probs: Tensor, routing_map: Tensor) -> Tensor:
        """The routed experts' output [sequence, batch, hidden]."""
        tokens = hidden_states.flatten(0, 1)
        expert_input, weights, dispatch = self.one_copy_dispatcher.dispatch(tokens, probs, routing_map)
        expert_output, bias = self.experts(expert_input, dispatch.tokens_per_expert, weights)
        if bias is not None:
            raise ValueError("experts with biases that are added later are not supported")
        return self.one_copy_dispatcher.combine(expert_output, dispatch).view_as(hidden_states)


def can_send_one_copy(config: TransformerConfig, pg_collection: ProcessGroupCollection) -> bool:
    """Whether `OneCopyDispatcher` does all that the settings ask of a dispatcher, and there are ranks to send to."""
    return (
        config.moe_token_dispatcher_type == "alltoall"
        and pg_collection.ep.size() > 1
        and pg_collection.expt_tp.size() == 1
        and not config.moe_pad_expert_input_to_capacity
        and not config.moe_shared_expert_overlap
        and not config.moe_latent_size
    )
