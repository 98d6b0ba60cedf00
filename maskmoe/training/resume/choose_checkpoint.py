"""Finds the newest intact checkpoint to resume from, which all ranks verify together, and checks `--save`."""

import json
import os
import sys
from argparse import Namespace
from itertools import count
from pathlib import Path

from maskmoe.checkpoint.errors import CheckpointError
from maskmoe.checkpoint.integrity import check_content, check_structure, has_digests
from maskmoe.checkpoint.reading import read_common_state
from maskmoe.checkpoint.series import (
    RELEASE,
    TRACKER,
    checkpoint_path,
    choose_checkpoint,
    describe_missing,
    is_finished,
    newest_intact,
    read_tracker,
    saved_iterations,
)
from maskmoe.errors import UserError
from maskmoe.training.ranks import Ranks
from maskmoe.training.resume.model_settings import check_same_model


def find_checkpoint(args: Namespace, ranks: Ranks) -> Path | None:
    """Return the checkpoint to load, whose content all ranks verify together; None to start from the beginning.

    The first rank chooses, because the file system may not show all ranks the same files at the same time. Damaged
    checkpoints are skipped with a warning. All ranks must call this function.

    Raises:
        UserError: There are checkpoints, but none is intact.
    """
    if args.load is None:
        return None
    candidates = (f"checkpoint/{number}" for number in count())
    if ranks.rank > 0:
        # Verify a share of each candidate of the first rank, until it has chosen one.
        for key in candidates:
            is_chosen, path = json.loads(ranks.broadcast(key))
            if is_chosen:
                return Path(path) if path else None
            _find_damages(Path(path), ranks, key)

    def check(checkpoint: Path) -> None:
        check_structure(checkpoint)
        if args.verify_checkpoint:
            key = next(candidates)
            ranks.broadcast(key, json.dumps([False, str(checkpoint)]))
            for damage in _find_damages(checkpoint, ranks, key):
                raise CheckpointError(checkpoint, damage)

    choice = choose_checkpoint(args.load, args.ckpt_step, check)
    chosen = choice.checkpoint
    for fault in choice.rejected:
        print(f"warning: checkpoint {fault}", file=sys.stderr, flush=True)
    if chosen is not None and args.verify_checkpoint and not has_digests(chosen):
        warning = f"warning: checkpoint {chosen} has no digests of its files, so its content is not verified"
        print(warning, file=sys.stderr, flush=True)
    if choice.rejected:
        start = f"resuming from {chosen}" if chosen else "starting from the beginning"
        print(f"warning: {start}", file=sys.stderr, flush=True)
    ranks.broadcast(next(candidates), json.dumps([True, str(chosen or "")]))
    return chosen


def _find_damages(checkpoint: Path, ranks: Ranks, key: str) -> list[str]:
    """Let each rank verify a share of a checkpoint's files, and return the damages that the ranks find."""
    damage = ""
    try:
        check_content(checkpoint, slice(ranks.rank, None, ranks.world_size))
    except CheckpointError as found:
        damage = found.fault
    return list(filter(None, ranks.gather(f"{key}/damage", damage)))


def check_not_missing(args: Namespace, checkpoint: Path | None) -> None:
    """Raise `UserError` if there is no checkpoint in `--load`, and the run may not begin without one.

    A run may begin without a checkpoint in the folder to which it saves, but not with `--exit-on-missing-checkpoint`.
    """
    if args.load is None or checkpoint is not None or args.pretrained_checkpoint is not None:
        return
    if args.exit_on_missing_checkpoint:
        cure = "; leave --exit-on-missing-checkpoint out to start from the beginning"
    elif not loads_what_it_saves(args):
        cure = "" if args.skip_train else "; leave --load out to start from random weights"
    else:
        return
    raise UserError(f"--load {describe_missing(args.load)}{cure}")


def checkpoint_to_load(args: Namespace) -> Path | None:
    """Return the checkpoint that `find_checkpoint` chose, after its choice was stored in the arguments."""
    if args.load is None:
        return None
    iteration = args.ckpt_step
    checkpoint = Path(args.load) / RELEASE if iteration is None else checkpoint_path(args.load, iteration)
    return checkpoint if checkpoint.exists() else None


