"""Pretrains a MaskMoE language model: from the command line to Megatron's training loop.

On SIGTERM or SIGUSR1 the run saves a checkpoint and exits with code 75; started again, it resumes. The other exit codes
are 1 if the run failed, and 2 for bad input, before anything was done.
"""

import sys
from argparse import Namespace
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from megatron.core.distributed import finalize_model_grads
from megatron.core.enums import ModelType
from megatron.core.num_microbatches_calculator import get_current_global_batch_size
from megatron.core.transformer.moe.moe_logging import set_moe_metrics_tracker
from megatron.core.utils import StragglerDetector, get_attr_wrapped_model
from megatron.training import pretrain
from megatron.training.argument_utils import pretrain_cfg_container_from_args
from megatron.training.training import update_seqlen_stats_from_cu_seqlens

from maskmoe.checkpoint.reading import read_common_state
from maskmoe.checkpoint.saver import CheckpointSaver
from maskmoe.checkpoint.writers import start_writers
from maskmoe.megatron_compat.checkpoint_patches import (
    STATES_OF_CALLBACKS,
    keep_checkpoints_whole,
    load_only,
    override_learning_rates,
    save_states_of_callbacks,
)
from maskmoe.megatron_compat.globals import get_timers, open_writers
from maskmoe.megatron_compat.training_patches import RouterLossTracker, call_after_steps, count_operations_by_mask
from maskmoe.processes.console import console
from maskmoe.processes.folder_lock import locked_folder
from maskmoe.routing_mask.feed_forward_layers import FeedForwardLayers
from maskmoe.routing_mask.mask import mean_experts_per_token
from maskmoe.training.model.batch import build_datasets, get_batch, inputs_of_model, loss_function, token_losses
from maskmoe.training.model.model_builder import StageBuilder, embedding_ranks_of, model_config_from_args
from maskmoe.training.ranks import Ranks, meet_ranks, temporary_process_groups
from maskmoe.training.resume.changed_settings import has_one_learning_rate
from maskmoe.training.resume.find_checkpoint import checkpoint_to_load
from maskmoe.training.run_checks import RunSettings, parse_and_check_args
from maskmoe.training.settings.arguments import add_pretraining_arguments
from maskmoe.training.watch.callback import Callback, Step
from maskmoe.training.watch.early_ends import FiniteStepCheck, SaveOnSignals, report_early_end
from maskmoe.training.watch.progress import Progress
from maskmoe.training.watch.routing_log import RoutingLog
from maskmoe.training.watch.spikes import SpikeWatch
from maskmoe.training.watch.start_of_run import StartOfRun
from maskmoe.training.watch.writers import flush_event_files, take_run_id

straggler_detector = StragglerDetector()  # times micro-batches if Megatron has switched it on by `--log-straggler`


def main(builder: type[StageBuilder] | None = None) -> None:
    """Pretrain as the command line says, with another builder of models if one is given."""
    with ExitStack() as until_end:
        # Lock the folder before looking at it, to miss no checkpoint of a run that just ends.
        def lock_folder(args: Namespace) -> None:
            if args.rank == 0 and args.save is not None:
                until_end.enter_context(locked_folder(Path(args.save)))

        run = parse_and_check_args(add_pretraining_arguments, lock_folder)
        if run.is_complete:
            return
        ranks = meet_ranks(run.args)
        trainer = Trainer(run, ranks, builder)
        # A refused run leaves no files, so wait until no rank can refuse the run any more.
        ranks.gather("checks", "passed")
        trainer.train()


