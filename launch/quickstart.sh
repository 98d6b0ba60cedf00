#!/usr/bin/env bash
# Trains a small MaskMoE model from raw text, one command after the other. A step is skipped if its result exists, so
# the same command resumes after an interruption. docs/tutorial.md explains each command.
set -euo pipefail
unset CDPATH

usage() {
    cat <<'EOF'
usage: launch/quickstart.sh [--input FILE…] [--run-dir DIR] [options]

Sets up .venv, then goes from raw text to a trained, evaluated and exported model with a sample of its text. The model
is launch/models/laptop.yaml. docs/measurements.md says how many minutes this takes with the defaults.

  --input FILE…    text to train on: JSON lines with the key `text`, or plain text, also .gz and .zst
                   (default: sources and documentation of the installed Python and its packages)
  --run-dir DIR    folder of all files (default: runs/quickstart)
  --vocab-size V   ids of the tokenizer (default: 4096)
  --train-iters N  iterations of 2,048 tokens (default: 800)
  --seed S         seed of the mask, the weights and the order of the data (default: 1234)
  --prompt TEXT    start of the sample (default: the start of the text)

To change anything else, such as the model, copy this script and edit its commands.
EOF
}

fail() {
    printf 'error: %s\n' "$*" >&2
    exit 2
}

