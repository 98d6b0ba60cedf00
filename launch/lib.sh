# shellcheck shell=bash
# What launch/setup.sh is made of: finding a Python, judging the .venv that is there, making it and filling it.

root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd -P)
MINIMUM_PYTHON=3.12
MINIMUM_TORCH=2.11
# Newer ones work too, but there pip has to compile a part of megatron-core.
NEWEST_PYTHON_WITH_WHEELS=3.13
EXTRAS=(dev eval gpu hf)
SYSTEM_BIN_DIRS=(/usr/bin /usr/local/bin)

say() {
    printf 'setup: %s\n' "$*"
}

# fail CODE MESSAGE…
fail() {
    printf 'setup: error: %s\n' "${*:2}" >&2
    exit "$1"
}

# ---- Finding a Python ------------------------------------------------------------------------------------------------

# Prints the paths of all that may be a Python, best guess first. A name says nothing yet: pyenv's shims, for instance,
# are there for versions that are not switched on, and fail when run.
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

# probe_python PATH: runs it and sets python_path, python_version and python_torch (its version, or "none").
# If it cannot be used, fails with the reason in python_reason.
probe_python() {
    local verdict path version torch
    verdict=$(timeout 30 "$1" -I "$root/launch/probe_python.py" "$MINIMUM_PYTHON" "$MINIMUM_TORCH" \
        2>/dev/null </dev/null) || true
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
            python_reason="it does not run as a Python $MINIMUM_PYTHON or newer"
            return 1
            ;;
    esac
}

# Version 3.13.5 -> 3.13
minor_version() {
    printf '%s\n' "${1%.*}"
}

# 0 for a Python that has a torch already, 1 for one that all packages have ready-made wheels for, 2 for any other.
python_rank() {
    if [[ $python_torch != none ]]; then
        echo 0
    elif printf '%s\n' "$(minor_version "$python_version")" "$NEWEST_PYTHON_WITH_WHEELS" | sort -CV; then
        echo 1
    else
        echo 2
    fi
}

# Sets python_path, python_version and python_torch: to $PYTHON if it is set, else to the first of the best rank.
choose_python() {
    if [[ -n ${PYTHON:-} ]]; then
        probe_python "$PYTHON" || fail 2 "PYTHON=$PYTHON cannot be used: $python_reason"
        return
    fi
    local candidate rank best='' best_rank=3
    while IFS= read -r candidate; do
        probe_python "$candidate" || continue
        rank=$(python_rank)
        if ((rank < best_rank)); then
            best=$candidate best_rank=$rank
        fi
        ((best_rank > 0)) || break
    done < <(candidate_pythons)
    [[ -n $best ]] || fail 2 "no Python $MINIMUM_PYTHON or newer that runs: looked for python3 and python3.N on PATH" \
        "and in ${SYSTEM_BIN_DIRS[*]}, and at pyenv's versions; install one, or name one as PYTHON=/path/to/python3"
    probe_python "$best"
}

# ---- The environment and its stamp -----------------------------------------------------------------------------------

# .venv/maskmoe-setup says what .venv was made from, once it is complete. .venv/maskmoe-setup-unfinished is there while
# pip is at work: found by a later run, it means that the work was cut off and may have left half a package behind.

venv_stamp() {
    echo "$root/.venv/maskmoe-setup"
}

venv_unfinished() {
    echo "$root/.venv/maskmoe-setup-unfinished"
}

# stamp_value KEY: its value in the stamp, empty without one.
stamp_value() {
    if [[ -f $(venv_stamp) ]]; then
        sed -n "s/^$1=//p" "$(venv_stamp)"
    fi
}

# Digest of the files that decide what is installed.
inputs_digest() {
    (cd "$root" && sha256sum setup.py constraints.txt pyproject.toml) | sha256sum | cut -d' ' -f1
}

# union_of_extras LIST…: the comma-separated lists as one, sorted, each extra once.
union_of_extras() {
    printf '%s\n' "$@" | tr ',' '\n' | sed '/^$/d' | sort -u | paste -sd,
}

