"""The routing mask on the device: look up the experts that each token may use."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.utils import get_pg_rank, get_pg_size, make_sharded_tensor_for_checkpoint
from torch import Tensor

from maskmoe.checkpoint.read_routing_mask import BUFFERS, buffers_of_routing_mask, routing_mask_from_buffers
from maskmoe.errors import UserError
from maskmoe.routing_mask.feed_forward_layers import FeedForwardLayers
from maskmoe.routing_mask.mask import RoutingMask

_ALIGNMENT = 16
"""Bytes; compiled code copies each tensor that does not begin at a multiple, in every call."""


@dataclass(frozen=True)
class VisibleSets:
    """The visible sets of the tokens of one micro-batch in one layer.

    Attributes:
        experts: Bool [tokens, experts], the experts that each token may use.
        routable: Bool [tokens], tokens with at least two visible experts; None if all tokens are known to be routable.
    """

    experts: Tensor
    routable: Tensor | None


class MaskTable(NamedTuple):
    """One table of the routing mask on the device.

    Attributes:
        row_of_id: Integers [vocab], the row of each id. Rows below N are sets of one expert, row i is expert i alone.
        visible_bits: Uint8 [rows, bytes], the visible set of each row.
        bit_values: Uint8 [8], the value of each bit of a byte.
        num_experts: N.
        has_single: Whether some id may have one visible expert.
    """

    row_of_id: Tensor
    visible_bits: Tensor
    bit_values: Tensor
    num_experts: int
    has_single: bool

    def look_up(self, token_ids: Tensor) -> VisibleSets:
        """Look up the visible sets of ids, int64 [tokens], each smaller than the mask's vocabulary size."""
        rows = self.row_of_id.index_select(0, token_ids).long()  # [tokens]
        visible_bytes = self.visible_bits.index_select(0, rows)  # uint8 [tokens, bytes]
        bits = visible_bytes.unsqueeze(-1).bitwise_and(self.bit_values)  # 0 or the value of the bit
        experts = bits.flatten(-2)[..., : self.num_experts].bool()
        return VisibleSets(experts, routable=rows >= self.num_experts if self.has_single else None)


