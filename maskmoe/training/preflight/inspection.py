"""Inspects the command line and the files of a run: finds all errors, not only the first, and measures the run."""

import re
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from megatron.core.tokenizers.utils.build_tokenizer import vocab_size_with_padding
from megatron.core.transformer.moe.moe_layer import HAVE_TE
from megatron.training.argument_utils import pretrain_cfg_container_from_args
from megatron.training.arguments import parse_args, validate_args
from megatron.training.checkpointing import load_args_from_checkpoint
from megatron.training.global_vars import rebuild_tokenizer

from maskmoe.checkpoint.non_persistent import is_non_persistent, non_persistent_folder
from maskmoe.checkpoint.routing_mask import read_routing_mask
from maskmoe.checkpoint.series import choose_checkpoint, iteration_of
from maskmoe.command_line.parser import refuse_unknown_flags
from maskmoe.errors import UserError
from maskmoe.megatron_compat import cpu
from maskmoe.megatron_compat.globals import get_tokenizer
from maskmoe.megatron_compat.gpu import GpuPackages
from maskmoe.routing_mask.mask import RoutingMask
from maskmoe.training.loop.model_builder import MaskMoEModelConfig
from maskmoe.training.preflight.cost import compute_cost
from maskmoe.training.preflight.memory import compute_memory
from maskmoe.training.preflight.missing import ASSUMED_VOCAB_SIZE, MissingInput, missing_inputs, names_dataset
from maskmoe.training.preflight.parameters import count_parameters
from maskmoe.training.preflight.report import Report
from maskmoe.training.resume.choose_checkpoint import (
    check_not_missing,
    check_pretrained_model,
    check_same_model,
    further_checkpoint_args,
)
from maskmoe.training.resume.rewinding import check_may_resume, describe_rewinds, own_rewinds
from maskmoe.training.settings import file_checks
from maskmoe.training.settings.arguments import add_maskmoe_arguments
from maskmoe.training.settings.changed_settings import find_changed_settings, take_schedule_of_checkpoint
from maskmoe.training.settings.flag_ranges import range_errors
from maskmoe.training.settings.layer_division import layer_errors
from maskmoe.training.settings.layer_pattern import ignored_flags, pattern_errors
from maskmoe.training.settings.layout import Layout, size_errors
from maskmoe.training.settings.refusals import missing_libraries, unavailable_settings, unsupported_settings
from maskmoe.training.settings.required_flags import missing_flags, missing_sizes
from maskmoe.training.settings.setup import (
    ArgumentsProvider,
    find_routing_mask,
    megatrons_checks,
    model_config_from_args,
)

# Reading the token ids of a larger dataset would take more than a few seconds.
_MOST_BYTES_READ = 1 << 30

# The machine of the check may lack Transformer Engine, and Megatron then refuses the settings that are replaced here.
# None of them changes the shape of a parameter.
_WITHOUT_TRANSFORMER_ENGINE = {
    "moe_permute_fusion": False,
    "use_precision_aware_optimizer": False,
    **dict.fromkeys(("main_grads_dtype", "main_params_dtype", "exp_avg_dtype", "exp_avg_sq_dtype"), torch.float32),
    "fp8": None,
    "fp4": None,
}
_MISSING_TRANSFORMER_ENGINE = re.compile(
    r"^invalid settings: .*(transformer.?engine|TE >|is_te_min_version)", re.IGNORECASE
)


