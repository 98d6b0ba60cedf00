# shellcheck shell=bash
# Functions of launch/setup.sh: they find a Python, decide whether .venv can be kept, make .venv and install into it.

root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd -P)
MINIMUM_PYTHON=3.12
# With Python 3.14, Megatron-Core 0.19 cannot build its parser of arguments.
MAXIMUM_PYTHON=3.13
MINIMUM_TORCH=2.11
EXTRAS=(data dev eval gpu hf muon tune)
SYSTEM_BIN_DIRS=(/usr/bin /usr/local/bin)
NO_ANSWER="it has not answered for 30 s"

# Messages go to standard error: standard output belongs to the command that is started after the set-up.
say() {
    printf 'setup: %s\n' "$*" >&2
}

# fail CODE MESSAGE…
fail() {
    printf 'setup: error: %s\n' "${*:2}" >&2
    exit "$1"
}

# ---- Finding a Python ------------------------------------------------------------------------------------------------

# Prints the paths of all candidates for a Python, most likely first. A file name proves nothing: pyenv's shims, for
# instance, exist also for versions that are not activated, and then fail when they are run.
candidate_pythons() {
    local name dir
    type -aP python3 || true
    while IFS= read -r name; do
        type -aP "$name"
    done < <(compgen -c python3. | grep -xE 'python3\.[0-9]+' | sort -t. -k2,2nr -u)
    for dir in "${SYSTEM_BIN_DIRS[@]}"; do
        compgen -G "$dir/python3*" | grep -xE '.*/python3(\.[0-9]+)?' | sort -t. -k2,2nr || true
    done
    compgen -G "${PYENV_ROOT:-${HOME:-}/.pyenv}/versions/*/bin/python3" | sort -rV || true
}

# probe_python PATH: runs the Python and sets python_path, python_version and python_torch (torch's version, or "none").
# If the Python cannot be used, fails and sets python_reason.
probe_python() {
    local verdict path version torch
    verdict=$(timeout 30 "$1" -I "$root/launch/probe_python.py" "$MINIMUM_PYTHON" "$MAXIMUM_PYTHON" "$MINIMUM_TORCH" \
        2>/dev/null </dev/null) || [[ $? != 124 ]] || verdict=$'no\t'$NO_ANSWER
    case $verdict in
        ok$'\t'*)
            IFS=$'\t' read -r _ path version torch <<<"$verdict"
            python_path=$path python_version=$version python_torch=$torch python_reason=
            ;;
        no$'\t'*)
            python_reason=${verdict#*$'\t'}
            return 1
            ;;
        *)
            python_reason="it does not run as a Python $MINIMUM_PYTHON to $MAXIMUM_PYTHON"
            return 1
            ;;
    esac
}

# minor_version VERSION: prints 3.13 for 3.13.5.
minor_version() {
    printf '%s\n' "${1%.*}"
}

# Sets python_path, python_version and python_torch to those of $PYTHON if it is set, else of the first candidate that
# has torch already, else of the first candidate.
choose_python() {
    if [[ -n ${PYTHON:-} ]]; then
        probe_python "$PYTHON" || fail 2 "PYTHON=$PYTHON cannot be used: $python_reason"
        return
    fi
    local candidate best=''
    while IFS= read -r candidate; do
        probe_python "$candidate" || continue
        if [[ $python_torch != none ]]; then
            best=$candidate
            break
        fi
        best=${best:-$candidate}
    done < <(candidate_pythons)
    [[ -n $best ]] || fail 2 "no working Python $MINIMUM_PYTHON to $MAXIMUM_PYTHON found among python3 and python3.N" \
        "on PATH, in ${SYSTEM_BIN_DIRS[*]} and in pyenv: install one, or set PYTHON=/path/to/python3"
    probe_python "$best"
}

# ---- The environment and its stamp -----------------------------------------------------------------------------------

# .venv/maskmoe-setup, the stamp, records from what .venv was made; it is written when .venv is complete.
# .venv/maskmoe-setup-unfinished exists while pip runs. A later run that finds this file knows that an earlier run was
# interrupted and may have left a half-installed package.
# .venv/maskmoe-setup.log holds pip's complete output.

venv_stamp() {
    echo "$root/.venv/maskmoe-setup"
}

venv_unfinished() {
    echo "$root/.venv/maskmoe-setup-unfinished"
}

pip_log() {
    echo "$root/.venv/maskmoe-setup.log"
}

# stamp_value KEY: prints the key's value in the stamp, or nothing without a stamp.
stamp_value() {
    if [[ -f $(venv_stamp) ]]; then
        sed -n "s/^$1=//p" "$(venv_stamp)"
    fi
}

# Prints a digest of the files that decide what is installed.
inputs_digest() {
    (cd "$root" && sha256sum constraints.txt pyproject.toml) | sha256sum | cut -d' ' -f1
}

# union_of_extras LIST…: merges comma-separated lists into one sorted list without repetitions.
union_of_extras() {
    printf '%s\n' "$@" | tr ',' '\n' | sed '/^$/d' | sort -u | paste -sd,
}

