"""Finds all errors in the command line and the files of a run, not only the first."""

import re
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path

import torch
from megatron.core.transformer.moe.moe_layer import HAVE_TE
from megatron.training.argument_utils import pretrain_cfg_container_from_args
from megatron.training.arguments import parse_args, validate_args
from megatron.training.checkpointing import load_args_from_checkpoint
from megatron.training.global_vars import rebuild_tokenizer

from maskmoe.check.layout import Layout, layer_errors
from maskmoe.checkpoint.routing_mask import read_routing_mask
from maskmoe.checkpoint.series import choose_checkpoint
from maskmoe.data.indexed_dataset import read_index
from maskmoe.errors import UserError
from maskmoe.routing_mask.mask import RoutingMask
from maskmoe.training.arguments import add_maskmoe_arguments, refuse_unknown_flags
from maskmoe.training.file_checks import (
    check_mask,
    check_save_folder,
    check_tokenizer,
    current_vocab_size,
    data_errors,
    data_prefixes,
    tokenizer_sha256,
    was_counted,
)
from maskmoe.training.model_builder import MaskMoEGPTModelConfig
from maskmoe.training.refusals import unsupported_settings
from maskmoe.training.resume import check_same_model
from maskmoe.training.setup import ArgumentsProvider, find_routing_mask, megatrons_checks, model_config_from_args

# Reading the token ids of a larger dataset would take more than a few seconds.
_MOST_BYTES_READ = 1 << 30

# The machine of the check may lack Transformer Engine, and Megatron then refuses the settings that are replaced here.
# None of them changes the shape of a parameter.
_WITHOUT_TRANSFORMER_ENGINE = {
    "apply_rope_fusion": False,
    "moe_permute_fusion": False,
    "use_precision_aware_optimizer": False,
    **dict.fromkeys(("main_grads_dtype", "main_params_dtype", "exp_avg_dtype", "exp_avg_sq_dtype"), torch.float32),
    "fp8": None,
    "fp4": None,
}
_MISSING_TRANSFORMER_ENGINE = re.compile(
    r"^invalid settings: .*(transformer.?engine|TE >|is_te_min_version)", re.IGNORECASE
)


@dataclass(frozen=True)
class Findings:
    """The result of checking a command line.

    Attributes:
        errors: the errors that the run would end with, one line each.
        notes: facts that the user should know but that do not stop the run, one line each.
        layout: the layout on the command line; its sizes need not divide each other.
        args: arguments that Megatron has validated, with a layout that divides; None if Megatron refuses them.
        config: the model's configuration; None if Megatron refuses it, or if the size of the vocabulary is unknown.
        mask: the routing mask; None if there is none, or none that can be read.
    """

    errors: tuple[str, ...]
    notes: tuple[str, ...]
    layout: Layout
    args: Namespace | None
    config: MaskMoEGPTModelConfig | None
    mask: RoutingMask | None


def find_problems(ranks: int, extra_args_provider: ArgumentsProvider) -> Findings:
    """Check the command line of this process.

    Args:
        ranks: the number of ranks that the run would have.
        extra_args_provider: adds the arguments of the entry point to the common arguments.

    Raises:
        UserError: the command line has unknown flags.
    """
    return _ProblemFinder(ranks, extra_args_provider).run()


