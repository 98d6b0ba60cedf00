#!/usr/bin/env bash
set -euo pipefail
unset CDPATH

usage() {
    cat <<'END'
usage: launch/quickstart.sh [--input FILE…] [--run-dir DIR] [options]

Sets up .venv, then trains a MaskMoE language model from raw text on this machine, evaluates the model, exports the
model to Hugging Face's format, and shows a sample of generated text. After an interruption, the same command resumes.

  --input FILE…  text to train on: JSON lines or plain text, also .gz and .zst
                 (default: sources and documentation of the installed Python and its packages)
  --run-dir DIR  folder of all files of the run (default: runs/quickstart)

Once launch/setup.sh has run, --help shows all options.
END
}

root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd -P)

for argument in "$@"; do
    if [[ $argument == -h || $argument == --help ]]; then
        if [[ -e $root/.venv/maskmoe-setup ]]; then
            exec "$root/.venv/bin/python" -P -m maskmoe quickstart --help
        fi
        usage
        exit
    fi
done

"$root/launch/setup.sh" --extras hf
exec "$root/.venv/bin/python" -P "$root/launch/run_checkout.py" quickstart "$@"
