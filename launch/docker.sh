#!/usr/bin/env bash
set -euo pipefail
unset CDPATH

usage() {
    cat <<'END'
usage: launch/docker.sh [options] COMMAND…

Runs a command of the repository, for instance launch/quickstart.sh or launch/pretrain.sh MODEL.yaml, in a container.
The command runs in /opt/maskmoe, where the image holds the repository with its environment. Files that the command
writes to runs/ are kept.

  --run-dir DIR        mount DIR as runs/ (default: the runs/ of this checkout)
  --mount PATH[:MODE]  mount PATH at the same path; MODE is ro (default) or rw. For data, models and masks.
  --code image         use the image's own Python code and scripts (default: this checkout's)
  --cpu                use the image for CPUs (default if nvidia-smi shows no GPU, except with --build --base-image)
  --gpus LIST          use these GPUs, for instance 0,1 (default: all). The container numbers these GPUs from 0, so
                       CUDA_VISIBLE_DEVICES is not passed.
  --image NAME         use this image (default: maskmoe:VERSION or maskmoe-cpu:VERSION)
  --shm-size SIZE      give the container its own /dev/shm, for instance 16g (default: share the host's)
  --env NAME[=VALUE]   set an environment variable. The launcher's variables except RUN_DIR, and those of NCCL, gloo,
                       UCX, NVSHMEM and W&B, are always passed.
  --build              build the image first, from docker/Dockerfile or docker/Dockerfile.cpu; COMMAND is then optional
  --base-image NAME    build on this image; required for GPUs, where it is NVIDIA's PyTorch image, 26.02 or newer
  --extras LIST        build with these optional parts, see launch/setup.sh --help (default: hf)
  --engine NAME        docker or podman (default: the first that is installed)
  --dry-run            only print the command line
END
}

root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd -P)
HOME_IN_IMAGE=/opt/maskmoe
PASSED_VARIABLES='^(NNODES|NODE_RANK|NPROC_PER_NODE|RDZV_[A-Z_]+|'
PASSED_VARIABLES+='MAX_RESTARTS|SHUTDOWN_TIMEOUT|OMP_NUM_THREADS|CUDA_(VISIBLE_DEVICES|DEVICE_MAX_CONNECTIONS)|'
PASSED_VARIABLES+='(NCCL|TORCH_NCCL|GLOO|UCX|NVSHMEM)_[A-Z0-9_]+|WANDB_[A-Z_]+)$'

fail() {
    printf 'docker: error: %s\n' "$*" >&2
    exit 2
}

# run COMMAND…: runs the command, or prints it for --dry-run.
run() {
    if $dry_run; then
        printf '%q ' "$@" | sed 's/ $/\n/'
    else
        "$@"
    fi
}

has_gpus() {
    [[ $(nvidia-smi --list-gpus 2>/dev/null) == GPU* ]]
}

# Prints the name of the first engine that is installed.
find_engine() {
    local name
    for name in docker podman; do
        if type -P "$name" >/dev/null; then
            echo "$name"
            return
        fi
    done
    return 1
}

# add_limit NAME FLAG BYTES: sets a limit of the container. Docker's daemon can set any limit if it runs as root. Other
# containers cannot exceed the user's own hard limit, so lower the limit to it.
add_limit() {
    local limit=$3 hard_limit
    hard_limit=$(ulimit -H "-$2")
    if { [[ $engine == podman ]] || $rootless; } && [[ $hard_limit != unlimited ]] &&
        ((limit < 0 || limit > hard_limit * 1024)); then
        limit=$((hard_limit * 1024))
    fi
    options+=("--ulimit=$1=$limit:$limit")
}

