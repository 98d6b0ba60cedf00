"""Pretrain a MaskMoE language model: `torchrun … -m maskmoe.training.pretrain <Megatron flags> --routing-mask FILE`.

On SIGTERM or SIGUSR1 the run saves a checkpoint and exits with code 75; started again, it resumes. The other exit codes
are 1 if the run failed, 2 for bad input, before anything was done, and 76 if a rank hung.
"""

import os
import sys
from argparse import ArgumentParser, BooleanOptionalAction, Namespace
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import torch
from megatron.core.enums import ModelType
from megatron.core.transformer.moe.moe_logging import set_moe_metrics_tracker
from megatron.training import pretrain
from megatron.training.argument_utils import pretrain_cfg_container_from_args

from maskmoe.checkpoint.megatron_patches import keep_checkpoints_whole, override_learning_rates
from maskmoe.command_line import ranges
from maskmoe.errors import UserError
from maskmoe.launch.journal import Journal, Kind
from maskmoe.launch.run_folder import ARGUMENTS, run_folder
from maskmoe.megatron_compat.globals import get_args, get_timers, open_writers
from maskmoe.processes.folder_lock import locked_folder
from maskmoe.routing_mask.feed_forward_layers import FeedForwardLayers
from maskmoe.routing_mask.mask import RoutingMask
from maskmoe.training.loop.batch import build_datasets, get_batch, loss_function, token_losses
from maskmoe.training.loop.megatron_patches import pass_batches_of_every_chunk, watch_steps
from maskmoe.training.loop.model_builder import MaskMoEModelConfig
from maskmoe.training.loop.rank_store import RankStore, check_launched
from maskmoe.training.resume.choose_checkpoint import checkpoint_to_load, mend_tracker, saved_spike_history
from maskmoe.training.resume.rewinding import Rewinder, set_abandoned_aside
from maskmoe.training.resume.rewinds import loads_what_it_saves
from maskmoe.training.settings.arguments import add_check_argument
from maskmoe.training.settings.batch_sizes import training_iterations
from maskmoe.training.settings.changed_settings import has_one_learning_rate
from maskmoe.training.settings.file_checks import data_prefixes
from maskmoe.training.settings.layout import Layout
from maskmoe.training.settings.saved_arguments import save_arguments
from maskmoe.training.settings.setup import (
    CheckedRun,
    embedding_ranks_of,
    leaving_process_groups,
    model_config_from_args,
    parse_and_check_args,
)
from maskmoe.training.settings.watch_arguments import add_watch_arguments
from maskmoe.training.watch.collapse_watch import CollapseWatch
from maskmoe.training.watch.console import console
from maskmoe.training.watch.end_of_run import recording_end, writing_page
from maskmoe.training.watch.event_files import choose_event_folder, log_command, writing_events
from maskmoe.training.watch.failures import (
    DataFiles,
    check_first_step,
    handling_early_ends,
    reporting_end,
    save_on_signals,
)
from maskmoe.training.watch.header import describe_layout, describe_start, show_header
from maskmoe.training.watch.leaving import LeaveAfterSave
from maskmoe.training.watch.router_metrics import HybridMetricsTracker
from maskmoe.training.watch.routing_log import RoutingLog
from maskmoe.training.watch.run_warnings import RunWarnings
from maskmoe.training.watch.spike_watch import SpikeWatch
from maskmoe.training.watch.spikes import SpikeDetector
from maskmoe.training.watch.step_time import StepTime
from maskmoe.training.watch.wandb_run import take_run_id
from maskmoe.training.watch.watchdog import Watchdog

_DATA_FILES_A_STEP = 8


def forward_step(data_iterator: Iterator, model: torch.nn.Module, before: Iterable[Callable[[], object]]) -> tuple:
    """Run one micro-batch forward; return the model's output and the function that computes the loss from it.

    Args:
        data_iterator: Samples, as `get_batch` takes them.
        model: One pipeline stage.
        before: Functions to call before each micro-batch.
    """
    for call in before:
        call()
    args = get_args()
    timers = get_timers()
    timers("batch-generator", log_level=2).start()
    batch = get_batch(data_iterator, args.micro_batch_size if model.training else args.eval_micro_batch_size)
    timers("batch-generator").stop()
    return token_losses(model, batch), partial(loss_function, batch.loss_mask)


