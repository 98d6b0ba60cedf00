"""The kinds of numbers on command lines, and their ranges in one table.

Upper bounds are far beyond every sensible value. They refuse slips of the keyboard before memory or time is spent.
"""

import argparse
import math
import re
from dataclasses import dataclass

_NUMBER = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?")
_WHOLE_NUMBER = re.compile(r"[+-]?[0-9]{1,300}")
_SHARE = r"([0-9]+\.?[0-9]*|\.[0-9]+)"
_SPLIT = re.compile(rf"[\[(\s]*{_SHARE}(\s*[,/\s]\s*{_SHARE}){{0,2}}[\])\s]*")
_MANY = 1 << 40


@dataclass(frozen=True)
class WholeNumber:
    """The `type` of a command line argument that is a whole number in a range.

    Attributes:
        least: The smallest value.
        most: The largest value.
    """

    least: int
    most: int = (1 << 63) - 1

    def __call__(self, text: str) -> int:
        """Convert the word of a command line. Raises ArgumentTypeError if the word is not in the range."""
        # `int` would also accept digits of other scripts, underscores and white space.
        if not _WHOLE_NUMBER.fullmatch(text):
            raise argparse.ArgumentTypeError(f"must be a whole number, not {text!r}")
        value = int(text)
        if value < self.least:
            raise argparse.ArgumentTypeError(f"must be at least {self.least}, not {value}")
        if value > self.most:
            raise argparse.ArgumentTypeError(f"must be at most {self.most}, not {value}")
        return value


@dataclass(frozen=True)
class Number:
    """The `type` of a command line argument that is a finite number in a range.

    Attributes:
        least: The smallest value; the bound of all values if `is_above`.
        most: The largest value.
        is_above: Whether the values are larger than `least`.
    """

    least: float = -math.inf
    most: float = math.inf
    is_above: bool = False

    def __call__(self, text: str) -> float:
        """Convert the word of a command line. Raises ArgumentTypeError if the word is not in the range."""
        if not _NUMBER.fullmatch(text) or math.isinf(float(text)):
            raise argparse.ArgumentTypeError(f"must be a finite number, not {text!r}")
        value = float(text)
        if value < self.least or (self.is_above and value == self.least):
            bound = "above" if self.is_above else "at least"
            raise argparse.ArgumentTypeError(f"must be {bound} {self.least:g}, not {value:g}")
        if value > self.most:
            raise argparse.ArgumentTypeError(f"must be at most {self.most:g}, not {value:g}")
        return value


def split(text: str) -> str:
    """Return a value of Megatron's `--split` as it is. Raises ArgumentTypeError if it does not name three shares.

    Megatron itself reads the numbers of any text: 5 of "-5" and of "5e-1".
    """
    numbers = _SPLIT.fullmatch(text) and [float(number) for number in re.findall(r"[\d.]+", text)]
    if not numbers or not 0 < sum(numbers) < math.inf:
        raise argparse.ArgumentTypeError(f"must be three shares such as 99,1,0, not {text!r}")
    return text


# Shapes of models, vocabularies and masks.
VOCAB_SIZE = WholeNumber(1, 1 << 24)
TOKENIZER_SIZE = WholeNumber(260, 1 << 24)  # 3 special ids, 256 ids of bytes, and one token
EXPERTS = WholeNumber(1, 1 << 16)
LAYERS = WholeNumber(1, 10_000)
HIDDEN_SIZE = WholeNumber(1, 1 << 20)
ELEMENT_BYTES = WholeNumber(1, 64)

# Amounts of data and work, and numbers that count from 0.
COUNT = WholeNumber(1, _MANY)
NUMBER = WholeNumber(0, _MANY)

# Processes and machines.
PROCESSES = WholeNumber(1, 1 << 12)
THREADS = WholeNumber(1, 1024)  # SentencePiece allows no more
RANKS = WholeNumber(1, 1 << 24)
RANKS_OF_NODE = WholeNumber(1, 1 << 12)
NODES = WholeNumber(1, 1 << 20)
PORT = WholeNumber(1, (1 << 16) - 1)
SECONDS = WholeNumber(1, 1 << 31)

# Other numbers.
SEED = WholeNumber(0, (1 << 32) - 1)  # the seeds of NumPy
RUN_SEED = WholeNumber(1, SEED.most)  # Megatron's training refuses 0
SHARE = Number(0, 1)
CHARACTER_COVERAGE = Number(0.98, 1)  # the range of SentencePiece
TEMPERATURE = Number(0, 1e6)
LEARNING_RATE = Number(0, 1e3, is_above=True)
BANDWIDTH = Number(0, 1e9, is_above=True)
LATENCY = Number(0, 1e9)
