"""Decides which checkpoint a run loads: the newest intact one, which all ranks verify together; and checks `--save`."""

import os
import sys
from argparse import Namespace
from pathlib import Path

from maskmoe.checkpoint.integrity import COMPLETION_FILE, check_content, check_structure, has_digests, iteration_of
from maskmoe.checkpoint.reading import CheckpointError, read_common_state
from maskmoe.checkpoint.series import (
    RELEASE,
    TRACKER,
    Choice,
    checkpoint_path,
    choose_checkpoint,
    describe_missing,
    saved_iterations,
)
from maskmoe.errors import UserError
from maskmoe.training.ranks import Ranks


def choose_checkpoint_of_run(args: Namespace, ranks: Ranks) -> Path | None:
    """Return the checkpoint in `--load` or else `--pretrained-checkpoint`, and store the choice in the arguments.

    A run may begin without a checkpoint in the folder to which it saves, but not with `--exit-on-missing-checkpoint`.
    All ranks must call this function.

    Raises:
        UserError: No checkpoint is intact. Or there is none, and the run may not begin without one.
    """
    flag, checkpoint = "--load", None
    if args.load is not None:
        checkpoint = find_checkpoint(args.load, args, ranks)
    if checkpoint is None and args.pretrained_checkpoint is not None:
        # Do what Megatron does later, but with an intact checkpoint.
        flag, args.load, args.finetune = "--pretrained-checkpoint", args.pretrained_checkpoint, True
        checkpoint = find_checkpoint(args.load, args, ranks)
    if checkpoint is not None:
        if (iteration := iteration_of(checkpoint)) is not None:
            # Pass the choice to Megatron by `--ckpt-step`, as a user would.
            args.ckpt_step = iteration
    elif args.load is not None and (args.exit_on_missing_checkpoint or not loads_what_it_saves(args)):
        cure = "" if args.skip_train else f"; leave {flag} out to start from random weights"
        if args.exit_on_missing_checkpoint:
            cure = "; leave --exit-on-missing-checkpoint out to start from the beginning"
        raise UserError(f"{flag} {describe_missing(args.load)}{cure}")
    return checkpoint


def find_checkpoint(folder: str, args: Namespace, ranks: Ranks) -> Path | None:
    """Return the checkpoint to load, whose content all ranks verify together; None to start from the beginning.

    The first rank chooses, because the file system may not show all ranks the same files at the same time. Damaged
    checkpoints are skipped with a warning. All ranks must call this function.

    Raises:
        UserError: There are checkpoints, but none is intact.
    """
    damaged: dict[Path, CheckpointError] = {}

    def check(checkpoint: Path) -> None:
        check_structure(checkpoint)
        if checkpoint in damaged:
            raise damaged[checkpoint]

    while True:
        key = f"{folder}/choice {len(damaged)}"
        choice = choose_checkpoint(folder, args.ckpt_step, check) if ranks.rank == 0 else Choice(None)
        path = ranks.broadcast(key, str(choice.checkpoint or ""))
        chosen = Path(path) if path else None
        faults = _find_damages(chosen, ranks, key) if chosen is not None and args.verify_checkpoint else []
        if chosen is None or not faults:
            _warn(choice, args.verify_checkpoint)
            return chosen
        damaged[chosen] = CheckpointError(chosen, faults[0])


def _warn(choice: Choice, verifies: bool) -> None:
    """Report which checkpoints were rejected, and a chosen checkpoint whose content could not be verified."""
    chosen = choice.checkpoint
    warnings = [f"checkpoint {fault}" for fault in choice.rejected]
    if chosen is not None and verifies and not has_digests(chosen):
        warnings.append(f"checkpoint {chosen} has no digests of its files, so its content is not verified")
    if choice.rejected:
        warnings.append(f"resuming from {chosen}" if chosen else "starting from the beginning")
    for warning in warnings:
        print(f"warning: {warning}", file=sys.stderr, flush=True)


def _find_damages(checkpoint: Path, ranks: Ranks, key: str) -> list[str]:
    """Let each rank verify a share of a checkpoint's files, and return the damages that the ranks find."""
    damage = ""
    try:
        check_content(checkpoint, slice(ranks.rank, None, ranks.world_size))
    except CheckpointError as found:
        damage = found.fault
    return list(filter(None, ranks.gather(f"{key}/damage", damage)))


def checkpoint_to_load(args: Namespace) -> Path | None:
    """Return the checkpoint that `choose_checkpoint_of_run` has chosen and stored in the arguments."""
    if args.load is None:
        return None
    iteration = args.ckpt_step
    checkpoint = Path(args.load) / RELEASE if iteration is None else checkpoint_path(args.load, iteration)
    return checkpoint if checkpoint.exists() else None


def loads_what_it_saves(args: Namespace) -> bool:
    """Return whether a run loads from the folder to which it saves."""
    return bool(args.save and args.load) and Path(args.save).resolve() == Path(args.load).resolve()


def check_save_folder_is_own(args: Namespace, checkpoint: Path | None) -> None:
    """Raise `UserError` if a run would write over, or remove, checkpoints that it does not continue.

    The checkpoints in `--save` are the run's own in two cases: the run resumes from the same folder; or it loads from
    another folder, and the newest checkpoint in `--save` has loaded from there, too, because the run was started again.
    The folder that an interrupted save leaves is no checkpoint.
    """
    if args.save is None:
        return
    folder, starts_anew = Path(args.save), checkpoint is None or args.finetune
    if loads_what_it_saves(args) and not starts_anew:
        return
    saved = [step for step in saved_iterations(folder) if (checkpoint_path(folder, step) / COMPLETION_FILE).exists()]
    is_empty = not saved and not (folder / TRACKER).is_file()
    if is_empty or (not starts_anew and _has_resumed_from(args.load, folder)):
        return
    which = f"of iteration {saved[0]} " if saved else ""
    start = "start at iteration 0" if starts_anew else f"continue the run in --load {args.load}"
    raise UserError(
        f"{folder} holds a checkpoint {which}already, and this run would {start} and write over it: save to another "
        f"folder, or pass --load {args.save} without --finetune to continue the run in --save"
    )


def _has_resumed_from(load: str, folder: Path) -> bool:
    """Return whether the run of the newest intact checkpoint in a folder, if there is one, has resumed from `load`.

    Raises:
        UserError: No checkpoint is intact, or the arguments of the newest one are damaged although its size is right.
    """
    newest = choose_checkpoint(folder).checkpoint
    if newest is None:
        return True
    try:
        saved = read_common_state(newest).get("args")
    except CheckpointError as error:
        raise UserError(f"{error}: save to another folder") from error
    loaded = Path(getattr(saved, "load", None) or os.devnull)
    return loaded.resolve() == Path(load).resolve() and not getattr(saved, "finetune", False)
