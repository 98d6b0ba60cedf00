# shellcheck shell=bash
# Functions of the scripts that install packages for tests in an environment of build/. Such a script changes to the
# repository, sources this file, and sets venv to the folder of the environment.

# shellcheck source=launch/lib.sh
source launch/lib.sh

# These replace functions of launch/lib.sh.
say() {
    printf 'tests: %s\n' "$*"
}

pip_log() {
    echo "$venv.log"
}

stop() {
    printf 'tests: error: %s\n' "$*" >&2
    exit 2
}