input=() run_dir=runs/quickstart vocab_size=4096 train_iters=800 seed=1234 prompt=
while (($#)); do
    case $1 in
        --input)
            while shift && (($#)) && [[ $1 != --* ]]; do input+=("$(realpath -s -- "$1")"); done
            ;;
        --run-dir | --vocab-size | --train-iters | --seed | --prompt)
            (($# > 1)) || fail "$1 needs a value (see launch/quickstart.sh --help)"
            name=${1#--}
            printf -v "${name//-/_}" %s "$2"
            shift 2
            ;;
        -h | --help) usage && exit ;;
        *) fail "unknown argument $1 (see launch/quickstart.sh --help)" ;;
    esac
done

# Look at everything that was given before the installation, which takes minutes.
for number in "$vocab_size" "$train_iters" "$seed"; do
    [[ $number =~ ^[1-9][0-9]{0,8}$ ]] || fail "--vocab-size, --train-iters and --seed are whole numbers, not '$number'"
done
for file in "${input[@]}"; do
    [[ -f $file && -r $file ]] || fail "--input $file is not a file that can be read"
    [[ -s $file ]] || fail "--input $file is empty"
    case $file in *.gz | *.bz2 | *.xz | *.zst | *.parquet) continue ;; esac
    iconv -f utf-8 -t utf-8 <"$file" >/dev/null 2>&1 ||
        fail "--input $file is not text in UTF-8: convert it, for instance by iconv -f latin1 -t utf-8 OLD >NEW"
done
root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd -P)
run=$(realpath -ms -- "$run_dir")

# One folder holds the run of one text and one set of settings. Whoever works in the folder holds its lock.
settings=$(declare -p vocab_size train_iters seed prompt && stat -Lc '%n %s %Y' -- "${input[@]}" 2>/dev/null || true)
mkdir -p -- "$run" 2>/dev/null && [[ -w $run ]] || fail "cannot make the folder --run-dir $run, or not write into it"
[[ -e $run/.quickstart || -z $(ls -A -- "$run") ]] || fail "$run has files of something else: choose another --run-dir"
exec {lock}>>"$run/.quickstart"
flock --nonblock "$lock" || fail "another quickstart works in $run"
if [[ -s $run/.quickstart ]]; then
    [[ $(<"$run/.quickstart") == "$settings" ]] ||
        fail "$run has a quickstart with other settings or of another text: choose another --run-dir, or remove it"
else
    printf '%s\n' "$settings" >"$run/.quickstart"
fi

# Set up .venv, unless a Python on PATH has MaskMoE, as in the container images.
python=$root/.venv/bin/python
if [[ ! -e $root/.venv/maskmoe-setup ]] && python3 -P -c 'import maskmoe, transformers' 2>/dev/null; then
    python=python3
else
    "$root/launch/setup.sh" --extras hf
fi

# step RESULT SUBCOMMAND ARGUMENT…: runs a subcommand of maskmoe unless its result exists.
step() {
    local result=$1 start=$SECONDS
    shift
    [[ ! -e $result ]] || return 0
    printf '\n$ maskmoe%s\n' "$(printf ' %q' "$@")"
    "$python" -P -m maskmoe "$@" {lock}>&- &
    wait $!
    printf '%s %d\n' "$1" $((SECONDS - start)) >>"$run/seconds.txt"
}
# A signal ends the command in progress first: training saves a checkpoint.
stop() {
    [[ -z ${!-} ]] || { kill -TERM $! && wait $!; } 2>/dev/null || true
    exit 130
}
trap stop INT TERM HUP

# Layout of the training: the number of processes, among which the experts are divided, and the threads of each. On CPUs,
# one process is faster than two (docs/measurements.md).
count='from maskmoe.launch.machine import find_devices as find; print(find().num_gpus, find().num_cores)'
read -r gpus cores < <("$python" -P -c "$count")
if ((gpus)); then
    processes=$((gpus < 2 ? 1 : gpus < 4 ? 2 : gpus < 8 ? 4 : 8)) device=(--bf16)
else
    processes=1 device=()
    export OMP_NUM_THREADS=$((cores < 8 ? cores : 8)) GLIBC_TUNABLES=glibc.malloc.hugetlb=1
fi

# 1. Collect a text, if none was given: the sources and the documentation of the installed Python.
if ((${#input[@]} == 0)); then
    input=("$run/corpus.jsonl")
    step "$run/corpus.jsonl" corpus --output "$run/corpus.jsonl"
fi

# 2. Train a tokenizer on the text.
step "$run/tokenizer.vocab" tokenizer --input "${input[@]}" --vocab-size "$vocab_size" --max-lines 1000000 \
    --output-prefix "$run/tokenizer" --force
tokenizer=(--tokenizer-type SentencePieceTokenizer --tokenizer-model "$run/tokenizer.model")

# 3. Encode the text into a dataset. Its documents are shuffled, because the last ones are held out.
step "$run/dataset_text_document.idx" preprocess --input "${input[@]}" "${tokenizer[@]}" --append-eod \
    --shuffle-seed 0 --output-prefix "$run/dataset" --force
split=$("$python" -P "$root/launch/quickstart.py" split "$run")
data=(--data-path "$run/dataset_text_document" --split "$split" --data-cache-path "$run/dataset_cache")

# 4. Count how often each token id occurs.
step "$run/token_frequency.safetensors" count --data-path "$run/dataset_text_document" --vocab-size "$vocab_size" \
    --output "$run/token_frequency.safetensors"

# 5. Build the routing mask: the ids that make up 40 % of the text see 4 of 8 experts, all other ids see one.
step "$run/routing_mask.safetensors" mask --token-frequency "$run/token_frequency.safetensors" \
    --num-experts 8 --num-layers 4 --frequent-mass 0.4 --frequent-visible-experts 4 --assignment balanced \
    --expert-model-parallel-size "$processes" --seed "$seed" --output "$run/routing_mask.safetensors"

# 6. Train the model, or resume its training.
tenth=$((train_iters < 10 ? 1 : train_iters / 10))
printf -v last '%s/checkpoints/iter_%07d' "$run" "$train_iters"
step "$last/integrity.json" pretrain --nproc-per-node "$processes" --run-dir "$run" "$root/launch/models/laptop.yaml" \
    "${data[@]}" "${tokenizer[@]}" --routing-mask "$run/routing_mask.safetensors" --seed "$seed" \
    --train-iters "$train_iters" --eval-interval "$tenth" --save-interval "$tenth" --keep-last-checkpoints 1 \
    --micro-batch-size $((8 / processes)) --expert-model-parallel-size "$processes" "${device[@]}"

# 7. Compute the loss on the held-out documents, for ids of different frequency.
step "$run/evaluation-held-out.json" evaluate --nproc-per-node "$processes" --load "$run/checkpoints" \
    --use-checkpoint-args "${data[@]}" "${tokenizer[@]}" --micro-batch-size 4 --num-workers 0 "${device[@]}" \
    --expert-model-parallel-size "$processes" --token-frequency "$run/token_frequency.safetensors" \
    --output "$run/evaluation-held-out.json"

# 8. Export the model to the format of transformers.
step "$run/model" convert megatron-to-hf --load "$run/checkpoints" --save "$run/model"

# 9. Let the exported model continue a prompt.
prompt=${prompt:-$("$python" -P "$root/launch/quickstart.py" prompt "${input[@]}")}
step "$run/sample.txt" generate --load "$run/model" "--prompt=$prompt" --max-new-tokens 96 --seed "$seed" \
    --output "$run/sample.txt"

# 10. Write report.md and loss.png.
"$python" -P "$root/launch/quickstart.py" report "$run" "$processes"
