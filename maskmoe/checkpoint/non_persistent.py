"""Non-persistent checkpoints: frequent ones, of which a run keeps only the newest, on a fast file system if wanted.

Megatron saves them at `--non-persistent-save-interval`, between the checkpoints of `--save-interval`, in the format of
all checkpoints. They lie in a folder of their own, so they neither count for `--keep-last-checkpoints` nor are found by
programs that look for the checkpoints of a run.
"""

import shutil
from argparse import Namespace
from pathlib import Path

from maskmoe.checkpoint.series import checkpoint_path, remove_old_checkpoints, saved_iterations
from maskmoe.errors import UserError

_SUBFOLDER = "non_persistent"  # Megatron's name


def non_persistent_folder(args: Namespace, folder: str | Path | None) -> Path | None:
    """Return the folder of a run's non-persistent checkpoints; None if the run neither saves nor loads any.

    Args:
        args: Megatron's arguments.
        folder: the folder in `--save` or `--load`.
    """
    if args.non_persistent_ckpt_type != "global" or folder is None:
        return None
    return Path(args.non_persistent_global_ckpt_dir or Path(folder) / _SUBFOLDER)


def is_non_persistent(args: Namespace, checkpoint: Path | None) -> bool:
    """Return whether a checkpoint that was chosen for `--load` is a non-persistent one.

    Args:
        args: Megatron's arguments.
        checkpoint: the folder of the checkpoint; None if there is none.
    """
    return checkpoint is not None and checkpoint.parent == non_persistent_folder(args, args.load)


def check_separate_folder(args: Namespace) -> None:
    """Check that removing non-persistent checkpoints cannot remove other checkpoints.

    Raises:
        UserError: the folder of non-persistent checkpoints is the folder of other checkpoints, or contains it.
    """
    if args.non_persistent_global_ckpt_dir is None:
        return
    folder = Path(args.non_persistent_global_ckpt_dir).resolve()
    for flag, other in (("--save", args.save), ("--load", args.load)):
        if other is not None and Path(other).resolve().is_relative_to(folder):
            raise UserError(
                f"--non-persistent-global-ckpt-dir {args.non_persistent_global_ckpt_dir} holds the folder of {flag} "
                f"{other}, whose checkpoints must stay: pass a folder of its own"
            )


def make_room(folder: Path, iteration: int, loaded: int | None = None) -> None:
    """Remove the non-persistent checkpoints that a save makes useless; the newest sound checkpoint stays.

    A checkpoint of `iteration` or later is left of an unfinished save, or of a run that went back to an earlier
    iteration. Megatron would keep it as the newest one, and remove the sound one.

    Args:
        folder: the folder of the non-persistent checkpoints.
        iteration: the iteration that will be saved.
        loaded: the iteration from which the run has resumed, for the first save of the run: later checkpoints were
            rejected on loading, or left behind. None in later saves.
    """
    for saved in saved_iterations(folder):
        checkpoint = checkpoint_path(folder, saved)
        if (saved >= iteration or (loaded is not None and saved > loaded)) and not checkpoint.is_symlink():
            shutil.rmtree(checkpoint, ignore_errors=True)
    keep_newest(folder)


def keep_newest(folder: Path) -> None:
    """Remove all non-persistent checkpoints that are older than the newest sound one."""
    remove_old_checkpoints(folder, keep=1)
