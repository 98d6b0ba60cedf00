#!/usr/bin/env bash
set -euo pipefail

usage() {
    cat <<'END'
usage: tests/packages.sh COMMAND=PACKAGE…

Installs the Debian PACKAGE of each COMMAND that is missing. Only root can install packages.

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

# PATH may lack the folders of daemons.
PATH=$PATH:/usr/local/sbin:/usr/sbin:/sbin
missing=()
for pair in "$@"; do
    [[ $pair == ?*=?* ]] || fail "expected COMMAND=PACKAGE, not $pair"
    type -P "${pair%%=*}" >/dev/null || missing+=("${pair#*=}")
done
((${#missing[@]})) || exit 0

type -P apt-get >/dev/null || fail "missing packages: ${missing[*]}; without apt-get, install them by hand"
((EUID == 0)) || fail "missing packages: ${missing[*]}; only root can install them: sudo apt-get install ${missing[*]}"
printf 'tests: installing %s\n' "${missing[*]}"
log=$(mktemp)
trap 'rm -f "$log"' EXIT
export DEBIAN_FRONTEND=noninteractive
# Keep the packages from starting their daemons: the tests start the daemons with their own settings.
export RUNLEVEL=1
if ! { apt-get update && apt-get install --yes --no-install-recommends "${missing[@]}"; } >"$log" 2>&1; then
    tail -n 20 "$log" >&2
    fail "apt-get could not install ${missing[*]} (see above)"
fi
