"""All checks of a run, in one order: training raises the first error, `maskmoe check` collects all of them."""

import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, field
from math import inf
from pathlib import Path
from typing import Any, NoReturn

import torch
from megatron.core.num_microbatches_calculator import _build_num_microbatches_calculator
from megatron.training.arguments import parse_args, validate_args
from megatron.training.global_vars import rebuild_tokenizer

from maskmoe.checkpoint.series import describe_missing
from maskmoe.errors import UserError, megatrons_checks
from maskmoe.files.run_folder import TENSORBOARD, run_folder
from maskmoe.megatron_compat import cpu
from maskmoe.megatron_compat.globals import get_tokenizer, set_globals_without_writers
from maskmoe.megatron_compat.gpu import GpuPackages
from maskmoe.processes.console import console
from maskmoe.routing_mask.mask import RoutingMask
from maskmoe.training.model.batch import check_fill_in_middle_tokens
from maskmoe.training.ranks import Ranks, meet_ranks
from maskmoe.training.resume import changed_settings
from maskmoe.training.resume import find_checkpoint as resume
from maskmoe.training.settings import inputs
from maskmoe.training.settings.agreement import check_agreement, digest_of_datasets
from maskmoe.training.settings.arguments import add_maskmoe_arguments
from maskmoe.training.settings.samples import BatchSizes
from maskmoe.training.settings.support import (
    flags_of,
    missing_flags,
    missing_transformer_engine,
    note_on_flex,
    note_on_unproven,
    outdated_packages,
    refusals,
)
from maskmoe.transformer.torch_modules.gated_delta_net import check_gated_delta_net, uses_fla

ArgumentsProvider = Callable[[ArgumentParser], ArgumentParser]


@dataclass(frozen=True)
class RunSettings:
    """The settings of a checked run, made once before any process group exists.

    Attributes:
        args: Megatron's validated arguments, which Megatron's own code reads and completes.
        is_complete: Whether the checkpoint has reached the last iteration, so that nothing is left to train.
        run_folder: The folder of logs, arguments and pages; None if the run writes none.
    """

    args: Namespace
    mask: RoutingMask | None
    is_complete: bool
    run_folder: Path | None


def parse_and_check_args(
    own_arguments: ArgumentsProvider, before_reading: Callable[[Namespace], object] = lambda _: None
) -> RunSettings:
    """Parse the command line, check all settings and files in it, and set Megatron's global variables.

    The function changes no file and makes none, and does not open Megatron's writers.

    Args:
        own_arguments: Adds the arguments of the entry point to the arguments of all entry points.
        before_reading: Gets the parsed arguments before any file of the run is read, to lock its folder.

    Raises:
        UserError: The first error of the run, or the ranks were started with different settings or files.
    """
    console.load("checking settings and files")
    command_line = CommandLine.parse(own_arguments)
    ranks = meet_ranks(command_line.args)
    check_agreement(command_line.args, ranks.gather)
    before_reading(command_line.args)
    checks = RunChecks(command_line, ranks, GpuPackages.installed(), _raise)
    checks.run()
    for note in checks.notes:
        console.say(f"note: {note}")
    args = checks.args
    set_globals_without_writers(args)
    return RunSettings(args, checks.mask, checks.is_complete, run_folder(args.save, args.tensorboard_dir))


def _raise(error: str) -> NoReturn:
    raise UserError(error)


@dataclass(frozen=True)
class CommandLine:
    """The parsed command line of a run.

    Attributes:
        args: The arguments, which Megatron has not validated.
        given: The names of the arguments that the command line gives.
        megatrons_flags: The flags of Megatron that the command line gives.
    """

    args: Namespace
    given: frozenset[str]
    megatrons_flags: tuple[str, ...]

    @classmethod
    def parse(cls, own_arguments: ArgumentsProvider, packages: GpuPackages | None = None) -> "CommandLine":
        """Parse the command line of this process.

        Args:
            own_arguments: Adds the arguments of the entry point to the arguments of all entry points.
            packages: The packages of the machines that train; None for this machine.

        Raises:
            UserError: The command line has unknown flags, or a word that cannot be read.
        """
        megatrons, complete = set[str](), []  # all flags of Megatron, and the parser with all flags

        def add_arguments(parser: ArgumentParser) -> ArgumentParser:
            megatrons.update(parser._option_string_actions)
            complete.append(own_arguments(add_maskmoe_arguments(parser, packages)))
            return complete[0]

        try:
            args = parse_args(add_arguments)
        except KeyError as error:  # of a flag whose values are the names of an enumeration
            raise UserError(f"a flag has no value {error}") from error
        actions = complete[0]._option_string_actions
        words = (word.partition("=")[0] for word in sys.argv[1:])
        given = {actions[word].dest for word in words if word in actions}
        of_megatron = tuple(flag for flag in flags_of(complete[0], sys.argv[1:]) if flag.split()[0] in megatrons)
        return cls(args, frozenset(given), of_megatron)


