"""All checks of a run, in one order: training raises the first error, `--check` collects all of them."""

import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import inf
from pathlib import Path

from megatron.training.arguments import parse_args, validate_args

from maskmoe.arguments.parser import refuse_unknown_flags
from maskmoe.checkpoint.integrity import iteration_of
from maskmoe.checkpoint.series import describe_missing
from maskmoe.errors import UserError, megatrons_checks
from maskmoe.files.run_folder import run_folder
from maskmoe.megatron_compat import cpu
from maskmoe.megatron_compat.globals import get_tokenizer, set_globals_without_writers
from maskmoe.megatron_compat.gpu import GpuPackages
from maskmoe.processes.console import console
from maskmoe.routing_mask.mask import RoutingMask
from maskmoe.training.model.batch import check_fill_in_middle_tokens
from maskmoe.training.ranks import meet_ranks
from maskmoe.training.resume import choose_checkpoint as resume
from maskmoe.training.resume import model_settings
from maskmoe.training.resume.changed_settings import find_changed_settings
from maskmoe.training.settings import inputs
from maskmoe.training.settings.agreement import check_agreement, digest_of_datasets
from maskmoe.training.settings.arguments import add_maskmoe_arguments
from maskmoe.training.settings.folders import run_folder_defaults
from maskmoe.training.settings.requirements import missing_flags, missing_transformer_engine, outdated_packages
from maskmoe.training.settings.samples import BatchSizes
from maskmoe.training.settings.support import flags_of, note_on_unproven, refusals
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

    The function changes no file and makes none, and does not open Megatron's writers. See `RunChecks` for the first
    argument. `before_reading` gets the parsed arguments before any file of the run is read, to lock its folder.

    Raises:
        UserError: The first error of the run, or the ranks were started with different settings or files.
    """
    console.load("checking settings and files")
    checks = RunChecks(own_arguments)
    check_agreement(checks.args, meet_ranks(checks.args).gather)
    before_reading(checks.args)
    for error in checks.errors():
        raise UserError(error)
    for note in checks.notes:
        console.say(f"note: {note}")
    args = checks.args
    return RunSettings(args, checks.mask, checks.is_complete, run_folder(args.save, args.tensorboard_dir))


class RunChecks:
    """The checks that each rank of a run makes of its command line, and of the files that the command line names.

    The ranks verify the content of checkpoints together. A check beforehand, alone, overrides the methods of the first
    group, and reads less.

    Args:
        own_arguments: Adds the arguments of the entry point to the arguments of all entry points.

    Attributes:
        packages: The packages of the machines that train.
        is_validated: Whether Megatron has accepted the arguments.
        is_complete: Whether the checkpoint has reached the last iteration.
        notes: Facts that the user should know but that do not stop the run, one line each.
        most_bytes_read: The size of the largest dataset whose token ids are read although the mask lacks their counts.

    Raises:
        UserError: The command line has unknown flags, or a word that cannot be read.
    """

    most_bytes_read: float = inf

    def __init__(self, own_arguments: ArgumentsProvider) -> None:
        self.packages = GpuPackages.installed()
        self.checkpoint: Path | None = None
        self.mask: RoutingMask | None = None
        self.is_validated = self.is_complete = False
        self.notes: list[str] = []
        self._own_arguments = own_arguments
        self._vocab_size: int | None = None
        self._given: set[str] = set()  # arguments
        self._megatrons_flags: list[str] = []  # of the command line
        try:
            self.args = parse_args(self._add_arguments)
        except KeyError as error:  # of a flag whose values are the names of an enumeration
            raise UserError(f"a flag has no value {error}") from error

    # ---- What a check beforehand does otherwise ----------------------------------------------------------------------

    def add_arguments(self, parser: ArgumentParser) -> ArgumentParser:
        """Add all arguments of MaskMoE to Megatron's parser, which has its own; return the parser."""
        return self._own_arguments(add_maskmoe_arguments(parser))

    def find_checkpoint(self, folder: str) -> Path | None:
        """Return the newest checkpoint in a folder that all ranks find intact. Raises UserError."""
        return resume.find_checkpoint(folder, self.args, meet_ranks(self.args))

    def validate(self) -> Namespace:
        """Return the arguments that Megatron has validated, and set its global variables. Raises UserError."""
        args = self.args
        with megatrons_checks():
            validate_args(args)
            set_globals_without_writers(args)
        return args

    def make_tokenizer(self) -> None:
        """Build Megatron's tokenizer, unless `validate` has built it. Raises UserError."""

    # ---- The checks --------------------------------------------------------------------------------------------------

    def errors(self) -> Iterator[str]:
        """Yield every error that the run would end with, in order; leave out checks whose preconditions are not met."""
        # Settings.
        yield from self._choose_checkpoint()
        yield from self._settings()
        yield from _error_of(lambda: inputs.check_save_folder(self.args))
        yield from _error_of(lambda: resume.check_save_folder_is_own(self.args, self.checkpoint))
        tokenizer_errors = [*_error_of(self._check_tokenizer)]
        yield from tokenizer_errors
        yield from self._validate()
        # Files, and the model of the checkpoint.
        if not tokenizer_errors:
            yield from _error_of(self._make_tokenizer)
        yield from _error_of(self._choose_mask)
        if self.is_validated:
            yield from self._compare_models()
        yield from self._files()
        if self.is_validated:
            yield from self._compare_settings()

    def _choose_checkpoint(self) -> Iterator[str]:
        """Choose the checkpoint, whose settings may complete the command line."""
        args = self.args
        try:
            checkpoint = self.find_checkpoint(args.load) if args.load is not None else None
            if checkpoint is None and args.pretrained_checkpoint is not None:
                # Do what Megatron does later, but with an intact checkpoint.
                args.load, args.finetune = args.pretrained_checkpoint, True
                checkpoint = self.find_checkpoint(args.load)
            resume.check_not_missing(args, checkpoint)
            self.checkpoint = checkpoint
        except UserError as error:
            yield str(error)
            return
        if checkpoint is not None and (iteration := iteration_of(checkpoint)) is not None:
            # Pass the choice to Megatron by `--ckpt-step`, as a user would.
            args.ckpt_step = iteration
        if args.use_checkpoint_args and checkpoint is None:
            found = "" if args.load is None else f"; --load {describe_missing(args.load)}"
            yield f"--use-checkpoint-args needs --load with the folder of the checkpoints{found}"
        elif args.use_checkpoint_args and checkpoint is not None:
            yield from _error_of(lambda: self._take_settings(checkpoint))

    def _take_settings(self, checkpoint: Path) -> None:
        """Take the settings of a checkpoint that the command line does not give. Raises UserError."""
        self.args = model_settings.take_settings_of_checkpoint(self.args, checkpoint, self._given)

    def _settings(self) -> Iterator[str]:
        """Check the settings by MaskMoE's own rules."""
        args = self.args
        yield from refusals(args)
        if error := check_gated_delta_net(args, uses_fla()):
            yield error
        yield from missing_transformer_engine(args, self.packages)
        yield from outdated_packages(args)
        if not cpu.is_installed() and (missing := self.packages.describe_missing()):
            self.notes.append(missing)
        if args.num_experts and not args.skip_train:
            column = "cpu" if args.distributed_backend == "gloo" else "gpu"
            self.notes += filter(None, [note_on_unproven(self._megatrons_flags, column)])
        yield from missing_flags(args, has_checkpoint=self.checkpoint is not None)

    def _validate(self) -> Iterator[str]:
        """Check the settings by Megatron's rules."""
        args = self.args
        try:
            if args.step_batch_size_schedule is not None and args.eval_global_batch_size is None:
                # Megatron would evaluate on one micro-batch of each data-parallel rank.
                args.eval_global_batch_size = BatchSizes.from_args(args).sizes[-1]
            vars(args).update(run_folder_defaults(args))
            self.args = self.validate()
            self.is_validated = True
        except UserError as error:
            yield str(error)

    def _check_tokenizer(self) -> None:
        """Check the tokenizer's file, and save its digest with the other arguments. Raises UserError."""
        self.args.tokenizer_sha256 = None
        self.args.tokenizer_sha256 = inputs.check_tokenizer(self.args, self.checkpoint)

    def _make_tokenizer(self) -> None:
        """Build the tokenizer, which says how many ids there are. Raises UserError."""
        self.make_tokenizer()
        self._vocab_size = get_tokenizer().vocab_size

    def _choose_mask(self) -> None:
        """Read the routing mask. Raises UserError."""
        self.mask = inputs.find_routing_mask(self.args, self.checkpoint, self.notes.append)

    def _files(self) -> Iterator[str]:
        """Check that mask, tokenizer and datasets fit the model and each other."""
        args, mask = self.args, self.mask
        knows_layers = self.is_validated or (args.hybrid_layer_pattern is None and args.num_layers is not None)
        if self._vocab_size is not None and mask is not None and knows_layers:
            yield from _error_of(lambda: inputs.check_mask(args, mask))
        if self._vocab_size is not None and args.fim_data:
            yield from _error_of(lambda: check_fill_in_middle_tokens(args))
        args.datasets_digest = None  # saved with the other arguments, for the runs that resume
        if not (errors := [*inputs.data_errors(args, mask, self._vocab_size, self.most_bytes_read)]):
            args.datasets_digest = digest_of_datasets(args)
        yield from errors

    def _compare_models(self) -> Iterator[str]:
        """Check that the checkpoint holds the model of the run."""
        args, checkpoint = self.args, self.checkpoint
        if checkpoint is not None:
            yield from _error_of(lambda: model_settings.check_same_model(args, checkpoint))
            if (size := self._vocab_size) is not None and "padded_vocab_size" not in self._given:
                yield from _error_of(lambda: model_settings.take_padding_of_checkpoint(args, checkpoint, size))

    def _compare_settings(self) -> Iterator[str]:
        """Compare the remaining settings with those of the checkpoint."""
        if any(missing_flags(self.args, has_checkpoint=self.checkpoint is not None)):
            return  # Megatron cannot make the schedule
        try:
            changed = find_changed_settings(self.args, self.checkpoint)
        except UserError as error:
            yield str(error)
            return
        yield from changed.errors
        self.notes += changed.notes
        self.is_complete = changed.is_complete

    def _add_arguments(self, parser: ArgumentParser) -> ArgumentParser:
        """Add all arguments to Megatron's parser, and note which of them the command line gives."""
        megatrons = set(parser._option_string_actions)
        parser = self.add_arguments(parser)
        refuse_unknown_flags(parser, sys.argv[1:])
        actions = (parser._option_string_actions.get(word.partition("=")[0]) for word in sys.argv[1:])
        self._given = {action.dest for action in actions if action is not None}
        self._megatrons_flags = [flag for flag in flags_of(parser, sys.argv[1:]) if flag.split()[0] in megatrons]
        return parser


def _error_of(check: Callable[[], object]) -> Iterator[str]:
    """Yield the message of the `UserError` that a check raises, if it raises one."""
    try:
        check()
    except UserError as error:
        yield str(error)
