"""The data of the campaign's training runs, the commands that start the runs, and the files that the runs leave."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from gpu_campaign.results import Findings
from gpu_campaign.step import Command, Context
from maskmoe.comparison.data import Dataset
from maskmoe.comparison.steps import maskmoe_command
from maskmoe.comparison.table import scalars
from maskmoe.data.indexed_dataset import dataset_files

NUM_EXPERTS = 8
_CORPUS_BYTES, _VOCAB_SIZE, _SEQ_LENGTH = 3_000_000, 4096, 256
_MASKING = ("--num-experts", NUM_EXPERTS, "--frequent-mass", "0.4", "--frequent-visible-experts", 4, "--seed", 1)
_WITHOUT_PACKAGES = (
    *("--transformer-impl", "local", "--no-persist-layer-norm", "--no-rope-fusion", "--moe-grouped-gemm", "false"),
    *("--no-masked-softmax-fusion", "--no-moe-permute-fusion"),
)
"""Flags that need no Transformer Engine."""


@dataclass(frozen=True)
class Run:
    """A training run.

    Attributes:
        step: the step that the run belongs to.
        name: the name of the run in tables.
        flags: flags of Megatron, which override those of the model file.
        mask: the routing mask, one of `_masks`.
        model: the model file in `launch/models`, without `.yaml`.
        ranks: the number of ranks, one for each GPU.
        has_engine: whether the run uses Transformer Engine if it is installed.
        environment: variables of the run.
    """

    step: str
    name: str
    flags: Sequence[str]
    mask: str = "balanced"
    model: str = "laptop"
    ranks: int = 1
    has_engine: bool = True
    environment: Mapping[str, str] = field(default_factory=dict)

    def folder(self, context: Context) -> Path:
        """Return the folder of the run."""
        return context.folder(self.step) / self.name.replace(",", "").replace(" ", "-")

    def command(self, context: Context, *options: str) -> Command:
        """Return the command that trains as a user does, with options of the launcher."""
        data, uses_engine = _data(context), self.has_engine and context.has_transformer_engine
        packages = () if uses_engine or context.is_dry_run else _WITHOUT_PACKAGES
        words = (
            *(str(context.root / "launch" / "pretrain.sh"), "--nproc-per-node", str(self.ranks), "--max-restarts", "0"),
            *("--run-dir", str(self.folder(context)), *options),
            *(str(context.root / "launch" / "models" / f"{self.model}.yaml"), "--data-path", str(data.prefix)),
            *("--split", "90,10,0", "--data-cache-path", str(context.folder("data") / "cache")),
            *("--tokenizer-type", "SentencePieceTokenizer", "--tokenizer-model", str(data.tokenizer_model)),
            *("--routing-mask", str(_mask(context, self.mask)), "--log-interval", "1", *packages, *self.flags),
        )
        return Command(words, self.environment)

    def scalars(self, context: Context, tag: str) -> dict[int, float]:
        """Return the finite values of a scalar in TensorBoard's event files, by iteration."""
        values = scalars(self.folder(context) / "tensorboard", tag)
        return {step: value for step, value in values if math.isfinite(value)}

    def has_logged(self, context: Context, label: str, value: str) -> bool:
        """Return whether a log of the run has a line that begins with a label and ends with a value."""
        # The console shows the arguments with `--verbose` only; otherwise the rank's own log has them.
        logs = (*self.folder(context).glob("logs/node0/**/stdout.log"), self.folder(context) / "logs" / "rank0.log")
        lines = (line.split() for log in logs if log.exists() for line in log.read_text(errors="replace").splitlines())
        return any(label in words and words[-len(value.split()) :] == value.split() for words in lines)


def data_commands(context: Context) -> list[Command]:
    """Return the commands from the sources of the installed Python to a dataset and routing masks."""
    data = _data(context)
    tokenizer = ("--tokenizer-type", "SentencePieceTokenizer", "--tokenizer-model", data.tokenizer_model)
    size = ("--vocab-size", _VOCAB_SIZE)
    corpus = data.folder / "corpus.jsonl"
    lines = (
        ("corpus", "--output", corpus, "--max-bytes", _CORPUS_BYTES),
        ("tokenizer", "--input", corpus, *size, "--output-prefix", data.folder / "tokenizer"),
        ("preprocess", "--input", corpus, "--append-eod", *tokenizer, "--output-prefix", data.folder / "dataset"),
        ("count", "--data-path", data.prefix, *size, "--output", data.token_frequency),
        *(
            ("mask", "--token-frequency", data.token_frequency, *_MASKING, *flags, "--output", _mask(context, name))
            for name, flags in _masks(context).items()
        ),
    )
    return [Command(maskmoe_command(*line, "--force")) for line in lines]  # a step may be repeated


def read_data(context: Context) -> Findings:
    """Return the sizes of dataset and masks."""
    data, masks = _data(context), (_mask(context, name) for name in _masks(context))
    files = (*dataset_files(data.prefix), data.tokenizer_model, *masks)
    return Findings(facts={path.name: f"{path.stat().st_size:,} bytes" for path in files})


def expert_parallel_size(context: Context) -> int:
    """Return the expert-parallel size of the production runs: from four ranks on, experts are on several ranks each."""
    ranks = context.num_ranks
    return math.gcd(ranks // 2 if ranks >= 4 else ranks, NUM_EXPERTS)


def _masks(context: Context) -> dict[str, tuple[str | int, ...]]:
    """Return the flags of each routing mask by name; rank-local masks fit the production runs."""
    rank_local = ("--assignment", "rank-local", "--expert-model-parallel-size", expert_parallel_size(context))
    return {
        "balanced": ("--num-layers", 4, "--assignment", "balanced"),
        "rank-local": ("--num-layers", 4, *rank_local),
        "rank-local-12": ("--num-layers", 12, *rank_local),
    }


def _data(context: Context) -> Dataset:
    return Dataset(context.folder("data"), str(_VOCAB_SIZE), _SEQ_LENGTH)


def _mask(context: Context, name: str) -> Path:
    return context.folder("data") / f"{name}.safetensors"
