#!/usr/bin/env bash
set -euo pipefail
unset CDPATH

usage() {
    cat <<'END'
usage: launch/slurm/submit.sh [options] [sbatch's options] -- MODEL.yaml [flags…]

Submits launch/slurm/pretrain.sbatch, which trains MODEL.yaml on the nodes of a Slurm job and requeues itself.

  --run-dir DIR  folder for checkpoints, TensorBoard events and logs, shared by all nodes (default: runs/MODEL)
  --chain N      submit N jobs that continue one run one after the other, for clusters that do not requeue jobs
  --dry-run      only print sbatch's command line
  --train-nodes, --no-node-check, --max-requeues, --container, --image, --mount, --port, --address
                 see launch/slurm/pretrain.sbatch --help

These options are written as --option value or --option=value. All other options are passed to sbatch; write them as
--option=value. For example:
  launch/slurm/submit.sh --nodes=2-4 --exclusive --gpus-per-node=8 --time=24:00:00 -- launch/models/mixtral-8x7b.yaml …
  launch/slurm/submit.sh --dependency=afterok:1234 … (waits for job 1234)
END
}

root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/../.." && pwd -P)

fail() {
    printf 'submit: error: %s\n' "$*" >&2
    exit 2
}

run_dir='' chain='' dry_run=false script_options=(--root "$root") sbatch=()
while (($#)) && [[ $1 != -- ]]; do
    # The script's own options take --option=value and --option value.
    case $1 in
        --run-dir=* | --chain=* | --train-nodes=* | --max-requeues=* | --container=* | --image=* | --mount=* | \
            --port=* | --address=*)
            set -- "${1%%=*}" "${1#*=}" "${@:2}"
            ;;
    esac
    case $1 in
        --dry-run) dry_run=true ;;
        --no-node-check) script_options+=("$1") ;;
        -h | --help)
            usage
            exit
            ;;
        --run-dir | --chain | --train-nodes | --max-requeues | --container | --image | --mount | --port | \
            --address)
            (($# > 1)) || fail "$1 needs a value (see launch/slurm/submit.sh --help)"
            case $1 in
                --run-dir) run_dir=$2 ;;
                --chain) chain=$2 ;;
                --mount)
                    # In a path, `..` after a link leads to the folder of the link's target.
                    links=--no-symlinks
                    [[ /$2/ != */../* ]] || links=--physical
                    path=$(realpath -m "$links" -- "${2%:r[ow]}")
                    script_options+=("$1" "$path$(grep -oE ':r[ow]$' <<<"$2" || true)")
                    ;;
                *) script_options+=("$1" "$2") ;;
            esac
            shift
            ;;
        -*) sbatch+=("$1") ;;
        *) fail "unexpected argument $1: write sbatch's options as --option=value, and -- before MODEL.yaml" ;;
    esac
    shift
done
(($# > 1)) || fail "MODEL.yaml is missing: write it after -- (see launch/slurm/submit.sh --help)"
shift
model=$(realpath -m -- "$1")
[[ -f $model ]] || fail "model file $1 does not exist"
run_dir=$(realpath -m -- "${run_dir:-runs/$(basename -- "$1" .yaml)}")
if [[ -n $chain ]]; then
    [[ $chain =~ ^[1-9][0-9]*$ ]] || fail "--chain needs a number of jobs, not $chain"
    sbatch+=("--array=1-$chain%1")
    script_options+=(--chain)
fi
logs=$run_dir/slurm # sbatch does not create the folder of its log
command=(sbatch "--output=$logs/%j.log" "--chdir=$PWD" "${sbatch[@]}" "$root/launch/slurm/pretrain.sbatch"
    "${script_options[@]}" --run-dir "$run_dir" -- "$model" "${@:2}")
if $dry_run; then
    printf '%q ' "${command[@]}" | sed 's/ $/\n/'
    exit
fi
type -P sbatch >/dev/null || fail "sbatch is not installed: submit from a node of a Slurm cluster"
mkdir -p -- "$logs" || fail "cannot make $logs: choose another --run-dir"
exec "${command[@]}"
