#!/usr/bin/env bash
set -euo pipefail

usage() {
    cat <<'END'
usage: tests/run.sh [--all] [pytest arguments]

Sets up .venv and runs the checks: ruff, shellcheck, then pytest. The tests that need a GPU run where there is one.

  --all             the slow tests too
  pytest arguments  run pytest only, with these; paths are relative to the repository. For example:
                    tests/run.sh tests/routing_mask -k digest
END
}

cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."

excluded="not slow"
case ${1:-} in
    --all)
        excluded=
        shift
        ;;
    -h | --help)
        usage
        exit
        ;;
esac

has_gpu() {
    nvidia-smi --list-gpus 2>/dev/null | grep -q '^GPU' &&
        .venv/bin/python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'
}

launch/setup.sh --extras dev,hf
has_gpu || excluded+="${excluded:+ and }not gpu"

if (($# == 0)); then
    echo "tests: ruff"
    .venv/bin/ruff check
    .venv/bin/ruff format --check
    echo "tests: shellcheck"
    find . \( -name .venv -o -name .git -o -name runs \) -prune -o \
        -type f \( -name '*.sh' -o -path ./.ci/run \) -print0 |
        xargs -0 .venv/bin/shellcheck --external-sources
fi

# One thread a process: many tests start several.
export OMP_NUM_THREADS=1
exec .venv/bin/python -m pytest -m "$excluded" "$@"
