#!/usr/bin/env bash
set -euo pipefail
unset CDPATH

# Pretrains the model of a YAML file on one node or many; see --help. MaskMoE must be installed: by launch/setup.sh, or
# for the python3 on PATH, as in the container images.

root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd -P)
python=$root/.venv/bin/python
fail() {
    echo "error: $1" >&2
    exit 2
}
[[ ! -L $python || -e $python ]] || fail "$(uname -n) has no $(readlink -m "$python"), with which .venv was made: run \
PYTHON=/path/to/python3 launch/setup.sh with a Python that all nodes have"
# A Python older than 3.11 lacks the option -P.
[[ -x $python ]] || { python=$(type -P python3) && "$python" -P -c 'import maskmoe' 2>/dev/null; } ||
    fail "MaskMoE is not installed: run launch/setup.sh first"
exec "$python" -P -m maskmoe pretrain "$@"
