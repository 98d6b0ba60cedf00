"""The settings of a checked run."""

from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path

from maskmoe.files.run_folder import run_folder
from maskmoe.routing_mask.mask import RoutingMask
from maskmoe.training.resume.choose_checkpoint import must_save_a_complete_run


@dataclass(frozen=True)
class RunSettings:
    """The settings of a checked run, made once before any process group exists.

    Attributes:
        args: Megatron's validated arguments, which Megatron's own code reads and completes.
        has_work: Whether to train, or to save the checkpoint of a complete run into `--save`, which lacks it.
        run_folder: The folder of logs, arguments and pages; None if the run writes none.
    """

    args: Namespace
    mask: RoutingMask | None
    has_work: bool
    run_folder: Path | None

    @classmethod
    def from_args(cls, args: Namespace, mask: RoutingMask | None, is_complete: bool) -> "RunSettings":
        """Return the settings of a run; it is complete if its checkpoint has reached the last iteration."""
        return cls(
            args,
            mask,
            has_work=not is_complete or must_save_a_complete_run(args),
            run_folder=run_folder(args.save, args.tensorboard_dir),
        )
