"""The ranges of the numbers on the command lines of MaskMoE's own tools, in one table.

Upper bounds are far beyond every sensible value. They refuse slips of the keyboard before memory or time is spent.
"""

from maskmoe.command_line.parser import Number, WholeNumber

_MANY = 1 << 40

# Shapes of models, vocabularies and masks.
VOCAB_SIZE = WholeNumber(1, 1 << 24)
TOKENIZER_SIZE = WholeNumber(260, 1 << 24)  # 3 special ids, 256 ids of bytes, and one token
EXPERTS = WholeNumber(1, 1 << 16)
LAYERS = WholeNumber(1, 10_000)
LAYER = LAYERS
HASH_LAYERS = WholeNumber(0, 10_000)
HIDDEN_SIZE = WholeNumber(1, 1 << 20)
SEQ_LENGTH = WholeNumber(1, 1 << 24)
ELEMENT_BYTES = WholeNumber(1, 64)
GRANULARITY = WholeNumber(1, 1 << 12)

# Amounts of data and work.
BYTES = WholeNumber(1, _MANY)
LINES = WholeNumber(1, 1 << 31)
TOKENS = WholeNumber(1, _MANY)
BATCH_SIZE = WholeNumber(1, 1 << 24)
ITERATION = WholeNumber(0, _MANY)
ITERATIONS = WholeNumber(1, _MANY)
CHECKPOINTS = WholeNumber(1, 1 << 20)
OCCURRENCES = WholeNumber(1, _MANY)
LISTED_IDS = WholeNumber(1, 1 << 24)
NEW_TOKENS = WholeNumber(1, 1 << 24)
TOP_K = WholeNumber(0, 1 << 24)

# Processes and machines.
PROCESSES = WholeNumber(1, 1 << 12)
THREADS = WholeNumber(1, 1024)  # SentencePiece allows no more
RANKS = WholeNumber(1, 1 << 24)
RANKS_OF_NODE = WholeNumber(1, 1 << 12)
NODES = WholeNumber(1, 1 << 20)
NODE_RANK = WholeNumber(0, 1 << 20)
PORT = WholeNumber(1, (1 << 16) - 1)
RESTARTS = WholeNumber(0, 1 << 20)
TIMEOUT = Number(0, 1e9, is_above=True)
SECONDS = WholeNumber(1, 1 << 31)
NODE_TIMEOUT = WholeNumber(10, 1 << 20)  # five signs of life

# Other numbers.
SEED = WholeNumber(0, (1 << 32) - 1)  # the seeds of NumPy
SHARE = Number(0, 1)
CHARACTER_COVERAGE = Number(0.98, 1)  # the range of SentencePiece
TEMPERATURE = Number(0, 1e6)
LEARNING_RATE = Number(0, 1e3, is_above=True)
BANDWIDTH = Number(0, 1e9, is_above=True)
LATENCY = Number(0, 1e9)
