"""Decides whether the folder in `--save` belongs to a run."""

from argparse import Namespace
from pathlib import Path

from maskmoe.checkpoint.series import has_checkpoint, saved_iterations
from maskmoe.errors import UserError


def loads_what_it_saves(args: Namespace) -> bool:
    """Return whether a run loads from the folder to which it saves.

    Args:
        args: Megatron's arguments.
    """
    return bool(args.save and args.load) and Path(args.save).resolve() == Path(args.load).resolve()


def check_save_folder_is_own(args: Namespace, checkpoint: Path | None) -> None:
    """Check that a run that starts from the beginning does not write over the checkpoints of another run.

    A run that saves to the folder from which it loads continues the run of this folder. A run that loads from another
    folder may have been interrupted and started again, so its checkpoints may be in `--save` already.

    Args:
        args: Megatron's arguments.
        checkpoint: The checkpoint to load; None if the run starts from the beginning.

    Raises:
        UserError: The folder in `--save` holds checkpoints of another run.
    """
    if args.save is None or checkpoint is not None or loads_what_it_saves(args) or not has_checkpoint(args.save):
        return
    newest = max(saved_iterations(args.save), default=None)
    which = f"of iteration {newest} " if newest is not None else ""
    raise UserError(
        f"--save {args.save} holds a checkpoint {which}already, and this run would start from the beginning and write "
        f"over it: pass --load {args.save} to continue that run, or save to another folder"
    )