class VisibleExperts(torch.nn.Module):
    """Looks up the visible set of every token, and carries the routing mask in the model's checkpoints.

    All routers of a model share one instance. Its buffers are integers, which `Float16Module` does not convert. A
    checkpoint holds the buffers under `routing_mask.*`. Loading a checkpoint never changes the mask: it fails if the
    checkpoint was made with another mask, except with the mask in `replaces`.

    Args:
        config: The model's configuration.
        mask: The routing mask; must fit the model's experts and layers.
        pg_collection: Process groups of the model, by default Megatron's; saving uses `tp`, `pp` and `dp_cp`.
        vp_stage: The model chunk of this rank that holds the instance, if the pipeline is interleaved.
        replaces: The other mask that the checkpoint to load was made with; None if it was made with `mask`.
        hybrid_layer_pattern: The pattern of a `HybridModel`; None for a `GPTModel`.
        is_added: The checkpoint to load is of Megatron-Core's own model and holds no mask.

    Attributes:
        layers: The feed-forward layers of the model.
        is_rank_local: Whether the visible experts of every id are on one expert-parallel rank.
        min_visible: The smallest number of visible experts of any id.
        max_visible: The largest number of visible experts of any id, for each table.

    Raises:
        UserError: The mask does not fit the model's experts or layers.
    """

    row_of_id: Tensor
    visible_bits: Tensor
    metadata: Tensor
    bit_values: Tensor
    first_expert_of_row: Tensor
    num_visible_of_row: Tensor

    def __init__(
        self,
        config: TransformerConfig,
        mask: RoutingMask,
        pg_collection: ProcessGroupCollection | None = None,
        vp_stage: int | None = None,
        replaces: RoutingMask | None = None,
        hybrid_layer_pattern: str | None = None,
        is_added: bool = False,
    ) -> None:
        super().__init__()
        if hybrid_layer_pattern is not None:
            self.layers = FeedForwardLayers.of_pattern(hybrid_layer_pattern)
        else:
            num_predictions = config.mtp_num_layers or 0
            self.layers = FeedForwardLayers.of_frequency(config.moe_layer_freq, config.num_layers, num_predictions)
        assert config.num_moe_experts is not None
        mask.check_fits(vocab_size=mask.vocab_size, num_experts=config.num_moe_experts, layers=self.layers)
        self.pg_collection = pg_collection or ProcessGroupCollection.use_mpu_process_groups()
        self.vp_stage = vp_stage or 0
        self.num_experts = mask.num_experts
        self.vocab_size = mask.vocab_size
        self.min_visible = mask.min_visible
        self.max_visible = [int(mask.num_visible_of_layer(table).max()) for table in range(len(mask.row_of_id))]
        self.digest = mask.digest
        self._replaces = replaces
        self._is_added = is_added
        for name, buffer in buffers_of_routing_mask(mask).items():
            self.register_buffer(name, buffer)
        ep_size = config.expert_model_parallel_size
        self.is_rank_local = ep_size > 1 and mask.is_rank_local(ep_size)
        if self.is_rank_local:
            self.register_buffer("first_expert_of_row", torch.from_numpy(mask.first_visible()), persistent=False)
            num_visible = torch.from_numpy(mask.row_sizes.astype(np.int16))
            self.register_buffer("num_visible_of_row", num_visible, persistent=False)
        self.register_buffer("bit_values", torch.from_numpy(1 << np.arange(8, dtype=np.uint8)), persistent=False)
        self._align_tables()

    def _align_tables(self) -> None:
        """Let each table in the buffers begin at a multiple of `_ALIGNMENT`."""
        for name in ("row_of_id", "visible_bits"):
            tables = getattr(self, name)  # [tables, …]
            flat = tables.flatten(1)
            padding = -flat.shape[1] % (_ALIGNMENT // tables.element_size())
            padded = torch.nn.functional.pad(flat, (0, padding))
            setattr(self, name, padded[:, : flat.shape[1]].unflatten(1, tables.shape[1:]))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "VisibleExperts":
        """Move the buffers to another device, which removes the space between tables."""
        super()._apply(fn, recurse)
        self._align_tables()
        return self

    def table_of_layer(self, number: int) -> int:
        """Return the table of a MoE layer by its number among the feed-forward layers, counting from 1.

        Raises:
            ValueError: No MoE layer of the model has this number.
        """
        has_experts = self.layers.has_experts
        if not (1 <= number <= len(has_experts) and has_experts[number - 1]):
            numbers = ", ".join(str(index) for index, is_moe in enumerate(has_experts, start=1) if is_moe)
            raise ValueError(
                f"no MoE layer of the model has the number {number}, only {numbers}: call set_layer_number(…) with the "
                "layer's number among the feed-forward layers, counting from 1"
            )
        return self.layers.table(number, num_tables=len(self.row_of_id))

    def mask_table(self, number: int) -> MaskTable:
        """Return a table of the mask; see `table_of_layer`."""
        return MaskTable(
            self.row_of_id[number],
            self.visible_bits[number],
            self.bit_values,
            self.num_experts,
            has_single=self.min_visible == 1,
        )

    def first_and_size(self, token_ids: Tensor, tables: Tensor) -> tuple[Tensor, Tensor]:
        """Return first and number of the visible experts of each id; only for a rank-local mask.

        Ids are int64 [tokens], tables int64 [tables], and both results int64 [tables, tokens].
        """
        tables = tables.unsqueeze(1)
        rows = self.row_of_id[tables, token_ids].long()
        return self.first_expert_of_row[tables, rows].long(), self.num_visible_of_row[tables, rows].long()

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> dict[str, Any]:
        """Return the mask's tensors for a checkpoint; one rank and model chunk writes them, since all hold the same.

        The checkpoint reader overwrites the tensors that it is given. It is given copies, so that the run's own mask is
        still available to compare with. Until a checkpoint with the mask in `replaces` is loaded, the tensors are those
        of that mask, because the reader needs tensors of the shapes in the checkpoint. Until a checkpoint without a
        mask is loaded, there are none.
        """
        if self._is_added:
            return {}
        buffers = self.state_dict() if self._replaces is None else buffers_of_routing_mask(self._replaces)
        chunk = self.vp_stage * get_pg_size(self.pg_collection.pp) + get_pg_rank(self.pg_collection.pp)
        replica_id = (chunk, get_pg_rank(self.pg_collection.tp), get_pg_rank(self.pg_collection.dp_cp))
        return {
            f"{prefix}{name}": make_sharded_tensor_for_checkpoint(
                buffer.to(self.row_of_id.device, copy=True),
                f"{prefix}{name}",
                replica_id=replica_id,
                tp_group=self.pg_collection.tp,
                dp_cp_group=self.pg_collection.dp_cp,
            )
            for name, buffer in buffers.items()
        }

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        """Compare the checkpoint's mask with this mask, or with the mask that this mask replaces.

        Raises:
            UserError: The checkpoint was made with another routing mask, or holds only a part of a mask.
        """
        loaded = {name: state_dict[prefix + name] for name in BUFFERS if prefix + name in state_dict}
        if self._is_added and not loaded:
            self._is_added = False
            return
        if loaded:  # A part of a mask has no digest to compare, and is refused as damaged.
            expected = self.digest if self._replaces is None else self._replaces.digest
            check_same_mask(expected, routing_mask_from_buffers(loaded).digest)
            if self._replaces is not None:
                # Keep this mask: its tensors may have other shapes than the checkpoint's.
                self._replaces = None
                return
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


def check_same_mask(run_digest: str, checkpoint_digest: str, further_cure: str = "") -> None:
    """Raise a UserError that names both masks if their digests differ; `further_cure` ends the message."""
    if run_digest != checkpoint_digest:
        raise UserError(
            f"the checkpoint was made with routing mask {checkpoint_digest[:16]}…, this run was given "
            f"{run_digest[:16]}…; pass the checkpoint's mask, or leave --routing-mask out to use it{further_cure}"
        )
