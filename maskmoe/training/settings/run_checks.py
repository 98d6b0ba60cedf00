"""All checks of a run, in one order: training raises the first error, `--check` collects all of them."""

import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Generator, Iterable, Iterator
from pathlib import Path

from megatron.training.arguments import parse_args

from maskmoe.checkpoint.series import is_non_persistent, iteration_of
from maskmoe.command_line.parser import refuse_unknown_flags
from maskmoe.errors import UserError
from maskmoe.megatron_compat.globals import get_tokenizer
from maskmoe.megatron_compat.gpu import GpuPackages
from maskmoe.routing_mask.mask import RoutingMask
from maskmoe.training.loop.batch import check_fill_in_middle_tokens
from maskmoe.training.resume import choose_checkpoint as resume
from maskmoe.training.resume import model_settings
from maskmoe.training.resume.save_folder import check_save_folder_is_own
from maskmoe.training.settings import file_checks
from maskmoe.training.settings.arguments import add_maskmoe_arguments
from maskmoe.training.settings.changed_settings import find_changed_settings, take_schedule_of_checkpoint
from maskmoe.training.settings.choose_mask import find_routing_mask
from maskmoe.training.settings.flag_values import missing_flags, value_errors
from maskmoe.training.settings.layout import layout_errors
from maskmoe.training.settings.missing_inputs import MissingInput, missing_dataset, missing_mask, missing_tokenizer
from maskmoe.training.settings.refused_settings import (
    missing_libraries,
    missing_transformer_engine,
    refused_settings,
)

ArgumentsProvider = Callable[[ArgumentParser], ArgumentParser]