def add_pretraining_arguments(parser: ArgumentParser) -> ArgumentParser:
    """Add the arguments that only training has, and let signals save a checkpoint by default."""
    group = parser.add_argument_group(title="long runs")
    group.add_argument(
        "--change-routing-mask",
        action="store_true",
        help="let the mask in --routing-mask replace another mask of the checkpoint in --load. Both must have the same "
        "vocabulary, number of experts and number of tables. Later checkpoints hold the new mask, so the flag then "
        "changes nothing",
    )
    group.add_argument(
        "--keep-last-checkpoints",
        type=ranges.CHECKPOINTS,
        metavar="N",
        help="keep the newest N checkpoints in --save and the multiples of --save-retain-interval, and remove all "
        "others; by default all checkpoints are kept",
    )
    group.add_argument(
        "--hang-timeout",
        type=ranges.TIMEOUT,
        metavar="SECONDS",
        help="end the run, and name the rank that hangs, if no rank begins a micro-batch for this long; "
        "default: half of --distributed-timeout-minutes",
    )
    group.add_argument(
        "--report",
        action=BooleanOptionalAction,
        default=True,
        help="write event files of TensorBoard and, at the end of the run, the page report.html into the run folder "
        "(default: on)",
    )
    add_watch_arguments(parser)
    parser.set_defaults(
        exit_signal_handler=True,
        log_timers_to_tensorboard=True,  # the status shows the time of an iteration
        # Megatron switches asynchronous saving off without this setting, with a warning that is easily overlooked.
        use_persistent_ckpt_worker=True,
        async_strategy="nvrx" if find_spec("nvidia_resiliency_ext") else "mcore",
    )
    return add_check_argument(parser)


def hang_timeout(args: Namespace) -> float:
    """Return the seconds without a micro-batch after which a rank counts as hanging.

    The default lets the verdict come before `--distributed-timeout-minutes`, when NCCL would abort without a verdict.
    """
    return args.hang_timeout or 0.5 * 60 * args.distributed_timeout_minutes


def _open_run_folder(args: Namespace, folder: Path | None) -> Path | None:
    """Write the arguments and the log to the run folder from now on; return the folder.

    A refused run leaves no files, so call this when all ranks have met in process groups: then none has been refused.

    Args:
        args: Megatron's validated arguments.
        folder: The run folder, or None if there is none.
    """
    console.open_log(folder)
    console.shows_timers = args.timing_log_level > 0
    if folder is not None and args.rank == 0:
        # Megatron computes the number of iterations from --train-samples later, so add the number here.
        complete = Namespace(**vars(args) | {"train_iters": training_iterations(args)})
        try:
            save_arguments(complete, sys.argv[1:], folder)
        except OSError as error:
            console.say(f"note: cannot write {folder / ARGUMENTS}: {error.strerror}")
        _record_start(args, folder)
    return folder


def _record_start(args: Namespace, folder: Path) -> None:
    """Write the start of the ranks into the run's journal.

    Args:
        args: Megatron's validated arguments.
        folder: The run folder.
    """
    layout = Layout.from_args(args)
    checkpoint = checkpoint_to_load(args)
    Journal(folder).write(
        Kind.STARTED,
        f"{describe_layout(layout)}; {describe_start(args)}",
        args.ckpt_step if checkpoint else 0,
        ranks=layout.ranks,
        tensor=layout.tensor,
        pipeline=layout.pipeline,
        context=layout.context,
        expert=layout.expert,
        expert_tensor=layout.expert_tensor,
        attempt=int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)),
    )


def main() -> None:
    """Pretrain as the command line says."""
    # Check everything before any process group exists.
    run = parse_and_check_args(add_pretraining_arguments)
    # A complete run still saves into another folder than it loads from, for example in another layout of ranks.
    if run.is_complete and (run.args.save is None or loads_what_it_saves(run.args)):
        return
    check_launched()
    model_config = model_config_from_args(run.args)
    let_signals_save = save_on_signals(run.args)
    # A refused run leaves no files, so wait until no rank can refuse the run any more.
    ranks = RankStore.from_environment()
    ranks.wait_for_all("checks")
    with writing_page(run.args, ranks), locked_by_first_rank(_folders_to_lock(run.args), ranks):
        mend_tracker(run.args, ranks)
        set_abandoned_aside(run.args, ranks, run.rewinds)
        train(run, model_config, ranks, let_signals_save)


def _folders_to_lock(args: Namespace) -> list[Path]:
    """Return the folders of checkpoints that no other run may write to."""
    save, local = args.save, args.non_persistent_global_ckpt_dir
    return [Path(folder) for folder in (save, local) if save is not None and folder is not None]


@contextmanager
def entering_all(managers: Iterable[Callable[[], AbstractContextManager]]) -> Iterator[None]:
    """Enter several context managers around a block, in their order.

    Args:
        managers: Functions that make the context managers.
    """
    with ExitStack() as stack:
        for manager in managers:
            stack.enter_context(manager())
        yield


