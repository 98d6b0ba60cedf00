"""Bad values, files and folders on the command lines of all tools: one line of error, exit code 2, nothing written."""

import pytest
from support.command_lines import refuse_all, run_command

LONG_NAME = "n" * 5000

# A command line of each command whose values the cases replace; all of its files exist.
COMMANDS = {
    "corpus": "--output OUT",
    "tokenizer": "--input text.txt --vocab-size 400 --output-prefix OUT",
    "preprocess": "--input text.txt --tokenizer-type SentencePieceTokenizer --tokenizer-model tokenizer.model"
    " --output-prefix OUT",
    "count": "--data-path data --vocab-size 400 --output OUT",
    "mask": "--token-frequency counts.safetensors --num-experts 4 --num-layers 2 --frequent-mass 0.4"
    " --frequent-visible-experts 3 --assignment balanced --output OUT",
    "mask widen": "--routing-mask mask.safetensors --token-frequency counts.safetensors --frequent-visible-experts 4"
    " --output OUT",
    "convert megatron-to-hf": "--load checkpoints --save OUT",
    "convert hf-to-megatron": "--load model --save OUT",
    "convert upcycle": "--load model --save OUT --routing-mask mask.safetensors --num-experts 4",
    "generate": "--load model --prompt import --output OUT",
    "analyze": "--load model --data-path data --output-dir OUT",
    "simulate": "--data-path data --routing-mask mask.safetensors --topk 2 --hidden-size 32 --output OUT",
    "prune": "--load checkpoints",
    "status": "--html OUT checkpoints",
    "quickstart": "--input text.txt text.txt --run-dir OUT",
    "compare": "suite.yaml --input text.txt text.txt --run-dir OUT",
    "evaluate": "--load checkpoints --use-checkpoint-args --data-path data --output OUT",
}
RUN = (
    "--num-layers 2 --hidden-size 32 --num-attention-heads 4 --ffn-hidden-size 40 --seq-length 32 --lr 1e-3"
    " --max-position-embeddings 32 --position-embedding-type rope --num-experts 4 --moe-ffn-hidden-size 24"
    " --moe-router-topk 1 --routing-mask mask.safetensors --micro-batch-size 2 --global-batch-size 4 --train-iters 2"
    " --data-path data --split 90,10,0 --tokenizer-type HuggingFaceTokenizer --tokenizer-model huggingface --save OUT"
    " --save-interval 1"
)
COMMANDS |= {"pretrain": RUN}


def command_line(command: str, **replaced: str) -> list[str]:
    """Return a command line of `COMMANDS`, with other values of flags; flags are written without dashes in front."""
    words = COMMANDS[command].split()
    for name, value in replaced.items():
        flag = f"--{name.replace('_', '-')}"
        if flag in words:
            words[words.index(flag) + 1] = value
        else:
            words.append(f"{flag}={value}")
    return [*command.split(), *words]


# Values that are in the range of their flag, but contradict the model or another flag, and values that are no numbers,
# with words of the error. test_parser.py shows that every number has a range.
CONTRADICTIONS = [
    *(("convert megatron-to-hf", "max_shard_size", size, "--max-shard-size") for size in ("0", "-1", "x", "1e400GB")),
    ("convert upcycle", "moe_layer_freq", "x", "--moe-layer-freq"),
    ("compare", "split", "abc", "--split"),
    ("analyze", "split", "abc", "--split"),
    ("quickstart", "hidden_size", "33", "--hidden-size"),
    ("quickstart", "seed", "0", "--seed"),
    ("quickstart", "prompt", "", "--prompt is empty"),
    ("mask", "frequent_visible_experts", "5", "2 to 4 of 4 experts, not 5"),
    ("mask widen", "frequent_visible_experts", "5", "2 to 4 of 4 experts, not 5"),
    ("simulate", "expert_model_parallel_size", "1", "at least 2 ranks"),
    ("simulate", "num_gpus", "12", "12 GPUs"),
    ("simulate", "topk", "33", "top-k must be 1 to 4"),
    ("simulate", "layer", "3", "--layer is 3"),
    ("simulate", "tokens_per_rank", "100000", "tokens, fewer than the 100,000 of one rank"),
    ("tokenizer", "vocab_size", "300", "--vocab-size"),
    ("tokenizer", "vocab_size", "16000000", "--vocab-size"),
    ("count", "vocab_size", "5", "data"),
    ("analyze", "seq_length", "4096", "--seq-length is 4096, but the model takes at most"),
    ("convert upcycle", "num_experts", "8", "only a model without experts can be upcycled"),
    ("quickstart", "frequent_visible_experts", "9", "--num-experts 8"),
]


