"""Finds the newest sound checkpoint to resume from, which all ranks verify together, and checks `--save`."""

import json
import os
import sys
from argparse import Namespace
from itertools import count
from pathlib import Path

from maskmoe.checkpoint.integrity import Damage, check_content, check_structure, read_common_state
from maskmoe.checkpoint.series import (
    RELEASE,
    TRACKER,
    checkpoint_path,
    choose_checkpoint,
    describe_missing,
    is_finished,
    newest_sound,
    non_persistent_folder,
    read_tracker,
    saved_iterations,
)
from maskmoe.errors import UserError
from maskmoe.files.run_folder import Kind, read_journal, run_folder
from maskmoe.training.ranks import Ranks
from maskmoe.training.resume.model_settings import check_same_model


def find_checkpoint(args: Namespace, ranks: Ranks) -> Path | None:
    """Return the checkpoint to load, whose content all ranks verify together; None to start from the beginning.

    The first rank chooses, because the file system may not show all ranks the same files at the same time. Damaged
    checkpoints are skipped with a warning. All ranks must call this function.

    Raises:
        UserError: There are checkpoints, but none is sound.
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
                raise Damage(checkpoint, damage)

    choice = choose_checkpoint(args.load, args.ckpt_step, check, non_persistent_folder(args, args.load))
    chosen = choice.checkpoint
    for damage in choice.rejected:
        print(f"warning: checkpoint {damage}", file=sys.stderr, flush=True)
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
    except Damage as found:
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
    folder = (non_persistent_folder(args, args.load) if args.loads_non_persistent else None) or Path(args.load)
    checkpoint = folder / RELEASE if iteration is None else checkpoint_path(folder, iteration)
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
    except Damage as damage:
        raise UserError(f"--pretrained-checkpoint {folder}: {damage}. {cure}") from damage
    if ranks is not None and args.verify_checkpoint:
        for damage in _find_damages(pretrained, ranks, "pretrained checkpoint"):
            raise UserError(f"--pretrained-checkpoint {folder}: {pretrained} {damage}. {cure}")
    check_same_model(Namespace(**vars(args) | {"finetune": True}), pretrained)


def loads_what_it_saves(args: Namespace) -> bool:
    """Return whether a run loads from the folder to which it saves."""
    return bool(args.save and args.load) and Path(args.save).resolve() == Path(args.load).resolve()


def lacks_what_it_loads(args: Namespace) -> bool:
    """Return whether `--save` lacks the checkpoint that a run loads, so that even a complete run has to save it."""
    return args.save is not None and (args.loads_non_persistent or not loads_what_it_saves(args))


def check_save_folder_is_own(args: Namespace, checkpoint: Path | None) -> None:
    """Raise `UserError` if a run would write over, or remove, checkpoints that it does not continue.

    A run that loads from the folder to which it saves continues this folder's run, unless it starts at iteration 0. A
    run that loads from another folder may have been interrupted and started again: then the checkpoints in `--save`
    name the same `--load`. The folder that an interrupted save leaves is no checkpoint. Another run may have written
    the checkpoints in `--non-persistent-global-ckpt-dir`.
    """
    if args.save is None:
        return
    starts_anew, is_same_folder = checkpoint is None or args.finetune, loads_what_it_saves(args)
    local = non_persistent_folder(args, args.save)
    for folder in filter(None, (Path(args.save), local)):
        is_elsewhere = folder == local and args.non_persistent_global_ckpt_dir is not None
        if is_same_folder and not starts_anew and not is_elsewhere:
            continue
        saved = [step for step in saved_iterations(folder) if is_finished(checkpoint_path(folder, step))]
        is_own = not saved and (checkpoint is None if is_same_folder else not (folder / TRACKER).is_file())
        if not starts_anew:
            is_own = is_own or (folder == local and not is_elsewhere) or _is_of_run(folder, args)
        if not is_own:
            newest = max(saved, default=None)
            which = f"of iteration {newest} " if newest is not None else ""
            start = "start at iteration 0" if starts_anew else f"continue the run in --load {args.load}"
            cure = (
                f"save to another folder, or pass --load {args.save} without --finetune to continue the run in --save"
            )
            if is_elsewhere and not starts_anew:
                cure = "pass another --non-persistent-global-ckpt-dir"
            raise UserError(
                f"{folder} holds a checkpoint {which}already, and this run would {start} and write over it: {cure}"
            )


def _is_of_run(folder: Path, args: Namespace) -> bool:
    """Return whether the newest sound checkpoint in a folder is of this run; True without any.

    A non-persistent checkpoint is in the journal of the run, which may have had another `--load` at its first start, or
    none. Else the checkpoint is of a run with this `--load`. Several runs may load from one folder that is not theirs,
    so this does not identify a run's non-persistent checkpoint.

    Raises:
        UserError: The checkpoint's files have the right sizes, but its arguments are damaged.
    """
    newest, journal = newest_sound(folder), run_folder(args.save, args.tensorboard_dir)
    if newest is None:
        return True
    is_local = folder != Path(args.save)
    if is_local and journal is not None:
        saves = (entry for entry in read_journal(journal) if entry.kind is Kind.SAVED and entry.facts.get("is_local"))
        if any(entry.iteration == newest for entry in saves):
            return True
    if is_local and not loads_what_it_saves(args):
        return False
    try:
        saved = read_common_state(checkpoint_path(folder, newest)).get("args")
    except Damage as damage:
        raise UserError(f"{damage}: save to another folder") from damage
    return Path(getattr(saved, "load", None) or os.devnull).resolve() == Path(args.load).resolve()
