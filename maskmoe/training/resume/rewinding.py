"""Goes back in a run: records what the next start passes over, and keeps the next start off abandoned checkpoints.

The run goes back by a restart: all ranks exit, torchrun starts them again, and they load an earlier checkpoint as after
any other interruption. A rewind inside the process would have to reset the state of Megatron's training loop, which is
in local variables: data iterators, schedules, counters, asynchronous saves.
"""

import json
from argparse import Namespace
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path

import torch
from megatron.core.dist_checkpointing import load_common_state_dict

from maskmoe.checkpoint.integrity import Abandoned, Damage, check_structure
from maskmoe.checkpoint.series import checkpoint_path, iteration_of, remove_tracker, saved_iterations, write_tracker
from maskmoe.errors import UserError
from maskmoe.launch.journal import Journal, Kind
from maskmoe.launch.run_folder import run_folder
from maskmoe.training.loop.rank_store import RankStore
from maskmoe.training.resume.rewinds import FILE_NAME, NO_REWINDS, Rewind, Rewinds, loads_what_it_saves, read_rewinds


class Rewinder:
    """Prepares a run to go back.

    Args:
        args: Megatron's arguments, with the flags of rewinds.
        rewinds: The rewinds so far.

    Attributes:
        is_prepared: Whether the run must exit now to go back.
    """

    def __init__(self, args: Namespace, rewinds: Rewinds) -> None:
        self._args = args
        self._rewinds = rewinds
        self.is_prepared = False

    def prepare(self, iteration: int, cause: str) -> str:
        """Record a rewind if the run can go back; a collective call of all ranks.

        Args:
            iteration: The iteration that is off, counted from 1. The iterations before within
                `--spike-rewind-margin` are passed over, too.
            cause: The reason in words.

        Returns:
            A clause that says where the run goes back to, or why it continues.
        """
        rewind = Rewind(max(1, iteration - self._args.spike_rewind_margin), iteration, cause)
        answer = self._record(rewind) if torch.distributed.get_rank() == 0 else (False, "")
        shared = [answer]
        torch.distributed.broadcast_object_list(shared, 0)
        self.is_prepared, clause = shared[0]
        return clause

    def _record(self, rewind: Rewind) -> tuple[bool, str]:
        """Record a rewind in the run folder. Return whether the run goes back, and a clause about this."""
        most = self._args.spike_max_rewinds
        if len(self._rewinds.all) >= most:
            return False, f"the run continues, because it has gone back {most} times already (--spike-max-rewinds)"
        target, is_possible = self._target(rewind)
        if not is_possible:
            return False, (
                f"the run continues, because no sound checkpoint before iteration {rewind.first} is left in "
                f"{self._args.save}"
            )
        folder = _folder_of_record(self._args)
        assert folder is not None
        try:
            folder.mkdir(parents=True, exist_ok=True)
            Rewinds((*self._rewinds.all, rewind)).write(folder)
        except (OSError, UserError) as error:
            return False, f"the run continues, because it cannot write {folder / FILE_NAME}: {error}"
        where = f"the checkpoint of iteration {target}" if target else "the beginning"
        text = f"the run goes back to {where} and passes over {rewind}"
        Journal(folder).write(Kind.REWOUND, text, rewind.last, first=rewind.first)
        return True, text

    def _target(self, rewind: Rewind) -> tuple[int | None, bool]:
        """Return the iteration of the checkpoint to go back to, None for the beginning, and whether there is a way."""
        saved = saved_iterations(self._args.save)
        for iteration in saved:
            with suppress(Damage):
                checkpoint = checkpoint_path(self._args.save, iteration)
                check_structure(checkpoint)
                check_history(checkpoint, Rewinds((*self._rewinds.all, rewind)))
                return iteration, True
        return None, not saved


def check_may_resume(args: Namespace, rewinds: Rewinds, checkpoint: Path) -> None:
    """Check that a checkpoint is complete, and that the run has not gone back beyond it.

    Args:
        args: Megatron's arguments.
        rewinds: The rewinds of the run that saves to `--save`.
        checkpoint: The checkpoint.

    Raises:
        Damage: The run must not resume from the checkpoint.
    """
    check_structure(checkpoint)
    if rewinds.all and loads_what_it_saves(args):
        check_history(checkpoint, rewinds)


