"""The settings of an analysis of routing; importing this module needs neither torch nor Megatron."""

from dataclasses import dataclass
from pathlib import Path

SPLITS = ("train", "valid", "test")


@dataclass(frozen=True)
class AnalysisSettings:
    """The sizes of the probe, the parameters of the statistics, and how Megatron checkpoints are converted.

    Each attribute has the name of its flag.

    Attributes:
        tokens: number of tokens of the probe text.
        seq_length: number of tokens in a window; None for the sequence length of the model.
        batch_size: number of windows in a batch.
        min_occurrences: number of occurrences in the probe from which an id counts in the statistics of distinct
            experts.
        top_ids: number of ids to list for each expert.
        scratch_dir: the folder in which Megatron checkpoints are converted; None for the default of the system.
        tokenizer_type, tokenizer_model: the values of Megatron's flags; None for the tokenizer of the training run.
    """

    tokens: int = 16384
    seq_length: int | None = None
    batch_size: int = 8
    min_occurrences: int = 8
    top_ids: int = 10
    scratch_dir: Path | None = None
    tokenizer_type: str | None = None
    tokenizer_model: str | None = None
