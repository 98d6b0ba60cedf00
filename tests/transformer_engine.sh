#!/usr/bin/env bash
set -euo pipefail
unset CDPATH

usage() {
    cat <<'HELP'
usage: tests/transformer_engine.sh

Builds Transformer Engine for the torch of .venv in build/transformer_engine, a virtual environment that adds it to the
packages of .venv. The build needs g++, Python's headers and no GPU. It takes about 10 minutes on 2 cores, and is
repeated only if the version of torch or of Transformer Engine changes. If .venv has Transformer Engine already, nothing
is built.

  MAX_JOBS=N  (environment) compile N files at a time; each takes about 1.5 GB of memory. Default: 2

build/transformer_engine.log keeps pip's complete output.
HELP
}

if [[ ${1:-} == -h || ${1:-} == --help ]]; then
    usage
    exit
fi

cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."
# shellcheck source=tests/environment.sh
source tests/environment.sh

venv=$root/build/transformer_engine
stamp=$venv/complete

inputs="$(sed -n 's/^transformer-engine==//p' constraints.txt)"
inputs+=" $(.venv/bin/python -I -c 'import torch; print(torch.__version__, torch.__file__)')"
if [[ -e $stamp && $(<"$stamp") == "$inputs" ]]; then
    exit
fi
mkdir -p build
: >"$(pip_log)"
extend_venv

# Build without optimization, which is faster.
mkdir "$venv/compiler"
printf '#!/bin/sh\nexec g++ "$@" -O0\n' >"$venv/compiler/g++"
chmod +x "$venv/compiler/g++"
if ! CXX=$venv/compiler/g++ MAX_JOBS=${MAX_JOBS:-2} add_transformer_engine "$venv/bin/python" constraints.txt; then
    grep -E '^ *(ERROR|error|FAILED):' "$(pip_log)" | head -n 5 >&2 || true
    stop "Transformer Engine could not be built: $(pip_log) has the output"
fi
say "finished in $SECONDS s"
printf '%s\n' "$inputs" >"$stamp"
