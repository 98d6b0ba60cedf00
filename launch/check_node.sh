#!/usr/bin/env bash
set -euo pipefail

usage() {
    cat <<'END'
usage: launch/check_node.sh [options]

Checks whether this machine is fit for a run. Prints one line on stderr for each problem, and exits with 1 if there is a
problem. /dev/shm is always checked; each other check needs its option.

  --gpus[=N]             check that there are at least N GPUs (default: 1) without memory errors or a fatal Xid
  --run-dir DIR          check that DIR is writable and has free space
  --min-disk MIB         free space that DIR needs (default: 1024)
  --min-shm MIB          free space that /dev/shm needs (default: 32)
  --time SECONDS         check that the clock is at most 1 minute behind and 6 minutes ahead of SECONDS since 1970
  --rendezvous HOST:PORT check that HOST answers, whether or not a process listens at PORT already
END
}

fail() {
    printf 'check_node: error: %s\n' "$*" >&2
    exit 2
}

problems=0

problem() {
    printf 'node %s: %s\n' "${SLURMD_NODENAME:-$(uname -n)}" "$*" >&2
    problems=$((problems + 1))
}

# free_mib PATH: prints the free space of the path's file system.
free_mib() {
    df --output=avail --block-size=1M -- "$1" | tail -n 1 | tr -d ' '
}

# check_space PATH MIB
check_space() {
    local path=$1 needed=$2 free
    free=$(free_mib "$path")
    ((free >= needed)) || problem "$path has $free MiB free, $needed MiB are needed"
}

# check_run_dir DIR MIB
check_run_dir() {
    local dir=$1 probe
    if ! mkdir -p -- "$dir" 2>/dev/null || ! probe=$(mktemp -- "$dir/.check_node.XXXXXX" 2>/dev/null); then
        problem "cannot write to $dir: mount it on this node, or change its permissions"
        return
    fi
    rm -f -- "$probe"
    check_space "$dir" "$2"
}

# check_clock SECONDS. Slurm may take minutes to start this script after the first node has read its clock.
check_clock() {
    local now
    now=$(date +%s)
    ((now - $1 <= 360 && $1 - now <= 60)) || problem "the clock differs by $((now - $1)) s from the first node's"
}

# check_reachable HOST:PORT. A refused connection proves that the host answers.
check_reachable() {
    local host=${1%:*} port=${1##*:} reason
    host=${host#[} host=${host%]}
    if ! getent ahosts "$host" >/dev/null; then
        problem "the name of the rendezvous host $host cannot be resolved"
        return
    fi
    # shellcheck disable=SC2016 # the inner bash expands the parameters
    reason=$(LC_ALL=C timeout 10 bash -c 'exec 3<>"/dev/tcp/$0/$1"' "$host" "$port" 2>&1) ||
        [[ $reason == *"Connection refused"* ]] ||
        problem "the rendezvous host $host does not answer"
}

# Xids after which a GPU needs a reset or a repair according to NVIDIA's table of Xid errors: uncorrectable errors of the
# memory, errors of NVLink or the firmware, and a GPU that has fallen off the bus.
FATAL_XIDS='48|64|74|79|95|119|120'

# check_gpus [N]. nvidia-smi also shows GPUs that the job may not use, so there may be more than N.
check_gpus() {
    local wanted=${1:-1} list found errors xids
    if ! list=$(nvidia-smi --list-gpus 2>&1); then
        problem "nvidia-smi fails: ${list%%$'\n'*}"
        return
    fi
    # Slurm counts the instances of a GPU that is divided by MIG as GPUs.
    found=$(grep --count --extended-regexp '^ *(GPU|MIG) ' <<<"$list" || true)
    ((found >= wanted)) || problem "nvidia-smi shows $found GPUs, expected $wanted"
    # A GPU without error correction reports [N/A].
    if ! errors=$(nvidia-smi --query-gpu=index,ecc.errors.uncorrected.volatile.total --format=csv,noheader 2>&1); then
        problem "nvidia-smi cannot read the memory errors: ${errors%%$'\n'*}"
        return
    fi
    errors=$(awk -F ', *' '$2 ~ /^[0-9]+$/ && $2 > 0 {printf "%sGPU %s: %s", separator, $1, $2; separator = ", "}' \
        <<<"$errors")
    [[ -z $errors ]] || problem "uncorrectable memory errors ($errors)"
    # The kernel's log may be readable only for root. Then Xids cannot be checked.
    xids=$(dmesg 2>/dev/null | grep -oE "NVRM: Xid .*: ($FATAL_XIDS)," | tail -n 1 || true)
    [[ -z $xids ]] || problem "the kernel reports ${xids%,}"
}

gpus=false gpu_count='' run_dir='' min_disk=1024 min_shm=32 time='' rendezvous=''
while (($#)); do
    case $1 in
        --gpus) gpus=true ;;
        --gpus=*) gpus=true gpu_count=${1#*=} ;;
        -h | --help)
            usage
            exit
            ;;
        --run-dir | --min-disk | --min-shm | --time | --rendezvous)
            (($# > 1)) || fail "$1 needs a value (see launch/check_node.sh --help)"
            name=${1#--}
            printf -v "${name//-/_}" %s "$2"
            shift
            ;;
        *) fail "unknown argument $1 (see launch/check_node.sh --help)" ;;
    esac
    shift
done
for number in "$gpu_count" "$min_disk" "$min_shm" "$time"; do
    [[ $number =~ ^[0-9]*$ ]] || fail "not a number: $number"
done
[[ -z $rendezvous || $rendezvous =~ ^.+:[0-9]+$ ]] || fail "--rendezvous is HOST:PORT, not $rendezvous"

check_space /dev/shm "$min_shm"
[[ -z $run_dir ]] || check_run_dir "$run_dir" "$min_disk"
[[ -z $time ]] || check_clock "$time"
[[ -z $rendezvous ]] || check_reachable "$rendezvous"
! $gpus || check_gpus "$gpu_count"
((problems == 0))
