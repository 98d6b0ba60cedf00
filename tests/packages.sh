#!/usr/bin/env bash
set -euo pipefail

usage() {
    cat <<'END'
usage: tests/packages.sh COMMAND=PACKAGE…

Sees to it that each COMMAND is there: installs the Debian PACKAGE of each that is missing, for which it must be root.

For example: tests/packages.sh slurmctld=slurm-wlm munged=munge
END
}

fail() {
    printf 'tests: error: %s\n' "$*" >&2
    exit 2
}

if (($# == 0)) || [[ $1 == -h || $1 == --help ]]; then
    usage
    exit
fi

# Daemons' folders are not on everybody's PATH.
PATH=$PATH:/usr/local/sbin:/usr/sbin:/sbin
missing=()
for pair in "$@"; do
    [[ $pair == ?*=?* ]] || fail "not COMMAND=PACKAGE: $pair"
    type -P "${pair%%=*}" >/dev/null || missing+=("${pair#*=}")
done
((${#missing[@]})) || exit 0

type -P apt-get >/dev/null || fail "missing: ${missing[*]}; there is no apt-get to install them: install them by hand"
((EUID == 0)) || fail "missing: ${missing[*]}; only root can install them: sudo apt-get install ${missing[*]}"
printf 'tests: installing %s\n' "${missing[*]}"
log=$(mktemp)
trap 'rm -f "$log"' EXIT
export DEBIAN_FRONTEND=noninteractive
# The tests start the daemons that they need, with settings of their own; the packages' own shall stay down.
export RUNLEVEL=1
if ! { apt-get update && apt-get install --yes --no-install-recommends "${missing[@]}"; } >"$log" 2>&1; then
    tail -n 20 "$log" >&2
    fail "apt-get could not install ${missing[*]} (see above)"
fi
