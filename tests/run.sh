#!/usr/bin/env bash
set -euo pipefail

usage() {
    cat <<'END'
usage: tests/run.sh [--all | --slurm | --docker] [pytest arguments]

Sets up .venv and runs the checks: ruff, shellcheck, hadolint, then pytest. The tests that need a GPU run where there is
one.

  --all             the slow tests too
  --slurm           only those on a Slurm cluster of two nodes, and on two hosts, which they set up on this machine and
                    take down again; needs root, and installs the Debian packages slurm-wlm, munge and iproute2
  --docker          only those that build the image for CPUs and put it to use; needs root, and installs the Debian
                    packages podman, buildah, runc and mmdebstrap; images stay in build/containers
                    BASE_IMAGE=NAME (environment): build on this image instead of a small Debian of its own
  pytest arguments  run pytest only, with these; paths are relative to the repository. For example:
                    tests/run.sh tests/routing_mask -k digest
END
}

fail() {
    printf 'tests: error: %s\n' "$*" >&2
    exit 2
}

cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."

# Which tests, and which Debian packages they need.
selected="not slow and not slurm and not docker" checks=true packages=()
case ${1:-} in
    --all)
        selected="not slurm and not docker"
        shift
        ;;
    --slurm)
        selected=slurm checks=false
        packages=(slurmctld=slurm-wlm munged=munge ip=iproute2)
        shift
        ;;
    --docker)
        selected=docker checks=false
        packages=(podman=podman buildah=buildah runc=runc mmdebstrap=mmdebstrap)
        shift
        ;;
    -h | --help)
        usage
        exit
        ;;
esac

has_gpu() {
    [[ $(nvidia-smi --list-gpus 2>/dev/null) == GPU* ]] &&
        .venv/bin/python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'
}

launch/setup.sh --extras dev,eval,hf
has_gpu || selected+=" and not gpu"
if ((${#packages[@]})); then
    ((EUID == 0)) || fail "these tests need root: they make networks, hosts and containers of their own"
    tests/packages.sh "${packages[@]}"
fi

if $checks && (($# == 0)); then
    echo "tests: ruff"
    .venv/bin/ruff check
    .venv/bin/ruff format --check
    echo "tests: shellcheck"
    find . \( -name .venv -o -name .git -o -name runs -o -name build \) -prune -o \
        -type f \( -name '*.sh' -o -name '*.sbatch' -o -path ./.ci/run \) -print0 |
        xargs -0 .venv/bin/shellcheck --external-sources
    echo "tests: hadolint"
    .venv/bin/hadolint docker/Dockerfile*
fi

# One thread a process: many tests start several.
export OMP_NUM_THREADS=1
exec .venv/bin/python -m pytest -m "$selected" "$@"
