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

# MLflow without its server; SQLAlchemy and Alembic are for its SQLite files.
packages=(wandb==0.31.0 mlflow-skinny==3.17.2 sqlalchemy==2.0.51 alembic==1.20.1)
venv=build/tracking
stamp=$venv/complete

site=$(.venv/bin/python -I -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
inputs="${packages[*]} $site"
if [[ -e $stamp && $(<"$stamp") == "$inputs" ]]; then
    exit
fi

# Make an environment that also finds the packages of .venv.
mkdir -p build
options=(--clear)
if grep -q '^include-system-site-packages = true' .venv/pyvenv.cfg; then
    options+=(--system-site-packages)
fi
.venv/bin/python -I -m venv "${options[@]}" "$venv"
own_site=$("$venv/bin/python" -I -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
printf 'import site; site.addsitedir("%s")\n' "$site" >"$own_site/venv.pth"

printf 'tests: installing %s\n' "${packages[*]}"
if ! PIP_USER=0 "$venv/bin/python" -I -m pip --disable-pip-version-check install --progress-bar off \
    --constraint constraints.txt "${packages[@]}" >"$venv.log" 2>&1; then
    grep -E '^ *ERROR:' "$venv.log" | head -n 5 >&2 || true
    printf 'tests: error: W&B and MLflow could not be installed: %s has the output\n' "$venv.log" >&2
    exit 2
fi
printf '%s\n' "$inputs" >"$stamp"
