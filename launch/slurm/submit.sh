#!/usr/bin/env bash
set -euo pipefail

usage() {
    cat <<'END'
usage: launch/slurm/submit.sh [options] [sbatch's options] -- MODEL.yaml [flags…]

Submits launch/slurm/pretrain.sbatch, which trains MODEL.yaml on the nodes of a Slurm job and requeues itself.

  --run-dir DIR  checkpoints, TensorBoard's events and logs, on all nodes (default: runs/MODEL)
  --chain N      N jobs, one after the other, that go on with one run, for clusters that requeue nothing
  --dry-run      only print sbatch's command line
  --train-nodes, --no-node-check, --max-requeues, --container, --image, --mount, --port, --address
                 as launch/slurm/pretrain.sbatch --help says

All other options are sbatch's; write them as --option=value. For example:
  launch/slurm/submit.sh --nodes=4 --exclusive --gpus-per-node=8 --time=24:00:00 -- launch/models/laptop.yaml --lr 1e-3
  launch/slurm/submit.sh --array=1-3 --run-dir runs/seed-%a -- launch/models/laptop.yaml --seed %a
  launch/slurm/submit.sh --dependency=afterok:1234 … waits for job 1234
END
}

root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/../.." && pwd -P)

fail() {
    printf 'submit: error: %s\n' "$*" >&2
    exit 2
}

run_dir='' chain='' dry_run=false ours=(--root "$root") sbatch=()
while (($#)) && [[ $1 != -- ]]; do
    case $1 in
        --dry-run) dry_run=true ;;
        --no-node-check) ours+=("$1") ;;
        -h | --help)
            usage
            exit
            ;;
        --run-dir | --chain | --train-nodes | --max-requeues | --container | --image | --mount | --port | --address)
            (($# > 1)) || fail "$1 needs a value (see launch/slurm/submit.sh --help)"
            case $1 in
                --run-dir) run_dir=$2 ;;
                --chain) chain=$2 ;;
                *) ours+=("$1" "$2") ;;
            esac
            shift
            ;;
        -*) sbatch+=("$1") ;;
        *) fail "$1 stands alone: write sbatch's options as --option=value, and -- before MODEL.yaml" ;;
    esac
    shift
done
(($# > 1)) || fail "which MODEL.yaml? Write it after -- (see launch/slurm/submit.sh --help)"
shift
model=$(realpath -m -- "$1")
[[ $model == *%a* || -f $model ]] || fail "there is no model file $1"
run_dir=$(realpath -m -- "${run_dir:-$root/runs/$(basename -- "$1" .yaml)}")
if [[ -n $chain ]]; then
    [[ $chain =~ ^[1-9][0-9]*$ ]] || fail "--chain is a number of jobs, not $chain"
    sbatch+=("--array=1-$chain%1")
    ours+=(--chain)
fi

# sbatch makes no folders, and knows the %a of a run folder only in the name of the log.
logs=$run_dir/slurm
[[ $run_dir != *%* ]] || logs=$(dirname -- "${run_dir%%\%*}x")/slurm
command=(sbatch "--output=$logs/%j.log" "--chdir=$root" "${sbatch[@]}" "$root/launch/slurm/pretrain.sbatch"
    "${ours[@]}" --run-dir "$run_dir" -- "$model" "${@:2}")
if $dry_run; then
    printf '%q ' "${command[@]}" | sed 's/ $/\n/'
    exit
fi
type -P sbatch >/dev/null || fail "there is no sbatch here: submit from a node of a Slurm cluster"
mkdir -p -- "$logs" || fail "cannot make $logs: choose another --run-dir"
exec "${command[@]}"
