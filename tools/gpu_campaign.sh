#!/usr/bin/env bash
set -euo pipefail
unset CDPATH

# Shows what works on the GPUs of this machine and how fast it is, in ten minutes on one GPU or 30 minutes on several:
#
#   tools/gpu_campaign.sh --output DIR [--only STEP…] [--minutes M]
#
# Without a GPU, all steps are tried on the CPU and nothing is measured. MaskMoE must be installed with the extra `dev`:
# by launch/setup.sh, or for the python3 on PATH, as in an image built by launch/docker.sh --build --extras dev,hf.

root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd -P)
python=$root/.venv/bin/python
[[ -x $python ]] || python=$(type -P python3 || true)
if ! "${python:-false}" -P -c 'import maskmoe' 2>/dev/null; then
    echo "error: MaskMoE is not installed: run launch/setup.sh --extras dev first" >&2
    exit 2
fi
export PYTHONPATH=$root/tools:$root/tools/benchmarks${PYTHONPATH:+:$PYTHONPATH}
exec "$python" -P -m gpu_campaign "$@"
