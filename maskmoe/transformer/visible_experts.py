"""The routing mask on the device: from token ids to the experts each token may use."""

import json
from dataclasses import dataclass

import numpy as np
import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.utils import get_pg_rank, get_pg_size, make_sharded_tensor_for_checkpoint
from torch import Tensor

from maskmoe.errors import UserError
from maskmoe.routing_mask.locality import rank_of_rows
from maskmoe.routing_mask.mask import RoutingMask

# The name of this module inside the model, hence the prefix of the mask's tensors in every checkpoint.
CHECKPOINT_PREFIX = "routing_mask."
_BUFFERS = ("row_of_id", "visible_bits", "metadata")


@dataclass(frozen=True)
class VisibleSets:
    """The visible sets of the tokens that one router sees in one micro-batch."""

    experts: Tensor
    """bool [tokens, experts]: which experts each token may use."""

    routable: Tensor | None
    """bool [tokens]: tokens with at least two visible experts; None if all tokens are known to be routable."""


class VisibleExperts(MegatronModule):
    """Looks up the visible set of every token, and carries the routing mask in the model's checkpoints.

    All routers of a model share one instance. Its buffers are integers, so that `Float16Module` leaves them alone.
    A checkpoint holds them under `routing_mask.*`; loading one that was made with another mask is refused.

    Args:
        config: the model's configuration.
        mask: the routing mask; must fit the model's number of experts and layers.
        pg_collection: process groups of the model (`tp`, `pp`, `dp_cp` are used when saving).
        vp_stage: which of the rank's model chunks holds this instance, if the pipeline is interleaved.
    """

    def __init__(
        self,
        config: TransformerConfig,
        mask: RoutingMask,
        pg_collection: ProcessGroupCollection,
        vp_stage: int | None = None,
    ):
        super().__init__(config)
        self.pg_collection = pg_collection
        self.vp_stage = vp_stage or 0
        self.num_experts = mask.num_experts
        self.vocab_size = mask.vocab_size
        self.min_visible = mask.min_visible
        self.digest = mask.digest
        self.is_shared = mask.is_shared
        for name, buffer in buffers_of_routing_mask(mask).items():
            self.register_buffer(name, buffer)
        ep_size = config.expert_model_parallel_size
        rank_of_row = rank_of_rows(mask, ep_size) if ep_size > 1 else None
        self.is_rank_local = rank_of_row is not None
        if self.is_rank_local:
            num_visible_of_row = mask.row_sizes.astype(np.int16)
            self.register_buffer("rank_of_row", torch.from_numpy(rank_of_row), persistent=False)
            self.register_buffer("num_visible_of_row", torch.from_numpy(num_visible_of_row), persistent=False)
        self.register_buffer("bit_of_byte", torch.arange(8, dtype=torch.uint8), persistent=False)

    def table_of_layer(self, layer_number: int) -> int:
        """The table of the layer that Megatron numbers `layer_number`, counting from 1."""
        return 0 if self.is_shared else layer_number - 1

    def forward(self, token_ids: Tensor, table: int) -> VisibleSets:
        """Look up visible sets.

        Args:
            token_ids: int64 [tokens], each smaller than the mask's vocabulary size.
            table: which table to use, see `table_of_layer`.
        """
        rows = self.row_of_id[table].index_select(0, token_ids).long()  # [tokens]
        experts = self._unpack(self.visible_bits[table].index_select(0, rows))
        # Rows below N are the singletons, so a larger row means two or more visible experts.
        routable = rows >= self.num_experts if self.min_visible == 1 else None
        return VisibleSets(experts=experts, routable=routable)

    def ranks_of(self, token_ids: Tensor, tables: Tensor) -> tuple[Tensor, Tensor]:
        """Where the visible experts of ids are, under a rank-local mask, and how many they are.

        Args:
            token_ids: int64 [ranks, tokens].
            tables: int64 [tables], which to use.

        Returns:
            the expert-parallel rank and the number: int64 [tables, ranks, tokens] each.
        """
        rows = self.row_of_id[tables][:, token_ids].long()
        flat = rows.flatten(1)
        return tuple(
            of_row[tables].gather(1, flat).view_as(rows).long()
            for of_row in (self.rank_of_row, self.num_visible_of_row)
        )

    def _unpack(self, visible_bytes: Tensor) -> Tensor:
        """uint8 [..., bytes] to bool [..., experts]."""
        bits = visible_bytes.unsqueeze(-1).bitwise_right_shift(self.bit_of_byte).bitwise_and_(1)
        return bits.flatten(-2)[..., : self.num_experts].bool()

    def sharded_state_dict(self, prefix="", sharded_offsets=(), metadata=None):
        """The mask is the same on all ranks and in all model chunks: one of them writes it.

        The checkpoint reader fills the tensors it is given in place. It gets copies, so that the mask of this run
        is still there to compare with.
        """
        chunk = self.vp_stage * get_pg_size(self.pg_collection.pp) + get_pg_rank(self.pg_collection.pp)
        replica_id = (chunk, get_pg_rank(self.pg_collection.tp), get_pg_rank(self.pg_collection.dp_cp))
        return {
            f"{prefix}{name}": make_sharded_tensor_for_checkpoint(
                buffer.clone(),
                f"{prefix}{name}",
                replica_id=replica_id,
                tp_group=self.pg_collection.tp,
                dp_cp_group=self.pg_collection.dp_cp,
            )
            for name, buffer in self.state_dict().items()
        }

    def _load_from_state_dict(self, state_dict, prefix, *args, **kwargs):
        """Refuse the tensors of another mask.

        Raises:
            UserError: the checkpoint was made with another routing mask.
        """
        loaded = {name: state_dict[prefix + name] for name in _BUFFERS if prefix + name in state_dict}
        if len(loaded) == len(_BUFFERS):
            check_same_mask(self.digest, routing_mask_from_buffers(loaded).digest)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


def buffers_of_routing_mask(mask: RoutingMask) -> dict[str, Tensor]:
    """A routing mask as tensors, by the names that a `VisibleExperts` has them by.

    `row_of_id` [tables, vocab], `visible_bits` [tables, rows, bytes], and `metadata`, a JSON text as uint8 [bytes].
    """
    tensors, metadata = mask.to_tensors()
    buffers = {name: torch.from_numpy(array) for name, array in tensors.items()}
    return buffers | {"metadata": torch.frombuffer(bytearray(json.dumps(metadata).encode()), dtype=torch.uint8)}


def routing_mask_from_buffers(buffers: dict[str, Tensor]) -> RoutingMask:
    """The routing mask that the buffers of a `VisibleExperts` describe, verified.

    Raises:
        UserError: they are damaged or altered.
    """
    try:
        arrays = {name: buffer.cpu().numpy() for name, buffer in buffers.items()}
        metadata = json.loads(arrays.pop("metadata").tobytes())
    except (KeyError, TypeError, ValueError, RecursionError):  # as good as none, which is refused below
        arrays, metadata = {}, None
    return RoutingMask.from_tensors(arrays, metadata, source="the checkpoint's routing mask")


def check_same_mask(run_digest: str, checkpoint_digest: str) -> None:
    """Raise a UserError that names both masks if they differ."""
    if run_digest != checkpoint_digest:
        raise UserError(
            f"the checkpoint was made with routing mask {checkpoint_digest[:16]}…, this run was given "
            f"{run_digest[:16]}…; pass the checkpoint's mask, or leave --routing-mask out to use it"
        )
