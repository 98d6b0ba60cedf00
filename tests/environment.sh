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

# extend_venv [OPTIONS OF venv]: makes an environment that also finds the packages of .venv, and sets own_site to the
# folder of its own packages.
extend_venv() {
    if grep -q '^include-system-site-packages = true' .venv/pyvenv.cfg; then
        set -- --system-site-packages "$@"
    fi
    .venv/bin/python -I -m venv --clear "$@" "$venv"
    own_site=$(packages_of "$venv/bin/python")
    printf 'import site; site.addsitedir("%s")\n' "$(packages_of .venv/bin/python)" >"$own_site/venv.pth"
}