class RunChecks:
    """Checks the command line of this process, and the files that it names.

    A subclass says how to find the checkpoint and how to let Megatron validate the arguments: the ranks of a run do
    both together, a check beforehand does both alone.

    Args:
        own_arguments: Adds the arguments of the entry point to the arguments of all entry points.
        packages: The packages of the machines that train; None if they train on CPUs.

    Attributes:
        args: Megatron's arguments, validated after all checks.
        checkpoint: The checkpoint to load; None to start from the beginning.
        mask: The routing mask; None for a model without experts.
        missing: The inputs that the command line does not name, which are errors, too.
        vocab_size: The number of ids of the tokenizer; None if there is no usable one.
        is_validated: Whether Megatron has accepted the arguments.
        is_complete: Whether the checkpoint has reached the last iteration, so that nothing is left to train.
        notes: Facts that the user should know but that do not stop the run, one line each.

    Raises:
        UserError: The command line has unknown flags, or a word that cannot be read.
    """

    def __init__(self, own_arguments: ArgumentsProvider, packages: GpuPackages | None) -> None:
        self.packages = packages
        self.checkpoint: Path | None = None
        self.mask: RoutingMask | None = None
        self.is_validated = self.is_complete = False
        self.notes: list[str] = []
        self.missing: list[MissingInput] = []
        self.vocab_size: int | None = None
        self._own_arguments = own_arguments
        self._given: set[str] = set()
        self.args = parse_args(self._add_arguments)

    # ---- What a subclass decides -------------------------------------------------------------------------------------

    def find_checkpoint(self) -> Path | None:
        """Return the checkpoint to load. Raises UserError."""
        raise NotImplementedError

    def check_pretrained_model(self) -> None:
        """Check the checkpoint in `--pretrained-checkpoint`. Raises UserError."""
        raise NotImplementedError

    def validate(self) -> Namespace:
        """Return the arguments that Megatron has validated. Raises UserError."""
        raise NotImplementedError

    def most_bytes_read(self) -> float | None:
        """Return the size in bytes up to which token ids of datasets are read; None if no datasets are needed."""
        raise NotImplementedError

    def add_arguments(self, parser: ArgumentParser) -> ArgumentParser:
        """Add all arguments of MaskMoE to Megatron's parser, which has its own; return the parser."""
        return self._own_arguments(add_maskmoe_arguments(parser))

    def missing_libraries(self) -> Iterator[str]:
        """Yield an error for each library that the run needs and that is missing."""
        yield from missing_libraries(self.args)

    def make_tokenizer(self) -> None:
        """Build Megatron's tokenizer, unless `validate` has built it. Raises UserError."""

    # ---- The checks --------------------------------------------------------------------------------------------------

    def errors(self) -> Iterator[str]:
        """Yield every error that the run would end with, in the order in which it would find them.

        A check whose preconditions are not met, because of an earlier error, is left out.
        """
        bad_values = list(value_errors(self.args))
        yield from bad_values
        if bad_values:
            return  # the other checks compute with these numbers
        yield from self._choose_checkpoint()
        yield from self._settings()
        yield from _error_of(lambda: file_checks.check_save_folder(self.args))
        yield from _error_of(lambda: check_save_folder_is_own(self.args, self.checkpoint))
        has_tokenizer = yield from self._check_tokenizer()
        yield from self._validate()
        if has_tokenizer:
            yield from self._make_tokenizer()
        if self.most_bytes_read() is not None:
            yield from self._missing(missing_dataset(self.args))
        yield from self._choose_mask()
        if self.is_validated:
            yield from self._compare_models()
        yield from self._files()
        if self.is_validated:
            yield from self._compare_settings()

    def _choose_checkpoint(self) -> Iterator[str]:
        """Choose the checkpoint, whose settings may complete the command line."""
        args = self.args
        try:
            checkpoint = self.checkpoint = self.find_checkpoint()
            resume.check_not_missing(args, checkpoint)
        except UserError as error:
            yield str(error)
            return
        if checkpoint is not None and (iteration := iteration_of(checkpoint)) is not None:
            # Pass the choice to Megatron by `--ckpt-step`, as a user would.
            args.ckpt_step = iteration
            args.loads_non_persistent = is_non_persistent(args, checkpoint)
        if args.use_checkpoint_args and checkpoint is None:
            found = "" if args.load is None else f"; --load {args.load} holds no checkpoint"
            yield f"--use-checkpoint-args needs --load with the folder of the checkpoints{found}"
        elif args.use_checkpoint_args and checkpoint is not None:
            # The command line overrides the settings of the checkpoint.
            for name, value in model_settings.further_checkpoint_args(args, checkpoint).items():
                if name not in self._given:
                    setattr(args, name, value)
            self.args = model_settings.take_settings_of_checkpoint(args, checkpoint)
            yield from value_errors(self.args)

    def _settings(self) -> Iterator[str]:
        """Check the settings by MaskMoE's own rules."""
        args = self.args
        takes_schedule = args.use_checkpoint_opt_param_scheduler and not (args.finetune or args.no_load_optim)
        yield from refused_settings(args)
        if self.packages is not None:
            yield from missing_transformer_engine(args, self.packages)
            if missing := self.packages.describe_missing():
                self.notes.append(missing)
        yield from self.missing_libraries()
        yield from missing_flags(args, takes_learning_rate=self.checkpoint is not None and takes_schedule)

    def _check_tokenizer(self) -> Generator[str, None, bool]:
        """Check the tokenizer's file, save its digest with the other arguments, and return whether it is usable."""
        args = self.args
        args.tokenizer_sha256 = None
        try:
            yield from self._missing(missing_tokenizer(args))
            if args.tokenizer_type is not None:
                args.tokenizer_sha256 = file_checks.check_tokenizer(args)
                return True
        except UserError as error:
            yield str(error)
        return False

    def _make_tokenizer(self) -> Iterator[str]:
        """Build the tokenizer, which says how many ids there are."""
        try:
            self.make_tokenizer()
            self.vocab_size = get_tokenizer().vocab_size
        except UserError as error:
            yield str(error)

    def _choose_mask(self) -> Iterator[str]:
        """Read the routing mask."""
        missing = list(missing_mask(self.args, self.vocab_size, self.checkpoint is not None))
        yield from self._missing(missing)
        if not missing:
            try:
                self.mask = find_routing_mask(self.args, self.checkpoint, self.notes.append)
            except UserError as error:
                yield str(error)

    def _missing(self, inputs: Iterable[MissingInput]) -> Iterator[str]:
        """Record missing inputs, and yield an error for each."""
        for missing in inputs:
            self.missing.append(missing)
            yield str(missing)

    def _validate(self) -> Iterator[str]:
        """Check the settings by Megatron's rules."""
        errors = list(layout_errors(self.args, 0 if self.checkpoint is None else iteration_of(self.checkpoint) or 0))
        yield from errors
        if errors:
            return
        try:
            self.args = self.validate()
            self.is_validated = True
        except UserError as error:
            yield str(error)

    def _files(self) -> Iterator[str]:
        """Check that mask, tokenizer and datasets fit the model and each other."""
        args, mask = self.args, self.mask
        knows_layers = self.is_validated or (args.hybrid_layer_pattern is None and args.num_layers is not None)
        if self.vocab_size is not None and mask is not None and knows_layers:
            yield from _error_of(lambda: file_checks.check_mask(args, mask))
        if self.vocab_size is not None and args.fim_data:
            yield from _error_of(lambda: check_fill_in_middle_tokens(args))
        most_bytes_read = self.most_bytes_read()
        if most_bytes_read is not None:
            yield from file_checks.data_errors(args, mask, self.vocab_size, most_bytes_read)

    def _compare_models(self) -> Iterator[str]:
        """Check that the checkpoint holds the model of the run."""
        args, checkpoint = self.args, self.checkpoint
        if checkpoint is not None:
            yield from _error_of(lambda: model_settings.check_same_model(args, checkpoint))
            take_schedule_of_checkpoint(args, checkpoint)
        yield from _error_of(self.check_pretrained_model)
        if args.loads_non_persistent:
            args.pretrained_checkpoint = None  # Megatron would prefer it if there is no persistent checkpoint

    def _compare_settings(self) -> Iterator[str]:
        """Compare the remaining settings with those of the checkpoint."""
        if any(missing_flags(self.args)):
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
        parser = self.add_arguments(parser)
        refuse_unknown_flags(parser, sys.argv[1:])
        actions = (parser._option_string_actions.get(word.partition("=")[0]) for word in sys.argv[1:])
        self._given = {action.dest for action in actions if action is not None}
        return parser


def _error_of(check: Callable[[], object]) -> Iterator[str]:
    """Yield the message of the `UserError` that a check raises, if it raises one."""
    try:
        check()
    except UserError as error:
        yield str(error)