# check_extras LIST: pip would only warn of an extra that does not exist.
check_extras() {
    local extra
    for extra in ${1//,/ }; do
        [[ " ${EXTRAS[*]} " == *" $extra "* ]] || fail 2 "there is no extra $extra: choose from ${EXTRAS[*]}"
    done
}

# The version of the torch that .venv takes from the Python below it, or "none" if it has its own. Needs python_torch.
shared_torch() {
    if grep -q '^include-system-site-packages = true' "$root/.venv/pyvenv.cfg"; then
        echo "$python_torch"
    else
        echo none
    fi
}

# Fails, with the reason in rebuild_reason, if .venv cannot be kept. Else sets python_path, python_version and
# python_torch to those of the Python below .venv.
venv_is_sound() {
    local venv=$root/.venv
    rebuild_reason=
    if [[ ! -e $venv/pyvenv.cfg ]]; then
        rebuild_reason="there is none yet"
    elif [[ -e $(venv_unfinished) ]]; then
        rebuild_reason="an earlier set-up was cut off"
    elif [[ -n $(stamp_value root) && $(stamp_value root) != "$root" ]]; then
        rebuild_reason="it was made in $(stamp_value root)"
    elif ! probe_python "$venv/bin/python"; then
        rebuild_reason="its Python is broken or gone"
    elif [[ ! -d $venv/lib/python$(minor_version "$python_version")/site-packages/pip ]]; then
        rebuild_reason="it has no pip for Python $python_version"
    elif [[ -n $(stamp_value torch) && $(stamp_value torch) != "$(shared_torch)" ]]; then
        rebuild_reason="the torch below it changed from $(stamp_value torch) to $(shared_torch)"
    elif [[ -n ${PYTHON:-} ]]; then
        local path=$python_path version=$python_version torch=$python_torch
        choose_python
        if [[ ! $path -ef $python_path ]]; then
            rebuild_reason="it is of $path, and PYTHON names $python_path"
        fi
        python_path=$path python_version=$version python_torch=$torch
    fi
    [[ -z $rebuild_reason ]]
}

# Makes an empty .venv of the Python that choose_python finds; it stays marked as unfinished.
make_venv() {
    local venv=$root/.venv options=()
    if [[ -d $venv && -n $(ls -A "$venv") && ! -e $venv/pyvenv.cfg && ! -e $(venv_unfinished) ]]; then
        fail 2 "$venv is in the way and is no virtual environment: move it elsewhere"
    fi
    choose_python
    say "using $python_path (Python $python_version)"
    if [[ $python_torch != none ]]; then
        say "keeping the torch $python_torch that is installed there"
        options+=(--system-site-packages)
    fi
    mkdir -p "$venv"
    find "$venv/" -mindepth 1 -delete
    touch "$(venv_unfinished)"
    if "$python_path" -I -c 'import ensurepip' 2>/dev/null; then
        "$python_path" -I -m venv "${options[@]}" "$venv"
    else
        "$python_path" -I -m venv --without-pip "${options[@]}" "$venv"
        "$python_path" -I -m pip --disable-pip-version-check --python "$venv/bin/python" install --ignore-installed pip
    fi
}

# Prints the path of the constraints file for .venv, made to fit if torch comes from the Python below.
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

# install_package EXTRAS: the package in editable form, with all it needs.
install_package() {
    local constraints without_gpu
    constraints=$(constraints_file) || return
    without_gpu=$(tr ',' '\n' <<<"$1" | sed '/^gpu$/d' | paste -sd,)
    local pip=("$root/.venv/bin/python" -I -m pip --disable-pip-version-check install --constraint "$constraints")
    # A user's or site's PIP_USER=1 cannot be obeyed in a virtual environment.
    PIP_USER=0 "${pip[@]}" --editable "${root}${without_gpu:+[$without_gpu]}" || return
    if [[ ,$1, == *,gpu,* ]]; then
        # Transformer Engine is compiled against the torch that is now installed, so not in isolation.
        PIP_USER=0 "${pip[@]}" --no-build-isolation --editable "${root}[$1]" || return
    fi
}

# write_stamp EXTRAS
write_stamp() {
    local stamp
    stamp=$(venv_stamp)
    printf '%s\n' "root=$root" "python=$python_path" "torch=$(shared_torch)" "extras=$1" "inputs=$(inputs_digest)" \
        >"$stamp.new"
    mv "$stamp.new" "$stamp"
    rm -f "$(venv_unfinished)"
}

# refresh_venv EXTRAS: makes .venv hold the package with at least these extras, doing no more than is needed.
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
    say "installing MaskMoE${extras:+ with the extras $extras}; the first time this takes minutes"
    if ! install_package "$extras"; then
        # pip undoes what it could not finish, so an environment that worked before is kept.
        $fresh || rm -f "$(venv_unfinished)"
        fail 1 "pip could not install the packages (see above)"
    fi
    write_stamp "$extras"
    say "done in $SECONDS s"
}