class Inspection:
    """Makes the checks of a run in the order of the run, but continues after an error; then measures the run.

    Args:
        ranks: the number of ranks that the run would have.
        extra_args_provider: adds the arguments of the entry point to the common arguments.

    Raises:
        UserError: the command line of this process has unknown flags.
    """

    def __init__(self, ranks: int, extra_args_provider: ArgumentsProvider) -> None:
        self._errors: list[str] = []
        self._notes: list[str] = []
        # Without GPUs here, the run is on other machines.
        self._packages = GpuPackages() if cpu.is_installed() else GpuPackages.installed()
        self._ranks, self._extra_args_provider = ranks, extra_args_provider
        self._args = self._parse()

    def report(self) -> Report:
        """Make all checks, and compute the layout, parameters and memory as far as they are known."""
        args = self._args
        self._add(range_errors(args))
        if self._errors:
            return Report(tuple(self._errors))  # the other checks compute with these numbers
        # The arguments: given, or read from a checkpoint.
        checkpoint = self._find_checkpoint()
        if args.use_checkpoint_args and checkpoint is not None:
            chosen = {name: getattr(args, name) for name in ("ckpt_step", "loads_non_persistent")}
            args = self._args = self._parse(**chosen, **further_checkpoint_args(args, checkpoint))
            load_args_from_checkpoint(args)
        # Settings, sizes and files, by our own rules.
        layout = Layout.from_args(args)
        iteration = 0 if checkpoint is None else iteration_of(checkpoint) or 0
        errors_of_sizes = list(size_errors(args, iteration))
        self._add(missing_flags(args, checkpoint is not None))
        self._add(chain(unavailable_settings(args, self._packages), unsupported_settings(args)))
        self._add(chain(pattern_errors(args), errors_of_sizes, layer_errors(args)))
        if not self._has_unreadable_layers():
            self._notes += ignored_flags(args)
        if missing := self._packages.describe_missing():
            self._notes.append(missing)
        self._notes += missing_libraries(args)  # the machine of the check may lack what the machine of the run has
        with self._collecting():
            file_checks.check_save_folder(args)
        mask = self._find_mask(checkpoint)
        # Megatron's rules. The remaining checks use the validated arguments if there are some.
        validated = self._validate(layout)
        args = validated or args
        if validated is not None and not errors_of_sizes:
            # Validation derives further sizes, such as the model chunks of a --pipeline-model-parallel-layout.
            errors_of_sizes += size_errors(validated, iteration)
            self._add(errors_of_sizes)
        divides = not errors_of_sizes
        has_tokenizer = self._make_tokenizer(args)
        assumed_size = None if has_tokenizer else self._assume_vocabulary(args, mask)
        if has_tokenizer and mask is not None and args.num_experts and args.num_layers:
            with self._collecting():
                file_checks.check_mask(args, mask)
        if validated is not None and checkpoint is not None:
            with self._collecting():
                check_same_model(args, checkpoint)
        # The run itself checks the token ids of large datasets.
        vocab_size = get_tokenizer().vocab_size if has_tokenizer else None
        unread = []
        if names_dataset(args):
            unread = file_checks.check_data(args, mask, vocab_size, _MOST_BYTES_READ, self._collecting)
        consequence = "was not counted for the mask: the run checks its token ids when it starts"
        self._notes += [f"dataset {prefix} {consequence}" for prefix in unread]
        if validated is not None:
            with self._collecting():
                check_pretrained_model(validated, checkpoint)
                if checkpoint is not None:
                    take_schedule_of_checkpoint(validated, checkpoint)
                changed = find_changed_settings(validated, checkpoint)
                self._add(changed.errors)
                self._notes += changed.notes
        # The validated arguments have a layout that divides, so the model is known even if the given layout does not.
        model = memory = cost = None
        if validated is not None and not self._has_unbuildable_layers():
            with self._collecting():
                config = _model_config(validated)
                with _reporting_failure_of("the model"), megatrons_checks():
                    model = count_parameters(validated, config, mask)
                memory = compute_memory(validated, config.transformer, model) if divides else None
                cost = compute_cost(validated, config.transformer, model) if divides else None
        # Missing inputs come last.
        inputs: tuple[MissingInput, ...] = ()
        if not self._has_unreadable_layers():
            inputs = tuple(missing_inputs(args, assumed_size or vocab_size or 0, checkpoint is not None))
        if mask is None and args.num_experts and model is not None:
            self._notes.append(
                f"without a routing mask, the report assumes that each token uses {args.moe_router_topk} experts "
                "(--moe-router-topk); a token with fewer visible experts uses fewer"
            )
        errors, notes = (tuple(dict.fromkeys(lines)) for lines in (self._errors, self._notes))
        return Report(errors, notes, layout if divides else None, model, memory, cost, inputs)

    def _parse(self, **defaults: Any) -> Namespace:
        """Parse the command line of this process.

        Args:
            defaults: settings that replace the defaults of their flags.
        """
        args = parse_args(partial(_add_arguments, self._extra_args_provider, defaults))
        args.world_size, args.rank = self._ranks, 0
        return args

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
            if self._packages.transformer_engine and not HAVE_TE and _MISSING_TRANSFORMER_ENGINE.match(error):
                self._notes.append(f"cannot be judged on this machine, which lacks Transformer Engine: {error}")
            else:
                self._errors.append(error)

    def _has_unbuildable_layers(self) -> bool:
        """Return whether an error or a note already says that a pattern cannot be built."""
        return any(line.startswith("--hybrid-layer-pattern") for line in (*self._errors, *self._notes))

    def _has_unreadable_layers(self) -> bool:
        """Return whether an error says that the pattern, from which the number of layers follows, cannot be read."""
        return any(pattern_errors(self._args))

    def _find_checkpoint(self) -> Path | None:
        """Return the checkpoint that the run would load, if any, and record its iteration in the arguments."""
        args = self._args
        if args.load is None:
            if args.use_checkpoint_args:
                self._add(["--use-checkpoint-args needs --load with the folder of the checkpoints"])
            return None
        with self._collecting():
            rewinds = own_rewinds(args)
            if rewinds.all:
                self._notes.append(describe_rewinds(rewinds))
            choice = choose_checkpoint(
                args.load,
                args.ckpt_step,
                partial(check_may_resume, args, rewinds),
                non_persistent=non_persistent_folder(args, args.load),
            )
            self._notes += [f"checkpoint {damage}" for damage in choice.rejected]
            check_not_missing(args, choice.checkpoint)
            if choice.checkpoint is None:
                self._notes.append(f"--load {args.load} holds no checkpoint: training starts from the beginning")
            elif choice.iteration is not None:
                args.ckpt_step = choice.iteration
                args.loads_non_persistent = is_non_persistent(args, choice.checkpoint)
            return choice.checkpoint
        return None

    def _find_mask(self, checkpoint: Path | None) -> RoutingMask | None:
        """Return the routing mask of the run; None if there is none, or none that can be read."""
        if self._args.routing_mask is None and checkpoint is None:
            return None  # `missing_inputs` reports it
        with self._collecting():
            return find_routing_mask(self._args, checkpoint, self._notes.append)
        if self._args.routing_mask and checkpoint is not None:
            # If the mask in the file is bad, the mask in the checkpoint has not been read yet.
            with self._collecting():
                read_routing_mask(checkpoint)
        return None

    def _validate(self, layout: Layout) -> Namespace | None:
        """Let Megatron validate a copy of the arguments, with numbers of ranks and samples that divide.

        A missing micro-batch size or interval between checkpoints is filled in, so that other errors are found, too.

        Returns:
            The validated arguments; None if Megatron refuses them.
        """
        if any(chain(missing_sizes(self._args), pattern_errors(self._args), layer_errors(self._args))):
            # Megatron would only report the same errors in other words.
            return None
        args, repaired = deepcopy(self._args), layout.repaired()
        args.world_size, args.global_batch_size = repaired.ranks, args.global_batch_size and repaired.global_batch
        args.micro_batch_size, args.save_interval = repaired.micro_batch, args.save_interval or 1
        with self._collecting(), megatrons_checks():
            validate_args(args)
            args.save_interval = self._args.save_interval
            return args
        return None

    def _make_tokenizer(self, args: Namespace) -> bool:
        """Build Megatron's tokenizer and record its digest in the arguments; return whether there was no error."""
        args.tokenizer_sha256 = None
        if args.tokenizer_type is None:
            return False  # `missing_inputs` reports it
        with self._collecting():
            args.tokenizer_sha256 = file_checks.check_tokenizer(args)
            with _reporting_failure_of(f"the tokenizer ({args.tokenizer_type} {args.tokenizer_model})"):
                rebuild_tokenizer(args)
            return True
        return False

    def _assume_vocabulary(self, args: Namespace, mask: RoutingMask | None) -> int:
        """Set the padded vocabulary size of a model without a tokenizer, add a note, and return the number of ids."""
        size, source = ASSUMED_VOCAB_SIZE, "pass --vocab-size N for another number"
        if args.vocab_size:
            size, source = args.vocab_size, "--vocab-size"
        elif mask is not None:
            size, source = mask.vocab_size, "the routing mask's"
        if not args.padded_vocab_size:
            args.padded_vocab_size = vocab_size_with_padding(size, args, logging_enabled=False)
        of_thousand = 1000 * (args.hidden_size or 0) * (2 if args.untie_embeddings_and_output_weights else 1)
        self._notes.append(
            f"without a tokenizer, the report assumes a vocabulary of {size:,} ids ({source}); 1,000 ids are "
            f"{of_thousand / 1e6:.3g} M parameters"
        )
        return size


