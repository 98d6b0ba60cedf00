"""The kinds of numbers on command lines, and their ranges in one table.

Upper bounds are far beyond every sensible value. They refuse slips of the keyboard before memory or time is spent.
"""

import argparse
import math
import sys
from dataclasses import dataclass
from typing import Any

_MANY = 1 << 40


@dataclass(frozen=True)
class Number:
    """The `type` of a command line argument that is a number in a range.

    Attributes:
        least: The smallest value.
        most: The largest value.
        kind: `int` for whole numbers, else `float`.
    """

    least: float
    most: float = sys.float_info.max
    kind: type[int] | type[float] = int

    def __call__(self, text: str) -> Any:
        """Convert the word of a command line. Raises ArgumentTypeError if the word is not in the range."""
        try:
            value = self.kind(text)
        except ValueError:
            value = math.nan
        if value != value or abs(value) == math.inf:  # NaN differs from itself
            kind = "whole" if self.kind is int else "finite"
            raise argparse.ArgumentTypeError(f"must be a {kind} number, not {text!r}")
        if value < self.least:
            raise argparse.ArgumentTypeError(f"must be at least {self.least}, not {value}")
        if value > self.most:
            raise argparse.ArgumentTypeError(f"must be at most {self.most}, not {value}")
        return value


# Shapes of models, vocabularies and masks.
VOCAB_SIZE = Number(1, 1 << 24)
TOKENIZER_SIZE = Number(260, 1 << 24)  # 3 special ids, 256 ids of bytes, and one token
EXPERTS = Number(1, 1 << 16)
LAYERS = Number(1, 10_000)

# Amounts of data and work, and numbers that count from 0.
COUNT = Number(1, _MANY)
NUMBER = Number(0, _MANY)

# Processes and machines.
PROCESSES = Number(1, 1 << 12)  # of a machine
THREADS = Number(1, 1024)  # SentencePiece allows no more
RANKS = Number(1, 1 << 24)
PORT = Number(1, (1 << 16) - 1)

# Other numbers.
SEED = Number(0, (1 << 32) - 1)  # the seeds of NumPy
RUN_SEED = Number(1, SEED.most)  # Megatron's training refuses 0
SHARE = Number(0, 1, float)
CHARACTER_COVERAGE = Number(0.98, 1, float)  # the range of SentencePiece
TEMPERATURE = Number(0, 1e6, float)
LEARNING_RATE = Number(1e-12, 1e3, float)
