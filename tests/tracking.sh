#!/usr/bin/env bash
set -euo pipefail
unset CDPATH

usage() {
    cat <<'HELP'
usage: tests/tracking.sh

Installs W&B and MLflow in build/tracking, a virtual environment that adds them to the packages of .venv. This takes
about half a minute and 0.3 GB, and is repeated only if a version changes. The tests use both without a server.

build/tracking.log keeps pip's complete output.
HELP
}

if [[ ${1:-} == -h || ${1:-} == --help ]]; then
    usage
    exit
fi

cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."

# shellcheck source=tests/environment.sh
source tests/environment.sh

# MLflow without its server; SQLAlchemy and Alembic are for its SQLite files.
packages=(wandb==0.31.0 mlflow-skinny==3.17.2 sqlalchemy==2.0.51 alembic==1.20.1)
venv=$root/build/tracking
stamp=$venv/complete

inputs="${packages[*]} $(packages_of .venv/bin/python)"
if [[ -e $stamp && $(<"$stamp") == "$inputs" ]]; then
    exit
fi
mkdir -p build
extend_venv

say "installing ${packages[*]}"
if ! PIP_USER=0 "$venv/bin/python" -I -m pip --disable-pip-version-check install --progress-bar off \
    --constraint constraints.txt "${packages[@]}" >"$(pip_log)" 2>&1; then
    grep -E '^ *ERROR:' "$(pip_log)" | head -n 5 >&2 || true
    stop "W&B and MLflow could not be installed: $(pip_log) has the output"
fi
printf '%s\n' "$inputs" >"$stamp"