def test_value_that_contradicts_another(workshop):
    refuse_all(workshop, [(command_line(name, **{flag: word}), [text]) for name, flag, word, text in CONTRADICTIONS])


@pytest.mark.parametrize(
    ("variant", "words"),
    [
        ("mask: {}", "--frequent-mass, --frequent-visible-experts, --assignment missing"),
        (
            "mask: {frequent-mass: 0.4, frequent-visible-experts: 99, assignment: balanced}",
            "2 to 8 of 8 experts, not 99",
        ),
        ("mask: {preset: hash, expert-model-parallel-size: 3}", "8 experts cannot be divided over 3 expert-parallel"),
        ("mask: {preset: hashed}", "--preset: invalid choice"),
        ("mask: {preset: hash}, widen: {frequent-visible-expert: 2}", "unknown flag --frequent-visible-expert "),
        (
            "mask: {preset: hash}, widen: {seed: 3}",
            "give a larger --frequent-mass or larger --frequent-visible-experts",
        ),
        ("mask: {preset: smoe}, widen: {frequent-visible-experts: 2}", "would narrow the mask"),
        ("mask: {preset: hash}, widen: {frequent-mass: 0.4}", "number of visible experts of frequent ids is missing"),
        (
            "mask: {preset: hash}, widen: {frequent-mass: 0.4, frequent-visible-experts: 9}",
            "2 to 8 of 8 experts, not 9",
        ),
    ],
)
def test_mask_of_a_suite_that_cannot_be_built(workshop, tmp_path, variant, words):
    suite = tmp_path / "suite.yaml"
    suite.write_text(f"data: {{vocab-size: 400}}\nmodel: {workshop}/laptop.yaml\nvariants: {{one: {{{variant}}}}}\n")
    refuse_all(workshop, [(["compare", str(suite), "--list"], ["the mask of the variant one: ", words])])


FILE, FOLDER, OUTPUT, OUTPUT_FOLDER, PREFIX = "a file", "a folder", "an output", "an output folder", "a prefix"
BAD_PATHS = {
    FILE: ("nowhere", "nowhere/x", "model", "text.txt/x", LONG_NAME, "/dev/null/x", "\udcff", "loop", "/dev/null"),
    FOLDER: ("nowhere", "nowhere/x", "text.txt", "text.txt/x", LONG_NAME, "/dev/null/x", "loop", "huggingface"),
    OUTPUT: ("nowhere/x", "model", "text.txt/x", LONG_NAME, "/dev/null/x", "/proc/x", "loop/x"),
    OUTPUT_FOLDER: ("text.txt", "text.txt/x", LONG_NAME, "/dev/null/x", "/proc/x", "loop/x"),
    PREFIX: ("nowhere/x", "text.txt/x", LONG_NAME, "/dev/null/x", "/proc/x", "loop/x"),
}
# The paths on the command lines of `COMMANDS`.
PATHS = {
    "corpus": {"output": OUTPUT},
    "tokenizer": {"input": FILE, "output_prefix": PREFIX},
    "preprocess": {"input": FILE, "tokenizer_model": FILE, "output_prefix": PREFIX},
    "count": {"data_path": FILE, "output": OUTPUT},
    "mask": {"token_frequency": FILE, "output": OUTPUT},
    "mask widen": {"routing_mask": FILE, "token_frequency": FILE, "output": OUTPUT},
    "convert megatron-to-hf": {"load": FOLDER, "save": OUTPUT_FOLDER},
    "convert hf-to-megatron": {"load": FOLDER, "save": OUTPUT_FOLDER},
    "generate": {"load": FOLDER, "output": OUTPUT},
    "analyze": {"load": FOLDER, "data_path": FILE, "token_frequency": FILE, "output_dir": OUTPUT_FOLDER},
    "simulate": {"data_path": FILE, "routing_mask": FILE, "output": OUTPUT, "plot": OUTPUT},
    "prune": {"load": FOLDER},
    "status": {"html": OUTPUT, "json": OUTPUT},
    "quickstart": {"input": FILE, "run_dir": OUTPUT_FOLDER},
    "compare": {"input": FILE, "output_dir": OUTPUT_FOLDER},
    "evaluate": {"load": FOLDER, "data_path": FILE, "token_frequency": FILE, "routing_mask": FILE},
    "pretrain": {"data_path": FILE, "routing_mask": FILE, "tokenizer_model": FILE, "save": OUTPUT_FOLDER}
    | {"tensorboard_dir": OUTPUT_FOLDER},
}


