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

VERSION=2.20.2
venv=$root/build/transformer_engine
stamp=$venv/complete

# in_venv STATEMENTS: runs Python of build/transformer_engine.
in_venv() {
    "$venv/bin/python" -I -c "$1"
}

# install ARGUMENTS: runs pip and prints one line for each package.
install() {
    PIP_USER=0 "$venv/bin/python" -I -m pip --disable-pip-version-check install --progress-bar off --verbose \
        --constraint constraints.txt "$@" 2>&1 | log_pip
}

# add_cuda: links the files of .venv's CUDA packages into this environment, where Transformer Engine searches for them,
# and adds the CUDA packages that Transformer Engine needs and torch does not.
add_cuda() {
    local toolkit
    toolkit=$(in_venv 'from importlib.metadata import version; print(version("cuda-toolkit"))' 2>/dev/null) ||
        stop "the torch of .venv does not come with CUDA 13: install Transformer Engine by hand"
    cp --recursive --symbolic-link "$site/nvidia" "$own_site/nvidia" || return
    install "cuda-toolkit[crt,curand]==$toolkit"
}

# compile: builds Transformer Engine's extension of torch without optimization, which is faster to compile. pip's cache
# is not used, because the extension in the cache may fit another torch.
compile() {
    mkdir "$venv/compiler"
    printf '#!/bin/sh\nexec g++ "$@" -O0\n' >"$venv/compiler/g++"
    chmod +x "$venv/compiler/g++"
    PATH=$venv/bin:$PATH CXX=$venv/compiler/g++ MAX_JOBS=${MAX_JOBS:-2} NVTE_FRAMEWORK=pytorch \
        NVTE_BUILD_USE_NVIDIA_WHEELS=1 NVTE_WITH_NCCL_EP=0 NVTE_PYTORCH_FORCE_BUILD=TRUE \
        install --no-cache-dir --no-build-isolation "transformer-engine-torch==$VERSION"
}

inputs="$VERSION $(.venv/bin/python -I -c 'import torch; print(torch.__version__, torch.__file__)')"
if [[ -e $stamp && $(<"$stamp") == "$inputs" ]]; then
    exit
fi
mkdir -p build
: >"$(pip_log)"

site=$(packages_of .venv/bin/python)
extend_venv

# Add Transformer Engine.
if ! in_venv 'import torch, transformer_engine.pytorch' 2>/dev/null; then
    type -P g++ >/dev/null || stop "the build of Transformer Engine needs g++: install the Debian package g++"
    [[ -e $(in_venv 'import sysconfig; print(sysconfig.get_path("include"))')/Python.h ]] ||
        stop "the build of Transformer Engine needs Python's headers: install the Debian package python3-dev"
    say "building Transformer Engine $VERSION; this takes about 10 minutes"
    if ! { add_cuda && install ninja "transformer-engine"{,-cu13}"==$VERSION" && compile; }; then
        grep -E '^ *(ERROR|error|FAILED):' "$(pip_log)" | head -n 5 >&2 || true
        stop "Transformer Engine could not be built: $(pip_log) has the output"
    fi
    say "finished in $SECONDS s"
fi
# Without torch's import first, the libraries of CUDA are not found.
problem=$(in_venv 'import torch, transformer_engine.pytorch' 2>&1 | tail -n 1) ||
    stop "Transformer Engine cannot be imported: $problem"
printf '%s\n' "$inputs" >"$stamp"
