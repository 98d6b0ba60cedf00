#!/usr/bin/env bash
set -euo pipefail
unset CDPATH

# Pretrains the model of a YAML file on one node or many; see --help. MaskMoE must be installed: by launch/setup.sh, or
# for the python3 on PATH, as in the container images.

root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd -P)
python=$root/.venv/bin/python
[[ -x $python ]] || python=$(type -P python3) || {
    echo "error: MaskMoE is not installed: run launch/setup.sh first" >&2
    exit 2
}
exec "$python" -P "$root/launch/run_checkout.py" pretrain "$@"