SLOW = ("evaluate", "pretrain")


@pytest.mark.parametrize(
    "command", [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in PATHS]
)
def test_path_that_cannot_be_used(workshop, command):
    paths = [(flag, path) for flag, kind in PATHS[command].items() for path in BAD_PATHS[kind]]
    if command == "quickstart":  # it makes its folder as its first stage does
        paths = [(flag, path) for flag, path in paths if path != "/proc/x"]
    if "tokenizer_model" in PATHS[command] and command != "preprocess":
        paths.remove(("tokenizer_model", "model"))  # the folder of a tokenizer
    refuse_all(workshop, [(command_line(command, **{flag: path}), _named(path)) for flag, path in paths])


def _named(path: str) -> list[str]:
    """Return what an error says of a path; the system itself may not show an odd name."""
    return [] if path.removesuffix(".yaml") in (LONG_NAME, "\udcff") else [path]


PROMPTS = {
    "": "--prompt is empty",
    " \n": "--prompt is empty",
    "a\udcff": "--prompt has an invalid byte",
    "import " * 30: "64 positions",
}


def test_prompt_that_the_model_cannot_take(workshop):
    refuse_all(workshop, [(command_line("generate", prompt=prompt), [words]) for prompt, words in PROMPTS.items()])


@pytest.mark.parametrize("command", ["pretrain", pytest.param("evaluate", marks=pytest.mark.slow)])
def test_rank_without_a_launcher(workshop, command, monkeypatch):
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    refuse_all(workshop, [(command_line(command), ["torchrun", "MASTER_ADDR"])], after_progress=True)


def test_file_in_first_place_that_cannot_be_used(workshop):
    commands = {
        "pretrain --dry-run": [f"{path}.yaml" for path in BAD_PATHS[FILE]],
        "compare --run-dir OUT": BAD_PATHS[FILE],
        "status": BAD_PATHS[FOLDER],
    }
    cases = [([*name.split(), path], _named(path)) for name, paths in commands.items() for path in paths]
    refuse_all(workshop, cases)


MISSING_FOLDERS = {
    "convert megatron-to-hf": "load",
    "convert hf-to-megatron": "load",
    "convert upcycle": "load",
    "analyze": "load",
    "generate": "load",
}


def test_missing_folder_is_found_before_packages_are_loaded(workshop):
    for command, flag in MISSING_FOLDERS.items():
        outcome = run_command(*command_line(command, **{flag: "nowhere"}))
        outcome.assert_refused(f"--{flag} nowhere")
        assert outcome.errors == outcome.messages()


