"""The settings of an analysis of routing; importing this module needs neither torch nor Megatron."""

from dataclasses import dataclass
from pathlib import Path

from maskmoe.errors import UserError

SPLITS = ("train", "valid", "test")


@dataclass(frozen=True)
class AnalysisSettings:
    """The sizes of the probe, and the parameters of the statistics.

    Attributes:
        num_tokens: number of tokens of the probe text.
        seq_length: number of tokens in a window; None for the sequence length of the model.
        batch_size: number of windows in a batch.
        capacity_factors: capacity factors for which the share of dropped assignments is computed.
        micro_batch_tokens: number of tokens that share the capacity of the experts; None for the tokens of a batch.
        min_occurrences: number of occurrences in the probe from which an id counts in the statistics of distinct
            experts.
        num_top_ids: number of ids to list for each expert.
    """

    num_tokens: int = 16384
    seq_length: int | None = None
    batch_size: int = 8
    capacity_factors: tuple[float, ...] = (1.0, 1.25, 1.5, 2.0)
    micro_batch_tokens: int | None = None
    min_occurrences: int = 8
    num_top_ids: int = 10

    def check(self) -> None:
        """Check that all values are possible.

        Raises:
            UserError: a value is out of range; the message names the flag.
        """
        sizes = {
            "--tokens": self.num_tokens,
            "--seq-length": self.seq_length,
            "--batch-size": self.batch_size,
            "--micro-batch-tokens": self.micro_batch_tokens,
            "--min-occurrences": self.min_occurrences,
            "--top-ids": self.num_top_ids,
        }
        for flag, value in sizes.items():
            if value is not None and value < 1:
                raise UserError(f"{flag} must be at least 1, not {value}")
        for factor in self.capacity_factors:
            if not 0 < factor < float("inf"):
                raise UserError(f"--capacity-factors must be positive numbers, not {factor}")


@dataclass(frozen=True)
class Conversion:
    """How Megatron checkpoints are converted to transformers' format.

    Attributes:
        scratch_dir: the folder for temporary folders; None for the default of the system.
        tokenizer_type, tokenizer_model: the values of Megatron's flags; None for the tokenizer of the training run.
    """

    scratch_dir: Path | None = None
    tokenizer_type: str | None = None
    tokenizer_model: str | None = None
