#!/usr/bin/env bash
set -euo pipefail
unset CDPATH

# Compares variants of a model, see --help. Sets up .venv first, unless a Python on PATH has MaskMoE, as in the
# container images.

root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd -P)
python=$root/.venv/bin/python
if [[ ! -e $root/.venv/maskmoe-setup ]] && python3 -P -c 'import maskmoe, transformers' 2>/dev/null; then
    python=python3
else
    "$root/launch/setup.sh" --extras hf
fi
exec "$python" -P -m maskmoe compare "$@"