def _model_config(args: Namespace) -> MaskMoEModelConfig:
    """Return the configuration of the model. Raises UserError if Megatron refuses it."""
    buildable = Namespace(**vars(args))
    buildable.routing_mask = args.routing_mask or args.load or "missing"
    buildable.spec = None  # `unsupported_settings` has reported it
    if not HAVE_TE:
        vars(buildable).update(_WITHOUT_TRANSFORMER_ENGINE)
        # With multi-latent attention, Megatron judges the fusion without looking for Transformer Engine.
        buildable.apply_rope_fusion = args.apply_rope_fusion and args.multi_latent_attention
    with _reporting_failure_of("the model's configuration"), megatrons_checks():
        config = model_config_from_args(buildable)
        pretrain_cfg_container_from_args(buildable, config)
        config.finalize()
    return config


@contextmanager
def _reporting_failure_of(what: str) -> Iterator[None]:
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


def _add_arguments(
    extra_args_provider: ArgumentsProvider, defaults: Mapping[str, Any], parser: ArgumentParser
) -> ArgumentParser:
    """Add all arguments; on a machine without GPUs, with the defaults on GPUs unless the command line is for CPUs.

    The machine of the check may have no GPU although the run has GPUs.

    Args:
        extra_args_provider: adds the arguments of the entry point to the common arguments.
        defaults: settings that replace all other defaults.
        parser: gets the arguments, and is returned.
    """
    defaults_on_cpu = cpu.argument_defaults() if cpu.is_installed() else {}
    defaults_on_gpu = {name: parser.get_default(name) for name in defaults_on_cpu}
    if defaults_on_gpu:
        defaults_on_gpu |= GpuPackages().argument_defaults()
    parser = extra_args_provider(add_maskmoe_arguments(parser))
    refuse_unknown_flags(parser, sys.argv[1:])
    parser.set_defaults(**defaults_on_gpu)
    if parser.parse_known_args()[0].distributed_backend == "gloo":  # a run on CPUs asks for gloo explicitly
        parser.set_defaults(**defaults_on_cpu)
    parser.set_defaults(**defaults)
    return parser