add_gpus() {
    local gpu
    if [[ $engine == docker ]]; then
        options+=("--gpus=$([[ $gpus == all ]] && echo all || echo "\"device=$gpus\"")")
    else
        for gpu in ${gpus//,/ }; do
            options+=("--device=nvidia.com/gpu=$gpu")
        done
    fi
    [[ ! -e /dev/infiniband ]] || options+=(--device=/dev/infiniband)
}

build() {
    local file=docker/Dockerfile arguments=()
    if $cpu; then
        file=docker/Dockerfile.cpu
    elif [[ -z $base_image ]]; then
        fail "the image for GPUs needs NVIDIA's PyTorch image: pass --base-image REGISTRY/…/pytorch:TAG"
    fi
    [[ -z $base_image ]] || arguments+=(--build-arg "BASE_IMAGE=$base_image")
    # BuildKit and buildah use the host's network only with --network host; pip may need a proxy or a mirror there.
    [[ $engine != podman ]] || arguments+=(--format docker --layers)
    run "$engine" build --file "$root/$file" --tag "$image" --network host \
        --build-arg "VERSION=$version" --build-arg "EXTRAS=$extras" \
        --build-arg "REVISION=$(git -C "$root" describe --always --dirty --abbrev=40 2>/dev/null || echo unknown)" \
        "${arguments[@]}" "$root"
}

# Sets the array options to the options of the container.
set_options() {
    local name folder user groups rootless=false
    # After a stop request, a run needs time for its last checkpoint.
    options=(--rm --network=host "--stop-timeout=${SHUTDOWN_TIMEOUT:-600}")
    # The run has the caller's user and groups. In a rootless Docker, these are root's.
    [[ $engine != docker || $(docker info --format '{{.SecurityOptions}}' 2>/dev/null) != *name=rootless* ]] ||
        rootless=true
    if [[ $engine == podman ]] && ((EUID > 0)); then
        options+=("--user=$(id -u):$(id -g)" --userns=keep-id --group-add=keep-groups)
    elif $rootless; then
        options+=(--user=0:0)
    else
        read -ra groups <<<"$(id -G)"
        options+=("--user=$(id -u):$(id -g)" "${groups[@]/#/--group-add=}")
    fi
    # The caller's user has no home and no name in the image, but caches of Python packages need both.
    # Outside the image the user may have no name either; then id prints the number and fails.
    user=$(id -un 2>/dev/null) || user=$(id -u)
    options+=(--env=HOME=/tmp "--env=USER=$user")
    if [[ -t 0 && -t 1 ]]; then
        options+=(--interactive --tty)
    elif [[ ! -t 0 && -e /dev/fd/0 && ! /dev/fd/0 -ef /dev/null ]]; then
        # Standard input is a pipe or a file. An engine in the background must not read from a terminal.
        options+=(--interactive)
    fi
    if [[ -n $shm_size ]]; then
        options+=("--shm-size=$shm_size")
    else
        options+=(--ipc=host)
    fi
    # Network cards need memory that is never swapped out; compilers need a large stack for deep recursion.
    add_limit memlock l -1
    add_limit stack s $((64 * 1024 * 1024))
    $cpu || add_gpus
    options+=("--volume=$run_dir:$HOME_IN_IMAGE/runs")
    if [[ $code == checkout ]]; then
        for folder in launch maskmoe tests tools; do
            options+=("--volume=$root/$folder:$HOME_IN_IMAGE/$folder:ro")
        done
    fi
    options+=("${mounts[@]/#/--volume=}")
    while IFS= read -r name; do
        [[ $name == CUDA_VISIBLE_DEVICES && $gpus != all ]] || options+=("--env=$name")
    done < <(compgen -e | grep -E "$PASSED_VARIABLES" || true)
    options+=("${environment[@]/#/--env=}")
}

# add_mount PATH[:MODE]
add_mount() {
    local path=$1 mode=ro links=--no-symlinks
    if [[ $path =~ ^(.+):(ro|rw)$ ]]; then
        path=${BASH_REMATCH[1]} mode=${BASH_REMATCH[2]}
    fi
    [[ $path != *:* ]] || fail "--mount $1: the path must not contain a colon, and the mode must be ro or rw"
    # In a path, `..` after a link leads to the folder of the link's target.
    [[ /$path/ != */../* ]] || links=--physical
    path=$(realpath -e "$links" -- "$path" 2>/dev/null) || fail "--mount $1: no such file or folder"
    mounts+=("$path:$path:$mode")
}

version=$(sed -n 's/^__version__ = "\(.*\)"$/\1/p' "$root/maskmoe/__init__.py")
run_dir=$root/runs mounts=() environment=() code=checkout cpu=false gpus='' image='' shm_size='' build=false
base_image='' extras=hf engine='' dry_run=false
while (($#)); do
    case $1 in
        --cpu) cpu=true ;;
        --build) build=true ;;
        --dry-run) dry_run=true ;;
        -h | --help)
            usage
            exit
            ;;
        --run-dir | --mount | --code | --gpus | --image | --shm-size | --env | --base-image | --extras | --engine)
            (($# > 1)) || fail "$1 needs a value (see launch/docker.sh --help)"
            case $1 in
                --run-dir) run_dir=$(realpath -m -- "$2") ;;
                --mount) add_mount "$2" ;;
                --env) environment+=("$2") ;;
                *)
                    name=${1#--}
                    printf -v "${name//-/_}" %s "$2"
                    ;;
            esac
            shift
            ;;
        --)
            shift
            break
            ;;
        -*) fail "unknown option $1 (see launch/docker.sh --help)" ;;
        *) break ;;
    esac
    shift
done

$build || (($#)) || fail "COMMAND is missing (see launch/docker.sh --help)"
[[ $code == checkout || $code == image ]] || fail "--code must be checkout or image, not $code"
[[ $run_dir != *:* ]] || fail "--run-dir $run_dir: the path must not contain a colon"
if [[ -z $engine ]]; then
    engine=$(find_engine) || engine=docker
    $dry_run || type -P "$engine" >/dev/null || fail "neither docker nor podman is installed: install one of them"
fi
[[ $engine == docker || $engine == podman ]] || fail "--engine must be docker or podman, not $engine"
# The package podman-docker installs podman as docker, which takes other options for GPUs and users.
[[ $engine != docker || $(docker --version 2>/dev/null) != podman* ]] || engine=podman
$dry_run || type -P "$engine" >/dev/null || fail "$engine is not installed: install it, or choose another --engine"
# A machine that builds the image for GPUs often has no GPU.
$cpu || [[ -n $gpus ]] || { $build && [[ -n $base_image ]]; } || has_gpus || cpu=true
gpus=${gpus:-all}
image=${image:-$($cpu && echo maskmoe-cpu || echo maskmoe):$version}

! $build || build
(($#)) || exit 0
$dry_run || mkdir -p -- "$run_dir"
set_options
command=("$engine" run "${options[@]}" "$image" "$@")
# The engine replaces this script, so that signals to this process reach the engine, which passes them to the run.
$dry_run || exec "${command[@]}"
run "${command[@]}"