@contextmanager
def locked_by_first_rank(folders: Sequence[Path], ranks: RankStore) -> Iterator[None]:
    """Let the first rank hold the locks of folders during the block; all ranks wait for the locks.

    Args:
        folders: The folders that the run writes to.
        ranks: Messages between the ranks.

    Raises:
        UserError: Another run trains in one of the folders.
    """
    with ExitStack() as stack:
        problem = ""
        try:
            for folder in folders if ranks.rank == 0 else ():
                stack.enter_context(locked_folder(folder))
        except UserError as error:
            problem = str(error)
            raise
        finally:
            # The other ranks wait for an answer, so send one even if this rank fails.
            problem = ranks.broadcast("locks of the folders", problem)
        if problem:
            raise UserError(problem)
        yield


def train(
    run: CheckedRun, model_config: MaskMoEModelConfig, ranks: RankStore, let_signals_save: Callable[[], object]
) -> None:
    """Train, and handle the ways in which the run may end early.

    Args:
        run: The run, which no rank has refused.
        model_config: The model of the run.
        ranks: Messages between the ranks.
        let_signals_save: Makes signals save a checkpoint, see `save_on_signals`.
    """
    args = run.args
    watchdog = Watchdog(ranks, hang_timeout(args))
    data_files = DataFiles(data_prefixes(args))
    # Set up what accompanies Megatron's training loop.
    folder = run_folder(args.save, args.tensorboard_dir)
    folder_on_first_rank = folder if ranks.rank == 0 else None
    warnings = RunWarnings(folder)
    if args.num_experts:
        _log_routing(args, run.mask, model_config, warnings)
    model_config.pre_wrap_hooks.append(
        lambda chunks: show_header(args, run.mask, _open_run_folder(args, folder), chunks)
    )
    choose_event_folder(args)
    take_run_id(args)
    open_writers(args)
    log_command()
    before_each = (
        console.end_of_loading,
        let_signals_save,
        watchdog.step,
        StepTime(folder_on_first_rank, ranks.world_size),
        partial(data_files.check, _DATA_FILES_A_STEP),
    )
    leaving = LeaveAfterSave(ranks)
    pass_batches_of_every_chunk()
    while_saving = [watchdog.paused]
    if args.spike_action != "none":
        while_saving.append(_watch_spikes(run, warnings).sharing_history)
    if args.check_for_nan_in_loss_and_grad:
        watch_steps(partial(check_first_step, args))
    keep_checkpoints_whole(
        lambda: leaving.after(entering_all(while_saving)), watchdog.paused, Journal(folder_on_first_rank)
    )
    if args.override_opt_param_scheduler and has_one_learning_rate(args):
        override_learning_rates()
    config = pretrain_cfg_container_from_args(args, model_config)
    # After training, Megatron saves unless the last iteration is a multiple of this interval. But an iteration that is
    # passed over is not saved, multiple or not. So always save: `CheckpointSaver` leaves out a checkpoint that exists.
    config.checkpoint.save_interval = sys.maxsize
    # Train. Each context manager handles one way in which the run may end early.
    console.load("building the model")
    with (
        recording_end(folder, ranks),
        reporting_end(args),
        watchdog.watching(),
        leaving_process_groups(),
        writing_events(),
        handling_early_ends(args, data_files, leaving),
    ):
        pretrain(
            config,
            build_datasets,
            ModelType.encoder_or_decoder,
            partial(forward_step, before=before_each),
            get_embedding_ranks=embedding_ranks_of(model_config),
            store=ranks.for_process_groups,
        )


def _log_routing(
    args: Namespace, mask: RoutingMask | None, model_config: MaskMoEModelConfig, warnings: RunWarnings
) -> None:
    """Let each step log its routing, and warn if the routing collapses."""
    collapse_watch = CollapseWatch(args, mask, warnings) if mask and args.collapse_intervals else None
    model_config.transformer.finalize_model_grads_func = RoutingLog(args.log_interval, collapse_watch)
    if args.hybrid_layer_pattern is not None:
        set_moe_metrics_tracker(HybridMetricsTracker(FeedForwardLayers.of_args(args), args.num_layers))


def _watch_spikes(run: CheckedRun, warnings: RunWarnings) -> SpikeWatch:
    """Let each step look for a spike of the loss, and return what looks for spikes."""
    args = run.args
    detector = SpikeDetector(args.spike_window, args.spike_deviations, saved_spike_history(args))
    spike_watch = SpikeWatch(args.spike_action, detector, warnings, Rewinder(args, run.rewinds))
    watch_steps(spike_watch.wrap)
    return spike_watch
