#!/usr/bin/env bash
set -euo pipefail

usage() {
    cat <<'END'
usage: launch/check_node.sh [options]

Says whether this machine is fit to take part in a run: one line on stderr for each thing that is wrong with it, and
exit code 1 if anything is. What it is not told to look at, it leaves out.

  --gpus[=N]             there are N GPUs (default: any), and none reports memory errors or a fatal Xid
  --run-dir DIR          DIR can be written to and has room
  --min-disk MIB         how much room DIR must have (default: 1024)
  --min-shm MIB          how much of /dev/shm must be free (default: 32)
  --time SECONDS         the clock is within a minute of SECONDS since 1970
  --rendezvous HOST:PORT HOST answers, whether something listens at PORT already or not
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

# free_mib PATH: free space of its file system.
free_mib() {
    df --output=avail --block-size=1M -- "$1" | tail -n 1 | tr -d ' '
}

check_room() {
    local path=$1 wanted=$2 free
    free=$(free_mib "$path")
    ((free >= wanted)) || problem "$path has $free MiB free, $wanted MiB are needed"
}

check_run_dir() {
    local dir=$1 probe
    if ! mkdir -p -- "$dir" 2>/dev/null || ! probe=$(mktemp -- "$dir/.check_node.XXXXXX" 2>/dev/null); then
        problem "cannot write to $dir: mount it here, or mend its permissions"
        return
    fi
    rm -f -- "$probe"
    check_room "$dir" "$2"
}

check_clock() {
    local now
    now=$(date +%s)
    ((now - $1 <= 60 && $1 - now <= 60)) || problem "its clock is $((now - $1)) s off the first node's"
}

# check_reachable HOST:PORT. A refused connection is an answer, too: the host is there.
check_reachable() {
    local host=${1%:*} port=${1##*:} reason
    if ! getent ahosts "$host" >/dev/null; then
        problem "the rendezvous host $host has no address here"
        return
    fi
    # shellcheck disable=SC2016 # the inner bash expands them
    reason=$(LC_ALL=C timeout 10 bash -c 'exec 3<>"/dev/tcp/$0/$1"' "$host" "$port" 2>&1) ||
        [[ $reason == *"Connection refused"* ]] ||
        problem "the rendezvous host $host does not answer"
}

# Xids after which a GPU needs a reset or a repair, as NVIDIA's table of Xid errors has it: memory that cannot be
# corrected, NVLink, a GPU that fell off the bus, and its firmware.
FATAL_XIDS='48|64|74|79|95|119|120'

# check_gpus [N]
check_gpus() {
    local wanted=${1:-} found errors xids
    if ! found=$(nvidia-smi --query-gpu=index --format=csv,noheader 2>&1); then
        problem "nvidia-smi fails: ${found%%$'\n'*}"
        return
    fi
    found=$(grep --count --extended-regexp '^[0-9]+$' <<<"$found" || true)
    if ((found == 0)) || [[ -n $wanted && $found != "$wanted" ]]; then
        problem "nvidia-smi shows $found GPUs, not ${wanted:-any}"
    fi
    # A GPU without error correction answers [N/A].
    errors=$(nvidia-smi --query-gpu=index,ecc.errors.uncorrected.volatile.total --format=csv,noheader |
        awk -F ', *' '$2 ~ /^[0-9]+$/ && $2 > 0 {printf "%sGPU %s: %s", separator, $1, $2; separator = ", "}')
    [[ -z $errors ]] || problem "memory errors that could not be corrected ($errors)"
    # The kernel's log may be for root only; without it there is nothing to see.
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

check_room /dev/shm "$min_shm"
[[ -z $run_dir ]] || check_run_dir "$run_dir" "$min_disk"
[[ -z $time ]] || check_clock "$time"
[[ -z $rendezvous ]] || check_reachable "$rendezvous"
! $gpus || check_gpus "$gpu_count"
((problems == 0))