class Trainer:
    """One training run on this rank; `callbacks` accompany the run, called in order, at its end in reverse order."""

    def __init__(self, run: RunSettings, ranks: Ranks, builder: type[StageBuilder] | None = None) -> None:
        self.args = run.args
        self.model_config = model_config_from_args(run.args, builder)
        self.callbacks: list[Callback] = [
            Progress(run.args),
            StartOfRun(run.args, run.mask, run.run_folder),
            SaveOnSignals(run.args),
            FiniteStepCheck(run.args),
            *([RoutingLog(run.args, run.mask)] if run.mask is not None else []),
            SpikeWatch(run.args),
        ]
        self._mask = run.mask
        self._ranks = ranks

    def train(self) -> None:
        """Train to the end, or until a signal, a failure or a limit of the command line ends the run early."""
        args = self.args
        # Open the writers of scalars, which make files.
        take_run_id(args)
        open_writers(args)
        self._load_states()
        self._connect_hooks()
        # Megatron's settings.
        if self._mask is not None:
            set_moe_metrics_tracker(RouterLossTracker(args))
        layers = FeedForwardLayers.of_args(args)
        count_operations_by_mask(mean_experts_per_token(self._mask, args.moe_router_topk, layers))
        if args.override_opt_param_scheduler and has_one_learning_rate(args):
            override_learning_rates()
        config = pretrain_cfg_container_from_args(args, self.model_config)
        # Megatron skips its last save if the last iteration is a multiple of this interval. Make it always save:
        # `CheckpointSaver` drops duplicates.
        config.checkpoint.save_interval = sys.maxsize
        with self._accompanied(), temporary_process_groups(), report_early_end(args):
            if args.async_save and args.async_strategy == "mcore":
                start_writers(args.rank)
            console.load("building the model")
            pretrain(
                config,
                build_datasets,
                ModelType.encoder_or_decoder,
                self.forward_step,
                get_embedding_ranks=embedding_ranks_of(self.model_config),
                store=self._ranks.store,
            )

    def forward_step(self, data_iterator: Iterator, model: Any, return_schedule_plan: bool = False) -> tuple:
        """Run one micro-batch forward; return the model's output and the function that computes the loss from it.

        With `--overlap-moe-expert-parallel-comm`, return the plan of the forward pass in place of its output.
        """
        for callback in self.callbacks:
            callback.before_micro_batch()
        timers = get_timers()
        timers("batch-generator", log_level=2).start()
        samples = self.args.micro_batch_size if model.training else self.args.eval_micro_batch_size
        with straggler_detector(bdata=True):
            batch = get_batch(data_iterator, samples)
        timers("batch-generator").stop()
        # Each chunk of an interleaved pipeline gets the documents, which count once.
        if batch.documents is not None and model.training and not get_attr_wrapped_model(model, "vp_stage"):
            update_seqlen_stats_from_cu_seqlens(batch.documents.cu_seqlens_q)
        compute_loss = partial(loss_function, batch.loss_mask)
        if return_schedule_plan:
            return model.build_schedule_plan(**inputs_of_model(batch)), compute_loss
        with straggler_detector:
            losses = token_losses(model, batch)
        return losses, compute_loss

    def _load_states(self) -> None:
        """Give the callbacks the states that the checkpoint to resume from holds."""
        checkpoint = checkpoint_to_load(self.args)
        if checkpoint is not None and not self.args.finetune:
            states = read_common_state(checkpoint).get(STATES_OF_CALLBACKS, {})
            for callback in self.callbacks:
                if state := states.get(type(callback).__name__):
                    callback.load_state_dict(state)

    def _connect_hooks(self) -> None:
        """Let Megatron call the callbacks and save by `CheckpointSaver`; `forward_step` and `train` call, too."""
        callbacks = self.callbacks

        # Megatron copies the configuration that holds this function, so it must not be a method.
        def finalize_gradients(chunks: Any, *arguments: Any, **options: Any) -> None:
            finalize_model_grads(chunks, *arguments, **options)
            for callback in callbacks:
                callback.after_gradients(chunks)

        def on_model_built(chunks: Any) -> Any:
            for callback in callbacks:
                callback.on_model_built(chunks)
            return chunks

        self.model_config.pre_wrap_hooks.append(on_model_built)
        load_only(checkpoint_to_load(self.args), self.args)
        self.model_config.transformer.finalize_model_grads_func = finalize_gradients
        call_after_steps(self._after_step)
        saver = CheckpointSaver(self.args)
        keep_checkpoints_whole(saver.save, saver.finalize)
        save_states_of_callbacks(self._states)

    def _after_step(self, results: tuple) -> None:
        losses, is_skipped, _, should_exit, _, grad_norm, *_ = results
        step = Step(
            self.args.curr_iteration + 1,
            get_current_global_batch_size(),
            losses,
            grad_norm=None if grad_norm is None else float(grad_norm),
            has_updated=not (is_skipped or should_exit),
        )
        for callback in self.callbacks:
            callback.after_step(step)

    def _states(self) -> dict[str, dict[str, Any]]:
        states = {type(callback).__name__: callback.state_dict() for callback in self.callbacks}
        return {name: state for name, state in states.items() if state}

    @contextmanager
    def _accompanied(self) -> Iterator[None]:
        """Call the callbacks in the reverse order when the run ends."""
        try:
            yield
        finally:
            error = sys.exception()
            for callback in reversed(self.callbacks):
                callback.on_end(error)
            flush_event_files()
