"""Bad words, values, files and folders on the command lines of all tools: one line of error, and nothing is written."""

import pytest
from support.command_lines import refuse_all, run_command

LONG_NAME = "n" * 5000

# A command line of each command; all of its files exist. Cases append flags with other values.
MASK = "mask --token-frequency counts.safetensors --num-experts 4 --num-layers 2 --frequent-mass 0.4"
MASK += " --frequent-visible-experts 3 --assignment balanced --output OUT"
TOKENIZE = "--tokenizer-type SentencePieceTokenizer --tokenizer-model tokenizer.model --output-prefix OUT"
COMMANDS = {
    "corpus": "corpus --output OUT",
    "tokenizer": "tokenizer --input text.txt --vocab-size 400 --output-prefix OUT",
    "preprocess": f"preprocess --input text.txt {TOKENIZE}",
    "count": "count --data-path data --vocab-size 400 --output OUT",
    "mask": MASK,
    "export": "convert megatron-to-hf --load checkpoints --save OUT",
    "import": "convert hf-to-megatron --load model --save OUT",
    "upcycle": "convert upcycle --load model --save OUT --routing-mask mask.safetensors --num-experts 4",
    "generate": "generate --load model --prompt import --output OUT",
    "analyze": "analyze --load model --data-path data --output-dir OUT",
    "prune": "prune --load checkpoints",
    "compare": "compare suite.yaml --input text.txt text.txt --run-dir OUT",
    "evaluate": "evaluate --load checkpoints --use-checkpoint-args --data-path data --output OUT",
    "pretrain": "pretrain --num-layers 2 --hidden-size 32 --num-attention-heads 4 --ffn-hidden-size 40 --seq-length 32"
    " --lr 1e-3 --max-position-embeddings 32 --position-embedding-type rope --num-experts 4 --moe-ffn-hidden-size 24"
    " --moe-router-topk 1 --routing-mask mask.safetensors --micro-batch-size 2 --global-batch-size 4 --train-iters 2"
    " --data-path data --split 90,10,0 --tokenizer-type HuggingFaceTokenizer --tokenizer-model huggingface --save OUT"
    " --save-interval 1",
}


def words_of(command: str, flag: str, value: str) -> list[str]:
    """Return the words of a command, in which a flag has another value."""
    words = COMMANDS[command].split()
    if flag in words:
        words[words.index(flag) + 1] = value
        return words
    return [*words, f"{flag}={value}"]


# Mistakes that only a command itself can find, with the words that the error must hold.
MISTAKES = [
    ("export --max-shard-size=1e400GB", "--max-shard-size"),
    ("upcycle --num-experts=8", "only a model without experts"),
    ("upcycle --moe-layer-freq=x", "--moe-layer-freq"),
    ("compare --only=nothing", "no run of the suite"),
    ("compare --report", "no run of the suite suite is finished"),
    ("mask --frequent-visible-experts=5", "2 to 4 of 4 experts"),
    ("mask --routing-mask=mask.safetensors", "--num-experts"),
    ("mask --expert-table=t.npy", "--frequent-mass"),
    ("tokenizer --vocab-siz=5", "--vocab-siz (nearest: --vocab-size)"),
    ("tokenizer --vocab-size=300", "--vocab-size"),
    ("count --vocab-size=5", "data"),
    ("count --merge=a", "--merge"),
    ("preprocess --json-keys=../../x", "--json-keys"),
    ("analyze --seq-length=4096", "--seq-length"),
    ("generate --prompt=a\udcff", "--prompt"),
    ("generate --max-new-tokens=70", "64 positions"),
]


def test_mistakes(workshop):
    cases = []
    for line, names in MISTAKES:
        command, mistake = line.split(" ")
        cases.append(([*COMMANDS[command].split(), mistake], [names]))
    refuse_all(workshop, cases)


FILES = ("nowhere/x", "model", LONG_NAME, "/dev/null/x", "\udcff", "loop", "/dev/null")
FOLDERS = ("nowhere", "text.txt/x", LONG_NAME, "loop", "huggingface")
OUTPUTS = ("nowhere/x", "model", "text.txt/x", LONG_NAME, "/proc/x", "loop/x")
OUTPUT_FOLDERS = ("text.txt/x", LONG_NAME, "/proc/x", "loop/x")
SLOW = pytest.mark.slow
PATHS = [
    ("corpus", "--output", OUTPUTS),
    ("tokenizer", "--input", FILES),
    ("tokenizer", "--output-prefix", OUTPUT_FOLDERS),
    ("preprocess", "--tokenizer-model", FILES),
    ("preprocess", "--output-prefix", OUTPUT_FOLDERS),
    ("count", "--data-path", FILES),
    ("mask", "--token-frequency", FILES),
    ("mask", "--output", OUTPUTS),
    ("export", "--load", FOLDERS),
    ("import", "--load", FOLDERS),
    ("import", "--save", OUTPUT_FOLDERS),
    ("generate", "--load", FOLDERS),
    ("generate", "--output", OUTPUTS),
    ("analyze", "--data-path", FILES),
    ("analyze", "--output-dir", OUTPUT_FOLDERS),
    ("prune", "--load", FOLDERS),
    pytest.param("evaluate", "--routing-mask", FILES, marks=SLOW),
    pytest.param("pretrain", "--routing-mask", FILES, marks=SLOW),
    pytest.param("pretrain", "--data-path", FILES, marks=SLOW),
    pytest.param("pretrain", "--save", OUTPUT_FOLDERS, marks=SLOW),
]


@pytest.mark.parametrize(("command", "flag", "paths"), PATHS)
def test_path_that_cannot_be_used(workshop, command, flag, paths):
    # The system itself may not show an odd name.
    cases = [(words_of(command, flag, path), [] if path in (LONG_NAME, "\udcff") else [path]) for path in paths]
    refuse_all(workshop, cases)


def test_missing_folder_is_found_before_packages_are_loaded(workshop):
    for command in ("export", "import", "upcycle", "analyze", "generate"):
        outcome = run_command(*words_of(command, "--load", "nowhere"))
        outcome.assert_refused("--load nowhere")
        assert outcome.errors == outcome.messages()