def check_history(checkpoint: Path, rewinds: Rewinds) -> None:
    """Check that the run has not gone back beyond a checkpoint of its own.

    Args:
        checkpoint: The checkpoint, which is complete.
        rewinds: The rewinds of the run.

    Raises:
        Abandoned: The run has.
    """
    iteration = iteration_of(checkpoint)
    if iteration is None or all(iteration < rewind.first for rewind in rewinds.all):
        return
    rewind = rewinds.abandoned_by(iteration, _passed_by(checkpoint))
    if rewind is not None:
        raise Abandoned(checkpoint, f"was trained on {rewind}, which the run passes over since: {rewind.cause}")


def _passed_by(checkpoint: Path) -> Collection[int]:
    """Return the iterations that a run had passed over, or was to pass over, when it saved a checkpoint."""
    saved = load_common_state_dict(checkpoint).get("args", Namespace())
    return set(getattr(saved, "iterations_to_skip", ()))


def own_rewinds(args: Namespace) -> Rewinds:
    """Return the rewinds of the run that saves to `--save`.

    Args:
        args: Megatron's arguments.

    Raises:
        UserError: The record is damaged.
    """
    folder = _folder_of_record(args)
    return NO_REWINDS if folder is None else read_rewinds(folder)


def shared_rewinds(args: Namespace, ranks: RankStore) -> Rewinds:
    """Return the rewinds of the run that saves to `--save`, as the first rank reads them; a call of all ranks.

    Args:
        args: Megatron's arguments.
        ranks: The ranks of the run.

    Raises:
        UserError: The record is damaged.
    """
    problem, text = "reading the record of rewinds failed on the first rank", "[]"
    try:
        if ranks.rank == 0:
            text = own_rewinds(args).to_json()
        problem = ""
    except UserError as error:
        problem = str(error)
        raise
    finally:
        # The other ranks wait for an answer, so send one even if this rank fails.
        problem, text = json.loads(ranks.broadcast("rewinds", json.dumps([problem, text])))
    if problem:
        raise UserError(problem)
    return Rewinds.from_json(text)


def describe_rewinds(rewinds: Rewinds) -> str:
    """Return a line about the iterations that a run passes over."""
    times = "once" if len(rewinds.all) == 1 else f"{len(rewinds.all)} times"
    passed = ", ".join(map(str, rewinds.all))
    return f"the run has gone back {times} and passes over {passed} ({rewinds.all[-1].cause})"


def set_abandoned_aside(args: Namespace, ranks: RankStore, rewinds: Rewinds) -> None:
    """Rename the checkpoints beyond which the run has gone back, on the first rank; they are not loaded any more.

    Call this when no rank can refuse the run any more.

    Args:
        args: Megatron's arguments, with the iteration of the chosen checkpoint in `args.ckpt_step`; None to start from
            the beginning.
        ranks: The ranks of the run.
        rewinds: The rewinds of the run.
    """
    if ranks.rank > 0 or not rewinds.all:
        return
    is_renamed = False
    for iteration in saved_iterations(args.save):
        checkpoint = checkpoint_path(args.save, iteration)
        try:
            check_structure(checkpoint)
            check_history(checkpoint, rewinds)
        except Abandoned:
            number = len(list(checkpoint.parent.glob(f"abandoned*_{checkpoint.name}"))) + 1
            checkpoint.rename(checkpoint.with_name(f"abandoned{number}_{checkpoint.name}"))
            is_renamed = True
        except Damage:
            continue  # a damaged checkpoint is not loaded in any case
    if is_renamed and args.ckpt_step is not None:
        write_tracker(args.save, args.ckpt_step)
    elif is_renamed:
        remove_tracker(args.save)


def _folder_of_record(args: Namespace) -> Path | None:
    """Return the folder of the record of rewinds; None for a command that saves no checkpoints."""
    return run_folder(args.save, args.tensorboard_dir) if args.save else None
