#!/usr/bin/env bash
set -euo pipefail

usage() {
    cat <<'END'
usage: launch/setup.sh [--extras LIST]

Makes .venv in the repository, or brings it up to date: a virtual environment with MaskMoE (editable) and all it needs,
in the versions of constraints.txt. When there is nothing to do it takes less than a second and needs no network.

  --extras LIST  optional parts, separated by commas: dev (tests and linters), gpu (Transformer Engine, compiled here),
                 hf (Hugging Face transformers), eval (lm-evaluation-harness); parts installed earlier stay
  PYTHON=PATH    (environment) the Python to use. Else: one that has torch already, then python3, python3.N on PATH,
                 the system's, pyenv's; of these the first that runs and is 3.12 or newer

Where the Python has torch already, as in NGC images, that torch is used and never replaced.
END
}

# shellcheck source=launch/lib.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/lib.sh"

extras=
while (($#)); do
    case $1 in
        --extras)
            (($# > 1)) || fail 2 "--extras needs a list, for instance --extras dev,hf"
            extras=$2
            shift 2
            ;;
        --extras=*)
            extras=${1#*=}
            shift
            ;;
        -h | --help)
            usage
            exit
            ;;
        *) fail 2 "unknown argument $1 (see launch/setup.sh --help)" ;;
    esac
done
extras=$(union_of_extras "$extras")
check_extras "$extras"

# A signal ends the script here, with .venv marked as unfinished, whatever pip makes of it.
trap 'exit 130' INT
trap 'exit 143' TERM

# Where nothing can be written, as in a container with a read-only root, nobody else sets up either.
if [[ ! -d $root/.venv || -w $root/.venv ]]; then
    exec {lock}>"$root/.venv.lock"
    if ! flock --nonblock "$lock"; then
        say "waiting for another set-up of this folder to end"
        flock "$lock"
    fi
fi
refresh_venv "$extras"
