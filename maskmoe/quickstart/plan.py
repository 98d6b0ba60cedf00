"""The stages of a quickstart: which public command each runs, on which files, and what it makes."""

import math
import sys
from collections.abc import Callable
from pathlib import Path

from maskmoe.launch.devices import Devices
from maskmoe.quickstart.settings import HEAD_SIZE, RunFiles, Settings
from maskmoe.workflow.split import Split, choose_split, opening_of_held_out_text
from maskmoe.workflow.stage import Stage, tool_command, words
from maskmoe.workflow.text import TextStages

_PROMPT_FOR_PYTHON = 'def read_lines(path):\n    """'
_PROMPT_TOKENS = 16
_SAMPLE_TOKENS = 96
_CHECKPOINTS_IN_A_RUN = 20
_EVALUATIONS_IN_A_RUN = 10
_LOG_LINES_IN_A_RUN = 200


class Plan:
    """The stages for some settings on some machine.

    A stage is asked for when all before it are finished: its command may depend on what they made.
    """

    def __init__(self, settings: Settings, devices: Devices):
        self.settings = settings
        self.devices = devices
        self.files = RunFiles(settings.run_dir, settings.json_key)

    @property
    def stages(self) -> tuple[Callable[[], Stage], ...]:
        """Makers of all stages, in order."""
        text = TextStages(self.files, self.settings.input, self.settings.vocab_size)
        return (*text.all, self.mask, self.train, self.evaluate, self.export, self.sample)

    @property
    def seq_length(self) -> int:
        return self.settings.seq_length

    @property
    def expert_model_parallel_size(self) -> int:
        return self.devices.expert_model_parallel_size(self.settings.num_experts)

    def mask(self) -> Stage:
        settings = self.settings
        command = tool_command(
            "build_routing_mask",
            *("--token-frequency", self.files.token_frequency),
            *("--num-experts", settings.num_experts),
            *("--num-layers", settings.num_layers),
            *("--frequent-mass", settings.frequent_mass),
            *("--frequent-visible-experts", settings.frequent_visible_experts),
            *("--assignment", settings.assignment),
            *("--expert-model-parallel-size", self.expert_model_parallel_size),
            *("--seed", settings.seed),
            *("--output", self.files.routing_mask),
        )
        return Stage("mask", command, inputs=(self.files.token_frequency,), outputs=(self.files.routing_mask,))

    def train(self) -> Stage:
        settings, files = self.settings, self.files
        save_interval = _at_least_once(settings.train_iters, _CHECKPOINTS_IN_A_RUN)
        command = self._torchrun(
            "pretrain",
            *("--num-layers", settings.num_layers),
            *("--hidden-size", settings.hidden_size),
            *("--num-attention-heads", settings.hidden_size // HEAD_SIZE),
            *("--seq-length", settings.seq_length),
            *("--max-position-embeddings", settings.seq_length),
            *("--position-embedding-type", "rope"),
            *("--normalization", "RMSNorm"),
            *("--swiglu", "--disable-bias-linear", "--untie-embeddings-and-output-weights"),
            *("--attention-dropout", 0, "--hidden-dropout", 0),
            # Megatron's 0.02 is for wide models; a narrow one learns faster from larger weights.
            *("--init-method-std", f"{0.6 / math.sqrt(settings.hidden_size):.3g}"),
            *("--num-experts", settings.num_experts),
            *("--moe-ffn-hidden-size", 2 * settings.hidden_size),
            *("--moe-router-topk", 1, "--moe-router-pre-softmax"),
            *("--moe-router-load-balancing-type", "aux_loss", "--moe-aux-loss-coeff", 0.01),
            *("--routing-mask", files.routing_mask),
            *("--expert-model-parallel-size", self.expert_model_parallel_size),
            *("--micro-batch-size", self._micro_batch_size),
            *("--global-batch-size", self._micro_batch_size * self.devices.num_processes),
            *("--train-iters", settings.train_iters),
            *("--lr", settings.lr, "--min-lr", settings.lr / 20),
            *("--lr-decay-style", "cosine", "--lr-warmup-fraction", 0.05),
            *("--weight-decay", 0.1, "--adam-beta2", 0.95, "--clip-grad", 1.0),
            *("--seed", settings.seed),
            *self._data_flags,
            *("--eval-interval", _at_least_once(settings.train_iters, _EVALUATIONS_IN_A_RUN), "--eval-iters", 8),
            *("--log-interval", _at_least_once(settings.train_iters, _LOG_LINES_IN_A_RUN)),
            *("--save", files.checkpoints, "--load", files.checkpoints),
            *("--save-interval", save_interval, "--keep-last-checkpoints", 1),
            *("--tensorboard-dir", files.tensorboard),
        )
        return Stage(
            "train",
            command,
            inputs=(files.routing_mask, files.tokenizer_model, *files.dataset),
            outputs=(files.checkpoints,),
            byproducts=(files.tensorboard,),
            scratch=(files.dataset_cache,),
            environment=self.devices.environment,
            continues=True,
        )

    def evaluate(self) -> Stage:
        files = self.files
        command = self._torchrun(
            "evaluate",
            *self._checkpoint_flags,
            *self._data_flags,
            *("--micro-batch-size", self._micro_batch_size),
            *("--token-frequency", files.token_frequency),
            *("--eval-output", files.evaluation),
        )
        return Stage(
            "evaluate",
            command,
            inputs=(files.checkpoints, files.token_frequency, *files.dataset),
            outputs=(files.evaluation,),
            scratch=(files.dataset_cache,),
            environment=self.devices.environment,
        )

    def export(self) -> Stage:
        files = self.files
        command = tool_command(
            "convert_checkpoint", "megatron-to-hf", "--load", files.checkpoints, "--save", files.model
        )
        inputs = (files.checkpoints, files.tokenizer_model)
        return Stage("export", command, inputs=inputs, outputs=(files.model,))

    def sample(self) -> Stage:
        files = self.files
        command = tool_command(
            "generate_text",
            *("--model", files.model),
            # As one word, so that it may begin with a dash.
            f"--prompt={self._prompt}",
            *("--max-new-tokens", min(_SAMPLE_TOKENS, self.settings.seq_length - _PROMPT_TOKENS)),
            *("--seed", self.settings.seed),
            *("--output", files.sample),
        )
        return Stage("sample", command, inputs=(files.model,), outputs=(files.sample,))

    @property
    def _split(self) -> Split:
        return choose_split(self.files.dataset_prefix, self.settings.seq_length)

    @property
    def _prompt(self) -> str:
        if self.settings.prompt is not None:
            return self.settings.prompt
        if not self.settings.input:
            return _PROMPT_FOR_PYTHON
        files = self.files
        return opening_of_held_out_text(files.dataset_prefix, files.tokenizer_model, self._split, _PROMPT_TOKENS)

    @property
    def _tokenizer_flags(self) -> tuple[object, ...]:
        return ("--tokenizer-type", "SentencePieceTokenizer", "--tokenizer-model", self.files.tokenizer_model)

    @property
    def _data_flags(self) -> tuple[object, ...]:
        return (
            *("--data-path", self.files.dataset_prefix),
            *("--split", self._split.flag),
            *self._tokenizer_flags,
            *("--data-cache-path", self.files.dataset_cache),
        )

    @property
    def _checkpoint_flags(self) -> tuple[object, ...]:
        return (
            *("--load", self.files.checkpoints, "--use-checkpoint-args"),
            *("--expert-model-parallel-size", self.expert_model_parallel_size),
        )

    @property
    def _micro_batch_size(self) -> int:
        """Samples of a process in an iteration; the global batch is rounded up to a multiple of the processes."""
        return -(-self.settings.global_batch_size // self.devices.num_processes)

    def _torchrun(self, entry_point: str, *arguments: object) -> tuple[str, ...]:
        return words(
            *(Path(sys.executable), "-m", "torch.distributed.run"),
            *("--standalone", "--nproc-per-node", self.devices.num_processes),
            *("-m", f"maskmoe.training.{entry_point}"),
            *arguments,
            *self.devices.megatron_flags,
        )


def _at_least_once(iterations: int, times: int) -> int:
    """The interval at which something happens about so many times, and at least once."""
    return max(1, iterations // times)
