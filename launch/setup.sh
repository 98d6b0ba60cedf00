#!/usr/bin/env bash
set -euo pipefail
unset CDPATH

usage() {
    cat <<'END'
usage: launch/setup.sh [--extras LIST]

Makes or updates .venv in the repository: a virtual environment with MaskMoE (editable) and all its dependencies, in the
versions of constraints.txt. If .venv is up to date, the script takes less than a second and needs no network.

  --extras LIST  optional parts, separated by commas: data (pyarrow, to read tables), dev (tests and
                 linters), gpu (Transformer Engine, compiled here), hf (Hugging Face transformers), eval
                 (lm-evaluation-harness), muon (NVIDIA's emerging-optimizers, for --optimizer muon and lion), tune
                 (TRL and PEFT, for fine-tuning). Parts installed earlier stay. gpu needs g++ and Python's headers, no
                 GPU, and minutes.
  MAX_JOBS=N     (environment) compile N files of Transformer Engine at a time; each takes about 1.5 GB of memory.
                 Default: 4
  PYTHON=PATH    (environment) the Python to use. Default: the first working Python 3.12 or 3.13 among python3 and
                 python3.N on PATH, the system's and pyenv's; a Python that already has torch is preferred.

If the Python already has torch, as in NGC images, that torch is used and never replaced.
.venv/maskmoe-setup.log keeps pip's complete output.
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

# Exit on a signal even if pip ignores it; .venv stays marked as unfinished.
trap 'exit 130' INT
trap 'exit 143' TERM

# If .venv cannot be written to, as in a container with a read-only root, no other set-up can run, so no lock is needed.
if [[ ! -d $root/.venv || -w $root/.venv ]]; then
    exec {lock}>"$root/.venv.lock"
    code=0
    flock --nonblock "$lock" || code=$?
    if ((code == 1)); then
        say "waiting for another set-up of this folder to finish"
        flock "$lock"
    elif ((code)); then
        say "the file system has no locks: start only one set-up of this folder at a time"
    fi
fi
refresh_venv "$extras"