@dataclass
class RunChecks:
    """The checks of a run's command line, and of the files that the command line names.

    Args:
        command_line: The parsed command line.
        ranks: The ranks that make the checks, which verify the content of checkpoints together.
        packages: The packages of the machines that train.
        refuse: Is called with each error that the run would end with. If the function does not raise, the checks
            continue, and leave out checks whose preconditions are not met.
        most_bytes_read: The size of the largest dataset whose token ids are read although the mask lacks their counts.

    Attributes:
        args: The arguments, which Megatron has validated after a successful `run`.
        is_validated: Whether Megatron has accepted the arguments.
        is_complete: Whether the checkpoint has reached the last iteration.
        notes: Facts that the user should know but that do not stop the run, one line each.
    """

    command_line: CommandLine
    ranks: Ranks
    packages: GpuPackages
    refuse: Callable[[str], object]
    most_bytes_read: float = inf
    is_validated: bool = field(default=False, init=False)
    is_complete: bool = field(default=False, init=False)
    checkpoint: Path | None = field(default=None, init=False)
    mask: RoutingMask | None = field(default=None, init=False)
    notes: list[str] = field(default_factory=list, init=False)
    _vocab_size: int | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        self.args = self.command_line.args

    def run(self) -> None:
        """Make all checks in order."""
        # Settings.
        self._choose_checkpoint()
        self._check_settings()
        with self._refused():
            inputs.check_save_folder(self.args)
        with self._refused():
            resume.check_save_folder_is_own(self.args, self.checkpoint)
        with self._refused():
            self._validate()
        # Files, and the model of the checkpoint.
        with self._refused():
            self._make_tokenizer()
        with self._refused():
            self.mask = inputs.find_routing_mask(self.args, self.checkpoint, self.notes.append)
        if self.is_validated:
            self._compare_models()
        self._check_files()
        if self.is_validated:
            with self._refused():
                self._compare_settings()

    @contextmanager
    def _refused(self) -> Iterator[None]:
        """Refuse the run if the block raises `UserError`."""
        try:
            yield
        except UserError as error:
            self.refuse(str(error))

    def _refuse_all(self, errors: Iterable[str]) -> None:
        for error in errors:
            self.refuse(error)

    def _choose_checkpoint(self) -> None:
        """Choose the checkpoint, whose settings may complete the command line."""
        args = self.args
        with self._refused():
            self.checkpoint = resume.choose_checkpoint_of_run(args, self.ranks)
            if args.use_checkpoint_args and self.checkpoint is None:
                found = "" if args.load is None else f"; --load {describe_missing(args.load)}"
                raise UserError(f"--use-checkpoint-args needs --load with the folder of the checkpoints{found}")
            if args.use_checkpoint_args and self.checkpoint is not None:
                given = self.command_line.given
                self.args = changed_settings.take_settings_of_checkpoint(args, self.checkpoint, given)

    def _check_settings(self) -> None:
        """Check the settings by MaskMoE's own rules."""
        args = self.args
        self._refuse_all(refusals(args))
        if error := check_gated_delta_net(args, uses_fla()):
            self.refuse(error)
        self._refuse_all(missing_transformer_engine(args, self.packages))
        self._refuse_all(outdated_packages(args))
        if not cpu.is_installed() and (missing := self.packages.describe_missing()):
            self.notes.append(missing)
        if args.num_experts and not args.skip_train:
            column = "cpu" if args.distributed_backend == "gloo" else "gpu"
            notes = [
                note_on_unproven(self.command_line.megatrons_flags, column),
                note_on_flex(args, torch.cuda.device_count(), self.packages.deep_ep),
            ]
            self.notes += filter(None, notes)
        self._refuse_all(missing_flags(args, has_checkpoint=self.checkpoint is not None))

    def _validate(self) -> None:
        """Let Megatron validate a copy of the arguments, and keep the copy. Raises UserError."""
        args = deepcopy(self.args)
        if args.step_batch_size_schedule is not None and args.eval_global_batch_size is None:
            # Megatron would evaluate on one micro-batch of each data-parallel rank.
            args.eval_global_batch_size = BatchSizes.from_args(args).sizes[-1]
        vars(args).update(run_folder_defaults(args))
        with megatrons_checks():
            validate_args(args)
            # The calculator refuses batch sizes that do not divide each other.
            _build_num_microbatches_calculator(
                args.rank,
                args.global_batch_size,
                args.micro_batch_size,
                args.data_parallel_size,
                args.decrease_batch_size_if_needed,
                args.step_batch_size_schedule,
                args.seq_length,
            )
        self.args, self.is_validated = args, True

    def _make_tokenizer(self) -> None:
        """Build the tokenizer, which says how many ids there are. Raises UserError."""
        args = self.args
        args.tokenizer_sha256 = None  # saved with the other arguments
        args.tokenizer_sha256 = inputs.check_tokenizer(args, self.checkpoint)
        with megatrons_checks(f"the tokenizer ({args.tokenizer_type} {args.tokenizer_model}) cannot be made"):
            rebuild_tokenizer(args)
        self._vocab_size = get_tokenizer().vocab_size

    def _compare_models(self) -> None:
        """Check that the checkpoint holds the model of the run, and keep the padding of its weights."""
        args, checkpoint = self.args, self.checkpoint
        if checkpoint is not None:
            with self._refused():
                changed_settings.check_same_model(args, checkpoint)
            if self._vocab_size is not None and "padded_vocab_size" not in self.command_line.given:
                with self._refused():
                    changed_settings.take_padding_of_checkpoint(args, checkpoint, self._vocab_size)

    def _check_files(self) -> None:
        """Check that mask, tokenizer and datasets fit the model and each other."""
        args, mask = self.args, self.mask
        knows_layers = self.is_validated or (args.hybrid_layer_pattern is None and args.num_layers is not None)
        if self._vocab_size is not None and mask is not None and knows_layers:
            with self._refused():
                inputs.check_mask(args, mask)
        if self._vocab_size is not None and args.fim_data:
            with self._refused():
                check_fill_in_middle_tokens(args)
        errors = [*inputs.data_errors(args, mask, self._vocab_size, self.most_bytes_read)]
        self._refuse_all(errors)
        # The digest is saved with the other arguments, for the runs that resume.
        args.datasets_digest = None if errors else digest_of_datasets(args)

    def _compare_settings(self) -> None:
        """Compare the remaining settings with those of the checkpoint. Raises UserError."""
        if any(missing_flags(self.args, has_checkpoint=self.checkpoint is not None)):
            return  # Megatron cannot make the schedule
        changed = changed_settings.find_changed_settings(self.args, self.checkpoint)
        self._refuse_all(changed.errors)
        self.notes += changed.notes
        self.is_complete = changed.is_complete


def run_folder_defaults(args: Namespace) -> dict[str, Any]:
    """Return the values of Megatron's flags that the run folder sets by default.

    Event files of TensorBoard are in `tensorboard` of the run folder. A run of Weights & Biases has the name of the run
    folder, and its files are in `wandb` there. Raises `UserError` if a run with `--wandb-project` has no folder.
    """
    folder = run_folder(args.save, args.tensorboard_dir)
    if folder is None:
        if args.wandb_project:
            raise UserError("--wandb-project needs a run folder: pass --save or --tensorboard-dir")
        return {}
    defaults = {"tensorboard_dir": str(folder / TENSORBOARD)}
    if args.wandb_project:
        # Megatron would use the folder of the checkpoints, in which only checkpoints belong.
        defaults |= {"wandb_exp_name": folder.name, "wandb_save_dir": str(folder)}
    return {name: value for name, value in defaults.items() if getattr(args, name) is None}