class _ProblemFinder:
    """Makes the checks of a run in the order of the run, but continues after an error.

    Args:
        ranks: the number of ranks that the run would have.
        extra_args_provider: adds the arguments of the entry point to the common arguments.
    """

    def __init__(self, ranks: int, extra_args_provider: ArgumentsProvider) -> None:
        self._errors: list[str] = []
        self._notes: list[str] = []
        self._args = parse_args(partial(_add_arguments, extra_args_provider))
        self._args.world_size, self._args.rank = ranks, 0

    def run(self) -> Findings:
        """Make all checks."""
        args = self._args
        # The arguments: given, or read from a checkpoint.
        checkpoint = self._find_checkpoint()
        if args.use_checkpoint_args and checkpoint is not None:
            load_args_from_checkpoint(args)
        # Settings, sizes and files, by our own rules.
        layout = Layout.from_args(args)
        errors = (unsupported_settings(args), layout.errors(), layer_errors(args))
        self._add(chain.from_iterable(errors))
        with self._collecting():
            check_save_folder(args)
        mask = self._find_mask(checkpoint)
        # Megatron's rules. The remaining checks use the validated arguments if there are some.
        validated = self._validate(layout)
        has_tokenizer = self._make_tokenizer(validated or args)
        self._check_files(validated or args, mask, checkpoint, has_tokenizer, is_valid=validated is not None)
        config = self._model_config(validated) if validated and has_tokenizer else None
        return Findings(
            errors=tuple(dict.fromkeys(self._errors)),
            notes=tuple(dict.fromkeys(self._notes)),
            layout=layout,
            args=validated,
            config=config,
            mask=mask,
        )

    @contextmanager
    def _collecting(self) -> Iterator[None]:
        """Record a `UserError` of the block instead of raising it."""
        try:
            yield
        except UserError as error:
            self._add([str(error)])

    def _add(self, errors: Iterable[str]) -> None:
        """Record errors; an error that only a missing Transformer Engine causes becomes a note."""
        for error in errors:
            if not HAVE_TE and _MISSING_TRANSFORMER_ENGINE.match(error):
                self._notes.append(f"cannot be judged on this machine, which lacks Transformer Engine: {error}")
            else:
                self._errors.append(error)

    def _find_checkpoint(self) -> Path | None:
        """Return the checkpoint that the run would load, if any, and record its iteration in the arguments."""
        args = self._args
        if args.load is None:
            if args.use_checkpoint_args:
                self._add(["--use-checkpoint-args needs --load with the folder of the checkpoints"])
            return None
        with self._collecting():
            choice = choose_checkpoint(args.load, args.ckpt_step)
            self._notes += [f"checkpoint {path} {reason}" for path, reason in choice.rejected]
            if choice.checkpoint is None:
                self._notes.append(f"--load {args.load} holds no checkpoint: training starts from the beginning")
            elif choice.iteration is not None:
                args.ckpt_step = choice.iteration
            return choice.checkpoint
        return None

    def _find_mask(self, checkpoint: Path | None) -> RoutingMask | None:
        """Return the routing mask of the run; None if there is none, or none that can be read."""
        with self._collecting():
            return find_routing_mask(self._args, checkpoint)
        if self._args.routing_mask and checkpoint is not None:
            # If the mask in the file is bad, the mask in the checkpoint has not been read yet.
            with self._collecting():
                read_routing_mask(checkpoint)
        return None

    def _validate(self, layout: Layout) -> Namespace | None:
        """Let Megatron validate a copy of the arguments, with numbers of ranks and samples that divide.

        Returns:
            The validated arguments; None if Megatron refuses them.
        """
        if any(layer_errors(self._args)):
            # Megatron would only report the same errors in other words.
            return None
        args = deepcopy(self._args)
        repaired = layout.repaired()
        args.world_size = repaired.ranks
        # Megatron refuses grouped experts without a GPU, which the machine of the check need not have.
        args.moe_grouped_gemm = self._args.moe_grouped_gemm and not _defaults_of_cpu()
        if any(layout.errors()) and args.global_batch_size:
            args.global_batch_size = repaired.global_batch
        with self._collecting(), megatrons_checks():
            validate_args(args)
            args.moe_grouped_gemm = self._args.moe_grouped_gemm
            return args
        return None

    def _check_files(
        self, args: Namespace, mask: RoutingMask | None, checkpoint: Path | None, has_tokenizer: bool, is_valid: bool
    ) -> None:
        """Check mask, checkpoint and datasets against the arguments."""
        if has_tokenizer and mask is not None and args.num_experts and args.num_layers:
            with self._collecting():
                check_mask(args, mask)
        if is_valid and checkpoint is not None:
            with self._collecting():
                check_same_model(args, checkpoint)
        vocab_size = current_vocab_size() if has_tokenizer else None
        self._add(data_errors(args, mask, vocab_size, _MOST_BYTES_READ))
        self._note_unread_ids(args, mask)

    def _make_tokenizer(self, args: Namespace) -> bool:
        """Build Megatron's tokenizer and record its digest in the arguments; return whether there was no error."""
        args.tokenizer_sha256 = None
        errors_before = len(self._errors)
        with self._collecting():
            check_tokenizer(args)
        if len(self._errors) > errors_before:
            return False
        with self._collecting(), reporting_failure_of(f"the tokenizer ({args.tokenizer_type} {args.tokenizer_model})"):
            args.tokenizer_sha256 = tokenizer_sha256(args)
            rebuild_tokenizer(args)
        return len(self._errors) == errors_before

    def _note_unread_ids(self, args: Namespace, mask: RoutingMask | None) -> None:
        """Note the datasets whose token ids nothing has checked yet."""
        for prefix in dict.fromkeys(data_prefixes(args)):
            try:
                index = read_index(prefix)
            except UserError:
                continue
            if index.bin_bytes > _MOST_BYTES_READ and not was_counted(index, mask):
                self._notes.append(
                    f"dataset {prefix} was not counted for the mask: the run checks its token ids when it starts"
                )

    def _model_config(self, args: Namespace) -> MaskMoEGPTModelConfig | None:
        """Return the configuration of the model; None if Megatron refuses it."""
        buildable = Namespace(**vars(args))
        buildable.routing_mask = args.routing_mask or args.load or "missing"
        buildable.spec = None  # `unsupported_settings` has reported it
        if not HAVE_TE:
            vars(buildable).update(_WITHOUT_TRANSFORMER_ENGINE)
        with self._collecting(), reporting_failure_of("the model's configuration"), megatrons_checks():
            config = model_config_from_args(buildable)
            pretrain_cfg_container_from_args(buildable, config)
            config.finalize()
            return config
        return None


@contextmanager
def reporting_failure_of(what: str) -> Iterator[None]:
    """Turn any exception of the block into a UserError: a run would fail with the same exception.

    Args:
        what: the thing that the block makes.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{what} cannot be made: {reason or type(error).__name__}") from error


def _add_arguments(extra_args_provider: ArgumentsProvider, parser: ArgumentParser) -> ArgumentParser:
    """Add all arguments, with their defaults on GPUs unless the command line is for CPUs.

    The machine of the check may have no GPU although the run has GPUs.
    """
    stock = {name: parser.get_default(name) for name in _defaults_of_cpu()}
    parser = extra_args_provider(add_maskmoe_arguments(parser))
    refuse_unknown_flags(parser, sys.argv[1:])
    if not _is_for_cpus(sys.argv):
        parser.set_defaults(**stock)
    return parser


def _defaults_of_cpu() -> Sequence[str]:
    """Return the names of the arguments whose defaults the CPU adapter changes; none if it is not in use."""
    adapter = sys.modules.get("maskmoe.megatron_compat.cpu")
    return tuple(adapter.argument_defaults()) if adapter else ()


def _is_for_cpus(argv: Sequence[str]) -> bool:
    """Return whether a command line is for a run on CPUs, which asks for gloo explicitly."""
    parser = ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--distributed-backend")
    return parser.parse_known_args(argv)[0].distributed_backend == "gloo"