# check_extras LIST: fails for an unknown extra, for which pip would only print a warning.
check_extras() {
    local extra
    for extra in ${1//,/ }; do
        [[ " ${EXTRAS[*]} " == *" $extra "* ]] || fail 2 "unknown extra $extra: choose from ${EXTRAS[*]}"
    done
}

# Prints the version of the torch that .venv shares with its base Python, or "none" if .venv has a torch of its own.
# python_torch must be set.
shared_torch() {
    if grep -q '^include-system-site-packages = true' "$root/.venv/pyvenv.cfg"; then
        echo "$python_torch"
    else
        echo none
    fi
}

# Succeeds if .venv can be kept, and sets python_path, python_version and python_torch to those of its base Python.
# Otherwise fails and sets rebuild_reason.
venv_is_sound() {
    local venv=$root/.venv
    rebuild_reason=
    if [[ ! -e $venv/pyvenv.cfg ]]; then
        rebuild_reason="it does not exist"
    elif [[ -e $(venv_unfinished) ]]; then
        rebuild_reason="an earlier set-up was interrupted"
    elif [[ -n $(stamp_value root) && $(stamp_value root) != "$root" ]]; then
        [[ ! -L $venv ]] || fail 2 "$venv links to the environment of $(stamp_value root): remove the link"
        rebuild_reason="it was made in $(stamp_value root)"
    elif ! probe_python "$venv/bin/python"; then
        # A file system that stalls is no reason to delete an environment that others use.
        [[ $python_reason != "$NO_ANSWER" ]] ||
            fail 1 "$venv/bin/python: $NO_ANSWER; .venv is unchanged: try again, or delete .venv to make it anew"
        rebuild_reason="its Python is broken or missing"
    elif [[ ! -d $venv/lib/python$(minor_version "$python_version")/site-packages/pip ]]; then
        rebuild_reason="it has no pip for Python $python_version"
    elif [[ -n $(stamp_value torch) && $(stamp_value torch) != "$(shared_torch)" ]]; then
        rebuild_reason="the torch of its base Python changed from $(stamp_value torch) to $(shared_torch)"
    elif [[ -n ${PYTHON:-} ]]; then
        local path=$python_path version=$python_version torch=$python_torch
        choose_python
        if [[ ! $path -ef $python_path ]]; then
            rebuild_reason="it uses $path, and PYTHON names $python_path"
        fi
        python_path=$path python_version=$version python_torch=$torch
    fi
    [[ -z $rebuild_reason ]]
}

# Makes an empty .venv from the Python that choose_python finds, and leaves it marked as unfinished.
make_venv() {
    local venv=$root/.venv options=()
    if [[ -d $venv && -n $(ls -A "$venv") && ! -e $venv/pyvenv.cfg && ! -e $(venv_unfinished) ]]; then
        fail 2 "$venv exists and is not a virtual environment: move it elsewhere"
    fi
    choose_python
    say "using $python_path (Python $python_version)"
    if [[ $python_torch != none ]]; then
        say "keeping this Python's torch $python_torch"
        options+=(--system-site-packages)
    fi
    mkdir -p "$venv"
    touch "$(venv_unfinished)"
    find "$venv/" -mindepth 1 ! -name maskmoe-setup-unfinished -delete
    if "$python_path" -I -c 'import ensurepip' 2>/dev/null; then
        "$python_path" -I -m venv "${options[@]}" "$venv"
    else
        "$python_path" -I -m venv --without-pip "${options[@]}" "$venv"
        PIP_USER=0 "$python_path" -I -m pip --disable-pip-version-check --python "$venv/bin/python" \
            install --ignore-installed pip 2>&1 | log_pip || fail_of_pip "pip could not be installed"
    fi
}

# Prints the path of the constraints file for .venv: constraints.txt, or a copy adapted to the base Python's torch.
constraints_file() {
    local torch adapted=$root/.venv/maskmoe-constraints.txt
    torch=$(shared_torch)
    if [[ $torch == none ]]; then
        echo "$root/constraints.txt"
    else
        "$python_path" -I "$root/launch/image_constraints.py" "$root/constraints.txt" "$torch" >"$adapted" || return
        echo "$adapted"
    fi
}

# Appends pip's output to the log, and prints one line on standard error for each package that pip fetches.
log_pip() {
    local file='([^/ ]+)-([0-9][^-/ ]*)(-[^/ ]*\.whl|\.tar\.gz)' size='( \([0-9.]+ [kMG]?B\))'
    local fetched="^ *(Downloading|Using cached|Processing) ([^ ]*/)?$file$size?( \\(from .*\\))?\$"
    tee -a "$(pip_log)" | sed --unbuffered --quiet --regexp-extended "s!$fetched!setup:   \\3 \\4\\6!p" >&2
}

# pip_install PYTHON CONSTRAINTS ARGUMENTS…: installs into the environment of a Python, in the versions of a file.
pip_install() {
    # PIP_USER=1, set by a user or a site, fails in a virtual environment.
    PIP_USER=0 "$1" -I -m pip --disable-pip-version-check install --progress-bar off --constraint "$2" "${@:3}" 2>&1 |
        log_pip
}

# packages_of PYTHON: prints the folder of its own packages.
packages_of() {
    "$1" -I -c 'import sysconfig; print(sysconfig.get_path("purelib"))'
}

# add_transformer_engine PYTHON CONSTRAINTS: compiles Transformer Engine for the torch of a Python's environment, unless
# the environment has it already. Needs no GPU.
add_transformer_engine() {
    local python=$1 constraints=$2 site own_site toolkit problem
    # Without torch's import first, the libraries of CUDA are not found.
    local imports=("$python" -I -c 'import torch, transformer_engine.pytorch')
    ! "${imports[@]}" 2>/dev/null || return 0
    site=$("$python" -I -c 'import pathlib, torch; print(pathlib.Path(torch.__file__).parents[1])') || return
    if [[ ! -d $site/nvidia/cu13 ]]; then
        say "error: torch does not come with the packages of CUDA 13: install Transformer Engine by hand"
        return 1
    elif ! type -P g++ >/dev/null; then
        say "error: the build of Transformer Engine needs g++: install the Debian package g++"
        return 1
    elif [[ ! -e $("$python" -I -c 'import sysconfig; print(sysconfig.get_path("include"))')/Python.h ]]; then
        say "error: the build of Transformer Engine needs Python's headers: install the Debian package python3-dev"
        return 1
    fi
    say "building Transformer Engine; this takes about 10 minutes on 2 cores"
    # The build searches one folder for CUDA's files. If torch is in another folder, link torch's files.
    own_site=$(packages_of "$python") || return
    [[ $site -ef $own_site ]] || cp --recursive --symbolic-link --force "$site/nvidia" "$own_site" || return
    # Add the CUDA packages that Transformer Engine needs and torch does not.
    toolkit=$("$python" -I -c 'from importlib.metadata import version; print(version("cuda-toolkit"))') || return
    pip_install "$python" "$constraints" ninja transformer-engine-cu13 "cuda-toolkit[crt,curand]==$toolkit" || return
    # An extension that is installed, or that is in pip's cache, may fit another torch.
    "$python" -I -m pip --disable-pip-version-check uninstall --quiet --yes transformer-engine-torch 2>/dev/null || return
    PATH=$(dirname -- "$python"):$PATH MAX_JOBS=${MAX_JOBS:-4} NVTE_FRAMEWORK=pytorch \
        NVTE_BUILD_USE_NVIDIA_WHEELS=1 NVTE_WITH_NCCL_EP=0 NVTE_PYTORCH_FORCE_BUILD=TRUE \
        pip_install "$python" "$constraints" --verbose --no-cache-dir --no-build-isolation \
        "transformer-engine[pytorch]" || return
    if ! problem=$("${imports[@]}" 2>&1); then
        say "error: Transformer Engine cannot be imported: ${problem##*$'\n'}"
        return 1
    fi
}

# install_package EXTRAS: installs the package in editable form with all its dependencies.
install_package() {
    local constraints without_gpu python=$root/.venv/bin/python
    constraints=$(constraints_file) || return
    without_gpu=$(tr ',' '\n' <<<"$1" | sed '/^gpu$/d' | paste -sd,)
    pip_install "$python" "$constraints" --editable "${root}${without_gpu:+[$without_gpu]}" || return
    [[ ,$1, != *,gpu,* ]] || add_transformer_engine "$python" "$constraints"
}

# write_stamp EXTRAS: records that .venv is complete.
write_stamp() {
    local stamp
    stamp=$(venv_stamp)
    printf '%s\n' "root=$root" "python=$python_path" "torch=$(shared_torch)" "extras=$1" "inputs=$(inputs_digest)" \
        >"$stamp.new"
    mv "$stamp.new" "$stamp"
    rm -f "$(venv_unfinished)"
}

# fail_of_pip MESSAGE: ends with pip's first errors and the message.
fail_of_pip() {
    grep -E '^ *(ERROR|error):' "$(pip_log)" | head -n 5 >&2 || true
    fail 1 "$1: $(pip_log) has its output"
}

# refresh_venv EXTRAS: makes or updates .venv so that it has the package with at least these extras.
refresh_venv() {
    local extras=$1 digest fresh=false
    digest=$(inputs_digest)
    if ! venv_is_sound; then
        say "making .venv: $rebuild_reason"
        fresh=true
        make_venv
    else
        extras=$(union_of_extras "$extras" "$(stamp_value extras)")
        if [[ $(stamp_value inputs) == "$digest" && $(stamp_value extras) == "$extras" ]]; then
            say ".venv is up to date"
            return
        fi
        say "updating .venv (Python $python_version)"
        touch "$(venv_unfinished)"
    fi
    say "installing MaskMoE${extras:+ with the extras $extras}; the first installation takes minutes"
    : >"$(pip_log)"
    if ! install_package "$extras"; then
        # pip rolls back a failed installation, so an environment that worked before still works.
        $fresh || rm -f "$(venv_unfinished)"
        fail_of_pip "pip could not install the packages"
    fi
    write_stamp "$extras"
    say "finished in $SECONDS s"
}
