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


# Values that contradict the model or another flag. tests/arguments/test_parser.py shows that every number has a range.
CONTRADICTIONS = [
    ("export", "--max-shard-size", "1e400GB", "--max-shard-size"),
    ("upcycle", "--moe-layer-freq", "x", "--moe-layer-freq"),
    ("upcycle", "--num-experts", "8", "only a model without experts"),
    ("compare", "--seeds", "77", "no seed 77"),
    ("compare", "--merge", "slip", "--merge slip"),
    ("mask", "--frequent-visible-experts", "5", "2 to 4 of 4 experts"),
    ("tokenizer", "--vocab-size", "300", "--vocab-size"),
    ("count", "--vocab-size", "5", "data"),
    ("preprocess", "--json-keys", "../../x", "--json-keys"),
    ("analyze", "--seq-length", "4096", "--seq-length"),
    ("generate", "--prompt", " \n", "--prompt"),
    ("generate", "--prompt", "a\udcff", "--prompt"),
    ("generate", "--prompt", "import " * 70, "64 positions"),
]
# Other mistakes, with the flag that the error names.
MISTAKES = [
    ("tokenizer --vocab-siz 5", "--vocab-siz (nearest: --vocab-size)"),
    ("tokenizer", "--input"),
    ("count --output OUT --merge a --data-path a", "--merge"),
    ("preprocess --merge a --output-prefix OUT --shard 0/2", "--shard"),
    ("mask --routing-mask mask.safetensors --hash-layers 0 --output OUT", "--hash-layers"),
    ("mask --expert-table t.npy --frequent-mass 0 --num-experts 4 --num-layers 2 --output OUT", "--frequent-mass"),
    ("mask --num-experts 4 --num-layers 2 --output OUT", "--token-frequency"),
    ("generate --load model", "--prompt"),
    ("generate --prompt a --load huggingface", "huggingface"),
    ("generate --prompt a --load checkpoints --ckpt-step 3", "iter_0000003"),
    ("convert", "command"),
    ("analyze --load model --output-dir OUT --input text.txt --split 1,1,1", "--split"),
    ("compare suite.yaml --list --report", "--report"),
    ("compare suite.yaml --report --run-dir OUT", "no run of the suite suite is finished"),
    ("pretrain laptop.yaml stray", "stray"),
    ("pretrain --run-dir checkpoints/release --nproc-per-node 1 laptop.yaml", "release"),
    ("evaluate --load nowhere --use-checkpoint-args", "nowhere"),
]


def test_mistakes(workshop):
    cases = [(words_of(name, flag, value), [names]) for name, flag, value, names in CONTRADICTIONS]
    refuse_all(workshop, [*cases, *((line.split(), [names]) for line, names in MISTAKES)])


@pytest.mark.parametrize(
    ("mask", "words"),
    [
        ("{}", "--frequent-mass"),
        ("{preset: hash, expert-model-parallel-size: 3}", "8 experts"),
        ("{preset: hashed}", "--preset"),
        ("{preset: hash, frequent-visible-expert: 2}", "--frequent-visible-expert "),
    ],
)
def test_mask_of_a_suite_that_cannot_be_built(workshop, tmp_path, mask, words):
    suite = tmp_path / "suite.yaml"
    model = f"data: {{vocab-size: 400}}\nmodel: {workshop}/laptop.yaml\n"
    suite.write_text(f"{model}variants: {{one: {{mask: {mask}}}}}\n")
    refuse_all(workshop, [(["compare", str(suite), "--list"], ["the mask of the variant one: ", words])])


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
    ("compare", "--input", FILES),
    ("compare", "--output-dir", OUTPUT_FOLDERS),
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
