#!/usr/bin/env bash
set -euo pipefail
unset CDPATH

usage() {
    cat <<'END'
usage: tests/run.sh [--all | --slurm | --docker | --te | --serving | --tracking | --megatron VERSION|PATH]
                    [pytest arguments]

Sets up .venv and runs the checks (ruff, pyrefly, import-linter, shellcheck and hadolint), then the tests. Tests that
need a GPU run only on a machine with a GPU.

  --all             also run the slow tests
  --slurm           run only the tests that need a Slurm cluster of two nodes, or two hosts. The tests set up both on
                    this machine and remove them. Needs root; installs the Debian packages slurm-wlm and iproute2.
  --docker          run only the tests that build and use the image for CPUs. Needs root; installs the Debian packages
                    podman, buildah, runc and mmdebstrap. Images are kept in build/containers.
                    BASE_IMAGE=NAME (environment): build on this image (default: a small Debian, made from packages)
  --te              run only the tests of Transformer Engine's own modules, which need no GPU. The first run builds
                    Transformer Engine in build/transformer_engine, in about 10 minutes on 2 cores (see
                    tests/transformer_engine.sh --help); the tests take half a minute.
  --serving         run only the tests that serve exported models with vLLM on CPUs. The first run installs vLLM in
                    build/serving, in a few minutes (see tests/serving.sh --help); the tests take about 15 minutes.
  --tracking        run only the tests of W&B and MLflow, which need no server. The first run installs both in
                    build/tracking, in half a minute (see tests/tracking.sh --help).
  --megatron VERSION|PATH
                    run only the default tests, with another megatron-core: a released version, a checkout of
                    Megatron-LM, or a wheel. megatron-core is installed in build/megatron (see tests/megatron.sh
                    --help); .venv is not changed. Without pytest arguments, first lists the changed internals of
                    Megatron-Core (docs/megatron-internals.md) and runs pyrefly.
  pytest arguments  run only pytest, with these arguments; paths are relative to the repository. For example:
                    tests/run.sh tests/routing_mask -k digest
END
}

fail() {
    printf 'tests: error: %s\n' "$*" >&2
    exit 2
}

cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."

# Select the tests and the Debian packages that they need. Many tests wait for processes that they start, so three
# processes share two cores. They start with the tests of training, which take longest. The slowest tests are listed at
# the end.
not_elsewhere="not slurm and not docker and not te and not serving and not tracking"
selected="not slow and $not_elsewhere" checks=true
packages=() python=.venv/bin/python megatron=
three_workers=(--numprocesses 3 --no-loadscope-reorder --durations=25 --durations-min=4) workers=() examples=()
(($#)) || workers=("${three_workers[@]}")
case ${1:-} in
    --all)
        selected=$not_elsewhere examples=(--hypothesis-profile=thorough)
        shift
        ;;
    --slurm)
        selected=slurm checks=false
        packages=(slurmctld=slurm-wlm ip=iproute2)
        shift
        ;;
    --docker)
        selected=docker checks=false
        packages=(podman=podman buildah=buildah runc=runc mmdebstrap=mmdebstrap)
        shift
        ;;
    --te)
        selected=te checks=false python=build/transformer_engine/bin/python
        shift
        ;;
    --serving)
        selected=serving checks=false
        shift
        ;;
    --tracking)
        selected=tracking checks=false python=build/tracking/bin/python
        shift
        ;;
    --megatron)
        (($# > 1)) || fail "--megatron needs a version of megatron-core, a checkout of Megatron-LM or a wheel"
        tests/megatron.sh --check "$2"
        megatron=$2 checks=false
        shift 2
        (($#)) || workers=("${three_workers[@]}")
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
if has_gpu; then
    workers=() # the tests would share the GPU's memory
else
    selected+=" and not gpu"
fi
case $python in
    build/transformer_engine/*) tests/transformer_engine.sh ;;
    build/tracking/*) tests/tracking.sh ;;
esac
[[ $selected != serving* ]] || tests/serving.sh
if ((${#packages[@]})); then
    ((EUID == 0)) || fail "these tests need root, because they make networks, hosts and containers"
    tests/packages.sh "${packages[@]}"
fi

if $checks && (($# == 0)); then
    echo "tests: ruff"
    .venv/bin/ruff check
    .venv/bin/ruff format --check
    echo "tests: pyrefly"
    .venv/bin/pyrefly check
    echo "tests: import-linter"
    .venv/bin/lint-imports --no-logo
    echo "tests: shellcheck"
    find . \( -name .venv -o -name .git -o -name runs -o -name build \) -prune -o \
        -type f \( -name '*.sh' -o -name '*.sbatch' -o -path ./.ci/run \) -print0 |
        xargs -0 .venv/bin/shellcheck --external-sources
    echo "tests: hadolint"
    .venv/bin/hadolint docker/Dockerfile*
fi

# Many tests start several processes, so each process computes with one thread.
export OMP_NUM_THREADS=1
tests=("$python" -m pytest -m "$selected" "${workers[@]}" "${examples[@]}" "$@")
[[ -n $megatron ]] || exec "${tests[@]}"

# Every Python that a test starts finds this megatron-core before the one of .venv, also the Pythons of launch/*.sh.
site=$(tests/megatron.sh "$megatron")
export PYTHONPATH=$site${PYTHONPATH:+:$PYTHONPATH}
code=0
if (($# == 0)); then
    echo "tests: changes of the internals"
    "$python" docs/generators/internals.py --check || code=1
    echo "tests: pyrefly"
    .venv/bin/pyrefly check --search-path "$site" --search-path . || code=1
fi
# pyproject.toml names only the warnings of the tested version, so no warning is an error here.
"${tests[@]}" -W default || code=$?
version=$("$python" -c 'from importlib.metadata import version; print(version("megatron-core"))')
echo "tests: ran with megatron-core $version ($site)"
exit "$code"