def pretrained_to_load(args: Namespace) -> Path | None:
    """Return the checkpoint in `--pretrained-checkpoint` with whose weights the run begins; None if there is none.

    Megatron prefers a checkpoint in `--load`, which `find_checkpoint` has chosen, and otherwise loads the pretrained
    checkpoint that the tracker file names.
    """
    if args.pretrained_checkpoint is None or checkpoint_to_load(args) is not None:
        return None
    folder = Path(args.pretrained_checkpoint)
    tracked = read_tracker(folder)
    if tracked is None or tracked == RELEASE:
        return None if tracked is None else folder / RELEASE
    return checkpoint_path(folder, int(args.ckpt_step or tracked))


def check_pretrained_model(args: Namespace, checkpoint: Path | None, ranks: Ranks | None = None) -> None:
    """Check the checkpoint in `--pretrained-checkpoint` if the run begins with its weights and not with `checkpoint`.

    All `ranks` must call this function and verify the content of the files together; None compares only the sizes.

    Raises:
        UserError: There is no checkpoint, or the checkpoint is damaged or holds another model.
    """
    if checkpoint is not None or args.pretrained_checkpoint is None:
        return
    folder, pretrained = args.pretrained_checkpoint, pretrained_to_load(args)
    if pretrained is None:
        raise UserError(f"--pretrained-checkpoint {folder} holds no checkpoint: there is no usable {TRACKER}")
    cure = f"Write the iteration of another checkpoint, if there is one, into {TRACKER}"
    try:
        check_structure(pretrained)
    except CheckpointError as damage:
        raise UserError(f"--pretrained-checkpoint {folder}: {damage}. {cure}") from damage
    if ranks is not None and args.verify_checkpoint:
        for damage in _find_damages(pretrained, ranks, "pretrained checkpoint"):
            raise UserError(f"--pretrained-checkpoint {folder}: {pretrained} {damage}. {cure}")
    check_same_model(Namespace(**vars(args) | {"finetune": True}), pretrained)


def loads_what_it_saves(args: Namespace) -> bool:
    """Return whether a run loads from the folder to which it saves."""
    return bool(args.save and args.load) and Path(args.save).resolve() == Path(args.load).resolve()


def must_save_a_complete_run(args: Namespace) -> bool:
    """Return whether `--save` lacks the checkpoint that a run loads, so that even a complete run has to save it."""
    return args.save is not None and not loads_what_it_saves(args)


def check_save_folder_is_own(args: Namespace, checkpoint: Path | None) -> None:
    """Raise `UserError` if a run would write over, or remove, checkpoints that it does not continue.

    The checkpoints in `--save` are the run's own in two cases: the run resumes from the same folder; or it loads from
    another folder, and the newest checkpoint in `--save` has loaded from there, too, because the run was started again.
    The folder that an interrupted save leaves is no checkpoint.
    """
    if args.save is None:
        return
    folder, is_same_folder = Path(args.save), loads_what_it_saves(args)
    starts_anew = checkpoint is None or args.finetune
    if is_same_folder and not starts_anew:
        return
    saved = [step for step in saved_iterations(folder) if is_finished(checkpoint_path(folder, step))]
    is_empty = not saved and (checkpoint is None if is_same_folder else not (folder / TRACKER).is_file())
    if is_empty or (not starts_anew and _has_loaded_from(args.load, folder)):
        return
    which = f"of iteration {saved[0]} " if saved else ""
    start = "start at iteration 0" if starts_anew else f"continue the run in --load {args.load}"
    raise UserError(
        f"{folder} holds a checkpoint {which}already, and this run would {start} and write over it: save to another "
        f"folder, or pass --load {args.save} without --finetune to continue the run in --save"
    )


def _has_loaded_from(load: str, folder: Path) -> bool:
    """Return whether the run of the newest intact checkpoint in a folder had this `--load`; True without any.

    Raises:
        UserError: The checkpoint's files have the right sizes, but its arguments are damaged.
    """
    newest = newest_intact(folder)
    if newest is None:
        return True
    try:
        saved = read_common_state(checkpoint_path(folder, newest)).get("args")
    except CheckpointError as error:
        raise UserError(f"{error}: save to another folder") from error
    return Path(getattr(saved, "load", None) or os.devnull).resolve() == Path(load).resolve()
