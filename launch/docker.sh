#!/usr/bin/env bash
set -euo pipefail

usage() {
    cat <<'END'
usage: launch/docker.sh [options] COMMAND…

Runs a command of the repository, for instance launch/quickstart.sh or launch/pretrain.sh MODEL.yaml, in a container.
It runs in /opt/maskmoe, where the image has the repository with its environment; what it writes to runs/ stays.

  --run-dir DIR        what is runs/ in the container (default: runs)
  --mount PATH[:MODE]  PATH at the same place in the container; MODE is ro (default) or rw. For data, models, masks.
  --code image         the Python code and scripts that the image was built with (default: those of this checkout)
  --cpu                the image for CPUs (default where nvidia-smi shows no GPU)
  --gpus LIST          the GPUs to use, for instance 0,1 (default: all)
  --image NAME         the image (default: maskmoe:VERSION or maskmoe-cpu:VERSION)
  --shm-size SIZE      a /dev/shm of the container's own, for instance 16g (default: the host's)
  --env NAME[=VALUE]   an environment variable. The launchers', and those of NCCL and gloo, are handed on unasked.
  --build              build the image first, from docker/Dockerfile or docker/Dockerfile.cpu; COMMAND may be left out
  --base-image NAME    build on this image; for GPUs on NVIDIA's PyTorch image, which must be named
  --engine NAME        docker or podman (default: the first that there is)
  --dry-run            only print what would be run
END
}

root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd -P)
HOME_IN_IMAGE=/opt/maskmoe
HANDED_ON='^(NNODES|NODE_RANK|NPROC_PER_NODE|RDZV_[A-Z_]+|MASTER_(ADDR|PORT)|MAX_RESTARTS|SHUTDOWN_TIMEOUT|'
HANDED_ON+='OMP_NUM_THREADS|CUDA_(VISIBLE_DEVICES|DEVICE_MAX_CONNECTIONS)|'
HANDED_ON+='(NCCL|TORCH_NCCL|GLOO|UCX|NVSHMEM)_[A-Z0-9_]+|WANDB_[A-Z_]+)$'

fail() {
    printf 'docker: error: %s\n' "$*" >&2
    exit 2
}

# run COMMAND…: as it stands, or printed.
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

engine() {
    local name
    for name in docker podman; do
        if type -P "$name" >/dev/null; then
            echo "$name"
            return
        fi
    done
    return 1
}

# add_limit NAME FLAG WANTED: podman's containers have no more than its user may, docker's what its daemon may.
add_limit() {
    local wanted=$3 most
    most=$(ulimit -H "-$2")
    if [[ $engine == podman && $most != unlimited ]] && ((wanted < 0 || wanted > most * 1024)); then
        wanted=$((most * 1024))
    fi
    options+=("--ulimit=$1=$wanted:$wanted")
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
        fail "the image for GPUs is built on NVIDIA's PyTorch image: name it by --base-image REGISTRY/…/pytorch:TAG"
    fi
    [[ -z $base_image ]] || arguments+=(--build-arg "BASE_IMAGE=$base_image")
    # BuildKit and buildah have the host's network only if told so; a proxy or a mirror there is of use to pip.
    [[ $engine != podman ]] || arguments+=(--format docker --layers)
    run "$engine" build --file "$root/$file" --tag "$image" --network host \
        --build-arg "VERSION=$version" \
        --build-arg "REVISION=$(git -C "$root" describe --always --dirty --abbrev=40 2>/dev/null || echo unknown)" \
        "${arguments[@]}" "$root"
}

# Sets options: those of the container.
set_options() {
    local name folder
    # Asked to stop, a run needs time for its last checkpoint.
    options=(--rm --network=host "--user=$(id -u):$(id -g)" "--stop-timeout=${SHUTDOWN_TIMEOUT:-600}")
    # A user that the image does not know has no home and no name there; caches want both.
    options+=(--env=HOME=/tmp "--env=USER=$(id -un)")
    if [[ $engine == podman ]] && ((EUID > 0)); then
        options+=(--userns=keep-id)
    fi
    if [[ -t 0 && -t 1 ]]; then
        options+=(--interactive --tty)
    fi
    if [[ -n $shm_size ]]; then
        options+=("--shm-size=$shm_size")
    else
        options+=(--ipc=host)
    fi
    # Memory that network cards reach must not be swapped; deep recursion of compilers wants a large stack.
    add_limit memlock l -1
    add_limit stack s $((64 * 1024 * 1024))
    $cpu || add_gpus
    options+=("--volume=$run_dir:$HOME_IN_IMAGE/runs")
    if [[ $code == checkout ]]; then
        for folder in launch maskmoe tools; do
            options+=("--volume=$root/$folder:$HOME_IN_IMAGE/$folder:ro")
        done
    fi
    options+=("${mounts[@]/#/--volume=}")
    while IFS= read -r name; do
        options+=("--env=$name")
    done < <(compgen -e | grep -E "$HANDED_ON" || true)
    options+=("${environment[@]/#/--env=}")
}

# add_mount PATH[:MODE]
add_mount() {
    local path=$1 mode=ro
    if [[ $path =~ ^(.+):(ro|rw)$ ]]; then
        path=${BASH_REMATCH[1]} mode=${BASH_REMATCH[2]}
    fi
    [[ $path != *:* ]] || fail "--mount $1: the path may not contain a colon, and the mode is ro or rw"
    path=$(realpath -e -- "$path" 2>/dev/null) || fail "--mount $1: there is no such file or folder"
    mounts+=("$path:$path:$mode")
}

version=$(sed -n 's/^__version__ = "\(.*\)"$/\1/p' "$root/maskmoe/__init__.py")
run_dir=$root/runs mounts=() environment=() code=checkout cpu=false gpus='' image='' shm_size='' build=false
base_image='' engine='' dry_run=false
while (($#)); do
    case $1 in
        --cpu) cpu=true ;;
        --build) build=true ;;
        --dry-run) dry_run=true ;;
        -h | --help)
            usage
            exit
            ;;
        --run-dir | --mount | --code | --gpus | --image | --shm-size | --env | --base-image | --engine)
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

$build || (($#)) || fail "which command? (see launch/docker.sh --help)"
[[ $code == checkout || $code == image ]] || fail "--code is checkout or image, not $code"
[[ $run_dir != *:* ]] || fail "--run-dir $run_dir: the path may not contain a colon"
if [[ -z $engine ]]; then
    engine=$(engine) || fail "there is neither docker nor podman: install one of them"
fi
[[ $engine == docker || $engine == podman ]] || fail "--engine is docker or podman, not $engine"
$dry_run || type -P "$engine" >/dev/null || fail "there is no $engine here: install it, or choose another --engine"
$cpu || [[ -n $gpus ]] || has_gpus || cpu=true
gpus=${gpus:-all}
image=${image:-$($cpu && echo maskmoe-cpu || echo maskmoe):$version}

! $build || build
(($#)) || exit 0
$dry_run || mkdir -p -- "$run_dir"
set_options
run "$engine" run "${options[@]}" "$image" "$@"
