"""Chooses the routing mask of a run: the mask in `--routing-mask`, or the mask of the checkpoint."""

from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

from maskmoe.checkpoint.routing_mask import read_routing_mask
from maskmoe.routing_mask.mask import MaskChange, RoutingMask
from maskmoe.training.settings.arguments import may_change_mask
from maskmoe.transformer.visible_experts import check_same_mask


def find_routing_mask(args: Namespace, checkpoint: Path | None, report: Callable[[str], None]) -> RoutingMask | None:
    """Return the routing mask in `--routing-mask` or, without the flag, of the checkpoint; None without experts.

    Args:
        args: Megatron's arguments.
        checkpoint: The checkpoint to load, if there is one.
        report: Takes one line about the change of masks if the arguments have `--change-routing-mask`.

    Raises:
        UserError: The mask of the flag and the mask of the checkpoint differ although the
            arguments lack `--change-routing-mask`, or in their sizes.
    """
    if not args.num_experts:
        return None
    masks = [read_routing_mask(source) for source in (args.routing_mask, checkpoint) if source is not None]
    own, of_checkpoint = masks[0], masks[-1]
    if may_change_mask(args):
        report(f"routing mask: {_describe_change(of_checkpoint, own, args.expert_model_parallel_size)}")
    else:
        is_training = hasattr(args, "change_routing_mask")
        cure = "; pass --change-routing-mask to change visible experts on purpose" if is_training else ""
        check_same_mask(own.digest, of_checkpoint.digest, cure)
    return own


def _describe_change(old: RoutingMask, new: RoutingMask, num_ranks: int) -> str:
    """Describe how the mask of a run differs from the mask of the checkpoint, in one line.

    Args:
        old: The mask of the checkpoint; the mask of the run if no checkpoint is loaded.
        new: The mask of the run.
        num_ranks: Expert-parallel ranks of the run.

    Raises:
        UserError: The masks have different sizes.
    """
    if old.digest == new.digest:
        return (
            f"--change-routing-mask changes nothing, no checkpoint with another mask than {new.digest[:16]}… is loaded"
        )
    described = f"{old.digest[:16]}… of the checkpoint → {new.digest[:16]}…: {MaskChange.between(old, new)}"
    if num_ranks > 1 and new.num_experts % num_ranks == 0:
        was_local, is_local = (mask.rank_of_rows(num_ranks) is not None for mask in (old, new))
        if was_local != is_local:
            described += f"; the visible experts of each id are {'now' if is_local else 'no longer'} on one rank"
    return described
