#!/usr/bin/env bash
set -euo pipefail
unset CDPATH

usage() {
    cat <<'HELP'
usage: tests/megatron.sh [--check] VERSION|PATH

Installs another megatron-core in a virtual environment of build/megatron that adds it to the packages of .venv, and
prints the folder of its packages. `PYTHONPATH=FOLDER .venv/bin/python` uses this megatron-core. The installation is
repeated only if the files of PATH change, or if .venv gets another Python. .venv and PATH are not changed.

  VERSION  a released version, such as 0.19.0
  PATH     a checkout of Megatron-LM, or a wheel of megatron-core; relative to the repository. The dataset helpers of a
           checkout are compiled, which needs g++ and Python's headers.
  --check  only check the argument, without network and without .venv

build/megatron/NAME.log keeps pip's complete output.
HELP
}

check_only=false
case ${1:-} in
    -h | --help)
        usage
        exit
        ;;
    --check)
        check_only=true
        shift
        ;;
esac

cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."
# shellcheck source=tests/environment.sh
source tests/environment.sh

# This replaces a function of tests/environment.sh: stdout is for the result.
say() {
    printf 'tests: %s\n' "$*" >&2
}

# kind_of MEGATRON: prints version, wheel or checkout, or stops.
kind_of() {
    if [[ -d $1 ]]; then
        [[ -f $1/megatron/core/__init__.py && -f $1/pyproject.toml ]] ||
            stop "$1 is not a checkout of Megatron-LM: it lacks megatron/core or pyproject.toml"
        echo checkout
    elif [[ -e $1 ]]; then
        [[ $(basename -- "$1") == megatron_core-*.whl ]] || stop "$1 is not a wheel of megatron-core"
        echo wheel
    elif [[ $1 =~ ^[0-9]+(\.[0-9]+)+((a|b|rc|\.dev|\.post)[0-9]+)*$ ]]; then
        echo version
    else
        stop "$1 does not exist, and is not a version such as 0.19.0: give a version of megatron-core, a checkout of" \
            "Megatron-LM or a wheel"
    fi
}

# list_sources CHECKOUT: prints the paths of the files from which the package is built, relative to the checkout.
list_sources() {
    (cd -- "$1" && find . -maxdepth 1 -type f && find megatron -type f -not -path '*/__pycache__/*' -not -name '*.so') |
        sort
}

# digest_of MEGATRON: prints what identifies a megatron-core: its version, or a digest of its files.
digest_of() {
    case $kind in
        version) echo "$1" ;;
        wheel) sha256sum <"$1" ;;
        checkout) (cd -- "$1" && list_sources . | xargs -d '\n' sha256sum) | sha256sum ;;
    esac
}

# install REQUIREMENT: runs pip, whose megatron-core may be any version. pip leaves the packages of .venv alone, because
# they lie outside the environment.
install() {
    local constraints=.venv/maskmoe-constraints.txt # constraints.txt, adapted to the torch of the base Python
    [[ -e $constraints ]] || constraints=constraints.txt
    sed '/^megatron-core==/d' "$constraints" >"$venv/constraints.txt"
    # Without NO_VCS_VERSION, the version of a checkout would end with the commit of this repository.
    NO_VCS_VERSION=1 PIP_USER=0 "$venv/bin/python" -I -m pip --disable-pip-version-check install --progress-bar off \
        --constraint "$venv/constraints.txt" "$1" >>"$(pip_log)" 2>&1
}

# install_megatron MEGATRON: a checkout is built from a copy, because setuptools writes its files beside the sources.
install_megatron() {
    case $kind in
        version) install "megatron-core==$1" ;;
        wheel) install "$1" ;;
        checkout)
            mkdir "$venv/source"
            (cd -- "$1" && list_sources . | xargs -d '\n' cp --parents --target-directory "$venv/source")
            install "$venv/source" || return
            find "$venv/source" -delete
            ;;
    esac
}

# explain_failure MEGATRON: stops with the reason why pip failed.
explain_failure() {
    local releases
    find "$venv" -delete
    releases=$(sed -nE 's/^ERROR: Could not find .* megatron-core==.* \(from versions: (.*)\)$/\1/p' "$(pip_log)" |
        tr -d ' ' | tr ',' '\n' | grep -E '^[0-9.]+$' | tail -n 3 | paste -sd,) || true
    [[ -z $releases ]] || stop "the package index has no megatron-core $1; its newest releases are ${releases//,/, }"
    grep -E '^ *(ERROR|error):' "$(pip_log)" | head -n 5 >&2 || true
    stop "megatron-core could not be installed: $(pip_log) has pip's output"
}

(($# == 1)) && [[ -n $1 ]] || stop "give one version or path of megatron-core (see tests/megatron.sh --help)"
kind=$(kind_of "$1")
! $check_only || exit 0

name=$1
[[ $kind == version ]] || name=$(basename -- "$(realpath -- "$1")")
venv=$root/build/megatron/$name
stamp=$venv/complete
inputs="$(digest_of "$1") $(packages_of .venv/bin/python)"
if [[ ! -e $stamp || $(<"$stamp") != "$inputs" ]]; then
    mkdir -p build/megatron
    : >"$(pip_log)"
    say "installing megatron-core: $1"

    extend_venv --without-pip

    # `megatron` is a namespace package: parts that are missing here would be taken from .venv.
    install_megatron "$1" || explain_failure "$1"
    for part in core training; do
        [[ -e $own_site/megatron/$part/__init__.py ]] || stop "this megatron-core has no megatron.$part: $1"
    done
    compgen -G "$own_site/megatron/core/datasets/helpers_cpp*.so" >/dev/null ||
        stop "the dataset helpers could not be compiled: install the Debian packages g++ and python3-dev"
    printf '%s\n' "$inputs" >"$stamp"
    say "finished in $SECONDS s"
fi
packages_of "$venv/bin/python"