MASKED_MODEL = "--num-experts 4 --num-layers 2"
# Mistakes in words, with words of the error.
MISTAKES = [
    ("tokenizer --vocab-siz 5", "unknown flag --vocab-siz (nearest: --vocab-size)"),
    ("tokenizer --vocab-size", "--vocab-size: expected one argument"),
    ("tokenizer", "the following arguments are required: --input"),
    ("mask --token-frequency a --vocab-size 5", "--vocab-size: not allowed with argument --token-frequency"),
    ("count --data-path a --output b --vocab-size 5 stray --x=1", "unknown flag --x"),
    ("count --merge a --output b --merge=c", "--merge is given 2 times: write all its values after one --merge"),
    ("count --output OUT --data-path data", "give --data-path and --vocab-size, or --merge"),
    ("count --output OUT --merge a --data-path a", "do not apply to --merge"),
    ("preprocess --input a --output-prefix OUT", "required: --tokenizer-type"),
    ("preprocess --merge a --output-prefix OUT --append-eod", "--append-eod is for --input"),
    ("preprocess --merge a --output-prefix OUT --shard 0/2", "--shard is for --input"),
    ("preprocess --merge a --output-prefix OUT --shuffle-seed -1", "--shuffle-seed must be at least 0, not -1"),
    ("preprocess --merge data --json-keys text --output-prefix OUT", "--json-keys is for output prefixes"),
    (f"preprocess {COMMANDS['preprocess']} --shard 0/2 --shuffle-seed 1", "give it to --merge instead"),
    (f"preprocess {COMMANDS['preprocess']} --json-keys text text", "names 'text' twice"),
    (f"preprocess {COMMANDS['preprocess']} --json-keys ../../x", "must not contain '/'"),
    (f"preprocess {COMMANDS['preprocess']} --json-keys text a/b", "must not contain '/'"),
    ("mask --routing-mask mask.safetensors --num-layers 4 --seed 1 --output OUT", "leave --num-layers out"),
    ("mask --routing-mask mask.safetensors --hash-layers 0 --output OUT", "leave --hash-layers out"),
    ("mask --expert-table t.npy --shared-table --output OUT", "--num-experts, --num-layers missing"),
    (f"mask --expert-table t.npy --shared-table {MASKED_MODEL} --output OUT", "leave --shared-table out"),
    (f"mask --expert-table t.npy --frequent-mass 0 {MASKED_MODEL} --output OUT", "leave --frequent-mass out"),
    (
        f"mask {MASKED_MODEL} --output OUT",
        "give --token-frequency, --vocab-size, --expert-table or --routing-mask",
    ),
    ("generate --load model --prompt a stray", "unrecognized arguments: stray"),
    ("generate --load model", "one of the arguments --prompt --prompts-file is required"),
    ("convert", "the following arguments are required: command"),
    ("convert megatron-to-hf --lode x", "unknown flag --lode (nearest: --load)"),
    ("analyze --load model --output-dir OUT", "--data-path --input is required"),
    ("analyze --load model --output-dir OUT --input text.txt --split 1,1,1", "--split is for --data-path"),
    ("compare suite.yaml --list --report", "not allowed with argument"),
    ("compare suite.yaml --held-out dataset=F", "--held-out must be NAME=FILE: the name dataset is taken"),
    ("compare suite.yaml --held-out ../data=F", "--held-out must be NAME=FILE: a name consists of letters"),
    ("compare suite.yaml --held-out a=F a=G", "--held-out has two texts of one name"),
    (f"compare {COMMANDS['compare']} --list --merge slip", "--merge slip does not exist"),
    ("quickstart --input text.txt text.txt --run-dir text.txt", "File exists; choose another --run-dir"),
    (
        "compare suite.yaml --held-out a=text.txt --run-dir text.txt --input text.txt text.txt",
        "choose another --run-dir",
    ),
    (
        f"quickstart {COMMANDS['quickstart']} --assignment rank-local --frequent-visible-experts 8",
        "the mask of the variant maskmoe: ",
    ),
    ("pretrain --node 2 laptop.yaml", "unknown option --node of maskmoe pretrain: write Megatron's flags after MODEL"),
    ("pretrain --run-dir checkpoints/release --gpus-per-node 1 laptop.yaml", "release is a checkpoint, which stays"),
    ("pretrain laptop.yaml stray", "only Megatron's flags may follow the model file, not 'stray'"),
    ("pretrain stray", "the model file stray does not exist"),
    ("pretrain --num-layer 2", "unknown flag --num-layer (nearest: --num-layers); --help-all lists all"),
    ("pretrain --lr abc", "--lr: invalid float value: 'abc' (see maskmoe pretrain --help-all)"),
    ("pretrain --check x", "--check must be a whole number, not 'x'"),
    ("pretrain --check 1000000007", "--check must be at most"),
    ("pretrain --json F", "unknown flag --json"),
    ("evaluate --eval-split tests", "--eval-split: invalid choice: 'tests'"),
    ("evaluate --load nowhere --use-checkpoint-args", "--load nowhere holds no checkpoint"),
    ("generate --prompt a --load huggingface", "huggingface holds no checkpoint"),
    ("generate --prompt a --load checkpoints --ckpt-step 3", "iter_0000003 does not exist"),
    ("generate --prompt a --load checkpoints --routing-mask nowhere", "nowhere does not exist"),
    ("generate --prompt a --load checkpoints --tokenizer-model nowhere", "pass --tokenizer-model"),
]


def test_mistake_in_words(workshop):
    refuse_all(workshop, [(line.split(), [words]) for line, words in MISTAKES])
